"""Compare the uncertainty of every method on one network: one table, one budget column, one evaluation.

SGD              the last iterate of a run whose rate decays to 1 %
SWA              the mean of the iterates collected in a second run, at a constant rate
SWAG-Diag, SWAG, SWAG-block   Gaussians around that mean: variances alone, with deviations, one block a tensor
MultiSWA, MultiSWAG, DeepEnsemble   --members independent networks: their means, a mixture of Gaussians, last iterates
FGE, SGD-Iterates   snapshots of a cyclical run, or of the SWA run
Dropout, SWAG-Dropout   dropout left on, of a twin network trained with it; with SWAG around its own mean too
Temperature, SWA-Temperature   SGD and SWA, their probabilities rescaled
Laplace-KFAC, Laplace-Diag   Gaussians around SGD from the Fisher information of all training images
SGLD, SGHMC, MFVI   chains, and mean-field variational inference, that start from the SWA run
HomoNoise, NaiveNoise   controls: SWA + noise of one size, or in proportion to each weight; always in the table

Every method is fitted separately. The networks train without the validation images, which alone choose every level
(scale, noise, prior precision) and temperature, all by the same walk; the test images are for the report. Batch-norm
statistics are recomputed from training images for every set of weights. Foreign images are told by predictive entropy.

Examples:
  python -m experiments.uncertainty --dataset digits --model SmallConvNet --batch_size 32 --dir runs/digits
  python -m experiments.uncertainty --dataset MNIST --model LeNet5 --data_path DATA_DIR --dir runs/mnist --resume
  python -m experiments.uncertainty --dataset CIFAR10 --model PreResNet20 --data_path DATA_DIR --dir runs/cifar10
      --epochs 40 --swa_start 25 --lr_init 0.1 --wd 3e-4 --fge_lr 0.05 --bn_size 5000 --amp bfloat16 --channels_last
  python -m experiments.uncertainty --run runs/preresnet20 --methods SGD,SWA,SWAG --dir runs/again --data_path DATA_DIR

Writes to --dir: members/ (each a run of experiments.train, resumed where it was killed), cells/METHOD-SEED.json (kept
by --resume), uncertainty.md, reliability.png, metrics.png, entropy-NAME.png, log.jsonl, results.json (last),
settings.json, environment.json, command.sh
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

import lowrank_bdl as lb
from experiments import uncertainty_report
from experiments.common import RunDir, SettingsError, parse_settings, resolve_device, run_script, write_atomically
from experiments.corruptions import SET_NAME
from experiments.datasets import Datasets
from experiments.evaluation import Images
from experiments.uncertainty_cells import ImageSets, finished_cell, run_cell
from experiments.uncertainty_members import TrainSettings, dropout_twin
from experiments.uncertainty_methods import Bench
from experiments.uncertainty_report import Cells
from experiments.uncertainty_settings import Settings, check, names, seeds_of
from experiments.uncertainty_sources import Networks, Trained, image_sets, limited, open_networks

PROG = "python -m experiments.uncertainty"
OUTPUTS = ("results.json", "log.jsonl", "uncertainty.md", "*.png", "cells/*.json", "cells/*.npz")

Found = dict[tuple[str, int], dict[str, Any]]  # by method and seed


def cells_of(settings: Settings, methods: Sequence[str]) -> list[tuple[str, int]]:
    """List all cells: every method with a seed before the next seed."""
    return [(method, seed) for seed in seeds_of(settings) for method in methods]


def run_cells(
    settings: Settings,
    run: RunDir,
    networks: Networks,
    data: Datasets,
    sets: ImageSets,
    todo: Sequence[tuple[str, int]],
) -> Found:
    """Fit and evaluate the cells that are left."""
    (run.path / "cells").mkdir(exist_ok=True)
    found: Found = {}
    with tqdm(total=len(todo), desc="methods", unit="method", smoothing=0) as bar:
        for method, seed in todo:
            bar.set_postfix_str(f"{method}, seed {seed}")

            def find(kind: str, many: bool, seed: int = seed) -> Any:
                return networks.find(kind, seed, many)

            bench = Bench(settings, limited(data, sets), seed, find)
            try:
                found[method, seed] = run_cell(run, bench, method, sets)
            except (SettingsError, lb.NonFiniteError) as error:
                raise SettingsError(f"{method}, seed {seed}: {error}") from None
            bar.update()
    return found


def train_networks(networks: Networks, todo: Sequence[Any]) -> None:
    """Train what is left, or go on where it was killed."""
    for number, name in enumerate(todo, start=1):
        tqdm.write(f"training run {number} of {len(todo)}: {name.folder}", file=sys.stderr)
        assert isinstance(networks, Trained)
        networks.train(name)


def title_of(settings: Settings, data: Datasets, given: TrainSettings | None) -> str:
    half = data.details.get("split_classes")
    return f"{settings.model if given is None else given.model} on {data.name}" + (
        f", half {half} of the classes" if half is not None else ""
    )


def described(sizes: Mapping[str, int]) -> str:
    """Say how many images each set has; those of corruptions at severities together."""
    corrupted = Counter(number for name, number in sizes.items() if SET_NAME.fullmatch(name))
    parts = [f"{number:,} {name}" for name, number in sizes.items() if not SET_NAME.fullmatch(name)]
    return "; ".join(parts + [f"{count} corrupted sets of {number:,}" for number, count in corrupted.items()])


def notes_of(
    settings: Settings,
    data: Datasets,
    sets: ImageSets,
    given: TrainSettings | None,
    cells: Cells,
) -> list[str]:
    """Say how the numbers of the table were made."""
    images = described(sets.sizes)
    count = len(next(iter(cells.values())))
    notes = [
        f"{len(data.train):,} training images; {images} images. "
        + (
            f"Mean ± standard deviation over {count} seeds, each with networks of its own."
            if count > 1
            else "One seed: ± is the standard error over the test images; where there is none, no error is given."
        ),
        "epochs: of training behind the prediction, those of the run it starts from included. networks: averaged in a "
        f"prediction; {settings.num_samples} draws of a distribution. AUROC: foreign images told by their entropy.",
    ]
    if any(cell["tried"] for own in cells.values() for cell in own):
        notes.append(
            "Levels (scale, noise, prior precision) and temperatures were chosen on the validation images alone, every "
            f"level by the same walk over a geometric grid with {settings.tune_samples} draws; they are listed below."
        )
    if given is not None:
        notes.append(f"Evaluated from finished runs of experiments.train: {settings.run}.")
        return notes
    if {"SGLD", "SGHMC"} & set(cells):
        notes.append(
            f"SGLD and SGHMC start from the SWA run: {settings.chain_epochs} epochs at step size {settings.chain_lr:g} "
            f"and temperature {' or '.join(names(settings.temperature))}, the first {settings.chain_burn_in} without "
            "snapshots."
        )
    if "MFVI" in cells:
        notes.append(
            f"MFVI starts from the SWA run: {settings.vi_epochs} epochs at rate {settings.vi_lr:g}, at the same "
            "temperatures. Its prior, like that of Laplace to begin with and of the chains, is what weight decay "
            "means: precision images x wd."
        )
    if {"Dropout", "SWAG-Dropout"} & set(cells):
        notes.append(f"Dropout and SWAG-Dropout are of {dropout_twin(settings)}, trained with dropout.")
    return notes


@dataclass(frozen=True)
class Extra:
    """What another script adds to a comparison.

    Attributes:
        sets: Gives more labelled images to predict, by name.
        report: Writes more figures; gives more lines for the table and more entries for results.json.
    """

    sets: Callable[[Settings, Datasets], Mapping[str, Images]] = lambda settings, data: {}
    report: Callable[[Settings, RunDir, Cells, str], tuple[list[str], dict[str, Any]]] = lambda *_: ([], {})


def experiment(
    settings: Settings,
    run: RunDir,
    data: Datasets,
    sets: ImageSets,
    given: TrainSettings | None,
    cells: Cells,
    extra: Extra,
) -> str:
    """Write tables and figures, and results.json last; return the tables."""
    title = title_of(settings, data, given)
    lines, more = extra.report(settings, run, cells, title)
    notes = notes_of(settings, data, sets, given, cells)
    text = "\n".join([uncertainty_report.markdown(title, cells, notes), *lines])
    write_atomically(run.path / "uncertainty.md", text)
    figures = uncertainty_report.draw(run.path, cells, title)
    run.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(settings),
            "run": None if given is None else dataclasses.asdict(given),
            "data": data.facts,
            "images": {"train": len(data.train), **sets.sizes},
            "reported_on": "test",
            "methods": uncertainty_report.summary(cells),
            "figures": figures,
            "cells": cells,
            **more,
        },
    )
    return text


def compare(settings: Settings, extra: Extra | None = None) -> str:
    """Check everything, then train, fit and evaluate what is left; return what to print."""
    extra = extra or Extra()
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    networks, data, methods, given = open_networks(settings, device)
    settings = dataclasses.replace(settings, seeds=1) if given is not None else settings
    sets = image_sets(settings, data, device)
    sets = dataclasses.replace(sets, labelled={**sets.labelled, **extra.sets(settings, data)})
    found: Found = {}
    for method, seed in cells_of(settings, methods) if settings.resume else ():
        if (cell := finished_cell(settings, run, method, seed)) is not None:
            found[method, seed] = cell
    todo = [cell for cell in cells_of(settings, methods) if cell not in found]
    missing = []
    if isinstance(networks, Trained):
        missing = networks.check(todo)
    run.begin()
    train_networks(networks, missing)
    found |= run_cells(settings, run, networks, data, sets, todo)
    cells = {method: [found[method, seed] for seed in seeds_of(settings)] for method in methods}
    return f"{experiment(settings, run, data, sets, given, cells, extra)}\nwritten to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: compare(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
