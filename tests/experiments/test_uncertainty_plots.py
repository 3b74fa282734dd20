"""Figures of a comparison: the numbers that are drawn are those that were given."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from experiments import plots, uncertainty_plots
from experiments.uncertainty_methods import METHODS


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[plt.Figure]:
    """The figures that would have been saved."""
    figures: list[plt.Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def test_every_method_has_a_family() -> None:
    assert set(uncertainty_plots.COLORS) == set(METHODS)
    assert uncertainty_plots.color_of("mnist/SWAG") == uncertainty_plots.color_of("SWAG") == "#D55E00"


def test_reliability_has_a_panel_a_method_and_a_line_a_seed(drawn: list[plt.Figure]) -> None:
    curves = {
        "SGD": [([0.5, 0.9], [0.4, 0.6])],
        "SWAG": [([0.6, 0.99], [0.7, 1.0]), ([0.5, 1.0], [0.5, 1.0])],
    }
    uncertainty_plots.reliability_panels(Path("r.png"), curves, {"SGD": 0.2, "SWAG": 0.01}, "title")
    sgd, swag = drawn[0].axes[:2]
    assert sgd.get_title() == "SGD: ECE 20.00 %" and swag.get_title() == "SWAG: ECE 1.00 %"
    assert list(sgd.lines[1].get_xdata()) == pytest.approx([0.5, 0.1])
    assert list(sgd.lines[1].get_ydata()) == pytest.approx([0.1, 0.3])
    grey, first, second = swag.lines[1:]
    assert grey.get_color() == "#bbbbbb" and list(grey.get_ydata()) == pytest.approx([0.1, 0.3])
    assert list(first.get_ydata()) == pytest.approx([-0.1, -0.01])
    assert list(second.get_xdata()) == pytest.approx([0.5, uncertainty_plots.LEAST_DOUBT])
    assert [axes.get_visible() for axes in drawn[0].axes] == [True, True, False, False]


def test_no_entropy_is_left_out_of_the_histogram() -> None:
    counts = uncertainty_plots.entropy_counts([0.0, 1e-12, 1.1e-8, 2.302, 99.0])
    assert counts.sum() == 5 and counts[0] == 2 and counts[1] == 1 and counts[-1] == 2
    assert len(counts) == len(uncertainty_plots.ENTROPY_EDGES) - 1


def test_entropy_panels_show_shares_of_each_set(drawn: list[plt.Figure]) -> None:
    inside, outside = np.zeros(31), np.zeros(31)
    inside[[0, 3]], outside[20] = (30, 10), 7
    uncertainty_plots.entropy_panels(
        Path("e.png"), {"SWA": inside}, {"SWA": outside}, {"SWA": 0.875}, ("test images", "noise")
    )
    axes = drawn[0].axes[0]
    assert axes.get_title() == "SWA: AUROC 87.5 %"
    shares = [patch.get_data().values for patch in axes.patches]
    assert shares[0][[0, 3]] == pytest.approx([0.75, 0.25]) and shares[2][20] == 1.0
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["test images", "noise"]


def test_dots_show_means_seeds_and_the_control(drawn: list[plt.Figure]) -> None:
    values = {"NLL": {"SGD": [1.0, 3.0], "NaiveNoise": [1.5, 1.7]}, "ECE %": {"SGD": [90.0], "NaiveNoise": [0.1]}}
    errors = {metric: dict.fromkeys(own, 0.5) for metric, own in values.items()}
    uncertainty_plots.metric_dots(Path("m.png"), values, errors, "NaiveNoise", "title")
    nll, ece = drawn[0].axes
    assert [text.get_text() for text in nll.get_yticklabels()] == ["SGD", "NaiveNoise"]
    means = [container.lines[0].get_xdata()[0] for container in nll.containers]
    assert means == pytest.approx([2.0, 1.6])
    assert list(nll.lines[0].get_xdata()) == [1.0, 3.0] and list(nll.lines[0].get_ydata()) == [0, 0]
    assert [line.get_xdata()[0] for line in nll.lines if line.get_linestyle() == "--"] == pytest.approx([1.6])
    assert (nll.get_xscale(), ece.get_xscale()) == ("linear", "linear")


def test_a_metric_with_outliers_is_drawn_on_a_logarithmic_axis(drawn: list[plt.Figure]) -> None:
    own = {"SGD": [0.1], "SWA": [0.11], "MFVI": [2.0], "NaiveNoise": [0.1]}
    uncertainty_plots.metric_dots(Path("m.png"), {"NLL": own}, {"NLL": dict.fromkeys(own, 0.0)}, "NaiveNoise", "title")
    assert drawn[0].axes[0].get_xscale() == "log"


def test_severity_has_a_row_a_method(drawn: list[plt.Figure]) -> None:
    values = {"NLL": {"SGD": [1, 2, 3], "SWA": [1, 1, 2]}, "accuracy %": {"SGD": [4, 5, 6], "SWA": [0, 0, 1]}}
    digits = {"NLL": 2, "accuracy %": 0}
    uncertainty_plots.severity_panels(Path("s.png"), values, ["none", "1", "2"], "title", digits)
    nll, accuracy = drawn[0].axes
    assert nll.images[0].get_array().tolist() == [[1, 2, 3], [1, 1, 2]]
    assert [text.get_text() for text in nll.texts] == ["1.00", "2.00", "3.00", "1.00", "1.00", "2.00"]
    assert [text.get_text() for text in accuracy.texts] == ["4", "5", "6", "0", "0", "1"]
    assert [text.get_text() for text in accuracy.get_xticklabels()] == ["none", "1", "2"]
    assert [text.get_text() for text in nll.get_yticklabels()] == ["SGD", "SWA"]
    worst = [nll.images[0].cmap(nll.images[0].norm(3)), accuracy.images[0].cmap(accuracy.images[0].norm(0))]
    assert worst[0] == pytest.approx(worst[1])  # the same colour is bad in every panel
