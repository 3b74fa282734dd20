"""Straight surfaces in weight space: an origin and one or two directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.dense_basis import DenseBasis
from lowrank_bdl.linalg.devices import norm_in_float64
from lowrank_bdl.linalg.precision import exact, exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.surfaces.surface import require_points

_PARALLEL = 1e-7  # sine of the angle below which directions count as parallel


@exact_methods
class AffineSurface:
    r"""The weights :math:`\theta = \hat\theta + \sum_i x_i d_i`, as :class:`lowrank_bdl.Subspace`, of few directions.

    Attributes:
        layout: Names and shapes of the coordinates; None for plain vectors.
        origin: :math:`\hat\theta`, shape ``(D,)`` [parameter].
        directions: The rows :math:`d_i`, shape ``(k, D)``.

    Raises:
        ShapeError: If origin, directions and layout do not fit together, or the directions are linearly dependent.
        NonFiniteError: If an entry is not finite.
    """

    def __init__(self, layout: "ParameterLayout | None", origin: Tensor, directions: Sequence[Tensor]) -> None:
        first, *others = require_points([origin, *directions], layout)
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.layout = layout
        self.origin = first.detach().to(dtype)
        self.directions = torch.stack([direction.detach().to(dtype) for direction in others])
        self._kernel = DenseBasis(self.basis)
        self.gram = self._kernel.gram()
        _independent(self.gram)

    @property
    def basis(self) -> Tensor:
        """The directions as columns, shape ``(D, k)``: with ``origin`` and ``layout`` what makes a ``Subspace``."""
        return self.directions.mT

    @property
    def rank(self) -> int:
        """The number k of directions."""
        return len(self.directions)

    @property
    def lengths(self) -> Tensor:
        """Length of each direction, shape ``(k,)``, float64 [parameter]."""
        return self.gram.diagonal().sqrt()

    def distance(self, theta: Tensor) -> Tensor:
        """Return how far weights are from the surface: what a picture of their projections does not show.

        Args:
            theta: Weights, shape ``(*S, D)`` [parameter].

        Returns:
            Shape ``(*S,)``, float64 [parameter].

        Raises:
            ShapeError: If the last axis is not D.
        """
        nearest = self._lift(self._nearest(theta))
        gap: Tensor = norm_in_float64(theta - nearest, dim=-1)
        return gap

    def _lift(self, coordinates: Tensor) -> Tensor:
        """Return the weights ``(*S, D)`` at ``(*S, k)``, differentiably; by element, so that 0 is the origin exactly.

        Matrix products would be less precise than the dtype where a setting allows it.
        """
        coordinates = coordinates.to(self.origin)
        theta = self.origin
        for number, direction in enumerate(self.directions):
            theta = torch.addcmul(theta, coordinates[..., number, None], direction)
        return theta

    def _nearest(self, theta: Tensor) -> Tensor:
        """Return the coordinates ``(*S, k)`` of the nearest points, sums over D in float64."""
        if theta.ndim == 0 or theta.shape[-1] != len(self.origin):
            raise ShapeError(f"theta must have shape (*S, {len(self.origin)}); got {tuple(theta.shape)}.")
        offsets = (theta.detach() - self.origin).reshape(-1, len(self.origin))
        products = self._kernel.inner_products(offsets)
        found: Tensor = torch.linalg.solve(self.gram, products).mT.to(self.origin.dtype)
        return found.reshape(*theta.shape[:-1], self.rank)


@exact
def orthonormal(rows: Tensor) -> Tensor:
    """Return what Gram and Schmidt make of directions: the first keeps its line, each next what is orthogonal to those.

    By the Cholesky factor of their inner products, in float64, twice, so that rounding of the first time is corrected.

    Args:
        rows: The directions, shape ``(k, D)``, float32 or float64.

    Returns:
        As many rows of length 1, in the same dtype.

    Raises:
        ShapeError: If the directions are linearly dependent.
    """
    for _ in range(2):
        kernel = DenseBasis(rows.mT)
        cholesky = _independent(kernel.gram())
        one = torch.eye(len(rows), dtype=cholesky.dtype, device=cholesky.device)
        rows = kernel.mixed(torch.linalg.solve_triangular(cholesky.mT, one, upper=True)).mT
    return rows


def _independent(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of inner products; raise if a direction is zero or depends on the others."""
    lengths = gram.diagonal().sqrt()
    cholesky: Tensor
    cholesky, failed = torch.linalg.cholesky_ex(gram)
    sines = cholesky.diagonal() / lengths
    if int(failed) or not bool((sines > _PARALLEL).all()):
        raise ShapeError(
            "directions must be linearly independent: none zero, none parallel; "
            f"got {len(gram)} of lengths {', '.join(f'{length:.3g}' for length in lengths.tolist())}."
        )
    return cholesky
