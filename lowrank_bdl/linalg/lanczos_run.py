"""The steps of a Lanczos run: products, orthogonalisation, breakdowns, restarts."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.lanczos_basis import LanczosBasis, norm
from lowrank_bdl.linalg.lanczos_projection import Projection, Ritz, column_norms

BREAKDOWN = 10.0
"""A new direction this many roundings long, of the product it is left of, is none."""
DEPENDENT = 0.1
"""A vector that loses more than this to others of its block is orthogonalised against the whole basis again."""

Operator: TypeAlias = LinearOperator | Callable[[Tensor], Tensor]


class LanczosRun:
    """A basis, what is known of the operator on it, and the next step.

    Args:
        operator: A LinearOperator, or a function of ``(D,)``, and of ``(D, S)`` for blocks.
        basis: The rows.
        projection: The coefficients.
        dtype: What the operator takes.
        device: Where the operator takes it.
        generator: Source of fresh directions, on that device.
        random_start: Whether the first rows are random: what they do not meet is then not there.
    """

    def __init__(
        self,
        operator: Operator,
        basis: LanczosBasis,
        projection: Projection,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
        random_start: bool,
    ) -> None:
        self.product = operator.matmul if isinstance(operator, LinearOperator) else operator
        self.basis, self.projection = basis, projection
        self.dtype, self.device, self.generator = dtype, device, generator
        self.random = random_start
        self.block_size = projection.coefficients.shape[0] - projection.capacity
        self.num_products = 0

    @property
    def exhausted(self) -> bool:
        """Whether the rows span the whole space."""
        return self.projection.size > 0 and self.projection.pending == 0

    @property
    def full(self) -> bool:
        """Whether the next step has no room."""
        return self.projection.size + self.projection.pending > self.projection.capacity

    def begin(self, start: Tensor) -> None:
        """Make the first block of a start ``(w, D)``, filled up by random vectors; w may be 0."""
        given = len(start)
        work = self.basis.workspace(0, min(self.block_size, self.basis.dim))
        work[:given] = start
        self._draw(work[given:])
        _, coupling, _ = self._append(work, 0, of_operator=False)
        self.projection.pending = len(coupling)

    def step(self) -> None:
        """Multiply the next block, and make another of what is new in the products."""
        known = self.projection
        count = known.size + known.pending
        work = self.basis.workspace(count, known.pending)
        work.copy_(self.multiply(known.size, known.pending))
        known.extend(*self._append(work, count))
        if known.pending == 0 and count < self.basis.dim:
            self.look_elsewhere(complete=self.random)

    def look_elsewhere(self, complete: bool) -> None:
        """Go on from random vectors orthogonal to all rows that have a column.

        Args:
            complete: Whether the space that is left behind is known to hold every eigenvalue that is there.
        """
        size = self.projection.size
        work = self.basis.workspace(size, min(self.block_size, self.basis.dim - size))
        self._draw(work)
        self.basis.orthogonalize_(work, 0, size)  # what remains of them may be small: twice two passes
        _, coupling, _ = self._append(work, size, of_operator=False)
        self.projection.settle(len(coupling), complete)
        self.random = True

    def restart(self, ritz: Ritz, keep: Tensor) -> None:
        """Go on from the chosen Ritz vectors and the next block."""
        self.basis.restart(self.projection.restart(ritz, keep), self.projection.pending)

    def multiply(self, first: int, count: int) -> Tensor:
        """Return products of the operator with rows of the basis, ``(count, D)``."""
        self.num_products += count
        return self.apply(self.basis.block(first, count))

    def apply(self, rows: Tensor) -> Tensor:
        """Return products of the operator with rows ``(w, D)``; counts nothing."""
        columns = rows.to(device=self.device, dtype=self.dtype).mT
        columns = columns[:, 0] if len(rows) == 1 else columns
        result = self.product(columns)
        if not isinstance(result, Tensor) or result.shape != columns.shape:
            found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ShapeError(f"the operator must turn {tuple(columns.shape)} into the same shape; got {found}.")
        return result.detach().reshape(self.basis.dim, len(rows)).mT

    def deviation(self) -> float:
        """Return the norm of what the first row's product differs by from its column, relative to the product's own."""
        known = self.projection
        work = self.basis.workspace(known.size + known.pending, 1)
        work.copy_(self.apply(self.basis.block(0, 1)))
        before = float(norm(work[0]))
        self.basis.subtract_(work, known.coefficients[: known.size + known.pending, :1])
        floor = torch.finfo(work.dtype).eps ** 0.5 * known.largest  # a product of rounding errors tells nothing
        return float(norm(work[0])) / float(max(before, floor, torch.finfo(torch.float64).tiny))

    def _append(self, vectors: Tensor, count: int, of_operator: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Store an orthonormal basis of what vectors ``(w, D)`` have outside the first ``count`` rows after them.

        The vectors are overwritten, and may be those rows.

        Args:
            vectors: Products, or new directions.
            count: How many rows there are.
            of_operator: Whether the vectors are products, whose rounding errors are of the size of the operator's
                largest values; those of new directions are of the size of the directions.

        Returns:
            Coefficients in those rows ``(count, w)``, in the new ones ``(new, w)``, and norms of what was left out
            ``(w,)``; one synchronisation with the device a vector, a second one for nearly dependent vectors.
        """
        width = len(vectors)
        before = torch.stack([norm(vector) for vector in vectors])
        outer = self.basis.orthogonalize_(vectors, 0, count)
        coefficients = torch.zeros(count, width, dtype=torch.float64)
        coupling = torch.zeros(width, width, dtype=torch.float64)
        lost = torch.zeros(width, dtype=torch.float64)
        new = 0
        for i in range(width):
            vector = vectors[i : i + 1]
            inner = self.basis.orthogonalize_(vector, count, count + new)
            found = torch.cat((before[i : i + 1], norm(vector[0])[None], inner[:, 0], outer[:, i])).to("cpu")
            size_before, after = found[:2].tolist()
            if not size_before < float("inf"):
                raise NonFiniteError(f"product {self.num_products} with the operator holds NaN or infinity.")
            coupling[:new, i], coefficients[:, i] = found[2 : 2 + new], found[2 + new :]
            if new and after < DEPENDENT * float(column_norms(found[1 : 2 + new, None])):
                again = self.basis.orthogonalize_(vector, 0, count + new)
                found = torch.cat((norm(vector[0])[None], again[:, 0])).to("cpu")
                after = found[0].item()
                coefficients[:, i] += found[1 : 1 + count]
                coupling[:new, i] += found[1 + count :]
            size_of_errors = max(size_before, self.projection.largest) if of_operator else size_before
            rounding = BREAKDOWN * torch.finfo(vectors.dtype).eps * size_of_errors
            if after <= rounding or count + new == self.basis.dim:
                lost[i] = after
                continue
            self.basis.store(count + new, vector[0], after)
            coupling[new, i] = after
            new += 1
        return coefficients, coupling[:new], lost

    def _draw(self, rows: Tensor) -> None:
        if len(rows):
            rows.copy_(torch.randn(rows.shape, dtype=rows.dtype, device=self.device, generator=self.generator))
