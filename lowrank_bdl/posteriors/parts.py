"""What posteriors made of other posteriors ask of their parts."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from lowrank_bdl.parameters.layout import ParameterLayout


class Density(Protocol):
    """A distribution over vectors with a density."""

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``(D,)`` [parameter]."""

    @property
    def stddev(self) -> Tensor:
        """Marginal standard deviations, shape ``(D,)`` [parameter]."""

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw, shape ``(n, D)``."""

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log-density of ``theta``, shape ``(*S, D)``, as float64 of shape ``(*S,)`` [nat]."""


class Component(Density, Protocol):
    """What a mixture is made of: a Gaussian, a posterior of independent blocks, or one of your own."""

    @property
    def layout(self) -> ParameterLayout | None:
        """What the vectors hold; None if unknown."""


class Block(Density, Protocol):
    """A Gaussian over a part of the weights; to be saved it must be a ``StoredPosterior`` too."""

    @property
    def covariance(self) -> LinearOperator:
        """The covariance, D x D [parameter²]."""

    def entropy(self) -> Tensor:
        """Return the differential entropy, a float64 scalar [nat]."""

    def to(self, *args: Any, **kwargs: Any) -> "Block":
        """Return the block on another device or in another dtype."""


DENSITY = ("mean", "stddev", "sample", "log_prob")
COMPONENT = (*DENSITY, "layout")
BLOCK = (*DENSITY, "covariance", "entropy", "to")


def means_of(parts: Sequence[Density], what: str, members: Sequence[str]) -> list[Tensor]:
    """Return the mean of every part, after checking that all have what is asked of them, and one dtype and device.

    Args:
        parts: Posteriors, maybe.
        what: What one of them is called.
        members: Names of the attributes and methods that each must have.

    Raises:
        TypeError: If there is a part that lacks one, or dtypes or devices differ.
    """
    for number, part in enumerate(parts):
        lacking = [name for name in members if name not in dir(part)]  # looks at properties without computing them
        if lacking:
            raise TypeError(f"{what} {number} is of class {type(part).__name__}, which lacks {', '.join(lacking)}.")
    means = [part.mean for part in parts]
    found = sorted({f"{mean.dtype} on {mean.device}" for mean in means})
    if len(found) > 1:
        raise TypeError(f"{what}s must have one dtype and device; got {', '.join(found)}.")
    return means
