"""Whether torch transforms the code that runs, and gradients that can themselves be differentiated."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Say whether torch.func, forward-mode differentiation, torch.compile or torch.export runs the code.

    Numbers are then not at hand, and autograd functions written for plain tensors do not apply: what asks this takes a
    path of plain torch operations. Checks of values (negative variances, staleness) are left out there, and what they
    would refuse comes out as NaN.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def backward_is_transformed(*outer: Tensor | None) -> bool:
    """Say whether a backward pass is to be differentiated again, or runs for many incoming gradients at once.

    Args:
        outer: The incoming gradients; `torch.autograd.grad(is_grads_batched=True)` passes many as one.
    """
    if torch.is_grad_enabled() or transformed():
        return True
    return any(map(many_at_once, outer))


def many_at_once(tensor: Tensor | None) -> bool:
    """Say whether a tensor stands for many, as under the vmap that `torch.autograd` itself uses."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def differentiable_gradients(
    compute: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    outer: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return gradients to ``inputs``; differentiable in inputs and outer gradients where a graph is asked for.

    Args:
        compute: The operation, of plain torch operations alone, from ``inputs`` to one tensor or several.
        inputs: What it was applied to.
        outer: The incoming gradient of each of its results; None where there is none.
        needs: Which inputs want a gradient.

    Returns:
        A gradient for each input, None where none was wanted or the results do not depend on it.

    Cost: that of ``compute`` and of its backward pass, with all their temporaries.
    """
    wants_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # each input under a name of its own: one may be a function of another, or the same tensor
        copies = [t.view_as(t) if t is not None and need else t for t, need in zip(inputs, needs, strict=True)]
        results = compute(*copies)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(r, g) for r, g in zip(results, outer, strict=True) if g is not None and r.requires_grad]
        wanted = [t for t, need in zip(copies, needs, strict=True) if t is not None and need]
        if not pairs or not wanted:
            return (None,) * len(copies)
        found = torch.autograd.grad(
            [r for r, _ in pairs], wanted, [g for _, g in pairs], create_graph=wants_graph, allow_unused=True
        )
    gradients = iter(found)
    return tuple(next(gradients) if t is not None and need else None for t, need in zip(copies, needs, strict=True))
