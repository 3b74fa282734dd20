"""Planes in weight space, to look at the loss on."""

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import sums_device, to_float64
from lowrank_bdl.linalg.precision import exact, exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.surfaces.affine import AffineSurface, orthonormal
from lowrank_bdl.surfaces.surface import require_points


@exact_methods
class Plane(AffineSurface):
    r"""The weights :math:`\theta(x, y) = \hat\theta + x u + y v`.

    Use :func:`plane` for orthonormal u and v from any two directions, :meth:`through` for a plane through three
    networks; made by itself, a plane takes the directions as they are (coordinates then are multiples of them).

    Args:
        layout: Names and shapes of the coordinates; None for plain vectors.
        origin: :math:`\hat\theta`, shape ``(D,)`` [parameter].
        u: First direction, shape ``(D,)``.
        v: Second direction, shape ``(D,)``.
        anchors: Coordinates that the plane is about, shape ``(n, 2)``: what a grid frames; the origin if None.

    Attributes:
        layout: As given.
        origin: As given, at least float32.
        directions: u and v as rows, shape ``(2, D)``.
        anchors: As given, float64.

    Raises:
        ShapeError: If origin, directions and layout do not fit together, or the directions are parallel.
        NonFiniteError: If an entry is not finite.

    Example:
        >>> corners = torch.tensor([[0.0, 0.0, 1.0], [3.0, 4.0, 1.0], [5.0, 0.0, 1.0]])
        >>> seen = Plane.through(*corners)
        >>> seen.project(corners)
        tensor([[0., 0.],
                [3., 4.],
                [5., 0.]])
        >>> seen.to_theta(torch.tensor([1.0, 2.0])), seen.distance(torch.tensor([1.0, 2.0, 4.0])).item()
        (tensor([1., 2., 1.]), 3.0)
        >>> grid = seen.grid(5)
        >>> grid.shape, grid[0, 0].tolist(), grid[-1, -1].tolist()
        (torch.Size([5, 5, 2]), [-1.0, -0.8], [6.0, 4.8])
    """

    def __init__(
        self,
        layout: "ParameterLayout | None",
        origin: Tensor,
        u: Tensor,
        v: Tensor,
        anchors: "Tensor | None" = None,
    ) -> None:
        super().__init__(layout, origin, (u, v))
        anchors = torch.zeros(1, 2) if anchors is None else anchors
        self.anchors = _coordinates("anchors", anchors).to(sums_device(self.origin.device))

    @classmethod
    def through(cls, w0: Tensor, w1: Tensor, w2: Tensor, layout: "ParameterLayout | None" = None) -> "Plane":
        r"""Return the plane through three points, with :math:`u \parallel w_2 - w_0` and v towards :math:`w_1`.

        Args:
            w0: The origin, shape ``(D,)``: one end of a curve [parameter].
            w1: Above the x axis, shape ``(D,)``: the bend of the curve.
            w2: On the x axis, shape ``(D,)``: the other end.
            layout: Names and shapes of the coordinates.

        Returns:
            The plane with orthonormal u and v, in whose grid the three points are framed; coordinates are distances.

        Raises:
            ShapeError: If the points do not fit together or to the layout, or lie on one line.
            NonFiniteError: If an entry is not finite.

        Cost: a few reads of the points.

        Source: Garipov et al. (2018), appendix A.2.
        """
        first, bend, last = (point.detach() for point in require_points([w0, w1, w2], layout))
        found = plane(first, last - first, bend - first, layout)
        u, v = found.directions
        return cls(layout, first, u, v, found.project(torch.stack([first, bend, last])))

    def to_theta(self, xy: Tensor) -> Tensor:
        r"""Return :math:`\hat\theta + x u + y v`, differentiably; the origin itself, to the last bit, at (0, 0).

        Args:
            xy: Coordinates, shape ``(*S, 2)``.

        Returns:
            Weights, shape ``(*S, D)`` [parameter].

        Raises:
            ShapeError: If the last axis is not 2.

        Cost: O(S D).
        """
        if xy.ndim == 0 or xy.shape[-1] != 2:
            raise ShapeError(f"xy must have shape (*S, 2); got {tuple(xy.shape)}.")
        return self._lift(xy)

    def project(self, theta: Tensor) -> Tensor:
        """Return the coordinates of the nearest point of the plane.

        Args:
            theta: Weights, shape ``(*S, D)`` [parameter].

        Returns:
            Shape ``(*S, 2)``; sums over D in float64.

        Raises:
            ShapeError: If the last axis is not D.

        Cost: one read of the directions.
        """
        return self._nearest(theta)

    def grid(
        self,
        num: "int | tuple[int, int]" = 41,
        *,
        margin: "float | tuple[float, float, float, float]" = 0.2,
        around: "Tensor | None" = None,
        radius: "float | None" = None,
    ) -> Tensor:
        """Return a regular grid of coordinates.

        Args:
            num: Points along x and y, at least 2 each; one number for both.
            margin: Space around what is framed, as a share of its width (left, right) and height (bottom, top); one
                number for all four.
            around: Coordinates to frame, shape ``(n, 2)``; None takes :attr:`anchors`.
            radius: In place of a frame: reach from -radius to radius on both axes.

        Returns:
            Shape ``(ny, nx, 2)``, float64: ``grid[i, j] = (x_j, y_i)``. ``evaluate_points`` takes
            ``grid.flatten(0, 1)``; ``.reshape(ny, nx)`` makes a picture of what it returns.

        Raises:
            ValueError: If ``num`` is less than 2, or ``radius`` is not positive or comes with ``around``.
            ShapeError: If what is framed has no width or height.
        """
        columns, rows = (num, num) if isinstance(num, int) else num
        if min(columns, rows) < 2:
            raise ValueError(f"a grid needs at least 2 points along each axis; got {num}.")
        if radius is not None:
            if around is not None or not 0 < radius < float("inf"):
                raise ValueError(f"radius must be a positive number, without around; got {radius}.")
            low, high = self.anchors.new_full((2,), -radius), self.anchors.new_full((2,), radius)
        else:
            framed = self.anchors if around is None else _coordinates("around", around).to(self.anchors)
            low, high = framed.amin(0), framed.amax(0)
            if not bool((high > low).all()):
                raise ShapeError(
                    f"a grid must frame some width and height; {len(framed)} point(s) reach from {low.tolist()} to "
                    f"{high.tolist()}. Pass around or radius."
                )
            left, right, bottom, top = (margin,) * 4 if isinstance(margin, (int, float)) else margin
            size = high - low
            low, high = low - size * size.new_tensor([left, bottom]), high + size * size.new_tensor([right, top])
        axes = [
            torch.linspace(
                low[axis].item(), high[axis].item(), count, dtype=torch.float64, device=sums_device(low.device)
            )
            for axis, count in ((0, columns), (1, rows))
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1)

    def __repr__(self) -> str:
        return f"Plane(numel={len(self.origin)}, dtype={self.origin.dtype})"


@exact
def plane(origin: Tensor, u: Tensor, v: Tensor, layout: "ParameterLayout | None" = None) -> Plane:
    r"""Return the plane that two directions span at a point, with orthonormal directions: coordinates are distances.

    Args:
        origin: :math:`\hat\theta`, shape ``(D,)`` [parameter].
        u: Direction of the x axis, shape ``(D,)``, of any length: a principal direction of SWAG, an eigenvector of the
            Hessian, a random vector.
        v: A direction whose part orthogonal to u is that of the y axis, shape ``(D,)``.
        layout: Names and shapes of the coordinates; None for plain vectors.

    Raises:
        ShapeError: If origin, directions and layout do not fit together, or the directions are zero or parallel.
        NonFiniteError: If an entry is not finite.

    Cost: a few reads of the directions.

    Example:
        >>> plane(torch.zeros(3), torch.tensor([2.0, 0.0, 0.0]), torch.tensor([5.0, 3.0, 0.0])).directions
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    first, *directions = require_points([origin, u, v], layout)
    dtype = torch.promote_types(first.dtype, torch.float32)
    return Plane(layout, first, *orthonormal(torch.stack(directions).detach().to(dtype)))


def _coordinates(name: str, points: Tensor) -> Tensor:
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not bool(points.isfinite().all()):
        raise ShapeError(f"{name} must be finite coordinates (n, 2) with n >= 1; got {tuple(points.shape)}.")
    return to_float64(points.detach())
