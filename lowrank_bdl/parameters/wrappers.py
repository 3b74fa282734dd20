"""Networks inside torch's wrappers: their names without the wrappers' own, and what wrappers must not do meanwhile."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lowrank_bdl.errors import LowRankBDLError

_CHECKPOINT_WRAPPERS = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"


def _of(module: str, name: str) -> tuple[type, ...]:
    """A class by its name if its module, slow to import, has been; otherwise there is no instance of it."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if isinstance(found, type) else ()


def _wrappers(model: nn.Module) -> list[tuple[str, str]]:
    """Path of every wrapper of torch's in a model, and under which name it holds its network."""
    holders: dict[str, tuple[type, ...]] = {
        "module": (DataParallel, DistributedDataParallel, AveragedModel),
        "_orig_mod": _of("torch._dynamo.eval_frame", "OptimizedModule"),
        "_checkpoint_wrapped_module": _of(_CHECKPOINT_WRAPPERS, "ActivationWrapper"),
    }
    every = sum(holders.values(), ())
    return [
        (path, next(name for name, types in holders.items() if isinstance(module, types)))
        for path, module in nn.Module.named_modules(model, remove_duplicate=False)
        if isinstance(module, every)
    ]


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """Return the function that takes wrappers' names out of a parameter's, buffer's or module's.

    Args:
        model: Any module, wrapped itself or holding wrapped ones. A child that a network calls ``module`` itself keeps
            its name: only what is an instance of torch's classes is a wrapper.

    Example:
        >>> net = nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))
        >>> plain_names(net)("0.module.weight")
        '0.weight'
    """
    require_module(model)
    wrappers = [(f"{path}.{child}" if path else child, path) for path, child in _wrappers(model)]
    if not wrappers:
        return lambda name: name
    wrappers.sort(key=lambda pair: -len(pair[0]))  # inner ones first, while the outer ones' names are still there

    def without(name: str, wrapper: tuple[str, str]) -> str:
        prefix, path = wrapper
        if name == prefix:
            return path
        if not name.startswith(f"{prefix}."):
            return name
        rest = name[len(prefix) + 1 :]
        return f"{path}.{rest}" if path else rest

    return lambda name: reduce(without, wrappers, name)


def without_wrappers(name: str) -> str:
    """Take out of a name what only wrappers of compiled networks and checkpoints are called.

    Example:
        >>> without_wrappers("body._orig_mod.0._checkpoint_wrapped_module.weight")
        'body.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def _renamed(model: nn.Module, pairs: list[tuple[str, Any]]) -> list[tuple[str, str, Any]]:
    """Plain name, name in the model, and the thing; the model's names throughout if two plain ones were the same."""
    plain = plain_names(model)
    found = [(plain(name), name, thing) for name, thing in pairs]
    distinct = len({name for name, _, _ in found}) == len(found)
    return found if distinct else [(name, name, thing) for _, name, thing in found]


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Return every parameter by its plain name.

    Args:
        model: Any module.
        remove_duplicate: Name a tied parameter by its first name only, else by each of its names.

    Raises:
        LowRankBDLError: If the model is sharded.
    """
    every = {plain: parameter for plain, _, parameter in _parameters(model)}
    if not remove_duplicate:
        return every
    first = {id(parameter): name for name, parameter in reversed(every.items())}
    return {name: parameter for name, parameter in every.items() if first[id(parameter)] == name}


def names_in(model: nn.Module) -> dict[str, str]:
    """Return plain name to the name in the model, of parameters and buffers where the two differ.

    Args:
        model: Any module.
    """
    every = _parameters(model) + _buffers(model)
    return {plain: name for plain, name, _ in every if plain != name}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return every buffer by its plain name, a shared one by its first.

    Args:
        model: Any module.
    """
    return {plain: buffer for plain, _, buffer in _buffers(model)}


def _parameters(model: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    require_module(model)  # before its modules are looked at
    require_whole(model)
    # not the model's own method: a checkpoint wrapper's leaves its own name out, which functional_call needs
    return _renamed(model, list(nn.Module.named_parameters(model, remove_duplicate=False)))


def _buffers(model: nn.Module) -> list[tuple[str, str, Tensor]]:
    return _renamed(model, list(nn.Module.named_buffers(model)))


def require_module(model: object) -> None:
    """Refuse what is no module, such as a function that calls one.

    Raises:
        TypeError: Says what was got, and where a function goes.
    """
    if not isinstance(model, nn.Module):
        name = getattr(model, "__name__", None)
        raise TypeError(
            f"the network must be a torch.nn.Module, which has weights; got {type(model).__name__}"
            f"{f' {name!r}' if isinstance(name, str) else ''}. Pass the module itself, and how to call it as "
            "call_fn=lambda model, batch: ..."
        )


def require_values(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters without values, on the meta device.

    Args:
        named: Name and tensor.

    Raises:
        LowRankBDLError: Names the first one.
    """
    name = next((name for name, tensor in named if tensor.is_meta), None)
    if name is not None:
        raise LowRankBDLError(
            f"the network must hold its weights; parameter {name!r} is on the meta device, which keeps shapes and no "
            "values (a model that was made there, or that accelerate has offloaded). Load the weights onto a device."
        )


def require_whole(model: nn.Module) -> None:
    """Refuse a model whose weights are sharded over processes, by FSDP or as DTensors.

    Their hooks put the shards back in every forward pass, whatever weights the model has been given.

    Args:
        model: Any module.

    Raises:
        LowRankBDLError: Names the first part that is sharded.

    Cost: nothing unless torch's FSDP or DTensor has been imported.
    """
    sharding = _of("torch.distributed.fsdp", "FSDPModule") + _of("torch.distributed.fsdp", "FullyShardedDataParallel")
    part = None
    if sharding:
        part = next((f"module {n!r}" for n, m in nn.Module.named_modules(model) if isinstance(m, sharding)), None)
    tensors = _of("torch.distributed.tensor", "DTensor")
    if part is None and tensors:
        named = nn.Module.named_parameters(model)
        part = next((f"parameter {n!r}" for n, p in named if isinstance(p, tensors)), None)
    if part is not None:
        raise LowRankBDLError(
            f"the model must hold whole weights; its {part} is sharded over processes (FSDP, DTensor), where hooks "
            "would put the model's own weights back. Gather them, by torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and load them into an "
            "unsharded copy of the network."
        )


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been told to compile a model or a part of it.

    Args:
        model: Any module, also one compiled in place (``model.compile()``).
    """
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run whatever is compiled as if it were not, inside the block: networks, parts of them, functions that they call.

    Compiled code has no second derivative, keeps no graph for several backward passes, and does not call the hooks that
    were registered after its compilation, or compiles itself anew for them.

    Cost: nothing unless torch's compiler, slow to import, has been.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def data_parallel_parts(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the parts of a model that are wrapped for several processes."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


@contextmanager
def unsynchronized(wrappers: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Keep data-parallel wrappers from talking to other processes inside the block, and from waiting for a gradient.

    Args:
        wrappers: Of :func:`data_parallel_parts`.
    """
    flags = [(w, w.require_backward_grad_sync, w.require_forward_param_sync) for w in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, backward, forward in flags:
            wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = backward, forward
