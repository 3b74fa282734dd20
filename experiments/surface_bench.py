"""What `experiments.plane` and `experiments.width` evaluate: a network, its images, and weights to start from."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from experiments.common import RunDir, SettingsError, fixed
from experiments.curve_bench import digest_of, read_values, write_values
from experiments.datasets import Datasets
from experiments.evaluation import BN_BATCH_SIZE, has_batch_norm
from experiments.subspace_sources import Bench as RunBench
from experiments.surface_settings import SurfaceSettings
from experiments.train_setup import bn_images
from experiments.uncertainty_members import TrainSettings
from lowrank_bdl.surfaces.evaluation import PointValues, evaluate_points


@dataclass(frozen=True)
class Bench:
    """Network and images.

    Attributes:
        settings: Of the script.
        recipe: How the network was trained.
        model: The network; parameters that the layout leaves out are its own.
        layout: What a weight vector holds.
        data: The data set.
        shown: Name of the images to test on.
    """

    settings: SurfaceSettings
    recipe: TrainSettings
    model: nn.Module
    layout: lb.ParameterLayout
    data: Datasets
    shown: str

    @property
    def images(self) -> dict[str, Any]:
        """Batches of the images to evaluate on, by name: training images, which are not augmented, first."""
        settings = self.settings
        limits = {"train": settings.train_limit, self.shown: settings.eval_limit}
        splits = {name: getattr(self.data, name) for name in limits}
        kept = {name: images.first(min(limits[name] or len(images), len(images))) for name, images in splits.items()}
        return {name: images.batches(settings.batch_size) for name, images in kept.items()}

    @property
    def options(self) -> dict[str, Any]:
        """How points are evaluated."""
        loader = bn_images(self.recipe, self.data).batches(BN_BATCH_SIZE) if has_batch_norm(self.model) else None
        return {"layout": self.layout, "bn_loader": loader, "bn_fraction": self.settings.bn_subset}

    @property
    def title(self) -> str:
        return f"{self.recipe.model} on {self.data.name}"


def of_run(settings: SurfaceSettings, found: RunBench) -> Bench:
    """Return the network and the images of a run that `experiments.subspace` has opened."""
    return Bench(settings, found.trained.settings, found.model, found.layout, found.data, found.images)


def last_weights(found: RunBench) -> "Tensor | None":
    """Return the coordinates of the last iterate that the layout holds, (D,); None if the run has none."""
    theta, whole = found.trained.last, lb.ParameterLayout.from_module(found.model)
    if theta is None or whole.numel == found.layout.numel:
        return theta
    return found.layout.flatten(whole.unflatten(theta))


class Kept:
    """Values at points in a file, so that a killed run goes on from there.

    Args:
        run: Folder of the run.
        name: Of what is evaluated; the file is values-NAME.npz.
        points: Coordinates, M on the first axis.
        weights: Vectors that the values depend on.
    """

    def __init__(self, run: RunDir, name: str, points: Tensor, weights: list[Tensor]) -> None:
        self.path, self.points = run.path / f"values-{name}.npz", points.cpu()
        self.identity = json.dumps([fixed(run.settings), digest_of([points.double(), *weights])])
        self.known = read_values(self.path, self.identity) if run.settings.resume else None

    def write(self, values: Mapping[str, PointValues]) -> None:
        """Write what is known so far."""
        write_values(self.path, self.identity, self.points, values)


def evaluate(
    bench: Bench, run: RunDir, name: str, points: Tensor, surface: Any, weights: list[Tensor]
) -> dict[str, PointValues]:
    """Evaluate the network at points of a surface, going on with what an earlier part of the run has evaluated.

    Args:
        bench: Network and images.
        run: Folder of the run.
        name: Of what is evaluated.
        points: Coordinates, M on the first axis.
        surface: What they are coordinates of.
        weights: Vectors that the surface is made of.

    Returns:
        The values by name of the images, each (M,), on the CPU.
    """
    kept = Kept(run, name, points, weights)
    return evaluate_points(
        bench.model,
        points,
        bench.images,
        cross_entropy,
        surface=surface,
        known=kept.known,
        on_values=kept.write,
        **bench.options,
    )


def at_weights(bench: Bench, thetas: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return loss and error of named weight vectors, such as `train_loss` and `test_error`."""
    if not thetas:
        return {}
    points = torch.stack(list(thetas.values()))
    values = evaluate_points(bench.model, points, bench.images, cross_entropy, progress=False, **bench.options)
    found: dict[str, dict[str, float]] = {name: {} for name in thetas}
    for images, measured in values.items():
        for row, name in enumerate(thetas):
            found[name][f"{images}_loss"] = measured.loss[row].item()
            found[name][f"{images}_error"] = measured.error[row].item()
    return found


def finish(run: RunDir, experiment: Callable[[], str]) -> str:
    """Do the work of a script in its folder, now that everything is checked; return what to print.

    Raises:
        SettingsError: If the library refuses something.
    """
    run.begin()
    try:
        return f"{experiment()}\n\nwritten to {run.path}"
    except lb.LowRankBDLError as error:
        raise SettingsError(" ".join(str(error).split())) from None


def run_folder(path: str) -> Path:
    """Return the folder of a run that was given by its folder or by a file in it."""
    return Path(path) if Path(path).is_dir() else Path(path).parent
