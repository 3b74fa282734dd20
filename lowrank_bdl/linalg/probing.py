"""Random probes of a square matrix of which only products are known, and what they estimate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import generator_on, require_float64
from lowrank_bdl.linalg.memory import require_memory

Matrix: TypeAlias = LinearOperator | Tensor | Callable[[Tensor], Tensor]
"""A square matrix: an operator ``(D, D)``, a dense tensor, or a function from ``(D,)`` to ``(D,)``."""

Progress: TypeAlias = Callable[[int], object]
"""Called after every block of products with the number of products so far."""

BLOCK_BYTES = 2**30
"""Vectors of the probes that are multiplied together take at most this much, unless one probe alone needs more."""


@dataclass(frozen=True)
class StochasticEstimate:
    """An estimate with its error bar.

    Attributes:
        value: float64, shape ``()`` or ``(D,)``.
        standard_error: Estimated standard deviation of ``value`` over the probes, float64, its shape; 0 where the value
            is exact, NaN where a single probe tells nothing of it. From n probes it has n - 1 degrees of freedom:
            intervals follow Student's t. Its square is unbiased; from few probes it is low where the value is low, if a
            single eigenvalue dominates.
        truncation: How much the value changed from half the Lanczos steps to all of them, shape ``()``: a guess of the
            quadrature's error, of which the standard error knows nothing; a high one once the steps converge. 0 without
            quadrature.
        num_matvecs: Products with one vector.
    """

    value: Tensor
    standard_error: Tensor
    truncation: Tensor
    num_matvecs: int


def exact_estimate(value: Tensor) -> StochasticEstimate:
    """Return ``value`` with no error bar and no products."""
    return StochasticEstimate(value, torch.zeros_like(value), value.new_zeros(()), 0)


def estimate_mean(samples: Tensor, num_matvecs: int) -> StochasticEstimate:
    """Return the mean of independent samples ``(n,)`` in float64, and its standard error."""
    count = len(samples)
    error = samples.std() / count**0.5 if count > 1 else samples.new_full((), torch.nan)
    return StochasticEstimate(samples.mean(), error, samples.new_zeros(()), num_matvecs)


def require_count(name: str, value: int, at_least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``at_least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}; got {value!r}.")


class ProbedMatrix:
    """A square matrix A as products with rows of probes.

    Args:
        matrix: A LinearOperator or dense tensor of shape ``(D, D)``, or a function from ``(D,)`` to ``(D,)``.
        size: D, for a function.
        dtype: Of the vectors that a function takes; torch's default if None.
        device: Where these vectors live; torch's default if None.
        progress: Called after every block of products with the number of products so far.

    Attributes:
        size: D.
        dtype: Of the vectors that A takes.
        work_dtype: Of the vectors here: ``dtype``, at least float32.
        device: Where they live.
        num_matvecs: Products so far.

    Raises:
        ShapeError: If the matrix is not ``(D, D)``, or ``size`` is another.
        TypeError: If the matrix is neither of these, or its numbers are not real floating-point ones.
        ValueError: If a function comes without its size.
    """

    def __init__(
        self,
        matrix: Matrix,
        size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._batched = isinstance(matrix, LinearOperator | Tensor)
        self._progress = progress
        self.num_matvecs = 0
        if isinstance(matrix, LinearOperator | Tensor):
            shape = tuple(matrix.shape)
            if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
                raise ShapeError(f"the matrix must be (D, D) with D >= 1; got {shape}.")
            if size is not None and size != shape[0]:
                raise ShapeError(f"size must be left out or {shape[0]}, that of the matrix; got {size}.")
            size, dtype, device = shape[0], matrix.dtype, matrix.device
            self._multiply: Callable[[Tensor], Tensor] = matrix.matmul
        elif callable(matrix):
            if size is None:
                raise ValueError("a function as matrix needs its size: size=D.")
            require_count("size", size)
            self._multiply = matrix
        else:
            kind = type(matrix).__name__
            raise TypeError(f"the matrix must be a LinearOperator, a tensor or a function; got {kind}.")
        self.size = size
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if not self.dtype.is_floating_point:
            raise TypeError(f"the matrix must hold real floating-point numbers; got {self.dtype}.")
        self.work_dtype = torch.promote_types(self.dtype, torch.float32)
        self.device = torch.empty(0, device=device).device
        require_float64(self.device, "A stochastic estimate")

    def probes(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Return rows of random signs, shape ``(count, D)``: each row is drawn for itself, whatever ``count`` is."""
        rows = torch.empty(count, self.size, dtype=self.work_dtype, device=self.device)
        for row in rows:
            row.bernoulli_(0.5, generator=generator_on(self.device, generator))
        return rows.mul_(2).sub_(1)

    def blocks(self, count: int, vectors: int, purpose: str) -> Iterator[int]:
        """Yield how many probes to take together, again and again until there are ``count`` of them.

        Args:
            count: Probes in all.
            vectors: Vectors of length D that each of them needs in memory at once.
            purpose: What for, in an error message.

        Raises:
            MemoryLimitError: If a block does not fit the free memory, before it is made.
        """
        num_bytes = vectors * self.size * self.work_dtype.itemsize
        together = max(min(count, BLOCK_BYTES // num_bytes), 1) if self._batched else 1
        self.require_vectors(together * vectors, purpose)
        for start in range(0, count, together):
            yield min(together, count - start)

    def require_vectors(self, vectors: int, purpose: str) -> None:
        """Raise MemoryLimitError unless that many vectors of length D fit the free memory."""
        require_memory(vectors * self.size * self.work_dtype.itemsize, self.device, purpose)

    def product(self, rows: Tensor) -> Tensor:
        """Return ``rows @ A.mT``, shape ``(S, D)``, for rows of that shape, detached; read-only, it may be ``rows``.

        Raises:
            ShapeError: If a product does not have the shape of what was multiplied.
        """
        given = rows.to(self.dtype)
        if self._batched:
            result = self._multiply(given.mT).detach().mT
        elif len(given) == 1:
            result = self._vector_product(given[0])[None]
        else:
            result = torch.stack([self._vector_product(row) for row in given])
        if result.shape != rows.shape:
            raise ShapeError(f"a product must be {tuple(rows.mT.shape)}; got {tuple(result.mT.shape)}.")
        self.num_matvecs += len(rows)
        if self._progress is not None:
            self._progress(self.num_matvecs)
        return result.to(self.work_dtype)

    def _vector_product(self, vector: Tensor) -> Tensor:
        result = self._multiply(vector).detach()
        if result.shape != vector.shape:
            expected, got = tuple(vector.shape), tuple(result.shape)
            raise ShapeError(f"the function must give {expected} for a vector of that shape; got {got}.")
        return result

    def require_finite(self, *numbers: Tensor) -> None:
        """Raise NonFiniteError if a number computed from products is NaN or infinite."""
        if not all(bool(number.isfinite().all()) for number in numbers):
            raise NonFiniteError(
                f"a product with the matrix holds NaN or infinity, or overflows: one of the first {self.num_matvecs}."
            )


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each pair of rows, ``(S, D)``, in float64, shape ``(S,)``; no D-sized temporary."""
    count, size = left.shape
    dots = torch.zeros(count, dtype=torch.float64, device=left.device)
    width = max((1 << (15 if left.device.type == "cpu" else 24)) // max(count, 1), 1)
    for start in range(0, size, width):
        part = slice(start, start + width)
        dots += (left[:, part].double() * right[:, part]).sum(-1)
    return dots
