"""Predictions, densities and pictures of one posterior: what the experiments measure on a network with batch norm."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.common import peak_memory
from experiments.data import ImageData, Split


@dataclass(frozen=True)
class Evaluation:
    """What one method predicts.

    Attributes:
        metrics: For "validation", "test" and "shifted" (the test images turned by 90 degrees): accuracy, nll [nats],
            ece, brier; for "test" also shift_auroc, how well predictive entropy tells shifted from test images.
        probabilities: Of the test images, (N, C).
        targets: Of the test images, (N,).
        sample_log_likelihood: log p(y | x, weights) of the test images, (S, N) [nats].
    """

    metrics: dict[str, dict[str, float]]
    probabilities: Tensor
    targets: Tensor
    sample_log_likelihood: Tensor


def evaluate_method(model: nn.Module, weights: Any, data: ImageData, *, num_samples: int, seed: int) -> Evaluation:
    """Predict with a posterior or with one weight vector (D,), batch norm recalibrated for each set of weights."""
    splits = {"validation": data.validation, "test": data.test, "shifted": data.test.rotated()}
    prediction = lb.predict(
        model,
        weights,
        # one pass over all images, so that the same weight samples see them and batch norm is recalibrated once
        Split.concatenate(splits.values()).batches(500),
        num_samples=num_samples,
        bn_loader=data.train.batches(500),
        generator=torch.Generator().manual_seed(seed),
    )
    sizes = [len(split) for split in splits.values()]
    probabilities = dict(zip(splits, prediction.mean.split(sizes), strict=True))
    entropy = dict(zip(splits, prediction.entropy.split(sizes), strict=True))
    log_likelihood = dict(zip(splits, prediction.log_likelihood.split(sizes), strict=True))
    metrics = {}
    for name, split in splits.items():
        metrics[name] = {
            "accuracy": lb.metrics.accuracy(probabilities[name], split.targets),
            "nll": -log_likelihood[name].double().mean().item(),
            "ece": lb.metrics.ece(probabilities[name], split.targets),
            "brier": lb.metrics.brier(probabilities[name], split.targets),
        }
    metrics["test"]["shift_auroc"] = lb.metrics.auroc(entropy["test"], entropy["shifted"])
    of_samples = dict(zip(splits, prediction.sample_log_likelihood.split(sizes, dim=1), strict=True))
    return Evaluation(metrics, probabilities["test"], data.test.targets, of_samples["test"])


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
    model: nn.Module, posterior: Any, units: Tensor, stddevs: list[float], steps: np.ndarray, data: ImageData
) -> dict[str, np.ndarray]:
    """Mean NLL (rays, steps) of the training and test images at mean + step x std x unit, batch norm recalibrated."""
    found = {}
    limit = 2000  # images; a smooth picture needs no more
    along = torch.as_tensor(steps, dtype=posterior.mean.dtype, device=posterior.mean.device)
    for split, images in (("train", data.train.first(limit)), ("test", data.test.first(limit))):
        losses = []
        for unit, stddev in zip(units, stddevs, strict=True):
            thetas = posterior.mean + stddev * along.unsqueeze(-1) * unit
            bn_loader = data.train.first(limit).batches(500)
            prediction = lb.predict(model, thetas, images.batches(500), bn_loader=bn_loader, progress=False)
            losses.append(-prediction.sample_log_likelihood.mean(-1).cpu().numpy())
        found[split] = np.stack(losses)
    return found
