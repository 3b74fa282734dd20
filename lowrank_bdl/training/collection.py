"""When a collector sees the weights."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


class Collector(Protocol):
    """What is shown the weights during training: ``lb.SWAG``, torch's ``AveragedModel``, or something of your own."""

    def update_parameters(self, model: nn.Module) -> None:
        """Take note of the model's present weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was noted."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Go on from a state."""


@dataclass(frozen=True)
class Collection:
    """A collector and the moments at which it sees the weights.

    The weights are collected after epochs e = 1, 2, ... with e > ``start`` and (e − ``start``) divisible by ``every``.

    Args:
        collector: Sees the weights.
        start: Epochs before; an ``every`` of more than 1 counts from it. May be negative, to collect in the middle of
            cycles: ``start=-2, every=4`` collects after epochs 2, 6, 10, ...
        every: Epochs from one collected epoch to the next, >= 1.
        per_epoch: Snapshots in such an epoch, evenly spread over its batches, the last at its end; at most one a batch.
            None collects after every optimiser step (exponential and Polyak averages).

    Raises:
        ValueError: If ``every`` or ``per_epoch`` is less than 1.

    Example:
        >>> collection = Collection(collector=None, start=2, per_epoch=2)
        >>> [(e, b) for e in (1, 2, 3, 4) for b in range(1, 6) if collection.is_due(e, b, num_batches=5)]
        [(3, 3), (3, 5), (4, 3), (4, 5)]
    """

    collector: Collector
    start: int = 0
    every: int = 1
    per_epoch: int | None = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 epoch; got {self.every}.")
        if self.per_epoch is not None and self.per_epoch < 1:
            raise ValueError(f"per_epoch must be at least 1, or None for every step; got {self.per_epoch}.")

    def in_epoch(self, epoch: int) -> bool:
        """Tell whether the weights are collected in an epoch, counted from 1."""
        return epoch > self.start and (epoch - self.start) % self.every == 0

    def is_due(self, epoch: int, batch: int, num_batches: int) -> bool:
        """Tell whether the weights are collected after a batch.

        Args:
            epoch: Number of the epoch, from 1.
            batch: Number of the batch in it, from 1.
            num_batches: Batches in the epoch.
        """
        if not self.in_epoch(epoch):
            return False
        if self.per_epoch is None:
            return True
        return batch * self.per_epoch // num_batches > (batch - 1) * self.per_epoch // num_batches
