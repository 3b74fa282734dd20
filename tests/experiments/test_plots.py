"""Figures: the numbers that are drawn are those that were given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.image import imread

import lowrank_bdl as lb
from experiments import plots

RECORDS = [
    {"epoch": 1, "lr": 0.1, "loss": 2.0, "accuracy": 0.5},
    {"epoch": 2, "lr": 0.1, "loss": 1.0, "accuracy": 0.9, "held_out": {"nll": 1.5, "accuracy": 0.75}},
    {
        "epoch": 3, "lr": 0.02, "loss": 0.5, "accuracy": 1.0, "held_out": {"nll": 1.2, "accuracy": 0.8},
        "held_out_swa": {"nll": 0.9, "accuracy": 0.85},
    },
]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[plt.Figure]:
    """The figures that were saved."""
    figures: list[plt.Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def lines(axes: plt.Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_training_curves_show_losses_errors_and_rates(tmp_path: Path, drawn: list[plt.Figure]) -> None:
    plots.training_curves(tmp_path / "a.png", {"LeNet5": ("SGD", RECORDS)}, 2, "validation")
    losses, errors, rates = drawn[0].axes
    assert lines(losses)["LeNet5, training"] == ([1, 2, 3], [2.0, 1.0, 0.5])
    assert lines(losses)["LeNet5, validation"] == ([2, 3], [1.5, 1.2])
    assert lines(losses)["SWA, validation"] == ([3], [0.9])
    epochs, values = lines(errors)["LeNet5, training"]
    assert epochs == [1, 2, 3] and values[:2] == pytest.approx([50, 10]) and np.isnan(values[2])  # none on a log axis
    assert lines(errors)["SWA, validation"][1] == pytest.approx([15])
    assert list(rates.lines[0].get_ydata()) == [0.1, 0.1, 0.02]
    assert imread(tmp_path / "a.png").shape[0] >= 400


def test_training_curves_without_collection(tmp_path: Path, drawn: list[plt.Figure]) -> None:
    plots.training_curves(tmp_path / "a.png", {"LeNet5": ("Adam", RECORDS[:1])}, None, "test")
    assert list(lines(drawn[0].axes[0])) == ["LeNet5, training"]


def test_the_reliability_diagram_shows_every_method(tmp_path: Path, drawn: list[plt.Figure]) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(500, 3, generator=generator).softmax(-1)
    targets = torch.randint(0, 3, (500,), generator=generator)
    curve = lb.metrics.reliability_curve(probabilities, targets, num_bins=5)
    points = plots.reliability_points(curve)
    assert len(points[0]) == int((curve.count > 0).sum()) < 5
    plots.reliability_diagram(
        tmp_path / "r.png", {"EMA": points, "Polyak": points}, {"EMA": 0.1, "Polyak": 0.2}, "title"
    )
    shown = lines(drawn[0].axes[0])
    assert drawn[0].axes[0].get_title() == "title"
    assert shown["EMA (ECE 10.00 %)"][1] == pytest.approx(list(points[0] - points[1]))
    assert "Polyak (ECE 20.00 %)" in shown
