"""Plots of a record: time against rank, memory against rank, ratios per operation."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks import peers
from benchmarks.report import seconds

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6a3d9a", "#7f7f7f")
"""Okabe and Ito's palette and two more, readable under every common colour blindness; markers differ as well."""
MARKERS = "osD^vP<X"
STYLE = {
    peers.OURS: ("#0072B2", "o"),
    peers.HAND: ("#D55E00", "s"),
    peers.TORCH: ("#009E73", "D"),
    peers.SHIPPED: ("#CC79A7", "^"),
    peers.MIXED: ("#6a3d9a", "v"),
    "our MultivariateNormal.rsample": ("#7fb2d9", "h"),
    "torch.svd_lowrank": ("#E69F00", "P"),
    "torch.pca_lowrank": ("#a6761d", "p"),
    "scikit-learn randomized_svd": ("#7f7f7f", "X"),
    peers.RELEASED: ("#E69F00", "<"),
    peers.AVERAGED: ("#999933", ">"),
    "torch.save": ("#a6761d", "P"),
    "torch.load": ("#a6761d", "P"),
    "fresh operator of that size": ("#56B4E9", "d"),
    "fresh operator, inputs ready": ("#444444", "d"),
}
NAMES = tuple(STYLE)
FLOOR = "floor"


def _ticks(axes: Axes, ranks: Iterable[int]) -> None:
    axes.set_xscale("log")
    ranks = sorted(ranks)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _logarithmic(axis: Any, formatter: Any) -> None:
    """Label a logarithmic axis with plain numbers, and with 1, 2 and 5 of each decade where it spans few."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low) if low > 0 else 1.0
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")
"""Numbers as people write them."""
SECONDS = EngFormatter("s", sep="\N{THIN SPACE}")


def _series(cells: Iterable[Mapping[str, Any]], field: Any) -> dict[str, list[tuple[int, float]]]:
    """Return points (rank, value) by contender; every floor of an operation is one line."""
    found: dict[str, list[tuple[int, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["rank"]):
        for row in cell["rows"]:
            value = field(row, cell)
            if value is not None:
                found.setdefault(FLOOR if row["floor"] else row["contender"], []).append((cell["rank"], value))
    return found


def _legend(figure: Figure, handles: Mapping[str, Any], columns: int = 4) -> None:
    """Put one legend for all axes under them."""
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def time_against_rank(record: Mapping[str, Any], numel: int) -> Figure | None:
    """Draw the median time of every operation that was measured at several ranks, with the floor."""
    cells = [c for c in record["cells"] if c["numel"] == numel and c["model"] is None]
    swept = [n for n in dict.fromkeys(c["operation"] for c in cells) if len({c["rank"] for c in _of(cells, n)}) > 1]
    if not swept:
        return None
    columns = min(4, len(swept))
    lines = -(-len(swept) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 2.7 * lines + 0.9), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axes, name in zip(grid.flat, swept, strict=False):
        for who, points in _series(_of(cells, name), lambda row, cell: row.get("median_s")).items():
            color, marker = ("black", "") if who == FLOOR else STYLE.get(who, (COLORS[-1], "X"))
            style = {"linestyle": "--", "linewidth": 1.4} if who == FLOOR else {"marker": marker, "markersize": 4.5}
            (handles[who],) = axes.plot(*zip(*points, strict=True), color=color, **style)
        axes.set_yscale("log")
        _logarithmic(axes.yaxis, SECONDS)
        _ticks(axes, {c["rank"] for c in _of(cells, name)})
        axes.set_title(_of(cells, name)[0]["title"], fontsize=10)
    for axes in grid.flat[len(swept) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("median time")
    for index, axes in enumerate(grid.flat[: len(swept)]):
        if index + columns >= len(swept):
            axes.set_xlabel("rank K")
    figure.suptitle(f"Time against rank, D = {numel:,}, {record['settings']['dtype']}", fontsize=12)
    _legend(figure, _floor_last(handles))
    return figure


def memory_against_rank(record: Mapping[str, Any]) -> Figure | None:
    """Draw the stored state, and what the operations need beyond inputs and result, beside K·D·itemsize."""
    states = [c for c in record["cells"] if c["operation"] == "state"]
    numels = {c["numel"] for c in record["cells"] if c["model"] is None and _extra_of(c) is not None and not c["full"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained")
    drawn = False
    points = _series(states, lambda row, cell: _memory(row, "above_inputs", 2**30)).get(peers.OURS, [])
    if points:
        drawn = True
        unit = states[0]["dk_bytes"] / states[0]["rank"]
        ranks = sorted(rank for rank, _ in points)
        theory = [(rank + 3) * unit / 2**30 for rank in ranks]
        left.plot(ranks, theory, color="black", linestyle="--", label="(K + 3)·D·itemsize")
        left.plot(*zip(*points, strict=True), color=COLORS[0], marker="o", linestyle="", markersize=7, label="measured")
        left.set_yscale("log")
        _logarithmic(left.yaxis, PLAIN)
        _ticks(left, ranks)
        left.legend(frameon=False)
        left.set_title(f"state of a collector, D = {states[0]['numel']:,}", fontsize=10)
    left.set(xlabel="rank K", ylabel="memory [GiB]")
    if numels:
        drawn = True
        numel = 1_000_000 if 1_000_000 in numels else max(numels)
        cells = [c for c in record["cells"] if c["numel"] == numel and c["model"] is None and _extra_of(c) is not None]
        swept = [n for n in dict.fromkeys(c["operation"] for c in cells) if len(_of(cells, n)) > 1]
        ranks = sorted({c["rank"] for c in cells})
        unit = cells[0]["dk_bytes"] / cells[0]["rank"] / 2**20
        right.plot(
            ranks, [rank * unit for rank in ranks], color="black", linestyle="--", label="K·D·itemsize (the deviations)"
        )
        for i, name in enumerate(swept):
            line = [(c["rank"], max(_extra_of(c) or 0, 2**16) / 2**20) for c in _of(cells, name)]
            right.plot(
                *zip(*sorted(line), strict=True),
                color=COLORS[i % len(COLORS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                linewidth=1.2,
                label=_of(cells, name)[0]["title"],
            )
        right.set_yscale("log")
        _logarithmic(right.yaxis, PLAIN)
        _ticks(right, ranks)
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        right.set_title(f"ours beyond inputs and result, D = {numel:,}", fontsize=10)
    right.set(xlabel="rank K", ylabel="memory [MiB]")
    if not drawn:
        plt.close(figure)
        return None
    return figure


def ratio_bars(record: Mapping[str, Any], numel: int) -> Figure | None:
    """Draw the time of every contender as a multiple of ours, by operation; the floor is a line across the bars."""
    main = record["settings"]["main_rank"]
    cells = [
        c
        for c in record["cells"]
        if c["rank"] == main and c["operation"] != "state" and (c["numel"] == numel or c["model"] is not None)
    ]
    groups = [(c, [r for r in c["rows"] if peers.OURS in r.get("ratios", {}) or r["status"] == "wrong"]) for c in cells]
    groups = [(cell, rows) for cell, rows in groups if any(_other(r) for r in rows)]
    if not groups:
        return None
    height = sum(max(1, sum(map(_other, rows))) + 1 for _, rows in groups)
    figure, axes = plt.subplots(figsize=(9.5, 0.21 * height + 1.6), layout="constrained")
    y, places, titles, handles, low, high = 0.0, [], [], {}, 0.5, 2.0
    for cell, rows in groups:
        top = y
        for row in filter(_other, rows):
            if row["status"] == "wrong":
                said = f"{row['contender']}: wrong after {seconds(row['first_call_s'])}"
                axes.text(1.05, y, said, va="center", fontsize=7.5, style="italic", color="#555555")
            else:
                ratio = row["ratios"][peers.OURS]
                color = STYLE.get(row["contender"], (COLORS[-1], "X"))[0]
                bar = axes.barh(y, ratio["median"] - 1, left=1, height=0.85, color=color)
                handles.setdefault(row["contender"], bar)
                if ratio["ci95"] is not None:
                    axes.plot(ratio["ci95"], (y, y), color="black", linewidth=1)
                end = max(ratio["median"], (ratio["ci95"] or [0, 0])[1], 1.0)
                axes.text(end * 1.05, y, f"{ratio['median']:.3g}×", va="center", fontsize=7.5)
                low, high = min(low, ratio["median"]), max(high, end)
            y += 1
        for row in (r for r in rows if r["floor"] and r["times_s"]):
            value = row["ratios"][peers.OURS]["median"]
            handles[FLOOR] = axes.vlines(value, top - 0.6, y - 0.4, color="black", linestyle="--", linewidth=1.4)
            low, high = min(low, value), max(high, value)
        y = max(y, top + 1)
        places.append((top + y - 1) / 2)
        titles.append(
            cell["title"].replace(" (half the parameters)", "") + (f" ({cell['model']})" if cell["model"] else "")
        )
        y += 1
    axes.axvline(1.0, color="#555555", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(low * 0.8, max(high * 1.7, 5.0))
    _logarithmic(axes.xaxis, PLAIN)
    axes.set_yticks(places, titles)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.5, -1)
    axes.set_xlabel("time as a multiple of ours (right of 1: slower than ours)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(True, axis="x", alpha=0.25, linewidth=0.6)
    axes.set_title(
        f"D = {numel:,}, K = {main}, {record['settings']['dtype']}; wrong answers are not timed", fontsize=11
    )
    _legend(figure, _floor_last(handles), columns=3)
    return figure


def _other(row: Mapping[str, Any]) -> bool:
    """Whether a row has a line of its own in the bars: neither ours nor a floor."""
    return not row["floor"] and row["contender"] != peers.OURS


def _of(cells: Iterable[Mapping[str, Any]], operation: str) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if cell["operation"] == operation]


def _memory(row: Mapping[str, Any], name: str, unit: float) -> float | None:
    memory = row.get("memory")
    return memory[name] / unit if memory is not None and memory["status"] == "ok" else None


def _extra_of(cell: Mapping[str, Any]) -> float | None:
    row = next((r for r in cell["rows"] if r["contender"] == peers.OURS), None)
    return None if row is None else _memory(row, "extra_bytes", 1)


def _floor_last(handles: dict[str, Any]) -> dict[str, Any]:
    order = sorted(handles, key=lambda name: (name == FLOOR, NAMES.index(name) if name in NAMES else len(NAMES)))
    return {("floor of this machine" if name == FLOOR else name): handles[name] for name in order}


def draw(record: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write every plot that the record has points for, as ``STEM-*.png``, and return the files."""
    numels = sorted({c["numel"] for c in record["cells"] if c["model"] is None})
    figures: dict[str, Figure | None] = {"memory-against-rank": memory_against_rank(record)}
    for numel in numels:
        figures[f"time-against-rank-{numel}"] = time_against_rank(record, numel)
        figures[f"ratios-{numel}"] = ratio_bars(record, numel)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=110)
            plt.close(figure)
            written.append(path)
    return written
