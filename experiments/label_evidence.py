"""Does the evidence see that labels are wrong? Train on corrupted labels; compare training loss and log evidence.

A fraction of the training labels is drawn anew, uniformly from all classes, and a network is trained on them. With
enough weights it fits them all the same: its training loss says little of what it has learnt. The log evidence of
Laplace's approximation, with a diagonal and with Kronecker factors, counts what that fit cost. A network that has
learnt nothing and says so has an evidence of -log(number of classes) an example.

Two prior precisions are shown: the one that training had, N times the weight decay, for which the weights are a mode;
and, for the same weights, the one of largest evidence. Images relabelled at a lower fraction are among those of every
higher one, with the same wrong labels. Images are not augmented. Nothing is chosen on the test images, whose labels are
right.

Examples:
  python -m experiments.label_evidence --dataset digits --model SmallConvNet --epochs 40 --dir runs/digits-labels
  python -m experiments.label_evidence --dataset MNIST --data_path DATA_DIR --model LeNet5 --train_limit 2000
      --epochs 100 --seeds 3 --dir runs/mnist-labels

Writes to --dir: cells/FRACTION-SEED.json (one for each network, so that a killed run goes on from there), labels/*.npy,
runs/ (of experiments.train), log.jsonl, evidence.png, table.txt, results.json (last), settings.json, environment.json,
command.sh
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import lowrank_bdl as lb
from experiments import label_evidence_report, train, train_settings
from experiments.common import (
    RunDir,
    SettingsError,
    fixed,
    parse_settings,
    replacing,
    require_at_least,
    resolve_device,
    run_script,
    setting,
    write_atomically,
)
from experiments.datasets import Datasets, load_dataset
from experiments.datasets.loading import read_training_labels
from experiments.evaluation import validate
from experiments.train_setup import make_trainer, try_model
from experiments.uncertainty_members import TrainedRun, TrainSettings, is_finished
from lowrank_bdl.curvature.scores import LABELS

PROG = "python -m experiments.label_evidence"
OUTPUTS = ("results.json", "log.jsonl", "table.txt", "evidence.png", "cells/*.json", "labels/*.npy")
SHARED = (
    "dataset", "data_path", "model", "train_limit", "epochs", "batch_size", "optimizer", "lr_init", "momentum", "wd",
    "device", "threads",
)  # fmt: skip
METHODS = {"diagonal": lb.DiagonalLaplace, "KFAC": lb.KFACLaplace}
Key = tuple[float, int]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained and measured."""

    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True)
    dataset: str = setting("MNIST", "data set, such as MNIST, CIFAR10, digits")
    data_path: str | None = setting(None, "folder with the data set's files (none for digits)", kind=str, free=True)
    model: str = setting("LeNet5", "network, such as LeNet5, PreResNet20, SmallConvNet")
    fractions: str = setting("0,0.1,0.25,0.5,0.75,1", "of labels that are drawn anew, separated by commas", free=True)
    seeds: int = setting(3, "networks for each fraction", free=True)
    first_seed: int = setting(0, "seed of the first: of labels, weights and order of the data")
    train_limit: int | None = setting(None, "use so many training images only", kind=int)
    epochs: int = setting(100, "epochs to train")
    batch_size: int = setting(32, "images in a training batch")
    optimizer: str = setting("SGD", "optimizer", choices=("SGD", "Adam", "AdamW"))
    lr_init: float = setting(0.01, "learning rate of the first half; it decays to a hundredth")
    momentum: float = setting(0.9, "momentum of SGD")
    wd: float = setting(1e-4, "weight decay; times the number of images, the precision of the prior")
    labels: str = setting("expected", "labels that the Fisher matrix is made of", choices=LABELS)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir, whose finished cells are kept", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run."""
    require_at_least(settings, dict(seeds=1, first_seed=0, threads=0))
    if not 0 < settings.wd < float("inf"):
        raise SettingsError(f"--wd must be positive, for it is the prior's precision; got {settings.wd}")
    fractions(settings)
    run_settings(settings, (0.0, settings.first_seed))
    return settings


def fractions(settings: Settings) -> list[float]:
    """Return the fractions, in rising order."""
    try:
        found = sorted({float(text) for text in settings.fractions.split(",")})
    except ValueError:
        found = []
    if not found or not 0 <= found[0] <= found[-1] <= 1:
        raise SettingsError(f"--fractions must be from 0 to 1, separated by commas; got {settings.fractions!r}")
    return found


def name_of(key: Key) -> str:
    return f"{key[0]:g}-{key[1]}"


def cell_file(key: Key) -> str:
    return f"cells/{name_of(key)}.json"


def run_settings(settings: Settings, key: Key) -> TrainSettings:
    """Return the settings of one training run, as its own command line would give them."""
    folder = Path(settings.dir)
    values = {name: getattr(settings, name) for name in SHARED}
    return train_settings.check(
        TrainSettings(
            **values,
            dir=str(folder / "runs" / name_of(key)),
            label_arr=str(folder / "labels" / f"{name_of(key)}.npy"),
            seed=key[1],
            use_test=True,
            augment="none",
            resume="auto",
            eval_freq=settings.epochs,
            save_freq=10**6,
            num_samples=1,
        )
    )


def corrupted_labels(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """Draw a fraction of the labels anew, uniformly from all classes: a tenth of ten classes' come out right.

    Args:
        labels: Right ones, (N,).
        num_classes: Number of classes.
        fraction: Of the images, rounded to a whole number of them.
        seed: Decides which images, and their labels; for one seed those of a lower fraction are among those of a
            higher one.
    """
    # not the seed itself: --train_limit takes its images from the first numbers of a generator with seed 0
    digest = hashlib.blake2b(f"corrupted labels/{seed}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    order = torch.randperm(len(labels), generator=generator)
    drawn = torch.randint(num_classes, (len(labels),), generator=generator)
    chosen = order[: round(fraction * len(labels))]
    found = labels.clone()
    found[chosen] = drawn[chosen]
    return found


def write_labels(path: Path, labels: Tensor) -> None:
    """Write labels as --label_arr of experiments.train reads them, or nothing."""
    with replacing(path) as file:
        np.save(file, labels.numpy().astype(np.int64))


def load_data(settings: Settings, label_arr: str | None, device: torch.device) -> Datasets:
    return load_dataset(
        settings.dataset,
        settings.data_path,
        use_test=True,
        label_arr=label_arr,
        train_limit=settings.train_limit,
        device=device,
    )


def evidence(settings: Settings, run: TrainedRun, data: Datasets, key: Key) -> dict[str, Any]:
    """Log evidence of both approximations around the last iterate, each an example [nats]."""
    count = len(data.train)
    found = {}
    for name, method in METHODS.items():
        laplace = method(run.model, labels=settings.labels)
        generator = torch.Generator().manual_seed(key[1])
        laplace.fit(data.train.batches(500), weight_decay=settings.wd, generator=generator, progress=False)
        at_training = laplace.log_marginal_likelihood() / count
        precision = laplace.optimize_prior_precision()
        found[name] = {
            "evidence": at_training,
            "best_evidence": laplace.log_marginal_likelihood() / count,
            "best_precision": precision,
            "log_likelihood": laplace.log_likelihood / count,
        }
    return found


def run_cell(settings: Settings, folder: RunDir, key: Key, clean: Datasets, device: torch.device) -> dict[str, Any]:
    """Train on corrupted labels, unless that is done already, and measure."""
    began = time.perf_counter()
    own = run_settings(settings, key)
    try:
        if not is_finished(own):
            train.work(own)
    except (SettingsError, lb.NonFiniteError) as error:
        raise SettingsError(f"{name_of(key)}: {error}") from None
    data = load_data(settings, own.label_arr, device)
    run = TrainedRun(Path(own.dir), data, device)
    assert data.test is not None
    try:
        laplace = evidence(settings, run, data, key)
    except (lb.LowRankBDLError, torch.linalg.LinAlgError, ValueError) as error:
        raise SettingsError(f"{name_of(key)}: {error}") from None
    return {
        "fraction": key[0],
        "seed": key[1],
        "recipe": recipe_of(settings),
        "changed": (data.train.targets != clean.train.targets).double().mean().item(),
        "images": len(data.train),
        "parameters": run.layout.numel,
        "prior_precision": len(data.train) * settings.wd,
        "train": validate(run.model, data.train),
        "test": validate(run.model, data.test),
        "squared_norm": run.last.double().square().sum().item(),
        "laplace": laplace,
        "seconds": time.perf_counter() - began,
    }


def recipe_of(settings: Settings) -> dict[str, Any]:
    """Return what a cell's numbers depend on beside its fraction and seed."""
    return fixed(settings)


def work(settings: Settings) -> str:
    """Check everything, then train and measure what is left; return what to print."""
    device = resolve_device(settings.device)
    folder = RunDir(settings, OUTPUTS, device)
    clean = load_data(settings, None, device)
    keys = [
        (f, s) for f in fractions(settings) for s in range(settings.first_seed, settings.first_seed + settings.seeds)
    ]
    try_model(make_trainer(run_settings(settings, keys[0]), clean, device).model, clean)
    done = {}
    for key in keys if settings.resume else ():
        if (cell := folder.read_cell(cell_file(key), recipe_of(settings))) is not None:
            done[key] = cell
    todo = [key for key in keys if key not in done]
    for key in todo:
        is_finished(run_settings(settings, key))  # refuses a folder of another run
    labels, names = read_training_labels(settings.dataset, settings.data_path)
    folder.begin()
    for name in ("cells", "labels", "runs"):
        (folder.path / name).mkdir(exist_ok=True)
    with tqdm(todo, desc="label evidence", unit="network", smoothing=0) as bar:
        for key in bar:
            bar.set_postfix_str(f"fraction {key[0]:g}, seed {key[1]}", refresh=False)
            corrupted = corrupted_labels(labels, len(names), *key)
            write_labels(folder.path / "labels" / f"{name_of(key)}.npy", corrupted)
            cell = run_cell(settings, folder, key, clean, device)
            folder.write_json(cell_file(key), cell)
            folder.log(fraction=key[0], seed=key[1], seconds=cell["seconds"])
            done[key] = json.loads(json.dumps(cell))
    cells = [done[key] for key in keys]
    text = label_evidence_report.table(cells, f"{settings.model} on {settings.dataset}")
    label_evidence_report.draw(folder.path / "evidence.png", cells, len(names), f"{settings.model}, {settings.dataset}")
    write_atomically(folder.path / "table.txt", text + "\n")
    folder.write_json(
        "results.json",
        {"schema": 1, "settings": dataclasses.asdict(settings), "data": clean.facts, "cells": cells,
         "summary": label_evidence_report.summary(cells)},
    )  # fmt: skip
    return f"{text}\n\nwritten to {folder.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
