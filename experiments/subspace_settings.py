"""The flags of `experiments.subspace`: drbayes's by the same names where it has them, and what is new."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from experiments.common import SettingsError, require_at_least, require_positive, setting
from experiments.uncertainty_settings import find_names, names, temperatures_of

CONSTRUCTIONS = ("random", "pca", "covariance", "freq_dir", "principal", "hessian", "curve")
METHODS = (
    "ess", "slice", "nuts", "sgld", "sghmc", "vi", "vi_full", "flow", "map", "low_rank_gaussian",
)  # fmt: skip
WHOLE_RANK = ("random", "principal", "hessian")  # no share of a variance to go by
OF_FILE = ("dataset", "model", "use_test", "split_classes")  # what a run says itself


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is computed; the lists may grow when a run is resumed."""

    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True)
    run: str | None = setting(None, "folder of a finished run of experiments.train --swa", kind=str, free=True)
    file: str | None = setting(
        None, "in place of --run: a posterior (posterior.safetensors); needs --dataset and --model", kind=str,
        free=True, alias="--checkpoint",
    )  # fmt: skip
    dataset: str | None = setting(None, "data set (--file)", kind=str)
    model: str | None = setting(None, "network (--file)", kind=str)
    use_test: bool = setting(False, "the posterior is of all training images (--file)")
    split_classes: int | None = setting(None, "half of the classes of CIFAR10 (--file)", kind=int, choices=(0, 1))
    data_path: str | None = setting(None, "folder with the data set's files (default: the run's)", kind=str, free=True)
    images: str = setting(
        "auto", "which to predict; auto: what the run reports", choices=("auto", "validation", "test")
    )
    eval_limit: int | None = setting(None, "predict so many images only (default: all)", kind=int)

    subspace: str = setting("pca", f"which, separated by commas: {', '.join(CONSTRUCTIONS)}", free=True)
    rank: str = setting("5", "of the subspace; of pca and freq_dir also a share of the variance below 1, or mle")
    curve: str | None = setting(
        None, "points of a curve, in order: weights or runs separated by commas, or one file of them", kind=str
    )
    source: str = setting("SWA", "which weights of a finished run are a point of the curve")
    control_points: bool = setting(False, "--curve gives the control points of a Bezier curve")
    random_length: str = setting(
        "pca", "of random directions: as drbayes's scripts (mean of the first two of pca), its library, its notebook",
        choices=("pca", "normal", "unit"),
    )  # fmt: skip
    structured: bool = setting(False, "random directions by Hadamard transforms: nothing of their size is stored")
    sketch_size: int = setting(20, "rows of the sketch of freq_dir")
    operator: str = setting("ggn", "curvature of the hessian subspace", choices=("ggn", "hessian"))
    max_products: int = setting(300, "most curvature-vector products for it")

    method: str = setting("ess", f"which, separated by commas: {', '.join(METHODS)}", free=True)
    temperature: str = setting("1", "divides the log-likelihood; several are separated by commas", free=True)
    prior_std: float = setting(1.0, "standard deviation of every coordinate's prior")
    num_samples: int = setting(30, "draws of each chain; with --resume also more than before", free=True)
    num_chains: int = setting(4, "chains")
    burn_in: int = setting(20, "steps of each chain (warm-up of nuts) before the first draw")
    thin: int = setting(1, "steps for each draw")
    initial: str = setting(
        "prior", "where chains start: a draw from the prior each, or z = 0", choices=("prior", "origin")
    )
    predict_samples: int | None = setting(
        None, "draws that predictions average over, spread evenly (default: all)", kind=int
    )
    step_size: float | None = setting(
        None, "of sgld and sghmc, well below the smallest variance of the posterior", kind=float
    )
    lr: float | None = setting(None, "first learning rate of vi, vi_full and flow (default: the library's)", kind=float)
    steps: int = setting(500, "optimization steps of vi, vi_full and flow")
    init_std: float | None = setting(
        None, "standard deviations that vi begins with (default: the library's)", kind=float
    )
    no_mu: bool = setting(False, "vi and vi_full keep their mean at the origin")
    minibatch: bool = setting(False, "sgld, sghmc, vi, vi_full and flow take one batch at random for each gradient")

    train_limit: int | None = setting(None, "training images of the log-joint (default: all)", kind=int)
    batch_size: int = setting(250, "training images in a batch; small ones fit a processor's caches", free=True)
    bn_mode: str = setting(
        "recalibrate", "batch norm in the log-joint: recalibrated for each z, the statistics of each batch, or "
        "those of the origin", choices=("recalibrate", "train", "eval"),
    )  # fmt: skip
    bn_subset: float = setting(1.0, "fraction of the training images that batch norm is recalibrated on")
    scale: float = setting(0.5, "factor of the covariance of SWAG, in the same table, and of low_rank_gaussian")
    grid: int = setting(15, "points along each axis of the posterior's density in a plane; 0 leaves it out", free=True)
    checkpoint_every: int = setting(10, "steps between two checkpoints of a chain", free=True)
    seed: int = setting(1, "seed of everything that is random")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir, whose finished cells and chains are kept", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    at_least = dict(
        eval_limit=2, sketch_size=2, max_products=1, num_samples=1, num_chains=1, burn_in=0, thin=1, predict_samples=1,
        steps=1, train_limit=2, batch_size=1, grid=0, checkpoint_every=1, seed=0, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("prior_std", "step_size", "lr", "init_std", "bn_subset", "scale"))
    if settings.bn_subset > 1:
        raise SettingsError(f"--bn_subset must be at most 1; got {settings.bn_subset}")
    if settings.grid == 1:
        raise SettingsError("--grid must be 0, or at least 2; got 1")
    temperatures_of(settings)
    methods(settings)
    _check_subspaces(settings)
    if settings.step_size is None and {"sgld", "sghmc"} & set(methods(settings)):
        raise SettingsError("--step_size is needed for sgld and sghmc")
    if (settings.run is None) == (settings.file is None):
        raise SettingsError("exactly one of --run and --file is needed: where the posterior is")
    if settings.file is not None and (settings.dataset is None or settings.model is None):
        raise SettingsError("--file needs --dataset and --model: a posterior does not know its network")
    for name in OF_FILE if settings.run is not None else ():
        if getattr(settings, name) not in (None, False):
            raise SettingsError(f"--{name} and --run exclude each other: the run has its own")
    return settings


def _check_subspaces(settings: Settings) -> None:
    wanted, rank = subspaces(settings), rank_of(settings)
    for name in WHOLE_RANK:
        if name in wanted and not isinstance(rank, int):
            raise SettingsError(f"--rank must be a whole number for --subspace {name}; got {settings.rank}")
    if ("curve" in wanted) != (settings.curve is not None):
        raise SettingsError("--subspace curve and --curve FILE go together")
    if settings.curve is not None and len(names(settings.curve)) == 2:
        raise SettingsError(f"--curve must give three or more points, or one file of them; got {settings.curve!r}")
    if settings.file is not None and "freq_dir" in wanted:
        raise SettingsError("--subspace freq_dir needs --run: a run with --snapshots, whose iterates it reads")


def subspaces(settings: Settings) -> list[str]:
    """Return the subspaces that are asked for."""
    return find_names("subspace", settings.subspace, CONSTRUCTIONS, "subspace")


def methods(settings: Settings) -> list[str]:
    """Return the methods that are asked for."""
    return find_names("method", settings.method, METHODS, "method")


def rank_of(settings: Settings) -> int | float | Literal["mle"]:
    """Return the rank: a number of directions, a share of the variance, or "mle".

    Raises:
        SettingsError: If it is none of these.
    """
    if settings.rank == "mle":
        return "mle"
    try:
        value = float(settings.rank)
    except ValueError:
        value = math.nan
    if value >= 1 and value == int(value):
        return int(value)
    if not 0 < value < 1:
        raise SettingsError(f"--rank must be a whole number from 1, a share below 1, or mle; got {settings.rank!r}")
    return value
