"""Operations that torch cannot differentiate twice, or gets wrong then, by others that give the same values."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode


def lacks_second_derivatives(model: nn.Module) -> bool:
    """Whether a part of a network has no second derivative in torch, or a wrong one.

    Args:
        model: Any module.
    """
    return needs_other_operations(model) or any(isinstance(module, nn.EmbeddingBag) for module in model.modules())


def needs_other_operations(model: nn.Module) -> bool:
    """Whether torch differentiates a part of a network wrongly, or not with respect to views of one vector.

    These are embeddings with sparse gradients, which pass through no view, and weight normalisation, whose second
    derivative takes the norm for a constant.

    Args:
        model: Any module.
    """
    return any(
        isinstance(module, _WeightNorm)
        or (isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse)
        or any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )


class DifferentiableOperations(TorchFunctionMode):
    """Computes some functions of torch by operations that can be differentiated as often as asked for, inside a block.

    ``embedding`` has a dense gradient, ``embedding_bag`` is an embedding and a sum, and weight normalisation a division
    by a norm. Values are the same to rounding. Sparse gradients cannot be differentiated again; torch has no second
    derivative of ``embedding_bag``, and a wrong one of weight normalisation.

    Example:
        >>> weight = torch.ones(3, 2, requires_grad=True)
        >>> with DifferentiableOperations():
        ...     bags = functional.embedding_bag(torch.tensor([[0, 1]]), weight, mode="sum", sparse=True)
        >>> bags
        tensor([[2., 2.]], grad_fn=<SumBackward1>)
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: "Mapping[str, Any] | None" = None,
    ) -> Any:
        """Carry out a function of torch, or by other operations what it does."""
        options = dict(kwargs or {})
        if func is functional.embedding:
            return functional.embedding(*args[:6], **{**options, "sparse": False})
        if func is functional.embedding_bag:
            return _embedding_bag(*args, **options)
        if func is torch._weight_norm:
            return _weight_norm(*args, **options)
        return func(*args, **options)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """As ``torch.nn.functional.embedding_bag``, whose arguments these are."""
    if input.ndim == 1 and offsets is not None:
        input, present, per_sample_weights = _padded(input, offsets, include_last_offset, per_sample_weights)
    else:
        present = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        present = present & (input != padding_idx % len(weight))
    rows = functional.embedding(
        input, weight, max_norm=max_norm, norm_type=norm_type, scale_grad_by_freq=scale_grad_by_freq
    )
    mask = present.unsqueeze(-1)
    if mode == "max":
        if not input.shape[1]:
            return rows.sum(1)
        chosen = rows.detach().masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
        return rows.gather(1, chosen).squeeze(1) * present.any(1, keepdim=True)
    factors = mask.to(rows) if per_sample_weights is None else per_sample_weights.unsqueeze(-1) * mask
    total = (rows * factors).sum(1)
    return total / present.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else total


def _padded(
    input: Tensor, offsets: Tensor, include_last_offset: bool, per_sample_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bags as rows of one length: indices, which of them are there, and their weights."""
    starts = offsets[:-1] if include_last_offset else offsets
    stops = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
    longest = int((stops - starts).max()) if len(starts) else 0
    positions = starts.unsqueeze(1) + torch.arange(longest, device=input.device)
    present = positions < stops.unsqueeze(1)
    positions = positions.where(present, 0)
    weights = None if per_sample_weights is None else per_sample_weights[positions]
    return input[positions], present, weights


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """As ``torch._weight_norm``: g v / |v|, norms over all axes but one; over all of them with -1."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
