"""Straight lines in weight space, to walk along."""

import torch
from torch import Tensor

from lowrank_bdl.linalg.devices import norm_in_float64
from lowrank_bdl.linalg.precision import exact, exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.surfaces.affine import AffineSurface, orthonormal
from lowrank_bdl.surfaces.surface import require_points


@exact_methods
class Ray(AffineSurface):
    r"""The weights :math:`\theta(t) = \hat\theta + t d`, for t of either sign.

    Use :func:`ray` for a direction of length 1, :meth:`between` for the line from one network to another; made by
    itself, a ray takes the direction as it is: with one of SWAG's principal directions times its standard deviation, t
    counts standard deviations.

    Args:
        layout: Names and shapes of the coordinates; None for plain vectors.
        origin: :math:`\hat\theta`, shape ``(D,)`` [parameter].
        direction: d, shape ``(D,)``, not zero.
        length: The t that the ray is about: where :meth:`between` reaches its end.

    Attributes:
        layout: As given.
        origin: As given, at least float32.
        directions: d as a row, shape ``(1, D)``.
        length: As given.

    Raises:
        ShapeError: If origin, direction and layout do not fit together, or the direction is zero.
        NonFiniteError: If an entry is not finite.

    Example:
        >>> line = Ray.between(torch.tensor([1.0, 1.0]), torch.tensor([4.0, 5.0]))
        >>> line.length, line.to_theta(torch.tensor([0.0, 5.0])).tolist()
        (5.0, [[1.0, 1.0], [4.0, 5.0]])
        >>> line.project(torch.tensor([0.0, 8.0])).item(), line.distance(torch.tensor([0.0, 8.0])).item()
        (5.0, 5.0)
    """

    def __init__(
        self, layout: "ParameterLayout | None", origin: Tensor, direction: Tensor, length: float = 1.0
    ) -> None:
        super().__init__(layout, origin, (direction,))
        self.length = length

    @classmethod
    def between(cls, start: Tensor, end: Tensor, layout: "ParameterLayout | None" = None) -> "Ray":
        """Return the line from one point to another; t is the distance from the first.

        Args:
            start: θ(0), shape ``(D,)`` [parameter].
            end: θ(length), shape ``(D,)`` [parameter].
            layout: Names and shapes of the coordinates.

        Raises:
            ShapeError: If the points are equal, or do not fit together or to the layout.
            NonFiniteError: If an entry is not finite.
        """
        first, last = (point.detach() for point in require_points([start, end], layout))
        step = last - first
        length = norm_in_float64(step).item()
        return cls(layout, first, ray(first, step, layout).directions[0], length)

    def to_theta(self, t: Tensor) -> Tensor:
        r"""Return :math:`\hat\theta + t d`, differentiably; the origin itself, to the last bit, at 0.

        Args:
            t: Shape ``(*S,)``.

        Returns:
            Weights, shape ``(*S, D)`` [parameter].

        Cost: O(S D).
        """
        return self._lift(t.unsqueeze(-1))

    def project(self, theta: Tensor) -> Tensor:
        """Return the t of the nearest point of the ray.

        Args:
            theta: Weights, shape ``(*S, D)`` [parameter].

        Returns:
            Shape ``(*S,)``; sums over D in float64.

        Raises:
            ShapeError: If the last axis is not D.
        """
        return self._nearest(theta).squeeze(-1)

    def __repr__(self) -> str:
        return f"Ray(numel={len(self.origin)}, length={self.length:.4g}, dtype={self.origin.dtype})"


@exact
def ray(origin: Tensor, direction: Tensor, layout: "ParameterLayout | None" = None) -> Ray:
    r"""Return the ray from a point in a direction, scaled to length 1: t is the distance from the origin.

    Args:
        origin: :math:`\hat\theta`, shape ``(D,)`` [parameter].
        direction: Shape ``(D,)``, of any length but zero.
        layout: Names and shapes of the coordinates; None for plain vectors.

    Raises:
        ShapeError: If origin, direction and layout do not fit together, or the direction is zero.
        NonFiniteError: If an entry is not finite.

    Example:
        >>> ray(torch.ones(2), torch.tensor([3.0, 4.0])).to_theta(torch.tensor([-5.0, 0.0, 5.0]))
        tensor([[-2., -3.],
                [ 1.,  1.],
                [ 4.,  5.]])
    """
    first, one = require_points([origin, direction], layout)
    dtype = torch.promote_types(first.dtype, torch.float32)
    return Ray(layout, first, orthonormal(one.detach().to(dtype)[None])[0])
