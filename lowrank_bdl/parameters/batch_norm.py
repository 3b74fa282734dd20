r"""Batch-norm statistics for new weights, pooled exactly over a data set.

Averaged or sampled weights need statistics of their own. Each batch is normalised by its own statistics, as in
training, and what enters each layer is pooled over all N elements of all batches (Chan, Golub and LeVeque, "Updating
formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1), so that batches weigh by their size
and the variance *between* batches counts. An average of the batches' variances leaves that part out: four batches whose
means differ can have a pooled variance six times as large.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import sums_device, to_float64
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.parameters.batches import CallFn, batches_of
from lowrank_bdl.parameters.functional import FunctionalModel, StatelessModel, evaluation_mode
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.norm_layers import LayerSelector, tracking_layers, warn_of_other_layers
from lowrank_bdl.parameters.wrappers import named_buffers, uncompiled
from lowrank_bdl.progress import progress_bar


class _LayerStatistics:
    """Counts, means and sums of squared deviations of one layer's inputs, for S sets of weights."""

    def __init__(self, name: str, module: _BatchNorm, num_samples: int) -> None:
        if is_lazy(module.get_buffer("running_mean")):
            raise ShapeError(f"Batch-norm layer {name!r} has no shape yet (lazy module); run one forward pass first.")
        self.name = name
        self.module = module
        self.calls = [0] * num_samples
        self.counts = [0] * num_samples
        channels = (num_samples, module.num_features)
        self.mean = torch.zeros(channels, dtype=torch.float64, device=sums_device(self._own("running_mean").device))
        self.sum_sq = torch.zeros_like(self.mean)

    def _own(self, key: str) -> Tensor:
        return self.module.get_buffer(key)

    def add(self, sample: int, inputs: Tensor) -> None:
        """Merge the inputs ``(N, C, ...)`` of one call into the statistics of one sample."""
        size = inputs.numel() // inputs.shape[1] if inputs.ndim > 1 and inputs.shape[1] else 0
        if size < 2:
            raise ShapeError(
                f"Batch-norm layer {self.name!r} needs at least 2 values per channel to normalise a batch by its own "
                f"statistics; got input of shape {tuple(inputs.shape)}. Use larger batches, or drop the last one."
            )
        inputs = inputs.detach()
        at_least_single = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        variance, mean = torch.var_mean(at_least_single, [0, *range(2, inputs.ndim)], correction=0)
        total = self.counts[sample] + size
        delta = to_float64(mean) - self.mean[sample]
        self.mean[sample] += delta * (size / total)
        self.sum_sq[sample] += to_float64(variance) * size + delta.square() * (self.counts[sample] * (size / total))
        self.counts[sample] = total
        self.calls[sample] += 1

    def buffers(self) -> dict[str, Tensor]:
        """Running statistics ``(S, C)`` in the buffers' own dtypes; the model's where the layer was never called."""
        called = torch.tensor(self.calls, device=self.mean.device)
        degrees = torch.tensor(self.counts, device=self.mean.device).sub(1).clamp(min=1).unsqueeze(-1)
        found = {"running_mean": self.mean, "running_var": self.sum_sq / degrees, "num_batches_tracked": called}
        result = {}
        for key, value in found.items():
            if getattr(self.module, key) is None:  # modules pickled by old versions of torch do not count batches
                continue
            own = self._own(key)
            was_called = (called > 0).view(-1, *[1] * own.ndim).to(own.device)
            result[key] = torch.where(was_called, value.to(own.device, own.dtype), own)
            if not bool(result[key].isfinite().all()):
                sample = int(result[key].isfinite().flatten(1).all(1).int().argmin())
                raise NonFiniteError(
                    f"Batch-norm layer {self.name!r} must have finite statistics; got NaN or infinite {key} for "
                    f"sample {sample} (in {own.dtype})."
                )
        return result


@contextmanager
def _observed(layers: Iterable[_LayerStatistics], current: list[int]) -> Iterator[None]:
    """Make the layers normalise by batch statistics and record their inputs under sample ``current[0]``."""
    handles = []
    modes = [(layer.module, layer.module.training) for layer in layers]

    def hook_for(layer: _LayerStatistics) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer.add(current[0], args[0] if args else kwargs["input"])

        return hook

    try:
        for layer in layers:
            handles.append(layer.module.register_forward_pre_hook(hook_for(layer), with_kwargs=True))
            layer.module.training = True
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def _require_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"The fraction of batches must be in (0, 1]; got {fraction}.")


def _number_of_batches(loader: Iterable[Any], fraction: float) -> int | None:
    """How many of the loader's first batches make up a fraction of them; None for all there are."""
    if fraction == 1:
        return None
    try:
        length = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a data loader over a stream
        length = None
    if length is None:
        raise TypeError(
            f"A fraction of the batches needs a loader that knows its length; got {type(loader).__name__} without one. "
            "Give it as many batches as it shall use."
        )
    return math.ceil(fraction * length * (1 - 1e-12))  # 0.07 * 100 is a little more than 7


@torch.no_grad()
def _pooled(
    network: StatelessModel,
    weights: "Iterable[Mapping[str, Tensor]]",
    num_samples: int,
    loader: Iterable[Any],
    fraction: float,
    exclude: "LayerSelector | None",
    progress: bool,
) -> dict[str, Tensor]:
    loader = batches_of(loader)
    limit = _number_of_batches(loader, fraction)
    layers = [_LayerStatistics(name, bn, num_samples) for name, bn in tracking_layers(network.model, exclude).items()]
    current = [0]
    num_batches = 0
    with evaluation_mode(network.model), _observed(layers, current), uncompiled():
        bar = progress_bar(loader, "batch-norm statistics", total=limit, unit="batch", leave=False, show=progress)
        for batch in islice(bar, limit):
            num_batches += 1
            for current[0], parameters in enumerate(weights):
                network(parameters, batch)
    if num_batches == 0:
        raise ShapeError("The loader must give at least one batch; got none (an exhausted iterator?).")
    prefix = {layer.name: f"{layer.name}." if layer.name else "" for layer in layers}
    return {prefix[layer.name] + key: value for layer in layers for key, value in layer.buffers().items()}


class _NamedWeights:
    """The weights of each sample by name, made anew on every pass over the samples."""

    def __init__(self, network: FunctionalModel, thetas: Collection[Tensor]) -> None:
        self.network = network
        self.thetas = thetas

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.network.named(theta) for theta in self.thetas)


@exact
def recalibrate_batch_norm(
    model: nn.Module,
    thetas: "Tensor | Collection[Tensor]",
    loader: Iterable[Any],
    *,
    layout: ParameterLayout | None = None,
    call_fn: CallFn | None = None,
    fraction: float = 1.0,
    bn_exclude: "LayerSelector | None" = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    r"""Compute the batch-norm statistics of S sets of weights in one pass over the data.

    With :math:`x_1, \dots, x_N` everything that enters a channel of a layer, over all positions of all batches,

    .. math:: \text{running\_mean} = \bar x, \qquad \text{running\_var} = \tfrac{1}{N - 1} \sum_i (x_i - \bar x)^2 ,

    where each batch is normalised by its own statistics on the way, as in training. Dropout is off. A layer called
    several times in a forward pass pools all its calls; one that is never called, or whose buffers the model uses
    without calling it, keeps the model's values. The model is not changed: not its weights, buffers, modes or momentum.
    Under several processes each pools what it sees.

    Args:
        model: Any module; layers are the instances of torch's batch norms (1-d to 3-d, synchronised) that track running
            statistics.
        thetas: The weights, shape ``(S, D)``, or a collection of S vectors ``(D,)``, iterated once per batch.
        loader: Batches; without labels, or ``(x, y)``. Training data, augmented as it was in training: a network that
            was trained on shifted images loses accuracy with the statistics of images that are not shifted.
        layout: What θ holds; None takes every trainable parameter.
        call_fn: ``call_fn(model, batch)`` runs the model; None calls ``model(x)``.
        fraction: In (0, 1]: stop after the first ceil(fraction · length) of the loader's batches.
        bn_exclude: Layers that keep their statistics and normalise by them, such as those of a frozen backbone: a
            pattern for their names (``"backbone"``), several, or ``predicate(name, layer)``.
        progress: Show a progress bar.

    Returns:
        Name of each buffer to its values ``(S, *shape)``, in the buffer's dtype: ``running_mean``, ``running_var`` and
        ``num_batches_tracked`` (the number of calls). Empty, the loader unread, if the model has no such layer.

    Raises:
        ShapeError: If the loader is empty, ``thetas`` does not fit the layout, a batch has one value per channel, or a
            pattern of ``bn_exclude`` matches no layer.
        NonFiniteError: If a statistic is NaN or infinite; names the layer and the sample.
        ValueError: If the fraction is outside (0, 1].
        TypeError: If the fraction is below 1 and the loader does not know its length.

    Warns:
        UserWarning: Names layers with running statistics that are none of torch's batch norms: these stay as they are.

    Cost: S forward passes over the loader, or its fraction, read once; memory of one forward pass plus 16 bytes per
    channel and sample.

    Source: Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (2019), section 3.4, asks for
    the statistics of every sample; the pooling is ours.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
        >>> thetas = torch.tensor([[1.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
        >>> batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[6.0], [8.0], [9.0]])]
        >>> recalibrate_batch_norm(net, thetas, batches)["1.running_mean"].flatten().tolist()
        [5.0, 15.0]
    """
    _require_fraction(fraction)
    warn_of_other_layers(model, bn_exclude)
    if not tracking_layers(model, bn_exclude):
        return {}
    network = FunctionalModel(model, layout, call_fn)
    if isinstance(thetas, Tensor) and (thetas.ndim != 2 or thetas.shape[1] != network.layout.numel):
        raise ShapeError(f"thetas must have shape (S, {network.layout.numel}); got {tuple(thetas.shape)}.")
    if len(thetas) == 0:
        raise ShapeError("thetas must hold at least one set of weights; got none.")
    weights = _NamedWeights(network, thetas)
    return _pooled(network.stateless, weights, len(thetas), loader, fraction, bn_exclude, progress)


@exact
def recalibrate_batch_norm_(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    call_fn: CallFn | None = None,
    fraction: float = 1.0,
    bn_exclude: "LayerSelector | None" = None,
    progress: bool = False,
) -> None:
    """Replace the batch-norm statistics of a model by those of its present weights, in place.

    Same statistics as :func:`recalibrate_batch_norm`. Only ``running_mean``, ``running_var`` and
    ``num_batches_tracked`` are written, all of them after the last batch: an error leaves the model as it was. Modes
    and momentum stay.

    Args:
        model: Any module.
        loader: Batches; without labels, or ``(x, y)``.
        call_fn: ``call_fn(model, batch)`` runs the model; None calls ``model(x)``.
        fraction: In (0, 1]: stop after the first ceil(fraction · length) of the loader's batches.
        bn_exclude: Layers that keep their statistics and normalise by them, such as those of a frozen backbone: a
            pattern for their names (``"backbone"``), several, or ``predicate(name, layer)``.
        progress: Show a progress bar.

    Raises:
        ShapeError: If the loader is empty or a batch has one value per channel.
        NonFiniteError: If a statistic is NaN or infinite.
        ValueError: If the fraction is outside (0, 1].
        TypeError: If the fraction is below 1 and the loader does not know its length.

    Warns:
        UserWarning: Names layers with running statistics that are none of torch's batch norms: these stay as they are.

    Cost: one forward pass over the loader.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1, momentum=0.5))
        >>> recalibrate_batch_norm_(net, [torch.tensor([[0.0], [2.0]]), torch.tensor([[6.0], [8.0], [9.0]])])
        >>> net[0].running_mean.item(), round(net[0].running_var.item(), 4), net[0].momentum
        (5.0, 15.0, 0.5)
    """
    _require_fraction(fraction)
    warn_of_other_layers(model, bn_exclude)
    if not tracking_layers(model, bn_exclude):
        return
    found = _pooled(StatelessModel(model, call_fn), [{}], 1, loader, fraction, bn_exclude, progress)
    own = named_buffers(model)
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value[0])
