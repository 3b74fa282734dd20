"""Flags that `experiments.plane` and `experiments.width` share."""

import dataclasses
from dataclasses import dataclass

from experiments import subspace_settings
from experiments.common import SettingsError, require_at_least, require_positive, setting
from experiments.uncertainty_settings import of_training


@dataclass(frozen=True)
class SurfaceSettings:
    """Where the images come from, and how much of them is used."""

    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True, alias="--save_path")
    run: str | None = setting(
        None, "folder of a finished run of experiments.train --swa --cov_mat (with --snapshots also its path is drawn)",
        kind=str, free=True, alias="--checkpoint",
    )  # fmt: skip
    data_path: str | None = of_training("data_path", help="folder with the data set's files (default: the run's)")
    images: str = setting(
        "auto", "which to test on; auto: what the run reports", choices=("auto", "validation", "test")
    )
    train_limit: int | None = setting(None, "evaluate on so many training images (default: all)", kind=int)
    eval_limit: int | None = setting(None, "evaluate on so many images to test on (default: all)", kind=int)
    batch_size: int = setting(250, "images in a batch; small ones fit a processor's caches", free=True)
    bn_subset: float = setting(1.0, "fraction of the training images that batch norm is recalibrated on")
    scale: float = setting(0.5, "factor of SWAG's covariance")
    seed: int = setting(1, "seed of random directions, and of what is trained here")
    device: str = of_training("device")
    threads: int = of_training("threads")
    resume: bool = setting(False, "go on with the run in --dir", free=True)


def check_shared(settings: SurfaceSettings, **at_least: int) -> None:
    """Refuse numbers that are out of range.

    Args:
        settings: Of either script.
        **at_least: Bounds of its own flags.

    Raises:
        SettingsError: Names the flag, its bound and its value.
    """
    shared = dict(train_limit=2, eval_limit=1, batch_size=1, seed=0, threads=0)
    require_at_least(settings, shared | at_least)
    if not 0 < settings.bn_subset <= 1:
        raise SettingsError(f"--bn_subset must be in (0, 1]; got {settings.bn_subset}")
    require_positive(settings, ("scale",))


def as_subspace(settings: SurfaceSettings, **own: object) -> subspace_settings.Settings:
    """Return the settings with which `experiments.subspace` reads the same run and makes a subspace of it.

    Args:
        settings: Of either script.
        **own: Flags of `experiments.subspace`.

    Raises:
        SettingsError: If they do not go together.
    """
    shared = (
        "dir", "run", "data_path", "images", "train_limit", "eval_limit", "batch_size", "bn_subset", "scale", "seed",
        "device", "threads", "resume",
    )  # fmt: skip
    values = {name: getattr(settings, name) for name in shared} | own
    return subspace_settings.check(subspace_settings.Settings(**values))  # type: ignore[arg-type]
