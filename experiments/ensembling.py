"""What the size of an ensemble, and its parts, do to its predictions: the SWAG paper's ablations of a finished run.

samples    NLL and accuracy against the number of weight samples, with batch-norm statistics recalibrated for every
           sample and with those of the SWA mean for all of them
scale      NLL against the factor of SWAG's covariance, and of its diagonal alone (rank 0)
rank       NLL against the number of deviations
bn         NLL against the training images that batch norm is recalibrated on (networks with batch norm)
noise      NLL of a control that has learnt nothing, the SWA mean plus noise in proportion to each weight, by level
snapshots  NLL of SWA, of SWAG and of the average over the iterates' own predictions, against the number of iterates
           (runs with --snapshots)

The last iterate (SGD) and the SWA mean are lines in every figure. The same seeds make the samples of every posterior,
so that differences are not those of the draws. Nothing is chosen: every setting that is tried is shown.

Examples:
  python -m experiments.train --dir runs/digits --dataset digits --model SmallConvNet --epochs 60 --batch_size 32
      --lr_init 0.05 --swa --swa_start 30 --swa_lr 0.02 --cov_mat --snapshots
  python -m experiments.ensembling --run runs/digits --dir runs/digits-ablations
  python -m experiments.ensembling --run runs/preresnet20 --data_path DATA_DIR --dir runs/ablations --eval_limit 2000
      --bn_size 2000 --parts samples,scale,rank

Writes to --dir: cells/NAME.json (one for each posterior, so that a killed run goes on from there), log.jsonl, a figure
for each part (samples.png, ...), table.txt, results.json (last), settings.json, environment.json, command.sh
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import lowrank_bdl as lb
from experiments import ensembling_report
from experiments.common import (
    RunDir,
    SettingsError,
    fixed,
    parse_settings,
    require_at_least,
    require_positive,
    resolve_device,
    run_script,
    setting,
    write_atomically,
)
from experiments.datasets import Datasets, load_dataset
from experiments.ensembling_cells import PARTS, Bench, Cell, Grids, evaluate, plan
from experiments.uncertainty_members import TrainedRun, TrainSettings, read_settings

PROG = "python -m experiments.ensembling"
OUTPUTS = ("results.json", "log.jsonl", "table.txt", "cells/*.json", *(f"{part}.png" for part in PARTS))


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is evaluated; the grids may grow when a run is resumed."""

    run: str = setting(dataclasses.MISSING, "folder of a finished run of experiments.train --swa", kind=str, free=True)
    dir: str = setting(dataclasses.MISSING, "folder to write to", kind=str, free=True)
    data_path: str | None = setting(None, "folder with the data set's files (default: the run's)", kind=str, free=True)
    parts: str = setting("all", "which ablations, separated by commas", free=True)
    images: str = setting(
        "auto", "which to predict; auto: what the run reports", choices=("auto", "validation", "test")
    )
    eval_limit: int | None = setting(None, "predict so many images only (default: all)", kind=int)
    num_samples: int = setting(30, "weight samples in a model average")
    scale: float = setting(0.5, "of SWAG where it is not what is varied", free=True)
    scales: str = setting("0.125,0.25,0.5,0.7071,1,1.25,2", "factors of the covariance, separated by commas", free=True)
    ranks: str = setting("0,2,5,10,20", "deviations; those that the run has not are left out", free=True)
    noise: float = setting(0.1, "level of the naive noise where it is not what is varied", free=True)
    noise_levels: str = setting("0.025,0.05,0.1,0.2,0.4", "levels of the naive noise", free=True)
    bn_points: int = setting(11, "fractions of the images for batch norm, from one batch to all", free=True)
    snapshot_points: int = setting(6, "numbers of iterates, from two to all, for which SWAG is fitted", free=True)
    bn_size: int | None = setting(None, "images for batch norm (default: as many as the run)", kind=int)
    batch_size: int = setting(125, "images in a batch that is predicted")
    bn_batch_size: int = setting(500, "images in a batch for batch norm")
    seed: int = setting(0, "seed of the weight samples")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir, whose finished cells are kept", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run."""
    at_least = dict(
        num_samples=1, bn_points=2, snapshot_points=2, batch_size=1, bn_batch_size=2, seed=0, threads=0, eval_limit=2,
        bn_size=2,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("scale", "noise"))
    parts(settings)
    grids(settings)
    return settings


def parts(settings: Settings) -> list[str]:
    """Return the ablations that are asked for."""
    asked = [text.strip() for text in settings.parts.split(",")]
    if settings.parts == "all":
        return list(PARTS)
    if not set(asked) <= set(PARTS) or len(set(asked)) < len(asked):
        raise SettingsError(f"--parts must be some of {', '.join(PARTS)}, each once; got {settings.parts!r}")
    return [part for part in PARTS if part in asked]


def grids(settings: Settings) -> Grids:
    """Return what is varied."""
    return Grids(
        scale=settings.scale,
        scales=numbers("scales", settings.scales, float, 0.0),
        ranks=numbers("ranks", settings.ranks, int, -1),
        noise=settings.noise,
        noise_levels=numbers("noise_levels", settings.noise_levels, float, 0.0),
        bn_points=settings.bn_points,
        snapshot_points=settings.snapshot_points,
    )


def numbers(flag: str, text: str, kind: Any, above: float) -> tuple[Any, ...]:
    """Read numbers that are separated by commas, in rising order."""
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not above < found[0] or not found[-1] < float("inf"):
        what = "whole numbers from 0" if kind is int else "positive numbers"
        raise SettingsError(f"--{flag} must be {what}, separated by commas; got {text!r}")
    return tuple(found)


def load_data(settings: Settings, run: TrainSettings, device: torch.device) -> tuple[Datasets, str]:
    """Load the data of the run; return them with the name of the images that are predicted."""
    name = settings.images if settings.images != "auto" else "test" if run.use_test else "validation"
    if name == "validation" and run.use_test:
        raise SettingsError("--images validation: the run was trained on them (--use_test)")
    data = load_dataset(
        run.dataset,
        settings.data_path or run.data_path,
        use_test=name == "test",
        validation=not run.use_test,
        split_classes=run.split_classes,
        label_arr=run.label_arr,
        train_limit=run.train_limit,
        num_workers=run.num_workers,
        device=device,
    )
    return data, name


def cell_file(cell: Cell) -> str:
    return f"cells/{cell.name}.json"


def run_cells(
    run: RunDir, bench: Bench, todo: Sequence[Cell], recipe: dict[str, Any], cells: dict[str, dict[str, Any]]
) -> None:
    """Evaluate every cell in `todo`, write it, and add it to `cells`."""
    (run.path / "cells").mkdir(exist_ok=True)
    with tqdm(todo, desc="ensembling", unit="posterior", smoothing=0) as bar:
        for cell in bar:
            bar.set_postfix_str(cell.name, refresh=False)
            began = time.perf_counter()
            try:
                found = evaluate(bench, cell)
            except lb.NonFiniteError as error:
                raise SettingsError(f"{cell.name}: {error}") from None
            seconds = time.perf_counter() - began
            record = {"cell": dataclasses.asdict(cell), "recipe": recipe, **found, "seconds": seconds}
            run.write_json(cell_file(cell), record)
            run.log(cell=cell.name, seconds=seconds)
            cells[cell.name] = json.loads(json.dumps(record))


def work(settings: Settings) -> str:
    """Check everything, then evaluate what is left; return what to print."""
    device = resolve_device(settings.device)
    folder = RunDir(settings, OUTPUTS, device)
    trained = read_settings(Path(settings.run))
    data, images = load_data(settings, trained, device)
    bench = Bench(TrainedRun(Path(settings.run), data, device), data, images, settings)
    planned = plan(parts(settings), grids(settings), bench)
    different = list(dict.fromkeys(cell for group in planned.values() for cell in group))
    recipe = {**fixed(settings), "weights": bench.digest}
    cells = {}
    for cell in different if settings.resume else ():
        if (found := folder.read_cell(cell_file(cell), recipe)) is not None:
            cells[cell.name] = found
    folder.begin()
    run_cells(folder, bench, [cell for cell in different if cell.name not in cells], recipe, cells)
    ensembling_report.draw(folder.path, planned, cells, bench)
    text = ensembling_report.table(planned, cells, bench, settings.run)
    write_atomically(folder.path / "table.txt", text + "\n")
    folder.write_json("results.json", ensembling_report.results(settings, planned, cells, bench))
    return f"{text}\n\nwritten to {folder.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ablations; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
