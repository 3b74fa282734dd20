r"""The small side of a Lanczos run: the projected matrix, its eigenpairs, and what they prove about the operator.

With the rows Q of the basis, those of the next block included, the run keeps the measured coefficients H of
:math:`A Q_m^\top = Q^\top H`. Ritz pairs are those of the symmetric part of H's upper square; their residuals,
:math:`\|H s - \theta (s, 0)\|`, hold what is not symmetric about the operator too.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.linalg.lanczos_basis import power_of_two

RESOLVED = 0.03
"""Extreme values of what is left beside settled rows are known by residuals below this part of the largest of them."""


def column_norms(matrix: Tensor) -> Tensor:
    """Return the 2-norm of every column of a small float64 matrix, at any scale: no square underflows or overflows."""
    unit = power_of_two(matrix.abs().amax(0))
    norms: Tensor = torch.linalg.vector_norm(matrix / unit, dim=0) * unit
    return norms


@dataclass(frozen=True)
class Wanted:
    """Which Ritz values to find.

    Attributes:
        top: How many from the upper end; the largest in size if ``by_size``.
        bottom: How many from the lower end.
        by_size: Whether absolute values are compared.
    """

    top: int
    bottom: int
    by_size: bool

    @property
    def total(self) -> int:
        """How many in all."""
        return self.top + self.bottom

    def choose(self, values: Tensor, more: int = 0) -> Tensor:
        """Return where in ``values`` the wanted ones are, each once, those of the upper end first.

        Args:
            values: In any order.
            more: How many beyond the wanted ones, shared by the ends.
        """
        key = values.abs() if self.by_size else values
        order = key.argsort(descending=True, stable=True)
        top, bottom = self.top, self.bottom
        if not bottom:
            top += more
        elif not top:
            bottom += more
        else:
            top, bottom = top + (more + 1) // 2, bottom + more // 2
        bottom = min(bottom, len(values))
        top = min(top, len(values) - bottom)
        return torch.cat((order[:top], order[len(order) - bottom :]))

    def excess(self, low: float, high: float, chosen: Tensor) -> float:
        """Return by how much values from ``low`` to ``high`` may go beyond the innermost of the chosen ones."""
        if self.by_size:
            return max(-low, high) - float(chosen.abs().min())
        above = high - float(chosen[: self.top].min()) if self.top else -math.inf
        below = float(chosen[self.top :].max()) - low if self.bottom else -math.inf
        return max(above, below)

    def any(self) -> "Wanted":
        """Return the same ends with one value each."""
        return Wanted(min(self.top, 1), min(self.bottom, 1), self.by_size)


@dataclass(frozen=True)
class Ritz:
    """Eigenpairs of the projected matrix.

    Attributes:
        values: Shape ``(m,)``.
        vectors: Coordinates in the basis, in columns, ``(m, m)``.
        residuals: Norms of the residuals in the operator's space, ``(m,)``.
        settled: How many of the pairs, the first ones, belong to subspaces that were found to be invariant.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    settled: int

    @property
    def scale(self) -> float:
        """The largest value in size: what tolerances are relative to."""
        return float(self.values.abs().max())

    @property
    def resolved(self) -> float:
        """The residual below which the other pairs tell something about the operator on their space.

        A random vector's is of the size of its value, which may be below any tolerance relative to the largest of all.
        """
        own = float(self.values[self.settled :].abs().max())
        return max(RESOLVED * own, torch.finfo(self.values.dtype).eps * self.scale)


class Projection:
    r"""The coefficients H of a Lanczos run, float64 in host memory.

    When a block ends in an invariant subspace, the rows so far are *settled*, and the run goes on from fresh random
    vectors orthogonal to them. A Krylov space of random vectors meets every eigenvalue that the operator has on the
    space they are drawn from: once it is complete, its extreme values bound all that has not been found yet.

    Args:
        capacity: The most rows with a column of H.
        block_size: The most rows that come next.

    Attributes:
        coefficients: H, shape ``(capacity + block_size, capacity)``.
        lost: Norms of the part of every row's product that no row holds, ``(capacity,)``.
        size: Rows that have a column.
        pending: Rows after them, that come next.
        latest: The last rows with a column, those of the latest step; 0 after a restart.
        settled: The first rows, that span invariant subspaces.
        bounds: Least and largest eigenvalue that may not have been found when all rows are settled, ``(2,)``.
    """

    def __init__(self, capacity: int, block_size: int) -> None:
        self.coefficients = torch.zeros(capacity + block_size, capacity, dtype=torch.float64)
        self.lost = torch.zeros(capacity, dtype=torch.float64)
        self.bounds = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
        self.size = self.pending = self.latest = self.settled = 0

    @property
    def capacity(self) -> int:
        """The most rows with a column of H."""
        return self.coefficients.shape[1]

    @property
    def largest(self) -> float:
        """The largest coefficient in size."""
        return float(self.coefficients.abs().max())

    def extend(self, coefficients: Tensor, coupling: Tensor, lost: Tensor) -> None:
        """Add the columns of the rows that came next.

        Args:
            coefficients: Of their products in all rows, themselves included, ``(size + pending, pending)``.
            coupling: In the rows after these, ``(new, pending)``.
            lost: Norms of what was left out, ``(pending,)``.
        """
        columns = slice(self.size, self.size + self.pending)
        count = self.size + self.pending
        self.coefficients[:count, columns] = coefficients
        self.coefficients[count : count + len(coupling), columns] = coupling
        self.lost[columns] = lost
        self.size, self.pending, self.latest = count, len(coupling), self.pending

    def settle(self, pending: int, complete: bool) -> None:
        """Take note that the rows span an invariant subspace, or nearly, and that fresh ones come next.

        Args:
            pending: How many.
            complete: Whether the last ones before came from random vectors, so that their values bound the rest.
        """
        coupling = self.coefficients[self.size :, : self.size]
        self.lost[: self.size] = column_norms(torch.cat((self.lost[None, : self.size], coupling)))
        coupling.zero_()
        if complete:
            values = self._eigenvalues(self.settled, self.size)
            self.bounds = torch.stack((values[0], values[-1]))
        self.settled, self.pending, self.latest = self.size, pending, 0

    def ritz(self) -> Ritz:
        """Return the Ritz pairs, settled ones first."""
        size = self.size
        spans = [(first, last) for first, last in ((0, self.settled), (self.settled, size)) if first < last]
        values, vectors = torch.zeros(size).double(), torch.zeros(size, size).double()
        for first, last in spans:  # apart: pairs of equal value would else be mixed across the two
            unit = power_of_two(self.coefficients.abs().max())  # LAPACK's own scaling is no power of two
            own, vectors[first:last, first:last] = torch.linalg.eigh(self._symmetric(first, last) / unit)
            values[first:last] = own * unit
        defects = self.coefficients[: size + self.pending, :size] @ vectors
        defects[:size] -= vectors * values
        unseen = column_norms(self.lost[:size, None] * vectors)
        return Ritz(values, vectors, torch.hypot(column_norms(defects), unseen), self.settled)

    def complete(self, ritz: Ritz, tolerance: float) -> bool:
        """Tell whether every pair beside the settled rows is within the tolerance: their space is invariant to it."""
        residuals = ritz.residuals[ritz.settled :]
        return len(residuals) > 0 and bool((residuals <= min(tolerance, ritz.resolved)).all())

    def finished(self, ritz: Ritz, wanted: Wanted, tolerance: float) -> bool:
        """Tell whether the wanted pairs are within the tolerance, and nothing can be missing among them.

        Args:
            ritz: The pairs.
            wanted: Which of them.
            tolerance: Of the residuals.
        """
        order = wanted.choose(ritz.values)
        if len(order) < wanted.total or bool((ritz.residuals[order] > tolerance).any()):
            return False
        chosen = ritz.values[order]
        if len(ritz.values) == ritz.settled:
            low, high = self.bounds.tolist()
            return wanted.excess(low, high, chosen) <= tolerance
        fresh, residuals, own = ritz.values[ritz.settled :], ritz.residuals[ritz.settled :], ritz.resolved
        for end in wanted.any().choose(fresh) if ritz.settled else ():
            value, residual = float(fresh[end]), float(residuals[end])
            near = residual <= tolerance or wanted.excess(value - residual, value + residual, chosen) <= 0
            if residual > own or not near:
                return False
        return self.pending == 0 or self._steady(ritz, order, wanted, tolerance)

    def _steady(self, ritz: Ritz, order: Tensor, wanted: Wanted, tolerance: float) -> bool:
        """Tell whether the latest step left the wanted values as they were: that none has only begun to emerge.

        Values come to rest before residuals do, so that this takes no step more, except where the pairs converge that
        are not the extreme ones yet, as all the pairs of a few steps may with bulk that is smaller than the tolerance.
        """
        before = ritz.values[: ritz.settled]
        if self.size - self.latest > self.settled:
            fresh = self._eigenvalues(self.settled, self.size - self.latest)
            before = torch.cat((before, fresh))
        before = before[wanted.choose(before)].sort().values
        after = ritz.values[order].sort().values
        return len(before) == len(after) and bool(((before - after).abs() <= tolerance).all())

    def restart(self, ritz: Ritz, keep: Tensor) -> Tensor:
        """Replace the rows by Ritz vectors; return their coordinates ``(size, m)``.

        Args:
            ritz: The pairs.
            keep: Which of them, ``(m,)``.
        """
        keep = keep.sort().values  # settled ones first
        turn, size, count = ritz.vectors[:, keep], self.size, len(keep)
        products = self.coefficients[: size + self.pending, :size] @ turn
        inside = turn.mT @ products[:size]
        outside = column_norms(products[:size] - turn @ inside)
        lost = torch.hypot(column_norms(self.lost[:size, None] * turn), outside)
        self.coefficients.zero_()
        self.coefficients[:count, :count] = inside
        self.coefficients[count : count + self.pending, :count] = products[size:]
        self.lost.zero_()
        self.lost[:count] = lost
        self.size, self.latest, self.settled = count, 0, int((keep < ritz.settled).sum())
        return turn

    def _eigenvalues(self, first: int, last: int) -> Tensor:
        unit = power_of_two(self.coefficients.abs().max())
        values: Tensor = torch.linalg.eigvalsh(self._symmetric(first, last) / unit) * unit
        return values

    def _symmetric(self, first: int, last: int) -> Tensor:
        square = self.coefficients[first:last, first:last]
        return (square + square.mT) / 2
