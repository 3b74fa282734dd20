"""What a run of `experiments.train` is made of: network, optimizer, schedule, loss, collectors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from experiments.common import SettingsError
from experiments.datasets import Datasets
from experiments.models import build_model
from experiments.train_settings import Settings, first_collection, prior_std
from experiments.training_data import AsTrained, TrainingBatches
from lowrank_bdl.posteriors.snapshots import WeightSnapshots
from lowrank_bdl.training import averages, losses, schedules
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.langevin import SGHMC, SGLD
from lowrank_bdl.training.trainer import Trainer
from lowrank_bdl.training.variational import MeanFieldModel

# Largest shift [pixels], and whether images are flipped: photographs have no left and right, digits do.
AUGMENTATION = {
    "CIFAR10": (4, True), "CIFAR100": (4, True), "STL10": (4, True), "SVHN": (4, False), "MNIST": (2, False),
    "FashionMNIST": (2, True), "digits": (1, False),
}  # fmt: skip


def make_model(settings: Settings, data: Datasets, device: torch.device) -> nn.Module:
    """Make the network with initial weights that depend on the seed alone."""
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, data.num_classes, channels=data.channels, image_size=data.image_size)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if settings.channels_last else model


def make_optimizer(settings: Settings, model: nn.Module, num_data: int) -> torch.optim.Optimizer:
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    if isinstance(model, MeanFieldModel):
        # Adam moves ρ, of a small deviation its logarithm, by up to this much a step: by default 1 an epoch.
        rate = settings.vi_std_lr or min(settings.batch_size / num_data, 1.0)
        means = [p for p in model.model.parameters() if p.requires_grad]
        parameters = [{"params": means}, {"params": list(model.rho), "lr": rate}]
    # The prior of a variational run is in its loss. Noise comes from the global generators, which checkpoints hold.
    common: dict[str, Any] = dict(lr=settings.lr_init, weight_decay=0.0 if settings.vi else settings.wd)
    if settings.optimizer == "SGD":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **common)
    if settings.optimizer == "SGLD":
        return SGLD(parameters, num_data=num_data, temperature=settings.temperature, **common)
    if settings.optimizer == "SGHMC":
        common |= dict(momentum=settings.momentum, temperature=settings.temperature)
        return SGHMC(parameters, num_data=num_data, **common)
    kinds: dict[Any, type[torch.optim.Optimizer]] = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
    return kinds[settings.optimizer](parameters, **common)


def make_schedule(
    settings: Settings, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> schedules.ClosedFormLR | None:
    """Return the schedule; a cyclical one steps with every batch."""
    if settings.no_schedule:
        return None
    horizon = settings.swa_start if settings.swa else settings.epochs
    final = settings.swa_lr if settings.swa else 0.01 * settings.lr_init
    if settings.schedule == "swag":
        return schedules.SWAGLR(optimizer, swa_lr=final, horizon=horizon)
    if settings.schedule == "cosine":
        return schedules.CosineLR(optimizer, horizon=max(horizon, 1), final_lr=final)
    if settings.schedule == "step":
        if settings.swa:
            return schedules.StepDecayLR(optimizer, swa_start=settings.swa_start, swa_lr=settings.swa_lr)
        return schedules.StepDecayLR(optimizer)
    start = horizon * steps_per_epoch
    return schedules.ThenLR(
        optimizer,
        schedules.SWAGLR(optimizer, swa_lr=final, horizon=start),
        schedules.TriangularLR(
            optimizer,
            min_lr=settings.cyclical_lr,
            max_lr=settings.swa_lr,
            cycle=settings.swa_c_epochs * steps_per_epoch,
        ),
        milestone=start,
    )


def make_loss(settings: Settings, data: Datasets) -> losses.Loss:
    loss: losses.Loss = losses.cross_entropy
    if settings.loss == "adv_CE":
        mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
        low, high = (0 - mean) / std, (1 - mean) / std
        loss = losses.AdversarialCrossEntropy(low, high, settings.epsilon)
    if settings.prior_var is not None:
        loss = losses.GaussianPrior(loss, settings.prior_var, len(data.train))
    prior = prior_std(settings, len(data.train))
    return loss if prior is None else losses.ELBO(loss, len(data.train), prior, settings.temperature)


def negative_log_likelihood(output: Tensor, targets: Tensor) -> Tensor:
    """Mean NLL of a batch [nats], a metric of training."""
    return cross_entropy(output.float(), targets)


def make_collections(settings: Settings, model: nn.Module) -> dict[str, Collection]:
    found = {}
    if settings.swa:
        include = None if settings.include is None else settings.include.split(",")
        try:
            swag = lb.SWAG(model, rank=settings.rank, include=include)
        except lb.ShapeError as error:
            raise SettingsError(f"--include {settings.include}: {error}") from None
        except lb.MemoryLimitError as error:
            raise SettingsError(f"--max_num_models {settings.max_num_models}: {error}") from None
        moments = first_collection(settings), settings.swa_c_epochs, settings.collects_per_epoch
        found["swag"] = Collection(swag, *moments)
        if settings.snapshots:
            found["snapshots"] = Collection(WeightSnapshots(model, include=include), *moments)
    if settings.ema:
        found["ema"] = Collection(averages.ema(model, settings.ema_decay), per_epoch=None)
    if settings.polyak:
        found["polyak"] = Collection(averages.polyak(model), settings.swa_start, per_epoch=None)
    return found


def make_trainer(settings: Settings, data: Datasets, device: torch.device) -> Trainer:
    model = make_model(settings, data, device)
    if settings.vi:
        model = MeanFieldModel(model, init_std=settings.vi_init_std)
    optimizer = make_optimizer(settings, model, len(data.train))
    steps_per_epoch = -(-len(data.train) // settings.batch_size)
    schedule = make_schedule(settings, optimizer, steps_per_epoch)
    return Trainer(
        model,
        optimizer,
        make_loss(settings, data),
        schedule=schedule,
        step_every="batch" if isinstance(schedule, schedules.ThenLR) else "epoch",
        collections=make_collections(settings, model),
        # the loss of a variational run is mostly its divergence from the prior
        metrics={"accuracy": losses.accuracy} | ({"nll": negative_log_likelihood} if settings.vi else {}),
        seed=settings.seed,
        clip_grad_norm=settings.grad_clip,
        **arithmetic(settings),
    )


def arithmetic(settings: Settings) -> dict[str, Any]:
    """Return the precision and the order in memory that a trainer computes with."""
    return {
        "autocast": {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.amp],
        "memory_format": torch.channels_last if settings.channels_last else None,
    }


def network(trainer: Trainer) -> nn.Module:
    """Return the network that a trainer trains: in a variational run it is at the mean, and inside the model."""
    return trainer.model.model if isinstance(trainer.model, MeanFieldModel) else trainer.model


def try_model(model: nn.Module, data: Datasets) -> None:
    """Refuse a network that does not fit the images, before anything is written; it is left in evaluation mode."""
    inputs, _ = next(iter(data.train.batches(2)))
    device = next((parameter.device for parameter in model.parameters()), inputs.device)
    model.eval()
    try:
        with torch.no_grad():
            shape = model(inputs.to(device)).shape
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"--model does not fit images of shape {tuple(inputs.shape[1:])}: {reason}") from None
    if shape != (len(inputs), data.num_classes):
        raise SettingsError(f"--model gives {tuple(shape)} for {len(inputs)} images of {data.num_classes} classes")


def augmentation(settings: Settings) -> tuple[int, bool]:
    """Return the largest shift of the training images [pixels], and whether they are flipped."""
    known = settings.augment == "standard" and settings.dataset in AUGMENTATION
    return AUGMENTATION[settings.dataset] if known else (0, False)


def training_batches(settings: Settings, data: Datasets, generator: torch.Generator) -> TrainingBatches:
    """Return one epoch's batches; all that is random in them comes from the generator."""
    return TrainingBatches(data, settings.batch_size, generator, *augmentation(settings))


def bn_images(settings: Settings, data: Datasets) -> AsTrained:
    """Return the images that batch norm is recalibrated on: augmented as they were trained on."""
    images = data.train if settings.bn_size is None else data.train.first(min(settings.bn_size, len(data.train)))
    return AsTrained(images, *augmentation(settings), data.black)
