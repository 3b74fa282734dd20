"""Regression on one number: what inference in subspaces is sure of, beside inference over all weights.

SGD, SWAG      one network of 15,801 weights on the features (x/2, (x/2)²), and the Gaussian of its snapshots
Random+ESS, PCA+ESS, Curve+ESS   elliptical slice sampling in random directions around SWA, in the principal subspace
               of the snapshots, and in the plane of a Bezier curve of low loss between two networks
VI, NUTS       mean-field variational inference and the no-U-turn sampler in one of these (the curve's by default)

Prior, HMC, Ensemble, MFVI   over all 261 weights of a small network, under one prior and one likelihood: draws from the
               prior, Hamiltonian Monte Carlo (the no-U-turn sampler), posterior modes from many starts, and mean-field
               variational inference

The published temperatures, priors and step numbers are the defaults (no temperature of VI was published: it has its
subspace's). Bands are of the function, as published; dotted lines add the noise. Correlations of f(x) with f(x') are of
the functions that the prior over the weights, or what a method draws, implies. All of it took twelve minutes on a busy
core, HMC five of them.

Examples:
  python -m experiments.synthetic_regression --data_path DATA_DIR --dir runs/toy
  python -m experiments.synthetic_regression --methods Prior,HMC,Ensemble,MFVI --dir runs/toy-all-weights
  python -m experiments.synthetic_regression --data_path DATA_DIR --dir runs/toy --resume
  python -m experiments.synthetic_regression --methods Random+ESS,Curve+ESS --thin 20 --dir runs/toy-mixed

Writes to --dir: cells/METHOD.json and .npz, networks.safetensors, swag.safetensors (all kept by --resume), bands.png,
all_weights.png, correlations.png, table.txt, log.jsonl, results.json (last), settings.json, environment.json,
command.sh
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

import lowrank_bdl as lb
from experiments import synthetic_regression_report as report
from experiments.common import RunDir, SettingsError, parse_settings, run_script, write_atomically
from experiments.synthetic_regression_cells import Cell, correlation, read_cell, read_functions, run_cell
from experiments.synthetic_regression_data import load
from experiments.synthetic_regression_methods import Bench
from experiments.synthetic_regression_settings import (
    ALL_WEIGHTS_METHODS,
    SUBSPACE_METHODS,
    Settings,
    check,
    methods_of,
)

PROG = "python -m experiments.synthetic_regression"
OUTPUTS = (
    "results.json", "log.jsonl", "cells/*", "networks.safetensors", "swag.safetensors", "table.txt", "*.png",
)  # fmt: skip


def prepare(settings: Settings) -> tuple[RunDir, Bench, dict[str, Cell | None]]:
    """Check everything, begin a run, and return it with what its methods share, and the cells that there are.

    Raises:
        SettingsError: If it cannot run; nothing is written then.
    """
    data = load(settings)
    run = RunDir(settings, OUTPUTS, torch.device("cpu"))
    bench = Bench(settings, data, run)
    cells = {method: read_cell(run, bench, method) if settings.resume else None for method in methods_of(settings)}
    run.begin()
    return run, bench, cells


def fill(run: RunDir, bench: Bench, cells: dict[str, Cell | None]) -> dict[str, Cell]:
    """Fill the cells that are left.

    Raises:
        SettingsError: If a method fails, naming it; finished cells are kept by --resume.
    """
    (run.path / "cells").mkdir(exist_ok=True)
    left = [method for method, cell in cells.items() if cell is None]
    found = {method: cell for method, cell in cells.items() if cell is not None}
    if set(left) & set(SUBSPACE_METHODS):
        began = time.perf_counter()
        _ = bench.networks
        run.log(part="training", seconds=time.perf_counter() - began)
    with tqdm(left, "methods", unit="method", disable=not left) as bar:
        for method in bar:
            bar.set_postfix_str(method)
            try:
                found[method] = run_cell(run, bench, method)
            except (lb.LowRankBDLError, ValueError) as error:
                raise SettingsError(f"{method}: {' '.join(str(error).split())}") from None
    return {method: found[method] for method in cells}


def draw(run: RunDir, bench: Bench, cells: dict[str, Cell]) -> None:
    """Draw the figures that there are cells for."""
    settings, x = bench.settings, bench.grid.numpy()
    parts = {
        "bands.png": (SUBSPACE_METHODS, f"A network of {bench.layout.numel:,} weights"),
        "all_weights.png": (ALL_WEIGHTS_METHODS, "All weights of a small network, one prior and likelihood"),
    }
    for name, (methods, title) in parts.items():
        own = [cells[method] for method in methods if method in cells]
        if own:
            report.draw_bands(run.path / name, own, x, bench.data, settings.noise_variance, title)
    functions = {method: read_functions(run, method) for method in cells if cells[method]["draws"] > 2}
    if functions:
        titles = {method: report.title_of(cells[method]) for method in functions}
        report.draw_correlations(run.path / "correlations.png", functions, titles, x)


def experiment(run: RunDir, bench: Bench, cells: dict[str, Cell | None]) -> dict[str, Cell]:
    """Fill what is left, then write table and figures, and results.json last; return all cells."""
    found = fill(run, bench, cells)
    draw(run, bench, found)
    text = f"{report.table(list(found.values()))}\n\n{report.notes(bench.data, bench.settings.noise_variance)}"
    write_atomically(run.path / "table.txt", f"{text}\n")
    run.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(bench.settings),
            "data": {
                "source": bench.data.source,
                "drawn": bench.data.drawn,
                "sha256": bench.data.digest,
                "train": len(bench.data.train[0]),
                "held_out": {name: len(x) for name, (x, _) in bench.data.held_out.items()},
            },
            "x": bench.grid.tolist(),
            "cells": found,
            "correlation_at_neighbours": neighbours(run, bench, found),
        },
    )
    return found


def neighbours(run: RunDir, bench: Bench, cells: dict[str, Cell]) -> dict[str, dict[str, float]]:
    """Return corr(f(0), f(x)) at a few x, a number to compare laws by."""
    x, found = bench.grid, {}
    origin = int(x.abs().argmin())
    for method, cell in cells.items():
        if cell["draws"] > 2:
            row = correlation(read_functions(run, method))[origin]
            places = {place: int((x - place).abs().argmin()) for place in (-8.0, -3.0, 1.0, 3.0, 8.0)}
            found[method] = {f"{place:g}": float(row[number]) for place, number in places.items()}
    return found


def work(settings: Settings) -> str:
    """Check everything, then run what is left; return what to print."""
    run, bench, cells = prepare(settings)
    experiment(run, bench, cells)
    return f"{(run.path / 'table.txt').read_text(encoding='utf-8')}written to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
