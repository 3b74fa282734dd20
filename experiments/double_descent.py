"""Test error against a network's width, with wrong labels: SGD, SWAG, deep ensembles and MultiSWAG.

A fraction of the training labels is drawn anew. Networks that can just about fit those are worse than narrower and
wider ones: the double descent of SGD's test error. Wilson and Izmailov (2020, section 7) find that averaging over
SWAG takes most of that away, and MultiSWAG all of it: error falls with width.

SGD            the last iterate of each run, --members of them at every width
SWAG           --num_samples draws of the Gaussian of each run
deep ensemble  the last iterates of all members, averaged
MultiSWAG      the draws of all members' Gaussians, averaged

All members see the same wrong labels. Batch-norm statistics are recomputed for every draw. Nothing is chosen on the
test images, whose labels are right; SWAG's scale is the published one.

Examples:
  python -m experiments.double_descent --dataset digits --model SmallConvNet --widths 1,2,4,8 --epochs 60 --swa_start 40
      --batch_size 32 --label_noise 0.2 --dir runs/digits-widths
  python -m experiments.double_descent --dataset CIFAR10 --data_path DATA_DIR --model PreResNet8 --train_limit 10000
      --widths 1,2,4,6,8,12,16,24,32 --epochs 100 --swa_start 70 --dir runs/preresnet8-widths
  python -m experiments.double_descent --dataset CIFAR100 --data_path DATA_DIR --model PreResNet20 --label_noise 0
      --widths 2,4,8,12,16,20,24,32,48,64 --epochs 200 --swa_start 161 --lr_init 0.1 --swa_lr 0.05 --wd 3e-4
      --amp bfloat16 --channels_last --dir runs/cifar100-widths

Writes to --dir: labels.npy, runs/ (of experiments.train, resumed where they were killed), cells/WIDTH-MEMBER.json and
.npz (what a run predicts; kept by --resume), double_descent.png, table.txt, log.jsonl, results.json (last),
settings.json, environment.json, command.sh
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm import tqdm

import lowrank_bdl as lb
from experiments import double_descent_report, train, train_settings
from experiments.common import (
    RunDir,
    SettingsError,
    fixed,
    parse_settings,
    replacing,
    require_at_least,
    require_positive,
    resolve_device,
    run_script,
    setting,
    write_atomically,
)
from experiments.datasets import Datasets
from experiments.datasets.loading import read_training_labels
from experiments.evaluation import Predictions, predict_splits, validate
from experiments.label_evidence import corrupted_labels, write_labels
from experiments.train_setup import bn_images, make_trainer, try_model
from experiments.uncertainty_members import TrainedRun, TrainSettings, is_finished
from experiments.uncertainty_settings import names, of_training

PROG = "python -m experiments.double_descent"
OUTPUTS = (
    "results.json", "log.jsonl", "table.txt", "double_descent.png", "labels.npy", "cells/*.json", "cells/*.npz",
)  # fmt: skip
SHARED = (
    "dataset", "data_path", "train_limit", "batch_size", "device", "threads", "amp", "channels_last", "epochs",
    "lr_init", "momentum", "wd", "augment", "swa_start", "swa_lr", "max_num_models", "collects_per_epoch", "bn_size",
    "checkpoint_freq",
)  # fmt: skip
METHODS = ("SGD", "SWAG")
Key = tuple[int, int]  # width, member


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained and measured."""

    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True)
    model: str = setting(
        "PreResNet8", "network that comes in widths: PreResNet8, PreResNet20, VGG16, SmallConvNet, ..."
    )
    widths: str = setting("1,2,4,8,16,32", "channels of the first stage, separated by commas", free=True)
    members: int = setting(3, "networks at each width", free=True)
    label_noise: float = setting(0.2, "fraction of the training labels that is drawn anew")
    dataset: str = of_training("dataset")
    data_path: str | None = of_training("data_path")
    train_limit: int | None = of_training("train_limit")
    eval_limit: int | None = setting(None, "measure on so many test images (default: all)", kind=int)
    batch_size: int = of_training("batch_size")
    device: str = of_training("device")
    threads: int = of_training("threads")
    amp: str = of_training("amp")
    channels_last: bool = of_training("channels_last")
    epochs: int = of_training("epochs", default=100, help="epochs of each run", free=False)
    lr_init: float = of_training("lr_init", default=0.05)
    momentum: float = of_training("momentum")
    wd: float = of_training("wd")
    augment: str = of_training("augment", default="none", help="random crops, and flips for photographs; or none")
    swa_start: int = of_training("swa_start", default=70)
    swa_lr: float = of_training("swa_lr", default=0.01)
    max_num_models: int = of_training("max_num_models")
    collects_per_epoch: int = of_training("collects_per_epoch")
    bn_size: int | None = of_training("bn_size")
    checkpoint_freq: int = of_training("checkpoint_freq", default=10)
    num_samples: int = setting(20, "draws of each SWAG")
    scale: float = of_training("scale")
    seed: int = setting(0, "seed of labels, weights and order of the data")
    resume: bool = setting(False, "go on with the run in --dir, whose finished cells are kept", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    require_at_least(settings, dict(members=1, seed=0, threads=0, num_samples=1, eval_limit=2))
    if not 0 <= settings.label_noise <= 1:
        raise SettingsError(f"--label_noise must be from 0 to 1; got {settings.label_noise}")
    require_positive(settings, ("scale",))
    widths(settings)
    run_settings(settings, (1, 0))
    return settings


def widths(settings: Settings) -> list[int]:
    """Return the widths, in rising order."""
    given = names(settings.widths)
    if not given or not all(text.isdecimal() and int(text) > 0 for text in given):
        raise SettingsError(f"--widths must be whole numbers from 1, separated by commas; got {settings.widths!r}")
    return sorted({int(text) for text in given})


def keys_of(settings: Settings) -> list[Key]:
    return [(width, member) for width in widths(settings) for member in range(settings.members)]


def name_of(key: Key) -> str:
    return f"{key[0]}-{key[1]}"


def run_settings(settings: Settings, key: Key) -> TrainSettings:
    """Return the settings of one training run, as its own command line would give them."""
    folder = Path(settings.dir)
    return train_settings.check(
        TrainSettings(
            **{name: getattr(settings, name) for name in SHARED},
            dir=str(folder / "runs" / name_of(key)),
            model=f"{settings.model}-width{key[0]}",
            label_arr=str(folder / "labels.npy") if settings.label_noise else None,
            seed=1000 * settings.seed + key[1],
            use_test=True,
            swa=True,
            cov_mat=True,
            resume="auto",
            eval_freq=settings.epochs,
            save_freq=10**6,
            num_samples=2,
        )
    )


def run_cell(settings: Settings, folder: RunDir, key: Key, device: torch.device) -> dict[str, Any]:
    """Train, unless that is done already; predict with SGD and SWAG, and write what is predicted."""
    began = time.perf_counter()
    own = run_settings(settings, key)
    if not is_finished(own):
        train.work(own)
    data = train.load_data(own, device)
    run = TrainedRun(Path(own.dir), data, device)
    assert data.test is not None and run.swag is not None
    test = data.test if settings.eval_limit is None else data.test.first(min(settings.eval_limit, len(data.test)))
    weights: dict[str, Any] = {"SGD": run.last, "SWAG": run.swag.posterior(scale=settings.scale)}
    arrays: dict[str, np.ndarray] = {}
    for method in METHODS:
        found = predict_splits(
            run.model, weights[method], {"test": test}, bn_images(own, data), num_samples=settings.num_samples,
            seed=key[1], layout=run.layout, progress=False,
        )["test"]  # fmt: skip
        assert found.targets is not None and found.log_likelihood is not None
        arrays[f"{method}/probabilities"] = found.probabilities.cpu().numpy()
        arrays[f"{method}/log_likelihood"] = found.log_likelihood.cpu().numpy()
        arrays["targets"] = found.targets.cpu().numpy()
    with replacing(folder.path / f"cells/{name_of(key)}.npz") as file:
        np.savez_compressed(file, **arrays)
    return {
        "width": key[0],
        "member": key[1],
        "recipe": recipe_of(settings),
        "parameters": run.layout.numel,
        "train": validate(run.model, data.train),
        "train_loss": run.trainer.history[-1]["loss"],
        "seconds": time.perf_counter() - began,
    }


def recipe_of(settings: Settings) -> dict[str, Any]:
    """Return what a cell's numbers depend on beside its width and member."""
    return fixed(settings)


def read_predictions(folder: RunDir, key: Key) -> dict[str, Predictions]:
    """Read what a run predicts, by method.

    Raises:
        SettingsError: If the file is missing or damaged.
    """
    path = folder.path / f"cells/{name_of(key)}.npz"
    try:
        with np.load(path) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            return {
                method: Predictions(
                    found[f"{method}/probabilities"],
                    torch.special.entr(found[f"{method}/probabilities"]).sum(-1),
                    found["targets"],
                    found[f"{method}/log_likelihood"],
                )
                for method in METHODS
            }
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise SettingsError(f"--resume: cannot read {path}: {error}; delete its .json to make it again") from None


def write_noisy_labels(settings: Settings, folder: RunDir) -> int:
    """Write the labels that all networks are trained on; return how many classes there are."""
    labels, classes = read_training_labels(settings.dataset, settings.data_path)
    if settings.label_noise:
        noisy = corrupted_labels(labels, len(classes), settings.label_noise, settings.seed)
        write_labels(folder.path / "labels.npy", noisy)
    return len(classes)


def try_networks(settings: Settings, device: torch.device) -> Datasets:
    """Load the data with right labels; refuse a network that does not fit, at any width, before anything is written."""
    plain = dataclasses.replace(run_settings(settings, (1, 0)), label_arr=None)
    data = train.load_data(plain, device)
    for width in widths(settings):
        own = dataclasses.replace(run_settings(settings, (width, 0)), label_arr=None)
        try_model(make_trainer(own, data, device).model, data)
    return data


def work(settings: Settings) -> str:
    """Check everything, then train and measure what is left; return what to print."""
    device = resolve_device(settings.device)
    folder = RunDir(settings, OUTPUTS, device)
    data = try_networks(settings, device)
    keys = keys_of(settings)
    done = {}
    for key in keys if settings.resume else ():
        if (cell := folder.read_cell(f"cells/{name_of(key)}.json", recipe_of(settings))) is not None:
            read_predictions(folder, key)
            done[key] = cell
    todo = [key for key in keys if key not in done]
    for key in todo:
        is_finished(run_settings(settings, key))  # refuses a folder of another run
    folder.begin()
    for name in ("cells", "runs"):
        (folder.path / name).mkdir(exist_ok=True)
    write_noisy_labels(settings, folder)
    with tqdm(todo, desc="double descent", unit="network", smoothing=0) as bar:
        for key in bar:
            bar.set_postfix_str(f"width {key[0]}, member {key[1]}", refresh=False)
            try:
                cell = run_cell(settings, folder, key, device)
            except (SettingsError, lb.NonFiniteError) as error:
                raise SettingsError(f"width {key[0]}, member {key[1]}: {error}") from None
            folder.write_json(f"cells/{name_of(key)}.json", cell)
            folder.log(width=key[0], member=key[1], seconds=cell["seconds"])
            done[key] = json.loads(json.dumps(cell))
    return f"{report(settings, folder, data, done)}\n\nwritten to {folder.path}"


def report(settings: Settings, folder: RunDir, data: Datasets, done: dict[Key, dict[str, Any]]) -> str:
    """Write table and figure, and results.json last; return the table."""
    rows = []
    for width in widths(settings):
        own = [key for key in keys_of(settings) if key[0] == width]
        predictions = [read_predictions(folder, key) for key in own]
        rows.append(double_descent_report.row(width, [done[key] for key in own], predictions, settings.seed))
    noise = f", {100 * settings.label_noise:g} % of the labels drawn anew" if settings.label_noise else ""
    title = f"{settings.model} on {settings.dataset}{noise}"
    text = double_descent_report.table(
        rows, f"{title}: {len(data.train):,} training images, {settings.members} networks"
    )
    double_descent_report.draw(folder.path / "double_descent.png", rows, title)
    write_atomically(folder.path / "table.txt", text + "\n")
    folder.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(settings),
            "data": data.facts,
            "reported_on": "test",
            "widths": rows,
            "cells": [done[key] for key in keys_of(settings)],
        },
    )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
