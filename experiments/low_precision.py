"""Training in few bits, and what averaging gives back: SWALP and SQWA beside float32 and plain low precision.

Block floating point, --bits a number: weights, gradients and momentum are rounded at random to 8 bits that share an
exponent (with --activation_bits also what flows through the network). SWALP averages such iterates in float32.
Uniform levels, --level_bits a number: the float32 network rounded to 2 bits; trained on with rounded weights; and SQWA:
the average of the networks that a cyclical rate gives at its minima, rounded to 2 bits again and trained a little more.

Every seed trains, in float32 and in --bits, two runs that share their first half: one whose rate decays to 1 %, and one
at a constant --swa_lr that is averaged. The runs on levels go on from the decayed float32 run, both for --level_epochs.
Biases and batch norm are not put on levels; batch norm is recalibrated for every method alike.

Examples:
  python -m experiments.low_precision --dataset digits --model SmallConvNet --epochs 20 --dir runs/digits-few-bits
  python -m experiments.low_precision --dataset CIFAR10 --data_path DATA_DIR --model SmallConvNet --train_limit 10000
      --epochs 20 --seeds 3 --dir runs/few-bits

Writes to --dir: cells/seed-N.json, log.jsonl, table.txt, methods.png, results.json (last), settings.json,
environment.json, command.sh
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from experiments import seed_study
from experiments.common import (
    RunDir,
    SettingsError,
    parse_settings,
    require_at_least,
    require_fraction,
    require_positive,
    resolve_device,
    run_script,
    setting,
)
from experiments.datasets import DATASETS, Datasets, load_dataset
from experiments.low_precision_methods import new_model, one_seed
from experiments.seed_study import Measure
from experiments.train_setup import try_model

PROG = "python -m experiments.low_precision"
MEASURES = (
    Measure("error", "test error [%]", less_is_better=True),
    Measure("nll", "NLL [nats]", 4, less_is_better=True),
    Measure("kibibytes", "weights [KiB]", 1, less_is_better=True),
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the script does."""

    dir: str = setting("runs/low_precision", "folder to write to", free=True)
    dataset: str = setting("CIFAR10", "data set", choices=tuple(DATASETS))
    data_path: str | None = setting(None, "folder with the data set's files", kind=str, free=True)
    model: str = setting("SmallConvNet", "network")
    seeds: int = setting(3, "number of seeds", free=True)
    first_seed: int = setting(1, "first of them", free=True)
    epochs: int = setting(20, "of each run in float32 and in block floating point")
    batch_size: int = setting(128, "images in a training batch")
    lr_init: float = setting(0.05, "learning rate of the first half of the epochs")
    swa_lr: float = setting(0.02, "constant learning rate of the runs that are averaged")
    momentum: float = setting(0.9, "of SGD")
    wd: float = setting(5e-4, "weight decay")
    collects_per_epoch: int = setting(4, "iterates of an epoch that enter an average")
    bits: int = setting(8, "of weights, gradients and momentum in block floating point, sign included")
    activation_bits: int | None = setting(None, "of layers' outputs and their gradients (default: float32)", kind=int)
    blocks: str = setting("tensor", "what shares an exponent: a tensor, or a filter", choices=("tensor", "channel"))
    level_bits: int = setting(2, "of weights on uniform levels; 2 bits are three levels")
    level_epochs: int = setting(8, "of training on levels: whole cycles of --cycle, then --tune_epochs")
    tune_epochs: int = setting(2, "the last of these: of the averaged network, rounded again")
    cycle: int = setting(2, "epochs of a cycle of SQWA's rate, even")
    level_lr: float = setting(0.005, "highest learning rate on levels; the lowest is a hundredth")
    train_limit: int | None = setting(None, "training images (default: all)", kind=int)
    eval_limit: int | None = setting(None, "test images (default: all)", kind=int)
    bn_size: int = setting(5000, "training images that batch norm is recalibrated on, at most")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir, whose finished seeds are kept", free=True)

    @property
    def swa_start(self) -> int:
        """The epoch after which the two runs part."""
        return self.epochs // 2


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    seed_study.check_seeds(settings)
    at_least = dict(
        epochs=2, batch_size=1, collects_per_epoch=1, wd=0, tune_epochs=1, cycle=2, train_limit=2, eval_limit=1,
        bn_size=2, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("lr_init", "swa_lr", "level_lr"))
    require_fraction(settings, ("momentum",))
    for name in ("bits", "activation_bits", "level_bits"):
        value = getattr(settings, name)
        if value is not None and not 2 <= value <= 24:
            raise SettingsError(f"--{name} must be from 2 to 24; got {value}")
    if settings.cycle % 2:
        raise SettingsError(f"--cycle must be even: the rate is lowest in the middle; got {settings.cycle}")
    cycles = settings.level_epochs - settings.tune_epochs
    if cycles < settings.cycle or cycles % settings.cycle:
        raise SettingsError(
            f"--level_epochs must be --tune_epochs {settings.tune_epochs} and whole cycles of {settings.cycle}; "
            f"got {settings.level_epochs}"
        )
    return settings


def load(settings: Settings) -> Datasets:
    return load_dataset(
        settings.dataset,
        settings.data_path,
        use_test=True,
        train_limit=settings.train_limit,
        device=resolve_device(settings.device),
    )


def work(settings: Settings) -> str:
    """Check everything, run the seeds that are left, and report; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, seed_study.OUTPUTS, device)
    data = load(settings)
    try_model(new_model(settings, data, device, settings.first_seed), data)
    run.begin()
    cells = seed_study.run_seeds(settings, run, lambda seed: one_seed(settings, data, device, seed))
    count = len(data.train)
    title = f"{settings.model} on {settings.dataset}, {count:,} training images, {settings.epochs} epochs"
    parameters = cells[0]["parameters"]
    return seed_study.finish(
        settings, run, cells, MEASURES, baseline="majority class", title=title, parameters=parameters,
        notes=(f"{parameters:,} weights; the size is that of the weights alone.",),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
