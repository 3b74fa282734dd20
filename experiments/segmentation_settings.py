"""The flags of `experiments.segmentation`: those of swa_gaussian's script by the same names, and what is new."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from experiments import seed_study
from experiments.common import SettingsError, require_at_least, require_positive, setting

LOSSES = ("cross_entropy", "aleatoric")
OPTIMIZERS = ("SGD", "RMSProp", "Adam")
REQUIRED: Any = dataclasses.MISSING


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained and measured."""

    dir: str = setting(REQUIRED, "folder to write to", free=True, kind=str)
    data_path: str | None = setting(None, "folder of CamVid", kind=str, free=True)
    model: str = setting("FCDenseNet67", "network: FCDenseNet57, FCDenseNet67 or FCDenseNet103")
    use_test: bool = setting(False, "report on the test scenes, and not on the validation scenes")
    train_limit: int | None = setting(None, "use so many training scenes only", kind=int)
    eval_limit: int | None = setting(None, "report on so many scenes only", kind=int)
    loss: str = setting("cross_entropy", "aleatoric learns the noise of every logit too", choices=LOSSES)
    aleatoric_draws: int = setting(10, "draws of that noise, in training and in prediction")
    use_weights: bool = setting(False, "weigh each class by the median of the frequencies over its own")

    epochs: int = setting(1000, "epochs to train")
    batch_size: int = setting(4, "crops in a training batch")
    crop: int = setting(224, "side of the squares that are cut out of the scenes to train on [pixels]")
    ft_start: int = setting(750, "epochs before training goes on with whole scenes")
    ft_batch_size: int = setting(1, "scenes in a batch from then on")
    optimizer: str = setting("SGD", "optimizer", choices=OPTIMIZERS)
    lr_init: float = setting(0.01, "learning rate of the first epochs")
    momentum: float = setting(0.9, "momentum of SGD")
    wd: float = setting(1e-4, "weight decay")
    swa_start: int = setting(850, "epochs before the first snapshot")
    swa_lr: float = setting(1e-3, "learning rate while snapshots are taken")
    swa_c_epochs: int = setting(1, "epochs from snapshot to snapshot")
    collects_per_epoch: int = setting(1, "snapshots in an epoch that has any")
    max_num_models: int = setting(20, "deviations kept")

    num_samples: int = setting(50, "weight samples, and dropout masks, in a model average")
    scale: float = setting(0.5, "multiplies SWAG's covariance; 0.5 is the published law")
    bn_size: int | None = setting(None, "training scenes that batch norm is recalibrated on (default: all)", kind=int)
    eval_batch_size: int = setting(4, "scenes in a batch of what is predicted")
    patch_size: int = setting(4, "side of the patches whose accuracy is compared with their uncertainty [pixels]")
    eval_freq: int = setting(10, "epochs between two evaluations of the last iterate while training", free=True)
    checkpoint_freq: int = setting(10, "epochs between two checkpoints to resume from", free=True)
    maps: int = setting(4, "scenes in the figure of uncertainty maps", free=True)

    seeds: int = setting(1, "networks", free=True)
    first_seed: int = setting(1, "seed of the first: of initial weights, crops and weight samples", free=True)
    amp: str = setting("none", "mixed precision of the training", choices=("none", "bfloat16"))
    channels_last: bool = setting(False, "keep images and filters with their channels last in memory: faster on CPUs")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(
        False, "go on with the run in --dir: with its finished seeds, and the last checkpoint of another", free=True
    )


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    seed_study.check_seeds(settings)
    at_least = dict(
        train_limit=1, eval_limit=1, aleatoric_draws=1, epochs=1, batch_size=1, crop=32, ft_start=0, ft_batch_size=1,
        momentum=0, wd=0, swa_start=0, swa_c_epochs=1, collects_per_epoch=1, max_num_models=1, num_samples=1,
        bn_size=1, eval_batch_size=1, patch_size=1, eval_freq=1, checkpoint_freq=1, maps=1, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("lr_init", "swa_lr", "scale"))
    snapshots = max(settings.epochs - settings.swa_start, 0) // settings.swa_c_epochs * settings.collects_per_epoch
    if snapshots < 2:
        raise SettingsError(
            f"SWAG needs at least 2 snapshots; these settings take {snapshots}: more --epochs, an earlier --swa_start, "
            "or more --collects_per_epoch"
        )
    return settings
