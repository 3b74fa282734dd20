"""Few labels and many images without: the Pi-model and the Mean Teacher, each with SWA, fast-SWA and SWAG.

A network learns from few labelled images, equally many of each class, and from all other training images, whose labels
are never read: there it has to say the same of two random views of an image. The other view is seen by the network
itself (Pi-model) or by an exponential average of its weights (Mean Teacher). The learning rate falls along a cosine for
--epochs epochs and then goes through cycles; SWA averages the weights at the ends of cycles, fast-SWA every
--fastswa_frequencies epochs, and SWAG draws networks from around that average. The same network trained on the labelled
images alone, for as many steps, shows what the other images are worth.

Each seed has its own labelled images, initial weights and order of the data. Nothing is chosen on the images that are
measured on: they are held out of the training images, or the test images with --use_test.

Examples:
  python -m experiments.semi_supervised --dataset MNIST --data_path DATA_DIR --n_labels 100 --train_limit 20000
      --use_test --dir runs/semi-mnist
  python -m experiments.semi_supervised --dataset CIFAR10 --data_path DATA_DIR --n_labels 4000 --model PreResNet20
      --epochs 30 --cycle_interval 5 --num_cycles 6 --lr 0.1 --use_test --dir runs/semi-cifar10
The published run on CIFAR-10 has 180 epochs, then 34 cycles of 30, fast-SWA every 3, lr 0.1.

Writes to --dir: cells/seed-SEED.json (a killed run goes on from there, and from checkpoints/), methods.png, curves.png,
table.txt, log.jsonl, results.json (last), settings.json, environment.json, command.sh

Source: Athiwaratkun, Finzi, Izmailov and Wilson, "There Are Many Consistent Explanations of Unlabeled Data: Why You
Should Average" (ICLR 2019).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experiments import learning_curves, seed_study
from experiments.common import RunDir, SettingsError, parse_settings, resolve_device, run_script, setting
from experiments.consistency_settings import Recipe, check_recipe
from experiments.consistency_training import (
    MAJORITY,
    MEASURES,
    Kind,
    Problem,
    discard_checkpoints,
    make_network,
    train_all,
)
from experiments.datasets import Datasets, Split, load_dataset
from experiments.train_setup import AUGMENTATION, try_model
from experiments.training_data import AsTrained
from experiments.two_streams import Stream, TwoStreams, choose_labelled, in_memory

PROG = "python -m experiments.semi_supervised"
OUTPUTS = (*seed_study.OUTPUTS, "curves.png", "checkpoints/*")
KINDS = {"labels alone": Kind(labels_alone=True), "Pi": Kind(), "Mean Teacher": Kind(mean_teacher=True)}


@dataclass(frozen=True)
class Settings(Recipe):
    """Everything that decides what is trained and measured."""

    dataset: str = setting("MNIST", "data set, such as MNIST, CIFAR10, digits")
    n_labels: int = setting(100, "images with labels, a multiple of the number of classes")


def check(settings: Settings) -> Settings:
    """Refuse what cannot run."""
    if settings.n_labels < 1:
        raise SettingsError(f"--n_labels must be at least 1; got {settings.n_labels}")
    return check_recipe(settings)


def make_problem(settings: Settings, data: Datasets, seed: int) -> Problem:
    """Choose the labelled images of a seed; return what is trained on."""
    pool = in_memory(data.train, f"--dataset {data.name}")
    held_out = data.test if data.validation is None else data.validation
    assert held_out is not None
    chosen, others = choose_labelled(pool.targets, settings.n_labels, data.num_classes, seed)
    views = (*AUGMENTATION.get(data.name, (0, False)), data.black)
    size = settings.batch_size - settings.labeled_batch_size
    if len(others) < size:
        raise SettingsError(f"--n_labels {settings.n_labels} leaves {len(others)} images without labels; need {size}")
    labelled, unlabelled = (
        Stream(Split(pool.inputs[index], pool.targets[index]), count, *views)
        for index, count in ((chosen, settings.labeled_batch_size), (others, size))
    )

    def streams(generator: torch.Generator, labels_alone: bool) -> TwoStreams:
        return TwoStreams(labelled, unlabelled, generator, labels_alone)

    measured = in_memory(held_out, f"--dataset {data.name}")
    return Problem(
        streams,
        len(streams(torch.Generator(), False)),
        labelled.images.targets,
        data.num_classes,
        measured if settings.eval_limit is None else measured.first(settings.eval_limit),
        AsTrained(pool.first(settings.bn_size), *views),
    )


def work(settings: Settings) -> str:
    """Check everything, then train and measure the seeds that are left; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    data = load_dataset(
        settings.dataset,
        settings.data_path,
        use_test=settings.use_test,
        train_limit=settings.train_limit,
        device=device,
    )
    problem = make_problem(settings, data, settings.first_seed)
    try_model(make_network(settings, problem, settings.first_seed), data)
    run.begin()

    def one_seed(seed: int) -> dict[str, Any]:
        return train_all(settings, make_problem(settings, data, seed), KINDS, seed, run)

    cells = seed_study.run_seeds(settings, run, one_seed)
    discard_checkpoints(run)
    where = "test images" if settings.use_test else "images held out of the training images"
    title = f"{settings.model} on {data.name}, {settings.n_labels} of {len(data.train)} training images with labels"
    learning_curves.draw_curves(run.path / "curves.png", cells, settings.epochs, title)
    return seed_study.finish(
        settings,
        run,
        cells,
        MEASURES,
        baseline=MAJORITY,
        title=title,
        notes=[f"Measured on {len(problem.held_out)} {where}.", "EMA is the teacher of the Mean Teacher."],
        data=data.facts,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
