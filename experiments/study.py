"""Does averaging weights help? A seed study: paired differences from SGD, with intervals, on eight tasks.

Every seed trains two runs that share weights, data order and rate for the first half of the epochs:
SGD           goes on with a rate that decays linearly to 1 % at 90 % of the epochs: the baseline
SGD constant  the last iterate of the other run, whose rate drops to --swa_lr and stays there
SWA           the mean of the weights collected in that run, from a fifth of its second half on
EMA           the exponential average of every iterate of its second half; memory: a tenth of all steps
SWAG          the model average over --num_samples draws of the Gaussian fitted to the collected weights
All have the same number of epochs. Batch-norm statistics are recomputed from training images for every method alike.
Regression has Gaussian noise of one variance, fitted for each method to the validation examples. Recipes were set
without the test examples; --first_seed 100 tries others on seeds that the study does not use.

Tasks: toy-2d, friedman1, friedman2, friedman3 (multi-layer perceptron), mnist-cnn, mnist-mobilenet, cifar10-cnn,
cifar10-mobilenet; and to try it out without any files digits-cnn.

Examples:
  python -m experiments.study --data_path DATA_DIR
  python -m experiments.study --tasks friedman1,friedman2 --seeds 50 --dir runs/friedman
  python -m experiments.study --tasks cifar10-mobilenet --data_path DATA_DIR --train_limit 45000 --eval_limit 10000
      --epochs 100 --device cuda --dir runs/mobilenet
  python -m experiments.study --data_path DATA_DIR --resume

Writes to --dir: cells/TASK-SEED.json (one for each seed, so that a killed study goes on from there), log.jsonl,
study.md, differences.png, results.json (last), settings.json, environment.json, command.sh
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import lowrank_bdl as lb
from experiments import study_report, study_tasks
from experiments.common import (
    RunDir,
    SettingsError,
    parse_settings,
    require_at_least,
    require_positive,
    resolve_device,
    run_script,
    setting,
    write_atomically,
)
from experiments.study_methods import run_seed
from experiments.study_tasks import StudyData, Task

PROG = "python -m experiments.study"
OUTPUTS = ("results.json", "log.jsonl", "study.md", "differences.png", "cells/*.json")
OVERRIDES = (
    "seeds", "epochs", "train_limit", "eval_limit", "batch_size", "lr_init", "swa_lr", "wd", "collects_per_epoch",
    "threads",
)  # fmt: skip


def _by_task(what: str, kind: type, **options: Any) -> Any:
    return setting(None, f"{what} (default: by task)", kind=kind, **options)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a study does; None means the task's own."""

    dir: str = setting("runs/study", "folder to write to; an earlier study's files are replaced", free=True)
    tasks: str = setting("all", "tasks, separated by commas; all: the eight of the study", free=True)
    seeds: int | None = _by_task("number of seeds, at least 2", int, free=True)
    first_seed: int = setting(0, "the first of them")
    data_path: str | None = setting(None, "folder with the files of MNIST and CIFAR10", kind=str, free=True)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int | None = _by_task("CPU threads, 0 for torch's choice", int, free=True)
    quick: bool = setting(False, "shrink every task, to see that everything works")
    epochs: int | None = _by_task("epochs of each run", int)
    train_limit: int | None = _by_task("training examples", int)
    eval_limit: int | None = _by_task("most validation examples and most test examples", int)
    batch_size: int | None = _by_task("examples in a training batch", int)
    lr_init: float | None = _by_task("learning rate of the first half of the epochs", float)
    swa_lr: float | None = _by_task("constant learning rate of the run whose weights are averaged", float)
    wd: float | None = _by_task("weight decay", float)
    collects_per_epoch: int | None = _by_task("snapshots in an epoch", int)
    rank: int = setting(20, "deviations kept by SWAG; 0 keeps none")
    scale: float = setting(0.5, "multiplies SWAG's covariance; 0.5 is the published law")
    num_samples: int = setting(30, "weight samples in SWAG's model average")
    confidence: float = setting(0.95, "of the intervals", free=True)
    resume: bool = setting(False, "go on with the study in --dir, whose finished seeds are kept", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run."""
    recipes(settings)
    if settings.seeds is not None and settings.seeds < 2:
        raise SettingsError(f"--seeds must be at least 2: an interval over seeds needs two; got {settings.seeds}")
    require_at_least(
        settings, dict(first_seed=0, rank=0, num_samples=1, eval_limit=2, wd=0, collects_per_epoch=1, threads=0)
    )
    require_positive(settings, ("scale",))
    if not 0 < settings.confidence < 1:
        raise SettingsError(f"--confidence must be between 0 and 1; got {settings.confidence}")
    return settings


def recipes(settings: Settings) -> list[Task]:
    """Return the tasks of a study with what its flags change in them."""
    changes = {name: value for name in OVERRIDES if (value := getattr(settings, name)) is not None}
    tasks = [study_tasks.TASKS[name] for name in study_tasks.find_tasks(settings.tasks)]
    tasks = [study_tasks.quick(task) for task in tasks] if settings.quick else tasks
    return [study_tasks.check(dataclasses.replace(task, **changes)) for task in tasks]


def load_images(settings: Settings, tasks: Sequence[Task], device: torch.device) -> dict[str, StudyData]:
    """Load the images of every task that has any: what is missing shows before anything is written."""
    return {
        task.name: study_tasks.image_data(task, settings.data_path, device) for task in tasks if not task.is_regression
    }


def cell_name(task: Task, seed: int) -> str:
    return f"cells/{task.name}-{seed}.json"


def recipe_of(task: Task) -> dict[str, Any]:
    """Return what a seed's numbers depend on, in the form that JSON gives back."""
    free = ("seeds", "threads", "chosen")
    return dict(json.loads(json.dumps({k: v for k, v in dataclasses.asdict(task).items() if k not in free})))


def run_cells(
    settings: Settings, run: RunDir, tasks: Sequence[Task], images: dict[str, StudyData], cells: dict[str, Any]
) -> None:
    """Run every seed of every task that is not in `cells` yet, and add it."""
    todo = [(task, seed) for task in tasks for seed in seeds_of(settings, task) if cell_name(task, seed) not in cells]
    (run.path / "cells").mkdir(exist_ok=True)
    default_threads = torch.get_num_threads()
    with tqdm(total=len(todo), desc="study", unit="seed", smoothing=0) as bar:
        for task, seed in todo:
            torch.set_num_threads(task.threads or default_threads)
            began, epochs = time.perf_counter(), 0

            def tell(task: Task = task, seed: int = seed) -> None:
                nonlocal epochs
                epochs += 1
                total = 2 * task.epochs - task.branch
                bar.set_postfix_str(f"{task.name}, seed {seed}, epoch {epochs} of {total}")

            data = images.get(task.name) or study_tasks.regression_data(task, seed, run.device)
            options = dict(rank=settings.rank, scale=settings.scale, num_samples=settings.num_samples)
            try:
                found = run_seed(task, data, seed, run.device, after_epoch=tell, **options)
            except lb.NonFiniteError as error:
                raise SettingsError(f"{task.name}, seed {seed}: {error}") from None
            seconds = time.perf_counter() - began
            cell = {"task": task.name, "seed": seed, "recipe": recipe_of(task), **found, "seconds": seconds}
            run.write_json(cell_name(task, seed), cell)
            run.log(task=task.name, seed=seed, seconds=seconds)
            cells[cell_name(task, seed)] = json.loads(json.dumps(cell))
            bar.update()


def seeds_of(settings: Settings, task: Task) -> range:
    return range(settings.first_seed, settings.first_seed + task.seeds)


def experiment(
    settings: Settings, run: RunDir, tasks: Sequence[Task], images: dict[str, StudyData], cells: dict[str, Any]
) -> str:
    """Run what is left, then write table and figure, and results.json last; return the table."""
    run_cells(settings, run, tasks, images, cells)
    by_task = {task.name: [cells[cell_name(task, seed)] for seed in seeds_of(settings, task)] for task in tasks}
    analysis = study_report.analyse(tasks, by_task, settings.confidence)
    text = study_report.markdown(tasks, by_task, analysis, settings.confidence)
    write_atomically(run.path / "study.md", text)
    study_report.draw(run.path / "differences.png", tasks, analysis, settings.confidence)
    run.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(settings),
            "recipes": {task.name: dataclasses.asdict(task) for task in tasks},
            "confidence": settings.confidence,
            **analysis,
            "cells": by_task,
        },
    )
    return text


def work(settings: Settings) -> str:
    """Check everything, then run what is left of the study; return what to print."""
    device = resolve_device(settings.device)
    tasks = recipes(settings)
    run = RunDir(settings, OUTPUTS, device)
    images = load_images(settings, tasks, device)
    cells = {}
    for task in tasks if settings.resume else ():
        for seed in seeds_of(settings, task):
            if (cell := run.read_cell(cell_name(task, seed), recipe_of(task))) is not None:
                cells[cell_name(task, seed)] = cell
    run.begin()
    return f"{experiment(settings, run, tasks, images, cells)}\nwritten to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings))


if __name__ == "__main__":
    sys.exit(main())
