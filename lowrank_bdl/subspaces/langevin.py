r"""Langevin dynamics in subspace coordinates: SGLD and SGHMC on the log-joint, of all data or of minibatches.

With the potential :math:`U(z) = -\log p(z, \mathcal D)` both have the posterior as their law up to the step's
discretisation and the noise of minibatches, O(lr).
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.subspaces.chains import Chains, CountedTarget, Kernel, State, normals, run_chains
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.log_joint import Target


class Langevin(Kernel):
    """One step of each of C chains; momentum 0 is SGLD.

    Args:
        name: The method.
        lr: Step size η, > 0.
        momentum: β in [0, 1).
        minibatch: Estimate gradients from a batch at random.
    """

    def __init__(self, name: str, lr: float, momentum: float, minibatch: bool) -> None:
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive and finite; got {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {momentum}.")
        self.name = name  # type: ignore[misc]
        self.lr, self.momentum, self.exact = lr, momentum, not minibatch

    def settings(self) -> dict[str, Any]:
        """Return the step size, the momentum and where gradients come from."""
        return {"lr": self.lr, "momentum": self.momentum, "minibatch": not self.exact}

    def start(self, z: Tensor, target: CountedTarget, generators: Sequence[torch.Generator]) -> State:
        """Evaluate the first gradients; velocities start at 0."""
        value, gradient = target.gradient(z, None if self.exact else generators)
        return {"z": z, "log_likelihood": value, "gradient": gradient, "velocity": torch.zeros_like(z)}

    def step(self, state: State, target: CountedTarget, generators: Sequence[torch.Generator]) -> tuple[State, Tensor]:
        """Move by the gradient, the momentum and the noise that its friction needs."""
        noise = math.sqrt(2 * (1 - self.momentum) * self.lr) * normals((target.rank,), generators)
        velocity = self.momentum * state["velocity"] + self.lr * state["gradient"] + noise
        z = state["z"] + velocity
        value, gradient = target.gradient(z, None if self.exact else generators)
        moved = {"z": z, "log_likelihood": value, "gradient": gradient, "velocity": velocity}
        return moved, torch.ones_like(value)


@exact
def sgld(
    log_joint: Target,
    num_samples: int,
    *,
    lr: float,
    minibatch: bool = False,
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
    r"""Sample the posterior in a subspace by (stochastic gradient) Langevin dynamics.

    .. math:: z \leftarrow z + \eta \nabla \log p(z, \mathcal D) + \sqrt{2 \eta} \; \xi, \qquad \xi \sim N(0, I)

    Nothing is accepted or refused, so the law is that of the posterior up to O(η).

    Args:
        log_joint: As for :func:`~lowrank_bdl.subspaces.elliptical_slice.elliptical_slice`, differentiable in z.
        num_samples: n, the draws of each chain.
        lr: η > 0 [z² / nat], well below the smallest variance of the posterior.
        minibatch: Estimate gradients from one batch at random a step and chain; the log-joint then needs
            ``estimate_log_likelihood(z, generator)``. Their noise widens the law; recorded log-joints are estimates.
        num_chains: C.
        burn_in: Steps that are thrown away first.
        thin: Steps for each draw.
        initial: Where chains start: ``(k,)`` or ``(C, k)``; ``"prior"``; None: z = 0.
        generator: Seeds each chain's generator, and says where chains live; None takes torch's global generator.
        progress: Show a progress bar.
        checkpoint: A file (safetensors) for the state of the chains, written atomically.
        checkpoint_every: Steps between two writes; it is also written at the end.
        resume: Go on from ``checkpoint`` if it is there, to the last bit.

    Returns:
        :class:`~lowrank_bdl.subspaces.draws.Draws`, float64.

    Raises:
        ValueError: If an argument is out of range, or ``resume`` comes without a file.
        TypeError: If ``minibatch`` is asked of a log-joint that cannot.
        NonFiniteError: If the log-likelihood is not finite at the start, or a chain diverges.
        CheckpointError: If the file is damaged, of other settings, or of another log-likelihood.

    Cost: a likelihood and gradient a step and chain, or those of a batch.

    Source: Welling and Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics" (ICML 2011), eq. 4, with
    step :math:`\epsilon = 2 \eta`.

    Example:
        >>> from lowrank_bdl.subspaces.log_joint import gaussian_log_prior
        >>> class Target:  # posterior N(2.4, 0.8)
        ...     rank, prior_std = 1, 2.0
        ...     def log_likelihood(self, z):
        ...         return -(z - 3).square().sum(-1) / 2
        ...     def log_prior(self, z):
        ...         return gaussian_log_prior(z, 2.0)
        >>> seed = torch.Generator().manual_seed(0)
        >>> draws = sgld(Target(), 20, lr=0.05, num_chains=100, burn_in=60, thin=20, generator=seed)
        >>> abs(draws.mean.item() - 2.4) < 0.2
        True
    """
    chains = Chains(
        Langevin("SGLD", lr, 0.0, minibatch), log_joint, num_samples, num_chains, burn_in, thin, initial, generator
    )
    return run_chains(
        chains, progress=progress, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume
    )


@exact
def sghmc(
    log_joint: Target,
    num_samples: int,
    *,
    lr: float,
    momentum: float = 0.9,
    minibatch: bool = False,
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
    r"""Sample the posterior in a subspace by (stochastic gradient) Hamiltonian Monte Carlo with friction.

    .. math::
        v \leftarrow \beta v + \eta \nabla \log p(z, \mathcal D) + \sqrt{2 (1 - \beta) \eta} \; \xi,
        \qquad z \leftarrow z + v

    Momentum 0 is :func:`sgld`; the law is that of the posterior up to O(η).

    Args:
        log_joint: As in :func:`sgld`.
        num_samples: n, the draws of each chain.
        lr: η > 0 [z² / nat].
        momentum: β in [0, 1); 1 − β is the friction.
        minibatch: As in :func:`sgld`.
        num_chains: C.
        burn_in: Steps that are thrown away first.
        thin: Steps for each draw.
        initial: As in :func:`sgld`.
        generator: As in :func:`sgld`.
        progress: Show a progress bar.
        checkpoint: As in :func:`sgld`.
        checkpoint_every: As in :func:`sgld`.
        resume: As in :func:`sgld`.

    Returns:
        :class:`~lowrank_bdl.subspaces.draws.Draws`, float64.

    Raises:
        ValueError: As in :func:`sgld`.
        TypeError: As in :func:`sgld`.
        NonFiniteError: As in :func:`sgld`.
        CheckpointError: As in :func:`sgld`.

    Cost: as for :func:`sgld`.

    Source: Chen, Fox and Guestrin, "Stochastic Gradient Hamiltonian Monte Carlo" (ICML 2014), eq. 15.

    Example:
        >>> from lowrank_bdl.subspaces.log_joint import gaussian_log_prior
        >>> class Target:  # posterior N(0, 0.8)
        ...     rank, prior_std = 1, 2.0
        ...     def log_likelihood(self, z):
        ...         return -z.square().sum(-1) / 2
        ...     def log_prior(self, z):
        ...         return gaussian_log_prior(z, 2.0)
        >>> seed = torch.Generator().manual_seed(0)
        >>> draws = sghmc(Target(), 10, lr=0.05, num_chains=100, burn_in=40, thin=10, generator=seed)
        >>> abs(draws.covariance.item() - 0.8) < 0.2
        True
    """
    chains = Chains(
        Langevin("SGHMC", lr, momentum, minibatch),
        log_joint,
        num_samples,
        num_chains,
        burn_in,
        thin,
        initial,
        generator,
    )
    return run_chains(
        chains, progress=progress, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume
    )
