"""Draws in a subspace, and what is known of how they came about."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from typing_extensions import Self

from lowrank_bdl.errors import CheckpointError, ShapeError
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.subspaces.diagnostics import effective_sample_size, split_rhat

KIND = "subspace draws"
_OPTIONAL = ("accept", "trace", "location", "scale_tril")
_VARIATIONAL = ("variational", "normalizing flow")


@dataclass(frozen=True, eq=False, repr=False)
class Draws:
    """Coordinates z drawn by any of the methods, with their log-joints and diagnostics.

    Attributes:
        draws: z, shape ``(C, n, k)``: chains, draws of each in the order they were made, coordinates.
        log_joints: log p(data | z) / T + log p(z) of each, shape ``(C, n)`` [nat].
        method: What made them.
        num_evaluations: Full-data likelihoods (and gradients) that were computed, burn-in and warm-up included.
        seconds: Wall time, that of interrupted parts included [s].
        accept: Share of proposals that were accepted at each draw, shape ``(C, n)``; None where nothing is proposed.
        trace: The objective at each step of an optimization [nat]: the ELBO, or the log-joint of a MAP estimate.
        location: Mean ``(k,)`` of the Gaussian that was fitted, if one was.
        scale_tril: Cholesky factor ``(k, k)`` of its covariance.
        settings: What the method was called with, as JSON values.

    Raises:
        ShapeError: If a shape is wrong, or there is no draw.

    Example:
        >>> draws = Draws(torch.zeros(2, 5, 3), torch.zeros(2, 5), "by hand")
        >>> draws
        Draws(method='by hand', chains=2, draws=5, rank=3, evaluations=0, seconds=0.0)
        >>> draws.flat.shape
        torch.Size([10, 3])
    """

    draws: Tensor
    log_joints: Tensor
    method: str
    num_evaluations: int = 0
    seconds: float = 0.0
    accept: "Tensor | None" = None
    trace: "Tensor | None" = None
    location: "Tensor | None" = None
    scale_tril: "Tensor | None" = None
    settings: "dict[str, Any]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.draws.ndim != 3 or 0 in self.draws.shape[:2]:
            raise ShapeError(f"draws must have shape (C, n, k) with C, n >= 1; got {tuple(self.draws.shape)}.")
        for name in ("log_joints", "accept"):
            values = getattr(self, name)
            if values is not None and values.shape != self.draws.shape[:2]:
                raise ShapeError(f"{name} must have shape {tuple(self.draws.shape[:2])}; got {tuple(values.shape)}.")
        if (self.location is None) != (self.scale_tril is None):
            raise ShapeError("a fitted Gaussian needs both location and scale_tril; got one of them.")

    @property
    def num_chains(self) -> int:
        """C."""
        return self.draws.shape[0]

    @property
    def num_samples(self) -> int:
        """n, the draws of each chain."""
        return self.draws.shape[1]

    @property
    def rank(self) -> int:
        """K."""
        return self.draws.shape[2]

    @property
    def flat(self) -> Tensor:
        """All draws, shape ``(C n, k)``, one chain after the other."""
        return self.draws.flatten(0, 1)

    @property
    def mean(self) -> Tensor:
        """The mean of the draws, shape ``(k,)``."""
        return self.flat.mean(0)

    @property
    def covariance(self) -> Tensor:
        """The covariance of the draws, shape ``(k, k)``, divisor C n - 1; needs two draws."""
        return torch.cov(self.flat.mT).reshape(self.rank, self.rank)

    @property
    def elbo(self) -> "Tensor | None":
        """The trace of a variational method, with every constant of the KL divergence [nat]; None for others."""
        return self.trace if self.method in _VARIATIONAL else None

    @property
    def distribution(self) -> "MultivariateNormal | None":
        """The fitted Gaussian q(z), if one was fitted."""
        if self.location is None or self.scale_tril is None:
            return None
        return MultivariateNormal(self.location, scale_tril=self.scale_tril)

    def ess(self) -> Tensor:
        """Return the effective sample size of each coordinate, shape ``(k,)``.

        See :func:`~lowrank_bdl.subspaces.diagnostics.effective_sample_size`.
        """
        return effective_sample_size(self.draws)

    def rhat(self) -> Tensor:
        """Return R-hat of each coordinate, shape ``(k,)``.

        See :func:`~lowrank_bdl.subspaces.diagnostics.split_rhat`.
        """
        return split_rhat(self.draws)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically.

        Args:
            path: The file; replaced if it exists.

        Raises:
            TypeError: If the settings are not JSON.
            OSError: If the file cannot be written.
        """
        tensors = {"draws": self.draws, "log_joints": self.log_joints}
        tensors |= {name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        facts = {"method": self.method, "num_evaluations": self.num_evaluations, "seconds": self.seconds}
        write_tensors(path, KIND, tensors, {**facts, "settings": self.settings})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Self:
        """Read what :meth:`save` wrote; nothing is unpickled.

        Args:
            path: The file.
            device: Where the tensors go; the CPU if None.

        Raises:
            CheckpointError: If the file is truncated, foreign, or contradicts itself.
            FileNotFoundError: If there is no such file.
        """
        tensors, metadata = read_tensors(path, KIND, ("draws", "log_joints"), device)
        try:
            return cls(tensors.pop("draws"), tensors.pop("log_joints"), **{**tensors, **metadata})
        except (ShapeError, TypeError) as error:
            raise CheckpointError(f"{os.fspath(path)} contradicts itself: {error}") from error

    def __repr__(self) -> str:
        size = f"chains={self.num_chains}, draws={self.num_samples}, rank={self.rank}"
        return f"Draws(method={self.method!r}, {size}, evaluations={self.num_evaluations}, seconds={self.seconds:.1f})"
