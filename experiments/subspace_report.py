"""Table and results.json of `experiments.subspace`."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from experiments.common import format_table
from experiments.subspace_cells import BASELINES, Cell, paired
from experiments.subspace_settings import Settings
from experiments.subspace_sources import Bench

COLUMNS = {
    "accuracy": ("accuracy %", 100, 2), "nll": ("NLL", 1, 4), "brier": ("Brier", 1, 4), "ece": ("ECE %", 100, 2),
}  # fmt: skip
# Izmailov et al. (2019), PreResNet-164 on CIFAR-100, elliptical slice sampling: NLL from the highest down
PUBLISHED = {"random": 0.6858, "pca": 0.6652, "curve": 0.6493}


def differences(planned: Sequence[Cell], log_likelihoods: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Compare every row with the baselines: `paired` by row and baseline; none with itself."""
    baselines = [name for name in BASELINES if name in log_likelihoods]
    return {
        cell.name: {
            name: paired(log_likelihoods[cell.name], log_likelihoods[name]) for name in baselines if name != cell.name
        }
        for cell in planned
    }


def table(
    planned: Sequence[Cell],
    cells: Mapping[str, Mapping[str, Any]],
    against: Mapping[str, Mapping[str, Mapping[str, float]]],
    bench: Bench,
) -> str:
    """Lay out every row, with its differences to the baselines."""
    baselines = [name for name in BASELINES if name in against]
    rows = []
    for cell in planned:
        found = cells[cell.name]
        row = [cell.label]
        for metric, (_, factor, digits) in COLUMNS.items():
            row.append(f"{factor * found['metrics'][metric]:.{digits}f}")
        row += [interval(against[cell.name][name]) if name != cell.name else "" for name in baselines]
        of = found.get("chains", {})
        row += [
            str(found["num_samples"]),
            _shown(of.get("worst_rhat"), ".3f"),
            _shown(of.get("least_ess"), ".0f"),
            _shown(of.get("evaluations"), ",d"),
            _shown(of.get("seconds"), ".0f"),
        ]
        rows.append(row)
    header = [bench.images, *(name for name, _, _ in COLUMNS.values()), *(f"NLL - {name}" for name in baselines)]
    header += ["samples", "R-hat", "ESS", "evaluations", "seconds"]
    return f"{title(bench)}\n\n{format_table(header, rows)}\n\n{notes(bench)}"


def title(bench: Bench) -> str:
    own = bench.trained.settings
    return f"{own.model} on {bench.data.name}, {len(bench.split):,} {bench.images} images"


def notes(bench: Bench) -> str:
    settings = bench.settings
    return (
        f"Log-joint of {len(bench.train):,} training images, prior N(0, {settings.prior_std:g}^2) on every coordinate; "
        f"{settings.num_chains} chains of {settings.num_samples} draws, steps for each: {settings.thin}, before the "
        f"first: {settings.burn_in}.\n"
        "Brackets: 95 % normal interval of the mean difference over the same images, in nats; below 0 is better.\n"
        "R-hat and ESS are of the worst coordinate; evaluations are passes over the images, gradients included."
    )


def interval(difference: Mapping[str, float]) -> str:
    return "{nll:+.4f} [{low:+.4f}, {high:+.4f}]".format(**difference)


def _shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def comparisons(planned: Sequence[Cell], log_likelihoods: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Compare subspaces with each other: the same method and temperature, image by image.

    Returns:
        For each pair that was published (random and pca, pca and curve) and each further pair with pca: the cells, and
        `paired` of the first less the second; of published pairs, by ess, ``as_published``: True, False, or None where
        the interval holds zero.
    """
    found = []
    for first, second in _pairs(planned):
        difference = paired(log_likelihoods[first.name], log_likelihoods[second.name])
        record: dict[str, Any] = {"first": first.name, "second": second.name, "difference": difference}
        if first.method == "ess" and {first.subspace, second.subspace} <= set(PUBLISHED):
            apart = difference["low"] > 0 or difference["high"] < 0
            record["as_published"] = difference["low"] > 0 if apart else None
        found.append(record)
    return found


def _pairs(planned: Sequence[Cell]) -> Iterator[tuple[Cell, Cell]]:
    for cell in planned:
        if cell.subspace is None or cell.subspace in ("pca", "curve"):
            continue
        other = dataclasses.replace(cell, subspace="pca")
        if other in planned:
            yield cell, other
    for cell in planned:
        other = dataclasses.replace(cell, subspace="curve")
        if cell.subspace == "pca" and other in planned:
            yield cell, other


def comparison_text(compared: Sequence[Mapping[str, Any]]) -> str:
    """Say which subspace is better, and whether it is the published one."""
    verdicts = {True: "as published", False: "not as published", None: "not told apart"}
    lines = []
    for record in compared:
        line = f"NLL of {record['first']} less that of {record['second']}: {interval(record['difference'])}"
        lines.append(line + (f", {verdicts[record['as_published']]}" if "as_published" in record else ""))
    if any("as_published" in record for record in compared):
        shown = ", ".join(f"{name} {value}" for name, value in PUBLISHED.items())
        lines.append(f"published (PreResNet-164 on CIFAR-100, ESS): {shown}")
    return "\n".join(lines)


def results(
    settings: Settings,
    planned: Sequence[Cell],
    cells: Mapping[str, Mapping[str, Any]],
    against: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
    spaces: Mapping[str, Mapping[str, Any]],
    bench: Bench,
) -> dict[str, Any]:
    """Return what results.json says."""
    return {
        "schema": 1,
        "settings": dataclasses.asdict(settings),
        "run": dataclasses.asdict(bench.trained.settings),
        "data": bench.data.facts,
        "predicted": {"name": bench.images, "images": len(bench.split)},
        "train_images": len(bench.train),
        "subspaces": dict(spaces),
        "rows": [cell.name for cell in planned],
        "interval": "95 % normal interval of the mean difference over images",
        "cells": {
            cell.name: {key: value for key, value in cells[cell.name].items() if key != "recipe"}
            | {"difference": against[cell.name]}
            for cell in planned
        },
        "comparisons": list(compared),
        "published_nll": PUBLISHED,
    }
