"""One pass over a data set that sums its log-likelihood and the parts of the Fisher matrix that are asked for."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_bdl.curvature.backward import Backward
from lowrank_bdl.curvature.diagonal_fisher import (
    ExampleDiagonal,
    LayerDiagonal,
    layer_chunks,
    layer_example_gradients,
)
from lowrank_bdl.curvature.kronecker_factors import KroneckerCurvature, KroneckerFactors
from lowrank_bdl.curvature.layers import Layer, LayerCall, find_layers, recorded
from lowrank_bdl.curvature.scores import Labels, OutputLikelihood
from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import require_float64
from lowrank_bdl.linalg.eigen import eigh_psd
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.parameters.batches import CallFn, TargetFn, joined, split_batch
from lowrank_bdl.parameters.functional import FunctionalModel, evaluation_mode
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.wrappers import uncompiled
from lowrank_bdl.progress import progress_bar

_AGREEMENT = 1e-2
"""Relative difference from automatic differentiation above which a layer's rule is not trusted: far above rounding in
half precision, far below what a wrong use of the layer gives."""
_NUMBERS_AT_ONCE = 2**22
"""Gradients of layers' outputs that exist at one time, of as many scores as that allows."""


@dataclass(frozen=True)
class FisherSums:
    """Sums over a data set.

    Attributes:
        num_data: Number of examples N.
        log_likelihood: Sum of log p(y | f) over them, all constants included [nat].
        kronecker: Name of a layer's weight to its Kronecker-factored curvature (which covers its bias as well).
        diagonal: Parameter name to its diagonal Fisher, in the parameter's shape, float64.
    """

    num_data: int
    log_likelihood: float
    kronecker: dict[str, KroneckerCurvature]
    diagonal: dict[str, Tensor]


class _Accumulators:
    """Which parameter is summed how, and the sums."""

    def __init__(
        self,
        network: FunctionalModel,
        weights: Mapping[str, Tensor],
        trusted: Sequence[Layer],
        kronecker: bool,
        diagonal: bool,
    ) -> None:
        blocks = [_with_adjacent_bias(layer, network.layout) for layer in trusted if kronecker and layer.is_matrix]
        self.kronecker = {layer.name: KroneckerFactors(layer) for layer in blocks if layer.weight is not None}
        covered = {name for factors in self.kronecker.values() for name in factors.layer.parameters}
        left = [name for name in network.layout.names if name not in covered] if diagonal else []
        num_bytes = 8 * sum(weights[name].numel() for name in left)
        require_memory(num_bytes, next(iter(weights.values())).device, "a diagonal Fisher matrix")
        self.layers: dict[str, LayerDiagonal] = {}
        for layer in trusted:
            own = [name if name in left else None for name in (layer.weight, layer.bias)]
            part = Layer(layer.name, layer.module, *own)
            if part.parameters:
                self.layers[layer.name] = LayerDiagonal(part)
                left = [name for name in left if name not in part.parameters]
        self.examples = ExampleDiagonal(network.stateless, weights, left) if left else None
        self.recorded = {layer.name: layer for layer in trusted if layer.name in {**self.kronecker, **self.layers}}

    def add_inputs(self, calls: Mapping[str, Sequence[LayerCall]]) -> None:
        for name, factors in self.kronecker.items():
            factors.add_inputs(calls[name])

    def add_gradients(
        self, calls: Mapping[str, Sequence[LayerCall]], gradients: Mapping[str, Sequence[Tensor]]
    ) -> None:
        """Add the gradients ``(c, *output.shape)`` under c vectors of scores."""
        for name, found in gradients.items():
            if name in self.kronecker:
                self.kronecker[name].add_gradients([gradient.flatten(0, 1) for gradient in found])
            if name in self.layers:
                for each in zip(*found, strict=True):
                    self.layers[name].add(calls[name], each)

    def add_last(self, name: str, call: LayerCall, total: Tensor, diagonal: Tensor) -> None:
        """Add a fully connected layer whose output is the network's, from E[s s'] itself."""
        if name in self.kronecker:
            self.kronecker[name].add_output_fisher(total)
        if name in self.layers:
            self.layers[name].add_output_fisher(call, diagonal)

    def sums(self, num_data: int, log_likelihood: float) -> FisherSums:
        kronecker = {}
        for factors in self.kronecker.values():
            assert factors.layer.weight is not None
            kronecker[factors.layer.weight] = factors.decompose()
        diagonal = {} if self.examples is None else dict(self.examples.sums)
        for layer in self.layers.values():
            diagonal.update(layer.sums)
        for name, values in diagonal.items():
            if not bool(values.isfinite().all()):
                raise NonFiniteError(f"Parameter {name!r} must have finite gradients; its sum of squares is not.")
        return FisherSums(num_data, log_likelihood, kronecker, diagonal)


def fisher_sums(
    model: nn.Module,
    theta: Tensor,
    layout: ParameterLayout,
    loader: Iterable[Any],
    likelihood: OutputLikelihood,
    labels: Labels,
    *,
    kronecker: bool,
    diagonal: bool,
    generator: torch.Generator | None = None,
    progress: bool = False,
    call_fn: CallFn | None = None,
    target_fn: TargetFn | None = None,
) -> FisherSums:
    """Sum log-likelihood and Fisher information over a data set, at given weights, in one pass.

    The network runs in evaluation mode with batch-norm statistics as stored, and is not changed. Every example counts
    once, by its own gradient: batches of any sizes give the same sums. Fully connected, convolution and batch-norm
    layers take their gradients from what passes through them; that this is the whole gradient is checked on the first
    batch against automatic differentiation, and a layer whose weight is also used elsewhere is summed like all other
    parameters, by one backward pass an example.

    Args:
        model: The network.
        theta: Its weights, shape ``(D,)``.
        layout: What θ holds.
        loader: Batches ``(x, y)``.
        likelihood: Of the outputs.
        labels: Which labels the Fisher is made of; see `scores`.
        kronecker: Kronecker factors for fully connected and convolution layers.
        diagonal: Diagonals for the parameters that these do not cover.
        generator: Source of the sampled labels.
        progress: Show a progress bar.
        call_fn: ``call_fn(model, batch)`` gives the outputs; None is `call_on_inputs`.
        target_fn: ``target_fn(batch)`` gives the targets; None is `targets_of`.

    Returns:
        The sums.

    Raises:
        ShapeError: If the loader is empty, or a batch is not ``(x, y)`` or does not fit the likelihood.
        NonFiniteError: If an output, the log-likelihood or a sum is not finite.
        MemoryLimitError: If the sums do not fit the free memory, before anything is computed.

    Cost: one forward and backward pass over the data; memory of one pass and the float64 sums. With ``"expected"`` a
    backward pass for each output and position, or for each input of the last layer where that is fully connected and
    these are fewer, several at once by ``vmap``; none for the last layer itself, whose E[s s'] has a closed form.
    """
    require_float64(theta.device, "A Fisher matrix of blocks")
    network = FunctionalModel(model, layout, call_fn)
    layers = find_layers(model, layout)
    sums: _Accumulators | None = None
    num_seen, num_data, total, told_apart, backward = 0, 0, 0.0, False, Backward()
    # a compiled network would not call the layers' hooks
    with evaluation_mode(model), uncompiled(), torch.inference_mode(False), torch.enable_grad():
        weights = {name: value.detach().clone().requires_grad_() for name, value in network.named(theta).items()}
        for number, batch in enumerate(
            progress_bar(loader, description="Fisher information", unit="batch", show=progress)
        ):
            inputs, targets, _ = split_batch(batch, network.stateless.device, target_fn)
            if sums is None:
                trusted = _trusted(network, weights, layers, inputs)
                sums = _Accumulators(network, weights, trusted, kronecker, diagonal)
            with recorded(sums.recorded) as calls:
                raw = network.stateless(weights, joined(inputs))
            outputs, targets = likelihood.check(raw, targets)
            if not outputs.requires_grad:
                raise ShapeError(f"The output must depend on the {len(layout.names)} parameters given; it does not.")
            ignored = likelihood.any_ignored(targets)
            if ignored and sums.kronecker:
                raise ShapeError(
                    f"Every target must count in Kronecker factors; got ignored ones in batch {number}. Leave their "
                    "examples out, or take diagonals."
                )
            _require_finite(outputs, number)
            value = likelihood.log_likelihood(outputs, targets).item()
            if not abs(value) < float("inf"):
                raise NonFiniteError(f"The log-likelihood must be finite; got {value} in batch {number}.")
            counted = int(likelihood.examples(targets))
            num_seen, num_data, total = num_seen + len(outputs), num_data + counted, total + value
            first_of_several = not told_apart and num_seen > len(outputs) > 1  # one example is on every axis
            sound = _trusted(network, weights, list(sums.recorded.values()), inputs) if first_of_several else None
            told_apart = told_apart or len(outputs) > 1
            for name, layer in sums.recorded.items():
                if not _well_formed(layer, calls[name], len(outputs)) or (sound is not None and layer not in sound):
                    raise ShapeError(
                        f"Layer {name!r} must be called with all {len(outputs)} examples on the first axis in every "
                        f"batch, as it was in the first; it was not in batch {number}. Exclude it."
                    )
            sums.add_inputs(calls)
            end, scores = outputs, likelihood.scores(outputs, targets, labels, generator)
            rows = outputs.movedim(likelihood.feature_axis, -1)
            last = _last_layer(sums.recorded, calls, rows) if labels == "expected" and not ignored else None
            if last is not None:
                call = calls.pop(last)[0]
                sums.add_last(last, call, *likelihood.output_fisher(rows.flatten(0, -2)))
                if sums.examples is None:
                    weight = _fewer_inputs(sums.recorded[last], weights) if calls else None
                    if weight is not None and call.inputs.requires_grad and _is_unchanged(call, rows):
                        end, scores = call.inputs, _pulled_scores(likelihood, rows, weight)
                    elif not calls:
                        continue
            numbers = sum(call.output.numel() for each in calls.values() for call in each)
            for block in _blocks(scores, max(1, _NUMBERS_AT_ONCE // max(1, numbers))):
                sums.add_gradients(calls, _output_gradients(backward, end, block.to(end.dtype), calls))
                if sums.examples is not None:
                    for score in block:
                        sums.examples.add(inputs, score)
        if sums is None or not num_seen:
            raise ShapeError("The loader must give at least one example; got none (an exhausted iterator?).")
        if not num_data:
            raise ShapeError(f"A target of at least one example must count; all of the {num_seen} are ignored.")
        return sums.sums(num_data, total)


def _require_finite(outputs: Tensor, number: int) -> None:
    if not bool(outputs.detach().isfinite().all()):
        raise NonFiniteError(f"The network's outputs must be finite; got NaN or infinite ones in batch {number}.")


def _with_adjacent_bias(layer: Layer, layout: ParameterLayout) -> Layer:
    """Drop the bias unless it follows the weight in the layout: a block covers consecutive coordinates."""
    if layer.weight is None or layer.bias is None:
        return layer
    joint = layout.slices[layer.weight].stop == layout.slices[layer.bias].start
    return layer if joint else Layer(layer.name, layer.module, layer.weight, None)


def _blocks(scores: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield up to so many scores at a time, stacked."""
    remaining = iter(scores)
    while block := list(islice(remaining, size)):
        yield torch.stack(block)


def _output_gradients(
    backward: Backward, outputs: Tensor, scores: Tensor, calls: Mapping[str, Sequence[LayerCall]]
) -> dict[str, list[Tensor]]:
    """Return layer name to the gradients of ``sum(outputs * score)`` with respect to the output of each call.

    Args:
        backward: Differentiates.
        outputs: Of the network.
        scores: Shape ``(c, *outputs.shape)``, as the gradients ``(c, *output.shape)``.
        calls: Layer name to its calls.
    """
    reached = [call.output for each in calls.values() for call in each if call.output.requires_grad]
    found = backward([outputs], reached, [scores]) if reached else ()
    by_id = {id(output): gradient for output, gradient in zip(reached, found, strict=True)}

    def gradient_of(output: Tensor) -> Tensor:
        gradient = by_id.get(id(output))
        return output.new_zeros((len(scores), *output.shape)) if gradient is None else gradient

    return {name: [gradient_of(call.output) for call in each] for name, each in calls.items()}


def _last_layer(layers: Mapping[str, Layer], calls: Mapping[str, Sequence[LayerCall]], rows: Tensor) -> str | None:
    """Return the fully connected layer that gave the network's output, if one did: ``(*examples, o)``."""
    for name, layer in layers.items():
        each = calls[name]
        if isinstance(layer.module, nn.Linear) and len(each) == 1 and each[0].output.shape == rows.shape:
            pattern = torch.cos(torch.arange(rows.numel(), device=rows.device) + 1.0).to(rows.dtype).view(rows.shape)
            (moved,) = torch.autograd.grad(rows, each[0].output, pattern, retain_graph=True, allow_unused=True)
            if moved is not None and torch.equal(moved, pattern):  # what comes after it at most adds
                return name
    return None


def _is_unchanged(call: LayerCall, rows: Tensor) -> bool:
    """Whether a layer's result is the network's output itself, so that nothing else leads there."""
    result = call.result
    return result.data_ptr() == rows.data_ptr() and result.stride() == rows.stride() and not result._version


def _fewer_inputs(layer: Layer, weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return the weight ``(o, m)`` that a layer computes with, if m < o."""
    weight = layer.module._parameters.get("weight") if layer.weight is None else weights[layer.weight]
    return weight if weight is not None and weight.shape[1] < weight.shape[0] else None


def _pulled_scores(likelihood: OutputLikelihood, rows: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield gradients r ``(N, *positions, m)`` with respect to the inputs of the last layer, m for each position.

    Their sum r r' is W' E[s s'] W of each example at each position.
    """
    flat = rows.detach().flatten(1, -2) if rows.ndim > 2 else rows.detach().unsqueeze(1)
    for position in range(flat.shape[1]):
        values, vectors = eigh_psd(likelihood.pulled_fisher(flat[:, position], weight))
        for column in (vectors * values.sqrt().unsqueeze(1)).unbind(-1):
            score = column.new_zeros((*flat.shape[:2], column.shape[-1]))
            score[:, position] = column
            yield score.view(*rows.shape[:-1], -1)


def _trusted(
    network: FunctionalModel, weights: Mapping[str, Tensor], layers: Sequence[Layer], inputs: Any
) -> list[Layer]:
    """Return the layers whose rule gives the gradient that automatic differentiation gives, on one batch.

    Every other example gets a zero score, then the rest: a layer that has another axis first, or mixes the examples,
    shows gradients where there must be none.
    """
    with recorded({layer.name: layer for layer in layers}) as calls:
        outputs = network.stateless(weights, joined(inputs))
    if not isinstance(outputs, Tensor) or not outputs.requires_grad or not outputs.is_floating_point():
        return []  # the likelihood will say what is wrong with it
    _require_finite(outputs, 0)
    pattern = torch.cos(torch.arange(outputs.numel(), device=outputs.device) + 1.0)
    left = [layer for layer in layers if _well_formed(layer, calls[layer.name], len(outputs))]
    for parity in range(min(2, len(outputs))):
        zero = torch.arange(len(outputs), device=outputs.device) % 2 != parity
        scores = pattern.to(outputs.dtype).view(outputs.shape).clone()
        scores[zero] = 0
        own = {layer.name: calls[layer.name] for layer in left}
        blocks = _output_gradients(Backward(), outputs, scores.unsqueeze(0), own)
        gradients = {name: [block[0] for block in each] for name, each in blocks.items()}
        names = [name for layer in left for name in layer.parameters]
        wanted = [weights[name] for name in names]
        found = torch.autograd.grad(outputs, wanted, scores, retain_graph=True, allow_unused=True) if names else ()
        references = dict(zip(names, found, strict=True))
        left = [layer for layer in left if _agrees(layer, calls[layer.name], gradients[layer.name], references, zero)]
    return left


def _well_formed(layer: Layer, calls: Sequence[LayerCall], size: int) -> bool:
    axes = 4 if isinstance(layer.module, nn.Conv2d) else 2
    return bool(calls) and all(call.inputs.ndim >= axes and len(call.inputs) == size for call in calls)


def _agrees(
    layer: Layer,
    calls: Sequence[LayerCall],
    gradients: Sequence[Tensor],
    references: Mapping[str, Tensor | None],
    zero: Tensor,
) -> bool:
    for gradient in gradients:
        if bool(gradient[zero].norm() > _AGREEMENT * gradient.norm()):
            return False
    sums: dict[str, Tensor] = {}
    for part in layer_chunks(layer, gradients):
        for name, value in layer_example_gradients(layer, calls, gradients, part).items():
            sums[name] = sums[name] + value.sum(0) if name in sums else value.sum(0)
    for name, value in sums.items():
        reference = references[name]
        if reference is None or not bool((value - reference).norm() <= _AGREEMENT * reference.norm()):
            return False
    return True
