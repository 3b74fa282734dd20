"""Shifted and foreign images: what every method says about images that it was not trained for.

--split_classes 0|1   train on five of CIFAR-10's classes; the other five are foreign, told by entropy
--transfer STL10      predict STL10 with a network trained on CIFAR-10, its labels mapped (monkeys count as frogs)
--transfer corrupted  where STL10 is not at hand: CIFAR-10's test images, corrupted, with labels in STL10's order and
                      mapped as those of STL10; a stand-in, and the table says so
--corrupted FOLDER    predict what experiments.corrupt wrote (or CIFAR-10-C's own files): metrics against severity

Everything else is as in experiments.uncertainty, whose flags and methods these are; networks that it has trained with
the same recipe are taken with --members_from.

Examples:
  python -m experiments.ood --dataset CIFAR10 --data_path DATA_DIR --model PreResNet20 --split_classes 0
      --dir runs/split
  python -m experiments.corrupt --dataset CIFAR10 --data_path DATA_DIR --dir runs/cifar10-c
  python -m experiments.ood --dataset CIFAR10 --data_path DATA_DIR --model PreResNet20 --corrupted runs/cifar10-c
      --members_from runs/cifar10 --dir runs/severity
  python -m experiments.ood --run runs/preresnet20 --data_path DATA_DIR --transfer STL10 --dir runs/transfer

Writes to --dir what experiments.uncertainty writes, and severity.png
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from experiments import uncertainty, uncertainty_settings
from experiments.common import RunDir, SettingsError, parse_settings, run_script, setting
from experiments.corruptions import SET_NAME, SEVERITIES, load_corrupted, set_name
from experiments.datasets import Datasets, Split, label_map, load_dataset
from experiments.evaluation import Images
from experiments.uncertainty_plots import severity_panels
from experiments.uncertainty_report import METRICS, Cells, markdown_table

PROG = "python -m experiments.ood"
CORRUPTED_FILE = re.compile(r"(?P<name>(?!labels)\w+)(_[1-5]\.npz|\.npy)")
STAND_IN = 3  # severity of the corrupted images that stand in for STL10
SHOWN = {"accuracy": "accuracy %", "nll": "NLL", "ece": "ECE %"}


@dataclass(frozen=True)
class Settings(uncertainty_settings.Settings):
    """The flags of a comparison, and which images it is about."""

    dir: str = setting("runs/ood", "folder to write to; an earlier table and its cells are replaced", free=True)
    transfer: str = setting("none", "predict STL10, or its stand-in", choices=("none", "STL10", "corrupted"))
    corrupted: str | None = setting(None, "folder of experiments.corrupt", kind=str, free=True)
    corruptions: str = setting("all", "which of them, separated by commas; all: those in the folder")


def check(settings: Settings) -> Settings:
    """Refuse what cannot run."""
    uncertainty_settings.check(settings)
    if settings.run is None and settings.transfer == "none" and settings.corrupted is settings.split_classes is None:
        raise SettingsError("give at least one of --split_classes, --transfer and --corrupted")
    if settings.transfer == "corrupted" and settings.corrupted is None:
        raise SettingsError("--transfer corrupted needs --corrupted, the folder of the images that stand in for STL10")
    if settings.transfer != "none" and settings.split_classes is not None:
        raise SettingsError("--transfer and --split_classes exclude each other: STL10 has all ten classes")
    return settings


@dataclass(frozen=True)
class Corrupted:
    """One corruption at one severity, read when it is iterated: all of them at once would not fit into memory."""

    folder: Path
    name: str
    severity: int
    data: Datasets
    count: int

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate in order."""
        images = load_corrupted(self.folder, self.name, self.severity, self.data)
        yield from images.first(self.count).batches(batch_size)


def corrupted_sets(settings: Settings, data: Datasets) -> dict[str, Images]:
    """List the corrupted sets in the folder, each of them read once to see that it is sound.

    Raises:
        SettingsError: If there are none, one that is asked for is missing at a severity, or one is damaged.
    """
    if settings.corrupted is None:
        return {}
    folder = Path(settings.corrupted)
    if not folder.is_dir():
        raise SettingsError(f"--corrupted {folder}: there is no such folder")
    present = {match["name"] for file in folder.iterdir() if (match := CORRUPTED_FILE.fullmatch(file.name))}
    if not present:
        raise SettingsError(f"--corrupted {folder}: there are no files NAME_SEVERITY.npz (or NAME.npy) in it")
    asked = uncertainty_settings.find_names("corruptions", settings.corruptions, tuple(sorted(present)), "corruption")
    found: dict[str, Images] = {}
    for name in asked:
        for severity in SEVERITIES:
            images = load_corrupted(folder, name, severity, data)
            if images.shape != data.train.shape:
                raise SettingsError(
                    f"--corrupted {folder}: {name} has images of shape {images.shape} at severity {severity}; the "
                    f"network takes {data.train.shape}"
                )
            count = min(len(images), settings.eval_limit or len(images))
            found[set_name(name, severity)] = Corrupted(folder, name, severity, data, count)
    return found


def transfer_sets(settings: Settings, data: Datasets) -> dict[str, Images]:
    """Load what the network is transferred to, its labels mapped to those of the network."""
    if settings.transfer == "none":
        return {}
    if data.name != "CIFAR10":
        raise SettingsError(f"--transfer is from CIFAR10; got {data.name}")
    mapping = label_map("STL10", "CIFAR10")
    if settings.transfer == "STL10":
        stl = load_dataset(
            "STL10", settings.data_path, use_test=True, validation=False, image_size=data.image_size, mean=data.mean,
            std=data.std, device=data.train.targets.device,
        ).test  # fmt: skip
        assert isinstance(stl, Split)
        images = Split(stl.inputs, mapping.to(stl.targets.device)[stl.targets])
        return {"STL10": images.first(settings.eval_limit or len(images))}
    name = next(iter(corrupted_sets(settings, data))).rpartition("-")[0]
    own = load_corrupted(Path(str(settings.corrupted)), name, STAND_IN, data)
    in_stl10_order = mapping.argsort().to(own.targets.device)[own.targets]  # as if they were STL10's labels
    images = Split(own.inputs, mapping.to(own.targets.device)[in_stl10_order])
    return {f"stand-in for STL10 ({name} {STAND_IN})": images.first(settings.eval_limit or len(images))}


def more_sets(settings: uncertainty_settings.Settings, data: Datasets) -> Mapping[str, Images]:
    """Return the labelled images that are predicted beside the test images."""
    assert isinstance(settings, Settings)
    return {**corrupted_sets(settings, data), **transfer_sets(settings, data)}


def by_severity(cells: Cells, corruptions: Sequence[str], metric: str) -> dict[str, list[float]]:
    """Mean over corruptions and seeds at severity 0 (the test images) to 5, by method."""
    factor = METRICS[metric][1]

    def at(cell: Mapping[str, Any], severity: int) -> float:
        sets = ["test"] if severity == 0 else [set_name(name, severity) for name in corruptions]
        return fmean(factor * cell["metrics"][name][metric] for name in sets)

    return {method: [fmean(at(cell, s) for cell in own) for s in (0, *SEVERITIES)] for method, own in cells.items()}


def report(
    settings: uncertainty_settings.Settings, run: RunDir, cells: Cells, title: str
) -> tuple[list[str], dict[str, Any]]:
    """Write what the shifted images did: a table each, and the figure against severity."""
    first = next(iter(cells.values()))[0]
    corruptions = sorted({match["name"] for name in first["metrics"] if (match := SET_NAME.fullmatch(name))})
    lines: list[str] = []
    more: dict[str, Any] = {}
    if corruptions:
        curves = {label: by_severity(cells, corruptions, metric) for metric, label in SHOWN.items()}
        more = {"corruptions": corruptions, "by_severity": curves}
        ticks = ["none", *map(str, SEVERITIES)]
        digits = {label: METRICS[metric][2] for metric, label in SHOWN.items()}
        severity_panels(
            run.path / "severity.png", curves, ticks, f"{title}: mean over {len(corruptions)} corruptions", digits
        )
        for label, own in curves.items():
            rows = [[method, *(f"{value:.3f}" for value in line)] for method, line in own.items()]
            lines += ["", f"## {label} by severity, mean over {len(corruptions)} corruptions", ""]
            lines += markdown_table(["method", *ticks], rows)
    for name in first["metrics"]:
        if "STL10" in name:
            rows = [
                [method, *(f"{METRICS[m][1] * fmean(c['metrics'][name][m] for c in own):.3f}" for m in METRICS)]
                for method, own in cells.items()
            ]
            lines += ["", f"## Transfer to {name}", ""]
            lines += markdown_table(["method", *(label for label, _, _ in METRICS.values())], rows)
    return [*lines, ""], more


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    extra = uncertainty.Extra(more_sets, report)
    return run_script(PROG, lambda: uncertainty.compare(settings, extra), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
