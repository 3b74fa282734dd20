"""Batches of images held in memory."""

import torch

from experiments.datasets import Split


def test_batches_visit_every_image_once() -> None:
    split = Split(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    ordered = [targets.tolist() for _, targets in split.batches(4)]
    assert ordered == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    loader = split.shuffled(4, torch.Generator().manual_seed(0))
    first = [(inputs.flatten().tolist(), targets.tolist()) for inputs, targets in loader]
    assert first == [(inputs.flatten().tolist(), targets.tolist()) for inputs, targets in loader]  # re-iterable
    seen = [target for _, targets in first for target in targets]
    assert len(loader) == len(first) == 3 and sorted(seen) == list(range(10)) and seen != list(range(10))
    assert all(inputs == targets for inputs, targets in first)


def test_the_order_is_a_function_of_the_generator(device: torch.device) -> None:
    split = Split(torch.arange(100.0, device=device).view(100, 1, 1, 1), torch.arange(100, device=device))
    orders = [
        torch.cat([targets for _, targets in split.shuffled(32, torch.Generator().manual_seed(seed))]).tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] == torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()


def test_rotation_is_a_quarter_turn_anticlockwise() -> None:
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    split = Split(image, torch.tensor([7]))
    assert split.rotated().inputs.flatten().tolist() == [2.0, 4.0, 1.0, 3.0]
    assert torch.equal(split.rotated(4).inputs, image) and split.rotated().targets.tolist() == [7]


def test_concatenate_and_first_keep_the_order() -> None:
    parts = [Split(torch.full((n, 1, 2, 2), float(n)), torch.full((n,), n)) for n in (2, 3)]
    whole = Split.concatenate(parts)
    assert whole.targets.tolist() == [2, 2, 3, 3, 3] and whole.shape == (1, 2, 2)
    assert whole.first(3).targets.tolist() == [2, 2, 3] and whole.first(3).inputs[:, 0, 0, 0].tolist() == [2, 2, 3]
