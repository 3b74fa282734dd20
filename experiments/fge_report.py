"""Ensembles that grow, and their table and figure: what `experiments.fge` reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from experiments import plots
from experiments.common import format_table
from experiments.evaluation import classification_metrics
from experiments.train_report import COLUMNS

ENSEMBLE, MEMBER, AVERAGE, INDEPENDENT = "FGE ensemble", "FGE network", "SWA", "independent ensemble"
MANY, ONE = "FGE, all runs", "independent, one network"
STYLES: dict[str, dict[str, Any]] = {
    ENSEMBLE: {"color": "#D55E00", "marker": "o"},
    MEMBER: {"color": "#D55E00", "marker": ".", "linestyle": "none", "alpha": 0.6},
    AVERAGE: {"color": plots.COLORS["SWA"], "marker": "D", "linestyle": "-."},
    INDEPENDENT: {"color": "#000000", "marker": "s", "linestyle": "--"},
    MANY: {"color": "#CC79A7", "marker": "P"},
}


@dataclass(frozen=True)
class Predicted:
    """What M networks predict.

    Attributes:
        epochs: Of training behind the first 1, 2, ..., M of them together.
        probabilities: (M, N, C).
        log_likelihood: log p(target), (M, N) [nats].
        targets: (N,).
    """

    epochs: list[int]
    probabilities: Tensor
    log_likelihood: Tensor
    targets: Tensor

    def metrics(self, members: Sequence[int]) -> dict[str, float]:
        """Measure the average prediction of some of the networks."""
        rows = list(members)
        count = torch.tensor(float(len(rows)), dtype=torch.float64)
        log_likelihood = self.log_likelihood[rows].double().logsumexp(0) - count.log()
        return classification_metrics(self.probabilities[rows].mean(0), self.targets, log_likelihood)


def together(parts: Sequence[Predicted]) -> Predicted:
    """Return the networks of several runs as those of one; the epochs are of no account."""
    return Predicted(
        [0] * sum(len(part.epochs) for part in parts),
        torch.cat([part.probabilities for part in parts]),
        torch.cat([part.log_likelihood for part in parts]),
        parts[0].targets,
    )


def measure(
    ensembles: Sequence[Predicted], averages: Sequence[Predicted], independent: Predicted | None, total: int
) -> dict[str, list[dict[str, Any]]]:
    """Measure everything that is compared.

    Args:
        ensembles: Networks of each cyclical run, in order.
        averages: The means of their weights.
        independent: Independent networks, if there are any.
        total: Epochs behind a whole cyclical run.

    Returns:
        By name, records with ``epochs`` behind the prediction, ``networks`` in it, ``run`` (1, ...) where it is of one,
        and the metrics.
    """
    found: dict[str, list[dict[str, Any]]] = {ENSEMBLE: [], MEMBER: [], AVERAGE: [], MANY: [], INDEPENDENT: [], ONE: []}
    for run, (part, average) in enumerate(zip(ensembles, averages, strict=True), start=1):
        for k, epochs in enumerate(part.epochs):
            own = {"run": run, "epochs": epochs}
            found[ENSEMBLE].append({**own, "networks": k + 1, **part.metrics(range(k + 1))})
            found[MEMBER].append({**own, "networks": 1, **part.metrics([k])})
            found[AVERAGE].append({**own, "networks": 1, **average.metrics([k])})
    for runs in range(1, len(ensembles) + 1) if len(ensembles) > 1 else ():
        every = together(ensembles[:runs])
        number = len(every.epochs)
        found[MANY].append({"epochs": runs * total, "networks": number, **every.metrics(range(number))})
    for k, epochs in enumerate(independent.epochs if independent is not None else ()):
        assert independent is not None
        found[INDEPENDENT].append({"epochs": epochs, "networks": k + 1, **independent.metrics(range(k + 1))})
        own_epochs = epochs - (independent.epochs[k - 1] if k else 0)
        found[ONE].append({"epochs": own_epochs, "networks": 1, **independent.metrics([k])})
    return {name: records for name, records in found.items() if records}


def at_equal_budget(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Pair every independent ensemble with the FGE prediction of the largest budget that is not above its own.

    Of FGE it is the first run, or all that the budget allows for.

    Returns:
        Records with ``budget`` [epochs], ``independent`` and ``fge``: records of `measure`, or None where FGE has no
        prediction so early.
    """
    candidates = [record for record in found[ENSEMBLE] if record["run"] == 1] + list(found.get(MANY, ()))
    pairs = []
    for record in found.get(INDEPENDENT, ()):
        early = [own for own in candidates if own["epochs"] <= record["epochs"]]
        best = max(early, key=lambda own: (own["epochs"], own["networks"]), default=None)
        pairs.append({"budget": record["epochs"], "independent": record, "fge": best})
    return pairs


def budget_table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Lay out what `at_equal_budget` finds; empty without independent networks."""
    rows = []
    for pair in at_equal_budget(found):
        row = [f"{pair['budget']} epochs"]
        for own in (pair["independent"], pair["fge"]):
            known = own is not None
            row += [str(own["networks"]), f"{100 * own['accuracy']:.2f}", f"{own['nll']:.4f}"] if known else ["-"] * 3
        rows.append([*row, "-" if pair["fge"] is None else str(pair["fge"]["epochs"])])
    header = [
        "at equal budget",
        "independent networks",
        "accuracy %",
        "NLL",
        "FGE networks",
        "accuracy %",
        "NLL",
        "epochs",
    ]
    return f"\n\n{format_table(header, rows)}" if rows else ""


def table(found: Mapping[str, Sequence[Mapping[str, Any]]], title: str, shown: str, count: int) -> str:
    """Lay out every prediction, each number with its standard error over the images."""
    rows = []
    for name, records in found.items():
        for record in records:
            label = f"{name} (run {record['run']})" if "run" in record else name
            cells = [
                f"{factor * record[metric]:.{digits}f} ± {factor * record[f'{metric}_se']:.{digits}f}"
                for metric, (_, factor, digits) in COLUMNS.items()
            ]
            rows.append([label, str(record["epochs"]), str(record["networks"]), *cells])
    head = (
        f"{title}: {count:,} {shown} images, ± standard error\n"
        "epochs: of training behind the prediction, those of the runs it started from included"
    )
    header = ["", "epochs", "networks", *(label for label, _, _ in COLUMNS.values())]
    return f"{head}\n\n{format_table(header, rows)}{budget_table(found)}"


def draw(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]], shown: str, title: str) -> None:
    """Draw error and NLL against the epochs of training behind a prediction.

    Args:
        path: File to write.
        found: From `measure`.
        shown: Name of the images.
        title: Of the figure.
    """
    with plt.rc_context(plots.STYLE):
        figure, panels = plots._axes(10.0, 4.6, ncols=2, sharex=True)
        for axes, metric in zip(panels, ("accuracy", "nll"), strict=True):
            for name, style in STYLES.items():
                records = found.get(name, ())
                for run in dict.fromkeys(record.get("run") for record in records):
                    own = [record for record in records if record.get("run") == run]
                    values = [100 * (1 - r[metric]) if metric == "accuracy" else r[metric] for r in own]
                    label = name if run in (None, 1) else None
                    axes.plot([r["epochs"] for r in own], values, label=label, **style)
            axes.set_xlabel("epochs of training behind the prediction")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel(f"{shown} error [%]")
        panels[1].set_ylabel(f"{shown} NLL [nats per image]")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(title)
        plots._save(figure, path)
