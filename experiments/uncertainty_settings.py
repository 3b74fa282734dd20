"""The flags of `experiments.uncertainty`: methods, data, budget, and the recipe as `experiments.train` has it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from experiments import train_settings
from experiments.common import SettingsError, require_at_least, require_positive, setting
from lowrank_bdl.models.registry import closest_first

REQUIRED: Any = dataclasses.MISSING
_TRAINING = {field.name: field for field in dataclasses.fields(train_settings.Settings)}

# Flags that mean what they mean in `experiments.train`, and are passed on to every training run.
SHARED = (
    "dataset", "data_path", "split_classes", "train_limit", "batch_size", "num_workers", "device", "threads", "amp",
    "channels_last", "epochs", "lr_init", "momentum", "wd", "augment", "swa_start", "swa_lr", "max_num_models",
    "collects_per_epoch", "bn_size", "checkpoint_freq",
)  # fmt: skip


def of_training(name: str, **changes: Any) -> Any:
    """Make the flag of that name as `experiments.train` has it, with another default (and help) if given."""
    field = _TRAINING[name]
    info = {key: value for key, value in changes.items() if key != "default"}
    return dataclasses.field(default=changes.get("default", field.default), metadata={**field.metadata, **info})


def _chosen(what: str, **options: Any) -> Any:
    return setting(None, f"{what} (default: chosen on the validation images)", kind=float, **options)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a comparison does; the recipe's defaults are LeNet5's on MNIST."""

    dir: str = setting("runs/uncertainty", "folder to write to; an earlier table and its cells are replaced", free=True)
    methods: str = setting("all", "methods, separated by commas; the two noise controls are always added", free=True)
    run: str | None = setting(
        None, "evaluate finished runs of experiments.train instead (folders separated by commas: an ensemble)", kind=str
    )
    seeds: int = setting(3, "seeds; each trains every network anew", free=True)
    first_seed: int = setting(1, "the first of them")
    members: int = setting(3, "networks of DeepEnsemble, MultiSWA and MultiSWAG; of one seed alone")
    members_from: str | None = setting(
        None, "folder of another comparison, whose networks are used (default: --dir)", kind=str, free=True
    )

    dataset: str | None = of_training("dataset", default=None, kind=str)
    model: str | None = setting(None, "network, such as LeNet5 or PreResNet20", kind=str)
    dropout_model: str | None = setting(None, "the same with dropout (default: --model with Drop)", kind=str)
    data_path: str | None = of_training("data_path")
    split_classes: int | None = of_training("split_classes")
    train_limit: int | None = of_training("train_limit")
    eval_limit: int | None = setting(None, "use so many validation and so many test images only", kind=int)
    ood: str = setting("auto", "foreign image sets, separated by commas; none; auto: those at hand, and noise")
    ood_limit: int = setting(10_000, "most images of a foreign set")
    batch_size: int = of_training("batch_size")
    num_workers: int = of_training("num_workers")
    device: str = of_training("device")
    threads: int = of_training("threads")
    amp: str = of_training("amp")
    channels_last: bool = of_training("channels_last")

    epochs: int = of_training("epochs", default=20, help="epochs of each run from scratch", free=False)
    lr_init: float = of_training("lr_init", default=0.05)
    momentum: float = of_training("momentum")
    wd: float = of_training("wd", default=5e-4, help="weight decay; also the prior of every Bayesian method")
    augment: str = of_training("augment")
    swa_start: int = of_training("swa_start", default=10)
    swa_lr: float = of_training("swa_lr", default=0.01)
    max_num_models: int = of_training("max_num_models")
    collects_per_epoch: int = of_training("collects_per_epoch")
    bn_size: int | None = of_training("bn_size")
    checkpoint_freq: int = of_training("checkpoint_freq")
    fge_cycle: int = setting(2, "FGE: epochs of a cycle, even")
    fge_lr: float = setting(0.02, "FGE: highest learning rate of a cycle")
    fge_min_lr: float = setting(1e-4, "FGE: lowest, where a snapshot is taken")
    chain_epochs: int = setting(5, "SGLD, SGHMC: epochs after the SWA run they start from")
    chain_burn_in: int = setting(1, "SGLD, SGHMC: the first of these epochs, without snapshots")
    chain_snapshots: int = setting(4, "SGLD, SGHMC: snapshots an epoch")
    chain_lr: float = setting(0.01, "SGLD, SGHMC: step size")
    temperature: str = setting(
        "1,0.1,0.01",
        "SGLD, SGHMC, MFVI: temperatures, separated by commas; 1 is the Bayes posterior, less a colder one. Of several "
        "the one with the lowest validation NLL is taken, after a run at each",
    )
    vi_epochs: int = setting(5, "MFVI: epochs after the SWA run it starts from")
    vi_lr: float = setting(1e-3, "MFVI: learning rate of the means (Adam)")
    vi_init_std: float = setting(0.01, "MFVI: standard deviation of every weight to begin with")

    num_samples: int = setting(30, "networks in a model average; of an ensemble all it has")
    scale: float | None = _chosen("SWAG: multiplies its covariance; 0.5 is the published law, 1.0 of SWAG-Diag")
    noise_std: float | None = _chosen("HomoNoise: standard deviation of every weight")
    noise_fraction: float | None = _chosen("NaiveNoise: standard deviation of a weight as a fraction of it")
    prior_precision: float | None = _chosen("Laplace: precision of the prior, in place of images x --wd")
    tune_samples: int = setting(10, "networks in the model averages that a level is chosen by")
    labels: str = setting("sampled", "Laplace: labels behind the Fisher", choices=("sampled", "true", "expected"))
    save_predictions: bool = setting(False, "also write cells/METHOD-SEED.npz: probabilities, targets", free=True)
    resume: bool = setting(False, "go on with the comparison in --dir, whose finished cells are kept", free=True)


def seeds_of(settings: Settings) -> range:
    return range(settings.first_seed, settings.first_seed + settings.seeds)


def names(text: str) -> tuple[str, ...]:
    """Split a list of names at its commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def temperatures_of(settings: Settings) -> tuple[float, ...]:
    """Return the temperatures to run at.

    Raises:
        SettingsError: If there is none, or one is no positive number, or is there twice.
    """
    try:
        found = tuple(map(float, names(settings.temperature)))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found) or not all(0 < value < math.inf for value in found):
        raise SettingsError(f"--temperature must list positive numbers, each once; got {settings.temperature!r}")
    return found


def runs_of(settings: Settings) -> tuple[str, ...]:
    """Return the folders of --run; none if the networks are trained here."""
    return () if settings.run is None else names(settings.run)


def find_names(flag: str, text: str, known: tuple[str, ...], what: str) -> list[str]:
    """Return the asked for among the known names, each once and in the order of the known.

    Raises:
        SettingsError: If one is unknown or there is none; the message starts with the closest.
    """
    asked = list(known) if text == "all" else list(names(text))
    for name in asked:
        if name not in known:
            closest = ", ".join(closest_first(name, dict.fromkeys(known)))
            raise SettingsError(f"--{flag}: unknown {what} {name!r}; known are {closest}")
    if not asked or len(set(asked)) < len(asked):
        raise SettingsError(f"--{flag} must name at least one {what}, and each once; got {text!r}")
    return [name for name in known if name in asked]


def check(settings: Settings) -> Settings:
    """Refuse what cannot run; the recipe itself is checked with the training runs that it makes.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    at_least = dict(
        seeds=1, first_seed=0, members=2, num_samples=1, tune_samples=1, ood_limit=1, eval_limit=2, chain_epochs=1,
        chain_burn_in=0, chain_snapshots=1, vi_epochs=1, fge_cycle=2, fge_min_lr=0, swa_start=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    positive = (
        "wd", "fge_lr", "chain_lr", "vi_lr", "vi_init_std", "scale", "noise_std", "noise_fraction",
        "prior_precision",
    )  # fmt: skip
    require_positive(settings, positive)
    temperatures_of(settings)
    if settings.members > 100:
        raise SettingsError(f"--members must be at most 100; got {settings.members}")
    if settings.run is None:
        for name in ("dataset", "model"):
            if getattr(settings, name) is None:
                raise SettingsError(f"--{name} is needed, unless --run names finished runs")
        if settings.chain_burn_in >= settings.chain_epochs:
            raise SettingsError(
                f"--chain_burn_in must be less than --chain_epochs; got {settings.chain_burn_in} and "
                f"{settings.chain_epochs}"
            )
    elif not runs_of(settings):
        raise SettingsError(f"--run must name at least one folder; got {settings.run!r}")
    else:
        for name in ("dataset", "model", "dropout_model", "split_classes", "train_limit", "members_from"):
            if getattr(settings, name) is not None:
                raise SettingsError(f"--{name} and --run exclude each other: the run has its own")
    return settings
