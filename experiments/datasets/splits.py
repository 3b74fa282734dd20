"""What a network is trained and tested on: images with labels, in batches whose order is a function of a generator."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Loader(Iterable[tuple[Tensor, Tensor]], Sized, Protocol):
    """Batches of normalised images (B, C, H, W) and class indices (B,); every iteration gives the same ones."""


class LabelledImages(Protocol):
    """What every split offers, whether its images are held in memory (`Split`) or read as they are needed."""

    @property
    def targets(self) -> Tensor:
        """Class indices (N,)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Loader:
        """Iterate in order; the last batch may be smaller."""

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Loader:
        """Iterate in an order drawn once from `generator`, a CPU generator."""

    def first(self, n: int) -> "LabelledImages":
        """Keep the first n images."""


@dataclass(frozen=True)
class Split:
    """Normalised images (N, C, H, W) and class indices (N,) held in memory on one device."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.inputs.shape[1:]
        return channels, height, width

    def batches(self, batch_size: int) -> "Batches":
        """Iterate in order; the last batch may be smaller."""
        return Batches(self, batch_size, None)

    def shuffled(self, batch_size: int, generator: torch.Generator) -> "Batches":
        """Iterate in an order drawn once from `generator`."""
        return Batches(self, batch_size, torch.randperm(len(self), generator=generator))

    @classmethod
    def concatenate(cls, splits: "Iterable[Split]") -> "Split":
        parts = list(splits)
        return cls(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))

    def first(self, n: int) -> "Split":
        return Split(self.inputs[:n], self.targets[:n])

    def rotated(self, quarter_turns: int = 1) -> "Split":
        """Turn every image by 90 degrees: no pixel is interpolated, so only the content is out of distribution."""
        return Split(torch.rot90(self.inputs, quarter_turns, (-2, -1)).contiguous(), self.targets)


@dataclass(frozen=True)
class Batches:
    """A re-iterable loader over a `Split`."""

    split: Split
    batch_size: int
    order: Tensor | None

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.split), self.batch_size):
            stop = start + self.batch_size
            if self.order is None:
                yield self.split.inputs[start:stop], self.split.targets[start:stop]
            else:
                index = self.order[start:stop].to(self.split.inputs.device)
                yield self.split.inputs[index], self.split.targets[index]
