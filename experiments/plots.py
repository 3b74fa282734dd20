"""Figures of the experiments: one style, one colour a method, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import ArrayLike

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lowrank_bdl.prediction.metrics import ReliabilityCurve

# Okabe and Ito's palette: distinguishable with every common colour-vision deficiency.
COLORS = {
    "SGD": "#000000", "Adam": "#000000", "AdamW": "#000000", "SWA": "#009E73", "SWAG-Diag": "#0072B2",
    "SWAG": "#D55E00", "EMA": "#CC79A7", "Polyak": "#E69F00", "SGLD": "#000000", "SGHMC": "#000000",
    "Snapshots": "#56B4E9", "mean": "#000000", "MFVI": "#D55E00", "LAWA": "#0072B2", "SWAP": "#009E73",
    "A2C": "#000000", "DDPG": "#000000",
}  # fmt: skip
MARKERS = {
    "SGD": "s", "Adam": "s", "AdamW": "s", "SWA": "D", "SWAG-Diag": "^", "SWAG": "o", "EMA": "v", "Polyak": "P",
    "SGLD": "s", "SGHMC": "s", "Snapshots": "X", "mean": "s", "MFVI": "o",
}  # fmt: skip
SEQUENCE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def _save(figure: Figure, path: Path) -> None:
    # written beside and renamed: a killed run leaves no half of a picture
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary)
    plt.close(figure)
    temporary.replace(path)


def _axes(width: float = 7.0, height: float = 4.5, **options: Any) -> tuple[Figure, Any]:
    return plt.subplots(figsize=(width, height), layout="constrained", **options)


def reliability_points(curve: ReliabilityCurve) -> tuple[np.ndarray, np.ndarray]:
    """Return mean confidence and accuracy of the bins that are not empty."""
    filled = curve.count > 0
    return curve.confidence[filled].cpu().numpy(), curve.accuracy[filled].cpu().numpy()


def reliability_diagram(
    path: Path,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ece: Mapping[str, float],
    title: str = "Reliability on the test images",
) -> None:
    """Confidence minus accuracy against confidence, in bins of equal mass; the dashed line is perfect calibration.

    The confidence axis is logarithmic in 1 - confidence, because nearly all predictions of a trained network lie
    close to 1.

    Args:
        path: File to write.
        curves: For each method, mean confidence and accuracy of each bin, both (num_bins,).
        ece: For each method, the expected calibration error.
        title: Title of the figure.
    """
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        smallest, largest = 1.0, 1e-6
        for method, (confidence, accuracy) in curves.items():
            doubt = np.maximum(1 - np.asarray(confidence, dtype=float), 1e-6)
            gap = np.asarray(confidence, dtype=float) - np.asarray(accuracy, dtype=float)
            smallest, largest = min(smallest, float(doubt.min())), max(largest, float(doubt.max()))
            label = f"{method} (ECE {100 * ece[method]:.2f} %)"
            axes.plot(doubt, gap, color=COLORS[method], marker=MARKERS[method], label=label)
        axes.axhline(0, color="#555555", linestyle="--", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xlim(largest * 1.6, smallest / 1.6)
        _confidence_ticks(axes, largest * 1.6, smallest / 1.6)
        axes.set_xlabel("confidence (bins of equal mass)")
        axes.set_ylabel("confidence − accuracy\n← underconfident     overconfident →")
        axes.set_title(title)
        axes.legend(loc="best")
        _save(figure, path)


def _confidence_ticks(axes: Axes, largest: float, smallest: float) -> None:
    doubts = [doubt for doubt in (0.5, 0.2, *(10.0**-k for k in range(1, 7))) if smallest < doubt < largest]
    axes.set_xticks(doubts, [f"{1 - doubt:.6f}".rstrip("0") for doubt in doubts])
    axes.minorticks_off()


def _plain_log_numbers(axes: Axes, *, low_panel: bool = False, of: str = "y") -> None:
    """Label a logarithmic axis with plain numbers: 0.1, 0.2, 0.5, 1; powers of ten alone where there are many."""
    axis = axes.yaxis if of == "y" else axes.xaxis
    low, high = axes.get_ylim() if of == "y" else axes.get_xlim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain)
    axis.set_minor_locator(LogLocator(subs=(2.0, 5.0) if low_panel or high / low > 8 else tuple(range(2, 10))))
    axis.set_minor_formatter(plain if high / low < 300 else NullFormatter())


def nll_against_samples(
    path: Path, curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]], lines: Mapping[str, float]
) -> None:
    """Test NLL of the model average against the number of weight samples in it.

    Args:
        path: File to write.
        curves: For each method, mean, 10 % and 90 % quantile over orders of the samples, each (num_samples,) [nats].
        lines: NLL of the methods that are one set of weights [nats].
    """
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        for method, value in lines.items():
            style = "--" if method == "SGD" else "-."
            axes.axhline(value, color=COLORS[method], linestyle=style, label=method)
        for method, (mean, low, high) in curves.items():
            number = np.arange(1, len(np.asarray(mean)) + 1)
            axes.fill_between(number, low, high, color=COLORS[method], alpha=0.15, linewidth=0)
            axes.plot(number, mean, color=COLORS[method], marker=MARKERS[method], markersize=4, label=method)
        axes.set_xlabel("weight samples in the average")
        axes.set_ylabel("test NLL [nats per image]")
        axes.set_title("Model averaging: NLL against the number of samples\n(band: 10–90 % over orders of the samples)")
        axes.set_xlim(0.5, None)
        axes.legend(loc="best")
        _save(figure, path)


def covariance_spectrum(path: Path, leading: ArrayLike, low_rank: ArrayLike, diagonal: ArrayLike) -> None:
    """Eigenvalues of the covariance against their index, both logarithmic.

    Args:
        path: File to write.
        leading: Largest eigenvalues of the whole covariance, (k,) [weight²].
        low_rank: Variances along the principal components of its low-rank part, (k,) [weight²].
        diagonal: Its diagonal part, (D,) [weight²]; beyond the leading ones the eigenvalues interlace with it.
    """
    with plt.rc_context(STYLE):
        figure, axes = _axes()
        ordered = np.sort(np.asarray(diagonal, dtype=float))[::-1]
        ordered = ordered[ordered > 0]
        if len(ordered):
            axes.plot(np.arange(1, len(ordered) + 1), ordered, color="#0072B2", label="diagonal part, sorted")
        if len(np.asarray(low_rank)):
            shown = np.asarray(low_rank, dtype=float)
            axes.plot(
                np.arange(1, len(shown) + 1), shown, "o", color="#D55E00", label="low-rank part, principal components"
            )
        if len(np.asarray(leading)):
            shown = np.asarray(leading, dtype=float)
            axes.plot(
                np.arange(1, len(shown) + 1), shown, "o", color="black", fillstyle="none", markersize=9,
                label="whole covariance, leading eigenvalues",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("index")
        axes.set_ylabel("variance [weight²]")
        axes.set_title("Spectrum of the SWAG covariance")
        axes.legend(loc="best")
        _save(figure, path)


def loss_along_directions(
    path: Path, steps: ArrayLike, train: ArrayLike, test: ArrayLike, stddevs: Sequence[float], names: Sequence[str]
) -> None:
    """Loss along rays through the SWA solution, one panel for the training and one for the test images.

    Args:
        path: File to write.
        steps: Distances from the SWA solution, (T,) [standard deviations of the posterior along the ray].
        train: Training loss, (number of rays, T) [nats].
        test: Test loss, (number of rays, T) [nats].
        stddevs: Standard deviation along each ray [weight].
        names: Name of each ray.
    """
    with plt.rc_context(STYLE):
        figure, panels = _axes(9.5, 4.4, ncols=2, sharex=True)
        for axes, losses, title in zip(panels, (train, test), ("Training loss", "Test loss"), strict=True):
            for loss, stddev, name, color in zip(np.asarray(losses), stddevs, names, SEQUENCE, strict=False):
                axes.plot(steps, loss, color=color, marker="o", markersize=3, label=f"{name} (std {stddev:.2g})")
            axes.axvline(0, color="#555555", linestyle="--", linewidth=1.2)
            axes.set_title(title)
            axes.set_yscale("log")
            _plain_log_numbers(axes)
            axes.set_xlabel("distance from SWA [posterior std along the ray]")
        panels[0].set_ylabel("NLL [nats per image]")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10)
        _save(figure, path)


def training_curves(
    path: Path,
    runs: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]],
    start: int | None,
    held_out: str,
    example: str = "image",
) -> None:
    """Loss, error and learning rate against the epoch.

    Args:
        path: File to write.
        runs: For each run, by its label: the method that gives its colour, and its records (``epoch``, ``lr``,
            ``loss``, and where known ``accuracy``, ``held_out`` and ``held_out_swa`` with ``nll`` and ``accuracy``).
        start: Number of epochs before the first snapshot; None where nothing is collected.
        held_out: What the held-out images are called.
        example: What the loss is the mean over.
    """
    with plt.rc_context(STYLE):
        figure, (losses, errors, rates) = _axes(7.0, 7.0, nrows=3, sharex=True, height_ratios=(3, 3, 1))
        for label, (method, rows) in runs.items():
            color = COLORS[method]
            losses.plot(*_series(rows, "loss"), color=color, label=f"{label}, training")
            errors.plot(*_series(rows, "accuracy", error=True), color=color, label=f"{label}, training")
            for key, name, shade in (("held_out", label, color), ("held_out_swa", "SWA", COLORS["SWA"])):
                style = dict(color=shade, linestyle=":", marker="o", markersize=2.5)
                if any(key in row for row in rows):
                    losses.plot(*_series(rows, key, "nll"), **style, label=f"{name}, {held_out}")
                    errors.plot(*_series(rows, key, "accuracy", error=True), **style, label=f"{name}, {held_out}")
            rates.plot(*_series(rows, "lr"), color=color)
        for axes in (losses, errors, rates):
            axes.set_yscale("log")
            if start is not None:
                axes.axvline(start, color="#999999", linewidth=1)
        if start is not None:
            losses.text(
                start,
                0.98,
                " collection starts",
                transform=losses.get_xaxis_transform(),
                va="top",
                color="#777777",
                fontsize=10,
            )
        _plain_log_numbers(losses)
        _plain_log_numbers(errors)
        _plain_log_numbers(rates, low_panel=True)
        losses.set_ylabel(f"NLL [nats per {example}]")
        losses.set_title("Training")
        losses.legend(loc="best", fontsize=10)
        errors.set_ylabel("error [%]")
        rates.set_ylabel("learning rate")
        rates.set_xlabel("epoch")
        rates.xaxis.set_major_locator(MaxNLocator(integer=True))
        _save(figure, path)


def _series(rows: Sequence[Mapping[str, Any]], *keys: str, error: bool = False) -> tuple[list[int], list[float]]:
    """Return epochs and values of the records that have them; accuracies as errors in percent, no error as none."""
    epochs, values = [], []
    for row in rows:
        value: Any = row
        for key in keys:
            value = value.get(key) if value is not None else None
        if value is not None:
            epochs.append(row["epoch"])
            values.append((100 * (1 - value) or float("nan")) if error else value)
    return epochs, values
