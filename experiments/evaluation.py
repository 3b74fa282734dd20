"""Predictions, densities and pictures of one posterior: what the experiments measure on a network with batch norm."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import lowrank_bdl as lb
from experiments.common import peak_memory

METRICS = ("accuracy", "nll", "ece", "brier")
BN_BATCH_SIZE = 500  # batch norm is recalibrated with the statistics of batches: large ones


class Images(Protocol):
    """Labelled images that can be iterated in order, such as a `Split`."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]: ...


@torch.no_grad()
def validate(model: nn.Module, images: Images, batch_size: int = 1000) -> dict[str, float]:
    """Mean negative log-likelihood [nats] and accuracy with the model's own batch-norm statistics."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    for inputs, targets in images.batches(batch_size):
        logits = model(inputs.to(sums.device))
        targets = targets.to(sums.device)
        right = (logits.argmax(-1) == targets).sum()
        sums += torch.stack([cross_entropy(logits, targets, reduction="sum").double(), right.double()])
    model.train(was_training)
    nll, accuracy = (sums / len(images)).tolist()
    return {"nll": nll, "accuracy": accuracy}


def classification_metrics(
    probabilities: Tensor, targets: Tensor, log_likelihood: Tensor, *, resamples: int = 100, seed: int = 0
) -> dict[str, float]:
    """Accuracy, NLL [nats], ECE (15 bins) and Brier score of N predictions, each with its standard error.

    Means over images have their usual standard error. The ECE is no mean: its error is the standard deviation over
    resamples of the images (bootstrap), which is that of the estimate, not of its bias.

    Args:
        probabilities: Shape (N, C).
        targets: Class indices (N,).
        log_likelihood: log p(target), (N,) [nats]; from probabilities alone it would be -inf where they underflow.
        resamples: Number of resamples.
        seed: Seed of the resamples.
    """
    count = len(targets)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(count, (count,), generator=generator).to(targets.device) for _ in range(resamples))
    eces = torch.tensor([lb.metrics.ece(probabilities[draw], targets[draw]) for draw in draws], dtype=torch.float64)
    each = {
        "accuracy": (probabilities.argmax(-1) == targets).double(),
        "nll": -log_likelihood.double(),
        "brier": (probabilities.double() - one_hot(targets, probabilities.shape[-1])).square().sum(-1),
    }
    found = {
        "accuracy": lb.metrics.accuracy(probabilities, targets),
        "nll": each["nll"].mean().item(),
        "ece": lb.metrics.ece(probabilities, targets),
        "brier": lb.metrics.brier(probabilities, targets),
        "ece_se": eces.std().item(),
    }
    return found | {f"{name}_se": values.std().item() / count**0.5 for name, values in each.items()}


@dataclass(frozen=True)
class Evaluation:
    """What one method predicts on each split.

    Attributes:
        metrics: `classification_metrics` of each split.
        probabilities: Of each split, (N, C).
        targets: Of each split, (N,).
        entropy: Of each split's predictions, (N,) [nats].
        sample_log_likelihood: log p(y | x, weights) of each split, (S, N) [nats].
    """

    metrics: dict[str, dict[str, float]]
    probabilities: dict[str, Tensor]
    targets: dict[str, Tensor]
    entropy: dict[str, Tensor]
    sample_log_likelihood: dict[str, Tensor]


@dataclass(frozen=True)
class Predictions:
    """What a model average says about one set of images.

    Attributes:
        probabilities: Shape (N, C).
        entropy: Of the probabilities, (N,) [nats].
        targets: Class indices (N,); None for images of other classes.
        log_likelihood: log p(target), (N,) [nats]; None for images of other classes.
        sample_log_likelihood: log p(target | weights), (S, N) [nats]; None for images of other classes.
    """

    probabilities: Tensor
    entropy: Tensor
    targets: Tensor | None = None
    log_likelihood: Tensor | None = None
    sample_log_likelihood: Tensor | None = None

    def rescaled(self, temperature: "lb.TemperatureScaling") -> "Predictions":
        """Return the predictions at another temperature; what single samples say is left out."""
        probabilities = temperature(self.probabilities)
        entropy = torch.special.entr(probabilities.double()).sum(-1).to(probabilities.dtype)
        if self.targets is None:
            return Predictions(probabilities, entropy)
        # where probabilities underflow the logarithm of the scaled one is that of the scaler, not log 0
        log_likelihood = temperature.log_likelihood(self.probabilities, self.targets)
        return Predictions(probabilities, entropy, self.targets, log_likelihood)


class _OneAfterAnother:
    """The batches of several sets, so that the same weight samples see all of them in one pass."""

    def __init__(self, labelled: Iterable[Images], foreign: Iterable[Images], batch_size: int) -> None:
        self.labelled = [images.batches(batch_size) for images in labelled]
        self.foreign = [images.batches(batch_size) for images in foreign]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from chain.from_iterable(self.labelled)
        for inputs, targets in chain.from_iterable(self.foreign):
            yield inputs, torch.zeros_like(targets)  # their classes may be none of the network's; nothing is made of it


def predict_splits(
    model: nn.Module,
    weights: Any,
    labelled: Mapping[str, Images],
    bn_images: Images,
    *,
    foreign: Mapping[str, Images] | None = None,
    num_samples: int,
    seed: int,
    layout: lb.ParameterLayout | None = None,
    batch_size: int = 125,
    **options: Any,
) -> dict[str, Predictions]:
    """Predict several sets of images with the same weight samples, batch norm recalibrated for each of them.

    Args:
        model: The network; weights that the layout leaves out are its own.
        weights: A posterior, or given weights (D,) or (S, D).
        labelled: Images of the network's classes, by name.
        bn_images: What batch norm is recalibrated on: training images, augmented as they were trained on.
        foreign: Images of other classes, by name.
        num_samples: Weight samples of a posterior.
        seed: Seed of the weight samples.
        layout: What a weight vector holds; None for all trainable parameters.
        batch_size: Images in a batch of what is predicted; the default fits a processor's caches (PreResNet20 is 1.5
            times as fast as with 500).
        **options: More for `lowrank_bdl.predict`.
    """
    foreign = foreign or {}
    prediction = lb.predict(
        model,
        weights,
        _OneAfterAnother(labelled.values(), foreign.values(), batch_size),
        num_samples=num_samples,
        bn_loader=bn_images.batches(BN_BATCH_SIZE) if has_batch_norm(model) else None,
        layout=layout,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    sizes = [len(images) for images in (*labelled.values(), *foreign.values())]

    def parts(values: Tensor | None, dim: int = 0) -> tuple[Tensor, ...]:
        assert values is not None, "labelled images give every prediction"
        return values.split(sizes, dim)

    each = zip(
        (*labelled, *foreign),
        parts(prediction.mean),
        parts(prediction.entropy),
        parts(prediction.targets),
        parts(prediction.log_likelihood),
        parts(prediction.sample_log_likelihood, dim=1),
        strict=True,
    )
    return {name: Predictions(*values) if name in labelled else Predictions(*values[:2]) for name, *values in each}


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def evaluate_method(
    model: nn.Module,
    weights: Any,
    splits: Mapping[str, Images],
    bn_images: Images,
    *,
    num_samples: int,
    seed: int,
    layout: lb.ParameterLayout | None = None,
    batch_size: int = 125,
) -> Evaluation:
    """Predict with a posterior or with one weight vector (D,), and measure how well; see `predict_splits`.

    Args:
        model: The network.
        weights: The posterior or the vector.
        splits: What to predict, by name.
        bn_images: What batch norm is recalibrated on.
        num_samples: Weight samples of a posterior.
        seed: Seed of the weight samples and of the resamples behind standard errors.
        layout: What a weight vector holds.
        batch_size: Images in a batch of what is predicted.
    """
    found = predict_splits(
        model, weights, splits, bn_images, num_samples=num_samples, seed=seed, layout=layout, batch_size=batch_size
    )

    def each(field: str) -> dict[str, Tensor]:
        return {name: getattr(predictions, field) for name, predictions in found.items()}

    return Evaluation(
        {name: metrics_of(predictions, seed=seed) for name, predictions in found.items()},
        each("probabilities"),
        each("targets"),
        each("entropy"),
        each("sample_log_likelihood"),
    )


def metrics_of(predictions: Predictions, *, seed: int = 0) -> dict[str, float]:
    """`classification_metrics` of labelled predictions."""
    assert predictions.targets is not None and predictions.log_likelihood is not None
    return classification_metrics(predictions.probabilities, predictions.targets, predictions.log_likelihood, seed=seed)


def detection_metrics(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """How well predictive entropy tells foreign images, the positives, from the test images.

    Args:
        inside: Entropy of the predictions for the test images, (N,) [nats].
        outside: Entropy of those for the foreign ones, (M,) [nats].

    Returns:
        Areas under the ROC curve and under precision against recall, false positives where 95 % are found, and the
        symmetric Kullback-Leibler divergence of the SWAG paper between the two histograms [nats].
    """
    return {
        "auroc": lb.metrics.auroc(inside, outside),
        "aupr": lb.metrics.average_precision(inside, outside),
        "fpr95": lb.metrics.false_positive_rate(inside, outside),
        "divergence": lb.metrics.histogram_divergence(inside, outside),
    }


def describe_posterior(posterior: Any, *, num_samples: int, seed: int) -> dict[str, Any]:
    """Density, entropy and memory of a posterior; each log-density in nats, each size in bytes."""
    device = posterior.mean.device

    def use() -> tuple[float, Tensor]:
        draws = posterior.sample(num_samples, generator=torch.Generator(device).manual_seed(seed))
        return posterior.entropy().item(), posterior.log_prob(draws)

    (entropy, log_density), peak = peak_memory(use, device)
    return {
        "parameters": posterior.mean.numel(),
        "rank": posterior.covariance.rank,
        "entropy_nats": entropy,
        "log_density_at_mean_nats": posterior.log_prob(posterior.mean).item(),
        "log_density_of_draws_nats": log_density.mean().item(),
        "mean_std": posterior.stddev.double().mean().item(),
        "peak_bytes": peak,
    }


def average_curve(log_likelihood: Tensor, seed: int, orders: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NLL of the average of the first s samples, s = 1 to S: mean, 10 % and 90 % quantile over orders of the samples.

    Args:
        log_likelihood: log p(y | x, weights), shape (S, N) [nats].
        seed: Seed of the orders.
        orders: Number of orders.

    Returns:
        Three arrays (S,) [nats].
    """
    generator = torch.Generator().manual_seed(seed)
    log_likelihood = log_likelihood.cpu().double()
    count = torch.arange(1, len(log_likelihood) + 1, dtype=torch.float64)
    curves = []
    for _ in range(orders):
        order = torch.randperm(len(log_likelihood), generator=generator)
        average = log_likelihood[order].logcumsumexp(0) - count.log().unsqueeze(-1)
        curves.append(-average.mean(-1))
    found = torch.stack(curves).numpy()
    return found.mean(0), np.quantile(found, 0.1, axis=0), np.quantile(found, 0.9, axis=0)


def rays(posterior: Any, seed: int, num_components: int = 3) -> tuple[Tensor, list[float], list[str]]:
    """Unit vectors (R, D), standard deviation of the posterior along each, and their names.

    The leading principal components of the low-rank part, and a random direction to compare with.
    """
    covariance, mean = posterior.covariance, posterior.mean
    rank = min(num_components, covariance.rank)
    _, directions = covariance.principal_components(rank, of="low_rank")
    random = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
    units = torch.cat([directions.mT, (random / random.norm()).unsqueeze(0)])
    stddevs = (units * (covariance @ units.mT).mT).sum(-1).sqrt().tolist()
    return units, stddevs, [*(f"component {i + 1}" for i in range(rank)), "random direction"]


def losses_along_rays(
    model: nn.Module,
    posterior: Any,
    units: Tensor,
    stddevs: list[float],
    steps: np.ndarray,
    splits: Mapping[str, Images],
    bn_images: Images,
) -> dict[str, np.ndarray]:
    """Mean NLL (rays, steps) of each split at mean + step x std x unit, batch norm recalibrated."""
    found = {}
    along = torch.as_tensor(steps, dtype=posterior.mean.dtype, device=posterior.mean.device)
    for name, images in splits.items():
        losses = []
        for unit, stddev in zip(units, stddevs, strict=True):
            thetas = posterior.mean + stddev * along.unsqueeze(-1) * unit
            bn_loader = bn_images.batches(500)
            prediction = lb.predict(model, thetas, images.batches(500), bn_loader=bn_loader, progress=False)
            losses.append(-prediction.sample_log_likelihood.mean(-1).cpu().numpy())
        found[name] = np.stack(losses)
    return found
