"""What a seed of the study does: two runs that share their first half, five sets of weights, and what these predict."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lowrank_bdl as lb
from experiments.evaluation import classification_metrics
from experiments.study_tasks import StudyData, Task, bn_images, make_model, training_batches
from lowrank_bdl.training import averages, losses, schedules
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.trainer import Record, Trainer

BASELINE = "SGD"
METHODS = ("SGD constant", "SWA", "EMA", "SWAG")  # compared with the baseline
MOMENTUM = 0.9


def make_trainer(task: Task, data: StudyData, seed: int, device: torch.device, *, rank: int | None) -> Trainer:
    """Make the run whose rate decays to 1 %, or with a rank the run whose weights are collected at a constant rate."""
    model = make_model(task, data, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr_init, momentum=MOMENTUM, weight_decay=task.wd)
    schedule: schedules.ClosedFormLR
    collections = {}
    if rank is None:
        schedule = schedules.SWAGLR(optimizer, swa_lr=0.01 * task.lr_init, horizon=task.epochs)
    else:
        schedule = schedules.StepDecayLR(
            optimizer, every=task.epochs + 1, swa_start=task.branch, swa_lr=task.swa_lr
        )  # no decay before
        collections["swag"] = Collection(
            lb.SWAG(model, rank=rank), start=task.collect, per_epoch=task.collects_per_epoch
        )
        collections["ema"] = Collection(averages.ema(model, task.ema_decay), start=task.branch, per_epoch=None)
    loss = losses.of_output(torch.nn.functional.mse_loss) if task.is_regression else losses.cross_entropy
    memory_format = None if task.is_regression else torch.channels_last
    return Trainer(
        model, optimizer, loss, schedule=schedule, collections=collections, seed=seed, memory_format=memory_format
    )


def go_on_from(trainer: Trainer, state: dict[str, Any]) -> None:
    """Take weights, momentum, epoch and random numbers from another run's state; schedule and collectors stay."""
    own = trainer.state_dict()
    schedule = {**own["schedule"], "last_epoch": state["epoch"]}
    # a copy: an optimizer keeps the tensors that it is given, and two runs must not share their momentum
    trainer.load_state_dict({**copy.deepcopy(state), "collections": own["collections"], "schedule": schedule})
    assert trainer.schedule is not None
    for group, rate in zip(trainer.optimizer.param_groups, trainer.schedule.get_lr(), strict=True):
        group["lr"] = rate


def train(
    task: Task, data: StudyData, seed: int, device: torch.device, rank: int, after_epoch: Callable[[], None]
) -> tuple[Trainer, Trainer]:
    """Train the decayed run, and the averaged run from the decayed run's middle, where its rate is still the first."""

    def fit(trainer: Trainer, epochs: int) -> None:
        def tell(trainer: Trainer, record: Record) -> None:
            after_epoch()

        trainer.fit(lambda generator: training_batches(task, data, generator), epochs, after_epoch=tell, progress=False)

    torch.manual_seed(seed)
    decayed = make_trainer(task, data, seed, device, rank=None)
    fit(decayed, task.branch)
    middle = copy.deepcopy(decayed.state_dict())
    fit(decayed, task.epochs)
    averaged = make_trainer(task, data, seed, device, rank=rank)
    go_on_from(averaged, middle)
    fit(averaged, task.epochs)
    return decayed, averaged


def weight_sources(decayed: Trainer, averaged: Trainer, scale: float) -> dict[str, Any]:
    """Return what is compared, by name: weight vectors (D,), and SWAG's posterior."""
    layout = lb.ParameterLayout.from_module(decayed.model)
    swag, ema = averaged.collections["swag"].collector, averaged.collections["ema"].collector
    assert isinstance(swag, lb.SWAG) and isinstance(ema, torch.optim.swa_utils.AveragedModel)
    return {
        BASELINE: layout.flatten(decayed.model),
        "SGD constant": layout.flatten(averaged.model),
        "SWA": swag.mean,
        "EMA": averages.weights(ema),
        "SWAG": swag.posterior(scale=scale),
    }


def mixture_nll(means: Tensor, targets: Tensor, variance: float) -> float:
    r"""Mean of :math:`-\log \frac1S \sum_s N(y_n; f_{sn}, \sigma^2)` [nats].

    Args:
        means: f, shape (S, N).
        targets: y, shape (N,).
        variance: σ² > 0.
    """
    each = -(targets - means).square() / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)
    return -(each.logsumexp(0) - math.log(len(means))).mean().item()


def fit_noise(means: Tensor, targets: Tensor) -> float:
    """Return the noise variance with the lowest `mixture_nll`; of one sample, the mean squared residual.

    A mixture's best variance lies between the least and the mean of the samples' squared residuals, averaged over
    the targets: the search is bounded by them.

    Args:
        means: Shape (S, N), float64.
        targets: Shape (N,), float64.
    """
    from scipy.optimize import minimize_scalar

    squares = (targets - means).square()
    low, high = squares.amin(0).mean().item(), squares.mean().item()
    if high <= low * (1 + 1e-12):
        return high
    found = minimize_scalar(
        lambda log: mixture_nll(means, targets, math.exp(log)),
        bounds=(math.log(max(low, 1e-12 * high)), math.log(high)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return math.exp(float(found.x))


def regression_metrics(means: Tensor, targets: Tensor, data: StudyData) -> dict[str, dict[str, float]]:
    """RMSE and NLL [unit of y; nats] of each split; the noise variance is fitted to the validation examples.

    Args:
        means: What each weight sample predicts for the held-out examples, (S, N, 1), standardised.
        targets: Shape (N, 1), standardised.
        data: Says which are for validation, and how targets were standardised.
    """
    means, targets = means.squeeze(-1).double(), targets.squeeze(-1).double()
    n = data.num_validation
    variance = fit_noise(means[:, :n], targets[:n])
    found = {}
    for name, part in (("validation", slice(0, n)), ("test", slice(n, None))):
        error = means[:, part].mean(0) - targets[part]
        found[name] = {
            "rmse": data.scale * error.square().mean().sqrt().item(),
            "nll": mixture_nll(means[:, part], targets[part], variance) + math.log(data.scale),
            "noise_std": data.scale * math.sqrt(variance),
        }
    return found


def evaluate(
    task: Task, data: StudyData, trainer: Trainer, weights: Any, num_samples: int, seed: int
) -> dict[str, dict[str, float]]:
    """Metrics of each split; batch norm is recalibrated on the training images, for every method alike."""
    likelihood: dict[str, Any] = {"likelihood": "gaussian", "noise_variance": 1.0} if task.is_regression else {}
    normalized = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in trainer.model.modules())
    prediction = lb.predict(
        trainer.model,
        weights,
        data.held_out.batches(500),
        num_samples=num_samples,
        bn_loader=bn_images(task, data).batches(500) if normalized else None,
        generator=torch.Generator().manual_seed(seed),
        keep_samples=task.is_regression,
        progress=False,
        **likelihood,
    )
    assert prediction.targets is not None
    if task.is_regression:
        assert prediction.sample_means is not None
        return regression_metrics(prediction.sample_means, prediction.targets, data)
    found = {}
    for name, part in (("validation", slice(0, data.num_validation)), ("test", slice(data.num_validation, None))):
        metrics = classification_metrics(
            prediction.mean[part], prediction.targets[part], prediction.log_likelihood[part], seed=seed
        )
        found[name] = {
            "error": 100 * (1 - metrics["accuracy"]),
            **{key: metrics[key] for key in ("nll", "ece", "brier")},
        }
    return found


def run_seed(
    task: Task,
    data: StudyData,
    seed: int,
    device: torch.device,
    *,
    rank: int,
    scale: float,
    num_samples: int,
    after_epoch: Callable[[], None],
) -> dict[str, Any]:
    """Train and evaluate every method with one seed; all randomness is a function of it."""
    decayed, averaged = train(task, data, seed, device, rank, after_epoch)
    sources = weight_sources(decayed, averaged, scale)
    return {
        "methods": {
            name: evaluate(task, data, decayed, weights, num_samples, seed) for name, weights in sources.items()
        },
        "sizes": data.sizes,
        "parameters": sum(p.numel() for p in decayed.model.parameters()),
        "snapshots": int(averaged.collections["swag"].collector.n_averaged),  # type: ignore[attr-defined]
        "train_loss": {"SGD": decayed.history[-1]["loss"], "SGD constant": averaged.history[-1]["loss"]},
    }
