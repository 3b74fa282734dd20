"""Table, figures and results.json of `experiments.ensembling`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import ensembling_plots
from experiments.common import format_table
from experiments.ensembling_cells import OF_SWA, Bench, Cell
from experiments.ensembling_plots import Curve, Point

Cells = Mapping[str, Mapping[str, Any]]
Plan = Mapping[str, Sequence[Cell]]
COLUMNS = {"accuracy": ("accuracy %", 100, 2), "nll": ("NLL", 1, 4), "ece": ("ECE %", 100, 2)}


def label_of(cell: Cell) -> str:
    """Name a cell as the table does."""
    facts = []
    if cell.level is not None:
        facts.append(f"{'level' if cell.method == 'NaiveNoise' else 'scale'} {cell.level:g}")
    if cell.method == "SWAG":
        facts.append(f"rank {cell.rank}")
    if cell.first is not None:
        facts.append(f"first {cell.first} iterates")
    if cell.bn_batches == OF_SWA:
        facts.append("statistics of SWA")
    elif cell.bn_batches is not None:
        facts.append(f"{cell.bn_batches} batches for BN")
    return f"{cell.method} ({', '.join(facts)})" if facts else cell.method


def table(planned: Plan, cells: Cells, bench: Bench, run: str) -> str:
    """Lay out every cell of every part, each number with its standard error over the images."""
    settings = bench.run.settings
    text = [
        f"{settings.model} on {settings.dataset}: ablations of {Path(run).name}\n"
        f"{len(bench.split):,} {bench.images} images, ± standard error; {bench.options.num_samples} weight samples; "
        f"{bench.swag.n_averaged} iterates collected\n"
        "NLL - SWA: mean over the images of each one's difference, in nats; less than 0 is better than SWA"
    ]
    for part, group in planned.items():
        rows = []
        for cell in group:
            if (found := cells[cell.name].get("metrics")) is None:
                continue
            rows.append(
                [label_of(cell)]
                + [
                    f"{factor * found[metric]:.{digits}f} ± {factor * found[f'{metric}_se']:.{digits}f}"
                    for metric, (_, factor, digits) in COLUMNS.items()
                ]
                + ["{nll:+.4f} ± {se:.4f}".format(**cells[cell.name]["difference"])]
            )
        text.append(format_table([part, *(name for name, _, _ in COLUMNS.values()), "NLL - SWA"], rows))
    if (ratio := bn_ratio(planned, cells)) is not None:
        text.append(f"Without recalibration for each sample the NLL of SWAG is {ratio:.2f} times as large.")
    return "\n\n".join(text)


def bn_ratio(planned: Plan, cells: Cells) -> float | None:
    """NLL of SWAG with the batch-norm statistics of SWA, over that with statistics for every sample."""
    by_batches = {
        cell.bn_batches: cells[cell.name]["metrics"]["nll"]
        for part in ("samples", "bn")
        for cell in planned.get(part, ())
        if cell.method == "SWAG"
    }
    return by_batches[OF_SWA] / by_batches[None] if {OF_SWA, None} <= set(by_batches) else None


def results(settings: Any, planned: Plan, cells: Cells, bench: Bench) -> dict[str, Any]:
    """Return what results.json says."""
    return {
        "schema": 1,
        "settings": dataclasses.asdict(settings),
        "run": dataclasses.asdict(bench.run.settings),
        "data": bench.data.facts,
        "predicted": {"name": bench.images, "images": len(bench.split)},
        "bn_images": len(bench.bn_images) if bench.normalized else 0,
        "iterates": bench.swag.n_averaged,
        "parts": {part: [cell.name for cell in group] for part, group in planned.items()},
        "cells": {name: {k: v for k, v in found.items() if k != "recipe"} for name, found in cells.items()},
        "bn_ratio": bn_ratio(planned, cells),
        "seconds": sum(found["seconds"] for found in cells.values()),
    }


def draw(folder: Path, planned: Plan, cells: Cells, bench: Bench) -> None:
    """Write a figure for each part."""
    lines = {method: cells[method]["metrics"] for method in ("SGD", "SWA")}
    what = f"{bench.run.settings.model}, {len(bench.split):,} {bench.images} images of {bench.run.settings.dataset}"

    def points(cell: Cell, at: float) -> Point:
        found = cells[cell.name]["metrics"]
        return at, found["nll"], cells[cell.name]["difference"]["se"]

    for part, group in planned.items():
        path = folder / f"{part}.png"
        if part == "samples":
            curves = [Curve(c.method, cells[c.name]["by_number"], c.bn_batches == OF_SWA) for c in group
                      if "by_number" in cells[c.name]]  # fmt: skip
            if curves:
                ensembling_plots.by_samples(path, curves, lines, what)
        elif part == "snapshots":
            curves = [Curve(c.method, cells[c.name]["by_number"]) for c in group if c.method != "SWAG"]
            number = {c: bench.swag.n_averaged if c.first is None else c.first for c in group if c.method == "SWAG"}
            fitted = {"SWAG": [points(c, at) for c, at in number.items()]}
            ensembling_plots.by_snapshots(path, curves, fitted, lines["SGD"]["nll"], what)
        elif part == "bn":
            size = bench.options.bn_batch_size
            images = [(min(c.bn_batches or len(bench.bn_loader), len(bench.bn_loader)) * size, c) for c in group
                      if c.bn_batches != OF_SWA]  # fmt: skip
            shown = {"SWAG": [points(c, min(n, len(bench.bn_images))) for n, c in images]}
            more = {c.method: cells[c.name]["metrics"]["nll"] for c in group if c.bn_batches == OF_SWA}
            label = "training images that batch norm is recalibrated on"
            ensembling_plots.by_level(path, shown, lines, what, label, more)
        elif part in ("scale", "rank", "noise"):
            label = {"scale": "factor of the covariance", "rank": "deviations in the covariance",
                     "noise": "level of the noise, relative to each weight"}[part]  # fmt: skip
            shown = {}
            for c in group:
                at = float(c.rank or 0) if part == "rank" else float(c.level or 0)
                shown.setdefault("SWAG" if part == "rank" else c.method, []).append(points(c, at))
            ensembling_plots.by_level(path, shown, lines, what, label, log=part != "rank")
