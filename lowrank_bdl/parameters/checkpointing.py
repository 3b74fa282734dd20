"""Activation checkpointing in a network that runs with other tensors in place of its own.

A checkpointed part of a network is computed again during the backward pass. By then its own weights are back, and the
gradient would be that of a mixture of two networks. Here the second computation gets the same tensors as the first.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import checkpoint

from lowrank_bdl.errors import LowRankBDLError

Rerun: TypeAlias = Callable[[Callable[[], Any]], Any]

# torch has no public place to say how a checkpoint is computed again by whoever calls the network. These classes
# are looked up whenever a checkpoint is made, however the function that makes it was imported.
_Frame: Any = checkpoint._CheckpointFrame
_Hook: Any = checkpoint._checkpoint_hook
_Reentrant: Any = checkpoint.CheckpointFunction


class _Running(threading.local):
    """What runs in this thread: how to put the tensors back in place, and whether gradients must reach them."""

    rerun: "Rerun | None" = None
    needs_gradient: Callable[[], bool] = staticmethod(lambda: False)


_running = _Running()
_lock = threading.Lock()
_count = 0


class _FrameInPlace(_Frame):
    def __init__(self, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        rerun = _running.rerun
        if rerun is not None:
            first = recompute_fn

            def recompute_fn(*inputs: Any) -> Any:
                return rerun(lambda: first(*inputs))

        super().__init__(recompute_fn, *args, **kwargs)


def _hook_in_place(frame: Any) -> Any:
    """Save everything, as without a checkpoint, inside torch.func's derivatives: they refuse hooks on what is saved."""
    inside = torch._C._functorch.maybe_current_level() is not None
    return nullcontext() if inside and _running.rerun is not None else _Hook(frame)


class _ReentrantInPlace(_Reentrant):
    @classmethod
    def apply(cls, run: Callable[..., Any], *args: Any) -> Any:
        rerun = _running.rerun
        if rerun is None or not torch.is_grad_enabled():
            return _Reentrant.apply(run, *args)
        if _running.needs_gradient():
            raise LowRankBDLError(
                "gradients of the weights that a network is given need checkpoints with use_reentrant=False; the "
                "network has one with use_reentrant=True, through which none arrives. (Hugging Face: "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}).)"
            )
        return _Reentrant.apply(lambda *inputs: rerun(lambda: run(*inputs)), *args)


def _install() -> None:
    """Put these into torch while at least one network runs with other tensors; the last one removes them."""
    global _count
    with _lock:
        _count += 1
        if _count == 1:
            checkpoint._CheckpointFrame = _FrameInPlace  # type: ignore[misc]
            checkpoint._checkpoint_hook = _hook_in_place  # type: ignore[assignment,misc]
            checkpoint.CheckpointFunction = _ReentrantInPlace  # type: ignore[misc]


def _remove() -> None:
    global _count
    with _lock:
        _count -= 1
        if _count == 0:
            checkpoint._CheckpointFrame = _Frame  # type: ignore[misc]
            checkpoint._checkpoint_hook = _Hook  # type: ignore[misc]
            checkpoint.CheckpointFunction = _Reentrant  # type: ignore[misc]


@contextmanager
def checkpoints_rerun(rerun: Rerun, tensors: "Callable[[], list[Tensor]]") -> Iterator[None]:
    """Let checkpoints that are made inside the block be computed again by ``rerun``.

    Other threads, and checkpoints made outside the block, are not concerned.

    Args:
        rerun: ``rerun(function)`` returns ``function()``, called with the tensors in place as they are now.
        tensors: Gives these tensors, to see whether one needs a gradient.

    Yields:
        Nothing.

    Raises:
        LowRankBDLError: Inside the block, where a checkpoint with ``use_reentrant=True`` would keep gradients from the
            tensors.

    Cost: a few microseconds.
    """
    before = _running.rerun, _running.needs_gradient
    _running.rerun = rerun
    _running.needs_gradient = lambda: any(tensor.requires_grad for tensor in tensors())
    _install()
    try:
        yield
    finally:
        _remove()
        _running.rerun, _running.needs_gradient = before
