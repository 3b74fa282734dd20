"""How wide a minimum is: the loss along rays in principal and in random directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.dense_basis import DenseBasis
from lowrank_bdl.linalg.devices import generator_on, norm_in_float64, sums_device, to_float64
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.linalg.principal_components import low_rank_components
from lowrank_bdl.parameters.batches import Data
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.loss_terms import LossFn
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.surfaces.affine import orthonormal
from lowrank_bdl.surfaces.evaluation import EvaluationOptions, PointValues, evaluate_points
from lowrank_bdl.surfaces.surface import require_points

Values = PointValues | dict[str, PointValues]
Known = PointValues | Mapping[str, PointValues]


class Span(Protocol):
    """An origin and directions as columns: what ``lowrank_bdl.pca_subspace`` makes of SWAG, or a plane."""

    @property
    def layout(self) -> "ParameterLayout | None":
        """What the weights hold."""

    @property
    def origin(self) -> Tensor:
        """Shape ``(D,)``."""

    @property
    def basis(self) -> Tensor:
        """Shape ``(D, k)``."""


@dataclass(frozen=True)
class WidthProfile:
    r"""The loss along K rays from one point.

    Attributes:
        names: What the directions are, K of them.
        distances: Where on each ray, shape ``(T,)``, float64 [parameter].
        values: Loss and accuracy, of shape ``(K, T)`` each; by name where several data sets were given.
        stddevs: Standard deviation of the law that the directions were taken from along each of them, shape ``(K,)``,
            float64; None for random directions [parameter].

    Example:
        >>> distances = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
        >>> loss = torch.tensor([[4.0, 1.0, 0.0, 2.0, 8.0]])
        >>> profile = WidthProfile(("top",), distances, PointValues(loss, None, loss), None)
        >>> profile.half_widths(2.5).tolist()
        [[1.5, 1.0833333730697632]]
    """

    names: tuple[str, ...]
    distances: Tensor
    values: Values
    stddevs: "Tensor | None"

    def of(self, data: "str | None" = None) -> PointValues:
        """Return the values on one data set.

        Args:
            data: Its name; None where there is only one.

        Raises:
            ValueError: If there is no such data set.
        """
        if isinstance(self.values, PointValues):
            if data is None:
                return self.values
        elif data in self.values:
            return self.values[data]
        elif data is None and len(self.values) == 1:
            return next(iter(self.values.values()))
        held = "one data set without a name" if isinstance(self.values, PointValues) else ", ".join(self.values)
        raise ValueError(f"there are values on {held}; got {data!r}.")

    def half_widths(self, increase: float, data: "str | None" = None) -> Tensor:
        """Return how far one can go to either side before the loss has risen by so much, between points linearly.

        Args:
            increase: Above the loss at the point of the grid that is nearest to distance 0 [nat].
            data: Which data set; see :meth:`of`.

        Returns:
            Shape ``(K, 2)``: to negative and to positive distances, both as positive numbers; infinite where the loss
            stays below within the grid [parameter].

        Raises:
            ValueError: If ``increase`` is not positive, or there is no such data set.
        """
        if not increase > 0:
            raise ValueError(f"increase must be positive; got {increase}.")
        loss = self.of(data).loss
        center = int(self.distances.abs().argmin())
        limits = loss[:, center] + increase
        sides = []
        for side in (range(center, -1, -1), range(center, len(self.distances))):
            steps = list(side)
            sides.append(
                [
                    _crossing(self.distances[steps].tolist(), row[steps].tolist(), limit)
                    for row, limit in zip(loss, limits.tolist(), strict=True)
                ]
            )
        return loss.new_tensor(sides).mT


def _crossing(distances: Sequence[float], losses: Sequence[float], limit: float) -> float:
    for i in range(1, len(losses)):
        if losses[i] >= limit:
            rise = losses[i] - losses[i - 1]
            share = (limit - losses[i - 1]) / rise if rise < float("inf") else 0.0
            return abs(distances[i - 1] + share * (distances[i] - distances[i - 1]))
    return float("inf")


class _Star:
    """Rays from one point; a coordinate is the number of a ray and a distance."""

    def __init__(self, layout: "ParameterLayout | None", origin: Tensor, directions: Tensor) -> None:
        self.layout, self.origin, self.directions = layout, origin, directions

    def to_theta(self, coordinates: Tensor) -> Tensor:
        rays = coordinates[:, 0].long().to(self.origin.device)
        distances = coordinates[:, 1, None].to(self.origin)
        return torch.addcmul(self.origin, distances, self.directions[rays])


@exact
def width_profile(
    model: nn.Module,
    origin: Tensor,
    directions: Tensor,
    data: "Data | Mapping[str, Data]",
    loss_fn: LossFn,
    distances: "Tensor | None" = None,
    *,
    names: "Sequence[str] | None" = None,
    stddevs: "Tensor | None" = None,
    known: "Known | None" = None,
    **options: Unpack[EvaluationOptions],
) -> WidthProfile:
    r"""Return loss and accuracy along given rays, at :math:`\hat\theta + t \, d_k / \|d_k\|`.

    Args:
        model: The network.
        origin: :math:`\hat\theta`, shape ``(D,)`` [parameter].
        directions: The :math:`d_k` as rows, shape ``(K, D)``; of any length, not zero.
        data: As for :func:`~lowrank_bdl.surfaces.evaluation.evaluate_points`: one data set, or several by name.
        loss_fn: As there.
        distances: Where on each ray, shape ``(T,)``; None for 21 points from -30 to 30, as published [parameter].
        names: What to call the directions; None numbers them.
        stddevs: Kept with the result.
        known: Values of an earlier call, of shape ``(K, T)`` or flat, NaN where they are to be found.
        **options: As for ``evaluate_points``: ``layout``, ``bn_loader``, ``on_values`` (which gets values flat), ...

    Raises:
        ShapeError: If model, origin, directions and names do not fit together, or a direction is zero.
        NonFiniteError: If an entry is not finite.

    Cost: K T evaluations of the network; a copy of the directions.

    Example:
        >>> net, x, y = nn.Linear(2, 1, bias=False), torch.eye(2), torch.zeros(2, 1)
        >>> square = torch.nn.functional.mse_loss
        >>> rows, t = torch.tensor([[5.0, 0.0], [1.0, 1.0]]), torch.tensor([0.0, 2.0])
        >>> found = width_profile(net, torch.zeros(2), rows, (x, y), square, t, accuracy=False, progress=False)
        >>> found.of().loss.round(decimals=4).tolist()
        [[0.0, 2.0], [0.0, 2.0]]
    """
    if directions.ndim != 2 or not len(directions):
        raise ShapeError(f"directions must have shape (K, D) with K >= 1; got {tuple(directions.shape)}.")
    start, *rows = require_points([origin, *directions], options.get("layout"))
    names = tuple(f"direction {number}" for number in range(len(rows))) if names is None else tuple(names)
    if len(names) != len(rows):
        raise ShapeError(f"there must be a name for each of the {len(rows)} directions; got {len(names)}.")
    lengths = norm_in_float64(directions.detach(), dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise ShapeError(f"a direction must not be zero; {names[int(lengths[:, 0].argmin())]!r} is.")
    distances = _distances(30.0, 21) if distances is None else distances
    if distances.ndim != 1 or not len(distances):
        raise ShapeError(f"distances must have shape (T,) with T >= 1; got {tuple(distances.shape)}.")
    distances = to_float64(distances.detach())
    star = _Star(options.get("layout"), start.detach(), directions.detach() / lengths.to(directions))
    numbers = torch.arange(len(rows), dtype=torch.float64)
    points = torch.cartesian_prod(numbers, distances.to(numbers.device)).to(sums_device(start.device))
    options["surface"] = star
    values = _evaluated(model, points, data, loss_fn, known, (len(rows), len(distances)), options)
    return WidthProfile(names, distances, values, stddevs)


def _evaluated(
    model: nn.Module,
    points: Tensor,
    data: "Data | Mapping[str, Data]",
    loss_fn: LossFn,
    known: "Known | None",
    shape: tuple[int, int],
    options: EvaluationOptions,
) -> Values:
    if isinstance(data, Mapping):
        if isinstance(known, PointValues):
            raise ShapeError("data came by name, and so must known; got the values of one data set.")
        found = evaluate_points(model, points, data, loss_fn, known=known, **options)
        return {name: values.reshape(*shape) for name, values in found.items()}
    if known is not None and not isinstance(known, PointValues):
        raise ShapeError("data are one set, and so must known be; got values by name.")
    return evaluate_points(model, points, data, loss_fn, known=known, **options).reshape(*shape)


@exact
def pca_width(
    model: nn.Module,
    span: Span,
    data: "Data | Mapping[str, Data]",
    loss_fn: LossFn,
    distances: "Tensor | None" = None,
    *,
    components: "Sequence[int] | None" = None,
    known: "Known | None" = None,
    **options: Unpack[EvaluationOptions],
) -> WidthProfile:
    """Return the loss along principal directions of the iterates: the top one, the middle one, and the last.

    Args:
        model: The network.
        span: Principal directions as columns, largest first, from a point: ``lowrank_bdl.pca_subspace(swag)``, whose
            columns are as long as the standard deviations along them.
        data: As for :func:`width_profile`.
        loss_fn: As there.
        distances: As there; of one length in all directions, so that they compare.
        components: Numbers of the columns; None for the first, the middle and the last.
        known: As for :func:`width_profile`.
        **options: As there.

    Raises:
        ShapeError: As for :func:`width_profile`, or if there is no such column.
        NonFiniteError: If an entry is not finite.

    Cost: 21 evaluations of the network a direction, or as many as there are distances.

    Source: the code of Maddox et al. (2019), ``pca_width``.
    """
    rank = span.basis.shape[1]
    chosen = sorted({0, rank // 2, rank - 1}) if components is None else list(components)
    if not chosen or not all(0 <= number < rank for number in chosen):
        raise ShapeError(f"components must be numbers from 0 to {rank - 1}, at least one; got {chosen}.")
    rows = span.basis.mT[chosen]
    stddevs = norm_in_float64(rows, dim=1)
    names = [f"component {number + 1}" for number in chosen]
    options.setdefault("layout", span.layout)
    return width_profile(
        model, span.origin, rows, data, loss_fn, distances, names=names, stddevs=stddevs, known=known, **options
    )


@exact
def swag_width(
    model: nn.Module,
    posterior: GaussianPosterior,
    data: "Data | Mapping[str, Data]",
    loss_fn: LossFn,
    distances: "Tensor | None" = None,
    *,
    rank: "int | None" = None,
    components: "Sequence[int] | None" = None,
    known: "Known | None" = None,
    **options: Unpack[EvaluationOptions],
) -> WidthProfile:
    """Return the loss along the principal directions of the low-rank part of SWAG's covariance, from its mean.

    Args:
        model: The network.
        posterior: SWAG's Gaussian.
        data: As for :func:`width_profile`.
        loss_fn: As there.
        distances: As there.
        rank: How many directions to find, of which ``components`` are taken; None for the rank of the low-rank part.
        components: As for :func:`pca_width`.
        known: As for :func:`width_profile`.
        **options: As there.

    Raises:
        ShapeError: As for :func:`pca_width`, or if the low-rank part has fewer directions.
        NonFiniteError: If an entry is not finite.

    Cost: two reads of the deviations, and 21 evaluations of the network a direction, or as many as there are distances.

    Source: the code of Maddox et al. (2019), ``swag_width``.
    """
    factors = posterior.covariance.factors
    if factors.rank == 0:
        raise ShapeError("the posterior must have a low-rank part; its covariance is diagonal.")
    if rank is not None and rank < 1:
        raise ShapeError(f"rank must be at least 1; got {rank}.")

    def choose(variances: Tensor) -> int:
        smallest = factors.rank * torch.finfo(torch.float64).eps * variances[0]
        return rank or int((variances > smallest).sum())

    _, directions = low_rank_components(factors, choose, scaled=True)
    span = _Columns(posterior.layout, posterior.mean, directions)
    return pca_width(model, span, data, loss_fn, distances, components=components, known=known, **options)


@dataclass(frozen=True)
class _Columns:
    layout: "ParameterLayout | None"
    origin: Tensor
    basis: Tensor


@exact
def orthogonal_width(
    model: nn.Module,
    span: Span,
    data: "Data | Mapping[str, Data]",
    loss_fn: LossFn,
    distances: "Tensor | None" = None,
    *,
    num_directions: int = 7,
    generator: "torch.Generator | None" = None,
    known: "Known | None" = None,
    **options: Unpack[EvaluationOptions],
) -> WidthProfile:
    """Return the loss along random directions that are orthogonal to a span, and to each other.

    Args:
        model: The network.
        span: Directions to be orthogonal to, as columns from a point: ``lowrank_bdl.pca_subspace(swag)``.
        data: As for :func:`width_profile`.
        loss_fn: As there.
        distances: As there; None for 31 points from -60 to 60, as published: random directions are flatter.
        num_directions: How many; 7 as published.
        generator: Source of the randomness, on the device of the span; None means torch's default generator.
        known: As for :func:`width_profile`; draw the same directions again.
        **options: As there.

    Raises:
        ShapeError: As for :func:`width_profile`, or if D is less than the number of directions asked for and spanned.
        NonFiniteError: If an entry is not finite.

    Cost: 31 evaluations of the network a direction, or as many as there are distances; a copy of the directions.

    Source: the code of Maddox et al. (2019), ``pca_orth_width``.
    """
    rows = random_orthogonal_directions(span, num_directions, generator)
    names = [f"random {number + 1}" for number in range(num_directions)]
    options.setdefault("layout", span.layout)
    distances = _distances(60.0, 31) if distances is None else distances
    return width_profile(model, span.origin, rows, data, loss_fn, distances, names=names, known=known, **options)


def random_orthogonal_directions(span: Span, num: int, generator: "torch.Generator | None" = None) -> Tensor:
    """Draw orthonormal directions that are orthogonal to a span, uniform over all such.

    Args:
        span: Directions as columns, which may depend on each other.
        num: How many to draw.
        generator: Source of the randomness, on the device of the span; None means torch's default generator.

    Returns:
        Shape ``(num, D)``, in the dtype of the span.

    Raises:
        ShapeError: If ``num`` < 1, or D is less than ``num`` and the dimension of the span together.

    Cost: O(D (num + k)²) for k columns, one more matrix of that size.

    Example:
        >>> span = _Columns(None, torch.zeros(3), torch.eye(3)[:, :2])
        >>> random_orthogonal_directions(span, 1).abs().round(decimals=4).tolist()
        [[0.0, 0.0, 1.0]]
    """
    basis = span.basis.detach()
    dim, rank = basis.shape
    dtype = torch.promote_types(basis.dtype, torch.float32)
    if num < 1 or num + rank > dim:
        raise ShapeError(
            f"there are {dim} dimensions, {rank} of them spanned; expected 1 to {dim - rank} directions; got {num}."
        )
    generator = generator_on(basis.device, generator)
    rows = torch.randn(num, dim, dtype=dtype, device=basis.device, generator=generator)
    kernel = DenseBasis(basis)
    scale = kernel.gram().diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    unit = kernel.gram() * scale * scale[:, None]
    for _ in range(2):  # twice, so that rounding of the first time is taken out too
        products = scale[:, None] * kernel.inner_products(rows)
        coefficients = scale[:, None] * (torch.linalg.pinv(unit, hermitian=True) @ products)
        rows -= coefficients.mT.to(dtype) @ basis.mT
        rows = orthonormal(rows)
    return rows


def _distances(reach: float, num: int) -> Tensor:
    return torch.linspace(-reach, reach, num, dtype=torch.float64)
