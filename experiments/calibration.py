"""Reliability diagrams and calibration errors of saved predictions, from one or several comparisons.

Reads cells/METHOD-SEED.npz, which `experiments.uncertainty` and `experiments.ood` write with --save_predictions. Of
several folders a method is named FOLDER/METHOD, so that two networks, or two data sets, stand in one table.

Examples:
  python -m experiments.calibration --runs runs/mnist --dir runs/mnist-calibration
  python -m experiments.calibration --runs runs/cifar10,runs/cifar10-long --methods SGD,SWA,SWAG --num_bins 20

Writes to --dir: calibration.md, reliability.png, results.json (last), settings.json, environment.json, command.sh
"""

import dataclasses
import re
import statistics
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lowrank_bdl as lb
from experiments import plots, uncertainty_plots
from experiments.common import RunDir, SettingsError, parse_settings, run_script, setting, write_atomically
from experiments.uncertainty_methods import METHODS
from experiments.uncertainty_report import markdown_table
from experiments.uncertainty_settings import REQUIRED, find_names, names

PROG = "python -m experiments.calibration"
OUTPUTS = ("results.json", "calibration.md", "reliability.png")
COLUMNS = {
    "accuracy": ("accuracy %", 100, 2),
    "confidence": ("confidence %", 100, 2),
    "nll": ("NLL", 1, 4),
    "brier": ("Brier", 1, 4),
    "ece_width": ("ECE % (equal width)", 100, 2),
    "ece_mass": ("ECE % (equal mass)", 100, 2),
}
CELL = re.compile(r"(?P<method>.+)-(?P<seed>\d+)\.npz")
NAMES = tuple(METHODS)

Labelled = tuple[Tensor, Tensor]  # probabilities (N, C) and targets (N,)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is shown."""

    runs: str = setting(REQUIRED, "folders of comparisons, separated by commas", kind=str)
    dir: str = setting("runs/calibration", "folder to write to; an earlier one's files are replaced", free=True)
    methods: str = setting("all", "methods, separated by commas; all: those that the folders hold")
    images: str = setting("test", "which images: test, or another labelled set of the comparison")
    num_bins: int = setting(15, "bins of confidence")
    resume: bool = setting(False, "accepted for uniformity: nothing here takes long", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run."""
    if settings.num_bins < 1:
        raise SettingsError(f"--num_bins must be at least 1; got {settings.num_bins}")
    find_names("methods", settings.methods, NAMES, "method")
    if not names(settings.runs) or len(set(names(settings.runs))) < len(names(settings.runs)):
        raise SettingsError(f"--runs must name at least one folder, and each once; got {settings.runs!r}")
    return settings


def read_predictions(path: Path, images: str) -> Labelled:
    """Read the predictions for one set of images.

    Raises:
        SettingsError: If the file is damaged, or has no such labelled set.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            sets = sorted({name.rpartition("/")[0] for name in arrays.files if name.endswith("/targets")})
            if images not in sets:
                raise SettingsError(f"--images {images}: {path} has {', '.join(sets) or 'no labelled images'}")
            return tuple(torch.from_numpy(arrays[f"{images}/{key}"]) for key in ("probabilities", "targets"))  # type: ignore[return-value]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def find_files(settings: Settings) -> dict[str, list[Path]]:
    """List the files of each method's seeds, in the order of the table.

    Raises:
        SettingsError: If a folder has no predictions, or a method that is asked for is missing in it.
    """
    folders = [Path(name) for name in names(settings.runs)]
    asked = find_names("methods", settings.methods, NAMES, "method")
    found: dict[str, list[Path]] = {}
    for folder in folders:
        files: dict[str, list[tuple[int, Path]]] = {}
        for file in folder.glob("cells/*.npz"):
            if (match := CELL.fullmatch(file.name)) is not None:
                files.setdefault(match["method"], []).append((int(match["seed"]), file))
        if not files:
            raise SettingsError(f"--runs {folder}: there are no predictions (cells/*.npz, of --save_predictions) in it")
        for method in asked:
            if method in files:
                label = method if len(folders) == 1 else f"{folder.name}/{method}"
                if label in found:
                    raise SettingsError(f"--runs: two folders are called {folder.name}; rename one")
                found[label] = [file for _, file in sorted(files[method])]
            elif settings.methods != "all":
                raise SettingsError(f"--methods: {folder} has no predictions of {method}")
    return found


def measure(predictions: Labelled, num_bins: int) -> dict[str, float]:
    """Metrics of one seed's predictions; the NLL is of the probabilities as they were saved."""
    probabilities, targets = predictions
    return {
        "accuracy": lb.metrics.accuracy(probabilities, targets),
        "confidence": probabilities.double().amax(-1).mean().item(),
        "nll": lb.metrics.nll(probabilities, targets),
        "brier": lb.metrics.brier(probabilities, targets),
        "ece_width": lb.metrics.ece(probabilities, targets, num_bins),
        "ece_mass": lb.metrics.ece(probabilities, targets, num_bins, binning="mass"),
    }


def table(found: Mapping[str, Sequence[Mapping[str, float]]], settings: Settings) -> str:
    """Lay out the table: mean, and over seeds ± standard deviation."""
    rows = []
    for method, seeds in found.items():
        cells = []
        for metric, (_, factor, digits) in COLUMNS.items():
            own = [factor * seed[metric] for seed in seeds]
            error = f" ± {statistics.stdev(own):.{digits}f}" if len(own) > 1 else ""
            cells.append(f"{statistics.fmean(own):.{digits}f}{error}")
        rows.append([method, str(len(seeds)), *cells])
    head = ["method", "seeds", *(label for label, _, _ in COLUMNS.values())]
    note = f"On the {settings.images} images, with {settings.num_bins} bins; mean ± standard deviation over seeds."
    return "\n".join(["# Calibration", "", *markdown_table(head, rows), "", note]) + "\n"


def work(settings: Settings) -> str:
    """Read everything, then write table, figure and results.json; return what to print."""
    run = RunDir(settings, OUTPUTS, torch.device("cpu"), resuming=False)
    found: dict[str, list[dict[str, float]]] = {}
    curves: dict[str, Any] = {}
    for method, files in find_files(settings).items():
        found[method], curves[method] = [], []
        for file in files:
            predictions = read_predictions(file, settings.images)
            try:
                found[method].append(measure(predictions, settings.num_bins))
                curve = lb.metrics.reliability_curve(*predictions, settings.num_bins, binning="mass")
            except lb.LowRankBDLError as error:
                raise SettingsError(f"{file} is damaged: {error}") from None
            curves[method].append(plots.reliability_points(curve))
    run.begin()
    text = table(found, settings)
    write_atomically(run.path / "calibration.md", text)
    ece = {method: statistics.fmean(seed["ece_width"] for seed in seeds) for method, seeds in found.items()}
    title = f"Reliability on the {settings.images} images"
    reference = next((method for method in curves if method.rpartition("/")[2] == uncertainty_plots.REFERENCE), "")
    uncertainty_plots.reliability_panels(run.path / "reliability.png", curves, ece, title, reference)
    run.write_json("results.json", {"schema": 1, "settings": dataclasses.asdict(settings), "methods": found})
    return f"{text}\nwritten to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings))


if __name__ == "__main__":
    sys.exit(main())
