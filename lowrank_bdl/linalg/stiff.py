r"""Ridge least squares when coordinates differ by many orders of magnitude: QR with sorted rows.

A clamped variance of 1e-30 under an ordinary deviation makes a row of :math:`W = D^{-1/2} R M` fifteen orders larger
than the rest. Gram matrices then lose the small rows completely. Householder QR does not, provided that the large
rows come first (Cox & Higham, Stability of Householder QR for weighted least squares, 1998). Columns are rotated by a
fixed orthogonal matrix, which leaves :math:`W W^\top` as it is and does the work of column pivoting.
"""

import math

import torch
from torch import Tensor

from lowrank_bdl.linalg.factors import LowRankFactors, inverse_std


def stiff_triangle(factors: LowRankFactors) -> Tensor:
    r"""Return lower-triangular :math:`L` with :math:`L L^\top = I + W^\top W`, ``(*B, R, R)``, float64.

    Cost: a sort of D numbers, one gather of the root and O(D R^2) time by Householder QR in float64; temporaries of
    16 D bytes.
    """
    triangles = []
    for single in _unbatched(factors):
        rotated = _triangle(single, None)  # of I + QᵀWᵀWQ
        back = torch.linalg.qr(rotated @ _rotation(factors.rank, rotated).mT, mode="r").R
        triangles.append((back * back.diagonal().sign().unsqueeze(-1)).mT)
    return torch.stack(triangles).reshape(*factors.batch_shape, factors.rank, factors.rank)


def stiff_ridge(factors: LowRankFactors, columns: Tensor) -> tuple[Tensor, Tensor]:
    r"""Solve :math:`\min_z \|y - W z\|^2 + \|z\|^2` with :math:`y = D^{-1/2} x` for each column x.

    Args:
        factors: The matrix.
        columns: Right-hand sides, shape ``(*B, D, S)``.

    Returns:
        The minima :math:`x^\top \Sigma^{-1} x`, shape ``(*B, S)``, and the minimisers z, shape ``(*B, R, S)``, float64.

    Cost: as `stiff_triangle` with R + S columns.
    """
    rank, width = factors.rank, columns.shape[-1]
    values, minimisers = [], []
    sides = columns.reshape(factors.batch_shape.numel(), factors.dim, width)
    for single, rhs in zip(_unbatched(factors), sides, strict=True):
        triangle = _triangle(single, rhs)
        values.append(triangle[rank:, rank:].square().sum(-2))
        rotated = torch.linalg.solve_triangular(triangle[:rank, :rank], triangle[:rank, rank:], upper=True)
        minimisers.append(_rotation(rank, rotated) @ rotated)
    batch = factors.batch_shape
    return torch.stack(values).reshape(*batch, width), torch.stack(minimisers).reshape(*batch, rank, width)


def _unbatched(factors: LowRankFactors) -> list[LowRankFactors]:
    """Split a batch into single matrices: this path is rare, and each needs its own order of rows."""
    size = factors.batch_shape.numel()

    def parts(tensor: Tensor | None, keep: int) -> list[Tensor | None]:
        if tensor is None or tensor.ndim < keep:
            return [tensor] * size
        return list(tensor.expand(*factors.batch_shape, *tensor.shape[-keep:]).reshape(size, *tensor.shape[-keep:]))

    pieces = (parts(factors.root, 2), parts(factors.diag, 1), parts(factors.mix, 2), parts(factors.scale, 2))
    return [LowRankFactors(*piece) for piece in zip(*pieces, strict=True)]  # type: ignore[arg-type]


def _triangle(factors: LowRankFactors, columns: Tensor | None) -> Tensor:
    """Return the triangular factor of ``[[W Q, y], [I, 0]]``, rows taken from large to small."""
    wide = torch.float64
    rotation = _rotation(factors.rank, factors.zeros())
    size = torch.empty(factors.dim, dtype=wide, device=factors.diag.device)
    for part in factors.chunks():
        size[part] = factors.mixed_rows(part, wide).norm(dim=-2) * inverse_std(factors.diag[part], wide)
    size, order = size.sort(descending=True)
    large = int((size >= 1).sum())  # the identity block, of row size one, takes its place in the order
    step = max((part.stop - part.start for part in factors.chunks()), default=1)
    total = factors.rank + (0 if columns is None else columns.shape[-1])
    triangle = torch.zeros(0, total, dtype=wide, device=size.device)
    for is_small, begin, end in ((False, 0, large), (True, large, factors.dim)):
        if is_small:
            ridge = torch.eye(factors.rank, total, dtype=wide, device=size.device)
            triangle = torch.linalg.qr(torch.cat((triangle, ridge)), mode="r").R
        for start in range(begin, end, step):
            index = order[start : min(start + step, end)]
            weight = inverse_std(factors.diag[index], wide).unsqueeze(-1)
            rows = factors.mix_transposed(factors.rows_at(index, wide)).mT @ rotation
            block = rows if columns is None else torch.cat((rows, columns[index].to(wide)), dim=-1)
            triangle = torch.linalg.qr(torch.cat((triangle, block * weight)), mode="r").R
    padding = torch.zeros(max(0, total - len(triangle)), total, dtype=wide, device=size.device)
    return torch.cat((triangle, padding))


def _rotation(size: int, like: Tensor) -> Tensor:
    """Return the orthogonal DCT-II matrix, a rotation whose leading blocks are never singular by accident."""
    grid = torch.arange(size, dtype=torch.float64, device=like.device)
    matrix = torch.cos(math.pi / max(size, 1) * torch.outer(grid + 0.5, grid)) * math.sqrt(2 / max(size, 1))
    matrix[:, :1] *= math.sqrt(0.5)
    return matrix
