"""Training batches of two kinds of images, with and without labels, each image in two random views."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.augmentation import augment
from experiments.common import SettingsError
from experiments.datasets.splits import LabelledImages, Split
from lowrank_bdl.training.consistency import UNLABELLED

_LABELLED_SEED = 5_000_011  # the choice of images must not share its random numbers with anything else of a seed


@dataclass(frozen=True)
class Stream:
    """Images, how many of them are in a batch, and how they are shifted and flipped.

    Attributes:
        images: Held in memory.
        batch_size: Of this kind in a batch.
        max_shift: Largest shift [pixels].
        flip: Whether an image is mirrored with probability 1/2.
        fill: What comes in from the side, one number a channel.
    """

    images: Split
    batch_size: int
    max_shift: int = 0
    flip: bool = False
    fill: tuple[float, ...] = (0.0,)

    def view(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images of these indices as they are seen once."""
        images = self.images.inputs[index.to(self.images.inputs.device)]
        if self.max_shift or self.flip:
            return augment(images, self.max_shift, self.flip, generator, self.fill)
        return images

    def views(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Return two views of each, (2, B, C, H, W)."""
        return torch.stack([self.view(index, generator), self.view(index, generator)])

    def endless(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Give the indices of one batch after another, in one random order of all images after another.

        Where there are fewer images than fit into a batch, some are in it twice.
        """
        waiting = torch.empty(0, dtype=torch.int64)
        while True:
            while len(waiting) < self.batch_size:
                waiting = torch.cat([waiting, torch.randperm(len(self.images), generator=generator)])
            yield waiting[: self.batch_size]
            waiting = waiting[self.batch_size :]


@dataclass(frozen=True)
class TwoStreams:
    """An epoch: one pass over the images without labels, as many with labels to each batch as it takes.

    Batches are (views (2, N, C, H, W), targets (N,)), labelled images first, `UNLABELLED` for the others, whose labels
    are never read. Meant to be iterated once; a function of the generator's state alone. The rest of the images
    without labels that does not fill a batch is left out, another one in each epoch.

    Attributes:
        labelled: Images with labels.
        unlabelled: Those without.
        generator: A CPU generator.
        labels_alone: Leave the images without labels out, and the number of batches as it is.
    """

    labelled: Stream
    unlabelled: Stream
    generator: torch.Generator
    labels_alone: bool = False

    def __len__(self) -> int:
        return len(self.unlabelled.images) // self.unlabelled.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.unlabelled.images), generator=self.generator)
        chunks = order.split(self.unlabelled.batch_size)[: len(self)]
        for index, chunk in zip(self.labelled.endless(self.generator), chunks, strict=False):
            views = self.labelled.views(index, self.generator)
            targets = self.labelled.images.targets[index.to(self.labelled.images.targets.device)]
            if not self.labels_alone:
                others = self.unlabelled.views(chunk, self.generator)
                views = torch.cat([views, others], dim=1)
                targets = torch.cat([targets, targets.new_full((len(chunk),), UNLABELLED)])
            yield views, targets


def in_memory(images: LabelledImages, what: str) -> Split:
    """Return images that are held in memory.

    Raises:
        SettingsError: If they are not.
    """
    if not isinstance(images, Split):
        raise SettingsError(f"{what} must fit into memory: a folder of photographs is not supported here")
    return images


def choose_labelled(targets: Tensor, num_labels: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose images whose labels are used, equally many of each class, and return their indices and all others'.

    Args:
        targets: Labels of all images, (N,).
        num_labels: A multiple of the number of classes.
        num_classes: Number of classes.
        seed: Decides which.

    Returns:
        Indices of the chosen, (num_labels,), and of the others, both rising.

    Raises:
        SettingsError: If the number does not fit.
    """
    share, rest = divmod(num_labels, num_classes)
    if rest or share < 1:
        raise SettingsError(f"--n_labels must be a multiple of {num_classes}, the number of classes; got {num_labels}")
    targets = targets.cpu()
    counts = targets.bincount(minlength=num_classes)
    if share > int(counts.min()):
        raise SettingsError(f"--n_labels {num_labels} takes {share} images of each class; one has {int(counts.min())}")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(_LABELLED_SEED + seed))
    shuffled = targets[order]
    chosen = torch.cat([order[shuffled == label][:share] for label in range(num_classes)]).sort().values
    others = torch.ones(len(targets), dtype=torch.bool)
    others[chosen] = False
    return chosen, others.nonzero().squeeze(-1)
