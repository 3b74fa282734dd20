"""The flags of `experiments.curve`: those of the authors' scripts by the same names, and what is new."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from experiments import train_settings
from experiments.common import SettingsError, require_at_least, require_positive, setting
from experiments.hessian_points import LAST
from experiments.uncertainty_settings import names, of_training

LINE, CHAIN = "line", "chain"
TRAINED = ("PolyChain", "Bezier")
TrainSettings = train_settings.Settings
TOY = dict(
    curve_epochs=400, lr=0.01, optimizer="Adam", endpoint_epochs=300, wd=1e-4, batch_size=200, num_points=61,
)  # fmt: skip
PUBLISHED = dict(curve_epochs=200, lr=0.03, optimizer="SGD", endpoint_epochs=200, num_points=61)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is connected, and how it is measured."""

    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True)
    init_start: str | None = setting(
        None, "weights at t = 0: a run of experiments.train or a file of weights (default: a network is trained)",
        kind=str,
    )  # fmt: skip
    init_end: str | None = setting(None, "weights at t = 1, likewise", kind=str)
    ckpt: str | None = setting(
        None, "no training: straight lines from file to file, separated by commas (runs, checkpoints)", kind=str
    )
    toy: str | None = setting(None, "a problem to look at, in less than a minute", kind=str, choices=("two_spirals",))
    source: str = setting(LAST, "which weights of a finished run: last, or SWA, EMA, ... as its results.json has them")
    curve: str = setting("PolyChain,Bezier", "which curves to train, separated by commas")
    num_bends: int = setting(3, "points of a curve, both ends among them")
    free_start: bool = setting(False, "also train the point at t = 0")
    free_end: bool = setting(False, "also train the point at t = 1")
    init_linear_off: bool = setting(False, "start the bends at fresh networks, not on the line between the ends")
    curve_epochs: int | None = setting(
        None, "epochs to train a curve (default: 200; of --toy 400)", kind=int, alias="--epochs"
    )
    lr: float | None = setting(
        None, "learning rate of a curve's first epochs (default: 0.03; of --toy 0.01)", kind=float
    )
    optimizer: str | None = setting(None, "of a curve (default: SGD; of --toy Adam)", kind=str, choices=("SGD", "Adam"))
    momentum: float = setting(0.9, "momentum of SGD")
    wd: float | None = setting(
        None, "weight decay of curves and of the regularised loss (default: that of the run at the start)", kind=float
    )

    model: str | None = setting(None, "network (default: that of the run at the start)", kind=str)
    dataset: str = of_training("dataset")
    data_path: str | None = of_training("data_path", help="folder with the data set's files (default: the run's)")
    use_test: bool = of_training("use_test")
    train_limit: int | None = of_training("train_limit")
    batch_size: int | None = setting(None, "images in a training batch (default: the run's; else 128)", kind=int)
    endpoint_epochs: int | None = setting(
        None, "epochs of networks that are trained here (default: 200; of --toy 300)", kind=int
    )
    endpoint_lr: float = setting(0.05, "their learning rate")

    images: str = setting(
        "auto", "which to test on; auto: what the run reports", choices=("auto", "validation", "test")
    )
    num_points: int | None = setting(
        None, "points of a path that are evaluated (default: 61; of --ckpt 6 from file to file)", kind=int
    )
    eval_limit: int | None = setting(None, "evaluate on so many images of each set (default: all)", kind=int)
    bn_size: int | None = setting(None, "training images for batch norm (default: all)", kind=int)
    seed: int = setting(1, "seed of networks and curves that are trained here")
    device: str = of_training("device")
    threads: int = of_training("threads")
    resume: bool = setting(False, "go on with the run in --dir", free=True)

    @property
    def curves(self) -> tuple[str, ...]:
        """The curves to train."""
        return () if self.ckpt is not None else tuple(dict.fromkeys(names(self.curve)))

    @property
    def files(self) -> tuple[str, ...]:
        """Where given weights are, in order along the path."""
        if self.ckpt is not None:
            return names(self.ckpt)
        return tuple(file for file in (self.init_start, self.init_end) if file is not None)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run; return the settings with the defaults of their kind filled in.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    if settings.toy is not None and (settings.files or settings.model is not None):
        raise SettingsError("--toy has a network and weights of its own; leave --init_start, --ckpt and --model out")
    kind: dict[str, Any] = dict(TOY if settings.toy is not None else PUBLISHED)
    if settings.ckpt is not None:
        kind["num_points"] = 6
    missing = {name: value for name, value in kind.items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **missing)
    _check_numbers(settings)
    _check_points(settings)
    return settings


def _check_numbers(settings: Settings) -> None:
    at_least = dict(
        num_bends=2, curve_epochs=1, endpoint_epochs=1, batch_size=1, train_limit=1, num_points=2, eval_limit=1,
        bn_size=2, seed=0, threads=0, momentum=0, wd=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("lr", "endpoint_lr"))


def _check_points(settings: Settings) -> None:
    if not set(names(settings.curve)) <= set(TRAINED):
        raise SettingsError(f"--curve must be some of {', '.join(TRAINED)}; got {settings.curve!r}")
    if settings.num_bends == 2 and settings.curves and not (settings.free_start or settings.free_end):
        raise SettingsError("--num_bends 2 leaves nothing to train between two fixed ends; at least 3 are needed")
    if settings.init_linear_off and (settings.num_bends == 2 or not settings.curves):
        raise SettingsError("--init_linear_off needs a curve with points between its ends: no --ckpt, --num_bends 3")
    if settings.ckpt is not None:
        if settings.init_start is not None or settings.init_end is not None:
            raise SettingsError("--ckpt names all points of the path; leave --init_start and --init_end out")
        if len(settings.files) < 2:
            raise SettingsError(f"--ckpt must name at least 2 files, separated by commas; got {settings.ckpt!r}")
    elif len(settings.files) == 1:
        raise SettingsError("--init_start and --init_end must be given both, or neither")
    if settings.toy is None and not settings.files and settings.model is None:
        raise SettingsError("nothing to connect: give --init_start and --init_end, --ckpt, --model or --toy")
