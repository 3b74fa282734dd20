"""Networks trained with a consistency loss, their averages, and how well each predicts."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.common import RunDir, SettingsError, fixed
from experiments.consistency_settings import Recipe
from experiments.datasets import Split
from experiments.evaluation import Predictions, has_batch_norm, metrics_of, predict_splits
from experiments.models import build_model
from experiments.seed_study import Measure
from experiments.training_data import AsTrained
from experiments.two_streams import TwoStreams
from lowrank_bdl.training import averages
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.consistency import ConsistencyLoss, labelled_accuracy, sigmoid_rampup
from lowrank_bdl.training.schedules import CosineLR
from lowrank_bdl.training.trainer import Record, Trainer

MAJORITY = "majority class"
MEASURES = (
    Measure("accuracy", "accuracy [%]"),
    Measure("nll", "NLL [nats]", 3, less_is_better=True),
    Measure("ece", "ECE [%]", less_is_better=True),
)


@dataclass(frozen=True)
class Kind:
    """A way to train.

    Attributes:
        labels_alone: Without the images that have no labels: what they are compared with.
        mean_teacher: The other view is seen by the exponential average of the weights; otherwise by the network.
    """

    labels_alone: bool = False
    mean_teacher: bool = False


@dataclass(frozen=True)
class Problem:
    """Data of one seed.

    Attributes:
        streams: Gives an epoch's batches from its generator; True leaves out the images without labels.
        steps: Batches in an epoch.
        labels: Of all labelled images.
        num_classes: Number of classes.
        held_out: What is measured on.
        bn_images: What batch norm is recalibrated on, as trained on.
        loss_options: More of `ConsistencyLoss`.
    """

    streams: Callable[[torch.Generator, bool], TwoStreams]
    steps: int
    labels: Tensor
    num_classes: int
    held_out: Split
    bn_images: AsTrained
    loss_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def make_network(recipe: Recipe, problem: Problem, seed: int) -> nn.Module:
    """Make the network, with initial weights that depend on the seed alone."""
    torch.manual_seed(seed)
    channels, size, _ = problem.held_out.shape
    model = build_model(recipe.model, problem.num_classes, channels=channels, image_size=size)
    return model.to(problem.held_out.inputs.device)


def make_trainer(recipe: Recipe, problem: Problem, kind: Kind, seed: int) -> Trainer:
    """Make everything that trains one network and collects its averages."""
    model = make_network(recipe, problem, seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
    )
    schedule = CosineLR(
        optimizer,
        horizon=(recipe.epochs + recipe.cycle_interval) * problem.steps,
        repeat_from=recipe.epochs * problem.steps,
    )
    teacher = averages.ema(model, recipe.ema_decay, warmup=True).train()  # dropout and batch statistics as the network

    def weight() -> float:
        if kind.labels_alone:
            return 0.0
        return recipe.consistency * sigmoid_rampup(schedule.last_epoch / problem.steps, recipe.consistency_rampup)

    try:
        fast = lb.SWAG(model, rank=recipe.max_num_models)
    except lb.MemoryLimitError as error:
        raise SettingsError(f"--max_num_models {recipe.max_num_models}: {error}") from None
    start = recipe.collected_from
    return Trainer(
        model,
        optimizer,
        ConsistencyLoss(
            weight, teacher if kind.mean_teacher else None, recipe.consistency_type, **problem.loss_options
        ),
        schedule=schedule,
        step_every="batch",
        collections={
            "EMA": Collection(teacher, per_epoch=None),
            "SWA": Collection(averages.swa(model), start, every=recipe.cycle_interval),
            "fast-SWA": Collection(fast, start, every=recipe.fastswa_frequencies),
        },
        metrics={"accuracy": labelled_accuracy},
        seed=seed,
    )


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return the weight vectors (D,) at hand: the last iterate, and the averages that have seen weights."""
    layout = lb.ParameterLayout.from_module(trainer.model)
    found = {"SGD": layout.flatten(trainer.model)}
    for name, collection in trainer.collections.items():
        collector: Any = collection.collector
        if int(collector.n_averaged) > 0:
            found[name] = collector.mean if isinstance(collector, lb.SWAG) else averages.weights(collector, layout)
    return found


def discard_checkpoints(run: RunDir, *, but_of: int | None = None) -> None:
    """Remove the checkpoints of all seeds that are done."""
    for file in (run.path / "checkpoints").glob("*"):
        if but_of is None or not file.name.startswith(f"{but_of}-"):
            file.unlink()


def train(recipe: Recipe, problem: Problem, kind: Kind, seed: int, run: RunDir, name: str) -> Trainer:
    """Train to the last epoch, from the checkpoint if there is one; accuracies on the way are in the history."""
    trainer = make_trainer(recipe, problem, kind, seed)
    checkpoint = run.path / "checkpoints" / f"{seed}-{name.replace(' ', '-')}.safetensors"
    checkpoint.parent.mkdir(exist_ok=True)
    facts = {**fixed(recipe), "kind": name}
    if checkpoint.exists():
        try:
            trainer.load(checkpoint, facts)
        except (lb.CheckpointError, OSError) as error:
            raise SettingsError(f"--resume: {' '.join(str(error).split())}") from None

    def after_epoch(trainer: Trainer, record: Record) -> dict[str, Any]:
        if trainer.epoch % recipe.eval_freq and trainer.epoch != recipe.all_epochs:
            return {}
        return {"held_out": {name: accuracy(trainer, problem, theta) for name, theta in weights_of(trainer).items()}}

    trainer.fit(
        lambda generator: problem.streams(generator, kind.labels_alone),
        recipe.all_epochs,
        after_epoch=after_epoch,
        checkpoint=checkpoint,
        save_every=recipe.eval_freq,
        settings=facts,
        description=f"seed {seed}, {name}",
    )
    return trainer


def accuracy(trainer: Trainer, problem: Problem, theta: Tensor) -> float:
    """Accuracy [%] of one weight vector on the held-out images."""
    normed = has_batch_norm(trainer.model)
    prediction = lb.predict(
        trainer.model,
        theta,
        problem.held_out.batches(500),
        bn_loader=problem.bn_images.batches(500) if normed else None,
        progress=False,
    )
    return 100 * prediction.accuracy


def measure(
    recipe: Recipe, problem: Problem, model: nn.Module, sources: Mapping[str, Any], seed: int
) -> dict[str, dict[str, float]]:
    """Measure weight vectors and posteriors on the held-out images, by their names."""
    found = {}
    for name, weights in sources.items():
        predictions = predict_splits(
            model,
            weights,
            {"held out": problem.held_out},
            problem.bn_images,
            num_samples=recipe.num_samples,
            seed=seed,
            progress=False,
        )
        found[name] = in_percent(metrics_of(predictions["held out"], seed=seed))
    return found


def train_all(
    recipe: Recipe,
    problem: Problem,
    kinds: Mapping[str, Kind],
    seed: int,
    run: RunDir,
    also: Callable[[str, Trainer], Mapping[str, Any]] = lambda name, trainer: {},
) -> dict[str, Any]:
    """Train one network of each kind; measure it and its averages, and SWAG around the mean of fast-SWA.

    Args:
        recipe: How.
        problem: On what.
        kinds: The ways to train, by name.
        seed: Of everything that is random.
        run: Where checkpoints go; those of other seeds are removed.
        also: More rows that a kind's trainer gives.

    Returns:
        A seed's cell: ``methods``, by ``"kind: weights"``, and ``curves``, accuracies while training.
    """
    discard_checkpoints(run, but_of=seed)
    methods = {MAJORITY: majority_class(problem)}
    found = {}
    for name, kind in kinds.items():
        trainer = train(recipe, problem, kind, seed, run, name)
        fast = trainer.collections["fast-SWA"].collector
        assert isinstance(fast, lb.SWAG)
        sources = {**weights_of(trainer), "SWAG": fast.posterior()}
        measured = {**also(name, trainer), **measure(recipe, problem, trainer.model, sources, seed)}
        methods |= {f"{name}: {weights}": metrics for weights, metrics in measured.items()}
        found[name] = curves(trainer)
    return {"methods": methods, "curves": found}


def majority_class(problem: Problem) -> dict[str, float]:
    """Measure what says the labels' own frequencies of every image, whatever is on it."""
    frequencies = problem.labels.bincount(minlength=problem.num_classes).double() / len(problem.labels)
    targets = problem.held_out.targets
    probabilities = frequencies.expand(len(targets), -1)
    entropy = torch.special.entr(probabilities).sum(-1)
    return in_percent(metrics_of(Predictions(probabilities, entropy, targets, frequencies.log()[targets])))


def in_percent(metrics: Mapping[str, float]) -> dict[str, float]:
    """Keep what the table shows."""
    return {"accuracy": 100 * metrics["accuracy"], "nll": metrics["nll"], "ece": 100 * metrics["ece"]}


def curves(trainer: Trainer) -> dict[str, list[list[float]]]:
    """Return [epoch, accuracy in percent] on the held-out images while training, by name of the weights."""
    found: dict[str, list[list[float]]] = {}
    for record in trainer.history:
        for name, value in record.get("held_out", {}).items():
            found.setdefault(name, []).append([record["epoch"], value])
    return found
