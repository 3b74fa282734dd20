"""Where a comparison takes images and networks from: trained here, or finished runs that --run names."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

import lowrank_bdl as lb
from experiments import train
from experiments.common import SettingsError
from experiments.datasets import NOISE, Datasets, LabelledImages, foreign_images, load_dataset
from experiments.models import build_model
from experiments.uncertainty_cells import ImageSets
from experiments.uncertainty_members import (
    RunName,
    TrainedRun,
    TrainSettings,
    check_recipes,
    in_order,
    is_finished,
    member_settings,
    names_of,
    read_settings,
)
from experiments.uncertainty_methods import CONTROLS, METHODS, lacks, runs_needed
from experiments.uncertainty_settings import Settings, find_names, names, runs_of

OTHER_CLASSES = "other-classes"
# Foreign sets of --ood auto, if their files are at hand: none shares a class with the data set.
FOREIGN = {
    "MNIST": ("FashionMNIST", "CIFAR10"), "FashionMNIST": ("MNIST", "CIFAR10"), "digits": ("FashionMNIST", "CIFAR10"),
    "SVHN": ("CIFAR10",), "CIFAR10": ("SVHN", "MNIST"), "CIFAR100": ("SVHN", "MNIST"), "STL10": ("SVHN", "MNIST"),
}  # fmt: skip


def load_data(settings: Settings, device: torch.device) -> Datasets:
    """Load what the networks are trained on, the validation images held out of it, and the test images."""
    return load_dataset(
        str(settings.dataset),
        settings.data_path,
        use_test=True,
        validation=True,
        split_classes=settings.split_classes,
        train_limit=settings.train_limit,
        num_workers=settings.num_workers,
        device=device,
    )


def load_data_of_run(run: TrainSettings, settings: Settings, device: torch.device) -> Datasets:
    """Load the data of a finished run, and the test images; validation images only if it did not train on them."""
    return load_dataset(
        run.dataset,
        settings.data_path or run.data_path,
        use_test=True,
        validation=not run.use_test,
        split_classes=run.split_classes,
        label_arr=run.label_arr,
        train_limit=run.train_limit,
        num_workers=settings.num_workers,
        device=device,
    )


def image_sets(settings: Settings, data: Datasets, device: torch.device) -> ImageSets:
    """Gather what every method predicts.

    Raises:
        SettingsError: If a foreign set is unknown, or its files are missing.
    """
    labelled = {"validation": data.validation, "test": data.test}
    limit = settings.eval_limit
    return ImageSets(
        {k: v if limit is None else v.first(min(limit, len(v))) for k, v in labelled.items() if v is not None},
        foreign_sets(settings, data, device),
    )


def foreign_sets(settings: Settings, data: Datasets, device: torch.device) -> dict[str, LabelledImages]:
    """Load the foreign sets by name; of a data set that is split, the other classes too."""
    found: dict[str, LabelledImages] = {}
    split = data.details.get("split_classes")
    if split is not None and settings.ood != "none":
        other = load_dataset(data.name, settings.data_path, use_test=True, split_classes=1 - split, device=device).test
        assert other is not None
        found[OTHER_CLASSES] = other.first(min(settings.ood_limit, len(other)))
    if settings.ood == "none":
        return found
    asked = (*FOREIGN.get(data.name, ()), NOISE) if settings.ood == "auto" else names(settings.ood)
    for name in asked:
        try:
            found[name] = foreign_images(name, data, settings.data_path, settings.ood_limit)
        except SettingsError as error:
            if settings.ood != "auto":
                raise SettingsError(f"--ood {name}: {error}") from None
    return found


def with_controls(settings: Settings) -> list[str]:
    """Name the methods: those asked for, and the noise controls, which every table has."""
    asked = find_names("methods", settings.methods, tuple(METHODS), "method")
    return [name for name in METHODS if name in asked or name in CONTROLS]


class Networks:
    """Gives the training runs that a method starts from; see `Trained` and `Given`."""

    def find(self, kind: str, seed: int, many: bool) -> list[TrainedRun]:
        raise NotImplementedError


class Trained(Networks):
    """Runs that are trained here, in folders of their own, with the recipe of the comparison.

    Args:
        settings: Of the comparison.
        data: Its images.
        device: Where networks go.

    Raises:
        SettingsError: If there is no such network.
    """

    def __init__(self, settings: Settings, data: Datasets, device: torch.device) -> None:
        self.settings, self.data, self.device = settings, data, device
        self.folder = Path(settings.members_from or settings.dir) / "members"
        self._open: dict[RunName, TrainedRun] = {}
        with torch.device("meta"):  # a network that does not exist is refused by its own name, not by its twin's
            build_model(str(settings.model), data.num_classes, channels=data.channels, image_size=data.image_size)

    def of(self, name: RunName) -> TrainSettings:
        return member_settings(self.settings, name, self.folder, len(self.data.train))

    def check(self, cells: Sequence[tuple[str, int]]) -> list[RunName]:
        """Refuse what cannot be trained or read; return the runs that are left to train, in their order.

        Args:
            cells: Methods and seeds that are left to evaluate.

        Raises:
            SettingsError: If a recipe cannot run, or a folder holds a damaged run, or one with other settings.
        """
        needed = in_order(name for method, seed in cells for name in self.needed(method, seed))
        todo = [name for name in needed if not is_finished(self.of(name))]
        if todo and self.settings.members_from is not None:
            raise SettingsError(f"--members_from {self.settings.members_from}: there is no finished {todo[0].folder}")
        check_recipes(self.settings, todo, self.data, self.device)
        for method, seed in cells:
            for name in self.needed(method, seed):
                if name not in todo:
                    self._read(name, METHODS[method].file)
        return todo

    def needed(self, method: str, seed: int) -> list[RunName]:
        return runs_needed(self.settings, [method], [seed])

    def _read(self, name: RunName, file: str | None = None) -> TrainedRun:
        run = TrainedRun(self.folder / name.folder, self.data, self.device)
        if file is not None:
            run.posterior(file)
        return run

    def train(self, name: RunName) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            train.work(self.of(name))
        except (SettingsError, lb.NonFiniteError) as error:
            raise SettingsError(f"{name.folder}: {error}") from None

    def find(self, kind: str, seed: int, many: bool) -> list[TrainedRun]:
        wanted = names_of(self.settings, kind, seed, many)
        for name in [name for name in self._open if name.seed != seed]:
            del self._open[name]  # one seed after another: no more networks in memory than one needs
        for name in wanted:
            if name not in self._open:
                self._open[name] = self._read(name)
        return [self._open[name] for name in wanted]


class Given(Networks):
    """Finished runs: whatever a method starts from, it takes them.

    Args:
        settings: Of the comparison; --run names the folders.
        data: The images of the first.
        device: Where networks go.

    Raises:
        SettingsError: If a run is unfinished or damaged, or they are not of one network and one data set.
    """

    def __init__(self, settings: Settings, data: Datasets, device: torch.device) -> None:
        self.runs = [TrainedRun(Path(path), data, device) for path in runs_of(settings)]
        first = self.runs[0].settings
        for run in self.runs[1:]:
            for name in ("dataset", "model", "split_classes", "train_limit", "use_test", "label_arr"):
                ours, own = getattr(first, name), getattr(run.settings, name)
                if ours != own:
                    raise SettingsError(f"--run: {name} of {run.path} is {own!r}, and of {self.runs[0].path} {ours!r}")

    def find(self, kind: str, seed: int, many: bool) -> list[TrainedRun]:
        return self.runs if many else self.runs[:1]

    def methods(self, settings: Settings, data: Datasets) -> list[str]:
        """Name the methods that the runs have the files for.

        Raises:
            SettingsError: If one that is asked for lacks something, or a level can be neither chosen nor taken.
        """
        asked = with_controls(settings)
        missing = {name: what for name in asked if (what := lacks(name, self.runs)) is not None}
        missing |= {name: what for name in asked if name not in missing and (what := _unchosen(name, settings, data))}
        for name, what in missing.items():
            if settings.methods != "all" or name in CONTROLS:
                raise SettingsError(f"--methods: {name} needs {what}, which {self.runs[0].path} has not")
        found = [name for name in asked if name not in missing]
        for file in {METHODS[name].file for name in found} - {None}:
            self.runs[0].posterior(str(file))
        return found


def _unchosen(name: str, settings: Settings, data: Datasets) -> str | None:
    level = METHODS[name].level
    if level is None or data.validation is not None or (level != "validation" and getattr(settings, level) is not None):
        return None
    given = "" if level == "validation" else f" or --{level}"
    return f"validation images (a run without --use_test){given}"


def open_networks(
    settings: Settings, device: torch.device
) -> tuple[Networks, Datasets, list[str], "TrainSettings | None"]:
    """Find images and networks; return them with the methods, and the settings of the first run of --run."""
    if settings.run is None:
        data = load_data(settings, device)
        return Trained(settings, data, device), data, with_controls(settings), None
    first = read_settings(Path(runs_of(settings)[0]))
    data = load_data_of_run(first, settings, device)
    given = Given(settings, data, device)
    return given, data, given.methods(settings, data), first


def limited(data: Datasets, sets: ImageSets) -> Datasets:
    """Return the data with the validation images that --eval_limit leaves."""
    held_out = sets.labelled.get("validation")
    return dataclasses.replace(data, validation=held_out)  # type: ignore[arg-type]
