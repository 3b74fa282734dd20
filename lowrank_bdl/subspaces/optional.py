"""Packages of the experiments extra, imported where they are used, and torch's global randomness lent to them."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def import_optional(name: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        name: Dotted name.
        purpose: What it is needed for.

    Returns:
        The module.

    Raises:
        ImportError: Names the extra that brings the package.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {name.split('.')[0]}; pip install 'lowrank-bdl[experiments]' brings it."
        ) from error


@contextmanager
def lent(generator: torch.Generator) -> Iterator[None]:
    """Let code that draws from torch's global generator on the CPU draw from this one, for a ``with`` block.

    Args:
        generator: On the CPU; goes on from where the block leaves it. The global one is put back.

    Yields:
        None.

    Raises:
        ValueError: If the generator is on another device.

    Example:
        >>> mine, before = torch.Generator().manual_seed(0), torch.get_rng_state()
        >>> with lent(mine):
        ...     first = torch.rand(1)
        >>> torch.equal(first, torch.rand(1, generator=torch.Generator().manual_seed(0)))
        True
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    if generator.device.type != "cpu":
        raise ValueError(f"the generator must be on the CPU, where the coordinates are moved; got {generator.device}.")
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(torch.get_rng_state())
