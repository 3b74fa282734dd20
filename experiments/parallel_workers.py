"""Processes that train together: one network on parts of the same batches, then a network each; started by torchrun."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.common import SettingsError, resolve_device
from experiments.training_data import TrainingBatches

_WAIT = datetime.timedelta(days=1)  # others wait while the first one measures


@dataclass(frozen=True)
class Workers:
    """This process among all of them.

    Attributes:
        rank: Its number; 0 leads: it alone measures and writes.
        count: How many there are.
        device: Its own.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def together(self, model: nn.Module) -> nn.Module:
        """Return the model so that its gradient is the mean over all workers' batches."""
        if self.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def agree(self, number: int) -> int:
        """Return what the first worker says."""
        said = torch.tensor([number], device=self.device)
        if self.count > 1:
            dist.broadcast(said, 0)
        return int(said)

    def mean(self, value: float) -> float:
        """Return the mean of what all say."""
        said = torch.tensor([value], dtype=torch.float64, device=self.device)
        if self.count > 1:
            dist.all_reduce(said)
        return said.item() / self.count

    def gather(self, vector: Tensor) -> Tensor | None:
        """Return all vectors, (workers, D), to the first worker; None to the others."""
        if self.count == 1:
            return vector.unsqueeze(0)
        found = [torch.empty_like(vector) for _ in range(self.count)] if self.leads else None
        dist.gather(vector, found)
        return None if found is None else torch.stack(found)

    def wait(self) -> None:
        """Wait until all are here."""
        self.mean(0.0)


@contextmanager
def started(device: str) -> Iterator[Workers]:
    """Join the processes that torchrun started, for the length of a ``with`` block.

    Args:
        device: As in settings; each worker takes a GPU of its own where there are some.

    Raises:
        SettingsError: If torchrun did not start this process.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise SettingsError(
            "workers are started by torchrun: torchrun --standalone --nproc_per_node 2 -m experiments.parallel_swa ..."
        )
    own = resolve_device(device)
    if own.type == "cuda":
        own = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=_WAIT)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), own)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Shard:
    """A worker's part of every batch, all parts of one size; what does not fill a batch is left out of an epoch.

    Every worker draws the same batches from the same generator, so together they see each image of an epoch once.

    Attributes:
        batches: Of all workers together.
        rank: The worker's number.
        count: How many there are; it divides the size of a batch.
    """

    batches: TrainingBatches
    rank: int
    count: int

    def __len__(self) -> int:
        return len(self.batches.data.train) // self.batches.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in self.batches:
            if len(targets) == self.batches.batch_size:
                yield inputs[self.rank :: self.count], targets[self.rank :: self.count]
