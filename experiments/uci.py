"""UCI regression: weight averaging and inference in a subspace against references, on the standard splits.

SGD            the last iterate; a ReLU network with one hidden layer of 50 units, which predicts mean and variance
SWA, SWAG      the mean of the snapshots of the second half of the epochs, and the Gaussian around it
PCA+ESS, PCA+VI, PCA+NUTS   the posterior in the principal subspace of the snapshots around SWA: by elliptical slice
               sampling, mean-field variational inference, and the no-U-turn sampler
neural-linear  Bayesian linear regression on the last hidden layer of the SWA network
GP             an exact Gaussian process on the features

Everything is chosen on the training rows of a split: learning rate and weight decay, then scale, temperature and width
of the prior, by the log-likelihood of held-out folds of them, for each split anew; all candidates of a split train side
by side. Features and targets are normalised with the training rows. Log-likelihoods are of the Gaussian with the
moments of the predictions (as published) and of the mixture itself. More than 2,000 rows have hidden layers of 1000,
500 and 50 units, more than 6,000 of 1000, 1000, 500 and 50, and no last one of 2, which the released code put there.

Examples:
  python -m experiments.uci --data_path DATA_DIR --jobs 2
  python -m experiments.uci --data_path DATA_DIR --dataset yacht --splits 0-2 --methods SGD,PCA+ESS --dir runs/yacht
  python -m experiments.uci --data_path DATA_DIR --dataset concrete --normalize all --no_schedule --epochs 1000
      --swag_start 500 --lr_init 1e-3 --wd 0.01 --double-bias-lr --temperature 1e4 --prior_std 1 --dir runs/as-released
  python -m experiments.uci --data_path DATA_DIR --jobs 2 --resume

Writes to --dir: cells/DATASET-SPLIT-METHOD.json (kept by --resume), uci.md, uci.png, log.jsonl, results.json (last),
settings.json, environment.json, command.sh
"""

import dataclasses
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from experiments import uci_report
from experiments.common import RunDir, SettingsError, parse_settings, run_script, write_atomically
from experiments.uci_cells import Cell, cell_name, end_with_parent, fill_split, recipe_of
from experiments.uci_data import Table, load_table
from experiments.uci_settings import Settings, check, datasets_of, methods_of, preset_of, splits_of, training_of

PROG = "python -m experiments.uci"
OUTPUTS = ("results.json", "log.jsonl", "uci.md", "uci.png", "cells/*.json")

Todo = dict[tuple[str, int], list[str]]  # by data set and split, the methods that are left


def tables_of(settings: Settings) -> dict[str, Table]:
    """Read every data set, and see that its splits and recipe are possible.

    Raises:
        SettingsError: If one is not there, or lacks a split.
    """
    assert settings.data_path is not None
    tables = {name: load_table(name, Path(settings.data_path)) for name in datasets_of(settings)}
    for name, table in tables.items():
        if max(splits_of(settings)) >= table.num_splits:
            raise SettingsError(f"--splits: {name} has splits 0 to {table.num_splits - 1}; got {settings.splits!r}")
        training_of(settings, preset_of(settings, len(table.target)))
    return tables


def fill(settings: Settings, run: RunDir, todo: Todo) -> None:
    """Fill all cells that are left, several splits at once if asked for.

    Raises:
        SettingsError: If some could not be filled, once all others are.
    """
    (run.path / "cells").mkdir(exist_ok=True)
    failed: list[str] = []
    with tqdm(total=len(todo), desc="splits", unit="split", smoothing=0) as bar:

        def done(split: tuple[str, int], failures: list[str]) -> None:
            failed.extend(failures)
            run.log(dataset=split[0], split=split[1], methods=todo[split])
            bar.set_postfix_str(f"{split[0]}, split {split[1]}")
            bar.update()

        if settings.jobs == 1:
            for (dataset, number), methods in todo.items():
                done(*fill_split(settings, dataset, number, methods))
        else:
            # spawned, not forked: torch's threads do not survive a fork
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(settings.jobs, context, initializer=end_with_parent) as pool:
                futures = [pool.submit(fill_split, settings, *split, methods) for split, methods in todo.items()]
                try:
                    for future in as_completed(futures):
                        done(*future.result())
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    if failed:
        raise SettingsError(f"{'; '.join(failed)} (all else is kept by --resume)")


def experiment(settings: Settings, run: RunDir, tables: dict[str, Table], todo: Todo) -> str:
    """Fill what is left, then write table and figure, and results.json last; return the table."""
    fill(settings, run, todo)
    cells = {
        name: {
            method: [_finished(settings, run, name, number, method) for number in splits_of(settings)]
            for method in methods_of(settings)
        }
        for name in tables
    }
    found = uci_report.summary(cells)
    text = uci_report.markdown(cells, found, notes_of(settings))
    write_atomically(run.path / "uci.md", text)
    uci_report.draw(run.path / "uci.png", found)
    sources = {
        name: {"file": table.source, "rows": len(table.target), "features": table.features.shape[1]}
        for name, table in tables.items()
    }
    results = {"schema": 1, "settings": dataclasses.asdict(settings), "data": sources, "summary": found, "cells": cells}
    run.write_json("results.json", results)
    return text


def notes_of(settings: Settings) -> list[str]:
    """Say how the numbers of the table were made."""
    return [
        f"Mean ± standard deviation over {len(splits_of(settings))} splits. Log-likelihood [nat a row]: of the "
        "Gaussian with the moments of the predictions, as published, in original units (large sets: of normalised "
        "targets); mixture: of the model average itself. RMSE in original units. 95 % coverage: of that Gaussian's "
        "interval.",
        f"Published: Izmailov et al. (2019), supplement. Normalised with the {settings.normalize} rows of a split. "
        f"Rates and weight decays were chosen by {settings.folds} folds of the training rows of each split alone, and "
        "so were scale, temperature and prior where no flag gives them; results.json holds all that was tried.",
    ]


def _finished(settings: Settings, run: RunDir, dataset: str, number: int, method: str) -> Cell:
    cell = run.read_cell(cell_name(dataset, number, method), recipe_of(settings))
    assert cell is not None
    return cell


def work(settings: Settings) -> str:
    """Check everything, then run what is left; return what to print."""
    tables = tables_of(settings)
    run = RunDir(settings, OUTPUTS, torch.device("cpu"))
    todo: Todo = {}
    for name in tables:
        for number in splits_of(settings):
            for method in methods_of(settings):
                kept = settings.resume and run.read_cell(cell_name(name, number, method), recipe_of(settings))
                if not kept:
                    todo.setdefault((name, number), []).append(method)
    run.begin()
    return f"{experiment(settings, run, tables, todo)}\nwritten to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
