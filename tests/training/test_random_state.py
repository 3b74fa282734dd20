"""Every global generator draws the same after a restore."""

import random

import numpy as np
import torch

from lowrank_bdl.training.random_state import capture, restore


def draws(device: torch.device) -> tuple[float, float, float, float]:
    gauss = random.gauss(0, 1)
    normal = float(np.random.standard_normal())  # noqa: NPY002
    return gauss, normal, torch.randn(()).item(), torch.randn((), device=device).item()


def test_all_generators_are_restored(device: torch.device) -> None:
    with torch.random.fork_rng():
        draws(device)  # leaves a second Gaussian in the caches of Python's and NumPy's generators
        state = capture(device)
        first = draws(device)
        assert draws(device) != first
        restore(state, device)
        assert draws(device) == first
