"""Weight averaging by several processes at once (SWAP): large batches together, small batches alone, then the mean.

Phase 1: all workers train one network, each on its part of every large batch, until it is right on --stop_accuracy of
the training images. Phase 2: every worker goes on alone, in small batches in an order of its own. Phase 3: the mean of
their weights, with batch norm recalibrated. The time of a method is that of all that it needs, from the start.

"small batch" is what a worker reaches alone in as many epochs, without phase 1, the mean over workers; "SWAP, one
worker" is a worker before the average, "SWAP, ensemble" the average of what they predict, and "SWAP, SWAG" of what
weights drawn around their mean predict. Start it by torchrun; every worker takes a GPU of its own where there are some.

Examples:
  torchrun --standalone --nproc_per_node 2 -m experiments.parallel_swa --dataset digits --large_batch 128 --dir runs/d
  torchrun --standalone --nproc_per_node 8 -m experiments.parallel_swa --dataset CIFAR10 --data_path DATA_DIR
      --model PreResNet20 --large_batch 4096 --large_epochs 60 --large_lr 0.8 --small_epochs 10 --dir runs/swap

Writes to --dir: cells/seed-N.json, workers-N.safetensors (weights of every worker), log.jsonl, table.txt, methods.png,
results.json (last), settings.json, environment.json, command.sh

Source: Gupta, Akle Serrano and DeCoste, "Stochastic Weight Averaging in Parallel: Large-Batch Training that Generalizes
Well" (2020), algorithm 1.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from experiments import seed_study
from experiments.common import (
    RunDir,
    SettingsError,
    parse_settings,
    require_at_least,
    require_fraction,
    require_positive,
    run_script,
    setting,
)
from experiments.datasets import DATASETS, Datasets, load_dataset
from experiments.low_precision_methods import new_model
from experiments.parallel_methods import BASELINE, one_seed
from experiments.parallel_workers import Workers, started
from experiments.seed_study import Measure
from experiments.train_setup import try_model

PROG = "torchrun ... -m experiments.parallel_swa"
OUTPUTS = (*seed_study.OUTPUTS, "workers-*.safetensors")
MEASURES = (
    Measure("error", "test error [%]", less_is_better=True),
    Measure("nll", "NLL [nats]", 4, less_is_better=True),
    Measure("seconds", "time [s]", 1, less_is_better=True),
)
_ALL_DONE = -1


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the script does; the number of workers is torchrun's."""

    dir: str = setting("runs/parallel_swa", "folder to write to", free=True)
    dataset: str = setting("CIFAR10", "data set", choices=tuple(DATASETS))
    data_path: str | None = setting(None, "folder with the data set's files", kind=str, free=True)
    model: str = setting("SmallConvNet", "network")
    seeds: int = setting(3, "number of seeds", free=True)
    first_seed: int = setting(1, "first of them", free=True)
    large_batch: int = setting(1024, "images in a batch of all workers together; they divide it")
    large_epochs: int = setting(15, "of phase 1, at most")
    large_lr: float = setting(0.2, "highest learning rate of phase 1, after a quarter of it; then it falls to 0")
    stop_accuracy: float = setting(0.98, "accuracy on the training images that ends phase 1; more than 1 for never")
    small_batch: int = setting(128, "images in a batch of phase 2")
    small_epochs: int = setting(5, "of phase 2")
    small_lr: float = setting(0.05, "highest learning rate of phase 2, likewise")
    momentum: float = setting(0.9, "of SGD, Nesterov's")
    wd: float = setting(5e-4, "weight decay")
    no_control: bool = setting(False, "leave out training in small batches from the start")
    scale: float = setting(0.5, "multiplies the covariance of SWAP, SWAG")
    num_samples: int = setting(20, "weight samples of SWAP, SWAG")
    train_limit: int | None = setting(None, "training images (default: all)", kind=int)
    eval_limit: int | None = setting(None, "test images (default: all)", kind=int)
    bn_size: int = setting(5000, "training images that batch norm is recalibrated on, at most")
    device: str = setting("auto", "cpu, cuda; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads of a worker, 0 for torch's choice (torchrun makes it 1)", free=True)
    resume: bool = setting(False, "go on with the run in --dir, whose finished seeds are kept", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    seed_study.check_seeds(settings)
    at_least = dict(
        large_batch=1, large_epochs=1, small_batch=1, small_epochs=1, wd=0, num_samples=1, train_limit=2, eval_limit=1,
        bn_size=2, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("large_lr", "small_lr", "scale", "stop_accuracy"))
    require_fraction(settings, ("momentum",))
    return settings


def load(settings: Settings, workers: Workers) -> Datasets:
    """Load the images; refuse a large batch that cannot be shared, or that there are too few images for."""
    if settings.large_batch % workers.count:
        raise SettingsError(
            f"--large_batch must be a multiple of the {workers.count} workers; got {settings.large_batch}"
        )
    data = load_dataset(
        settings.dataset, settings.data_path, use_test=True, train_limit=settings.train_limit, device=workers.device
    )
    if len(data.train) < settings.large_batch:
        raise SettingsError(
            f"--large_batch must be at most the {len(data.train):,} training images; got {settings.large_batch}"
        )
    return data


def work(settings: Settings) -> str:
    """Check everything, run the seeds that are left, and report; return what the first worker prints."""
    with started(settings.device) as workers:
        data = load(settings, workers)
        try_model(new_model(settings, data, workers.device, settings.first_seed), data)
        if workers.leads:
            return lead(settings, data, workers)
        while (seed := workers.agree(0)) != _ALL_DONE:
            one_seed(settings, data, workers, seed)
        return ""


def lead(settings: Settings, data: Datasets, workers: Workers) -> str:
    """Say which seed is next, and write what comes of it."""
    run = RunDir(settings, OUTPUTS, workers.device)
    run.begin()

    def next_seed(seed: int) -> dict[str, Any]:
        return one_seed(settings, data, workers, workers.agree(seed))

    cells = seed_study.run_seeds(settings, run, next_seed)
    workers.agree(_ALL_DONE)
    first = cells[0]
    many = "one worker" if workers.count == 1 else f"{workers.count} workers"
    title = f"{many}, {settings.model} on {settings.dataset}, {len(data.train):,} training images"
    reached = f"{100 * first['large_train_accuracy']:.1f} % of the training images after {first['large_epochs']} epochs"
    note = f"{first['parameters']:,} weights; batches of {settings.large_batch:,} ended at {reached} (first seed)."
    return seed_study.finish(settings, run, cells, MEASURES, baseline=BASELINE, title=title, notes=(note,))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    if os.environ.get("RANK", "0") == "0":
        return run_script(PROG, lambda: work(settings), threads=settings.threads)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
