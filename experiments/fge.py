"""Fast geometric ensembling: networks met on a cycle of learning rates, against independent ones at equal budget.

From the weights of each finished run, training goes on with a learning rate that falls from --lr_1 to --lr_2 and rises
again in every cycle; a network is kept at each lowest point (Garipov et al., 2018). Compared are the ensemble of the
networks that a run has met so far, each of them alone, the mean of their weights (SWA), and, with --independent, the
ensemble of independently trained networks. Budgets are epochs of training behind a prediction, those of the runs it
started from included. The ensembles of several runs are put together, as independent networks are.

Batch-norm statistics are recomputed from training images, augmented as they were trained on, for every network.

Examples:
  python -m experiments.train --dir runs/digits-1 --dataset digits --model SmallConvNet --epochs 40 --lr_init 0.05
      --no_schedule
  python -m experiments.train --dir runs/digits-2 --dataset digits --model SmallConvNet --epochs 60 --lr_init 0.05
      --seed 2
  python -m experiments.fge --run runs/digits-1 --independent runs/digits-2 --dir runs/digits-fge --epochs 20 --cycle 4
      --lr_1 0.05 --lr_2 0.0005
  python -m experiments.fge --run runs/a-160,runs/b-160 --independent runs/a-200,runs/b-200 --data_path DATA_DIR
      --dir runs/fge --epochs 40 --cycle 2 --lr_1 0.05 --lr_2 0.01

Writes to --dir: fge-1/, fge-2/, ... (runs of experiments.train: checkpoint.safetensors, snapshots.safetensors, ...),
predictions-NAME.npz (probabilities and log-likelihoods of every network), ensemble.png, table.txt, results.json (last),
settings.json, environment.json, command.sh
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments import fge_report, train, train_settings
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
from experiments.curve_bench import Bench, digest_of, read_thetas
from experiments.ensembling import load_data
from experiments.evaluation import BN_BATCH_SIZE, has_batch_norm
from experiments.fge_report import Predicted
from experiments.hessian_points import LAST
from experiments.train_setup import bn_images, make_model, try_model
from experiments.train_weights import read_start
from experiments.uncertainty_members import TrainSettings, is_finished, read_settings
from experiments.uncertainty_settings import names, of_training

PROG = "python -m experiments.fge"
OUTPUTS = ("results.json", "log.jsonl", "table.txt", "predictions-*.npz", "ensemble.png")
INDEPENDENT = "independent"
EVAL_BATCH_SIZE = 125


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained and compared."""

    run: str = setting(
        dataclasses.MISSING, "finished runs of experiments.train to go on from, separated by commas", kind=str
    )
    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True)
    independent: str | None = setting(
        None, "finished runs with independent networks to compare with, separated by commas", kind=str, alias="--ind"
    )
    epochs: int = setting(20, "epochs of cycles")
    cycle: int = setting(4, "epochs of a cycle, an even number")
    lr_1: float = setting(0.05, "highest learning rate, where a cycle begins and ends")
    lr_2: float = setting(1e-4, "lowest learning rate, in its middle")
    momentum: float = of_training("momentum")
    data_path: str | None = of_training("data_path", help="folder with the data set's files (default: the run's)")
    images: str = setting(
        "auto", "which to predict; auto: what the run reports", choices=("auto", "validation", "test")
    )
    eval_limit: int | None = setting(None, "predict so many images only (default: all)", kind=int)
    bn_size: int | None = setting(None, "training images for batch norm (default: as many as the run)", kind=int)
    device: str = of_training("device")
    threads: int = of_training("threads")
    resume: bool = setting(False, "go on with the run in --dir", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    require_at_least(settings, dict(epochs=1, eval_limit=2, bn_size=2, threads=0))
    if settings.cycle < 2 or settings.cycle % 2:
        raise SettingsError(f"--cycle must be even, for its lowest point lies in the middle; got {settings.cycle}")
    if not 0 < settings.lr_2 <= settings.lr_1 < math.inf:
        raise SettingsError(
            f"--lr_1 and --lr_2 must be positive, --lr_2 not above; got {settings.lr_1}, {settings.lr_2}"
        )
    if settings.epochs < settings.cycle * 3 // 2:
        raise SettingsError(
            f"--epochs must hold 1.5 cycles, for two networks; got {settings.epochs} and {settings.cycle}"
        )
    if not names(settings.run):
        raise SettingsError("--run must name at least one run")
    return settings


# ---- runs ------------------------------------------------------------------------------------------------------------


def runs_of(settings: Settings) -> list[TrainSettings]:
    """Return the settings of the cyclical runs, one for each run that is gone on from.

    Raises:
        SettingsError: If a run is missing, or cannot be gone on from.
    """
    found = []
    for number, start in enumerate(names(settings.run), start=1):
        old = read_settings(Path(start))
        changes: dict[str, Any] = dict(
            dir=str(Path(settings.dir) / f"fge-{number}"), init_from=start, resume="auto", optimizer="SGD", vi=False,
            temperature=1.0, momentum=settings.momentum, epochs=settings.epochs, lr_init=settings.lr_1, swa=True,
            swa_start=0, swa_lr=settings.lr_1, swa_c_epochs=settings.cycle, cyclical_lr=settings.lr_2,
            collects_per_epoch=1, schedule="cyclical", no_schedule=False, snapshots=True, cov_mat=False, include=None,
            ema=False, polyak=False, swa_resume=None, num_samples=2, eval_freq=settings.epochs, save_freq=10**6,
            device=settings.device, threads=settings.threads, prior_std=None, vi_std_lr=None,
        )  # fmt: skip
        if settings.data_path is not None:
            changes["data_path"] = settings.data_path
        if settings.bn_size is not None:
            changes["bn_size"] = settings.bn_size
        found.append(train_settings.check(dataclasses.replace(old, **changes)))
    first = found[0]
    for own, start in zip(found, names(settings.run), strict=True):
        for name in ("dataset", "model", "use_test", "split_classes", "train_limit"):
            if getattr(own, name) != getattr(first, name):
                raise SettingsError(f"--run {start} has another --{name} than the first run")
    return found


def epochs_behind(path: str) -> int:
    """Return the epochs of training behind a run's weights, those of the run that it started from included."""
    own = read_settings(Path(path))
    return own.epochs + (0 if own.init_from is None else epochs_behind(own.init_from))


# ---- predictions -----------------------------------------------------------------------------------------------------


def predictions(bench: Bench, run: RunDir, name: str, thetas: Tensor, epochs: Sequence[int]) -> Predicted:
    """Predict with every network, or read what an earlier part of the run has predicted.

    Args:
        bench: Network and images.
        run: Where it is kept.
        name: Of the networks.
        thetas: Their weights, (M, D).
        epochs: Of training behind the ensemble of the first 1, 2, ..., M of them; (M,).
    """
    path = run.path / f"predictions-{name}.npz"
    identity = json.dumps([fixed(bench.settings), digest_of(list(thetas)), list(epochs)])
    if bench.settings.resume:
        try:
            with np.load(path) as arrays:
                if str(arrays["identity"]) == identity:
                    tensors = (torch.from_numpy(arrays[key]) for key in ("probabilities", "log_likelihood", "targets"))
                    return Predicted(list(epochs), *tensors)
        except (OSError, ValueError, KeyError):
            pass  # made anew
    bn = bn_images(bench.recipe, bench.data).batches(BN_BATCH_SIZE) if has_batch_norm(bench.model) else None
    device = next(bench.model.parameters()).device
    found = lb.predict(
        bench.model,
        thetas.to(device),
        bench.split(bench.shown).batches(EVAL_BATCH_SIZE),
        bn_loader=bn,
        keep_samples=True,
    )
    assert found.sample_means is not None and found.sample_log_likelihood is not None and found.targets is not None
    tensors = tuple(t.cpu() for t in (found.sample_means, found.sample_log_likelihood, found.targets))
    keys = ("probabilities", "log_likelihood", "targets")
    with replacing(path) as stream:
        np.savez(stream, identity=np.array(identity), **{k: t.numpy() for k, t in zip(keys, tensors, strict=True)})
    return Predicted(list(epochs), *tensors)


def snapshots_of(own: TrainSettings, model: nn.Module) -> Tensor:
    """Return the networks that a cyclical run has kept, (M, D), oldest first."""
    posterior = lb.load_posterior(Path(own.dir) / train.SNAPSHOTS, lb.ParameterLayout.from_module(model))
    assert isinstance(posterior, lb.EmpiricalPosterior)
    return posterior.thetas


def running_means(thetas: Tensor) -> Tensor:
    """Return the means of the first 1, 2, ..., M vectors, (M, D)."""
    count = torch.arange(1, len(thetas) + 1, dtype=torch.float64).unsqueeze(-1)
    return (thetas.double().cumsum(0) / count).to(thetas.dtype)


def experiment(bench: Bench, run: RunDir, runs: Sequence[TrainSettings], independent: list[Tensor]) -> str:
    """Train, predict, draw, and write results.json last; return the table."""
    settings, began = bench.settings, time.perf_counter()
    for own in runs:
        if not is_finished(own):
            train.work(own)
    trained = time.perf_counter()
    ensembles, averages = [], []
    for number, own in enumerate(runs, start=1):
        thetas = snapshots_of(own, bench.model)
        before = epochs_behind(str(own.init_from))
        epochs = [before + settings.cycle // 2 + settings.cycle * k for k in range(len(thetas))]
        ensembles.append(predictions(bench, run, f"fge-{number}", thetas, epochs))
        averages.append(predictions(bench, run, f"swa-{number}", running_means(thetas), epochs))
    alone = None
    if independent:
        epochs = np.cumsum([epochs_behind(path) for path in names(settings.independent or "")]).tolist()
        alone = predictions(bench, run, INDEPENDENT, torch.stack(independent), epochs)
    total = epochs_behind(str(runs[0].init_from)) + settings.epochs
    found = fge_report.measure(ensembles, averages, alone, total)
    title = f"{bench.recipe.model} on {bench.data.name}"
    fge_report.draw(run.path / "ensemble.png", found, bench.shown, title)
    text = fge_report.table(found, title, bench.shown, len(bench.split(bench.shown)))
    write_atomically(run.path / "table.txt", text + "\n")
    run.write_json(
        "results.json",
        {
            **bench.facts,
            "results": found,
            "equal_budget": fge_report.at_equal_budget(found),
            "seconds": {"train": trained - began, "predict": time.perf_counter() - trained},
        },
    )
    return text


def work(settings: Settings) -> str:
    """Check everything, then train and compare; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    runs = runs_of(settings)
    data, shown = load_data(settings, runs[0], device)  # type: ignore[arg-type]
    model = make_model(runs[0], data, device)
    try_model(model, data)
    for own in runs:
        read_start(str(own.init_from), model)
        is_finished(own)  # refuses a folder with another run
    others = names(settings.independent or "")
    independent = read_thetas(others, LAST, model)
    for path in others:
        epochs_behind(path)
    run.begin()
    try:
        text = experiment(Bench(settings, runs[0], data, shown, model), run, runs, independent)
    except lb.LowRankBDLError as error:
        raise SettingsError(" ".join(str(error).split())) from None
    return f"{text}\n\nwritten to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
