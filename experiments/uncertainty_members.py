"""The training runs that a comparison needs: ordinary runs of `experiments.train`, and finished ones opened again."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments import train, train_settings
from experiments.common import SettingsError, differences
from experiments.datasets import Datasets
from experiments.train_setup import make_trainer, network, try_model
from experiments.uncertainty_settings import SHARED, Settings, temperatures_of
from lowrank_bdl.models import MODELS

TrainSettings = train_settings.Settings
SEEDS_APART = 100  # member m of seed s is trained with seed 100 s + m: no two seeds share a network
STARTS_FROM = {"sgld": "swag", "sghmc": "swag", "mfvi": "swag"}  # the tempered kinds
PRINTED_SAMPLES = 2  # of the table that each training run ends with; the comparison draws its own


@dataclass(frozen=True, order=True)
class RunName:
    """One training run of a comparison.

    Attributes:
        kind: What is trained; see `flags_of`.
        seed: Of the comparison.
        member: Number in the ensemble, from 0.
        temperature: Of a kind in `STARTS_FROM`; 1 is the Bayes posterior.
    """

    kind: str
    seed: int
    member: int = 0
    temperature: float = 1.0

    @property
    def folder(self) -> str:
        colder = "" if self.temperature == 1 else f"-temperature{self.temperature:g}"
        return f"{self.kind}{colder}-seed{self.seed}-member{self.member}"

    @property
    def start(self) -> "RunName | None":
        """The run whose weights this one starts from."""
        kind = STARTS_FROM.get(self.kind)
        return None if kind is None else RunName(kind, self.seed, self.member)


def names_of(settings: Settings, kind: str, seed: int, many: bool) -> list[RunName]:
    """Name the runs of a kind: one, or all members of an ensemble; of a tempered kind one at each temperature."""
    if kind in STARTS_FROM:
        return [RunName(kind, seed, temperature=value) for value in temperatures_of(settings)]
    return [RunName(kind, seed, member) for member in range(settings.members if many else 1)]


def dropout_twin(settings: Settings) -> str:
    """Name the network with dropout.

    Raises:
        SettingsError: If --model has no twin of that name, and none is given.
    """
    if settings.dropout_model is not None:
        return settings.dropout_model
    own = str(settings.model)
    twin = own if own.endswith("Drop") else f"{own}Drop"
    if twin not in MODELS and twin != "SmallConvNetDrop":
        raise SettingsError(f"--dropout_model: there is no {twin}; name one with dropout, or leave its methods out")
    return twin


def flags_of(settings: Settings, name: RunName, num_data: int) -> dict[str, Any]:
    """Return what a run has of its own beside the shared recipe, seed and folder."""
    kind = name.kind
    chain = dict(
        epochs=settings.chain_epochs, swa=True, swa_start=settings.chain_burn_in, snapshots=True, no_schedule=True,
        collects_per_epoch=settings.chain_snapshots, lr_init=settings.chain_lr, temperature=name.temperature,
    )  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {
        "sgd": {},
        "swag": dict(swa=True, cov_mat=True, snapshots=True),
        "fge": dict(
            swa=True, snapshots=True, schedule="cyclical", swa_c_epochs=settings.fge_cycle, swa_lr=settings.fge_lr,
            cyclical_lr=settings.fge_min_lr, collects_per_epoch=1,
        ),
        "sgld": dict(chain, optimizer="SGLD"),
        "sghmc": dict(chain, optimizer="SGHMC"),
        "mfvi": dict(
            epochs=settings.vi_epochs, lr_init=settings.vi_lr, no_schedule=True, vi=True,
            vi_init_std=settings.vi_init_std, temperature=name.temperature,
            prior_std=(num_data * settings.wd) ** -0.5,
        ),
    }  # fmt: skip
    if kind in ("drop", "swagdrop"):
        own = dict(swa=True, cov_mat=True) if kind == "swagdrop" else {}
        return dict(own, model=dropout_twin(settings))
    return kinds[kind]


def member_settings(settings: Settings, name: RunName, folder: Path, num_data: int) -> TrainSettings:
    """Return the settings of one training run, as its own command line would give them.

    Args:
        settings: Of the comparison.
        name: Of the run.
        folder: Holds the folders of all runs.
        num_data: Number of training images.

    Raises:
        SettingsError: If the recipe cannot run.
    """
    values = {key: getattr(settings, key) for key in SHARED}
    values |= dict(
        dir=str(folder / name.folder), model=settings.model, seed=SEEDS_APART * name.seed + name.member, resume="auto",
        num_samples=PRINTED_SAMPLES, eval_freq=max(settings.epochs // 4, 1), save_freq=10**6,
    )  # fmt: skip
    values |= flags_of(settings, name, num_data)
    values["eval_freq"] = min(values["eval_freq"], values["epochs"])
    if name.start is not None:
        values["init_from"] = str(folder / name.start.folder)
    return train_settings.check(TrainSettings(**values))


def in_order(names: Iterable[RunName]) -> list[RunName]:
    """List runs without repetition, each after the one it starts from."""
    ordered: dict[RunName, None] = {}
    for name in names:
        if name.start is not None:
            ordered.setdefault(name.start)
        ordered.setdefault(name)
    return list(ordered)


def is_finished(settings: TrainSettings) -> bool:
    """Tell whether a run is there and complete.

    Raises:
        SettingsError: If the folder holds a run with other settings.
    """
    path = Path(settings.dir)
    try:
        old = json.loads((path / "settings.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.is_dir() and any(path.iterdir()):
            raise SettingsError(f"{path} holds files that are not a training run's; choose another --dir") from None
        return False
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {path / 'settings.json'}: {error}") from None
    changed = differences(settings, old)
    if old.get("epochs") != settings.epochs:
        changed = "; ".join(filter(None, [changed, f"epochs was {old.get('epochs')!r}, now {settings.epochs!r}"]))
    if changed:
        raise SettingsError(f"{path} is a run with other settings: {changed}; choose another --dir, or delete it")
    return (path / "results.json").exists()


def check_recipes(settings: Settings, names: Iterable[RunName], data: Datasets, device: torch.device) -> None:
    """Refuse a recipe that cannot run, before anything is written: one network of each kind is made and tried."""
    tried = set()
    for name in names:
        if name.kind in tried:
            continue
        tried.add(name.kind)
        own = member_settings(settings, name, Path(settings.dir), len(data.train))
        try_model(make_trainer(own, data, device).model, data)


class TrainedRun:
    """A finished run of `experiments.train`: its network, last weights, and what it collected.

    Args:
        path: The run's folder.
        data: Its data set.
        device: Where the network goes.

    Raises:
        SettingsError: If files are missing or damaged, or of another network.
    """

    def __init__(self, path: Path, data: Datasets, device: torch.device) -> None:
        self.path, self.settings = path, read_settings(path)
        if not (path / "results.json").exists():
            raise SettingsError(f"{path} is not finished: there is no results.json; go on with it first")
        self.trainer = make_trainer(self.settings, data, device)
        try:
            self.trainer.load(path / train.CHECKPOINT)
        except FileNotFoundError:
            raise SettingsError(f"{path}: there is no {train.CHECKPOINT}") from None
        except (lb.CheckpointError, OSError) as error:
            raise SettingsError(" ".join(str(error).split())) from None
        if self.trainer.epoch < self.settings.epochs:
            raise SettingsError(
                f"{path} is not finished: its checkpoint is of epoch {self.trainer.epoch} of {self.settings.epochs}"
            )

    @property
    def model(self) -> nn.Module:
        """The network; what a variational run wraps it in is taken off."""
        return network(self.trainer)

    @cached_property
    def layout(self) -> lb.ParameterLayout:
        return lb.ParameterLayout.from_module(self.model)

    @property
    def last(self) -> Tensor:
        """The last iterate, (D,)."""
        return self.layout.flatten(self.model)

    @property
    def swag(self) -> "lb.SWAG | None":
        collection = self.trainer.collections.get("swag")
        collector = None if collection is None else collection.collector
        return collector if isinstance(collector, lb.SWAG) else None

    @property
    def epochs(self) -> int:
        """Epochs of training behind the weights, those of the run it started from included."""
        start = self.settings.init_from
        return self.settings.epochs + (0 if start is None else read_settings(Path(start)).epochs)

    def posterior(self, file: str) -> Any:
        """Read a posterior that the run wrote, and see that it is of this network.

        Raises:
            SettingsError: If it is missing, damaged, or of another network.
        """
        try:
            return lb.load_posterior(self.path / file, self.layout)
        except FileNotFoundError:
            raise SettingsError(f"{self.path}: there is no {file}") from None
        except (lb.LowRankBDLError, OSError) as error:
            raise SettingsError(" ".join(str(error).split())) from None


def read_settings(path: Path) -> TrainSettings:
    """Read the settings of a run; flags that it did not know have their defaults.

    Raises:
        SettingsError: If there is no run, or one of another version.
    """
    record = path / "settings.json"
    try:
        found: Mapping[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"there is no run of experiments.train in {path} (settings.json is missing)") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {record}: {error}") from None
    try:
        return TrainSettings(**found)
    except TypeError as error:
        raise SettingsError(f"{record} is not of a run of experiments.train: {error}") from None
