"""The flags of `experiments.uci`, and what they stand for on each data set."""

import dataclasses
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from experiments.common import SettingsError, require_at_least, require_fraction, require_positive, setting
from experiments.uci_data import STANDARD
from experiments.uci_training import Candidate, Recipe
from experiments.uncertainty_settings import find_names, names

METHODS = ("SGD", "SWA", "SWAG", "PCA+ESS", "PCA+VI", "PCA+NUTS", "neural-linear", "GP")
RELEASED_INFERENCE = {"low_rank_gaussian": "SWAG", "ess": "PCA+ESS", "vi": "PCA+VI", "nuts": "PCA+NUTS"}
SMALL = 600  # rows up to which batches are smaller, as published
LARGE, HUGE = 2000, 6000  # rows above which networks are deeper
SMALL_NET, LARGE_NET, HUGE_NET = (50,), (1000, 500, 50), (1000, 1000, 500, 50)


@dataclass(frozen=True)
class Preset:
    """Defaults for data sets of a size, the same for all of them: what is chosen is chosen for each split.

    Attributes:
        batch_size: Rows in a batch.
        epochs: Passes over the rows.
        lr: Learning rates to choose from.
        wd: Weight decays.
        collected: Rates of the epochs whose weights are collected, over the learning rate; 1 is as published.
    """

    batch_size: int
    epochs: int
    lr: tuple[float, ...]
    wd: tuple[float, ...]
    collected: tuple[float, ...] = (0.01, 0.1, 1.0)


TINY_PRESET = Preset(batch_size=30, epochs=300, lr=(1e-2,), wd=(1e-3, 1e-2, 2e-2, 4e-2))
SMALL_PRESET = dataclasses.replace(TINY_PRESET, batch_size=100)
LARGE_PRESET = Preset(batch_size=400, epochs=100, lr=(3e-4, 1e-3, 3e-3), wd=(1e-4, 1e-3))
HUGE_PRESET = dataclasses.replace(LARGE_PRESET, batch_size=200, epochs=200)


def _by_size(what: str, kind: type) -> Any:
    return setting(None, f"{what} (default: by number of rows)", kind=kind)


def _searched(what: str) -> Any:
    return setting(
        None, f"{what}; of several, separated by commas, one is chosen (default: by number of rows)", kind=str
    )


def _tuned(what: str) -> Any:
    return setting(None, f"{what} (default: chosen on the validation rows)", kind=float)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does."""

    dir: str = setting("runs/uci", "folder to write to; an earlier run's files are replaced", free=True)
    data_path: str | None = setting(
        None, "folder with NAME.npz, or with folders NAME of text files", kind=str, free=True, alias="--database_path"
    )
    dataset: str = setting("all", f"data sets, separated by commas; all: {', '.join(STANDARD)}", free=True)
    splits: str = setting("0-19", "splits, such as 0-19 or 3,5,7", free=True, alias="--split")
    methods: str = setting("all", f"of {', '.join(METHODS)}, separated by commas", free=True)
    inference: str | None = setting(
        None, "one method, by its released name, with SGD", choices=tuple(RELEASED_INFERENCE), kind=str, free=True
    )
    jobs: int = setting(1, "splits at once, each in a process of its own", free=True)
    threads: int = setting(1, "CPU threads of each", free=True)
    seed: int = setting(0, "of initial weights, batches, folds and draws; with the split's number")
    normalize: str = setting(
        "train", "rows that means and variances are of; all: the test rows too, as released", choices=("train", "all")
    )

    model: str = setting("RegNet", "network: ReLU, with a mean and a variance as outputs", choices=("RegNet",))
    uci_small: bool = setting(False, "one hidden layer of 50 units, however many rows", alias="--uci-small")
    model_variance: bool = setting(False, "the variance depends on the input: so it does unless --noise_var is alone")
    noise_var: bool = setting(False, "without --model_variance: one variance for all inputs, learned")

    epochs: int | None = _by_size("epochs", int)
    batch_size: int | None = _by_size("rows in a batch", int)
    lr_init: str | None = _searched("learning rate")
    wd: str | None = _searched("weight decay")
    momentum: float = setting(0.9, "of SGD")
    clip: float = setting(10.0, "largest norm of the gradient")
    double_bias_lr: bool = setting(False, "twice the learning rate for biases", alias="--double-bias-lr")
    swag_start: int | None = setting(None, "epochs before the first snapshot (default: half of them)", kind=int)
    swag_lr: str | None = setting(
        None,
        "rate of the epochs with a snapshot, reached at 90 %% of those before; of several, separated by commas, one is "
        "chosen (default: --lr_init, a tenth and a hundredth of it)",
        kind=str,
    )
    no_schedule: bool = setting(False, "keep the rate at --lr_init, as published")
    max_num_models: int = setting(20, "deviations kept")
    rank: int | None = setting(None, "directions of the subspace (default: all that there are)", kind=int)
    folds: int = setting(3, "parts of the training rows that validate one after the other")

    num_samples: int = setting(30, "weight samples in a prediction")
    scale: float | None = _tuned("SWAG: multiplies its covariance; 0.5 is the published law")
    temperature: float | None = _tuned("PCA+...: what the log-likelihood is divided by")
    prior_std: float | None = _tuned("PCA+...: of the prior of every coordinate, which SWAG's law gives 1")
    tune_samples: int = setting(20, "weight samples in the predictions that these are chosen by")
    chains: int = setting(4, "PCA+ESS: chains side by side")
    burn_in: int = setting(50, "PCA+ESS: steps of each chain that are thrown away")
    thin: int = setting(5, "PCA+ESS: steps for each draw")
    vi_steps: int = setting(200, "PCA+VI: steps of Adam")
    nuts_warmup: int = setting(30, "PCA+NUTS: steps that adapt step size and masses")
    nuts_depth: int = setting(5, "PCA+NUTS: at most 2 to this power gradients for a draw")
    gp_rows: int = setting(2000, "GP: most training rows; of more so many are drawn")
    gp_steps: int = setting(80, "GP: steps of Adam on the marginal likelihood")
    resume: bool = setting(False, "go on with the run in --dir, whose finished cells are kept", free=True)


def methods_of(settings: Settings) -> list[str]:
    """Return the methods asked for, in the order of the table.

    Raises:
        SettingsError: If one is unknown.
    """
    if settings.inference is not None:
        return ["SGD", RELEASED_INFERENCE[settings.inference]]
    return find_names("methods", settings.methods, METHODS, "method")


def datasets_of(settings: Settings) -> list[str]:
    """Return the names of the data sets asked for."""
    asked = list(STANDARD) if settings.dataset == "all" else list(names(settings.dataset))
    if not asked or len(set(asked)) < len(asked):
        raise SettingsError(f"--dataset must name at least one data set, and each once; got {settings.dataset!r}")
    return asked


def splits_of(settings: Settings) -> list[int]:
    """Return the numbers of ``0-19`` or ``3,5,7``.

    Raises:
        SettingsError: If the text says no splits, or one twice.
    """
    found: list[int] = []
    for part in names(settings.splits):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise SettingsError(f"--splits must be numbers such as 0-19 or 3,5,7; got {settings.splits!r}")
        found += range(int(first), int(last or first) + 1)
    if not found or len(set(found)) < len(found):
        raise SettingsError(f"--splits must name at least one split, and each once; got {settings.splits!r}")
    return found


def hidden_of(settings: Settings, num_rows: int) -> tuple[int, ...]:
    """Return the hidden layers for a data set with so many rows."""
    if settings.uci_small or num_rows <= LARGE:
        return SMALL_NET
    return HUGE_NET if num_rows > HUGE else LARGE_NET


def preset_of(settings: Settings, num_rows: int) -> Preset:
    """Return the defaults for a data set of a size with what the flags change in them.

    Raises:
        SettingsError: If a flag lists no positive numbers.
    """
    preset = SMALL_PRESET if num_rows > SMALL else TINY_PRESET
    if num_rows > LARGE:
        preset = HUGE_PRESET if num_rows > HUGE else LARGE_PRESET
    return dataclasses.replace(
        preset,
        batch_size=settings.batch_size or preset.batch_size,
        epochs=settings.epochs or preset.epochs,
        lr=preset.lr if settings.lr_init is None else _numbers("lr_init", settings.lr_init, zero=False),
        wd=preset.wd if settings.wd is None else _numbers("wd", settings.wd, zero=True),
        collected=(1.0,) if settings.no_schedule else preset.collected,
    )


def _numbers(flag: str, text: str, *, zero: bool) -> tuple[float, ...]:
    try:
        found = tuple(map(float, names(text)))
    except ValueError:
        found = ()
    low = "at least 0" if zero else "positive"
    if not found or len(set(found)) < len(found) or not all(v < math.inf and (v > 0 or zero and v == 0) for v in found):
        raise SettingsError(f"--{flag} must list numbers, {low}, each once; got {text!r}")
    return found


def candidates_of(settings: Settings, preset: Preset) -> list[Candidate]:
    """Return what is chosen from.

    Raises:
        SettingsError: If --swag_lr lists no positive numbers.
    """
    fixed_rates = None if settings.swag_lr is None else _numbers("swag_lr", settings.swag_lr, zero=False)
    return [
        Candidate(lr, wd, swag_lr)
        for lr in preset.lr
        for swag_lr in fixed_rates or [ratio * lr for ratio in preset.collected]
        for wd in preset.wd
    ]


def training_of(settings: Settings, preset: Preset) -> Recipe:
    """Return what all candidates share.

    Raises:
        SettingsError: If fewer than two snapshots would be taken.
    """
    start = preset.epochs // 2 if settings.swag_start is None else settings.swag_start
    if preset.epochs - start < 3:
        raise SettingsError(f"--swag_start must leave 3 of the {preset.epochs} epochs or more; got {start}")
    return Recipe(
        preset.epochs,
        preset.batch_size,
        settings.momentum,
        start,
        settings.max_num_models,
        settings.clip,
        settings.double_bias_lr,
    )


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    if settings.data_path is None:
        raise SettingsError("--data_path is needed: the folder with the data sets")
    at_least = dict(
        jobs=1, threads=1, seed=0, epochs=3, batch_size=1, swag_start=0, max_num_models=2, rank=1, folds=2,
        num_samples=2, tune_samples=2, chains=1, burn_in=0, thin=1, vi_steps=1, nuts_warmup=1, nuts_depth=1,
        gp_rows=10, gp_steps=1,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("clip", "scale", "temperature", "prior_std"))
    require_fraction(settings, ("momentum",))
    if settings.no_schedule and settings.swag_lr is not None:
        raise SettingsError("--no_schedule and --swag_lr exclude each other: the rate stays at --lr_init")
    if "PCA+NUTS" in methods_of(settings) and find_spec("pyro") is None:
        raise SettingsError("PCA+NUTS needs pyro: pip install lowrank-bdl[experiments], or leave it out of --methods")
    datasets_of(settings), splits_of(settings)
    preset = preset_of(settings, num_rows=0)
    training_of(settings, preset)
    candidates_of(settings, preset)
    return settings
