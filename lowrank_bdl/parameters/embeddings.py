"""Embeddings by operations that can be differentiated as often as asked for, with dense gradients."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def has_sparse_embedding(model: nn.Module) -> bool:
    """Whether a part of a network is an embedding whose gradient is sparse, or has no second derivative in torch."""
    return any(
        isinstance(module, nn.EmbeddingBag) or (isinstance(module, nn.Embedding) and module.sparse)
        for module in model.modules()
    )


def has_sparse_gradient(model: nn.Module) -> bool:
    """Whether a part of a network is an embedding whose gradient is sparse."""
    return any(isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse for module in model.modules())


class DenseEmbeddings(TorchFunctionMode):
    """Computes ``embedding`` with a dense gradient, and ``embedding_bag`` by an embedding and a sum, inside a block.

    Values are the same to rounding. Sparse gradients cannot be differentiated again, and torch has no second
    derivative of ``embedding_bag``.

    Example:
        >>> weight = torch.ones(3, 2, requires_grad=True)
        >>> with DenseEmbeddings():
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
        """Carry out a function of torch; embeddings by other operations."""
        options = dict(kwargs or {})
        if func is functional.embedding:
            return functional.embedding(*args[:6], **{**options, "sparse": False})
        if func is functional.embedding_bag:
            return _embedding_bag(*args, **options)
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
