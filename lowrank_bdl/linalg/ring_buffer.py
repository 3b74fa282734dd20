"""The last K of a stream of vectors, in memory that is allocated once."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.block_scaling import BLOCK, decode_rows, encode_rows, needs_scale, num_blocks
from lowrank_bdl.linalg.moments import first_unusable
from lowrank_bdl.linalg.precision import exact_methods


@exact_methods
class DeviationBuffer:
    r"""Keep the newest K rows :math:`d_1, d_2, \dots \in R^D` of a stream: a ring of rows.

    A push writes one row in place: there is no concatenation, roll or copy of the buffer, so the memory is K·D
    numbers from the first push to the last, and ``storage.mT`` is at all times a root ``(D, K)`` whose columns are the
    rows in *storage* order, which :meth:`age_order` relates to their age.

    Args:
        rank: K >= 0.
        numel: D.
        dtype: float32, float64 or bfloat16; or float16, float8_e4m3fn or int8, with a float32 scale per row and
            4096 columns so that deviations of 1e-9 do not underflow.
        device: Where the buffer lives; torch's default if None.

    Attributes:
        storage: Shape ``(K, D)``, rows in storage order; codes if :attr:`scale` is not None.
        scale: Shape ``(K, ceil(D/4096))``, float32; None where the dtype needs none.

    Raises:
        ValueError: If ``rank`` < 0 or ``dtype`` is no storage type.

    Cost: a push reads D and writes D numbers.

    Example:
        >>> buffer = DeviationBuffer(rank=2, numel=1)
        >>> for value in (1.0, 2.0, 3.0):
        ...     buffer.push(torch.tensor([value]))
        >>> buffer.storage.flatten().tolist(), buffer.age_order().tolist(), buffer.rows().flatten().tolist()
        ([3.0, 2.0], [1, 0], [2.0, 3.0])
    """

    def __init__(
        self,
        rank: int,
        numel: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if rank < 0:
            raise ValueError(f"rank must be >= 0; got {rank}.")
        scaled = needs_scale(dtype)
        self.storage = torch.zeros((rank, numel), dtype=dtype, device=device)
        self.scale = torch.ones((rank, num_blocks(numel)), dtype=torch.float32, device=device) if scaled else None
        self._num_pushed = torch.zeros((), dtype=torch.int64, device="cpu")  # nobody waits for a device to read it

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "DeviationBuffer":
        """Wrap the tensors of :meth:`state`, sharing their memory: later pushes write into them.

        Raises:
            ShapeError: If a tensor is missing or the scales do not fit the rows.
        """
        for name in ("storage", "num_pushed"):
            if name not in state:
                raise ShapeError(f"state must hold storage, num_pushed and, for narrow dtypes, scale; missing {name}.")
        self = cls.__new__(cls)
        self.storage, self.scale, self._num_pushed = state["storage"], state.get("scale"), state["num_pushed"]
        expected = (self.rank, num_blocks(self.numel)) if needs_scale(self.storage.dtype) else None
        found = None if self.scale is None else tuple(self.scale.shape)
        if found != expected:
            raise ShapeError(f"scale of {self.storage.dtype} rows must have shape {expected}; got {found}.")
        return self

    def state(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors that share memory; :meth:`from_state` restores it bit for bit."""
        state = {"storage": self.storage, "num_pushed": self._num_pushed}
        return state if self.scale is None else {**state, "scale": self.scale}

    @property
    def rank(self) -> int:
        """K, the number of rows there is room for."""
        return self.storage.shape[0]

    @property
    def numel(self) -> int:
        """D."""
        return self.storage.shape[1]

    @property
    def num_pushed(self) -> int:
        """Rows pushed so far, those overwritten included."""
        return int(self._num_pushed)

    def __len__(self) -> int:
        """Rows present, at most K."""
        return min(self.num_pushed, self.rank)

    def ages(self) -> list[int]:
        """Return the storage indices of the rows present from oldest to newest."""
        present, oldest = len(self), self._oldest
        return [(oldest + age) % self.rank for age in range(present)]

    def age_order(self) -> Tensor:
        """Return :meth:`ages` as a tensor on the buffer's device, int64, shape ``(len(self),)``."""
        return (torch.arange(len(self), device=self.storage.device) + self._oldest) % max(self.rank, 1)

    @property
    def _oldest(self) -> int:
        return self.num_pushed % self.rank if self.rank and self.num_pushed >= self.rank else 0

    @torch.no_grad()
    def push(self, row: Tensor, *, check_finite: bool = True) -> None:
        """Write a row over the oldest one; does nothing but count if K = 0.

        Any tensor that shares memory with :attr:`storage` sees the write, and its version counter moves.

        Args:
            row: Shape ``(D,)``, floating dtype, on the buffer's device.
            check_finite: Look for NaN and infinities first; float64 rows of a dtype with scales are always looked at,
                since float32 scales may not hold them.

        Raises:
            ShapeError: If the shape is not ``(D,)``.
            NonFiniteError: If an entry is not finite, in the dtype of the buffer; nothing is written then.
        """
        if row.shape != (self.numel,) or not row.is_floating_point():
            raise ShapeError(f"expected a floating row of shape ({self.numel},); got {tuple(row.shape)}, {row.dtype}.")
        if self.scale is None and check_finite:
            same = row.dtype == self.storage.dtype
            bad = first_unusable(row, math.inf if same else torch.finfo(self.storage.dtype).max)
            if bad is not None:
                raise NonFiniteError(f"expected a finite row; entry {bad} is {row[bad].item()}.")
        if self.rank == 0:
            self.storage.zero_()  # moves the version counter: what shares this buffer is as stale as with K > 0
        else:
            slot = self.num_pushed % self.rank
            if self.scale is None:
                self.storage[slot].copy_(row)
            else:
                check = check_finite or row.dtype is torch.float64
                out = self.storage[slot], self.scale[slot]
                encode_rows(row, self.storage.dtype, BLOCK, out=out, check_finite=check)
        self._num_pushed += 1

    def next_row(self) -> Tensor | None:
        """Return the row that the next push overwrites, to be written in place and then counted by :meth:`advance`.

        None if rows are encoded or there is no room for any: use :meth:`push`.
        """
        return None if self.rank == 0 or self.scale is not None else self.storage[self.num_pushed % self.rank]

    def advance(self) -> None:
        """Count the row that was written into :meth:`next_row`."""
        self._num_pushed += 1

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows present from oldest to newest, decoded: a copy, shape ``(len(self), D)``.

        Args:
            dtype: dtype of the result; if None, the storage's own, or float32 for codes.
        """
        order = self.age_order()
        if self.scale is not None:
            return decode_rows(self.storage[order], self.scale[order], dtype or torch.float32)
        return self.storage[order].to(dtype or self.storage.dtype)
