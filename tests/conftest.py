"""Hypothesis profiles, shared fixtures, and the order of the suite."""

import os
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
# Derandomised unless asked for (HYPOTHESIS_PROFILE=explore pytest): a red suite must be red on the next run too.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow tests last, so that a fast failure shows first (the sort is stable)."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_configure(config: pytest.Config) -> None:
    """Draw without a display, and compute on one thread: tensors this small only wait for a second one."""
    os.environ["MPLBACKEND"] = "Agg"
    torch.set_num_threads(int(os.environ.get("TEST_NUM_THREADS", "1")))


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the library must give the same answers on; CUDA is skipped aloud where there is none."""
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_generator() -> Callable[..., torch.Generator]:
    """``make_generator(seed, device="cpu")``: as many independent, seeded generators as a test needs."""

    def make(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    return make


@pytest.fixture
def terminal(capsys, monkeypatch):
    """Return capsys, with a stderr that says it is a terminal, so that progress bars are drawn."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    return capsys
