"""Curves in weight space between two networks: Bézier curves and polygonal chains with trained bends."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.devices import generator_on, sums_device
from lowrank_bdl.linalg.moments import column_chunks
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.storage import required
from lowrank_bdl.surfaces.surface import Surface, require_points


@exact_methods
class Curve(Surface):
    r"""A curve :math:`\theta(t) = \sum_j c_j(t) \, w_j`, t in [0, 1], from the first of n points to the last.

    Points that are not fixed are parameters. As a posterior it is θ(t) with t uniform in [0, 1], which is also what its
    training draws.

    Args:
        points: The n >= 2 points, shape ``(n, D)`` or n vectors ``(D,)``, copied [parameter].
        layout: Names and shapes of the coordinates; None for plain vectors.
        fix_start: Keep the first point as it is.
        fix_end: Keep the last point as it is.
        provenance: Where it came from, as JSON values by name.

    Raises:
        ShapeError: If there are fewer than 2 points, or they do not fit together or to the layout.
        NonFiniteError: If an entry is not finite.
    """

    def __init__(
        self,
        points: "Tensor | Sequence[Tensor]",
        layout: ParameterLayout | None = None,
        *,
        fix_start: bool = True,
        fix_end: bool = True,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        checked = require_points(points, layout)
        if len(checked) < 2:
            raise ShapeError(f"a curve needs at least 2 points; got {len(checked)}.")
        super().__init__(layout, provenance)
        self.num_points = len(checked)
        self.fix_start, self.fix_end = fix_start, fix_end
        for number, point in enumerate(checked):
            fixed = fix_start if number == 0 else fix_end if number == self.num_points - 1 else False
            self.register_point(f"point_{number}", point, trained=not fixed)

    @classmethod
    def between(
        cls,
        start: Tensor,
        end: Tensor,
        num_bends: int = 3,
        layout: ParameterLayout | None = None,
        *,
        fix_start: bool = True,
        fix_end: bool = True,
    ) -> Self:
        """Return the straight line between two points as a curve whose bends can be trained.

        Args:
            start: θ(0), shape ``(D,)`` [parameter].
            end: θ(1), shape ``(D,)`` [parameter].
            num_bends: Number n >= 2 of points, both ends among them (as the authors' code counts them).
            layout: Names and shapes of the coordinates.
            fix_start: Keep ``start`` as it is.
            fix_end: Keep ``end`` as it is.

        Raises:
            ShapeError: If ``num_bends`` < 2, or the points do not fit together or to the layout.
            NonFiniteError: If an entry is not finite.
        """
        if num_bends < 2:
            raise ShapeError(f"num_bends counts both ends and must be at least 2; got {num_bends}.")
        require_points([start, end], layout)
        inner = [torch.lerp(start, end, j / (num_bends - 1)) for j in range(1, num_bends - 1)]
        return cls([start, *inner, end], layout, fix_start=fix_start, fix_end=fix_end)

    # ---- points -------------------------------------------------------------------------------------------------

    @property
    def points(self) -> Tensor:
        """The n points stacked, shape ``(n, D)``, differentiably [parameter]. Cost: a copy.

        ``lb.curve_subspace(curve.points, curve.layout, control_points=True)`` is the subspace that a Bézier curve lies
        in; leave ``control_points`` out for a chain.
        """
        return torch.stack(self._vectors())

    def _vectors(self) -> list[Tensor]:
        return [getattr(self, f"point_{number}") for number in range(self.num_points)]

    @abstractmethod
    def coefficients(self, t: "Tensor | float") -> Tensor:
        """Return the weights of the points in θ(t).

        Args:
            t: In [0, 1], shape ``(*S,)``.

        Returns:
            Shape ``(*S, n)``, float64, rows sum to 1; differentiable. At t = 0 and t = 1 exactly one of them is 1.

        Raises:
            ValueError: If a t is not in [0, 1].
        """

    @abstractmethod
    def step_coefficients(self, t: "Tensor | float") -> Tensor:
        r"""Return the weights of the steps :math:`w_{j+1} - w_j` in the tangent θ'(t).

        Args:
            t: In [0, 1], shape ``(*S,)``.

        Returns:
            Shape ``(*S, n - 1)``, float64.

        Raises:
            ValueError: If a t is not in [0, 1].
        """

    def to_theta(self, t: "Tensor | float") -> Tensor:
        """Return the points of the curve at t, differentiably in t and in the curve's points.

        The ends are the first and the last point to the last bit, whatever the precision of matrix products.

        Args:
            t: In [0, 1], shape ``(*S,)``.

        Returns:
            Shape ``(*S, D)``, dtype and device of the points [parameter].

        Raises:
            ValueError: If a t is not in [0, 1].

        Cost: O(S n D) time, no memory beyond the result.
        """
        return _combine(self.coefficients(t), self._vectors())

    def forward(self, t: "Tensor | float") -> Tensor:
        """Return :meth:`to_theta` of t."""
        return self.to_theta(t)

    def tangent(self, t: "Tensor | float") -> Tensor:
        """Return the derivative dθ/dt; at a kink of a polygonal chain that of the piece on the right.

        Args:
            t: In [0, 1], shape ``(*S,)``.

        Returns:
            Shape ``(*S, D)`` [parameter].

        Raises:
            ValueError: If a t is not in [0, 1].

        Cost: O(S n D) time, n - 1 vectors of memory besides the result.
        """
        points = self._vectors()
        steps = [right - left for left, right in zip(points, points[1:], strict=False)]
        return _combine(self.step_coefficients(t), steps)

    # ---- draws --------------------------------------------------------------------------------------------------

    def draw_theta(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw θ(t) with t uniform in [0, 1), differentiably in the points that are trained.

        Args:
            generator: Source of the randomness, on any device; None means torch's default generator of the CPU.

        Returns:
            Shape ``(D,)``, on the device of the points [parameter].
        """
        device = torch.device("cpu") if generator is None else sums_device(generator.device)
        generator = generator_on(device, generator)
        return self.to_theta(torch.rand((), generator=generator, dtype=torch.float64, device=device))

    def center_theta(self) -> Tensor:
        """Return θ(1/2), shape ``(D,)`` [parameter]."""
        return self.to_theta(0.5)

    # ---- lengths ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def speed(self, t: "Tensor | float") -> Tensor:
        r"""Return :math:`\lVert \theta'(t) \rVert`, from inner products of the steps between the points.

        Args:
            t: In [0, 1], shape ``(*S,)``.

        Returns:
            Shape ``(*S,)``, float64 [parameter].

        Raises:
            ValueError: If a t is not in [0, 1].

        Cost: one read of the points, however many t there are: O(n² D + S n²).
        """
        return self._norms(self.step_coefficients(t))

    def length(self, num: int = 64) -> float:
        r"""Return the length :math:`\int_0^1 \lVert \theta'(t) \rVert \, dt`.

        Args:
            num: Nodes of the Gauss-Legendre rule on every smooth piece. One is exact for a polygonal chain.

        Returns:
            The length [parameter].

        Raises:
            ValueError: If ``num`` < 1.

        Cost: one read of the points, O(n² D).
        """
        if num < 1:
            raise ValueError(f"num must be at least 1; got {num}.")
        nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(num))
        starts = torch.arange(self.num_pieces, dtype=torch.float64)
        t = (starts.unsqueeze(-1) + (nodes + 1) / 2) / self.num_pieces
        return float((self.speed(t).to(weights) * weights).sum() / (2 * self.num_pieces))

    @property
    @abstractmethod
    def num_pieces(self) -> int:
        """Into how many equal parts of [0, 1] kinks divide the curve."""

    @torch.no_grad()
    def arc_length_mean(self, t: Tensor, values: Tensor) -> Tensor:
        r"""Return :math:`\int v \, dl \,/ \int dl`: the mean over the curve's length, not over t.

        By the trapezoidal rule over the chords between neighbouring points of a grid, as published.

        Args:
            t: The grid, increasing in [0, 1], shape ``(T,)``, T >= 2.
            values: v at its points, shape ``(*S, T)``.

        Returns:
            Shape ``(*S,)``, float64, in the unit of the values.

        Raises:
            ShapeError: If t is not ``(T,)`` with T >= 2, or ``values`` has another T.
            ValueError: If t does not increase or is not in [0, 1], or all points of the curve are equal.

        Cost: one read of the points, O(n² D).

        Source: Garipov et al. (2018), section 3.1, eq. 1.
        """
        if t.ndim != 1 or len(t) < 2 or values.ndim == 0 or values.shape[-1] != len(t):
            raise ShapeError(f"t must be (T,) with T >= 2 and values (*S, T); got {_shapes(t, values)}.")
        t = t.double()
        if not bool((t.diff() > 0).all()):
            raise ValueError("t must increase; got a grid that does not.")
        tails = self.coefficients(t).flip(-1).cumsum(-1).flip(-1)[:, 1:]  # weights of the steps in theta(t) - w_0
        chords = self._norms(tails.diff(dim=0)).to(values.device)
        total = chords.sum()
        if not bool(total > 0):
            raise ValueError("the curve has length 0: all its points are equal.")
        v = values.double()
        return ((v[..., 1:] + v[..., :-1]) * chords).sum(-1) / (2 * total)

    def _norms(self, weights: Tensor) -> Tensor:
        """Return the lengths ``(*S,)`` of combinations of the steps, given their weights ``(*S, n - 1)``."""
        points = [point.detach() for point in self._vectors()]
        count = self.num_points - 1
        gram = torch.zeros((count, count), dtype=torch.float64, device=points[0].device)
        for part in column_chunks(len(points[0]), points[0].device):
            steps = torch.stack([point[part].double() for point in points]).diff(dim=0)
            gram += steps @ steps.mT
        weights = weights.to(gram)
        return torch.einsum("...i,ij,...j->...", weights, gram, weights).clamp(min=0).sqrt()

    # ---- files --------------------------------------------------------------------------------------------------

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the points, and which ends are fixed."""
        tensors = {f"point_{number}": point.detach() for number, point in enumerate(self._vectors())}
        return tensors, {"num_points": self.num_points, "fix_start": self.fix_start, "fix_end": self.fix_end}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the curve of :meth:`to_state`."""
        fields = {"num_points": int, "fix_start": bool, "fix_end": bool}
        for name, kind in fields.items():
            if type(metadata.get(name)) is not kind:
                raise ShapeError(f"{name} must be of type {kind.__name__}; got {metadata.get(name)!r}.")
        points = required(tensors, *(f"point_{number}" for number in range(metadata["num_points"])))
        ends = {name: metadata[name] for name in ("fix_start", "fix_end")}
        return cls(points, layout, **ends, provenance=provenance)

    def extra_repr(self) -> str:
        """Say how many points there are, of how many coordinates, and which ends are fixed."""
        ends = f"fix_start={self.fix_start}, fix_end={self.fix_end}"
        return f"num_points={self.num_points}, numel={self._vectors()[0].numel()}, {ends}"


@exact_methods
class BezierCurve(Curve, kind="Bezier curve"):
    r"""The curve :math:`\theta(t) = \sum_j \binom{n-1}{j} t^j (1 - t)^{n-1-j} w_j`.

    It passes through its first and last point alone. With n = 3 it is the published curve with one bend,
    :math:`(1-t)^2 w_0 + 2 t (1-t) w_1 + t^2 w_2`. See :class:`Curve` for arguments, attributes and errors; train it in
    a :class:`~lowrank_bdl.surfaces.surface_model.SurfaceModel`.

    Source: Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (2018), section 3.3.

    Example:
        >>> curve = BezierCurve(torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 0.0]]))
        >>> curve.to_theta(torch.tensor([0.0, 0.5, 1.0]))[:, 1].tolist()
        [0.0, 1.0, 0.0]
        >>> curve.tangent(0.5).tolist(), round(curve.length(), 4)
        ([2.0, 0.0], 2.9579)
        >>> [name for name, _ in curve.named_parameters()]
        ['point_1']
    """

    def coefficients(self, t: "Tensor | float") -> Tensor:
        """Return Bernstein's polynomials of degree n - 1; see :meth:`Curve.coefficients`."""
        return _bernstein(_in_unit_interval(t), self.num_points - 1)

    def step_coefficients(self, t: "Tensor | float") -> Tensor:
        """Return n - 1 times Bernstein's polynomials of degree n - 2; see :meth:`Curve.step_coefficients`."""
        return (self.num_points - 1) * _bernstein(_in_unit_interval(t), self.num_points - 2)

    @property
    def num_pieces(self) -> int:
        """1: there are no kinks."""
        return 1


@exact_methods
class PolygonalChain(Curve, kind="polygonal chain"):
    r"""Straight lines from point to point, each in an equal part of [0, 1]: :math:`\theta(j / (n - 1)) = w_j`.

    See :class:`Curve` for arguments, attributes and errors; train it in a
    :class:`~lowrank_bdl.surfaces.surface_model.SurfaceModel`.

    Source: Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (2018), section 3.3.

    Example:
        >>> chain = PolygonalChain(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]]))
        >>> chain.to_theta(torch.tensor([0.25, 0.5, 1.0])).tolist()
        [[1.5, 2.0], [3.0, 4.0], [3.0, 0.0]]
        >>> chain.length()
        9.0
        >>> chain.arc_length_mean(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 2.0, 2.0])).item()  # (5 + 8) / 9
        1.4444444444444444
    """

    def coefficients(self, t: "Tensor | float") -> Tensor:
        """Return max(0, 1 - abs(t (n - 1) - j)); see :meth:`Curve.coefficients`."""
        checked = _in_unit_interval(t)
        number = torch.arange(self.num_points, dtype=torch.float64, device=checked.device)
        return (1 - (checked.unsqueeze(-1) * (self.num_points - 1) - number).abs()).clamp(min=0)

    def step_coefficients(self, t: "Tensor | float") -> Tensor:
        """Return n - 1 for the piece that t lies in, 0 for others; see :meth:`Curve.step_coefficients`."""
        pieces = self.num_points - 1
        piece = (_in_unit_interval(t) * pieces).floor().clamp(max=pieces - 1).long()
        return pieces * torch.nn.functional.one_hot(piece, pieces).double()

    @property
    def num_pieces(self) -> int:
        """One for each line: n - 1."""
        return self.num_points - 1


def _in_unit_interval(t: "Tensor | float") -> Tensor:
    found = t.double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    inside = (found >= 0) & (found <= 1)
    if not bool(inside.all()):
        raise ValueError(f"t must be in [0, 1]; got {found[~inside][0].item()}.")
    return found


def _bernstein(t: Tensor, degree: int) -> Tensor:
    terms = [math.comb(degree, j) * t**j * (1 - t) ** (degree - j) for j in range(degree + 1)]
    return torch.stack(terms, -1)


def _combine(weights: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Return sum_j weights_j vectors_j, (*S, D), by element: no setting makes that less precise than the dtype."""
    first, *rest = weights.to(vectors[0]).unbind(-1)
    total = first.unsqueeze(-1) * vectors[0]
    for weight, vector in zip(rest, vectors[1:], strict=True):
        total = torch.addcmul(total, weight.unsqueeze(-1), vector)
    return total


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
