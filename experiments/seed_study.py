"""What the applications share: methods side by side over seeds, a cell a seed, a table, a figure, results.json.

A script's settings have the fields ``dir``, ``seeds``, ``first_seed`` and ``resume``; a function of one seed trains and
measures, and everything else is here: which seeds are left after a kill, mean and standard deviation, the figure.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib import pyplot as plt
from tqdm import tqdm

from experiments import plots
from experiments.common import RunDir, SettingsError, fixed, format_table, require_at_least, write_atomically
from lowrank_bdl.errors import NonFiniteError

OUTPUTS = ("results.json", "table.txt", "methods.png", "log.jsonl", "cells/*.json")
Cell: TypeAlias = dict[str, Any]
Methods: TypeAlias = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Measure:
    """A column of the table, and a panel of the figure.

    Attributes:
        name: Key in what a method's measurement gives.
        title: With its unit.
        digits: After the decimal point.
        less_is_better: Said in the table's head.
    """

    name: str
    title: str
    digits: int = 2
    less_is_better: bool = False


def check_seeds(settings: Any) -> None:
    """Refuse numbers of seeds that make no sense.

    Raises:
        SettingsError: Names the flag.
    """
    require_at_least(settings, dict(seeds=1, first_seed=0))


def run_seeds(settings: Any, run: RunDir, one_seed: Callable[[int], Mapping[str, Any]]) -> list[Cell]:
    """Run the seeds that are left, each a file of its own as soon as it is done.

    Args:
        settings: Of the script.
        run: Its folder, begun.
        one_seed: Gives a dict with an entry ``methods``: metrics of each method; all randomness from the seed.

    Returns:
        The cells of all seeds, in their order.

    Raises:
        SettingsError: If a file of an earlier start is damaged or of other settings, or training diverges.
    """
    recipe = fixed(settings)
    (run.path / "cells").mkdir(exist_ok=True)
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    cells: dict[int, Cell | None] = {seed: run.read_cell(cell_name(seed), recipe) for seed in seeds}
    done = sum(cell is not None for cell in cells.values())
    with tqdm(total=len(seeds), initial=done, desc=Path(settings.dir).name, unit="seed", smoothing=0) as bar:
        for seed in (seed for seed, cell in cells.items() if cell is None):
            began = time.perf_counter()
            try:
                found = dict(one_seed(seed))
            except NonFiniteError as error:
                raise SettingsError(f"seed {seed}: {error}") from None
            seconds = time.perf_counter() - began
            order = list(found["methods"])  # files have their keys sorted
            cells[seed] = {"recipe": recipe, "seed": seed, "seconds": seconds, "order": order, **found}
            run.write_json(cell_name(seed), cells[seed])
            run.log(seed=seed, seconds=seconds)
            bar.update()
    return [cell for cell in cells.values() if cell is not None]


def cell_name(seed: int) -> str:
    """Return the file of a seed, in the run's folder."""
    return f"cells/seed-{seed}.json"


def summary(cells: Sequence[Cell], measures: Sequence[Measure]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return mean, standard deviation over seeds (NaN of one) and every value, by method and measure.

    A measure that a method does not have is left out; methods are in the order in which the first cell has them.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for method in cells[0]["order"]:
        own = [cell["methods"][method] for cell in cells]
        found[method] = {}
        for measure in measures:
            values = [float(metrics[measure.name]) for metrics in own if measure.name in metrics]
            if values:
                std = statistics.stdev(values) if len(values) > 1 else math.nan
                found[method][measure.name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], measures: Sequence[Measure], baseline: str) -> str:
    """Lay out the summary: mean ± standard deviation over seeds; the trivial baseline is marked."""

    def level(metrics: Mapping[str, Mapping[str, Any]], measure: Measure) -> str:
        if measure.name not in metrics:
            return "–"
        mean, std = metrics[measure.name]["mean"], metrics[measure.name]["std"]
        return f"{mean:.{measure.digits}f}" + ("" if math.isnan(std) else f" ± {std:.{measure.digits}f}")

    header = ["method", *(f"{measure.title} {'↓' if measure.less_is_better else '↑'}" for measure in measures)]
    rows = [
        [f"{method} (baseline)" if method == baseline else method, *(level(metrics, measure) for measure in measures)]
        for method, metrics in found.items()
    ]
    return format_table(header, rows)


def draw(
    path: Path,
    found: Mapping[str, Mapping[str, Mapping[str, Any]]],
    measures: Sequence[Measure],
    baseline: str,
    title: str,
) -> None:
    """A panel for each measure: every seed a dot, the mean a bar across; the baseline as a dashed line.

    Where the baseline, and what is near it, would hide how the others differ, an arrow with the value points to them.
    """
    methods = list(found)
    with plt.rc_context(plots.STYLE):
        height = 1.2 + 0.42 * len(methods)
        figure, axes = plots._axes(1.8 + 3.6 * len(measures), height, ncols=len(measures), sharey=True, squeeze=False)
        for panel, measure in zip(axes[0], measures, strict=True):
            levels = {method: found[method][measure.name] for method in methods if measure.name in found[method]}
            shown = near_the_best(levels, baseline, measure.less_is_better)
            for row, method in enumerate(methods):
                if method not in levels:
                    continue
                level = levels[method]
                color = plots.COLORS.get(method, "#0072B2")
                if method not in shown:
                    side, arrow = (0.98, "{} →") if measure.less_is_better else (0.02, "← {}")
                    panel.text(
                        side, row, arrow.format(f"{level['mean']:.{measure.digits}f}"), color=color, va="center",
                        ha="right" if measure.less_is_better else "left", transform=panel.get_yaxis_transform(),
                    )  # fmt: skip
                    continue
                panel.plot(level["values"], [row] * len(level["values"]), "o", color=color, alpha=0.55, markersize=6)
                panel.plot([level["mean"]], [row], "|", color=color, markersize=18, markeredgewidth=2.4)
                if method == baseline:
                    panel.axvline(level["mean"], color="#777777", linestyle="--", linewidth=1.2, zorder=0)
            panel.set_xlabel(f"{measure.title} ({'less' if measure.less_is_better else 'more'} is better)")
            panel.locator_params(axis="x", nbins=5)
            panel.grid(False, axis="y")
            panel.margins(x=0.12)
        axes[0, 0].set_yticks(range(len(methods)), methods)
        axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
        figure.suptitle(title, fontsize=12)
        plots._save(figure, path)


def near_the_best(levels: Mapping[str, Mapping[str, Any]], baseline: str, less_is_better: bool) -> set[str]:
    """Return the methods that an axis has to show.

    Those are all, unless the ones that have come three quarters of the way from the baseline to the best are two or
    more and would have less than a sixth of the axis to differ in.

    Args:
        levels: ``mean`` and ``values`` of each method.
        baseline: The method that learns nothing.
        less_is_better: Which end is the best.
    """
    means = {method: float(level["mean"]) for method, level in levels.items()}
    if baseline not in means or not all(math.isfinite(mean) for mean in means.values()):
        return set(means)
    best = (min if less_is_better else max)(means.values())
    away = {method: abs(mean - best) for method, mean in means.items()}
    near = {method for method in means if away[method] <= away[baseline] / 4}
    values = [value for method in near for value in levels[method]["values"]]
    hidden = max(values) - min(values) < max(away.values()) / 6
    return near if hidden and 1 < len(near) < len(means) else set(means)


def finish(
    settings: Any,
    run: RunDir,
    cells: Sequence[Cell],
    measures: Sequence[Measure],
    *,
    baseline: str,
    title: str,
    notes: Iterable[str] = (),
    **more: Any,
) -> str:
    """Write table and figure, and results.json last; return the text to print.

    Args:
        settings: Of the script.
        run: Its folder.
        cells: One a seed.
        measures: Columns and panels.
        baseline: The method that is trivial: what learns nothing.
        title: Of the figure: what was run on what.
        notes: Sentences below the table.
        **more: Entries of results.json.
    """
    found = summary(cells, measures)
    count = len(cells)
    seeds = f"{count} seeds, mean ± standard deviation over them" if count > 1 else "one seed"
    text = "\n\n".join([table(found, measures, baseline), " ".join([f"{title}: {seeds}.", *notes])])
    write_atomically(run.path / "table.txt", text + "\n")
    draw(run.path / "methods.png", found, measures, baseline, title)
    record = {"schema": 1, "settings": dataclasses.asdict(settings), "summary": found, "baseline": baseline}
    record["order"] = list(found)
    run.write_json("results.json", {**record, **more, "cells": list(cells)})
    return f"{text}\nwritten to {run.path}"
