"""A plain training loop: schedule, epochs, snapshots for a collector, one checkpoint an epoch, exact resume.

Everything random in an epoch (order of the data, augmentation) is a function of (seed, epoch), so a run that was killed
and resumed does the same arithmetic as one that was not.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments.augmentation import augment
from experiments.common import RunDir, SettingsError
from experiments.datasets import Split


class Collector(Protocol):
    """What is given the model after each part of an epoch, such as ``lb.SWAG``."""

    def update_parameters(self, model: nn.Module) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> object: ...


def learning_rate(epoch: int, lr_init: float, final_lr: float, horizon: int) -> float:
    """Flat for the first half of `horizon` epochs, then linear down to `final_lr` at 90 % of it, then constant.

    The schedule of Izmailov et al. (2018) and Maddox et al. (2019): `horizon` is the epoch at which the collection of
    weights starts, or the whole training when nothing is collected.

    Example:
        >>> [round(learning_rate(epoch, 0.1, 0.02, 10), 3) for epoch in (0, 5, 7, 9, 20)]
        [0.1, 0.1, 0.06, 0.02, 0.02]
    """
    t = epoch / horizon if horizon else 1.0
    progress = min(max((t - 0.5) / 0.4, 0.0), 1.0)
    return lr_init + progress * (final_lr - lr_init)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int = 1000) -> dict[str, float]:
    """Mean negative log-likelihood [nats] and accuracy with the model's own batch-norm statistics."""
    was_training = model.training
    model.eval()
    nll, correct = 0.0, 0
    for inputs, targets in split.batches(batch_size):
        logits = model(inputs)
        nll += cross_entropy(logits, targets, reduction="sum").item()
        correct += int((logits.argmax(-1) == targets).sum().item())
    model.train(was_training)
    return {"nll": nll / len(split), "accuracy": correct / len(split)}


@dataclass(frozen=True)
class Phase:
    """One training run inside an experiment.

    Attributes:
        name: Names the checkpoint, ``checkpoint-NAME.safetensors``, and the records in log.jsonl.
        epochs: Number of epochs.
        learning_rate: Learning rate as a function of the epoch.
        seed: Seed of the order of the data.
        start: Number of epochs before the first snapshot.
        max_shift: Largest random shift of a training image [pixels].
        flip: Whether training images are flipped at random.
        collects_per_epoch: Snapshots in each later epoch, the last one at its end.
    """

    name: str
    epochs: int
    learning_rate: Callable[[int], float]
    seed: int
    batch_size: int
    momentum: float
    weight_decay: float
    max_shift: int = 0
    flip: bool = False
    start: int = 0
    collects_per_epoch: int = 1


def train(
    run: RunDir, phase: Phase, model: nn.Module, data: Split, validation: Split, collector: Collector | None = None
) -> None:
    """Train `model` in place, or go on from the phase's checkpoint; log one record an epoch.

    Raises:
        SettingsError: If the loss is no longer finite, or the checkpoint cannot be read.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=phase.learning_rate(0), momentum=phase.momentum, weight_decay=phase.weight_decay
    )
    done = _restore(run, phase, model, optimizer, collector, data.inputs.device)
    run.keep_log(lambda record: record["phase"] != phase.name or record["epoch"] <= done)
    interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file needs a line now and then, not a moving bar
    progress = tqdm(
        range(done, phase.epochs),
        initial=done,
        total=phase.epochs,
        desc=phase.name,
        unit="epoch",
        mininterval=interval,
    )
    for epoch in progress:
        lr = phase.learning_rate(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = _train_epoch(phase, epoch, model, optimizer, data, collector)
        if not loss < float("inf"):
            raise SettingsError(f"training diverged: loss {loss} in epoch {epoch + 1}; lower --lr_init or --swa_lr")
        held_out = evaluate(model, validation)
        progress.set_postfix(loss=f"{loss:.4f}", validation_nll=f"{held_out['nll']:.4f}", refresh=False)
        run.log(phase=phase.name, epoch=epoch + 1, lr=lr, train_loss=loss, validation=held_out)
        _save(run, phase, epoch + 1, model, optimizer, collector)


def _train_epoch(
    phase: Phase,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Split,
    collector: Collector | None,
) -> float:
    """Return the mean of the loss over the epoch, each batch weighted by its size."""
    generator = torch.Generator().manual_seed(phase.seed * 1_000_003 + epoch)
    batches = data.shuffled(phase.batch_size, generator)
    total = torch.zeros((), device=data.inputs.device, dtype=torch.float64)
    collected = 0
    model.train()
    for number, (inputs, targets) in enumerate(batches, start=1):
        optimizer.zero_grad()
        if phase.max_shift or phase.flip:
            inputs = augment(inputs, phase.max_shift, phase.flip, generator)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(targets)
        due = number * phase.collects_per_epoch // len(batches)
        if collector is not None and epoch >= phase.start and due > collected:
            if not total.isfinite():  # the collector would refuse the weights anyway, with a less helpful message
                break
            collector.update_parameters(model)
            collected = due
    return float(total) / len(data)


def _save(
    run: RunDir,
    phase: Phase,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    collector: Collector | None,
) -> None:
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    state = optimizer.state_dict()
    for index, buffers in state["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in buffers.items() if value is not None}
    if collector is not None:
        tensors |= {f"collector.{key}": value for key, value in collector.state_dict().items()}
    # Dropout and the like draw from the global generators; a model without them ignores these.
    tensors["generator.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["generator.cuda"] = torch.cuda.get_rng_state()
    facts = {"epoch": epoch, "param_groups": state["param_groups"]}
    run.save_checkpoint(f"checkpoint-{phase.name}.safetensors", tensors, facts)


def _restore(
    run: RunDir,
    phase: Phase,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    collector: Collector | None,
    device: torch.device,
) -> int:
    """Load the phase's checkpoint, if there is one; return the number of epochs it has done."""
    found = run.load_checkpoint(f"checkpoint-{phase.name}.safetensors", device)
    if found is None:
        return 0
    tensors, facts = found

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    model.load_state_dict(part("model."))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["param_groups"]})
    if collector is not None:
        collector.load_state_dict(part("collector."))
    torch.set_rng_state(tensors["generator.cpu"].cpu())
    if torch.cuda.is_available() and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"].cpu())
    return int(facts["epoch"])
