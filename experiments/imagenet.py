"""SWA and SWAG for networks of ImageNet's size: a folder of images, and deviations where there is room for them.

Majority   the frequencies of the classes among the training images: what learns nothing of images
SGD        the last iterate
SWA        the mean of the iterates collected --swa_freq times an epoch after --swa_start
SWAG-Diag  a Gaussian around that mean with the iterates' variances (scale 1, rank 0)
SWAG       the same with --max_num_models deviations in its covariance (--scale)

Images are read while the network trains: random crops of --image_size pixels, mirrored one in two; the middle of every
image when it is tested. --weights starts from trained weights. The deviations are the memory: (rank + 3) times that of
the weights, in float32 beside the network, or in the host's memory (--swa_cpu), or in fewer bits (--deviation_dtype).
What they need is predicted before anything is allocated, and measured: memory.png, and a table. Batch norm is
recalibrated for every set of weights on random crops of the training images (--bn_fraction of them), one pass for all.
No prediction is kept: a batch is measured, and forgotten. Nothing is chosen on the test images.

Examples:
  python -m experiments.imagenet --dir runs/generated --model resnet50 --image_size 64 --batch_size 32 --epochs 20
      --lr_init 0.01 --swa_start 14 --swa_lr 0.005 --num_samples 10 --generated 10x40 --use_test --seeds 3
  python -m experiments.imagenet --dir runs/imagenet --data_path IMAGENET_DIR --model resnet50 --weights resnet50.pth
      --use_test --epochs 10 --swa_lr 0.001 --lr_init 0.001 --bn_fraction 0.1 --swa_cpu --amp bfloat16

Writes to --dir: cells/seed-SEED.json (one for each network, so that a killed run goes on from there),
checkpoint-SEED.safetensors (of a network that is not finished), images/ (without --data_path), memory.png,
training.png (of the first network), methods.png, table.txt, log.jsonl, results.json (last), settings.json,
environment.json, command.sh
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments import imagenet_memory, plots, seed_study
from experiments.common import RunDir, SettingsError, fixed, parse_settings, resolve_device, run_script
from experiments.datasets import Datasets, load_dataset
from experiments.datasets.image_folder import StreamedSplit
from experiments.imagenet_data import load_weights_, write_tree
from experiments.imagenet_memory import MemoryRow
from experiments.imagenet_settings import AMP, DTYPES, Settings, check
from experiments.models import torchvision_model
from experiments.seed_study import Measure
from lowrank_bdl.prediction.dense_metrics import DenseMetrics
from lowrank_bdl.prediction.predict import predict_batches
from lowrank_bdl.prediction.predictive import Predictive
from lowrank_bdl.training import losses, schedules
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.trainer import Record, Trainer

PROG = "python -m experiments.imagenet"
CHECKPOINT = "checkpoint-{}.safetensors"
OUTPUTS = (*seed_study.OUTPUTS, CHECKPOINT.format("*"), "memory.png", "training.png")
BASELINE = "Majority"
MEASURES = (
    Measure("accuracy", "accuracy [%]"),
    Measure("top5", "top 5 [%]"),
    Measure("nll", "NLL [nats]", 3, less_is_better=True),
    Measure("ece", "ECE [%]", less_is_better=True),
)


@dataclass(frozen=True)
class Study:
    """What every seed shares."""

    settings: Settings
    run: RunDir
    data: Datasets
    train: StreamedSplit
    held_out: StreamedSplit
    device: torch.device

    @property
    def place(self) -> torch.device:
        """Where the weights are collected."""
        return torch.device("cpu") if self.settings.swa_cpu else self.device

    @property
    def held_out_name(self) -> str:
        return "test" if self.settings.use_test else "validation"


def make_network(settings: Settings, num_classes: int) -> nn.Module:
    """Make the network, with the weights that it starts from."""
    try:
        model = torchvision_model(settings.model, num_classes, channels=3, image_size=settings.image_size)
    except ValueError as error:
        raise SettingsError(f"--model {settings.model}: {error}") from None
    if settings.weights is not None:
        load_weights_(model, settings.weights)
    return model


def make_trainer(study: Study, seed: int) -> tuple[Trainer, list[MemoryRow]]:
    """Make the network, and its collector; also return what memory that needs."""
    settings = study.settings
    torch.manual_seed(seed)
    model = make_network(settings, study.data.num_classes)
    layout = torch.channels_last if settings.channels_last else None
    model = model.to(study.device) if layout is None else model.to(study.device, memory_format=layout)
    stored = DTYPES[settings.deviation_dtype]
    rows = imagenet_memory.measure_memory(model, settings.max_num_models, stored, study.place)
    swag = lb.SWAG(model, rank=settings.max_num_models, deviation_dtype=stored, device=study.place)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr_init, momentum=settings.momentum, weight_decay=settings.wd
    )
    schedule = schedules.StepDecayLR(optimizer, swa_start=settings.swa_start, swa_lr=settings.swa_lr)
    trainer = Trainer(
        model,
        optimizer,
        schedule=schedule,
        collections={"swag": Collection(swag, settings.swa_start, per_epoch=settings.swa_freq)},
        metrics={"accuracy": losses.accuracy},
        seed=seed,
        autocast=AMP[settings.amp],
        memory_format=layout,
    )
    return trainer, rows


def train(study: Study, trainer: Trainer, seed: int) -> None:
    """Train to the last epoch, from the last checkpoint on if there is one."""
    settings = study.settings
    path = study.run.path / CHECKPOINT.format(seed)
    if settings.resume and path.exists():
        trainer.load(path, fixed(settings))

    def batches(generator: torch.Generator) -> Iterable[Any]:
        drawn = int(torch.randint(2**40, (), generator=generator))
        return study.train.random_crops(settings.batch_size, drawn)

    def after_epoch(trainer: Trainer, record: Record) -> dict[str, Any]:
        theta = lb.ParameterLayout.from_module(trainer.model).flatten(trainer.model)
        found = predict_batches(trainer.model, theta, study.held_out.batches(settings.eval_batch_size), progress=False)
        numbers = measure(study, found)
        held_out = {"nll": numbers["nll"], "accuracy": numbers["accuracy"] / 100}
        study.run.log(seed=seed, **record, held_out=held_out)
        return {"held_out": held_out}

    trainer.fit(
        batches,
        settings.epochs,
        after_epoch=after_epoch,
        checkpoint=path,
        save_every=settings.checkpoint_freq,
        settings=fixed(settings),
        description=f"{settings.model}, seed {seed}",
    )


def measure(study: Study, found: Iterator[Predictive]) -> dict[str, float]:
    """Measure predictions batch by batch; nothing is kept of them."""
    metrics = DenseMetrics(study.data.num_classes)
    hits = 0
    for part in found:
        assert part.targets is not None
        metrics.update(part.mean, part.targets, part.log_likelihood)
        best = part.mean.topk(min(5, study.data.num_classes)).indices
        hits += int((best == part.targets.unsqueeze(-1)).sum())
    return {
        "accuracy": 100 * metrics.accuracy,
        "top5": 100 * hits / metrics.num_positions,
        "nll": metrics.nll,
        "ece": 100 * metrics.ece,
        "brier": metrics.brier,
    }


def majority(study: Study) -> Iterator[Predictive]:
    """The same probabilities for every image: the classes' shares of the training images."""
    counts = study.train.targets.bincount(minlength=study.data.num_classes) + 1.0  # none is impossible
    share = counts / counts.sum()
    for targets in study.held_out.targets.split(study.settings.eval_batch_size):
        likelihood: Tensor = share.log()[targets].unsqueeze(0)
        yield Predictive(share.expand(len(targets), -1), None, None, None, None, None, likelihood, targets, None, 1)


def one_seed(study: Study, seed: int) -> dict[str, Any]:
    """Train a network, and measure everything that its iterates give."""
    settings = study.settings
    drop_checkpoints(study, before=seed)
    trainer, rows = make_trainer(study, seed)
    train(study, trainer, seed)
    swag = trainer.collections["swag"].collector
    assert isinstance(swag, lb.SWAG)
    weights: dict[str, Any] = {
        "SGD": swag.layout.flatten(trainer.model),
        "SWA": swag.mean.to(study.device),
        "SWAG-Diag": swag.posterior(scale=1.0, rank=0),
        "SWAG": swag.posterior(scale=settings.scale),
    }
    numbers = {BASELINE: measure(study, majority(study))}
    for method, own in weights.items():
        found = predict_batches(
            trainer.model,
            own,
            study.held_out.batches(settings.eval_batch_size),
            num_samples=settings.num_samples,
            bn_loader=study.train.random_crops(settings.batch_size, seed=0),
            bn_fraction=settings.bn_fraction,
            generator=torch.Generator().manual_seed(seed),
        )
        numbers[method] = measure(study, found)
        study.run.log(seed=seed, method=method, **numbers[method])
    if seed == settings.first_seed:
        plots.training_curves(
            study.run.path / "training.png",
            {settings.model: ("SGD", trainer.history)},
            settings.swa_start,
            study.held_out_name,
        )
    return {
        "methods": numbers,
        "memory": [dataclasses.asdict(row) for row in rows],
        "parameters": swag.layout.numel,
        "snapshots": swag.n_averaged,
        "history": trainer.history,
    }


def drop_checkpoints(study: Study, before: int) -> None:
    """Remove the checkpoints of finished seeds: each is (rank + 5) times the weights."""
    for seed in range(study.settings.first_seed, before):
        (study.run.path / CHECKPOINT.format(seed)).unlink(missing_ok=True)


def load_data(settings: Settings, root: str, device: torch.device) -> Datasets:
    return load_dataset(
        "ImageFolder",
        root,
        use_test=settings.use_test,
        image_size=settings.image_size,
        num_workers=settings.num_workers,
        device=device,
    )


def work(settings: Settings) -> str:
    """Check everything, then train and measure what is left; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    classes, images = settings.generated_sizes
    if settings.data_path is not None:
        data = load_data(settings, settings.data_path, device)
        classes = data.num_classes
    make_network(settings, classes)  # refuses what does not fit before anything is written
    run.begin()
    if settings.data_path is None:
        size = round(settings.image_size * 256 / 224)  # more than what is seen of them, as of photographs
        write_tree(run.path / "images", classes, images, size)
        data = load_data(settings, str(run.path / "images"), device)
    held_out = data.test if settings.use_test else data.validation
    assert isinstance(data.train, StreamedSplit) and isinstance(held_out, StreamedSplit)
    study = Study(settings, run, data, data.train, held_out, device)
    cells = seed_study.run_seeds(settings, run, partial(one_seed, study))
    drop_checkpoints(study, before=settings.first_seed + settings.seeds)
    rows = [MemoryRow(**row) for row in cells[0]["memory"]]
    where = "the host" if settings.swa_cpu else str(device)
    title = f"{settings.model}, {cells[0]['parameters']:,} weights, rank {settings.max_num_models}"
    imagenet_memory.draw(run.path / "memory.png", rows, f"{title}, deviations in {settings.deviation_dtype} on {where}")
    what = "generated images" if settings.data_path is None else "images of --data_path"
    return seed_study.finish(
        settings,
        run,
        cells,
        MEASURES,
        baseline=BASELINE,
        title=f"{settings.model} on {what}",
        notes=[
            f"{len(data.train):,} training and {len(held_out):,} {study.held_out_name} images of {data.num_classes} "
            f"classes, {settings.image_size} pixels; {cells[0]['parameters']:,} weights.\n\n"
            f"{imagenet_memory.table(rows)}"
        ],
        data=data.facts,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
