"""A dense basis with the methods of a structured one, so that a subspace need not ask which it has."""

from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.linalg.devices import sums_device
from lowrank_bdl.linalg.factors import LowRankFactors, gram, project
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.principal_components import rotate


@exact_methods
class DenseBasis:
    """The columns of a matrix.

    Args:
        matrix: P, shape ``(D, k)``, float32 or float64; fast as the transposed view of contiguous ``(k, D)`` storage.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @property
    def _factors(self) -> LowRankFactors:
        """The basis as kernels take it: of the diagonal, here a column, these use dtype, device and length alone."""
        column, one = self.matrix[:, 0], torch.ones((), dtype=torch.float64, device=sums_device(self.matrix.device))
        return LowRankFactors(self.matrix, column, one)

    def lift(self, coordinates: Tensor, origin: Tensor) -> Tensor:
        """Return ``origin + Z P'``, shape ``(S, D)``, for ``coordinates`` Z of shape ``(S, k)``; differentiable."""
        if len(coordinates) == 1:  # a matrix-vector product reads the basis at full speed
            return torch.addmv(origin, self.matrix, coordinates[0])[None]
        return torch.addmm(origin, coordinates, self.matrix.mT)

    def inner_products(self, rows: Tensor) -> Tensor:
        """Return ``P' X`` in float64, shape ``(k, S)``, for ``rows`` X' of shape ``(S, D)``."""
        return project(self._factors, rows.mT, torch.float64)

    def gram(self) -> Tensor:
        """Return ``P' P`` in float64, shape ``(k, k)``."""
        return gram(self._factors, torch.float64, weigh=False)

    def mixed(self, mix: Tensor) -> Tensor:
        """Return P M for M of shape ``(k, r)``, float64: a new matrix, summed in float64."""
        return rotate(self._factors, mix, torch.float64)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the matrix on another device or in another dtype, its storage in the same order."""
        return self.matrix.mT.to(*args, **kwargs).mT

    def to_state(self) -> dict[str, Tensor]:
        """Return the columns as rows."""
        return {"basis": self.matrix.mT}
