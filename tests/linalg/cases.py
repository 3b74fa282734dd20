"""Problems that the tests of the structured matrices share."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.linalg.block_scaling import decode_rows, encode_rows
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from tests.oracles import dense


@dataclass(frozen=True)
class Case:
    """A kind of matrix: ``mix`` is "none", "scalar", "matrix" or "batch", ``storage`` the dtype of the root."""

    batch: tuple[int, ...] = ()
    dim: int = 7
    rank: int = 3
    mix: str = "none"
    dtype: torch.dtype = torch.float64
    storage: torch.dtype | None = None

    def __str__(self) -> str:
        names = [f"{self.batch}-D{self.dim}-K{self.rank}-{self.mix}", str(self.dtype)[6:]]
        return "-".join(names + ([str(self.storage)[6:]] if self.storage else []))

    def make(self, seed: int = 0, spread: float = 1.0) -> tuple[LowRankPlusDiagLinearOperator, Tensor]:
        """Return the operator and the dense float64 oracle of exactly its (rounded) tensors."""
        g = torch.Generator().manual_seed(seed)
        diag = ((torch.rand(*self.batch, self.dim, generator=g).double() - 0.5) * 2 * spread).exp().to(self.dtype)
        rows = torch.randn(*self.batch, self.rank, self.dim, generator=g)
        stored, scale, exact = rows.to(self.storage or self.dtype), None, rows.to(self.storage or self.dtype).double()
        if self.storage in (torch.float16, torch.int8):
            stored, scale = encode_rows(rows, self.storage)
            exact = decode_rows(stored, scale, torch.float64)
        mix: Tensor | None = None
        if self.mix == "scalar":
            mix = torch.tensor(0.7, dtype=torch.float64)
        elif self.mix != "none":
            batch = self.batch if self.mix == "batch" else ()
            mix = torch.randn(*batch, self.rank, max(self.rank - 1, 1), generator=g).double()
        operator = LowRankPlusDiagLinearOperator(stored.mT, diag, mix, root_scale=scale)
        return operator, dense(exact.mT, diag, 1.0 if mix is None else mix)

    def columns(self, *shape: int, seed: int = 1) -> Tensor:
        """Return standard normals of the dtype of the operator."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(self.dtype)


F32, F64 = torch.float32, torch.float64
SHAPES = [((), 7, 3), ((2,), 7, 3), ((2, 3), 7, 3), ((), 1, 1), ((2,), 1, 2), ((), 5, 0), ((2,), 5, 0), ((), 4, 6)]
CASES = [
    Case(batch, dim, rank, mix, dtype)
    for (batch, dim, rank), mix, dtype in itertools.product(SHAPES, ("none", "scalar", "matrix", "batch"), (F64, F32))
    if not (rank == 0 and mix in ("matrix", "batch")) and not (mix == "batch" and not batch)
] + [
    Case((), 9, 3, "matrix", F64, F32),
    Case((2,), 9, 3, "scalar", F64, torch.bfloat16),
    Case((), 9, 3, "none", F32, torch.bfloat16),
    Case((), 9000, 2, "none", F32, torch.float16),
    Case((2,), 9, 3, "matrix", F32, torch.float16),
    Case((2,), 9, 3, "batch", F64, torch.int8),
]
SMALL = [case for case in CASES if case.dim < 100]
FEW = [
    Case(),
    Case((2,), mix="matrix", dtype=F32),
    Case((2, 3), mix="batch"),
    Case((), 1, 1, "scalar"),
    Case((2,), 5, 0),
    Case((), 4, 6, "matrix"),
    Case((2,), 9, 3, "matrix", F32, torch.float16),
]
