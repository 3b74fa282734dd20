r"""Solves and densities where some variances are zero under a root that is not.

:math:`\Sigma = \mathrm{diag}(d) + U U^\top` has an inverse all the same if the rows of U at these coordinates Z are
linearly independent. With :math:`U_Z^\top = Q T`, T upper triangular, a value :math:`x_Z` tells
:math:`a = T^{-\top} x_Z` exactly, and what is left is low-rank plus diagonal with positive variances:

.. math::
    x^\top \Sigma^{-1} x = \|a\|^2 + r^\top \Sigma_r^{-1} r, \quad r = x_F - U_F Q a, \quad
    \Sigma_r = D_F + U_F (I - Q Q^\top) U_F^\top, \quad \log|\Sigma| = 2 \log|\det T| + \log|\Sigma_r|.
"""

import math

import torch
from torch import Tensor

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg.capacitance import ZeroVarianceError
from lowrank_bdl.linalg.operator_structure import LowRankPlusDiagStructure

INDEPENDENT = 1e-12
"""Smallest singular value of the rows of the root at Z, scaled to length 1, with which they count as independent."""
_LOG_HUGE = 400 * math.log(2)
"""Logarithm of the variance that stands for a coordinate that is left out: its weight in every sum is nothing."""


class ConditionedOnZeroVariances:
    """A matrix split into the coordinates Z and what is left when their values are known; all in float64.

    Args:
        sigma: The matrix, ``(D, D)``.
        error: What a factorisation of it raised; raised again for what cannot be split.

    Raises:
        NotPSDError: If the rows of the root at Z are linearly dependent, so that Sigma is singular, or if there are
            batch axes.
        NotImplementedError: If a gradient to the diagonal is asked for, which this way does not have.

    Cost: a read of the root and of its rows at Z; no memory but of D numbers and K x K.
    """

    def __init__(self, sigma: LowRankPlusDiagStructure, error: ZeroVarianceError) -> None:
        if sigma.batch_shape:
            raise error
        if torch.is_grad_enabled() and sigma.diag.requires_grad:
            raise NotImplementedError(
                "zero variances under a root that is not zero have no gradient to the diagonal here; detach it, or "
                "raise them with add_jitter()."
            ) from error
        self.factors, mix = sigma.factors, sigma._mix_matrix()
        self.places = torch.cat([part.start + self._zeros(part) for part in self.factors.chunks()])
        few = self.places[: mix.shape[-1] + 1]  # more are dependent in any case
        rows = self.factors.rows_at(few, torch.float64).mT @ mix  # (|Z|, R)
        unit = rows.detach() / torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True)
        if len(rows) > mix.shape[-1] or bool(torch.linalg.svdvals(unit)[-1] < INDEPENDENT):
            raise NotPSDError(
                f"the matrix is singular: the rows of its root at {len(self.places)} coordinates of {sigma.shape[-1]} "
                "with zero diagonal under a non-zero root are linearly dependent. Raise them with add_jitter()."
            ) from error
        basis, self.triangle = torch.linalg.qr(rows.mT)
        self.known = mix @ basis
        diag = sigma.diag.double().index_fill(0, self.places, math.exp(_LOG_HUGE))
        self.rest = type(sigma)(sigma.root, diag, mix - self.known @ basis.mT, sigma.root_scale)

    def _zeros(self, part: slice) -> Tensor:
        moved = (self.factors.mixed_rows(part, torch.float64) != 0).any(-2)
        return ((self.factors.diag[part] == 0) & moved).nonzero().squeeze(-1)

    def _conditioned(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return a, ``(|Z|, S)``, and r, ``(D, S)``, zero at Z."""
        wide = columns.double()
        known = torch.linalg.solve_triangular(self.triangle.mT, wide[self.places], upper=False)
        inner = self.known @ known
        moved = [self.factors.rows(part, torch.float64).mT @ inner for part in self.factors.chunks()]
        return known, (wide - torch.cat(moved)).index_fill(0, self.places, 0.0)

    def solve(self, columns: Tensor) -> Tensor:
        """Return ``Sigma^-1 X``, shape ``(D, S)``, in the dtype of ``columns`` X."""
        known, rest = self._conditioned(columns)
        solution = self.rest.solve(rest).index_fill(0, self.places, 0.0)
        projected = self.factors.zeros(self.known.shape[0], columns.shape[-1])
        for part in self.factors.chunks():
            projected = projected + self.factors.rows(part, torch.float64) @ solution[part]
        own = torch.linalg.solve_triangular(self.triangle, known - self.known.mT @ projected, upper=True)
        return solution.index_copy(0, self.places, own).to(columns.dtype)

    def inv_quad_logdet(self, columns: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the quadratic forms ``(S,)`` of ``columns`` minus ``mean``, and the log-determinant."""
        known, rest = self._conditioned(columns if mean is None else columns.double() - mean.double().unsqueeze(-1))
        quadratic, logdet = self.rest.inv_quad_logdet(rest, logdet=True, reduce_inv_quad=False)
        triangle = self.triangle.diagonal().abs().log().sum()
        return quadratic + known.square().sum(0), logdet + 2 * triangle - len(self.places) * _LOG_HUGE
