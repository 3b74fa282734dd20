"""The orthonormal vectors of a Lanczos run: in any dtype, on any device, never copied as a whole."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.devices import in_dtype, sums_device, to_float64
from lowrank_bdl.linalg.factors import CPU_CHUNK
from lowrank_bdl.linalg.moments import column_chunks

_SUMMED = 8192
"""Products of a float32 sum on a CPU before it goes into float64."""


class LanczosBasis:
    r"""Rows :math:`q_0, q_1, \dots \in R^D`, orthonormal, in two tensors.

    The first tensor has as many rows as eigenvectors are wanted: these are computed in place at the end and returned
    without a copy, when the other tensor is let go. Passes over the rows are matrix products on the rows as they lie;
    rows of another dtype than the vectors' are converted in chunks that fit a cache.

    Args:
        wanted: Rows of the first tensor.
        num_rows: Rows in all.
        dim: D.
        dtype: What the rows are stored in.
        work_dtype: What vectors are in that are orthogonalised: float32 or float64.
        device: Where the rows are.
    """

    def __init__(
        self,
        wanted: int,
        num_rows: int,
        dim: int,
        dtype: torch.dtype,
        work_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_rows, self.dim = num_rows, dim
        self.dtype, self.work_dtype, self.device = dtype, work_dtype, device
        # Zeros, not what the memory held before: a checkpoint has rows that were never written.
        self.panels = [
            torch.zeros(size, dim, dtype=dtype, device=device) for size in (wanted, max(num_rows - wanted, 0))
        ]

    def row(self, index: int) -> Tensor:
        """Return a view of a row, shape ``(D,)``."""
        first = len(self.panels[0])
        return self.panels[0][index] if index < first else self.panels[1][index - first]

    def block(self, first: int, count: int) -> Tensor:
        """Return some rows in the working dtype, ``(count, D)``: a view where that is possible."""
        parts = [panel for _, panel in self._filled(first, first + count)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self.work_dtype)

    def workspace(self, first: int, count: int) -> Tensor:
        """Return room for vectors that are to become rows, ``(count, D)``, in the working dtype.

        The rows themselves, so that nothing is copied, where their dtype is that and they lie one after another.
        """
        parts = [panel for _, panel in self._filled(first, first + count)]
        if self.dtype == self.work_dtype and len(parts) == 1 and len(parts[0]) == count:
            return parts[0]
        return torch.empty(count, self.dim, dtype=self.work_dtype, device=self.device)

    def store(self, index: int, vector: Tensor, norm: float) -> None:
        """Write ``vector / norm`` into a row; a vector ``(D,)`` of another dtype than the row's is overwritten."""
        row = self.row(index)
        if row.dtype == vector.dtype:
            torch.div(vector, norm, out=row)
        else:
            row.copy_(vector.div_(norm))

    def orthogonalize_(self, vectors: Tensor, first: int, last: int) -> Tensor:
        """Remove the span of rows ``first`` to ``last`` from vectors in place, in two passes.

        One pass leaves components as large as the rounding errors of what it removes. The product of a direction that
        has converged consists of little else than what is removed, and orthogonality is then lost.

        Args:
            vectors: Shape ``(w, D)``, in the working dtype, on the device of the rows.
            first: The first row.
            last: The row after the last.

        Returns:
            The coefficients removed, ``(last - first, w)``, float64.

        Cost: four reads of the rows; about three by compiled kernels (one vector, rows of its dtype, CPU), or where
        they are worked on in parts that fit a cache.
        """
        panels = [panel for _, panel in self._filled(first, last)]
        if len(vectors) == 1 and panels and all(compiled.applies(panel.mT, vectors[0]) for panel in panels):
            return _orthogonalize_one_(vectors[0], [panel.mT for panel in panels]).unsqueeze(-1)
        total = torch.zeros(last - first, len(vectors), dtype=torch.float64, device=sums_device(vectors.device))
        removed: Tensor | None = None
        for sweep in range(3):
            found = torch.zeros_like(total)
            for part in self._parts(last - first):
                chunk = vectors[:, part]
                blocks = [(at, panel[:, part].to(self.work_dtype)) for at, panel in self._filled(first, last)]
                if removed is not None:
                    for at, rows in blocks:
                        _subtract(chunk, rows, removed[at - first : at - first + len(rows)])
                for at, rows in blocks if sweep < 2 else ():
                    found[at - first : at - first + len(rows)] += in_dtype(
                        _project(rows, chunk), self.work_dtype, total.device
                    )
            removed = found.to(vectors.device, self.work_dtype)
            total += removed.to(total.device)
        return total

    def subtract_(self, vectors: Tensor, coefficients: Tensor) -> None:
        """Subtract combinations of the first n rows, with coefficients ``(n, w)``, from vectors ``(w, D)`` in place."""
        weights = coefficients.to(device=self.device, dtype=self.work_dtype)
        for part in self._parts(len(weights)):
            for at, rows in self._filled(0, len(weights)):
                _subtract(vectors[:, part], rows[:, part].to(self.work_dtype), weights[at : at + len(rows)])

    def restart(self, vectors: Tensor, pending: int) -> None:
        """Replace the first rows by combinations of themselves, and let the rows that follow them come next.

        Args:
            vectors: Coordinates of the combinations, ``(n, m)``, of the first n rows; m <= n.
            pending: How many rows after the first n are kept.
        """
        size, keep = vectors.shape
        for part, rotated in self._rotated(vectors):
            for at, panel in self._filled(0, keep):
                panel[:, part] = rotated[at : at + len(panel)]
        for i in range(pending):  # forwards: what is overwritten has been moved, or is not needed
            self.row(keep + i).copy_(self.row(size + i))

    def finish(self, vectors: Tensor, device: torch.device) -> Tensor:
        """Return combinations of the first rows in the working dtype; the basis is of no use afterwards.

        Args:
            vectors: Coordinates, ``(n, wanted)``.
            device: Where the result goes.

        Returns:
            Shape ``(wanted, D)``, contiguous: the first tensor itself where dtype and device are the same.
        """
        in_place = self.dtype == self.work_dtype and self.device == device
        result = self.panels[0]
        if not in_place:
            result = torch.empty(vectors.shape[1], self.dim, dtype=self.work_dtype, device=device)
        for part, rotated in self._rotated(vectors):
            result[:, part] = rotated.to(device)
        self.panels = []
        return result

    def _rotated(self, vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield chunks of columns of ``vectors.mT @ rows``; a chunk of rows is read before its result is handed out."""
        size = len(vectors)
        turn = vectors.mT.to(device=self.device, dtype=self.work_dtype).contiguous()
        for part in self._chunks(size):
            rows = torch.cat([panel[:, part] for _, panel in self._filled(0, size)]).to(self.work_dtype)
            yield part, turn @ rows

    def _filled(self, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows ``first`` to ``last`` as views of the tensors they lie in, with the number of the first."""
        start = 0
        for panel in self.panels:
            low, high = max(first - start, 0), min(last - start, len(panel))
            if low < high:
                yield start + low, panel[low:high]
            start += len(panel)

    def _parts(self, count: int) -> Iterator[slice]:
        """Yield slices of columns that are worked on at once: all of them where nothing speaks against it.

        Rows of another dtype are converted. On a CPU one long float32 sum adds millions of small products to what a few
        large entries made, and loses them: 1e-4 of the result; sums of parts, added up in float64, do not.
        """
        if self.dtype != self.work_dtype:
            return self._chunks(count)
        width = _SUMMED if self.device.type == "cpu" and self.dtype == torch.float32 else max(self.dim, 1)
        return (slice(start, min(start + width, self.dim)) for start in range(0, self.dim, width))

    def _chunks(self, count: int) -> Iterator[slice]:
        """Yield slices of columns, ``count`` rows of which are a quarter of a vector, or fit a cache."""
        width = max(self.dim // max(4 * count, 1), 1024)
        if self.device.type == "cpu":
            width = min(width, CPU_CHUNK)
        for start in range(0, self.dim, width):
            yield slice(start, min(start + width, self.dim))


def _orthogonalize_one_(vector: Tensor, roots: Sequence[Tensor]) -> Tensor:
    """Remove the columns of all roots from a vector in two passes, with compiled kernels; return the coefficients.

    Of the last root, usually the longest, the second projection comes with the first subtraction, from one read.
    """
    last = roots[-1]
    first_pass = [compiled.project(root, None, vector, None, vector.dtype)[:-1] for root in roots]
    for root, found in zip(roots, first_pass, strict=True):
        again = compiled.subtract_(root, vector, found, project=root is last)
    second_pass = [compiled.project(root, None, vector, None, vector.dtype)[:-1] for root in roots[:-1]]
    second_pass.append(again[:-1])
    for root, found in zip(roots, second_pass, strict=True):
        compiled.subtract_(root, vector, found, project=False)
    return torch.cat(first_pass) + torch.cat(second_pass)


_SAFE_SQUARES = (1e-280, 1e300)
"""A sum of squares between these has neither lost terms to underflow nor come near an overflow."""


def norm(vector: Tensor) -> Tensor:
    """Return the 2-norm in float64, at any scale that the vector's own dtype can hold; no float64 copy of it.

    Squares of float32 numbers fit float64. Those of float64 numbers are taken of the vector over its largest entry
    where they would not fit; on a device always, since to look would be to wait for it.

    Cost: one read of the vector, two where it is divided by its largest entry.
    """
    if vector.dtype != torch.float64:
        return _sum_of_squares(vector).sqrt()
    if vector.device.type == "cpu":
        total = _sum_of_squares(vector)
        if _SAFE_SQUARES[0] < float(total) < _SAFE_SQUARES[1]:
            return total.sqrt()
    largest = torch.linalg.vector_norm(vector, float("inf"))
    unit = power_of_two(largest)
    return _sum_of_squares(vector, unit).sqrt() * unit


def power_of_two(value: Tensor) -> Tensor:
    """Return the least power of two above a value >= 0, by which one may divide without rounding; 1 for 0 and infinity.

    Example:
        >>> power_of_two(torch.tensor([5.0, 0.0, 0.1]))
        tensor([8.0000, 1.0000, 0.1250])
    """
    usable = torch.where((value > 0) & value.isfinite(), value, 0.5)
    exponent = usable.frexp().exponent.clamp(-1000, 1000)
    return torch.ldexp(torch.ones_like(usable), exponent)


def _sum_of_squares(vector: Tensor, unit: Tensor | None = None) -> Tensor:
    """Return the sum of squares of ``vector / unit`` in float64."""
    chunks = (to_float64(vector[part]) for part in column_chunks(len(vector), vector.device))
    if unit is not None:
        chunks = (chunk / unit for chunk in chunks)
    return torch.stack([chunk.dot(chunk) for chunk in chunks]).sum()


def _project(rows: Tensor, vectors: Tensor) -> Tensor:
    """Return ``rows @ vectors.mT``, by a matrix-vector product where there is one vector."""
    return (rows @ vectors[0]).unsqueeze(-1) if len(vectors) == 1 else rows @ vectors.mT


def _subtract(vectors: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """Subtract ``coefficients.mT @ rows`` in place, without a temporary of the size of the vectors."""
    if len(vectors) == 1:
        vectors[0].addmv_(rows.mT, coefficients[:, 0], alpha=-1)
    else:
        vectors.addmm_(coefficients.mT, rows, alpha=-1)
