"""What a seed of `experiments.low_precision` trains, and what each network costs and predicts."""

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.datasets import Datasets
from experiments.evaluation import metrics_of, predict_splits
from experiments.models import build_model
from experiments.train_setup import AUGMENTATION
from experiments.training_data import AsTrained, TrainingBatches
from experiments.two_runs import rate_schedule, train_two
from lowrank_bdl.training import averages, schedules
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.low_precision import LowPrecisionSGD, QuantizedModel, low_precision_activations
from lowrank_bdl.training.trainer import Record, Trainer

if TYPE_CHECKING:
    from experiments.low_precision import Settings


def one_seed(settings: "Settings", data: Datasets, device: torch.device, seed: int) -> dict[str, Any]:
    """Train and measure every method; all randomness is a function of the seed."""
    bits = settings.bits
    decayed, averaged = both_runs(settings, data, device, seed, bits=None)
    narrow, narrow_averaged = both_runs(settings, data, device, seed, bits=bits)
    layout = lb.ParameterLayout.from_module(decayed.model)
    float_weights = layout.flatten(decayed.model)
    found: dict[str, tuple[Tensor, int]] = {
        "SGD, float32": (float_weights, 32),
        "SWA, float32": (swa_weights(averaged), 32),
        f"SGD, {bits} bits": (layout.flatten(narrow.model), bits),
        f"SWALP, {bits} bits averaged": (swa_weights(narrow_averaged), 32),
    }
    for name, weights in on_levels(settings, data, decayed.model, seed).items():
        found[f"{name}, {settings.level_bits} bits"] = (weights, settings.level_bits)
    methods = {"majority class": majority(data, settings.eval_limit)}
    for name, (weights, width) in found.items():
        size = weight_bits(layout, width, levels=width == settings.level_bits) / 8 / 1024
        methods[name] = {**measure(settings, data, decayed.model, weights, seed), "kibibytes": size}
    return {"methods": methods, "parameters": layout.numel}


def majority(data: Datasets, limit: int | None) -> dict[str, float]:
    """Test error [%] of the class that most training images have."""
    assert data.test is not None
    test = data.test.targets[:limit]
    return {"error": 100 * (test != data.train.targets.mode().values).double().mean().item()}


def weight_bits(layout: lb.ParameterLayout, bits: int, *, levels: bool) -> int:
    """Return the bits of all weights; biases and scales beside levels stay float32."""
    return sum(
        size * (32 if levels and len(shape) < 2 else bits)
        for size, shape in zip(layout.sizes, layout.shapes, strict=True)
    )


# ---- float32 and block floating point --------------------------------------------------------------------------------


def make_trainer(
    settings: "Settings", data: Datasets, device: torch.device, seed: int, *, bits: int | None, average: bool
) -> Trainer:
    """Make the run whose rate decays to 1 %, or the one at a constant rate that is averaged."""
    model = new_model(settings, data, device, seed)
    common = dict(lr=settings.lr_init, momentum=settings.momentum, weight_decay=settings.wd)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), **common)
    if bits is not None:
        optimizer = LowPrecisionSGD(
            model.parameters(), **common, weight_bits=bits, gradient_bits=bits, momentum_bits=bits,
            blocks="channel" if settings.blocks == "channel" else "tensor",
        )  # fmt: skip
    collections = {}
    if average:
        first = settings.swa_start + (settings.epochs - settings.swa_start) // 5
        collections["swa"] = Collection(averages.swa(model), start=first, per_epoch=settings.collects_per_epoch)
    schedule = rate_schedule(settings, optimizer, average=average)
    return Trainer(model, optimizer, schedule=schedule, collections=collections, seed=seed)


def new_model(settings: "Settings", data: Datasets, device: torch.device, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = build_model(
        settings.model, data.num_classes, channels=data.channels, image_size=data.image_size
    ).to(device)
    return model


def both_runs(
    settings: "Settings", data: Datasets, device: torch.device, seed: int, *, bits: int | None
) -> tuple[Trainer, Trainer]:
    """Train the decayed run and the averaged one, with activations of few bits where that is asked for."""
    with ExitStack() as rounding:

        def make(average: bool) -> Trainer:
            trainer = make_trainer(settings, data, device, seed, bits=bits, average=average)
            if bits is not None and settings.activation_bits is not None:
                rounding.enter_context(low_precision_activations(trainer.model, settings.activation_bits))
            return trainer

        name = f"seed {seed}, " + ("float32" if bits is None else f"{bits} bits")
        return train_two(make, lambda generator: batches(settings, data, generator), settings, name)


def batches(settings: "Settings", data: Datasets, generator: torch.Generator) -> TrainingBatches:
    return TrainingBatches(data, settings.batch_size, generator, *AUGMENTATION.get(settings.dataset, (0, False)))


def swa_weights(trainer: Trainer) -> Tensor:
    """Return the average, shape (D,)."""
    averaged = trainer.collections["swa"].collector
    assert isinstance(averaged, torch.optim.swa_utils.AveragedModel)
    return averages.weights(averaged)


# ---- uniform levels --------------------------------------------------------------------------------------------------


def on_levels(settings: "Settings", data: Datasets, model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return three networks on levels, each from the float32 one: rounded, trained on, and averaged (SQWA)."""
    rounded = QuantizedModel(copy.deepcopy(model), settings.level_bits)
    plain = QuantizedModel(copy.deepcopy(model), settings.level_bits)
    tune(settings, data, plain, settings.level_epochs, seed)
    cyclic = QuantizedModel(copy.deepcopy(model), settings.level_bits)
    mean = cyclic_average(settings, data, cyclic, seed)
    averaged = copy.deepcopy(model)
    cyclic.layout.assign_(averaged, mean)
    sqwa = QuantizedModel(averaged, settings.level_bits)
    tune(settings, data, sqwa, settings.tune_epochs, seed)
    return {"rounded": rounded.weights(), "trained rounded": plain.weights(), "SQWA": sqwa.weights()}


def tune(settings: "Settings", data: Datasets, model: QuantizedModel, epochs: int, seed: int) -> None:
    """Train on levels while the rate decays to 1 %."""
    optimizer = level_optimizer(settings, model)
    schedule = schedules.SWAGLR(optimizer, swa_lr=0.01 * settings.level_lr, horizon=epochs)
    trainer = Trainer(model, optimizer, schedule=schedule, seed=seed)
    trainer.fit(lambda generator: batches(settings, data, generator), epochs, progress=False)


def cyclic_average(settings: "Settings", data: Datasets, model: QuantizedModel, seed: int) -> Tensor:
    """Return the mean (D,) of the rounded weights at the minima of a cyclical rate, in the middle of each cycle."""
    optimizer = level_optimizer(settings, model)
    steps = -(-len(data.train) // settings.batch_size)
    schedule = schedules.TriangularLR(optimizer, min_lr=0.01 * settings.level_lr, cycle=settings.cycle * steps)
    trainer = Trainer(model, optimizer, schedule=schedule, step_every="batch", seed=seed)
    mean = lb.StreamingMoments(model.layout.numel)

    def collect(trainer: Trainer, record: Record) -> None:
        if trainer.epoch % settings.cycle == settings.cycle // 2:
            mean.update(model.weights())

    epochs = settings.level_epochs - settings.tune_epochs
    trainer.fit(lambda generator: batches(settings, data, generator), epochs, after_epoch=collect, progress=False)
    return mean.mean


def level_optimizer(settings: "Settings", model: QuantizedModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=settings.level_lr, momentum=settings.momentum, weight_decay=settings.wd
    )


# ---- predictions -----------------------------------------------------------------------------------------------------


def measure(settings: "Settings", data: Datasets, model: nn.Module, weights: Tensor, seed: int) -> dict[str, float]:
    """Test error [%] and NLL [nats], batch norm recalibrated on training images as they were trained on."""
    assert data.test is not None
    test = data.test if settings.eval_limit is None else data.test.first(min(settings.eval_limit, len(data.test)))
    images = data.train.first(min(settings.bn_size, len(data.train)))
    bn_images = AsTrained(images, *AUGMENTATION.get(settings.dataset, (0, False)), data.black)
    found = predict_splits(model, weights, {"test": test}, bn_images, num_samples=1, seed=seed, progress=False)
    metrics = metrics_of(found["test"], seed=seed)
    return {"error": 100 * (1 - metrics["accuracy"]), "nll": metrics["nll"], "ece": metrics["ece"]}
