"""What a seed of `experiments.parallel_swa` trains on every worker, and what the first one measures."""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

import lowrank_bdl as lb
from experiments.datasets import Datasets
from experiments.evaluation import metrics_of, predict_splits
from experiments.low_precision_methods import majority, new_model
from experiments.parallel_workers import Shard, Workers
from experiments.train_setup import AUGMENTATION
from experiments.training_data import AsTrained, TrainingBatches
from lowrank_bdl.training import losses
from lowrank_bdl.training.trainer import Trainer

if TYPE_CHECKING:
    from experiments.parallel_swa import Settings

BASELINE = "majority class"


def one_seed(settings: "Settings", data: Datasets, workers: Workers, seed: int) -> dict[str, Any]:
    """Train in large batches together, then alone, then average; every worker calls this, the first one measures.

    Returns:
        Methods and what was trained; on other workers nothing.
    """
    model = new_model(settings, data, workers.device, seed)
    layout = lb.ParameterLayout.from_module(model)
    began = workers_time(workers)
    epochs, accuracy = large_phase(settings, data, workers, model, seed)
    large, large_seconds = layout.flatten(model), workers_time(workers) - began
    refine(settings, data, workers, model, settings.small_epochs, seed)
    alone, seconds = workers.gather(layout.flatten(model)), workers_time(workers) - began
    control, control_seconds = None, 0.0
    if not settings.no_control:
        began = workers_time(workers)
        model = new_model(settings, data, workers.device, seed)
        refine(settings, data, workers, model, epochs + settings.small_epochs, seed)
        control, control_seconds = workers.gather(layout.flatten(model)), workers_time(workers) - began
    if alone is None:
        return {}
    swag = lb.SWAG(model, rank=workers.count)
    for theta in alone:
        layout.assign_(model, theta)
        swag.update_parameters(model)
    found: dict[str, tuple[list[Any], float]] = {"large batch": ([large], large_seconds)}
    if control is not None:
        found["small batch"] = (list(control), control_seconds)
    found["SWAP, one worker"] = (list(alone), seconds)
    found["SWAP, ensemble"] = ([lb.EmpiricalPosterior(alone, layout)], seconds)
    if workers.count > 1:
        found["SWAP, SWAG"] = ([swag.posterior(scale=settings.scale)], seconds)
    found["SWAP"] = ([swag.mean], seconds)
    methods = {BASELINE: majority(data, settings.eval_limit)}
    for name, (sources, wall) in found.items():
        each = [measure(settings, data, model, weights, seed) for weights in sources]
        methods[name] = {key: sum(one[key] for one in each) / len(each) for key in each[0]} | {"seconds": wall}
    lb.EmpiricalPosterior(alone, layout).save(f"{settings.dir}/workers-{seed}.safetensors")
    return {
        "methods": methods,
        "workers": workers.count,
        "parameters": layout.numel,
        "large_epochs": epochs,
        "large_train_accuracy": accuracy,
        "distance": (alone - swag.mean).norm(dim=1).mean().item(),
    }


def workers_time(workers: Workers) -> float:
    """Wait for all, and return the time [s]."""
    workers.wait()
    return time.perf_counter()


def batches(settings: "Settings", data: Datasets, size: int) -> "Callable[[torch.Generator], TrainingBatches]":
    shift, flip = AUGMENTATION.get(settings.dataset, (0, False))
    return lambda generator: TrainingBatches(data, size, generator, shift, flip)


def large_phase(
    settings: "Settings", data: Datasets, workers: Workers, model: nn.Module, seed: int
) -> tuple[int, float]:
    """Train one network together, until it is right often enough on what it trains on.

    Returns:
        Epochs that this took, and the accuracy then.
    """
    optimizer = sgd(settings, model, settings.large_lr)
    whole = batches(settings, data, settings.large_batch)

    def own(generator: torch.Generator) -> Iterable[Any]:
        return Shard(whole(generator), workers.rank, workers.count)

    steps = settings.large_epochs * (len(data.train) // settings.large_batch)
    schedule = OneCycleLR(
        optimizer, settings.large_lr, steps, pct_start=0.25, anneal_strategy="linear", cycle_momentum=False
    )
    trainer = Trainer(
        workers.together(model), optimizer, schedule=schedule, step_every="batch",
        metrics={"accuracy": losses.accuracy}, seed=seed,
    )  # fmt: skip
    accuracy = 0.0
    bar = tqdm(range(settings.large_epochs), desc="large batches", unit="epoch", leave=False, disable=not workers.leads)
    for _ in bar:
        accuracy = workers.mean(trainer.train_epoch(own)["accuracy"])
        if accuracy >= settings.stop_accuracy:
            break
    bar.close()
    return trainer.epoch, accuracy


def refine(settings: "Settings", data: Datasets, workers: Workers, model: nn.Module, epochs: int, seed: int) -> None:
    """Train this worker's own network in small batches, in an order of its own, while the rate decays."""
    optimizer = sgd(settings, model, settings.small_lr)
    steps = epochs * -(-len(data.train) // settings.small_batch)
    schedule = OneCycleLR(
        optimizer, settings.small_lr, steps, pct_start=0.25, anneal_strategy="linear", cycle_momentum=False
    )
    torch.manual_seed(seed * 1009 + workers.rank)  # of dropout
    trainer = Trainer(model, optimizer, schedule=schedule, step_every="batch", seed=(seed + 1) * 1009 + workers.rank)
    trainer.fit(
        batches(settings, data, settings.small_batch), epochs, progress=workers.leads, description="small batches"
    )


def sgd(settings: "Settings", model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=settings.momentum, weight_decay=settings.wd, nesterov=settings.momentum > 0
    )


def measure(settings: "Settings", data: Datasets, model: nn.Module, weights: Any, seed: int) -> dict[str, float]:
    """Test error and ECE [%] and NLL [nats], batch norm recalibrated on training images as they were trained on."""
    assert data.test is not None
    test = data.test if settings.eval_limit is None else data.test.first(min(settings.eval_limit, len(data.test)))
    images = data.train.first(min(settings.bn_size, len(data.train)))
    bn_images = AsTrained(images, *AUGMENTATION.get(settings.dataset, (0, False)), data.black)
    found = predict_splits(
        model, weights, {"test": test}, bn_images, num_samples=settings.num_samples, seed=seed, progress=False
    )
    metrics = metrics_of(found["test"], seed=seed)
    return {"error": 100 * (1 - metrics["accuracy"]), "nll": metrics["nll"], "ece": 100 * metrics["ece"]}
