"""What `experiments.subspace` starts from: a network, its images, and the weights that training left behind."""

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.common import SettingsError
from experiments.datasets import Datasets
from experiments.ensembling import load_data
from experiments.evaluation import BN_BATCH_SIZE, has_batch_norm
from experiments.subspace_settings import Settings
from experiments.train import SNAPSHOTS
from experiments.train_setup import augmentation, make_model
from experiments.training_data import AsTrained
from experiments.uncertainty_members import TrainedRun, TrainSettings, read_settings

P = TypeVar("P")


@dataclass(frozen=True)
class Trained:
    """Weights that training left behind.

    Attributes:
        settings: Of the training run; of a posterior by itself those that its network is made of.
        model: The network; weights that the posterior leaves out are its own.
        posterior: SWAG at the scale of --scale, or what the file holds.
        collector: What has collected it; None for a file.
        last: The last iterate (D,) of all weights; None for a file.
        iterates: (M, D), if the run kept them.
    """

    settings: TrainSettings
    model: nn.Module
    posterior: lb.GaussianPosterior
    collector: "lb.SWAG | None" = None
    last: "Tensor | None" = None
    iterates: "Tensor | None" = None

    @property
    def layout(self) -> lb.ParameterLayout:
        """What a vector of the posterior holds."""
        assert self.posterior.layout is not None, "checked when it was read"
        return self.posterior.layout


class Bench:
    """Weights with the images that they are used on.

    Args:
        trained: The weights.
        data: The data set.
        images: "validation" or "test": what is predicted.
        settings: Of the script.
    """

    def __init__(self, trained: Trained, data: Datasets, images: str, settings: Settings) -> None:
        self.trained, self.data, self.images, self.settings = trained, data, images, settings
        split = getattr(data, images)
        self.split = split if settings.eval_limit is None else split.first(min(settings.eval_limit, len(split)))
        limit = len(data.train) if settings.train_limit is None else min(settings.train_limit, len(data.train))
        self.train = data.train.first(limit)
        self.bn_images = AsTrained(data.train, *augmentation(trained.settings), data.black)

    @property
    def model(self) -> nn.Module:
        return self.trained.model

    @property
    def layout(self) -> lb.ParameterLayout:
        return self.trained.layout

    @property
    def normalized(self) -> bool:
        """Whether the network has batch norm."""
        return has_batch_norm(self.model)

    @property
    def bn_loader(self) -> Any:
        return self.bn_images.batches(BN_BATCH_SIZE)

    @property
    def batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The images of the log-joint, without augmentation."""
        return self.train.batches(self.settings.batch_size)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that name the weights by their content."""
        found = hashlib.blake2b(digest_size=8)
        covariance = self.trained.posterior.covariance
        for tensor in (self.trained.posterior.mean, covariance.diagonal(), *((self.trained.last,) * self.has_last)):
            found.update(tensor.detach().cpu().float().contiguous().numpy().data)
        return found.hexdigest()

    @property
    def has_last(self) -> bool:
        return self.trained.last is not None

    def network_at(self, theta: Tensor) -> nn.Module:
        """Return a copy of the network at other weights, with batch-norm statistics that belong to them."""
        model = copy.deepcopy(self.model)
        self.layout.assign_(model, theta)
        if self.normalized:
            lb.recalibrate_batch_norm_(model, self.bn_loader, fraction=self.settings.bn_subset)
        return model


def open_bench(settings: Settings, device: torch.device) -> Bench:
    """Read weights and data; nothing is written.

    Raises:
        SettingsError: If something is missing, damaged, or of another network.
    """
    if settings.run is None:
        own = TrainSettings(
            dir="", model=str(settings.model), dataset=str(settings.dataset), data_path=settings.data_path,
            use_test=settings.use_test, split_classes=settings.split_classes, seed=settings.seed,
        )  # fmt: skip
        data, images = load_data(settings, own, device)
        return Bench(_of_file(str(settings.file), own, data, device), data, images, settings)
    own = read_settings(Path(settings.run))
    data, images = load_data(settings, own, device)
    return Bench(_of_run(TrainedRun(Path(settings.run), data, device), settings), data, images, settings)


def _of_run(run: TrainedRun, settings: Settings) -> Trained:
    swag = run.swag
    if swag is None or swag.n_averaged < 2:
        raise SettingsError(f"--run {run.path}: a subspace needs a run with --swa and at least 2 snapshots")
    iterates = None
    if run.settings.snapshots:
        file = str(run.path / SNAPSHOTS)
        iterates = read_posterior("--run", file, swag.layout, lb.EmpiricalPosterior, swag.mean.device).thetas
    posterior = swag.posterior(scale=settings.scale)
    return Trained(run.settings, run.model, posterior, swag, run.last, iterates)


def _of_file(file: str, settings: TrainSettings, data: Datasets, device: torch.device) -> Trained:
    model = make_model(settings, data, device)
    found = read_posterior("--file", file, lb.ParameterLayout.from_module(model), lb.GaussianPosterior, device)
    return Trained(settings, model, found)


def read_posterior(flag: str, file: str, layout: lb.ParameterLayout, kind: type[P], device: torch.device) -> P:
    """Read a posterior of one class.

    Raises:
        SettingsError: If the file is missing, damaged, of another network, or holds something else; names the flag.
    """
    try:
        found = lb.load_posterior(file, layout, device=device)
    except FileNotFoundError:
        raise SettingsError(f"{flag} {file}: there is no such file") from None
    except (lb.LowRankBDLError, OSError) as error:
        raise SettingsError(f"{flag}: {' '.join(str(error).split())}") from None
    if not isinstance(found, kind):
        raise SettingsError(f"{flag} {file} must hold a {kind.__name__}; got {type(found).__name__}")
    return found
