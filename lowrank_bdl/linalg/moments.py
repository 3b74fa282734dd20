r"""Streaming mean and variance of high-dimensional vectors, accurate in the storage dtype.

Welford, "Note on a method for calculating corrected sums of squares and products" (1962), with the first vector
kept as a shift, so that every sum is of *differences* and nothing of the size of the weights is ever squared. Merging
follows Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979),
eq. 2.1.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.transforms import transformed

STATE_NAMES = ("shift", "offset", "sum_sq", "count", "prior_count")


def column_chunks(numel: int, device: torch.device, block: int = 1) -> Iterator[slice]:
    """Yield slices that cover ``range(numel)``, so that temporaries stay far smaller than D.

    Args:
        numel: Length of the axis.
        device: Chunks fit a core's cache on the CPU and fill the device elsewhere.
        block: Every chunk but the last is a multiple of this many columns; a power of two up to 2¹⁶.
    """
    size = 1 << (17 if device.type == "cpu" else 24)
    size = max(size // block, 1) * block
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def first_unusable(x: Tensor, bound: float) -> int | None:
    """Return the flat index of the first entry that is NaN or not within ``±bound``, or None; no D-sized temporary.

    Under torch.func and torch.compile numbers cannot be looked at: None.
    """
    if x.numel() == 0 or transformed():
        return None
    low, high = torch.aminmax(x)  # both are NaN if any entry is
    if bool((low > -bound) & (high < bound)):
        return None
    for columns in column_chunks(x.numel(), x.device):
        bad = ~(x[columns].abs() < bound)
        if bool(bad.any()):
            return int(columns.start + bad.to(torch.uint8).argmax())
    raise AssertionError("unreachable: aminmax saw an unusable entry")  # pragma: no cover


@exact_methods
class StreamingMoments:
    r"""Accumulate mean and variance of vectors :math:`x_1, \dots, x_n \in R^D` that arrive one at a time.

    With the shift :math:`c` (the first vector, unless a prior mean is given) and :math:`y_t = x_t - c`,

    .. math:: \delta = y_n - o_{n-1},\quad o_n = o_{n-1} + \delta / n,\quad M_n = M_{n-1} + \delta^2 (n-1)/n ,

    so that the mean is :math:`c + o_n` and the variance :math:`M_n / (n - \mathrm{correction})`. Nothing cancels:
    the variance of weights near 1 with standard deviation 1e-4 is right to 1e-5 in float32, where
    :math:`E[x^2] - E[x]^2` is negative for a third of them. All work is in place and in chunks.

    A run can continue a mean of ``prior_count`` vectors that this object never saw: these count in :attr:`mean`,
    and never in :meth:`variance`.

    Args:
        numel: D.
        dtype: float32 or float64; half types are refused because sums in them are wrong after a few vectors.
        device: Where the state lives; torch's default if None.
        prior_mean: Mean of earlier vectors, shape ``(D,)``; copied.
        prior_count: Number of earlier vectors; > 0 needs ``prior_mean``.

    Attributes:
        shift: c, shape ``(D,)`` [unit of x].
        offset: mean of the vectors seen minus c, shape ``(D,)`` [unit of x].
        sum_sq: sum of squared deviations from the mean of the vectors seen, shape ``(D,)`` [unit of x, squared].

    Raises:
        ValueError: If dtype is not float32 or float64, or the prior is incomplete.
        ShapeError: If ``prior_mean`` is not ``(D,)``.

    Cost: 3·D numbers of state; an update reads 4·D and writes 2·D numbers.

    Example:
        >>> moments = StreamingMoments(1)
        >>> for value in (1.0, 2.0, 6.0):
        ...     moments.update(torch.tensor([value]))
        >>> moments.count, moments.mean.item(), moments.variance().item()
        (3, 3.0, 7.0)
    """

    def __init__(
        self,
        numel: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        prior_mean: Tensor | None = None,
        prior_count: int = 0,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}.")
        if prior_count < 0 or (prior_count > 0) != (prior_mean is not None):
            raise ValueError(f"prior_count must be >= 0, and > 0 exactly if prior_mean is given; got {prior_count}.")
        self.shift = torch.zeros(numel, dtype=dtype, device=device)
        self.offset = torch.zeros_like(self.shift)
        self.sum_sq = torch.zeros_like(self.shift)
        self._count = torch.zeros((), dtype=torch.int64, device="cpu")  # counters stay there: nobody waits to read them
        self._prior_count = torch.full((), prior_count, dtype=torch.int64, device="cpu")
        if prior_mean is not None:
            self._check(prior_mean)
            self.shift.copy_(prior_mean)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "StreamingMoments":
        """Wrap the tensors of :meth:`state`, sharing their memory: later updates write into them.

        Args:
            state: ``shift``, ``offset``, ``sum_sq`` of shape ``(D,)``; ``count``, ``prior_count`` of shape ``()``, on
                the CPU if reading them is not to wait for a device.

        Raises:
            ShapeError: If a tensor is missing or does not have the shape of the others.
        """
        missing = [name for name in STATE_NAMES if name not in state]
        if missing:
            raise ShapeError(f"state must hold {', '.join(STATE_NAMES)}; missing {', '.join(missing)}.")
        self = cls.__new__(cls)
        self.shift, self.offset, self.sum_sq = (state[name] for name in STATE_NAMES[:3])
        self._count, self._prior_count = state["count"], state["prior_count"]
        for name in STATE_NAMES[1:3]:
            if state[name].shape != self.shift.shape or state[name].dtype != self.shift.dtype:
                raise ShapeError(
                    f"{name} must have the shape {tuple(self.shift.shape)} and dtype {self.shift.dtype} of shift; "
                    f"got {tuple(state[name].shape)} and {state[name].dtype}."
                )
        return self

    def state(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors that share memory; :meth:`from_state` restores it bit for bit."""
        return dict(
            zip(STATE_NAMES, (self.shift, self.offset, self.sum_sq, self._count, self._prior_count), strict=True)
        )

    @property
    def numel(self) -> int:
        """D."""
        return self.shift.numel()

    @property
    def count(self) -> int:
        """Number of vectors seen, the prior ones not included."""
        return int(self._count)

    @property
    def prior_count(self) -> int:
        """Number of vectors averaged before this object saw any."""
        return int(self._prior_count)

    @property
    def _mean_weight(self) -> float:
        # the prior mean is the shift itself, hence its own offset is zero and the common mean needs no further tensor
        return self.count / max(self.count + self.prior_count, 1)

    @property
    def mean(self) -> Tensor:
        """Mean of all vectors, prior ones included, shape ``(D,)`` [unit of x]; a new tensor, zero before any."""
        return torch.add(self.shift, self.offset, alpha=self._mean_weight)

    def variance(self, correction: int = 1) -> Tensor:
        """Return ``sum_sq / (count - correction)``, shape ``(D,)``, of the vectors seen [unit of x, squared].

        Args:
            correction: 1 for the unbiased estimate, 0 for the population variance.

        Raises:
            ValueError: If fewer than ``correction + 1`` vectors were seen.
        """
        if self.count <= correction:
            needs = f"variance with correction={correction} needs more than {correction} vectors"
            raise ValueError(f"{needs}; got {self.count}.")
        return self.sum_sq / (self.count - correction)

    @torch.no_grad()
    def update(self, x: Tensor, *, check_finite: bool = True, deviation: Tensor | None = None) -> None:
        """Count one more vector.

        Args:
            x: Shape ``(D,)``, any floating dtype, on the device of the state.
            check_finite: Look for unusable entries first; False is for callers who have done so.
            deviation: Where to write ``x`` minus the new :attr:`mean`, shape ``(D,)``, in the same pass.

        Raises:
            ShapeError: If the shape is not ``(D,)``.
            NonFiniteError: If an entry is NaN, infinite, or so large that its square overflows; nothing is written.
        """
        self._check(x)
        bad = first_unusable(x, self.bound) if check_finite else None
        if bad is not None:
            raise NonFiniteError(
                f"expected entries below {self.bound:.1e} in magnitude; entry {bad} is {x[bad].item()}."
            )
        count = self.count + 1
        first = count == 1 and self.prior_count == 0
        if compiled.collects(x, self.shift, self.offset, self.sum_sq):
            apart = deviation is not None and not compiled.collects(x, deviation)
            row = None if apart else deviation
            compiled.collect(x, (self.shift, self.offset, self.sum_sq), row, count, self.prior_count)
            self._count += 1
            if apart and deviation is not None:  # a row of another dtype: the moments must not depend on that
                for columns in column_chunks(self.numel, x.device):
                    shifted = x[columns] - self.shift[columns]
                    deviation[columns] = shifted.sub_(self.offset[columns], alpha=self._mean_weight)
            return
        for columns in column_chunks(self.numel, x.device):
            part, offset = x[columns].to(self.shift.dtype), self.offset[columns]
            if first:
                self.shift[columns] = part
            shifted = part - self.shift[columns]  # exact where x and the shift are within a factor of 2
            if not first:
                delta = shifted - offset
                offset.add_(delta, alpha=1 / count)
                self.sum_sq[columns].addcmul_(delta, delta, value=(count - 1) / count)
            if deviation is not None:
                deviation[columns] = shifted.sub_(offset, alpha=count / (count + self.prior_count))
        self._count += 1

    @torch.no_grad()
    def center_(self, x: Tensor) -> Tensor:
        """Subtract :attr:`mean` from ``x`` in place, through the shift: exact zero for the only vector seen.

        Args:
            x: Shape ``(*S, D)``, in the dtype of the state.

        Returns:
            ``x`` itself.
        """
        return x.sub_(self.shift).sub_(self.offset, alpha=self._mean_weight)

    @torch.no_grad()
    def merge(self, other: "StreamingMoments") -> None:
        """Count every vector that ``other`` has seen; ``other`` is left as it is.

        Args:
            other: Moments of the same D, without a prior mean.

        Raises:
            ShapeError: If D differs.
            ValueError: If ``other`` continues a prior mean, which a merge could not tell from vectors seen.
        """
        if other.numel != self.numel:
            raise ShapeError(f"expected moments of {self.numel} coordinates; got {other.numel}.")
        if other.prior_count:
            raise ValueError(f"expected moments without a prior mean; got one of {other.prior_count} vectors.")
        mine, theirs = self.count, other.count
        if theirs == 0:
            return
        if mine == 0 and self.prior_count == 0:
            self.shift.copy_(other.shift)
        for columns in column_chunks(self.numel, self.shift.device):
            dtype = self.shift.dtype
            delta = other.shift[columns].to(dtype) - self.shift[columns]
            delta += other.offset[columns].to(dtype) - self.offset[columns]
            self.offset[columns].add_(delta, alpha=theirs / (mine + theirs))
            self.sum_sq[columns].add_(other.sum_sq[columns].to(dtype))
            self.sum_sq[columns].addcmul_(delta, delta, value=mine * theirs / (mine + theirs))
        self._count += theirs

    @property
    def bound(self) -> float:
        """Entries must be smaller than this in magnitude, so that squares of their differences are finite."""
        return float(torch.finfo(self.shift.dtype).max ** 0.5) / 4

    def _check(self, x: Tensor) -> None:
        if x.shape != self.shift.shape:
            raise ShapeError(f"expected shape {tuple(self.shift.shape)}; got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ShapeError(f"expected a real floating dtype; got {x.dtype}.")
