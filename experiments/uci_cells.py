"""One cell of `experiments.uci`: a method on a split of a data set; and the process that fills a split's cells."""

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from linear_operator.utils.errors import NanError, NotPSDError
from tqdm import tqdm

import lowrank_bdl as lb
from experiments.common import SettingsError, fixed, to_json, write_atomically
from experiments.uci_bench import Bench
from experiments.uci_data import Table, load_table, split_of
from experiments.uci_methods import METHODS, Outcome
from experiments.uci_metrics import metrics_of
from experiments.uci_settings import Settings

FAILURES = (ValueError, torch.linalg.LinAlgError, NotPSDError, NanError)  # ours are ValueErrors
USES_NETWORKS = tuple(name for name in METHODS if name != "GP")

Cell = dict[str, Any]


def cell_name(dataset: str, split: int, method: str) -> str:
    return f"cells/{dataset}-{split}-{method}.json"


def recipe_of(settings: Settings) -> dict[str, Any]:
    """Return what a cell's numbers depend on beside its data set, split and method."""
    return fixed(settings)


def run_split(
    settings: Settings, table: Table, number: int, methods: Sequence[str], write: Callable[[str, Cell], None]
) -> list[str]:
    """Train a split's networks, if a method needs them, and write a cell for each method.

    What fails on a split is left out, so that hours of other cells are not lost for it.

    Args:
        settings: Of the run.
        table: The data set.
        number: Of the split.
        methods: What to fill in.
        write: Takes each cell as soon as it is there.

    Returns:
        What failed, where and why.
    """
    failures: list[str] = []
    split = split_of(table, number, settings.normalize)
    try:
        with tqdm(desc=f"{table.name}, split {number}", unit="epoch", leave=False, disable=settings.jobs > 1) as bar:
            bench = Bench(settings, split, number, len(table.target), progress=bar.update)
            bar.reset(bench.num_epochs)
            began = time.perf_counter()
            if set(methods) & set(USES_NETWORKS):
                bench.chosen("SGD")
            training = time.perf_counter() - began
    except (SettingsError, lb.NonFiniteError) as error:
        return [f"{table.name}, split {number}: {error}"]
    for method in methods:
        began = time.perf_counter()
        try:
            outcome = METHODS[method](bench)
            metrics = metrics_of(outcome.forecast, split.std)
            if not all(map(math.isfinite, metrics.values())):
                raise lb.NonFiniteError("the predictions are not finite")
        except FAILURES as error:
            failures.append(f"{table.name}, split {number}, {method}: {error}")
            continue
        seconds = {"method": time.perf_counter() - began}
        if method in USES_NETWORKS:
            seconds["training"] = training  # of all candidates on all folds, shared by the methods
        write(method, _cell(settings, table, number, method, bench, outcome, metrics, seconds))
    return failures


def _cell(
    settings: Settings,
    table: Table,
    number: int,
    method: str,
    bench: Bench,
    outcome: Outcome,
    metrics: dict[str, float],
    seconds: dict[str, float],
) -> Cell:
    cell = {
        "dataset": table.name,
        "split": number,
        "method": method,
        "recipe": recipe_of(settings),
        "rows": {"train": len(bench.split.x_train), "test": len(bench.split.x_test)},
        "metrics": metrics,
        "levels": outcome.levels,
        "tried": dict(outcome.tried),
        "details": dict(outcome.details),
        "seconds": seconds,
    }
    if method in USES_NETWORKS:
        cell["parameters"] = bench.layout.numel
        cell["search"] = bench.search
        cell["at_edge"] = bench.at_edge("SGD" if method == "SGD" else "SWA")
    return cell


def end_with_parent() -> None:
    """End this process when the one that started it ends, killed or not; for processes of a pool."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def wait() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def fill_split(
    settings: Settings, dataset: str, number: int, methods: Sequence[str]
) -> tuple[tuple[str, int], list[str]]:
    """Fill a split's cells, in a process of its own maybe; return which split that was, and what failed."""
    torch.set_num_threads(settings.threads)
    assert settings.data_path is not None
    table, folder = load_table(dataset, Path(settings.data_path)), Path(settings.dir)

    def write(method: str, cell: Cell) -> None:
        write_atomically(folder / cell_name(dataset, number, method), to_json(cell))

    return (dataset, number), run_split(settings, table, number, methods, write)
