"""From one set of images to another whose labels are not known: a Mean Teacher, with SWA, fast-SWA and SWAG.

A network learns from labelled images of --source, and from images of --target without labels: there it has to say the
same as an exponential average of its weights that sees another random view (Mean Teacher), or as itself (Pi-model),
where that is sure enough (--confidence). The two sets pass the network one after the other, so that batch norm never
mixes them; batch norm is recalibrated on the target's training images before the target's test images are predicted.
A network trained on the source alone shows what the target's images are worth: it is measured with the batch norm of
the source, as it would be used without them, and recalibrated.

Both sets are resized to --image_size and normalised each by its own mean and standard deviation; they must have the
same classes (or a known map between them), and one epoch is a pass over the target's training images. The labels of the
target are read for measuring alone, and nothing is chosen by them: defaults are those of the cited papers where they
state one.

Examples:
  python -m experiments.domain_adaptation --source MNIST --target digits --data_path DATA_DIR --use_test
      --dir runs/mnist-to-digits

Writes to --dir: cells/seed-SEED.json (a killed run goes on from there, and from checkpoints/), methods.png, curves.png,
table.txt, log.jsonl, results.json (last), settings.json, environment.json, command.sh

Source: French, Mackiewicz and Fisher, "Self-ensembling for visual domain adaptation" (ICLR 2018); with fast-SWA:
Athiwaratkun et al., "There Are Many Consistent Explanations of Unlabeled Data" (ICLR 2019), section 5.4.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import lowrank_bdl as lb
from experiments import learning_curves, seed_study
from experiments.common import (
    RunDir,
    SettingsError,
    parse_settings,
    require_at_least,
    resolve_device,
    run_script,
    setting,
)
from experiments.consistency_settings import Recipe, check_recipe
from experiments.consistency_training import (
    MAJORITY,
    MEASURES,
    Kind,
    Problem,
    discard_checkpoints,
    make_network,
    measure,
    train_all,
)
from experiments.datasets import Datasets, Split, label_map, load_dataset
from experiments.evaluation import has_batch_norm
from experiments.train_setup import AUGMENTATION, try_model
from experiments.training_data import AsTrained
from experiments.two_streams import Stream, TwoStreams, in_memory
from lowrank_bdl.training.trainer import Trainer

PROG = "python -m experiments.domain_adaptation"
OUTPUTS = (*seed_study.OUTPUTS, "curves.png", "checkpoints/*")
ALONE = "source alone"
KINDS = {ALONE: Kind(labels_alone=True), "Pi": Kind(), "Mean Teacher": Kind(mean_teacher=True)}


@dataclass(frozen=True)
class Settings(Recipe):
    """Everything that decides what is trained and measured."""

    model: str = setting("SmallConvNet", "network, such as SmallConvNet, LeNet5, PreResNet20")
    epochs: int = setting(100, "epochs before the cycles; one is a pass over the target's training images")
    num_cycles: int = setting(5, "cycles of the learning rate after them")
    cycle_interval: int = setting(20, "epochs of a cycle, whose rates are the last ones before the cycles again")
    fastswa_frequencies: int = setting(3, "epochs between two collections of fast-SWA; SWA collects once a cycle")
    consistency: float = setting(10.0, "weight of the consistency loss")
    consistency_rampup: float = setting(0.0, "epochs in which that weight rises")
    ema_decay: float = setting(0.99, "decay a step of the average that is the Mean Teacher")
    eval_freq: int = setting(20, "epochs between two measurements while training")
    train_limit: int | None = setting(None, "use so many labelled images of the source only", kind=int)
    source: str = setting("MNIST", "data set with labels, such as MNIST, CIFAR10")
    target: str = setting("digits", "data set without labels, such as digits, STL10")
    image_size: int = setting(16, "height and width that the images of both are resized to [pixels]")
    max_shift: int = setting(1, "largest random shift of a training image [pixels]")
    confidence: float = setting(0.968, "what the teacher is less sure of is not learnt")


@dataclass(frozen=True)
class Pair:
    """The two sets; those images of the target that are measured on have the source's classes."""

    source: Datasets
    target: Datasets
    held_out: Split


def check(settings: Settings) -> Settings:
    """Refuse what cannot run."""
    if settings.source == settings.target:
        raise SettingsError(f"--source and --target must be two data sets; got {settings.source} for both")
    require_at_least(settings, dict(image_size=1, max_shift=0))
    if not 0 <= settings.confidence < 1:
        raise SettingsError(f"--confidence must be in [0, 1); got {settings.confidence}")
    return check_recipe(settings)


def load_pair(settings: Settings, device: torch.device) -> Pair:
    """Load both sets and see that one network can be for both.

    Raises:
        SettingsError: If a set cannot be loaded, or they do not fit each other.
    """
    common: dict[str, Any] = dict(use_test=settings.use_test, image_size=settings.image_size, device=device)
    source = load_dataset(settings.source, settings.data_path, train_limit=settings.train_limit, **common)
    target = load_dataset(settings.target, settings.data_path, **common)
    if source.channels != target.channels:
        raise SettingsError(
            f"--source {source.name} has {source.channels} channels and --target {target.name} has {target.channels}"
        )
    images = target.test if target.validation is None else target.validation
    assert images is not None
    held_out = in_memory(images, f"--target {target.name}")
    if source.class_names != target.class_names:
        mapped = label_map(target.name, source.name).to(held_out.targets.device)
        held_out = Split(held_out.inputs, mapped[held_out.targets])
    return Pair(source, target, held_out if settings.eval_limit is None else held_out.first(settings.eval_limit))


def make_problem(settings: Settings, pair: Pair) -> Problem:
    """Return what is trained on; the target's labels are not in it."""
    flip = all(AUGMENTATION.get(data.name, (0, False))[1] for data in (pair.source, pair.target))
    size = settings.batch_size - settings.labeled_batch_size
    pool = in_memory(pair.target.train, f"--target {pair.target.name}")
    if len(pool) < size:
        raise SettingsError(f"--target {pair.target.name} has {len(pool)} training images; a batch needs {size}")
    labelled = in_memory(pair.source.train, f"--source {pair.source.name}")

    def streams(generator: torch.Generator, labels_alone: bool) -> TwoStreams:
        return TwoStreams(
            Stream(labelled, settings.labeled_batch_size, settings.max_shift, flip, pair.source.black),
            Stream(pool, size, settings.max_shift, flip, pair.target.black),
            generator,
            labels_alone,
        )

    return Problem(
        streams,
        len(streams(torch.Generator(), False)),
        labelled.targets,
        pair.source.num_classes,
        pair.held_out,
        AsTrained(pool.first(settings.bn_size), settings.max_shift, flip, pair.target.black),
        dict(separate=True, confidence=settings.confidence),
    )


def without_adaptation(
    settings: Settings, pair: Pair, problem: Problem, trainer: Trainer, seed: int
) -> Mapping[str, Any]:
    """Measure the network as it is without any image of the target: batch norm as the source has it."""
    if not has_batch_norm(trainer.model):
        return {}
    known = AsTrained(
        pair.source.train.first(settings.bn_size), settings.max_shift, problem.bn_images.flip, pair.source.black
    )
    theta = lb.ParameterLayout.from_module(trainer.model).flatten(trainer.model)
    as_it_is = dataclasses.replace(problem, bn_images=known)
    return measure(settings, as_it_is, trainer.model, {"SGD, its batch norm": theta}, seed)


def work(settings: Settings) -> str:
    """Check everything, then train and measure the seeds that are left; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    pair = load_pair(settings, device)
    problem = make_problem(settings, pair)
    try_model(make_network(settings, problem, settings.first_seed), pair.source)
    run.begin()

    def one_seed(seed: int) -> dict[str, Any]:
        def also(name: str, trainer: Trainer) -> Mapping[str, Any]:
            return without_adaptation(settings, pair, problem, trainer, seed) if name == ALONE else {}

        return train_all(settings, problem, KINDS, seed, run, also)

    cells = seed_study.run_seeds(settings, run, one_seed)
    discard_checkpoints(run)
    source, target = pair.source.name, pair.target.name
    where = "test images" if settings.use_test else "held-out training images"
    title = f"{settings.model} from {source} to {target}"
    learning_curves.draw_curves(run.path / "curves.png", cells, settings.epochs, title)
    notes = [
        f"{len(pair.source.train)} labelled images of {source}, {len(pair.target.train)} without labels of {target}.",
        f"Measured on {len(problem.held_out)} {where} of {target}, batch norm recalibrated on its training images",
        "except where it says otherwise. EMA is the teacher of the Mean Teacher.",
    ]
    return seed_study.finish(
        settings,
        run,
        cells,
        MEASURES,
        baseline=MAJORITY,
        title=title,
        notes=notes,
        data={"source": pair.source.facts, "target": pair.target.facts},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
