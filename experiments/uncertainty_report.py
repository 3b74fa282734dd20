"""From the cells of a comparison to its tables, figures and results.json."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import uncertainty_plots
from experiments.uncertainty_cells import REPORTED
from experiments.uncertainty_methods import CONTROLS

Cells = Mapping[str, Sequence[Mapping[str, Any]]]  # by method, the cell of each seed
CONTROL = CONTROLS[-1]
METRICS = {
    "accuracy": ("accuracy %", 100, 2),
    "nll": ("NLL", 1, 4),
    "brier": ("Brier", 1, 4),
    "ece": ("ECE %", 100, 2),
}
DETECTION = {
    "auroc": ("AUROC %", 100, 2),
    "aupr": ("AUPR %", 100, 2),
    "fpr95": ("FPR95 %", 100, 2),
    "divergence": ("KL", 1, 3),
}


def values(cells: Sequence[Mapping[str, Any]], metric: str, foreign: str | None = None) -> list[float]:
    if foreign is None:
        return [cell["metrics"][REPORTED][metric] for cell in cells]
    return [cell["foreign"][foreign][metric] for cell in cells]


def spread(cells: Sequence[Mapping[str, Any]], metric: str, foreign: str | None = None) -> float | None:
    """Standard deviation over seeds; of one seed the standard error over the test images, where there is one."""
    if len(cells) > 1:
        return statistics.stdev(values(cells, metric, foreign))
    return None if foreign is not None else float(cells[0]["metrics"][REPORTED][f"{metric}_se"])


def summary(cells: Cells) -> dict[str, Any]:
    """Return mean, spread and values of every metric, by method."""

    def of(own: Sequence[Mapping[str, Any]], metric: str, foreign: str | None = None) -> dict[str, Any]:
        found = values(own, metric, foreign)
        return {"mean": statistics.fmean(found), "spread": spread(own, metric, foreign), "values": found}

    return {
        method: {
            "epochs": own[0]["epochs"],
            "networks": own[0]["networks"],
            "levels": [cell["levels"] for cell in own],
            **{metric: of(own, metric) for metric in METRICS},
            "foreign": {name: {m: of(own, m, name) for m in DETECTION} for name in own[0]["foreign"]},
        }
        for method, own in cells.items()
    }


def markdown(title: str, cells: Cells, notes: Sequence[str]) -> str:
    """Lay out the tables: how good the probabilities are, what foreign images do to them, and what was chosen."""
    found = summary(cells)
    foreign = list(next(iter(cells.values()))[0]["foreign"])
    head = ["method", "epochs", "networks", *(label for label, _, _ in METRICS.values()),
            *(f"AUROC % {name}" for name in foreign)]  # fmt: skip
    rows = []
    for method, entry in found.items():
        metrics = [_cell(entry[name], *form[1:]) for name, form in METRICS.items()]
        detection = [_cell(entry["foreign"][name]["auroc"], *DETECTION["auroc"][1:]) for name in foreign]
        rows.append([method, str(entry["epochs"]), str(entry["networks"]), *metrics, *detection])
    lines = [f"# {title}", "", *markdown_table(head, rows), "", *(f"- {note}" for note in notes), *_verdict(found)]
    if foreign:
        head = ["method", *(f"{label} {name}" for name in foreign for label, _, _ in DETECTION.values())]
        rows = [
            [method, *(_cell(entry["foreign"][n][m], *form[1:]) for n in foreign for m, form in DETECTION.items())]
            for method, entry in found.items()
        ]
        lines += ["", "## Foreign images, by predictive entropy", "", *markdown_table(head, rows), ""]
        lines += ["Foreign images are the positives. KL: symmetric divergence between the two histograms of entropy."]
    rows = [[method, *(_levels(levels) for levels in entry["levels"])] for method, entry in found.items()]
    head = ["method", *(f"seed {cell['seed']}" for cell in next(iter(cells.values())))]
    lines += ["", "## Hyper-parameters", "", *markdown_table(head, rows)]
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table in Markdown, its first column left-aligned."""
    every = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(row) + " |" for row in every]


def _cell(entry: Mapping[str, Any], factor: float, digits: int) -> str:
    text = f"{factor * entry['mean']:.{digits}f}"
    return text if entry["spread"] is None else f"{text} ± {factor * entry['spread']:.{digits}f}"


def _levels(levels: Mapping[str, Any]) -> str:
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in levels.items()
        if name != "at_bound"
    ]
    return ", ".join(shown) + (" (at the end of the search)" if "at_bound" in levels else "") or "none"


def _verdict(found: Mapping[str, Any]) -> list[str]:
    """Say which methods the control does not beat, seed by seed."""
    if CONTROL not in found:
        return []
    control = found[CONTROL]["nll"]["values"]
    words: dict[str, list[str]] = {"lower on every seed": [], "lower on some seeds": [], "not lower on any seed": []}
    for method, entry in found.items():
        if method != CONTROL:
            lower = [own < other for own, other in zip(entry["nll"]["values"], control, strict=True)]
            words[list(words)[0 if all(lower) else 1 if any(lower) else 2]].append(method)
    parts = [f"{word}: {', '.join(methods)}" for word, methods in words.items() if methods]
    return [f"- NLL against that of {CONTROL}, {'; '.join(parts)}."]


def draw(path: Path, cells: Cells, title: str) -> list[str]:
    """Write the figures; return their names."""
    found = summary(cells)
    curves = {
        method: [(cell["reliability"]["confidence"], cell["reliability"]["accuracy"]) for cell in own]
        for method, own in cells.items()
    }
    ece = {method: entry["ece"]["mean"] for method, entry in found.items()}
    uncertainty_plots.reliability_panels(path / "reliability.png", curves, ece, f"Reliability: {title}")
    foreign = list(next(iter(cells.values()))[0]["foreign"])
    for name in foreign:
        uncertainty_plots.entropy_panels(
            path / f"entropy-{name}.png",
            {method: _counts(own, REPORTED) for method, own in cells.items()},
            {method: _counts(own, name) for method, own in cells.items()},
            {method: entry["foreign"][name]["auroc"]["mean"] for method, entry in found.items()},
            (f"{REPORTED} images", name),
        )
    columns = {label: (factor, metric, None) for metric, (label, factor, _) in METRICS.items()}
    columns |= {f"AUROC %, {name}": (100, "auroc", name) for name in foreign}
    uncertainty_plots.metric_dots(
        path / "metrics.png",
        {
            label: {m: [factor * v for v in values(own, metric, name)] for m, own in cells.items()}
            for label, (factor, metric, name) in columns.items()
        },
        {
            label: {m: factor * (spread(own, metric, name) or 0.0) for m, own in cells.items()}
            for label, (factor, metric, name) in columns.items()
        },
        CONTROL,
        title,
    )
    return ["reliability.png", "metrics.png", *(f"entropy-{name}.png" for name in foreign)]


def _counts(cells: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    total: np.ndarray = np.sum([cell["entropy"][name] for cell in cells], axis=0)
    return total
