"""The flags of `experiments.train`: swa_gaussian's by the same names, and what is new."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common import SettingsError, fixed, require_at_least, require_positive, setting

SAMPLERS = ("SGLD", "SGHMC")
OPTIMIZERS = ("SGD", "Adam", "AdamW", *SAMPLERS)
SCHEDULES = ("swag", "step", "cosine", "cyclical")
LOSSES = ("CE", "adv_CE")
REQUIRED: Any = dataclasses.MISSING
ADDED = ("snapshots", "temperature", "vi", "vi_init_std", "vi_std_lr", "prior_std")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does."""

    dir: str = setting(REQUIRED, "folder to write to", free=True, kind=str)
    model: str = setting(REQUIRED, "network, such as PreResNet20, VGG16 or LeNet5", kind=str)
    dataset: str = setting("CIFAR10", "data set, such as CIFAR10, CIFAR100, SVHN, STL10, MNIST, FashionMNIST, digits")
    data_path: str | None = setting(None, "folder with the data set's files (none for digits)", kind=str, free=True)
    use_test: bool = setting(False, "train on all training images and report on the test images alone")
    split_classes: int | None = setting(None, "train on half of the classes of CIFAR10", kind=int, choices=(0, 1))
    label_arr: str | None = setting(None, "file (.npy) with the labels to train on, such as corrupted ones", kind=str)
    train_limit: int | None = setting(None, "use so many training images only", kind=int)
    batch_size: int = setting(128, "images in a training batch")
    num_workers: int = setting(4, "processes that read images which do not fit into memory", free=True)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    amp: str = setting("none", "mixed precision", choices=("none", "bfloat16", "float16"))
    channels_last: bool = setting(False, "keep images and filters with their channels last in memory")

    epochs: int = setting(
        200, "epochs to train; a resumed run may have more, unless its schedule depends on them", free=True
    )
    optimizer: str | None = setting(
        None, "optimizer (default: SGD, of --vi Adam); SGLD and SGHMC draw samples from the posterior", kind=str,
        choices=OPTIMIZERS,
    )  # fmt: skip
    lr_init: float = setting(0.01, "learning rate of the first epochs")
    momentum: float = setting(0.9, "momentum of SGD and SGHMC")
    wd: float = setting(1e-4, "weight decay (decoupled for AdamW); the prior of SGLD, SGHMC and --vi")
    temperature: float = setting(1.0, "temperature of SGLD, SGHMC and --vi: 1 is the posterior, less a colder one")
    vi: bool = setting(False, "learn a mean and a standard deviation of every weight (mean-field VI)")
    vi_init_std: float = setting(0.01, "standard deviation of every weight to begin with (--vi)")
    vi_std_lr: float | None = setting(
        None,
        "learning rate of the logarithms of standard deviations (--vi; default: 1 / steps in an epoch)",
        kind=float,
    )
    prior_std: float | None = setting(
        None,
        "standard deviation of the prior (--vi; default: (wd x training images)^-1/2, what --wd means)",
        kind=float,
    )
    init_from: str | None = setting(
        None, "start from the final weights of the run in this folder: its SWA mean, or else its last iterate",
        kind=str, free=True,
    )  # fmt: skip
    prior_var: float | None = setting(None, "variance of a Gaussian prior, whose term is part of the loss", kind=float)
    loss: str = setting("CE", "cross entropy, or half of it on fast-gradient-sign perturbed images", choices=LOSSES)
    epsilon: float = setting(0.01, "size of these perturbations as a fraction of the range of the pixels")
    grad_clip: float | None = setting(None, "largest norm of the gradient (default: no limit)", kind=float)
    augment: str = setting("standard", "random crops, and flips for photographs; or none", choices=("standard", "none"))
    schedule: str = setting("swag", "schedule of the learning rate: flat, linear, constant; or", choices=SCHEDULES)
    no_schedule: bool = setting(False, "keep the learning rate at --lr_init")

    swa: bool = setting(False, "collect weights: SWA, and SWAG from the same iterates")
    swa_start: int = setting(161, "epochs before the first snapshot")
    swa_lr: float = setting(0.02, "learning rate while snapshots are taken; of --schedule cyclical the highest")
    swa_c_epochs: int = setting(1, "epochs from snapshot to snapshot; of --schedule cyclical the length of a cycle")
    cyclical_lr: float = setting(1e-4, "lowest learning rate of --schedule cyclical")
    collects_per_epoch: int = setting(1, "snapshots in an epoch that has any")
    cov_mat: bool = setting(False, "keep deviations: SWAG; without them only SWAG-Diag")
    max_num_models: int = setting(20, "deviations kept")
    snapshots: bool = setting(False, "also keep every snapshot, for an ensemble of them")
    include: str | None = setting(
        None, "collect only these parameters: name patterns, separated by commas (fc.*)", kind=str
    )
    ema: bool = setting(False, "also keep an exponential average of all iterates")
    ema_decay: float = setting(0.999, "its decay, a step")
    polyak: bool = setting(False, "also keep the equal average of every step from --swa_start on (Polyak, Ruppert)")

    num_samples: int = setting(30, "weight samples in a model average")
    scale: float = setting(0.5, "multiplies SWAG's covariance; 0.5 is the published law")
    bn_size: int | None = setting(
        None, "training images that batch norm is recalibrated on (default: all of them)", kind=int
    )
    seed: int = setting(1, "seed of initial weights, order of the data, augmentation and weight samples")
    save_freq: int = setting(
        25, "epochs between two checkpoints that are kept, checkpoint-EPOCH.safetensors", free=True
    )
    checkpoint_freq: int = setting(
        1, "epochs between two checkpoints to resume from, checkpoint.safetensors", free=True
    )
    eval_freq: int = setting(5, "epochs between two evaluations; the last epoch is always evaluated")
    resume: str | None = setting(
        None,
        "go on from this checkpoint; auto: from the one in --dir, or begin where there is none",
        kind=str,
        free=True,
    )
    swa_resume: str | None = setting(None, "take the collected weights of this checkpoint to begin with", kind=str)

    @property
    def rank(self) -> int:
        """Deviations that SWAG keeps."""
        return self.max_num_models if self.cov_mat else 0


def identity(settings: Settings) -> dict[str, Any]:
    """Return the settings that a resumed run must share with its checkpoint.

    Flags that checkpoints of earlier versions do not know are left out where they have their default.
    """
    needs_epochs = not (settings.swa or settings.no_schedule)
    values = fixed(settings) | ({"epochs": settings.epochs} if needs_epochs else {})
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    return {name: value for name, value in values.items() if name not in ADDED or value != defaults[name]}


def check(settings: Settings) -> Settings:
    """Refuse what cannot run; return the settings with the default optimizer filled in.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    if settings.optimizer is None:
        settings = dataclasses.replace(settings, optimizer="Adam" if settings.vi else "SGD")
    at_least = dict(
        epochs=1, batch_size=1, num_workers=0, threads=0, swa_start=0, swa_c_epochs=1, collects_per_epoch=1, seed=0,
        max_num_models=1, num_samples=1, save_freq=1, checkpoint_freq=1, eval_freq=1, momentum=0, wd=0, epsilon=0,
        cyclical_lr=0, ema_decay=0, bn_size=2, train_limit=1,
    )  # fmt: skip
    require_at_least(settings, at_least)
    positive = (
        "lr_init", "swa_lr", "scale", "prior_var", "grad_clip", "temperature", "vi_init_std", "vi_std_lr", "prior_std",
    )  # fmt: skip
    require_positive(settings, positive)
    if settings.ema_decay >= 1:
        raise SettingsError(f"--ema_decay must be less than 1; got {settings.ema_decay}")
    _check_sampling(settings)
    if settings.swa:
        _check_collection(settings)
    else:
        for name in ("cov_mat", "snapshots", "include", "swa_resume", "polyak"):
            if getattr(settings, name):
                raise SettingsError(f"--{name} needs --swa, which collects weights")
        if settings.schedule == "cyclical" and not settings.no_schedule:
            raise SettingsError("--schedule cyclical needs --swa, which collects weights in the middle of each cycle")
    return settings


def _check_sampling(settings: Settings) -> None:
    sampler = settings.optimizer in SAMPLERS
    if settings.optimizer == "SGHMC" and settings.momentum >= 1:
        raise SettingsError(f"--momentum must be less than 1 for --optimizer SGHMC; got {settings.momentum}")
    if settings.temperature != 1 and not (sampler or settings.vi):
        raise SettingsError(f"--temperature needs --optimizer SGLD or SGHMC, or --vi; got {settings.temperature}")
    if settings.init_from is not None and Path(settings.init_from).resolve() == Path(settings.dir).resolve():
        raise SettingsError(f"--init_from and --dir must be two folders; got {settings.init_from} for both")
    if not settings.vi:
        if settings.prior_std is not None:
            raise SettingsError("--prior_std needs --vi; the prior of other runs is --wd, or --prior_var")
        if settings.vi_std_lr is not None:
            raise SettingsError("--vi_std_lr needs --vi, which has standard deviations")
        return
    if sampler:
        raise SettingsError(f"--vi learns a posterior and --optimizer {settings.optimizer} samples one; choose either")
    if settings.optimizer == "SGD":
        raise SettingsError(
            "--vi needs --optimizer Adam or AdamW: the loss is per image, and with it the gradient of a standard "
            "deviation so small that SGD leaves all of them where they begin"
        )
    for name in ("swa", "ema", "polyak", "prior_var"):
        if getattr(settings, name):
            what = "has a prior of its own, --prior_std" if name == "prior_var" else "learns a posterior of its own"
            raise SettingsError(f"--vi {what}, and cannot be used with --{name}")
    if settings.prior_std is None and settings.wd == 0:
        raise SettingsError("--vi needs a prior: --prior_std, or --wd to take it from")


def prior_std(settings: Settings, num_data: int) -> float | None:
    """Return the standard deviation of the prior of a --vi run; None for other runs."""
    if not settings.vi:
        return None
    return settings.prior_std if settings.prior_std is not None else float((settings.wd * num_data) ** -0.5)


def _check_collection(settings: Settings) -> None:
    if settings.swa_start >= settings.epochs:
        raise SettingsError(f"--swa_start must be less than --epochs; got {settings.swa_start} and {settings.epochs}")
    if settings.schedule == "cyclical" and not settings.no_schedule and settings.swa_c_epochs % 2:
        raise SettingsError(
            f"--swa_c_epochs must be even for --schedule cyclical, whose cycles end where they begin and are lowest in "
            f"the middle; got {settings.swa_c_epochs}"
        )
    first = first_collection(settings)
    count = max(settings.epochs - first, 0) // settings.swa_c_epochs * settings.collects_per_epoch
    if count < 2:
        raise SettingsError(
            f"SWAG needs at least 2 snapshots; these settings take {count}: more --epochs, an earlier --swa_start, or "
            "more --collects_per_epoch"
        )


def first_collection(settings: Settings) -> int:
    """Return the epoch that snapshots are counted from: cycles are lowest, and seen, in their middle."""
    cyclical = settings.schedule == "cyclical" and not settings.no_schedule
    return settings.swa_start - (settings.swa_c_epochs // 2 if cyclical else 0)
