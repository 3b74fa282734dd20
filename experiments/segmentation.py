"""Segment street scenes: a fully convolutional DenseNet on CamVid; SGD, dropout, SWA and SWAG, pixel by pixel.

Majority   the frequencies of the classes among the training pixels, for every pixel: what learns nothing of images
SGD        the last iterate, by the name of --optimizer
Dropout    the same, with the dropout layers random: the average over --num_samples masks
SWA        the mean of the iterates collected every --swa_c_epochs epochs after --swa_start
SWAG-Diag  a Gaussian around that mean with the iterates' variances (scale 1, rank 0)
SWAG       the same with --max_num_models deviations in its covariance (--scale)

Training is on random crops, mirrored one in two, and from --ft_start on on whole scenes. Batch norm is recalibrated for
every set of weights, on training scenes as they were last trained on. Pixels without a label count nowhere. Everything
is measured batch by batch: no prediction is kept. --loss aleatoric learns the noise of every logit as well (Kendall and
Gal, 2017). The report is on the validation scenes, or with --use_test on the test scenes; nothing is chosen on either.

The calibration error is that of pixels: it compares with other such numbers, not with those of the released notebook,
which mixed classes and pixels up. Patches of --patch_size pixels are accurate if most of their pixels are right, and
certain if their mean entropy is below a threshold; PAvPU is the share of patches that are accurate and certain or
neither, averaged over the thresholds.

Examples:
  python -m experiments.segmentation --dir runs/camvid --data_path DATA_DIR/camvid --model FCDenseNet57 --use_test
      --crop 112 --batch_size 4 --epochs 36 --ft_start 30 --ft_batch_size 2 --swa_start 26 --collects_per_epoch 2
      --optimizer Adam --lr_init 1e-3 --swa_lr 5e-4 --num_samples 10 --bn_size 60 --amp bfloat16 --channels_last
  python -m experiments.segmentation --dir runs/camvid-full --data_path CAMVID_DIR --model FCDenseNet67 --use_test

Writes to --dir: cells/seed-SEED.json (one for each network, so that a killed run goes on from there),
checkpoint-SEED.safetensors, maps.png, training.png (both of the first network), calibration.png, classes.png,
methods.png, table.txt, log.jsonl, results.json (last), settings.json, environment.json, command.sh
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments import plots, seed_study, segmentation_plots
from experiments.common import RunDir, SettingsError, fixed, parse_settings, resolve_device, run_script
from experiments.models import build_model
from experiments.seed_study import Measure
from experiments.segmentation_data import (
    CLASS_NAMES,
    VOID,
    Scenes,
    class_counts,
    facts,
    median_frequency_weights,
    read_scenes,
    spread,
)
from experiments.segmentation_plots import Map
from experiments.segmentation_settings import Settings, check
from lowrank_bdl.parameters.noisy_logits import NoisyLogitsLikelihood
from lowrank_bdl.prediction.dense_metrics import DenseMetrics
from lowrank_bdl.prediction.patch_uncertainty import PatchUncertainty
from lowrank_bdl.prediction.predict import predict_batches
from lowrank_bdl.prediction.predictive import Predictive
from lowrank_bdl.training import schedules
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.dense_losses import AleatoricCrossEntropy, DenseCrossEntropy, labelled_accuracy
from lowrank_bdl.training.losses import Loss
from lowrank_bdl.training.trainer import Record, Trainer

PROG = "python -m experiments.segmentation"
OUTPUTS = (
    *seed_study.OUTPUTS,
    "checkpoint-*.safetensors",
    "maps.png",
    "training.png",
    "calibration.png",
    "classes.png",
)
BASELINE = "Majority"
MEASURES = (
    Measure("accuracy", "accuracy [%]"),
    Measure("mean_iou", "mean IoU [%]"),
    Measure("nll", "NLL [nats a pixel]", 3, less_is_better=True),
    Measure("ece", "ECE [%]", less_is_better=True),
    Measure("pavpu", "PAvPU [%]"),
)
See = Callable[[int, Predictive], None]


@dataclass(frozen=True)
class Study:
    """What every seed shares."""

    settings: Settings
    run: RunDir
    train: Scenes
    held_out: Scenes
    counts: Tensor
    device: torch.device

    @property
    def crop(self) -> int | None:
        """Side of the crops that the last epochs are trained on; None for whole scenes."""
        return self.settings.crop if self.settings.ft_start >= self.settings.epochs else None

    def bn_batches(self) -> Any:
        """Training scenes as the weights last saw them."""
        size = self.settings.batch_size if self.crop else self.settings.ft_batch_size
        return self.train.spread(self.settings.bn_size).as_trained(size, self.crop, seed=0)


def make_network(settings: Settings, scenes: Scenes) -> nn.Module:
    return build_model(
        settings.model,
        len(CLASS_NAMES),
        channels=3,
        image_size=min(*scenes.shape[1:], settings.crop),
        task="segmentation",
        aleatoric=settings.loss == "aleatoric",
    )


def make_trainer(study: Study, seed: int) -> Trainer:
    settings = study.settings
    torch.manual_seed(seed)
    model = make_network(settings, study.train).to(study.device, memory_format=study.train.memory_format)
    weight = median_frequency_weights(study.counts).to(study.device) if settings.use_weights else None
    loss: Loss = DenseCrossEntropy(VOID, weight)
    if settings.loss == "aleatoric":
        loss = AleatoricCrossEntropy(settings.aleatoric_draws, VOID, weight)
    common: dict[str, Any] = dict(lr=settings.lr_init, weight_decay=settings.wd)
    if settings.optimizer == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), momentum=settings.momentum, **common)
    else:
        kinds: dict[str, Any] = {"RMSProp": torch.optim.RMSprop, "Adam": torch.optim.Adam}
        optimizer = kinds[settings.optimizer](model.parameters(), **common)
    swag = lb.SWAG(model, rank=settings.max_num_models)
    moments = settings.swa_start, settings.swa_c_epochs, settings.collects_per_epoch
    return Trainer(
        model,
        optimizer,
        loss,
        schedule=schedules.SWAGLR(optimizer, swa_lr=settings.swa_lr, horizon=settings.swa_start),
        collections={"swag": Collection(swag, *moments)},
        metrics={"accuracy": labelled_accuracy(VOID)},
        seed=seed,
        autocast=torch.bfloat16 if settings.amp == "bfloat16" else None,
    )


def train(study: Study, seed: int) -> Trainer:
    """Train a network, from its last checkpoint on if there is one."""
    settings, trainer = study.settings, make_trainer(study, seed)
    path = study.run.path / f"checkpoint-{seed}.safetensors"
    if settings.resume and path.exists():
        trainer.load(path, fixed(settings))

    def batches(generator: torch.Generator) -> Any:
        whole = trainer.epoch >= settings.ft_start
        drawn = int(torch.randint(2**62, (), generator=generator))
        size = settings.ft_batch_size if whole else settings.batch_size
        return study.train.as_trained(size, None if whole else settings.crop, drawn)

    def after_epoch(trainer: Trainer, record: Record) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if trainer.epoch % settings.eval_freq == 0 or trainer.epoch == settings.epochs:
            theta = lb.ParameterLayout.from_module(trainer.model).flatten(trainer.model)
            extra["held_out"] = measure(study, predictions(study, trainer.model, theta, bn=False))[0]
        study.run.log(seed=seed, **record, **extra)
        return extra

    trainer.fit(
        batches,
        settings.epochs,
        after_epoch=after_epoch,
        checkpoint=path,
        save_every=settings.checkpoint_freq,
        settings=fixed(settings),
        description=f"seed {seed}",
    )
    return trainer


def predictions(
    study: Study, model: nn.Module, weights: Any, *, bn: bool = True, dropout: bool = False, seed: int = 0
) -> Iterator[Predictive]:
    """Average over weights, or over dropout masks, batch by batch of the scenes that are reported on."""
    settings, device = study.settings, study.device
    likelihood: Any = "categorical"
    if settings.loss == "aleatoric":
        noise = torch.Generator(device).manual_seed(seed)
        likelihood = NoisyLogitsLikelihood(settings.aleatoric_draws, noise)
    return predict_batches(
        model,
        weights,
        study.held_out.batches(settings.eval_batch_size),
        num_samples=settings.num_samples,
        bn_loader=study.bn_batches() if bn else "stored",
        dropout=dropout,
        likelihood=likelihood,
        # a pixel without a label is given one, and left out of what is measured
        target_fn=lambda batch: batch[1].masked_fill(batch[1] == VOID, 0),
        generator=torch.Generator().manual_seed(seed),
    )


def majority(study: Study) -> Iterator[Predictive]:
    """The same probabilities for every pixel: the classes' shares of the labelled training pixels."""
    share = (study.counts.sum(0) + 1).double()  # a class that the training scenes do not have is not impossible
    share = (share / share.sum()).float()
    for labels in study.held_out.labels.split(study.settings.eval_batch_size):
        mean = share.expand(*labels.shape, -1)
        likelihood = share.log()[labels.long().masked_fill(labels == VOID, 0)]
        yield Predictive(mean, None, None, None, None, None, likelihood.unsqueeze(0), labels, None, 1)


def measure(
    study: Study, found: Iterator[Predictive], see: See = lambda start, part: None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure predictions batch by batch.

    Args:
        study: The study.
        found: The predictions, in the order of the scenes.
        see: Shown each of them, and the number of its first scene.

    Returns:
        The measures, and the curves behind them as lists.
    """
    settings, classes = study.settings, len(CLASS_NAMES)
    dense = DenseMetrics(classes, ignore_index=VOID, num_bins=20)
    patches = PatchUncertainty(classes, patch_size=settings.patch_size, ignore_index=VOID)
    start = 0
    for labels, part in zip(study.held_out.labels.split(settings.eval_batch_size), found, strict=True):
        targets = labels.to(part.mean.device, torch.int64)
        dense.update(part.mean, targets, part.log_likelihood)
        patches.update(part.mean, targets)
        see(start, part)
        start += len(labels)
    bins, curve = dense.reliability, patches.curve
    numbers = {
        "accuracy": 100 * dense.accuracy,
        "mean_iou": 100 * dense.mean_iou,
        "nll": dense.nll,
        "ece": 100 * dense.ece,
        "pavpu": 100 * curve.pavpu.mean().item(),
        "brier": dense.brier,
        "mean_class_accuracy": 100 * dense.mean_class_accuracy,
    }
    names = ("thresholds", "accurate_if_certain", "uncertain_if_inaccurate", "pavpu")
    return numbers, {
        "pixels": {name: getattr(bins, name).tolist() for name in ("confidence", "accuracy", "count")},
        "patches": {name: getattr(curve, name).tolist() for name in names},
        "iou": dense.iou.tolist(),
    }


def one_seed(study: Study, seed: int) -> dict[str, Any]:
    """Train a network, and measure everything that its iterates give."""
    settings = study.settings
    trainer = train(study, seed)
    model, swag = trainer.model, trainer.collections["swag"].collector
    assert isinstance(swag, lb.SWAG)
    last = swag.layout.flatten(model)
    weights: dict[str, Any] = {
        settings.optimizer: last,
        "Dropout": last,
        "SWA": swag.mean,
        "SWAG-Diag": swag.posterior(scale=1.0, rank=0),
        "SWAG": swag.posterior(scale=settings.scale),
    }
    shown = spread(len(study.held_out), settings.maps)
    maps: dict[str, list[Map]] = {settings.optimizer: [], "SWAG": []}
    numbers, curves = {}, {}
    numbers[BASELINE], curves[BASELINE] = measure(study, majority(study))
    for method, own in weights.items():
        found = predictions(study, model, own, dropout=method == "Dropout", seed=seed)
        see = partial(keep_maps, maps[method], shown) if method in maps else lambda start, part: None
        numbers[method], curves[method] = measure(study, found, see)
        study.run.log(seed=seed, method=method, **numbers[method])
    if seed == settings.first_seed:
        draw_first(study, trainer, shown, maps)
    return {
        "methods": numbers,
        "curves": curves,
        "parameters": swag.layout.numel,
        "snapshots": swag.n_averaged,
        "history": trainer.history,
    }


def keep_maps(maps: list[Map], shown: Sequence[int], start: int, part: Predictive) -> None:
    """Keep what a batch says about the scenes that are shown."""
    assert part.entropy is not None and part.mutual_information is not None
    for scene in shown:
        if start <= scene < start + len(part.mean):
            values = part.predicted_class, part.entropy, part.mutual_information
            maps.append(Map(*(value[scene - start].numpy(force=True) for value in values)))


def draw_first(study: Study, trainer: Trainer, shown: Sequence[int], maps: dict[str, list[Map]]) -> None:
    """Draw the training of the first network, and its maps."""
    settings = study.settings
    records = [
        record | ({"held_out": held | {"accuracy": held["accuracy"] / 100}} if (held := record.get("held_out")) else {})
        for record in trainer.history
    ]
    plots.training_curves(
        study.run.path / "training.png",
        {settings.optimizer: ("SGD", records)},
        settings.swa_start,
        "test" if settings.use_test else "validation",
        example="pixel",
    )
    segmentation_plots.uncertainty_maps(
        study.run.path / "maps.png",
        study.held_out.images[shown].permute(0, 2, 3, 1).numpy(),
        study.held_out.labels[shown].numpy(),
        maps,
        f"{settings.model} on CamVid: what it predicts, and where it is in doubt",
    )


def work(settings: Settings) -> str:
    """Check everything, then train and measure what is left; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    held = "test" if settings.use_test else "val"
    train_scenes = read_scenes(settings.data_path, "train", device, settings.train_limit, layout)
    held_out = read_scenes(settings.data_path, held, device, settings.eval_limit, layout)
    counts = class_counts(train_scenes.labels)
    if not bool(counts.sum()):
        raise SettingsError("the training scenes have no labelled pixel")
    if settings.crop > min(train_scenes.shape[1:]):
        size = " x ".join(str(side) for side in train_scenes.shape[1:])
        raise SettingsError(f"--crop must fit into the scenes, which have {size} pixels; got {settings.crop}")
    with torch.device("meta"):
        make_network(settings, train_scenes)  # refuses what does not fit before anything is written
    study = Study(settings, run, train_scenes, held_out, counts, device)
    run.begin()
    cells = seed_study.run_seeds(settings, run, partial(one_seed, study))
    methods = list(cells[0]["methods"])

    def each(key: str) -> dict[str, list[Any]]:
        return {method: [cell["curves"][method][key] for cell in cells] for method in methods}

    segmentation_plots.calibration(run.path / "calibration.png", each("pixels"), each("patches"))
    data = facts({"train": train_scenes, "held_out": held_out}, counts)
    segmentation_plots.class_ious(run.path / "classes.png", each("iou"), data["share_of_training_pixels"])
    where = f"{len(held_out)} {'test' if settings.use_test else 'validation'} scenes"
    height, width = held_out.shape[1:]
    return seed_study.finish(
        settings,
        run,
        cells,
        MEASURES,
        baseline=BASELINE,
        title=f"{settings.model} on CamVid",
        notes=[f"Measured on {where} of {width} x {height} pixels; pixels without a label count nowhere."],
        data=data,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
