"""Two spirals in the plane: a data set with two classes that a small perceptron learns in seconds, to look at."""

import math

import torch
from torch import Tensor, nn

from experiments.datasets import Datasets, Split

NAME = "two_spirals"
TURNS = 1.5
NOISE = 0.03  # standard deviation of a point around its spiral, of the radius 1


def two_spirals(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw points along two interleaved spirals.

    Args:
        num: How many, half of them (rounded up) of class 0.
        generator: A CPU generator.

    Returns:
        Points (num, 2) in about [-1, 1]^2, and classes (num,), in random order.
    """
    classes = (torch.arange(num) % 2)[torch.randperm(num, generator=generator)]
    radius = torch.rand(num, generator=generator).sqrt()  # evenly along the arm's length
    angle = 2 * math.pi * TURNS * radius + math.pi * classes
    points = radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
    return points + NOISE * torch.randn(num, 2, generator=generator), classes


def load_two_spirals(num_train: int, num_test: int, seed: int, device: torch.device) -> Datasets:
    """Return the data set with a training and a test split, functions of the seed; points are images of (2, 1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for num in (num_train, num_test):
        points, classes = two_spirals(num, generator)
        splits.append(Split(points.view(num, 2, 1, 1).to(device), classes.to(device)))
    return Datasets(NAME, splits[0], None, splits[1], ("first spiral", "second spiral"), details={"seed": seed})


def perceptron(width: int, seed: int, device: torch.device) -> nn.Module:
    """Return a perceptron with three hidden layers for points of the plane; its weights are a function of the seed.

    Takes points (N, 2), or (N, 2, 1, 1) as the data set has them.
    """
    torch.manual_seed(seed)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(2, width), nn.ReLU(), *hidden, nn.Linear(width, 2)).to(device)
