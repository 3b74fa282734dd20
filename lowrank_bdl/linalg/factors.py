"""The tensors behind a low-rank-plus-diagonal matrix, and chunked access to them.

Every kernel walks over the D coordinates in chunks that fit the processor's cache, so that no temporary is
ever as large as the root. Chunks are cut along D only; what crosses chunks is K-sized and kept in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.block_scaling import BLOCK, decode_rows
from lowrank_bdl.linalg.devices import has_float64, in_dtype, sum_in_float64, sums_device, to_float64

CPU_CHUNK = 16_384
"""Coordinates a chunk on a CPU where it is used twice: K x chunk floats stay in the second-level cache."""
CPU_STREAM = 131_072
"""Coordinates a chunk on a CPU where the root is touched once: what counts is then the cost of a call."""


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

    def compiled(self, *vectors: Tensor | None) -> bool:
        """Say whether the compiled kernels take this matrix, and vectors ``(D,)`` beside it."""
        return self.scale is None and compiled.applies(self.root, self.diag, *vectors)

    def chunks(self, stream: int = 0, dtype: torch.dtype | None = None) -> Iterator[slice]:
        """Yield slices that cover the coordinates, each a multiple of the scaling block but for the last.

        Args:
            stream: How many numbers a coordinate the kernel has in temporaries, if it reads each chunk of the root
                once and where it is; 0 if it works on a copy of the chunk, which should then stay in the cache.
            dtype: The dtype it computes in, the diagonal's if None: `rows` copies a root of another dtype.
        """
        if self.diag.device.type == "cpu":
            copied = self.scale is not None or self.root.dtype != (dtype or self.diag.dtype)
            width = CPU_STREAM // stream if stream and not copied else CPU_CHUNK
        else:  # launches cost more than cache misses: a twentieth of D at a time
            width = min(max(self.dim // 20, 65_536), 4_194_304)
        width = max(BLOCK, width // max(1, self.batch_shape.numel()) // BLOCK * BLOCK)
        for start in range(0, self.dim, width):
            yield slice(start, min(start + width, self.dim))

    def rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the chunk of :math:`R^T`, shape ``(*B, K, n)``: a view where nothing has to be converted."""
        rows = self.root[..., part, :].mT
        if self.scale is not None:
            narrow = dtype if dtype is not torch.float64 or has_float64(rows.device) else torch.float32
            return in_dtype(decode_rows(rows, self.scale, narrow, start=part.start), dtype)
        return in_dtype(rows, dtype)

    def rows_at(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the columns of :math:`R^T` at ``index`` (n,), shape ``(*B, K, n)``."""
        rows = self.root.mT[..., index].to(dtype)
        return rows if self.scale is None else rows * self.scale[..., index // BLOCK].to(dtype)

    def gathered(self, index: Tensor) -> Tensor:
        """Return :math:`R^T` as it is stored at coordinates ``index`` (n,) in range, shape ``(*B, K, n)``."""
        if self.compiled() and not (torch.is_grad_enabled() and self.root.requires_grad):
            return compiled.gather(self.root, index)
        return self.root.mT[..., index]

    def mix_transposed(self, columns: Tensor) -> Tensor:
        """Return :math:`M^T x` in float64 for ``columns`` x of shape ``(*B, K, S)``."""
        mix = to_float64(self.mix)
        return mix * columns if mix.ndim == 0 else mix.mT @ columns

    def mix_forward(self, columns: Tensor) -> Tensor:
        """Return :math:`M z` in float64 for ``columns`` z of shape ``(*B, R, S)``."""
        mix = to_float64(self.mix)
        return mix * columns if mix.ndim == 0 else mix @ columns

    def mixed_rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the chunk of :math:`(R M)^T`, shape ``(*B, R, n)``."""
        rows = self.rows(part, dtype)
        mix = in_dtype(self.mix, dtype, self.diag.device)
        return rows * mix if self.mix.ndim == 0 else mix.mT @ rows

    def mixed_gram(self, gram: Tensor) -> Tensor:
        """Return :math:`M^T G M` in float64 for a K x K matrix G of the unmixed root."""
        mix = to_float64(self.mix)
        return mix.square() * gram if mix.ndim == 0 else mix.mT @ gram @ mix

    def zeros(self, *shape: int) -> Tensor:
        """Return float64 zeros of shape ``(*B, *shape)`` on this device: an accumulator."""
        return torch.zeros((*self.batch_shape, *shape), dtype=torch.float64, device=sums_device(self.diag.device))


def inverse_std(diag: Tensor, dtype: torch.dtype, point_masses: bool = True) -> Tensor:
    """Return ``diag ** -1/2`` in ``dtype``, and zero at point masses (out of every sum) if there can be any."""
    diag = in_dtype(diag, dtype)
    inverse = diag.rsqrt()
    return inverse.masked_fill_(diag == 0, 0.0) if point_masses else inverse


def inverse_variance(diag: Tensor, dtype: torch.dtype, point_masses: bool = True) -> Tensor:
    """Return ``1 / diag`` in ``dtype``, and zero at point masses, if there can be any."""
    diag = in_dtype(diag, dtype)
    inverse = diag.reciprocal()
    return inverse.masked_fill_(diag == 0, 0.0) if point_masses else inverse


def multiply(rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``rows @ columns``, by a matrix-vector product where there is one column: it reads rows at full speed."""
    if rows.ndim == 2 and columns.shape[-1] == 1:
        return torch.mv(rows, columns.squeeze(-1)).unsqueeze(-1)
    return rows @ columns


def only_column(columns: Tensor) -> Tensor | None:
    """Return the vector ``(D,)`` if ``columns`` is one column of one matrix, else None."""
    return columns[:, 0] if columns.ndim == 2 and columns.shape[1] == 1 else None


def project(factors: LowRankFactors, columns: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return :math:`R^T X` in float64, shape ``(*B, K, S)``, for ``columns`` X of shape ``(*B, D, S)``.

    Cost: one read of the root, O(D K S) time.
    """
    dtype = dtype or factors.diag.dtype
    vector = only_column(columns)
    if vector is not None and factors.compiled(vector):
        return compiled.project(factors.root, None, vector, None, dtype)[:-1].unsqueeze(-1)
    total = factors.zeros(factors.root.shape[-1], columns.shape[-1])
    for part in factors.chunks(max(1, columns.shape[-1]), dtype):
        total += to_float64(multiply(factors.rows(part, dtype), in_dtype(columns[..., part, :], dtype)))
    return total


def gram(factors: LowRankFactors, dtype: torch.dtype, weigh: bool = True, point_masses: bool = True) -> Tensor:
    r"""Return :math:`R^T \mathrm{diag}(d)^{-1} R` (or :math:`R^T R` without ``weigh``) in float64, ``(*B, K, K)``.

    The products of a chunk are taken in ``dtype``, the sum over chunks in float64.
    Cost: one read of the root, O(D K^2) time.
    """
    if factors.compiled():
        return compiled.gram(factors.root, factors.diag if weigh else None, dtype)[0]
    columns = factors.root.shape[-1]
    total = factors.zeros(columns, columns)
    for part in factors.chunks():
        rows = factors.rows(part, dtype)
        if weigh:
            rows = rows * inverse_std(factors.diag[..., part], dtype, point_masses).unsqueeze(-2)
        total += outer_product(rows)
    return total


SPLIT = 4
"""Pieces of a chunk whose K x K products are taken side by side: a third faster than one long product on a CPU."""


def outer_product(rows: Tensor) -> Tensor:
    """Return ``rows @ rows.mT`` in float64 for ``rows`` of shape ``(*B, K, n)``."""
    if rows.shape[-1] % SPLIT:
        return to_float64(rows @ rows.mT)
    pieces: Tensor = rows.unflatten(-1, (SPLIT, -1)).movedim(-2, 0)
    return sum_in_float64(pieces @ pieces.mT, 0)
