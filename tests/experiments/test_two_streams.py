"""Which images keep their labels, what an epoch holds, and that the other labels are never seen."""

import pytest
import torch
from torch import Tensor

from experiments.common import SettingsError
from experiments.datasets.splits import Split
from experiments.two_streams import Stream, TwoStreams, choose_labelled, in_memory
from lowrank_bdl.training.consistency import UNLABELLED


def numbered(n: int, first: int = 0, size: int = 2) -> Split:
    """Images of one value each, which is their number; odd numbers are of class 1."""
    values = torch.arange(first, first + n)
    return Split(values.float().view(n, 1, 1, 1).expand(n, 1, size, size).contiguous(), values % 2)


def epoch(seed: int = 0, *, labels_alone: bool = False) -> list[tuple[Tensor, Tensor]]:
    streams = TwoStreams(
        Stream(numbered(3, first=100), 2), Stream(numbered(11), 4), torch.Generator().manual_seed(seed), labels_alone
    )
    batches = list(streams)
    assert len(batches) == len(streams) == 2
    return batches


def test_an_epoch_passes_once_over_the_images_without_labels() -> None:
    seen, labelled = [], []
    for views, targets in epoch():
        assert views.shape == (2, 6, 1, 2, 2) and torch.equal(views[0], views[1])  # nothing is augmented here
        numbers = views[0, :, 0, 0, 0].long()
        assert (targets[2:] == UNLABELLED).all() and torch.equal(targets[:2], numbers[:2] % 2)
        seen += numbers[2:].tolist()
        labelled += numbers[:2].tolist()
    assert len(set(seen)) == 8 and set(seen) < set(range(11))
    assert set(labelled[:3]) == {100, 101, 102}  # in turn, all of them before one comes again
    assert all(torch.equal(a[0], b[0]) for a, b in zip(epoch(), epoch(), strict=True))
    assert not torch.equal(epoch(0)[0][0], epoch(1)[0][0])


def test_labels_alone() -> None:
    for views, targets in epoch(labels_alone=True):
        assert views.shape == (2, 2, 1, 2, 2) and (targets != UNLABELLED).all()


def test_labelled_images_repeat_where_they_do_not_fill_a_batch() -> None:
    batches = Stream(numbered(3), 7).endless(torch.Generator().manual_seed(0))
    drawn = torch.cat([next(batches) for _ in range(3)])
    assert drawn.bincount().tolist() == [7, 7, 7]


def test_the_two_views_of_an_image_are_shifted_apart() -> None:
    images = Split(torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1).long())
    stream = Stream(images, 50, max_shift=2, flip=True, fill=(-3.0,))
    views = stream.views(torch.zeros(50, dtype=torch.int64), torch.Generator().manual_seed(1))
    assert views.shape == (2, 50, 1, 8, 8)
    differing = (views[0] != views[1]).flatten(1).any(1).sum().item()
    assert differing > 40  # of 50 pairs one in 50 agrees on average
    assert (views == -3.0).any() and set(views.unique().tolist()) <= {-3.0, *images.inputs.unique().tolist()}


def test_a_balanced_choice() -> None:
    targets = torch.arange(60) % 3
    chosen, others = choose_labelled(targets, 12, 3, seed=4)
    assert targets[chosen].bincount().tolist() == [4, 4, 4]
    assert sorted([*chosen.tolist(), *others.tolist()]) == list(range(60))
    assert torch.equal(chosen, choose_labelled(targets, 12, 3, seed=4)[0])
    assert not torch.equal(chosen, choose_labelled(targets, 12, 3, seed=5)[0])


def test_refusals() -> None:
    targets = torch.tensor([0] * 9 + [1] * 3)
    with pytest.raises(SettingsError, match="--n_labels must be a multiple of 2, the number of classes; got 5"):
        choose_labelled(targets, 5, 2, 0)
    with pytest.raises(SettingsError, match="--n_labels 8 takes 4 images of each class; one has 3"):
        choose_labelled(targets, 8, 2, 0)
    with pytest.raises(SettingsError, match="--dataset must fit into memory"):
        in_memory(object(), "--dataset")  # type: ignore[arg-type]
