"""The tensors behind a low-rank-plus-diagonal matrix, and chunked access to them.

Every kernel walks over the D coordinates in chunks that fit the processor's cache, so that no temporary is
ever as large as the root. Chunks are cut along D only; what crosses chunks is K-sized and kept in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.linalg.block_scaling import BLOCK, decode_rows

CPU_CHUNK = 16_384
"""Coordinates a chunk on a CPU: K x chunk floats stay in the second-level cache for K up to about 100."""


@dataclass(frozen=True)
class LowRankFactors:
    r"""State of :math:`\Sigma = \mathrm{diag}(d) + (R M)(R M)^\top`, without any operation that needs a solve.

    Attributes:
        root: :math:`R`, shape ``(*B, D, K)``, normally the transposed view of ``(K, D)`` storage.
        diag: :math:`d`, shape ``(*B, D)``, float32 or float64; its dtype is the dtype of every result.
        mix: :math:`M`, a scalar or ``(*B, K, R)``; a scaling or recombination that never touches the root.
        scale: Scales of a root kept in a narrow dtype, ``(*B, K, ceil(D / 4096))``, or None.
    """

    root: Tensor
    diag: Tensor
    mix: Tensor
    scale: Tensor | None = None

    @property
    def batch_shape(self) -> torch.Size:
        """The leading axes B."""
        return self.diag.shape[:-1]

    @property
    def dim(self) -> int:
        """The number of coordinates D."""
        return self.diag.shape[-1]

    @property
    def rank(self) -> int:
        """The number of columns of R M."""
        return self.root.shape[-1] if self.mix.ndim == 0 else self.mix.shape[-1]

    def chunks(self, least: int = 1) -> Iterator[slice]:
        """Yield slices that cover the coordinates, each a multiple of the scaling block but for the last.

        Args:
            least: The fewest chunks wanted, for kernels whose temporaries must stay below a share of D K.
        """
        width = CPU_CHUNK // max(1, self.batch_shape.numel())
        if self.diag.device.type != "cpu":  # launches cost more than cache misses: a twentieth of D at a time
            width = min(max(self.dim // 20, 65_536), 4_194_304)
        width = max(BLOCK, min(width, self.dim // least) // BLOCK * BLOCK)
        for start in range(0, self.dim, width):
            yield slice(start, min(start + width, self.dim))

    def rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the chunk of :math:`R^T`, shape ``(*B, K, n)``: a view where nothing has to be converted."""
        rows = self.root[..., part, :].mT
        if self.scale is not None:
            return decode_rows(rows, self.scale, dtype, start=part.start)
        return rows.to(dtype)

    def rows_at(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the columns of :math:`R^T` at ``index`` (n,), shape ``(*B, K, n)``."""
        rows = self.root.mT[..., index].to(dtype)
        return rows if self.scale is None else rows * self.scale[..., index // BLOCK].to(dtype)

    def mix_transposed(self, columns: Tensor) -> Tensor:
        """Return :math:`M^T x` in float64 for ``columns`` x of shape ``(*B, K, S)``."""
        mix = self.mix.double()
        return mix * columns if mix.ndim == 0 else mix.mT @ columns

    def mix_forward(self, columns: Tensor) -> Tensor:
        """Return :math:`M z` in float64 for ``columns`` z of shape ``(*B, R, S)``."""
        mix = self.mix.double()
        return mix * columns if mix.ndim == 0 else mix @ columns

    def mixed_rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the chunk of :math:`(R M)^T`, shape ``(*B, R, n)``."""
        rows = self.rows(part, dtype)
        return rows * self.mix.to(dtype) if self.mix.ndim == 0 else self.mix.mT.to(dtype) @ rows

    def mixed_gram(self, gram: Tensor) -> Tensor:
        """Return :math:`M^T G M` in float64 for a K x K matrix G of the unmixed root."""
        mix = self.mix.double()
        return mix.square() * gram if mix.ndim == 0 else mix.mT @ gram @ mix

    def zeros(self, *shape: int) -> Tensor:
        """Return float64 zeros of shape ``(*B, *shape)`` on this device: an accumulator."""
        return torch.zeros((*self.batch_shape, *shape), dtype=torch.float64, device=self.diag.device)


def inverse_std(diag: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``diag ** -1/2`` in ``dtype``, and zero at point masses, which leaves them out of every sum."""
    diag = diag.to(dtype)
    return torch.where(diag > 0, diag.rsqrt(), 0.0)


def project(factors: LowRankFactors, columns: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return :math:`R^T X` in float64, shape ``(*B, K, S)``, for ``columns`` X of shape ``(*B, D, S)``.

    Cost: one read of the root, O(D K S) time.
    """
    dtype = dtype or factors.diag.dtype
    total = factors.zeros(factors.root.shape[-1], columns.shape[-1])
    for part in factors.chunks():
        total += (factors.rows(part, dtype) @ columns[..., part, :].to(dtype)).double()
    return total


def gram(factors: LowRankFactors, dtype: torch.dtype, weigh: bool = True) -> Tensor:
    r"""Return :math:`R^T \mathrm{diag}(d)^{-1} R` (or :math:`R^T R` without ``weigh``) in float64, ``(*B, K, K)``.

    The products of a chunk are taken in ``dtype``, the sum over chunks in float64.
    Cost: one read of the root, O(D K^2) time.
    """
    columns = factors.root.shape[-1]
    total = factors.zeros(columns, columns)
    for part in factors.chunks():
        rows = factors.rows(part, dtype)
        if weigh:
            rows = rows * inverse_std(factors.diag[..., part], dtype).unsqueeze(-2)
        total += (rows @ rows.mT).double()
    return total
