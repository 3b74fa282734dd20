"""The flags of `experiments.simplex`: those of the authors' scripts as second names, and what is new."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from experiments.common import SettingsError, require_at_least, require_positive, setting
from experiments.hessian_points import LAST
from experiments.uncertainty_settings import names, of_training

TOY = dict(endpoint_epochs=300, epochs=100, connect_epochs=200, lr=0.01, optimizer="Adam", wd=1e-4, batch_size=200)
PUBLISHED = dict(endpoint_epochs=300, epochs=10, connect_epochs=75, lr=0.05, optimizer="SGD")  # see the help of --lr


@dataclass(frozen=True)
class Settings:
    """Everything that decides which simplexes are grown, and how they are measured."""

    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True)
    run: str | None = setting(
        None, "finished runs of experiments.train (or files of weights), separated by commas, one a component "
        "(default: --n_component networks are trained)", kind=str,
    )  # fmt: skip
    toy: str | None = setting(None, "a problem to look at, in less than a minute", kind=str, choices=("two_spirals",))
    source: str = setting(LAST, "which weights of a finished run: last, or SWA, EMA, ... as its results.json has them")
    n_component: int = setting(3, "networks, from each of which a simplex is grown")
    n_verts: int = setting(3, "vertices of a simplex, the network among them: 3 gives 1- and 2-simplexes")
    connect: int = setting(0, "also join the networks by so many connecting points, shared by all of them")
    epochs: int | None = setting(
        None, "epochs to train each vertex (default: 10; of --toy 100)", kind=int, alias="--simplex_epochs"
    )
    connect_epochs: int | None = setting(
        None, "epochs to train each connecting point (default: 75; of --toy 200)", kind=int
    )
    lr: float | None = setting(
        None, "learning rate of a vertex's first epochs (default: 0.05, as the authors' 0.01 is for the sum over 5 "
        "points, and here it is for the mean; of --toy 0.01)", kind=float, alias="--simplex_lr",
    )  # fmt: skip
    optimizer: str | None = setting(
        None, "of a vertex (default: SGD; of --toy Adam)", kind=str, choices=("SGD", "Adam")
    )
    momentum: float = setting(0.9, "momentum of SGD")
    wd: float | None = setting(
        None, "weight decay of points of a simplex (default: that of the first run; else 1e-4)", kind=float
    )
    volume: float = setting(
        1e-3, "weight of the log-volume in the loss [nats]; with the authors' 1e-6 small networks' simplexes stay thin",
        alias="--LMBD",
    )  # fmt: skip
    n_sample: int = setting(1, "points of the simplex in every training batch (the authors' scripts: 5)")
    perturbation: float = setting(
        0.05, "where a vertex starts: off the centroid, by this fraction of the vertices' spread"
    )

    model: str | None = setting(None, "network to train (default: that of the first run)", kind=str)
    dataset: str = of_training("dataset")
    data_path: str | None = of_training("data_path", help="folder with the data set's files (default: the run's)")
    use_test: bool = of_training("use_test")
    train_limit: int | None = of_training("train_limit")
    batch_size: int | None = setting(None, "images in a training batch (default: the run's; else 128)", kind=int)
    endpoint_epochs: int | None = setting(
        None, "epochs of networks that are trained here (default: 300, of --toy too)", kind=int, alias="--base_epochs"
    )
    endpoint_lr: float = setting(0.05, "their learning rate", alias="--base_lr")

    images: str = setting(
        "auto", "which to test on; auto: what the run reports", choices=("auto", "validation", "test")
    )
    num_samples: int = setting(25, "points of each simplex in a prediction")
    picture: int = setting(12, "points along an edge in the picture of the first simplex; 0 draws none")
    eval_limit: int | None = setting(None, "measure on so many images of each set (default: all)", kind=int)
    bn_size: int | None = setting(None, "training images for batch norm (default: all)", kind=int)
    seed: int = setting(1, "seed of networks, vertices and points")
    device: str = of_training("device")
    threads: int = of_training("threads")
    resume: bool = setting(False, "go on with the run in --dir", free=True)

    @property
    def files(self) -> tuple[str, ...]:
        """Where given networks are."""
        return () if self.run is None else names(self.run)

    @property
    def components(self) -> int:
        """Number of networks."""
        return len(self.files) or self.n_component


def check(settings: Settings) -> Settings:
    """Refuse what cannot run; return the settings with the defaults of their kind filled in.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    if settings.toy is not None and (settings.files or settings.model is not None):
        raise SettingsError("--toy has networks of its own; leave --run and --model out")
    if settings.toy is None and not settings.files and settings.model is None:
        raise SettingsError("nothing to grow from: give --run, --model or --toy")
    kind: dict[str, Any] = dict(TOY if settings.toy is not None else PUBLISHED)
    missing = {name: value for name, value in kind.items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **missing)
    at_least = dict(
        n_component=1, n_verts=1, connect=0, epochs=1, connect_epochs=1, endpoint_epochs=1, n_sample=1, volume=0,
        perturbation=0, momentum=0, wd=0, batch_size=1, train_limit=1, num_samples=1, picture=0, eval_limit=1,
        bn_size=2, seed=0, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("lr", "endpoint_lr"))
    if settings.connect and settings.components < 2:
        raise SettingsError(f"--connect needs at least 2 networks; got {settings.components}")
    if settings.volume and not settings.perturbation:
        raise SettingsError("--perturbation 0 starts with no volume, whose logarithm has no gradient; use --volume 0")
    return settings
