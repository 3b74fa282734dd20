"""The flags of `experiments.imagenet`: those of swa_gaussian's script by the same names, and what is new."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments import seed_study
from experiments.common import SettingsError, require_at_least, require_positive, setting

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}  # fmt: skip
AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
REQUIRED: Any = dataclasses.MISSING


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained and measured."""

    dir: str = setting(REQUIRED, "folder to write to", free=True, kind=str)
    data_path: str | None = setting(
        None, "folder with train/CLASS/*.jpg and val/CLASS/*.jpg (default: generated, under --dir)", kind=str, free=True
    )
    generated: str = setting("10x40", "without --data_path: CLASSESxIMAGES to generate, half as many for testing")
    use_test: bool = setting(False, "train on all training images and report on those of val/ (of test/ if there are)")
    image_size: int = setting(224, "height and width that images are brought to [pixels]")
    model: str = setting("resnet50", "one of torchvision's networks, such as resnet50, resnet152, densenet161")
    weights: str | None = setting(
        None, "file with weights to start from, such as torchvision's (.pth, .safetensors)", kind=str, free=True
    )
    batch_size: int = setting(256, "images in a training batch")
    num_workers: int = setting(4, "processes that read images", free=True)

    epochs: int = setting(5, "epochs to train")
    lr_init: float = setting(0.01, "learning rate of the first epochs; a tenth of it after 30, and so on")
    momentum: float = setting(0.9, "momentum of SGD")
    wd: float = setting(1e-4, "weight decay")
    swa_start: int = setting(0, "epochs before the first snapshot")
    swa_lr: float = setting(0.02, "learning rate while snapshots are taken")
    swa_freq: int = setting(4, "snapshots in an epoch that has any")
    max_num_models: int = setting(20, "deviations kept")
    swa_cpu: bool = setting(False, "keep what is collected in the host's memory, not in the device's")
    deviation_dtype: str = setting("float32", "how deviations are stored", choices=tuple(DTYPES))

    num_samples: int = setting(30, "weight samples in a model average")
    scale: float = setting(0.5, "multiplies SWAG's covariance; 0.5 is the published law")
    bn_fraction: float = setting(1.0, "fraction of the training images that batch norm is recalibrated on")
    eval_batch_size: int = setting(64, "images in a batch of what is predicted", free=True)
    checkpoint_freq: int = setting(1, "epochs between two checkpoints to resume from", free=True)

    seeds: int = setting(1, "networks", free=True)
    first_seed: int = setting(1, "seed of the first: of initial weights, order, crops and weight samples", free=True)
    amp: str = setting("none", "mixed precision of the training", choices=tuple(AMP))
    channels_last: bool = setting(False, "keep images and filters with their channels last in memory")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(
        False, "go on with the run in --dir: with its finished seeds, and the last checkpoint of another", free=True
    )

    @property
    def generated_sizes(self) -> tuple[int, int]:
        """Classes, and training images a class, of a generated tree."""
        classes, _, images = self.generated.partition("x")
        return int(classes), int(images)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    seed_study.check_seeds(settings)
    at_least = dict(
        image_size=1, batch_size=1, num_workers=0, epochs=1, momentum=0, wd=0, swa_start=0, swa_freq=1,
        max_num_models=1, num_samples=1, eval_batch_size=1, checkpoint_freq=1, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("lr_init", "swa_lr", "scale", "bn_fraction"))
    if settings.bn_fraction > 1:
        raise SettingsError(f"--bn_fraction must be at most 1; got {settings.bn_fraction}")
    if settings.weights is not None and not Path(settings.weights).is_file():
        raise SettingsError(f"--weights {settings.weights}: there is no such file")
    try:
        sizes = settings.generated_sizes
    except ValueError:
        sizes = (0, 0)
    if min(sizes) < 2:
        raise SettingsError(f"--generated must be CLASSESxIMAGES, each at least 2; got {settings.generated!r}")
    snapshots = max(settings.epochs - settings.swa_start, 0) * settings.swa_freq
    if snapshots < 2:
        raise SettingsError(
            f"SWAG needs at least 2 snapshots; these settings take {snapshots}: more --epochs, an earlier --swa_start, "
            "or a larger --swa_freq"
        )
    return settings
