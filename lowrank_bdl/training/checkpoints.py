"""The complete state of a training run in one file: tensors and JSON, written atomically, read without unpickling."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.training.packing import pack, unpack

KIND = "training"
_PARTS = ("state", "facts", "settings")


def write(
    path: str | os.PathLike[str], state: Mapping[str, Any], facts: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Write a state so that a killed process leaves the old file or the new one.

    Args:
        path: The file; replaced if it exists.
        state: Nested dicts and lists of tensors and plain values.
        facts: JSON values about the run that its resume must share.
        settings: JSON values of the caller.

    Raises:
        TypeError: If something is neither a tensor nor JSON; names it.
        OSError: If the file cannot be written.
    """
    skeleton, tensors = pack(state)
    write_tensors(path, KIND, tensors, {"state": skeleton, "facts": dict(facts), "settings": dict(settings)})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read what :func:`write` wrote, tensors on the CPU.

    Args:
        path: The file.

    Returns:
        State, facts and settings. A trainer's state has the entries ``epoch``, ``history``, ``model``, ``optimizer``,
        ``schedule``, ``scaler``, ``collections`` and ``random``.

    Raises:
        CheckpointError: If the file is truncated, foreign or damaged.
        FileNotFoundError: If there is no such file.
    """
    tensors, metadata = read_tensors(path, KIND, ())
    missing = [key for key in _PARTS if not isinstance(metadata.get(key), dict)]
    if missing:
        raise CheckpointError(f"{os.fspath(path)} has a damaged header: no {', '.join(missing)}.")
    return unpack(metadata["state"], tensors), metadata["facts"], metadata["settings"]


def numbered(path: str | os.PathLike[str], epoch: int) -> Path:
    """Return the name of the checkpoint that is kept after an epoch.

    Args:
        path: Name of the checkpoint that is replaced.
        epoch: The epoch.

    Example:
        >>> numbered("runs/a/checkpoint.safetensors", 25).name
        'checkpoint-25.safetensors'
    """
    plain = Path(path)
    return plain.with_name(f"{plain.stem}-{epoch}{plain.suffix}")


def link(source: Path, path: str | os.PathLike[str]) -> None:
    """Make a second name for a file, atomically: no second copy where the file system can.

    Args:
        source: The file.
        path: The second name; replaced if it exists.

    Raises:
        OSError: If it cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def refuse_differences(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise if two records of the same run differ.

    Args:
        what: What they are of.
        old: The values in the file.
        new: The values now.

    Raises:
        CheckpointError: Names every difference with both values.
    """
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if keys:
        changes = "; ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys)
        raise CheckpointError(f"{what} differ: {changes}.")


def check_module(what: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise if a module's state has other names, shapes or dtypes than the one to be loaded.

    Args:
        what: What the module is.
        module: The module.
        state: What :meth:`~torch.nn.Module.state_dict` gave.

    Raises:
        CheckpointError: Names the first tensor that differs.
    """
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    for key in [*own, *(key for key in state if key not in own)]:
        if key not in own or key not in state:
            raise CheckpointError(f"{what} does not fit: {key!r} is only in the {'file' if key in state else 'model'}.")
        if own[key].shape != state[key].shape or own[key].dtype != state[key].dtype:
            raise CheckpointError(
                f"{what} does not fit: {key!r} is {tuple(own[key].shape)} {own[key].dtype}; the file has "
                f"{tuple(state[key].shape)} {state[key].dtype}."
            )


def check_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise if an optimizer has other groups than the state to be loaded.

    Args:
        optimizer: The optimizer.
        state: What its ``state_dict`` gave.

    Raises:
        CheckpointError: Names both.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    found = [len(group["params"]) for group in state["param_groups"]]
    if own != found:
        raise CheckpointError(f"the optimizer has groups of {own} parameters; the file has {found}.")


def without_functions(state: Any) -> Any:
    """Drop functions from a scheduler's state: it is made with them, and will be again.

    Args:
        state: What its ``state_dict`` gave.

    Returns:
        A copy that can be written.

    Example:
        >>> without_functions({"last_epoch": 3, "anneal_func": abs, "_schedulers": [{"lr_lambdas": [abs]}]})
        {'last_epoch': 3, '_schedulers': [{'lr_lambdas': []}]}
    """
    if isinstance(state, dict):
        return {key: without_functions(value) for key, value in state.items() if not callable(value)}
    if isinstance(state, list):
        return [without_functions(value) for value in state if not callable(value)]
    return state
