"""Slice sampling one coordinate after the other, with the prior in the log-joint."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.subspaces.chains import (
    Chains,
    CountedTarget,
    Kernel,
    State,
    UniformStream,
    require_counts,
    run_chains,
)
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.log_joint import Target
from lowrank_bdl.subspaces.slice_bracket import shrink


class CoordinateSlice(Kernel):
    """One sweep over the coordinates of each of C chains.

    Args:
        width: First width of the brackets, > 0.
        max_widths: Most widths that a bracket grows to, >= 1.
    """

    name = "coordinate slice"

    def __init__(self, width: float, max_widths: int) -> None:
        if not 0 < width < math.inf:
            raise ValueError(f"width must be positive and finite; got {width}.")
        require_counts(max_widths=(max_widths, 1))
        self.width, self.max_widths = width, max_widths

    def settings(self) -> dict[str, Any]:
        """Return width and limit."""
        return {"width": self.width, "max_widths": self.max_widths}

    def step(self, state: State, target: CountedTarget, generators: Sequence[torch.Generator]) -> tuple[State, Tensor]:
        """Update every coordinate in turn."""
        z, likelihood = state["z"].clone(), state["log_likelihood"]
        proposals = torch.zeros_like(likelihood)
        for coordinate in range(target.rank):
            likelihood, count = self._update(z, likelihood, coordinate, target, UniformStream(generators))
            proposals += count
        return {"z": z, "log_likelihood": likelihood}, target.rank / proposals

    def _update(
        self, z: Tensor, likelihood: Tensor, coordinate: int, target: CountedTarget, stream: UniformStream
    ) -> tuple[Tensor, Tensor]:
        """Update one coordinate of z in place; return the log-likelihoods, and how many positions were proposed."""

        def evaluate(active: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
            moved = z[active]
            moved[:, coordinate] = where
            values = target.log_likelihood(moved).detach()
            return values + target.log_prior(moved), values

        centre = z[:, coordinate].clone()
        threshold = likelihood + target.log_prior(z) + (1 - stream.take()).log()
        low = centre - self.width * stream.take()
        steps = (self.max_widths * stream.take()).floor()
        ends = [low, low + self.width]
        for end, sign, left in ((ends[0], -1, steps), (ends[1], 1, self.max_widths - 1 - steps)):
            active = (left > 0).nonzero().squeeze(-1)
            while len(active):
                inside = evaluate(active, end[active])[0] > threshold[active]
                active = active[inside]
                end[active] += sign * self.width
                left[active] -= 1
                active = active[left[active] > 0]
        first = ends[0] + stream.take() * (ends[1] - ends[0])
        found = shrink(evaluate, threshold, first, centre, ends[0], ends[1], stream)
        z[:, coordinate] = found.where.where(found.moved, centre)
        return found.payload.where(found.moved, likelihood), found.proposals


@exact
def coordinate_slice(
    log_joint: Target,
    num_samples: int,
    *,
    width: float | None = None,
    max_widths: int = 16,
    num_chains: int = 1,
    burn_in: int = 0,
    thin: int = 1,
    initial: "Tensor | str | None" = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
) -> Draws:
    """Sample the posterior in a subspace by slice sampling each coordinate in turn: one step is one sweep.

    Along a coordinate, a bracket of the given width is laid at random around the present value and stepped out until
    both ends lie below the slice; positions are drawn from it, which shrinks, until one lies on the slice. The slice is
    of the log-joint: likelihood over temperature, and prior.

    Args:
        log_joint: As for :func:`~lowrank_bdl.subspaces.elliptical_slice.elliptical_slice`.
        num_samples: n, the draws of each chain.
        width: First width of the brackets; None: the prior's standard deviation.
        max_widths: Most widths that a bracket grows to.
        num_chains: C.
        burn_in: Sweeps that are thrown away first.
        thin: Sweeps for each draw.
        initial: Where chains start: ``(k,)`` or ``(C, k)``; ``"prior"``; None: z = 0.
        generator: Seeds each chain's generator, and says where chains live; None takes torch's global generator.
        progress: Show a progress bar.
        checkpoint: A file (safetensors) for the state of the chains, written atomically.
        checkpoint_every: Steps between two writes; it is also written at the end.
        resume: Go on from ``checkpoint`` if it is there, to the last bit.

    Returns:
        :class:`~lowrank_bdl.subspaces.draws.Draws`, float64; ``accept`` is k over the proposals of each sweep, not
        counting those that widen brackets.

    Raises:
        ValueError: If a count or the width is too small, or ``resume`` comes without a file.
        ShapeError: If ``initial`` has another shape, or the log-likelihood gives one.
        NonFiniteError: If the log-likelihood is not finite at the start.
        CheckpointError: If the file is damaged, of other settings, or of another log-likelihood.

    Cost: at least 3 likelihood evaluations a coordinate, step and chain.

    Source: Neal, "Slice sampling", Annals of Statistics 31 (2003), figures 3 and 5.

    Example:
        >>> from lowrank_bdl.subspaces.log_joint import gaussian_log_prior
        >>> class Target:  # posterior N(2.4, 0.8)
        ...     rank, prior_std = 1, 2.0
        ...     def log_likelihood(self, z):
        ...         return -(z - 3).square().sum(-1) / 2
        ...     def log_prior(self, z):
        ...         return gaussian_log_prior(z, 2.0)
        >>> draws = coordinate_slice(Target(), 100, num_chains=8, generator=torch.Generator().manual_seed(0))
        >>> abs(draws.mean.item() - 2.4) < 0.2
        True
    """
    kernel = CoordinateSlice(log_joint.prior_std if width is None else width, max_widths)
    chains = Chains(kernel, log_joint, num_samples, num_chains, burn_in, thin, initial, generator)
    return run_chains(
        chains, progress=progress, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume
    )
