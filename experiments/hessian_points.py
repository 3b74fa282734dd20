"""Where `experiments.hessian_eigs` looks at the loss: weights from files of any kind, and samples of a posterior."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.common import SettingsError
from experiments.train_weights import WEIGHTS, read_weights
from lowrank_bdl.training import checkpoints

LAST = "last"


@dataclass(frozen=True)
class Point:
    """One setting of all weights of a network.

    Attributes:
        name: Of its file, unique in a run.
        label: For tables and figures.
        epoch: Of training, where the file tells.
        load_: Writes the weights into the network.
        needs_batch_norm: Whether the file's batch-norm statistics are of other weights, or it has none.
    """

    name: str
    label: str
    epoch: int | None
    load_: Callable[[nn.Module], None]
    needs_batch_norm: bool


def points_of(files: list[str], source: str, model: nn.Module) -> list[Point]:
    """Read the weights of every file, and see that they fit the network; nothing is written into it.

    Args:
        files: Folders or ``weights.safetensors`` of finished runs of `experiments.train`, checkpoints of such runs
            (``checkpoint-EPOCH.safetensors``), or state dicts by ``torch.save``, bare or under ``state_dict`` as
            swa_gaussian wrote them.
        source: Which of a finished run's weights: ``last``, or a name such as ``SWA``.
        model: The network.

    Raises:
        SettingsError: If a file is missing, damaged, or of another network, or the same one is named twice.
    """
    found = []
    for file in files:
        try:
            found.append(read_point(Path(file), source, model))
        except FileNotFoundError:
            raise SettingsError(f"--file {file}: there is no such file") from None
        except (lb.CheckpointError, OSError) as error:
            raise SettingsError(f"--file {file}: {' '.join(str(error).split())}") from None
    names = [point.name for point in found]
    if len(set(names)) < len(names):
        raise SettingsError(f"--file must name each file once; got {', '.join(files)}")
    return found


def read_point(path: Path, source: str, model: nn.Module) -> Point:
    """Read one file.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If it is damaged, or of another network.
        SettingsError: If it has no weights of that name.
    """
    file = path / WEIGHTS if path.is_dir() else path
    name = f"{path.parent.name}-{path.stem}".strip("-") if path.is_file() else path.name
    if file.suffix != ".safetensors":
        return of_state(name, path.name, *read_torch(file), source, model)
    try:
        weights = read_weights(file)
    except lb.CheckpointError as first:
        try:
            state, _, _ = checkpoints.read(file)
        except lb.CheckpointError:
            raise first from None
        return of_state(name, path.stem, state["model"], int(state["epoch"]), source, model)
    weights.check(model)
    theta = weights.last if source == LAST else weights.thetas.get(source)
    if theta is None:
        raise SettingsError(f"--source {source}: {file} has {', '.join(weights.thetas)}")
    label = next(iter(weights.thetas)) if source == LAST else source
    needs = theta is not weights.last
    return Point(f"{name}-{label}", f"{path.name} {label}", None, lambda m: weights.load_into_(m, theta), needs)


def read_torch(path: Path) -> tuple[Mapping[str, Any], int | None]:
    """Read a state dict that torch.save wrote, without running code from the file.

    Returns:
        The state dict, and the epoch if the file has one.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises a dozen kinds for damaged and foreign files
        raise lb.CheckpointError(f"expected weights by torch.save; {str(error).splitlines()[0]}") from None
    epoch = found.get("epoch") if isinstance(found, dict) else None
    state = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise lb.CheckpointError("expected a dict of tensors, bare or under 'state_dict'.")
    return state, epoch if isinstance(epoch, int) else None


def of_state(
    name: str, label: str, state: Mapping[str, Any], epoch: int | None, source: str, model: nn.Module
) -> Point:
    """Make a point of a state dict; see that it has every tensor of the network, in its shape, and finite.

    Raises:
        CheckpointError: Names the first that differs.
        SettingsError: If other weights than the last are asked for.
    """
    if source != LAST:
        raise SettingsError(f"--source {source}: {label} holds one set of weights; leave --source out")
    for key, own in model.state_dict().items():
        got = tuple(state[key].shape) if key in state else "no such tensor"
        if got != tuple(own.shape):
            raise lb.CheckpointError(
                f"the weights are of another network: {key!r}: expected {tuple(own.shape)}, got {got}."
            )
        if not bool(state[key].isfinite().all()):
            raise lb.CheckpointError(f"{key!r} must hold finite numbers; it holds NaN or infinity.")
    extra = [key for key in state if key not in model.state_dict()]
    if extra:
        raise lb.CheckpointError(f"the weights are of another network, which has {extra[0]!r}.")
    return Point(name, label, epoch, lambda m: _load(m, state), False)


def _load(model: nn.Module, state: Mapping[str, Any]) -> None:
    model.load_state_dict(state)


def samples_of(file: str, count: int, seed: int, base: Point | None, model: nn.Module) -> list[Point]:
    """Draw from a posterior; parameters that it leaves out, and buffers, are the base's.

    Args:
        file: What ``posterior.save`` wrote, such as posterior.safetensors of `experiments.train`.
        count: Number of draws.
        seed: Of the draws.
        base: Loaded before a draw is; None if the posterior holds every parameter.
        model: The network.

    Raises:
        SettingsError: If the file is missing, damaged or of another network.
    """
    try:
        posterior = lb.load_posterior(file)
    except FileNotFoundError:
        raise SettingsError(f"--posterior {file}: there is no such file") from None
    except (lb.LowRankBDLError, OSError) as error:
        raise SettingsError(f"--posterior {file}: {' '.join(str(error).split())}") from None
    layout, whole = posterior.layout, lb.ParameterLayout.from_module(model)
    own = lb.ParameterLayout.from_module(model, include=list(layout.names)) if layout is not None else None
    difference = "it names no parameters" if own is None else own.difference(layout)
    if difference is not None:
        raise SettingsError(f"--posterior {file} is of another network: {difference}")
    assert layout is not None
    if base is None and set(layout.names) != set(whole.names):
        raise SettingsError(
            f"--posterior {file} holds {len(layout.names)} of {len(whole.names)} parameters; add --file"
        )
    draws = posterior.sample(count, generator=torch.Generator().manual_seed(seed))

    def load(draw: Tensor) -> Callable[[nn.Module], None]:
        def load_(network: nn.Module) -> None:
            if base is not None:
                base.load_(network)
            layout.assign_(network, draw)

        return load_

    return [Point(f"sample-{i}", f"sample {i}", None, load(draw), True) for i, draw in enumerate(draws, start=1)]
