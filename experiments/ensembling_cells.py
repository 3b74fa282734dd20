"""The posteriors that `experiments.ensembling` compares, and what each of them predicts."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.common import SettingsError
from experiments.datasets import Datasets
from experiments.evaluation import average_curve, classification_metrics, has_batch_norm
from experiments.train import SNAPSHOTS
from experiments.train_setup import augmentation
from experiments.training_data import AsTrained
from experiments.uncertainty_members import TrainedRun

PARTS = ("samples", "scale", "rank", "bn", "noise", "snapshots")
OF_SWA = 0  # batches for batch norm that stand for: the statistics of the SWA mean, whatever the weights
ORDERS = 20  # of the samples, over which curves against their number are averaged


@dataclass(frozen=True)
class Cell:
    """One posterior, or one set of weight vectors, that is evaluated.

    Attributes:
        method: SGD, SWA, SWAG, SWAG-Diag or NaiveNoise; Snapshots, the average over the iterates; SWA-path, the running
            mean after each of them.
        level: Factor of the covariance, or level of the noise.
        rank: Deviations.
        first: Iterates that it is made from; None is all of them.
        bn_batches: Batches that batch norm is recalibrated on; None is all of them. See `OF_SWA`.
    """

    method: str
    level: float | None = None
    rank: int | None = None
    first: int | None = None
    bn_batches: int | None = None

    @property
    def name(self) -> str:
        """What tells it from the others; also a file name."""
        parts = {"level": self.level, "rank": self.rank, "first": self.first, "bn": self.bn_batches}
        return "-".join([self.method, *(f"{key}{value:g}" for key, value in parts.items() if value is not None)])


@dataclass(frozen=True)
class Grids:
    """What is varied, and what stays where another thing is; see the flags of `experiments.ensembling`."""

    scale: float
    scales: Sequence[float]
    ranks: Sequence[int]
    noise: float
    noise_levels: Sequence[float]
    bn_points: int
    snapshot_points: int


class Options(Protocol):
    """The settings that a prediction depends on."""

    eval_limit: int | None
    num_samples: int
    bn_size: int | None
    batch_size: int
    bn_batch_size: int
    seed: int


class Bench:
    """A finished run with the images that are predicted.

    Args:
        run: The run.
        data: Its data set.
        images: "validation" or "test".
        options: Settings.

    Raises:
        SettingsError: If the run has collected too little, or its iterates are damaged or of another network.
    """

    def __init__(self, run: TrainedRun, data: Datasets, images: str, options: Options) -> None:
        self.run, self.data, self.images, self.options = run, data, images, options
        if run.swag is None or run.swag.n_averaged < 2:
            raise SettingsError(f"--run {run.path}: SWAG needs a run with --swa and at least 2 snapshots")
        self.swag = run.swag
        split = getattr(data, images)
        self.split = split if options.eval_limit is None else split.first(min(options.eval_limit, len(split)))
        wanted = run.settings.bn_size if options.bn_size is None else options.bn_size
        size = len(data.train) if wanted is None else min(wanted, len(data.train))
        self.bn_images = AsTrained(data.train.first(size), *augmentation(run.settings), data.black)
        self.iterates = self._read_iterates()

    def _read_iterates(self) -> "Tensor | None":
        """Return the collected iterates (M, D), if the run kept them."""
        if not self.run.settings.snapshots:
            return None
        try:
            found = lb.EmpiricalPosterior.load(self.run.path / SNAPSHOTS, self.swag.layout)
        except FileNotFoundError:
            raise SettingsError(f"--run {self.run.path}: there is no {SNAPSHOTS}") from None
        except (lb.LowRankBDLError, OSError) as error:
            raise SettingsError(f"--run: {' '.join(str(error).split())}") from None
        return found.thetas.to(self.swag.mean)

    @property
    def normalized(self) -> bool:
        """Whether the network has batch norm."""
        return has_batch_norm(self.run.model)

    @property
    def bn_loader(self) -> Any:
        return self.bn_images.batches(self.options.bn_batch_size)

    @property
    def rank(self) -> int:
        """Deviations that there are."""
        return min(self.swag.rank, self.swag.n_averaged)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that name the weights by their content."""
        found = hashlib.blake2b(digest_size=8)
        for tensor in (self.run.last, self.swag.mean, self.swag.variance, self.swag.deviations):
            found.update(tensor.detach().cpu().float().contiguous().numpy().data)
        return found.hexdigest()

    @cached_property
    def at_swa(self) -> nn.Module:
        """The network at the SWA mean, with the batch-norm statistics of that mean."""
        model = self._with(self.swag.mean)
        lb.recalibrate_batch_norm_(model, self.bn_loader)
        return model

    @cached_property
    def swa_nll(self) -> Tensor:
        """NLL of the SWA mean for each image, (N,) float64 [nats]."""
        return -predict(self, Cell("SWA")).log_likelihood.double()

    def _with(self, theta: Tensor) -> nn.Module:
        """Return a copy of the network with other weights."""
        model = copy.deepcopy(self.run.model)
        self.swag.layout.assign_(model, theta)
        return model

    def weights(self, cell: Cell) -> tuple[Any, lb.ParameterLayout]:
        """Return the posterior of a cell, or its weights (D,) or (S, D), and what a vector of it holds."""
        layout = self.swag.layout
        if cell.method == "SGD":
            return self.run.last, self.run.layout
        if cell.method == "SWA":
            return self.swag.mean, layout
        if cell.method == "NaiveNoise":
            assert cell.level is not None
            return lb.relative_noise(self.swag.mean, cell.level, layout), layout
        if cell.method in ("SWAG", "SWAG-Diag"):
            assert cell.level is not None
            return self._collector(cell.first).posterior(scale=cell.level, rank=cell.rank, copy=True), layout
        assert self.iterates is not None, "planned only where there are any"
        if cell.method == "Snapshots":
            return self.iterates, layout
        count = torch.arange(1, len(self.iterates) + 1, dtype=torch.float64, device=self.iterates.device)
        return (self.iterates.double().cumsum(0) / count.unsqueeze(-1)).to(self.iterates.dtype), layout

    def _collector(self, first: int | None) -> lb.SWAG:
        """Return what has collected the first iterates only; None is all of them."""
        if first is None:
            return self.swag
        assert self.iterates is not None
        model = copy.deepcopy(self.run.model)
        include = self.run.settings.include
        swag = lb.SWAG(model, self.swag.rank, include=None if include is None else include.split(","))
        for theta in self.iterates[:first]:
            self.swag.layout.assign_(model, theta)
            swag.update_parameters(model)
        return swag


def plan(parts: Sequence[str], grids: Grids, bench: Bench) -> dict[str, list[Cell]]:
    """Return the cells of each part that the run has the files for; parts share cells."""
    full = Cell("SWAG" if bench.rank else "SWAG-Diag", grids.scale, bench.rank)
    diagonal, noise = Cell("SWAG-Diag", 1.0, 0), Cell("NaiveNoise", grids.noise)
    average = [full, diagonal, noise]
    found = {"samples": average}
    if bench.normalized:
        found["samples"] = average + [Cell(c.method, c.level, c.rank, bn_batches=OF_SWA) for c in average]
        batches = np.unique(np.geomspace(1, len(bench.bn_loader), grids.bn_points).round().astype(int)).tolist()
        partial = [Cell(full.method, full.level, full.rank, bn_batches=n) for n in batches[:-1]]
        found["bn"] = [Cell(full.method, full.level, full.rank, bn_batches=OF_SWA), *partial, full]
    found["scale"] = [Cell("SWAG", scale, bench.rank) for scale in grids.scales if bench.rank]
    found["scale"] += [Cell("SWAG-Diag", scale, 0) for scale in grids.scales]
    ranks = sorted({rank for rank in grids.ranks if rank <= bench.rank} | {bench.rank})
    found["rank"] = [Cell("SWAG" if rank else "SWAG-Diag", grids.scale, rank) for rank in ranks]
    found["noise"] = [Cell("NaiveNoise", level) for level in grids.noise_levels]
    if bench.iterates is not None:
        counts = np.unique(np.geomspace(2, len(bench.iterates), grids.snapshot_points).round().astype(int)).tolist()
        fitted = [Cell("SWAG", grids.scale, min(bench.swag.rank, n), first=n) for n in counts]
        fitted[-1] = full if counts[-1] == bench.swag.n_averaged else fitted[-1]
        found["snapshots"] = [Cell("Snapshots"), Cell("SWA-path"), *fitted]
    lines = {"lines": [Cell("SGD"), Cell("SWA")]}
    return lines | {part: found[part] for part in parts if part in found}


def predict(bench: Bench, cell: Cell) -> lb.Predictive:
    """Predict the images with one cell, every sample's probabilities kept."""
    weights, layout = bench.weights(cell)
    options = bench.options
    model, fraction = bench.run.model, 1.0
    loader: Any = bench.bn_loader if bench.normalized else None
    if loader is not None and cell.bn_batches == OF_SWA:
        model, loader = bench.at_swa, "stored"
    elif loader is not None and cell.bn_batches is not None:
        fraction = (cell.bn_batches - 0.5) / len(loader)  # rounded up
    return lb.predict(
        model,
        weights,
        bench.split.batches(options.batch_size),
        num_samples=options.num_samples,
        bn_loader=loader,
        bn_fraction=fraction,
        layout=layout,
        generator=torch.Generator().manual_seed(options.seed),
        keep_samples=True,
        progress=False,
    )


def evaluate(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Predict the images with one cell, and measure how well.

    Returns:
        Metrics with their standard errors, and ``difference``: mean over the images of NLL less that of the SWA mean,
        with the standard error of that mean [nats]. Of several weight vectors also ``by_number``: NLL [nats] and
        accuracy of the average of the first 1, 2, ... of them (`mean`, and 10 % and 90 % quantile over orders, `low`
        and `high`; the iterates in their own order only). Of SWA-path ``by_number`` alone, of each vector by itself.
    """
    found = predict(bench, cell)
    seed, per_sample = bench.options.seed, found.sample_log_likelihood
    assert found.targets is not None and per_sample is not None and found.sample_means is not None
    result: dict[str, Any] = {"num_samples": found.num_samples}
    if cell.method == "SWA-path":
        right = (found.sample_means.argmax(-1) == found.targets).double().mean(1)
        nll = -per_sample.double().mean(1)
        return result | {"by_number": {"nll": {"mean": nll.tolist()}, "accuracy": {"mean": right.tolist()}}}
    result["metrics"] = classification_metrics(found.mean, found.targets, found.log_likelihood, seed=seed)
    difference = -found.log_likelihood.double() - bench.swa_nll
    result["difference"] = {"nll": difference.mean().item(), "se": difference.std().item() / len(difference) ** 0.5}
    if cell.method == "Snapshots":
        accuracy = accuracy_in_order(found.sample_means, found.targets, torch.arange(found.num_samples))
        nll = found.nll_by_num_samples
        result["by_number"] = {"nll": {"mean": nll.tolist()}, "accuracy": {"mean": accuracy.tolist()}}
    elif found.num_samples > 1:
        nll_curve = average_curve(per_sample, seed, ORDERS)
        accuracies = accuracy_curve(found.sample_means, found.targets, seed, ORDERS)
        result["by_number"] = {
            name: dict(zip(("mean", "low", "high"), (values.tolist() for values in curve), strict=True))
            for name, curve in (("nll", nll_curve), ("accuracy", accuracies))
        }
    return result


def accuracy_in_order(probabilities: Tensor, targets: Tensor, order: Tensor) -> Tensor:
    """Accuracy of the average of the first 1, 2, ..., S samples in this order, (S,) float64.

    Args:
        probabilities: Of each sample, (S, N, C).
        targets: Class indices (N,).
        order: A permutation of the samples.
    """
    total = torch.zeros_like(probabilities[0], dtype=torch.float64)
    found = []
    for s in order.tolist():
        total += probabilities[s]
        found.append((total.argmax(-1) == targets).double().mean())
    return torch.stack(found).cpu()


def accuracy_curve(
    probabilities: Tensor, targets: Tensor, seed: int, orders: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy against the number of samples: mean, 10 % and 90 % quantile over orders, as `average_curve` has it."""
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(len(probabilities), generator=generator) for _ in range(orders)]
    found = torch.stack([accuracy_in_order(probabilities, targets, order) for order in permutations]).numpy()
    return found.mean(0), np.quantile(found, 0.1, axis=0), np.quantile(found, 0.9, axis=0)
