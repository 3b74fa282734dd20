"""Training images as a network sees them."""

import torch

from experiments.datasets import load_dataset
from experiments.training_data import AsTrained, TrainingBatches


def test_the_images_for_batch_norm_are_shifted_and_the_same_at_every_pass() -> None:
    data = load_dataset("digits")
    source = AsTrained(data.train, 1, False, data.black).first(50)
    loader = source.batches(20)
    first, second = (torch.cat([x for x, _ in loader]) for _ in range(2))
    plain, targets = data.train.inputs[:50], data.train.targets[:50]
    assert len(loader) == 3
    assert len(source) == 50
    assert torch.equal(first, second)
    assert torch.equal(torch.cat([y for _, y in loader]), targets)
    assert not torch.equal(first, plain)
    for image, original in zip(first, plain, strict=True):
        padded = torch.nn.functional.pad(original, (1, 1, 1, 1), value=data.black[0])
        shifts = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
        assert any(torch.equal(image, shifted) for shifted in shifts)


def test_images_trained_on_as_they_are_recalibrate_as_they_are() -> None:
    data = load_dataset("digits")
    source = AsTrained(data.train, 0, False, data.black)
    assert torch.equal(torch.cat([x for x, _ in source.batches(64)]), data.train.inputs)
    assert source.shape == data.train.shape
    assert torch.equal(source.targets, data.train.targets)


def test_training_batches_are_a_function_of_the_generator() -> None:
    data = load_dataset("digits")

    def epoch(seed: int) -> torch.Tensor:
        batches = TrainingBatches(data, 32, torch.Generator().manual_seed(seed), 1, True)
        found = [x for x, _ in batches]
        assert len(found) == len(batches)
        return torch.cat(found)

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4))
