"""The loss of one network at many points of weight space: of a plane, a ray, a curve, or any given ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypedDict, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lowrank_bdl.curvature.loss_gradients import check_modes
from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import norm_in_float64, sums_device, to_float64
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm
from lowrank_bdl.parameters.batches import CallFn, Data, TargetFn, fixed_batches, joined, split_batch, targets_of
from lowrank_bdl.parameters.functional import FunctionalModel, evaluation_mode, is_plain_perceptron
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.loss_terms import LossFn, LossTerms, NumTerms, Reduction
from lowrank_bdl.parameters.sampled_network import SampledNetwork
from lowrank_bdl.progress import progress_bar

_WEIGHTS_AT_ONCE = 1 << 24  # numbers in the weight vectors that one pass over the data serves
_POINTS_A_PASS = 16  # reading the data is shared by so many; more would only make known values and the bar wait
_SMALL_POINTS_A_PASS = 256  # of networks that are evaluated at once


class MapsToWeights(Protocol):
    """A set of weight vectors with coordinates: a curve, a plane, a ray, a subspace."""

    @property
    def layout(self) -> "ParameterLayout | None":
        """What the weight vectors hold."""

    def to_theta(self, coordinates: Tensor, /) -> Tensor:
        """Return the weights ``(m, D)`` at m coordinates, of shape ``(m,)`` or ``(m, k)``."""


@dataclass(frozen=True)
class PointValues:
    r"""What a network does to one data set at M points of weight space.

    Attributes:
        loss: Mean loss, shape ``(M,)``, float64; infinite where it is not a number, NaN where it is not known yet.
        accuracy: Fraction of targets that have the largest output, shape ``(M,)``, float64; None if not asked for.
        squared_norm: :math:`\|\theta\|^2` of the weights in the layout, shape ``(M,)``, float64 [parameter²].

    Example:
        >>> values = PointValues(torch.tensor([1.0, 2.0]), torch.tensor([0.75, 0.5]), torch.tensor([4.0, 0.0]))
        >>> values.error, values.regularized(weight_decay=0.5)
        (tensor([0.2500, 0.5000]), tensor([2., 2.]))
    """

    loss: Tensor
    accuracy: "Tensor | None"
    squared_norm: Tensor

    @classmethod
    def unknown(cls, num_points: int, *, accuracy: bool = True, device: "torch.device | None" = None) -> "PointValues":
        """Return values of M points none of which is known yet: NaN everywhere."""
        place = None if device is None else sums_device(device)
        nothing = torch.full((num_points,), torch.nan, dtype=torch.float64, device=place)
        return cls(nothing, nothing.clone() if accuracy else None, nothing.clone())

    @property
    def error(self) -> Tensor:
        """1 - accuracy.

        Raises:
            ValueError: If the accuracy is not there.
        """
        if self.accuracy is None:
            raise ValueError("there is no error without accuracies; evaluate with accuracy=True.")
        return 1 - self.accuracy

    def regularized(self, weight_decay: float) -> Tensor:
        r"""Return the loss that training with weight decay minimises, loss + ½ weight_decay ‖θ‖².

        Args:
            weight_decay: The coefficient [1 / parameter²].
        """
        return self.loss + 0.5 * weight_decay * self.squared_norm

    def reshape(self, *shape: int) -> "PointValues":
        """Return the same values in another shape: of the grid their points were taken from."""
        accuracy = None if self.accuracy is None else self.accuracy.reshape(shape)
        return PointValues(self.loss.reshape(shape), accuracy, self.squared_norm.reshape(shape))


class EvaluationOptions(TypedDict, total=False):
    """The keyword arguments of `evaluate_points` that functions built on it pass through."""

    surface: "MapsToWeights | None"
    layout: ParameterLayout | None
    accuracy: bool
    reduction: Reduction
    num_terms: NumTerms | None
    call_fn: CallFn | None
    target_fn: TargetFn | None
    bn_loader: Iterable[Any] | None
    bn_fraction: float
    vectorize: "bool | Literal['auto']"
    points_per_pass: int | None
    on_values: Callable[[Any], None] | None
    progress: bool


@overload
def evaluate_points(
    model: nn.Module,
    points: Tensor,
    data: Mapping[str, Data],
    loss_fn: LossFn,
    *,
    known: Mapping[str, PointValues] | None = ...,
    **options: Unpack[EvaluationOptions],
) -> dict[str, PointValues]: ...


@overload
def evaluate_points(
    model: nn.Module,
    points: Tensor,
    data: Data,
    loss_fn: LossFn,
    *,
    known: PointValues | None = ...,
    **options: Unpack[EvaluationOptions],
) -> PointValues: ...


@exact
@torch.no_grad()
def evaluate_points(
    model: nn.Module,
    points: Tensor,
    data: "Data | Mapping[str, Data]",
    loss_fn: LossFn,
    *,
    surface: "MapsToWeights | None" = None,
    layout: ParameterLayout | None = None,
    accuracy: bool = True,
    reduction: Reduction = "mean",
    num_terms: NumTerms | None = None,
    call_fn: CallFn | None = None,
    target_fn: TargetFn | None = None,
    bn_loader: Iterable[Any] | None = None,
    bn_fraction: float = 1.0,
    vectorize: "bool | Literal['auto']" = "auto",
    points_per_pass: int | None = None,
    known: "PointValues | Mapping[str, PointValues] | None" = None,
    on_values: Callable[[Any], None] | None = None,
    progress: bool = True,
) -> "PointValues | dict[str, PointValues]":
    r"""Return the mean loss and the accuracy of a network at M points of weight space.

    The points are handled a few at a time: their weights are made from the coordinates, one reading of ``bn_loader``
    gives the batch-norm statistics of each, and one reading of the data serves all of them. Batches weigh by their
    size, sums are in float64. The network runs in evaluation mode; its weights, buffers and modes stay as they are.

    A point where the network breaks down is a value, not an error, as planes reach far out: a loss that is not a number
    (also because a batch-norm statistic is not finite) is recorded as infinity, and examples whose largest output is
    not finite count as wrong.

    Args:
        model: The network.
        points: Weight vectors, shape ``(M, D)``; or, with ``surface``, coordinates with M on the first axis.
        data: A pair ``(x, y)`` or a mapping with ``labels``, a list of such, or a DataLoader that does not shuffle. Or
            several such data sets by name, which then share the batch-norm statistics of each point.
        loss_fn: ``loss_fn(outputs, targets)`` gives a scalar.
        surface: What turns coordinates into weights: anything with ``to_theta`` and ``layout``. None if ``points`` are
            weights already.
        layout: What the weights hold; None takes the surface's, or every trainable parameter.
        accuracy: Also count the targets that have the largest output: outputs ``(N, C, *positions)``, targets class
            indices ``(N, *positions)``. Pass False for regression.
        reduction: Whether ``loss_fn`` gives the ``"mean"`` over a batch or the ``"sum"``.
        num_terms: What a mean divides by, ``num_terms(outputs, targets)``; None asks torch's own losses, and takes
            the number of examples for others. See `LossTerms`.
        call_fn: ``call_fn(model, batch)`` gives the outputs; None calls ``model(x)``, or
            ``model(**entries).logits`` on a mapping without its targets.
        target_fn: ``target_fn(batch)`` gives the targets; None takes y, or a mapping's ``labels`` or ``targets``.
        bn_loader: Batches for the batch-norm statistics, training data; None leaves the model's statistics, which are
            those of other weights.
        bn_fraction: Fraction of ``bn_loader`` to use, in (0, 1]; below 1 its first batches only.
        vectorize: ``True`` evaluates several points at once by ``torch.vmap`` (the same numbers up to rounding);
            ``"auto"`` does so for small networks of linear layers on a CPU, where it was measured to be faster.
        points_per_pass: How many points share a reading of the data; None takes 16, or 256 where they are evaluated at
            once, or as many as fit into 2^24 numbers.
        known: What an earlier call returned or gave to ``on_values``: points whose loss is not NaN are left out.
        on_values: Called with everything known so far after each pass: write it to a file to be able to resume. It is
            given the same tensors every time, which are filled in further.
        progress: Show a progress bar over the points.

    Returns:
        The values, in the order of the points and on their device; by name if ``data`` came by name.

    Raises:
        ShapeError: If points, surface, layout, model, data and ``known`` do not fit together, the loss is no scalar, or
            there is nothing to evaluate.
        NonFiniteError: If the weights of a point are not finite.
        ValueError: If an argument is unknown or out of range, or data are shuffled or can be read only once.
        LowRankBDLError: If ``vectorize`` is True and the network cannot be evaluated several times at once.

    Cost: for each point a forward pass over the data and, for batch norm, over ``bn_loader``; memory of one batch and
    of ``points_per_pass`` weight vectors.

    Example:
        >>> net, x, y = nn.Linear(1, 1, bias=False), torch.ones(3, 1), torch.zeros(3, 1)
        >>> thetas = torch.tensor([[0.0], [1.0], [2.0]])
        >>> square = torch.nn.functional.mse_loss
        >>> evaluate_points(net, thetas, (x, y), square, accuracy=False, progress=False).loss
        tensor([0., 1., 4.], dtype=torch.float64)
    """
    check_modes(reduction, "eval")
    terms = LossTerms(loss_fn, reduction, num_terms)
    if points_per_pass is not None and points_per_pass < 1:
        raise ValueError(f"points_per_pass must be at least 1; got {points_per_pass}.")
    if isinstance(bn_loader, Iterator):
        raise ValueError(f"bn_loader is read again and again; got an iterator ({type(bn_loader).__name__}).")
    if points.ndim == 0 or len(points) == 0 or not points.is_floating_point():
        raise ShapeError(f"points must be real, with M >= 1 on the first axis; got {tuple(points.shape)}.")
    by_name = isinstance(data, Mapping) and targets_of(data) is None  # with targets it is one batch
    named = cast(Mapping[str, Data], data) if by_name else {"": cast(Data, data)}
    sets = {name: fixed_batches(one) for name, one in named.items()}
    if not sets:
        raise ShapeError("data must hold at least one data set; got none.")
    network = FunctionalModel(model, layout if layout is not None or surface is None else surface.layout, call_fn)
    before = known if known is None or isinstance(known, Mapping) else {"": known}
    values = _start(sets, len(points), accuracy, before, points.device)
    todo = torch.stack([found.loss.isnan() for found in values.values()]).any(0).nonzero()[:, 0]
    plain = call_fn is None
    size = points_per_pass or _pass_size(network, plain and vectorize == "auto" and is_plain_perceptron(model))
    bar = progress_bar(total=len(points), initial=len(points) - len(todo), unit="point", leave=False, show=progress)
    with bar, evaluation_mode(model):
        for part in todo.to(points.device).split(size) if len(todo) else ():
            coordinates = points.detach()[part]
            thetas = _weights(coordinates if surface is None else surface.to_theta(coordinates), network, part)
            squared_norm = norm_in_float64(thetas, dim=1).square()
            if not bool(squared_norm.isfinite().all()):
                bad = int(part[int(squared_norm.isfinite().int().argmin())])
                raise NonFiniteError(f"the weights of every point must be finite; those of point {bad} are not.")
            rows, buffers = _statistics(network, thetas, bn_loader, bn_fraction, call_fn)
            usable = (thetas if len(rows) == len(thetas) else thetas[rows]).unbind()
            for name, batches in sets.items():
                sampled = SampledNetwork(network, usable, vectorize=vectorize, plain=plain)
                sampled.set_buffers(buffers)
                loss, right = _means(sampled, network, batches, len(rows), terms, accuracy, target_fn)
                found, place = values[name], values[name].loss.device
                at = part.to(place)
                usable_at = at[rows.to(place)]
                found.squared_norm[at] = squared_norm.to(place)
                found.loss[at] = torch.inf
                found.loss[usable_at] = loss.to(place)
                if found.accuracy is not None:
                    found.accuracy[at] = 0.0
                    found.accuracy[usable_at] = right.to(place)
            bar.update(len(part))
            if on_values is not None:
                on_values(values if by_name else values[""])
    return values if by_name else values[""]


def _start(
    sets: Mapping[str, Any],
    num_points: int,
    accuracy: bool,
    known: "Mapping[str, PointValues] | None",
    device: torch.device,
) -> dict[str, PointValues]:
    """Return values to write into: what is known, as a copy, and NaN elsewhere."""
    empty = {name: PointValues.unknown(num_points, accuracy=accuracy, device=device) for name in sets}
    if known is None:
        return empty
    if set(known) != set(sets):
        raise ShapeError(f"known must hold the data sets {sorted(sets)}; got {sorted(known)}.")
    for name, found in known.items():
        if found.loss.numel() != num_points or (found.accuracy is None) == accuracy:
            held = "no accuracies" if found.accuracy is None else "accuracies"
            raise ShapeError(
                f"known must be of {num_points} points {'with' if accuracy else 'without'} accuracies; "
                f"got {found.loss.numel()} points and {held}."
            )
        for field in fields(found):
            own, other = getattr(empty[name], field.name), getattr(found, field.name)
            if own is not None:
                own.copy_(other.reshape(-1))
    return empty


def _pass_size(network: FunctionalModel, small: bool) -> int:
    most = _SMALL_POINTS_A_PASS if small else _POINTS_A_PASS
    return max(1, min(most, _WEIGHTS_AT_ONCE // network.layout.numel))


def _weights(thetas: Tensor, network: FunctionalModel, part: Tensor) -> Tensor:
    expected = (len(part), network.layout.numel)
    if thetas.shape != expected:
        raise ShapeError(f"{expected[0]} points must have weights of shape {expected}; got {tuple(thetas.shape)}.")
    device = network.stateless.device
    return thetas.detach() if device is None else thetas.detach().to(device)


def _statistics(
    network: FunctionalModel,
    thetas: Tensor,
    loader: "Iterable[Any] | None",
    fraction: float,
    call_fn: "CallFn | None",
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return which points have finite batch-norm statistics, and the statistics of those, by buffer."""
    every = torch.arange(len(thetas), device=thetas.device)
    if loader is None:
        return every, {}

    def of(rows: Tensor) -> dict[str, Tensor]:
        model, layout = network.stateless.model, network.layout
        return recalibrate_batch_norm(model, rows, loader, layout=layout, call_fn=call_fn, fraction=fraction)

    try:
        return every, of(thetas)
    except NonFiniteError:  # says which, but there may be more
        found = [_or_none(of, theta) for theta in thetas.split(1)]
    good = [row for row, one in enumerate(found) if one is not None]
    kept = [one for one in found if one is not None]
    return every[good], {name: torch.cat([one[name] for one in kept]) for name in (kept[0] if kept else ())}


def _or_none(statistics: Callable[[Tensor], dict[str, Tensor]], theta: Tensor) -> "dict[str, Tensor] | None":
    try:
        return statistics(theta)
    except NonFiniteError:
        return None


def _means(
    sampled: SampledNetwork,
    network: FunctionalModel,
    batches: Iterable[Any],
    number: int,
    terms: LossTerms,
    accuracy: bool,
    target_fn: TargetFn | None,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and the accuracy of some networks by one pass over the batches, float64."""
    device = network.stateless.device
    totals = torch.zeros(number, dtype=torch.float64, device=None if device is None else sums_device(device))
    correct = torch.zeros_like(totals)
    num_data, num_terms, num_targets = 0, torch.zeros_like(totals), torch.zeros_like(totals[:1])
    if number == 0:
        return totals, correct
    for count, batch in enumerate(batches):
        inputs, targets, size = split_batch(batch, device, target_fn)
        num_data, known = num_data + size, terms.number_by_targets(targets)
        counted = _counted(targets, terms.ignore_index) if accuracy else None
        if counted is not None:
            num_targets += counted.sum().to(num_targets.device)
        for row, outputs in enumerate(sampled.outputs(count, joined(inputs, targets))):
            totals[row] += to_float64(terms.total(outputs, targets))
            size_of_mean = terms.number(outputs, targets) if known is None else known
            num_terms[row] += to_float64(size_of_mean) if isinstance(size_of_mean, Tensor) else size_of_mean
            if counted is not None:
                correct[row] += _num_correct(outputs, targets, counted).to(correct.device)
    if num_data == 0:
        raise ShapeError("data must give at least one batch; got none.")
    loss = totals / num_terms
    return torch.where(loss.isnan(), torch.inf, loss), correct / num_targets


def _counted(targets: Tensor, ignore_index: "int | None") -> Tensor:
    """Which targets are classes: not the one that the loss ignores, nor negative ones."""
    counted = targets >= 0
    return counted if ignore_index is None else counted & (targets != ignore_index)


def _num_correct(outputs: Any, targets: Tensor, counted: Tensor) -> Tensor:
    fits = isinstance(outputs, Tensor) and outputs.ndim > 1 and outputs[:, 0].shape == targets.shape
    if not fits or targets.is_floating_point():
        form = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ShapeError(
            "accuracies need outputs (N, C, *positions) and class indices (N, *positions); "
            f"got {form} and {targets.dtype} of shape {tuple(targets.shape)}. Pass accuracy=False for regression."
        )
    best, classes = outputs.max(1)
    right: Tensor = (classes == targets) & best.isfinite() & counted
    return right.sum()
