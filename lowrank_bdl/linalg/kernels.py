"""Products, diagonals and draws of a low-rank-plus-diagonal matrix: what needs no solve."""

from importlib.util import find_spec

import torch
from torch import Tensor

from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.devices import generator_on, in_dtype, to_float64
from lowrank_bdl.linalg.factors import LowRankFactors, only_column, project
from lowrank_bdl.linalg.precision import exact

FLOAT8_SINCE = (8, 9)
"""Compute capability of the first devices for which Triton compiles float8: older ones take torch's operations."""


@exact
def matmul(factors: LowRankFactors, columns: Tensor) -> Tensor:
    r"""Return :math:`\Sigma X`, shape ``(*B, D, S)``.

    Args:
        factors: The matrix.
        columns: :math:`X`, shape ``(*B, D, S)``.

    Cost: two reads of the root, O(D K S) time, no memory beyond the result and one chunk.
    """
    dtype = factors.diag.dtype
    inner = factors.mix_forward(factors.mix_transposed(project(factors, columns)))  # (*B, K, S)
    result = torch.empty((*factors.batch_shape, factors.dim, columns.shape[-1]), dtype=dtype, device=columns.device)
    vector = only_column(columns)
    if vector is not None and factors.compiled(vector):
        compiled.lift(factors.root, factors.diag, vector, None, inner[:, 0], result[:, 0], std=False)
        return result
    inner = inner.to(columns.device, dtype)
    for part in factors.chunks(max(1, columns.shape[-1])):
        chunk = result[..., part, :]
        torch.mul(factors.diag[..., part, None], columns[..., part, :], out=chunk)
        lift_(chunk, factors.rows(part, dtype), inner)
    return result


def lift_(target: Tensor, rows: Tensor, inner: Tensor, sign: float = 1.0) -> Tensor:
    """Add ``sign * rows.mT @ inner`` to ``target`` in place, without a temporary where BLAS can do so.

    Args:
        target: Shape ``(*B, n, S)``.
        rows: Shape ``(*B, K, n)``.
        inner: Shape ``(*B, K, S)``.
        sign: Factor of the product.
    """
    if target.ndim == 2 and target.shape[-1] == 1:
        target.squeeze(-1).addmv_(rows.mT, inner.squeeze(-1), alpha=sign)
        return target
    if target.ndim == 2:
        return target.addmm_(rows.mT, inner, alpha=sign)
    return target.add_(rows.mT @ inner, alpha=sign)


@exact
def diagonal(factors: LowRankFactors) -> Tensor:
    r"""Return :math:`d_i + \sum_k (R M)_{ik}^2`, shape ``(*B, D)``.

    Cost: one read of the root, O(D K) time (O(D K R) with a matrix mix), no memory beyond the result and a chunk.
    """
    dtype, place = factors.diag.dtype, factors.diag.device
    if factors.mix.ndim == 0 and factors.compiled():
        return compiled.diagonal(factors.root, factors.diag, float(factors.mix.double().square()))
    result = torch.empty_like(factors.diag, memory_format=torch.contiguous_format)
    for part in factors.chunks():
        if factors.mix.ndim == 0:
            squares = factors.rows(part, dtype).square().sum(-2).mul_(in_dtype(factors.mix, dtype, place).square())
        else:
            squares = factors.mixed_rows(part, dtype).square().sum(-2)
        torch.add(factors.diag[..., part], squares, out=result[..., part])
    return result


@exact
def draw(
    factors: LowRankFactors, num_samples: int, generator: torch.Generator | None = None, mean: Tensor | None = None
) -> Tensor:
    r"""Draw from :math:`N(m, \Sigma)`: :math:`m + \sqrt d \odot z_1 + R M z_2`, shape ``(S, *B, D)``.

    One pass over the root serves all S draws, and the result holds the normals :math:`z_1` before they are scaled,
    so nothing of its size is allocated beside it. The normals are drawn before anything is cut into chunks: the draws
    of a seeded generator do not depend on chunk sizes.

    Args:
        factors: The matrix.
        num_samples: The number of draws S.
        generator: Source of the normals; None means torch's default generator.
        mean: :math:`m`, shape ``(*B, D)``, or None for zero.

    Cost: one read of the root and S D normals.
    """
    dtype, device, batch = factors.diag.dtype, factors.diag.device, factors.batch_shape
    generator = generator_on(device, generator)
    low_rank = torch.randn((*batch, num_samples, factors.rank), dtype=dtype, device=device, generator=generator)
    inner = factors.mix_forward(to_float64(low_rank.mT)).to(device, dtype)  # (*B, K, S)
    if _fusable(factors):
        from lowrank_bdl.linalg.fused_draw import fused_draw

        return fused_draw(factors, inner, generator, mean)
    result = torch.empty((num_samples, *batch, factors.dim), dtype=dtype, device=device)
    return finish_draw_(factors, result.normal_(generator=generator), inner, mean)


@exact
def finish_draw_(factors: LowRankFactors, noise: Tensor, inner: Tensor, mean: Tensor | None = None) -> Tensor:
    r"""Turn standard normals :math:`z_1` into draws, in place, and return them.

    Args:
        factors: The matrix.
        noise: :math:`z_1`, shape ``(S, *B, D)``; overwritten.
        inner: :math:`M z_2`, shape ``(*B, K, S)``.
        mean: :math:`m`, shape ``(*B, D)``, or None for zero.
    """
    if len(noise) == 1 and factors.compiled(noise[0], mean):
        compiled.lift(factors.root, factors.diag, noise[0], mean, inner[:, 0].double(), noise[0], std=True)
        return noise
    for part in factors.chunks(stream=max(1, len(noise))):
        block, std = noise[..., part], factors.diag[..., part].sqrt()
        if mean is None:
            block.mul_(std)
        else:
            torch.addcmul(mean[..., part], block, std, out=block)
        rows = factors.rows(part, factors.diag.dtype)
        if block.ndim == 2 and len(block) > 1:
            block.addmm_(inner.mT, rows)
        else:
            lift_(block.movedim(0, -1), rows, inner)
    return noise


def _fusable(factors: LowRankFactors) -> bool:
    """Whether the fused kernel applies: one float32 matrix on a CUDA device that reads its root, with Triton."""
    single = factors.diag.is_cuda and factors.diag.ndim == 1 and factors.diag.dtype is torch.float32
    if not single or find_spec("triton") is None:
        return False
    if factors.root.dtype is not torch.float8_e4m3fn:
        return True
    return torch.cuda.get_device_capability(factors.diag.device) >= FLOAT8_SINCE
