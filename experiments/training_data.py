"""The batches of one epoch of training: shuffled and augmented, all from one generator."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.augmentation import augment
from experiments.datasets import Datasets


@dataclass(frozen=True)
class TrainingBatches:
    """Shuffled training batches, each shifted by up to `max_shift` pixels and flipped; meant to be iterated once.

    A function of the generator's state alone, so an epoch that is trained again after a kill sees the same images.
    """

    data: Datasets
    batch_size: int
    generator: torch.Generator
    max_shift: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return -(-len(self.data.train) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in self.data.train.shuffled(self.batch_size, self.generator):
            if self.max_shift or self.flip:
                inputs = augment(inputs, self.max_shift, self.flip, self.generator, self.data.black)
            yield inputs, targets
