"""What `experiments.subspace` compares: weights and posteriors, what each predicts, and how well."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lowrank_bdl as lb
from experiments.common import replacing
from experiments.evaluation import Predictions, average_curve, metrics_of, predict_splits
from experiments.subspace_settings import Settings, methods, subspaces
from experiments.subspace_sources import Bench
from experiments.uncertainty_settings import temperatures_of
from lowrank_bdl.subspaces.draws import Draws

BASELINES = ("SGD", "SWA")  # what differences are taken from
OF_ALL_TEMPERATURES = ("low_rank_gaussian",)
NORMAL_95 = 1.959964  # quantile of the normal law
ORDERS = 20  # of the samples, over which curves against their number are averaged


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        method: SGD, SWA or SWAG; or a method in a subspace.
        subspace: Its name.
        temperature: Of the likelihood; None where it plays no part.
    """

    method: str
    subspace: str | None = None
    temperature: float | None = None

    @property
    def name(self) -> str:
        """What tells it from the others; also its folder."""
        parts = [self.subspace, self.method, None if self.temperature is None else f"t{self.temperature:g}"]
        return "-".join(part for part in parts if part is not None)

    @property
    def label(self) -> str:
        """Name it as the table does."""
        shown = f", T = {self.temperature:g}" if self.temperature is not None else ""
        return self.method if self.subspace is None else f"{self.subspace} {self.method}{shown}"


def plan(settings: Settings, bench: Bench) -> list[Cell]:
    """Return the rows: baselines first, then every method in every subspace at every temperature."""
    found = [Cell(name) for name in BASELINES if name != "SGD" or bench.has_last]
    found.append(Cell("SWAG"))
    for temperature in temperatures_of(settings):
        for subspace in subspaces(settings):
            for method in methods(settings):
                found.append(Cell(method, subspace, None if method in OF_ALL_TEMPERATURES else temperature))
    return list(dict.fromkeys(found))


def baseline_weights(cell: Cell, bench: Bench) -> tuple[Any, lb.ParameterLayout, int]:
    """Return the weights or posterior of a baseline, what a vector holds, and how many samples it takes."""
    if cell.method == "SGD":
        assert bench.trained.last is not None, "planned only where there is one"
        return bench.trained.last, lb.ParameterLayout.from_module(bench.model), 1
    if cell.method == "SWA":
        return bench.trained.posterior.mean, bench.layout, 1
    settings = bench.settings
    return bench.trained.posterior, bench.layout, settings.predict_samples or settings.num_samples


def predict(bench: Bench, weights: Any, layout: lb.ParameterLayout, num_samples: int) -> Predictions:
    """Predict the images, batch norm recalibrated for every sample."""
    found = predict_splits(
        bench.model,
        weights,
        {bench.images: bench.split},
        bench.bn_images,
        num_samples=num_samples,
        seed=bench.settings.seed,
        layout=layout,
        bn_fraction=bench.settings.bn_subset,
    )
    return found[bench.images]


def measure(found: Predictions, seed: int) -> dict[str, Any]:
    """Measure predictions.

    Args:
        found: Of the images.
        seed: Of the orders of the samples.

    Returns:
        ``metrics`` and ``num_samples``; of several samples ``by_number``: NLL of the average of the first 1, 2, ... of
        them over orders (mean, 10 % and 90 % quantile) [nats].
    """
    assert found.sample_log_likelihood is not None
    number = len(found.sample_log_likelihood)
    result: dict[str, Any] = {"metrics": metrics_of(found, seed=seed), "num_samples": number}
    if number > 1:
        curve = average_curve(found.sample_log_likelihood, seed, ORDERS)
        result["by_number"] = dict(zip(("mean", "low", "high"), (values.tolist() for values in curve), strict=True))
    return result


def paired(own: Tensor, other: Tensor) -> dict[str, float]:
    """Compare two sets of predictions of the same images.

    Args:
        own: log p(target), (N,) [nats].
        other: Those of what is compared with.

    Returns:
        ``nll``, the mean over images of the NLL less that of the other, negative where this one is better; ``se``, its
        standard error; ``low`` and ``high``, the normal interval of 95 % [nats].
    """
    differences = other.double().cpu() - own.double().cpu()
    mean, error = differences.mean().item(), differences.std().item() / math.sqrt(len(differences))
    return {"nll": mean, "se": error, "low": mean - NORMAL_95 * error, "high": mean + NORMAL_95 * error}


def diagnostics(draws: Draws) -> dict[str, Any]:
    """Return what a method reports of itself, as JSON values; R-hat and effective sizes from 4 draws a chain on."""
    found: dict[str, Any] = {
        "method": draws.method,
        "chains": draws.num_chains,
        "draws": draws.num_samples,
        "rank": draws.rank,
        "evaluations": draws.num_evaluations,
        "seconds": draws.seconds,
        "mean": draws.mean.tolist(),
        "mean_log_joint": draws.log_joints.mean().item(),
        "settings": draws.settings,
    }
    if draws.num_samples > 1:
        found["std"] = draws.flat.std(0).tolist()
    if draws.num_samples >= 4:
        rhat, ess = draws.rhat(), draws.ess()
        found |= {"rhat": rhat.tolist(), "ess": ess.tolist(), "worst_rhat": rhat.max().item()}
        found["least_ess"] = ess.min().item()
    if draws.accept is not None:
        found["acceptance"] = draws.accept.mean().item()
    if draws.trace is not None:
        found["last_objective"] = draws.trace[-1].item()
    return found


def save_predictions(path: Path, found: Predictions, seed: int, samples: "Tensor | None") -> None:
    """Write ens.npz under drbayes's names, and ``log_likelihood``: log p(target) of each image [nats].

    ``ens_nll`` is the mean over images, where drbayes has their sum.
    """
    assert found.targets is not None and found.log_likelihood is not None
    probabilities, targets = found.probabilities.cpu().numpy(), found.targets.cpu().numpy()
    arrays: dict[str, Any] = {
        "seed": seed,
        "ens_predictions": probabilities,
        "targets": targets,
        "ens_acc": (probabilities.argmax(-1) == targets).mean(),
        "ens_nll": -found.log_likelihood.double().mean().item(),
        "log_likelihood": found.log_likelihood.cpu().numpy(),
    }
    if samples is not None:
        arrays["samples"] = samples.cpu().numpy()
    with replacing(path) as file:
        np.savez(file, **arrays)


def read_log_likelihood(path: Path) -> Tensor:
    """Read what `save_predictions` wrote of every image.

    Raises:
        OSError, ValueError, KeyError: If the file is missing or damaged.
    """
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["log_likelihood"])
