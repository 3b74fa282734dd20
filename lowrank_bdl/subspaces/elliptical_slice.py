"""Elliptical slice sampling: no step size, no gradient, every step moves."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.subspaces.chains import Chains, CountedTarget, Kernel, State, UniformStream, normals, run_chains
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.log_joint import Target
from lowrank_bdl.subspaces.slice_bracket import shrink


class EllipticalSlice(Kernel):
    """One step of each of C chains; those that have found their next state wait for the others."""

    name = "elliptical slice"

    def settings(self) -> dict[str, Any]:
        """Nothing but the target decides what the chain does."""
        return {}

    def step(self, state: State, target: CountedTarget, generators: Sequence[torch.Generator]) -> tuple[State, Tensor]:
        """Move along a random ellipse through each state (numbers are those of the paper's figure 2)."""
        z, current = state["z"], state["log_likelihood"]
        direction = target.prior_std * normals((target.rank,), generators)  # 1
        stream = UniformStream(generators)
        threshold = current + (1 - stream.take()).log()  # 2
        angle = 2 * math.pi * stream.take()  # 3

        def at(active: Tensor, angles: Tensor) -> Tensor:
            turn = angles.unsqueeze(-1)
            return z[active] * turn.cos() + direction[active] * turn.sin()  # 4

        def evaluate(active: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
            values = target.log_likelihood_above(at(active, angles), threshold[active])
            return values, values

        found = shrink(evaluate, threshold, angle, torch.zeros_like(angle), angle - 2 * math.pi, angle, stream)
        everyone = torch.arange(len(z), device=z.device)
        next_z = torch.where(found.moved.unsqueeze(-1), at(everyone, found.where), z)
        return {"z": next_z, "log_likelihood": found.payload.where(found.moved, current)}, 1 / found.proposals


@exact
def elliptical_slice(
    log_joint: Target,
    num_samples: int,
    *,
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
    r"""Sample the posterior in a subspace by elliptical slice sampling.

    From z, with :math:`\nu \sim N(0, s^2 I)` the next state lies on the ellipse
    :math:`z \cos\phi + \nu \sin\phi`: φ is drawn from a bracket that shrinks towards the present state until the
    likelihood is above :math:`u L(z)`, u uniform; such a step leaves prior times likelihood invariant. The
    log-likelihood of the present state is kept, so that a step costs one evaluation for each proposal.

    Chains run side by side, so that one call of the log-likelihood serves all of them; each has a generator of its
    own, and chain c does not depend on how many there are (up to the rounding of a vectorised log-likelihood).

    Args:
        log_joint: What to sample: a :class:`~lowrank_bdl.subspaces.log_joint.LogJoint`, or anything with
            ``log_likelihood(z)`` of ``(S, k)``, ``log_prior(z)``, ``rank`` and ``prior_std``.
        num_samples: n, the draws of each chain.
        num_chains: C.
        burn_in: Steps that are thrown away first.
        thin: Steps for each draw.
        initial: Where chains start: ``(k,)`` or ``(C, k)``; ``"prior"``, drawn from it, as R-hat wants; None: z = 0.
        generator: Seeds each chain's generator, and says where chains live; None takes torch's global generator.
        progress: Show a progress bar.
        checkpoint: A file (safetensors) for the state of the chains, written atomically; size: the draws.
        checkpoint_every: Steps between two writes; it is also written at the end.
        resume: Go on from ``checkpoint`` if it is there, with the draws of an uninterrupted run to the last bit; also
            for more draws than were asked for then. Settings must be the same, and the log-likelihood where the chains
            stand, which is computed once more.

    Returns:
        :class:`~lowrank_bdl.subspaces.draws.Draws`, float64; ``accept`` is one over the proposals of each step.

    Raises:
        ValueError: If a count is too small, or ``resume`` comes without a file.
        ShapeError: If ``initial`` has another shape, or the log-likelihood gives one.
        NonFiniteError: If the log-likelihood is not finite at the start.
        CheckpointError: If the file is damaged, of other settings, or of another log-likelihood.

    Cost: proposals, 1 + O(log of how much the data say) a step and chain, each one likelihood evaluation; of a
    categorical likelihood, one that is refused ends where it falls below the slice, mostly within the first batches.

    Source: Murray, Adams and MacKay, "Elliptical slice sampling" (AISTATS 2010), figure 2; for subspaces Izmailov et
    al. (2019), section 3.3.

    Example:
        >>> from lowrank_bdl.subspaces.log_joint import gaussian_log_prior
        >>> class Target:  # one observation of z at 3 with variance 1, prior N(0, 2²): posterior N(2.4, 0.8)
        ...     rank, prior_std = 1, 2.0
        ...     def log_likelihood(self, z):
        ...         return -(z - 3).square().sum(-1) / 2
        ...     def log_prior(self, z):
        ...         return gaussian_log_prior(z, 2.0)
        >>> draws = elliptical_slice(Target(), 100, num_chains=16, generator=torch.Generator().manual_seed(0))
        >>> abs(draws.mean.item() - 2.4) < 0.15, draws.rhat().item() < 1.03
        (True, True)
    """
    chains = Chains(EllipticalSlice(), log_joint, num_samples, num_chains, burn_in, thin, initial, generator)
    return run_chains(
        chains, progress=progress, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume
    )
