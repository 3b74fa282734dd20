"""Bayesian model averaging: predictions of one network under many weight vectors."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm
from lowrank_bdl.parameters.batches import CallFn, TargetFn, batches_of, targets_of, to_device
from lowrank_bdl.parameters.functional import FunctionalModel, evaluation_mode
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.likelihoods import Likelihood, resolve_likelihood
from lowrank_bdl.parameters.norm_layers import LayerSelector, warn_of_stored_statistics
from lowrank_bdl.parameters.sampled_network import SampledNetwork
from lowrank_bdl.prediction.averaging import BatchAverage, join
from lowrank_bdl.prediction.draws import SamplesWeights, require_samples, weight_vectors
from lowrank_bdl.prediction.dropout import DropoutMasks
from lowrank_bdl.prediction.predictive import Predictive
from lowrank_bdl.progress import progress_bar


@torch.no_grad()
def predict(
    model: nn.Module,
    posterior: "SamplesWeights | Tensor",
    loader: Iterable[Any],
    num_samples: int = 30,
    *,
    bn_loader: "Iterable[Any] | Literal['stored'] | None" = None,
    bn_fraction: float = 1.0,
    bn_exclude: "LayerSelector | None" = None,
    dropout: bool = False,
    vectorize: "bool | Literal['auto']" = "auto",
    chunk_size: int | None = None,
    likelihood: "str | Likelihood" = "categorical",
    noise_variance: "float | Tensor | None" = None,
    call_fn: CallFn | None = None,
    target_fn: TargetFn = targets_of,
    layout: ParameterLayout | None = None,
    generator: torch.Generator | None = None,
    max_bytes: int | None = None,
    keep_samples: bool = False,
    progress: bool = True,
) -> Predictive:
    r"""Average a network's predictions over a posterior, :math:`p(y \mid x) = \frac1S \sum_s p(y \mid x, \theta_s)`.

    The same S weight samples serve every batch, and the loader is read once, so a shuffling loader is as good as any.
    The network runs in evaluation mode; its weights, buffers and modes stay as they are, also after an error.

    A batch-normalised network needs statistics for each sample: give the training data as ``bn_loader``, which is
    read once for all samples (see :func:`~lowrank_bdl.parameters.batch_norm.recalibrate_batch_norm`). Without it the
    model's stored statistics are used, with a warning where they are of other weights; ``bn_loader="stored"`` does so
    on purpose.

    Each draw comes from a generator of its own, seeded from ``generator``. Draws that do not fit into ``max_bytes`` are
    made anew for every batch, with the same result to the last bit.

    With ``dropout`` the dropout layers stay random, with a fresh mask for every sample and every example; around one
    weight vector this is Monte Carlo dropout, around draws it adds to them. Masks are a function of ``generator``, the
    sample's number and the batch's.

    Args:
        model: The network.
        posterior: What draws weights: anything with ``sample(n, generator=)`` and ``layout``; one that also has
            ``draw(s, generator=)`` gives draw number s by it (a mixture: each component its share), one that has
            ``members(num)`` (an ensemble) is averaged over min(S, M) of its M members, once each. Or given weights,
            ``(D,)`` or ``(S, D)``, to average over: ``num_samples`` is not used, but for ``(D,)`` with dropout.
        loader: Batches ``(x, y)`` or ``x``, mappings (their entries without ``labels`` are keyword arguments, and the
            output is ``.logits``, as of Hugging Face's models), or whatever ``call_fn`` takes; tensors are moved to the
            model's device. A tuple ``(x, y)`` of tensors, or one mapping, is one batch.
        num_samples: S, the number of draws.
        bn_loader: Batches for the batch-norm statistics: training data, augmented as it was in training. Or
            ``"stored"``: those that the model has.
        bn_fraction: Fraction of ``bn_loader`` to use, in (0, 1]; below 1 its first batches only.
        bn_exclude: Batch norms that keep the model's statistics, such as those of a frozen backbone: a pattern for
            their names (``"backbone"``), several, or ``predicate(name, layer)``.
        dropout: Keep torch's dropout layers random; see above. Off while batch-norm statistics are computed.
        vectorize: ``True`` evaluates several weight vectors at once by ``torch.vmap`` (the same numbers up to
            rounding); ``"auto"`` does so where it was measured to be faster: small networks of linear layers on a CPU,
            whose time goes into starting operations. Convolutions are slower that way on a CPU.
        chunk_size: How many weight vectors at once; None goes by the size of the network's largest layer.
        likelihood: ``"categorical"`` (outputs are logits ``(N, C)``; targets of -100 count in no metric),
            ``"bernoulli"`` (a logit for each label, targets 0 or 1), ``"gaussian"`` (see
            :class:`~lowrank_bdl.parameters.likelihoods.GaussianLikelihood`), or a callable from the output to a
            ``torch.distributions`` object with one row an example.
        noise_variance: For ``"gaussian"``: the known noise variance [unit of y, squared]; None: the network gives it.
        call_fn: ``call_fn(model, batch)`` gives the output; None calls ``model(x)`` or ``model(**entries)``.
        target_fn: Takes the targets out of a batch, or gives None; the default knows ``(x, y)`` and mappings with an
            entry ``labels``, ``label``, ``targets`` or ``target``.
        layout: What the weight vectors hold; None takes the posterior's, or every trainable parameter.
        generator: Source of the seeds; None takes torch's global generator.
        max_bytes: Most memory for draws [bytes]; None allows a quarter of what is free. One draw is always held.
        keep_samples: Also return every sample's probabilities or means, S times the size of the mean.
        progress: Show progress bars.

    Returns:
        A :class:`~lowrank_bdl.prediction.predictive.Predictive`, on the model's device.

    Raises:
        ShapeError: If the loader is empty, or model, layout, posterior, outputs and targets do not fit together.
        NonFiniteError: If a sample's output is NaN, or a predicted variance is not > 0.
        ValueError: If the likelihood is unknown, the fraction is outside (0, 1], ``vectorize`` or ``chunk_size`` is
            wrong, or ``dropout`` is asked for and the model has none, or together with ``vectorize=True``.
        LowRankBDLError: If ``vectorize`` is True and the network cannot be evaluated several times at once.
        TypeError: If ``posterior`` neither draws weights nor is a tensor, or ``bn_loader`` has no length to take a
            fraction of.

    Warns:
        UserWarning: Once a call, if batch norms use statistics that were not computed for the weights.

    Cost: S forward passes over the loader, S over ``bn_loader``; memory of one forward pass, the kept draws and
    O(N (C + S)).

    Source: Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (2019), algorithm 1; mutual
    information as in Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning" (2011);
    dropout as in Gal and Ghahramani, "Dropout as a Bayesian approximation" (2016), eq. 6.

    In distributed training every process predicts for the batches that its own loader gives: the metrics of what it
    returns are of these alone. Gather log-likelihoods and targets, or give every process all data, for those of all.

    Example:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> thetas = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).log1p()
        >>> predict(net, thetas, [(torch.ones(1, 1), torch.tensor([1]))], progress=False).mean
        tensor([[0.3500, 0.6500]])
    """
    arguments = dict(locals())
    found = list(predict_batches(**arguments))
    return join([vars(part) for part in found], found[0].num_samples)


@exact
@torch.no_grad()
def predict_batches(
    model: nn.Module,
    posterior: "SamplesWeights | Tensor",
    loader: Iterable[Any],
    num_samples: int = 30,
    *,
    bn_loader: "Iterable[Any] | Literal['stored'] | None" = None,
    bn_fraction: float = 1.0,
    bn_exclude: "LayerSelector | None" = None,
    dropout: bool = False,
    vectorize: "bool | Literal['auto']" = "auto",
    chunk_size: int | None = None,
    likelihood: "str | Likelihood" = "categorical",
    noise_variance: "float | Tensor | None" = None,
    call_fn: CallFn | None = None,
    target_fn: TargetFn = targets_of,
    layout: ParameterLayout | None = None,
    generator: torch.Generator | None = None,
    max_bytes: int | None = None,
    keep_samples: bool = False,
    progress: bool = True,
) -> Iterator[Predictive]:
    """Predict like :func:`predict`, and give the average over the weight samples batch by batch.

    For what does not fit into memory as a whole: a probability for each of the classes of each pixel of a few hundred
    images is gigabytes, and what is measured on it a few numbers. The numbers are those of :func:`predict` to the last
    bit; its arguments, errors and sources are, too. Nothing happens before the first batch is asked for, and while a
    batch is the caller's the model is as it was.

    Yields:
        A :class:`~lowrank_bdl.prediction.predictive.Predictive` of each batch.

    Cost: S forward passes over the loader, S over ``bn_loader``; memory of one forward pass, the kept draws, and one
    batch's averages.

    Example:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> batches = [(torch.ones(1, 1), torch.tensor([1])), (torch.zeros(3, 1), torch.tensor([0, 1, 1]))]
        >>> thetas = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).log1p()
        >>> [len(part.mean) for part in predict_batches(net, thetas, batches, progress=False)]
        [1, 3]
    """
    rule = resolve_likelihood(likelihood, noise_variance)
    if layout is None and not isinstance(posterior, Tensor):
        layout = getattr(posterior, "layout", None)
    network = FunctionalModel(model, layout, call_fn)
    device = network.stateless.device
    weights = weight_vectors(
        posterior, num_samples, network.layout, generator=generator, max_bytes=max_bytes, device=device
    )
    masks = DropoutMasks(model, device, generator) if dropout else None
    repeats = 1  # of the same weights, under other masks
    if masks is not None and isinstance(posterior, Tensor) and posterior.ndim == 1:
        require_samples(num_samples)
        repeats = num_samples
    sampled = SampledNetwork(
        network,
        weights if repeats == 1 else tuple(weights) * repeats,
        masks=masks,
        vectorize=vectorize,
        chunk_size=chunk_size,
        plain=call_fn is None,
    )
    if isinstance(bn_loader, str) and bn_loader != "stored":
        raise ValueError(f"bn_loader must be batches, 'stored' or None; got {bn_loader!r}.")
    if bn_loader is None:
        warn_of_stored_statistics(network, weights, bn_exclude)
    elif not isinstance(bn_loader, str):
        buffers = recalibrate_batch_norm(
            model,
            weights,
            bn_loader,
            layout=network.layout,
            call_fn=call_fn,
            fraction=bn_fraction,
            bn_exclude=bn_exclude,
            progress=progress,
        )
        sampled.set_buffers({name: value.repeat_interleave(repeats, 0) for name, value in buffers.items()})
    number = 0
    for batch in progress_bar(batches_of(loader), description="predict", unit="batch", leave=False, show=progress):
        batch = to_device(batch, device) if device is not None else batch
        average = BatchAverage(number, target_fn(batch), keep_samples)
        with evaluation_mode(model), nullcontext() if masks is None else masks.switched_on():
            for outputs in sampled.outputs(number, batch):
                average.add(rule(outputs))
        yield join([average.finish()], len(weights) * repeats)
        number += 1
    if number == 0:
        raise ShapeError("The loader must give at least one batch; got none (an exhausted iterator?).")
