"""Shifted and mirrored images are windows of the padded ones, all equally likely."""

import pytest
import torch
from torch import nn

from experiments.augmentation import augment


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    batch = torch.arange(1.0, 5 * 2 * 3 * 4 + 1).view(5, 2, 3, 4)
    found = augment(batch, 1, True, torch.Generator().manual_seed(0))
    candidates = []
    for flipped in (False, True):
        for down in range(3):
            for right in range(3):
                window = nn.functional.pad(batch, (1, 1, 1, 1))[..., down : down + 3, right : right + 4]
                candidates.append(window.flip(-1) if flipped else window)
    stacked = torch.stack(candidates)  # (18, 5, 2, 3, 4)
    matches = (stacked == found).flatten(2).all(-1)  # (18, 5)
    assert matches.any(0).all()
    many = augment(batch[:1].expand(2000, -1, -1, -1), 1, True, torch.Generator().manual_seed(1))
    counts = (stacked[:, 0].unsqueeze(1) == many).flatten(2).all(-1).sum(1)  # (18,)
    # all 18 outcomes are equally likely: chi-square on 17 degrees of freedom is above 66 with probability 1e-7
    assert counts.sum() == 2000 and ((counts - 2000 / 18).square() / (2000 / 18)).sum() < 66
    assert torch.equal(augment(batch, 0, False, torch.Generator()), batch)


def test_padding_takes_the_given_value_in_each_channel() -> None:
    batch = torch.ones(40, 2, 3, 3)
    found = augment(batch, 2, False, torch.Generator().manual_seed(0), fill=(-5.0, 7.0))
    assert found[:, 0].unique().tolist() == [-5.0, 1.0] and found[:, 1].unique().tolist() == [1.0, 7.0]
    zero = augment(batch, 2, False, torch.Generator().manual_seed(0))
    assert torch.equal(zero == 1, found == 1) and zero.unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("size", [(5, 7), (28, 28)])
def test_every_device_gets_the_same_images(device: torch.device, size: tuple[int, int]) -> None:
    batch = torch.randn(6, 3, *size, generator=torch.Generator().manual_seed(0))
    here = augment(batch, 4, True, torch.Generator().manual_seed(1))
    there = augment(batch.to(device), 4, True, torch.Generator().manual_seed(1))
    assert there.device.type == device.type and torch.equal(there.cpu(), here)
    assert here.shape == batch.shape and here.is_contiguous()


def test_the_generator_decides_and_nothing_else() -> None:
    batch, before = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    first, second = augment(batch, 1, True, generator), augment(batch, 1, True, generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, augment(batch, 1, True, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), before)
