"""Frequent directions: a sketch of more rows than there is room for, with a bound on what it loses."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import require_float64
from lowrank_bdl.linalg.factors import LowRankFactors, gram
from lowrank_bdl.linalg.moments import first_unusable
from lowrank_bdl.linalg.precision import exact_methods


@exact_methods
class FrequentDirectionsSketch:
    r"""Keep B of at most :math:`2 \ell` rows for a stream A of n, so that :math:`B^\top B` is near :math:`A^\top A`.

    When 2ℓ rows are full, their squared singular values are lowered by the ℓ-th largest, :math:`\delta`, which leaves
    ℓ - 1 rows. With :math:`\Delta = \sum \delta` over all such steps, and any k < ℓ,

    .. math:: 0 \preceq A^\top A - B^\top B \preceq \Delta I, \qquad
              \Delta \le \|A - A_k\|_F^2 / (\ell - k),

    where :math:`A_k` is the best approximation of rank k: a stream of rank below ℓ is kept exactly.

    Args:
        sketch_size: ℓ >= 2.
        numel: D, the length of a row.
        dtype: float32 or float64.
        device: Where the sketch lives; torch's default if None.

    Attributes:
        sketch_size: ℓ.
        shrinkage: :math:`\Delta`, a float64 scalar [unit of a row, squared].

    Raises:
        ValueError: If ``sketch_size`` < 2 or ``dtype`` is another.

    Cost: 2ℓ·D numbers from the first row to the last; a row costs one write, and every ℓ + 1 rows a pass of
    O(D ℓ²) time through the 2ℓ x 2ℓ matrix :math:`B B^\top`, in place.

    Source: Ghashami, Liberty, Phillips and Woodruff, "Frequent Directions: Simple and Deterministic Matrix Sketching",
    SIAM J. Comput. 45 (2016), algorithm 3 with a buffer of ℓ further rows, theorem 1.1.

    Example:
        >>> sketch = FrequentDirectionsSketch(2, numel=3)
        >>> for row in (9 * torch.eye(3)[0], torch.eye(3)[1], 9 * torch.eye(3)[0], torch.eye(3)[1], torch.eye(3)[2]):
        ...     sketch.push(row)
        >>> sketch.num_pushed, len(sketch.rows), sketch.shrinkage.item()
        (5, 2, 2.0)
    """

    def __init__(
        self,
        sketch_size: int,
        numel: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if sketch_size < 2:
            raise ValueError(f"sketch_size must be at least 2; got {sketch_size}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}.")
        self.sketch_size = sketch_size
        self._storage = torch.zeros((2 * sketch_size, numel), dtype=dtype, device=device)
        require_float64(torch.empty(0, device=device).device, "A frequent-directions sketch")
        self.shrinkage = torch.zeros((), dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # rows filled, rows pushed

    @property
    def numel(self) -> int:
        """D."""
        return int(self._storage.shape[1])

    @property
    def num_pushed(self) -> int:
        """Rows of the stream so far."""
        return int(self._counts[1])

    @property
    def rows(self) -> Tensor:
        """The sketch B, at most 2ℓ rows of D; a view, which the next push may change."""
        return self._storage[: int(self._counts[0])]

    @property
    def bound(self) -> float:
        """Entries must be smaller than this in magnitude, so that sums of their squares are finite."""
        return math.sqrt(torch.finfo(self._storage.dtype).max) / 4

    @torch.no_grad()
    def push(self, row: Tensor) -> None:
        """Take one more row of the stream.

        Args:
            row: Shape ``(D,)``, floating dtype, on the device of the sketch.

        Raises:
            ShapeError: If the shape is not ``(D,)``.
            NonFiniteError: If an entry is NaN, infinite or too large to square; nothing is changed then.
        """
        if row.shape != (self.numel,) or not row.is_floating_point():
            raise ShapeError(f"expected a floating row of shape ({self.numel},); got {tuple(row.shape)}, {row.dtype}.")
        bad = first_unusable(row, self.bound)
        if bad is not None:
            raise NonFiniteError(
                f"expected entries below {self.bound:.1e} in magnitude; entry {bad} is {row[bad].item()}."
            )
        self.next_row().copy_(row)
        self.advance()

    @torch.no_grad()
    def next_row(self) -> Tensor:
        """Return a free row, to be written in place and then counted by :meth:`advance`; shrinks a full sketch."""
        if int(self._counts[0]) == len(self._storage):
            self._shrink()
        return self._storage[int(self._counts[0])]

    def advance(self) -> None:
        """Count the row that was written into :meth:`next_row`."""
        self._counts += 1

    def _shrink(self) -> None:
        size = self.sketch_size
        one = torch.ones((), dtype=torch.float64, device=self._storage.device)
        factors = LowRankFactors(self._storage.mT, self._storage[0], one)  # of a diagonal only the length is used
        values, vectors = torch.linalg.eigh(gram(factors, torch.float64, weigh=False))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        lost, kept = values[size - 1], values[: size - 1]
        weights = torch.where(kept > lost, (1 - lost / kept).sqrt(), 0.0)
        mix = (vectors[:, : size - 1] * weights).mT.to(self._storage.dtype)
        for part in factors.chunks():
            self._storage[: size - 1, part] = mix @ self._storage[:, part]
        self.shrinkage += lost
        self._counts[0] = size - 1

    # ---- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors that share memory."""
        return {"storage": self._storage, "shrinkage": self.shrinkage, "counts": self._counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state of the same sizes into this sketch, which then goes on from it bit for bit.

        Raises:
            ShapeError: If a tensor is missing or of another shape or dtype, or the counts are impossible; nothing is
                changed then.
        """
        own = self.state()
        for name, tensor in own.items():
            found = state.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                got = "none" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise ShapeError(f"{name} of the sketch must be {tuple(tensor.shape)} {tensor.dtype}; got {got}.")
        filled, pushed = state["counts"].tolist()
        if not 0 <= filled <= min(pushed, len(self._storage)):
            raise ShapeError(f"a sketch of {len(self._storage)} rows cannot hold {filled} of {pushed} pushed.")
        for name, tensor in own.items():
            tensor.copy_(state[name])
