"""Volume of a simplex in many dimensions, with a gradient."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import require_float64
from lowrank_bdl.linalg.moments import column_chunks
from lowrank_bdl.linalg.precision import exact, exact_methods
from lowrank_bdl.linalg.transforms import backward_is_transformed, differentiable_gradients, transformed


@exact
def log_simplex_volume(vertices: "Tensor | Sequence[Tensor]") -> Tensor:
    r"""Return the log-volume of the simplex with corners :math:`v_0, \dots, v_k`, differentiable in them.

    .. math:: \log V = \tfrac12 \log\det(E E^\top) - \log k!, \qquad E = (v_1 - v_0, \dots, v_k - v_0)^\top

    the length of an edge for k = 1, the area of a triangle for k = 2. All sums over D are in float64, and only matrices
    of k x k are factored. It is the volume that a Cayley-Menger determinant gives.

    Args:
        vertices: The corners, shape ``(*B, k+1, D)``, real in any dtype; or k+1 tensors of shape ``(*B, D)``, which
            need not be copied into one.

    Returns:
        Shape ``(*B,)``, float64 [k log(unit of the vertices)]. A point (k = 0) has volume 1. Minus infinity where the
        corners lie in fewer than k dimensions, or a corner is within 1e-7 of the others' span as a fraction of its
        distance to :math:`v_0`; the gradient is NaN there. Differentiable any number of times.

    Raises:
        ShapeError: If there is no corner, shapes, dtypes or devices differ, or a dtype is not real floating-point.

    Cost: one read of the corners and O(k² D), the gradient as much again; no memory of size D besides the gradient.
        Higher derivatives and torch.func take float64 copies of the corners.

    Source: the volume regulariser of Benton et al., "Loss Surface Simplexes for Mode Connecting Volumes and Fast
    Ensembling" (ICML 2021).

    Example:
        >>> triangle = torch.tensor([[0.0, 0.0, 1.0], [3.0, 0.0, 1.0], [0.0, 4.0, 1.0]], requires_grad=True)
        >>> volume = log_simplex_volume(triangle)
        >>> round(volume.exp().item(), 6)
        6.0
        >>> volume.backward()
        >>> triangle.grad[1]
        tensor([0.3333, 0.0000, 0.0000])
    """
    if isinstance(vertices, Tensor):
        if vertices.ndim < 2:
            raise ShapeError(f"vertices must have shape (*B, k+1, D); got {tuple(vertices.shape)}.")
        corners = vertices.unbind(-2)
    else:
        corners = tuple(vertices)
    if not corners:
        raise ShapeError("a simplex needs at least 1 vertex; got none.")
    first = corners[0]
    for corner in corners:
        if corner.ndim < 1 or not corner.is_floating_point():
            raise ShapeError(f"a vertex must be real (*B, D); got {tuple(corner.shape)} {corner.dtype}.")
        if (corner.shape, corner.dtype, corner.device) != (first.shape, first.dtype, first.device):
            raise ShapeError(
                "vertices must have one shape, dtype and device; "
                f"got {tuple(first.shape)} {first.dtype} {first.device} "
                f"and {tuple(corner.shape)} {corner.dtype} {corner.device}."
            )
    require_float64(first.device, "The volume of a simplex")
    if len(corners) == 1:
        return torch.zeros(first.shape[:-1], dtype=torch.float64, device=first.device)
    value: Tensor = _log_volume(*corners) if transformed() else _LogVolume.apply(*corners)
    return value


@exact_methods
class _LogVolume(Function):
    """The log-volume of two corners ``(*B, D)`` or more."""

    @staticmethod
    def forward(ctx: Any, *corners: Tensor) -> Tensor:
        """Compute the value and keep the inverse of the k x k Gram matrix of the edges."""
        first, k = corners[0], len(corners) - 1
        gram = torch.zeros((*first.shape[:-1], k, k), dtype=torch.float64, device=first.device)
        for part in column_chunks(first.shape[-1], first.device):
            edges = _edges(corners, part)
            gram += edges @ edges.mT
        value, cholesky, products, flat = _from_gram(gram)
        identity = torch.eye(k, dtype=torch.float64, device=first.device)
        inverse = torch.cholesky_inverse(torch.where(flat[..., None, None], identity, cholesky)) / products
        ctx.save_for_backward(inverse.masked_fill(flat[..., None, None], torch.nan), *corners)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the rows of (E E')^-1 E, and to v_0 minus their sum; None where no gradient was asked for."""
        inverse, *corners = ctx.saved_tensors
        if backward_is_transformed(grad):
            return differentiable_gradients(_log_volume, corners, (grad,), ctx.needs_input_grad)
        weights = grad[..., None, None] * inverse
        gradients = [
            torch.empty_like(v) if need else None for v, need in zip(corners, ctx.needs_input_grad, strict=True)
        ]
        for part in column_chunks(corners[0].shape[-1], corners[0].device):
            rows = weights @ _edges(corners, part)
            for number, gradient in enumerate(gradients):
                if gradient is not None:
                    gradient[..., part] = rows[..., number - 1, :] if number else -rows.sum(-2)
        return tuple(gradients)


def _edges(corners: Sequence[Tensor], part: slice) -> Tensor:
    """Return columns of E in float64, shape ``(*B, k, columns)``."""
    base = corners[0][..., part].double()
    rows: Tensor = torch.stack([corner[..., part].double() - base for corner in corners[1:]], -2)
    return rows


def _log_volume(*corners: Tensor) -> Tensor:
    """Return the log-volume by plain differentiable torch operations."""
    edges = _edges(corners, slice(0, corners[0].shape[-1]))
    gram = edges @ edges.mT
    value, _, _, flat = _from_gram(gram)
    zero = 0 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return value + torch.where(flat, zero, 1.0).log()  # -inf where flat, and its gradient NaN


def _from_gram(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the log-volume, the Cholesky factor of unit edges, the products of lengths, and which are flat."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scales = torch.where(lengths > 0, lengths, 1.0)
    products = scales[..., :, None] * scales[..., None, :]
    cholesky, failed = torch.linalg.cholesky_ex(gram / products)  # of unit edges: their lengths may differ by much
    heights = cholesky.diagonal(dim1=-2, dim2=-1)
    limit = 16 * (gram.shape[-1] + 1) * torch.finfo(torch.float64).eps  # rounding of the Gram matrix
    flat = (failed != 0) | ~(heights.square() > limit).all(-1) | (lengths == 0).any(-1)
    value = scales.log().sum(-1) + heights.log().sum(-1) - math.lgamma(gram.shape[-1] + 1)
    value = value.masked_fill(flat, -torch.inf).masked_fill(gram.isnan().any(-1).any(-1), torch.nan)
    return value, cholesky, products, flat
