"""The No-U-Turn sampler, by Pyro, in subspace coordinates."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.linalg.precision import exact
from lowrank_bdl.progress import progress_bar
from lowrank_bdl.subspaces.chains import Chains, CountedTarget, Kernel, State, require_counts, run_chains
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.log_joint import Target
from lowrank_bdl.subspaces.optional import import_optional, lent


class Nuts(Kernel):
    """C chains of Pyro's sampler, each with a step size and mass matrix of its own, found in a warm-up.

    After the warm-up everything that a chain needs is in tensors, and a sampler is made from them: a resumed chain is
    thus the same as one that went on.

    Args:
        warm_up: Steps of adaptation.
        step_size: Where adaptation starts; without a warm-up, what is used.
        target_accept: Acceptance probability that the step size is adapted to.
        max_tree_depth: At most 2 to this power leapfrog steps for a draw.
        full_mass: A full mass matrix, or a diagonal one.
        progress: Show a progress bar of the warm-up.
    """

    name = "NUTS"

    def __init__(
        self,
        warm_up: int,
        step_size: float,
        target_accept: float,
        max_tree_depth: int,
        full_mass: bool,
        progress: bool,
    ) -> None:
        if not 0 < step_size < math.inf:
            raise ValueError(f"step_size must be positive and finite; got {step_size}.")
        if not 0 < target_accept < 1:
            raise ValueError(f"target_accept must be in (0, 1); got {target_accept}.")
        require_counts(burn_in=(warm_up, 0), max_tree_depth=(max_tree_depth, 1))
        self.warm_up, self.step_size, self.target_accept = warm_up, step_size, target_accept
        self.max_tree_depth, self.full_mass, self.progress = max_tree_depth, full_mass, progress
        self._library = import_optional("pyro.infer.mcmc", "nuts")
        self._samplers: list[Any] = []

    def settings(self) -> dict[str, Any]:
        """Return what the warm-up depends on, and the depth."""
        facts = {
            "warm_up": self.warm_up,
            "step_size": self.step_size,
            "target_accept": self.target_accept,
            "full_mass": self.full_mass,
        }
        return {**facts, "max_tree_depth": self.max_tree_depth}

    def start(self, z: Tensor, target: CountedTarget, generators: Sequence[torch.Generator]) -> State:
        """Warm up every chain."""
        ends, sizes, masses = [], [], []
        with progress_bar(
            description="NUTS warm-up", total=len(z) * self.warm_up, unit="step", show=self.progress
        ) as bar:
            for row, generator in zip(z, generators, strict=True):
                with lent(generator):
                    sampler = self._sampler(row, target, self.warm_up, self.step_size, adapt=self.warm_up > 0)
                    for _ in range(self.warm_up):
                        row = sampler.sample({"z": row})["z"]
                        bar.update()
                ends.append(row.detach())
                sizes.append(torch.as_tensor(float(sampler.step_size), dtype=torch.float64, device=z.device))
                masses.append(next(iter(sampler.inverse_mass_matrix.values())).detach())
        state = {"z": torch.stack(ends), "step_size": torch.stack(sizes), "inverse_mass": torch.stack(masses)}
        return {**state, "log_likelihood": target.log_likelihood(state["z"]).detach()}

    def step(self, state: State, target: CountedTarget, generators: Sequence[torch.Generator]) -> tuple[State, Tensor]:
        """Draw once from every chain."""
        if not self._samplers:
            self._samplers = [self._warm(state, number, target) for number in range(len(state["z"]))]
        ends, values, rates = [], [], []
        for sampler, row, generator in zip(self._samplers, state["z"], generators, strict=True):
            before, count = sampler._mean_accept_prob, sampler._t
            with lent(generator):
                ends.append(sampler.sample({"z": row})["z"].detach())
            values.append(-sampler._potential_energy_last.detach())
            rates.append((count + 1) * sampler._mean_accept_prob - count * before)  # Pyro keeps the mean of them
        z = torch.stack(ends)
        likelihood = torch.stack(values) - target.log_prior(z)
        accept = torch.tensor(rates, dtype=torch.float64, device=z.device).clamp(0, 1)
        return {**state, "z": z, "log_likelihood": likelihood}, accept

    def _warm(self, state: State, number: int, target: CountedTarget) -> Any:
        """Make a sampler that adapts no more."""
        sampler = self._sampler(state["z"][number], target, 0, state["step_size"][number].item(), adapt=False)
        sampler.mass_matrix_adapter.inverse_mass_matrix = {("z",): state["inverse_mass"][number]}
        return sampler

    def _sampler(self, z: Tensor, target: CountedTarget, warm_up: int, step_size: float, adapt: bool) -> Any:
        def potential(parameters: dict[str, Tensor]) -> Tensor:
            row = parameters["z"].unsqueeze(0)
            return -(target.log_likelihood(row) + target.log_prior(row))[0]

        sampler = self._library.NUTS(
            potential_fn=potential,
            target_accept_prob=self.target_accept,
            max_tree_depth=self.max_tree_depth,
            full_mass=self.full_mass,
            step_size=step_size,
            adapt_step_size=adapt,
            adapt_mass_matrix=adapt,
        )
        sampler.initial_params = {"z": z.detach()}
        sampler.setup(warm_up)
        return sampler


@exact
def nuts(
    log_joint: Target,
    num_samples: int,
    *,
    num_chains: int = 1,
    burn_in: int = 150,
    thin: int = 1,
    step_size: float = 1.0,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    full_mass: bool = True,
    initial: "Tensor | str | None" = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
) -> Draws:
    r"""Sample the posterior in a subspace by Hamiltonian Monte Carlo that chooses its own path lengths.

    Pyro's NUTS on the potential :math:`-\log p(z, \mathcal D)`, whose gradient goes through the network to z. Step size
    and mass matrix are adapted for ``burn_in`` steps, and then kept. Pyro draws from torch's global generator, which is
    lent each chain's own for the length of a step and put back.

    Args:
        log_joint: As for :func:`~lowrank_bdl.subspaces.elliptical_slice.elliptical_slice`, differentiable in z.
        num_samples: n, the draws of each chain.
        num_chains: C; run in turn, step by step.
        burn_in: Steps of warm-up; below 150 Pyro has few left for the last step size, which may then be too large.
        thin: Steps for each draw.
        step_size: Where the warm-up starts [z]; with ``burn_in=0``, what is used.
        target_accept: Acceptance probability that the step size is adapted to; nearer 1 for hard posteriors.
        max_tree_depth: At most 2 to this power gradients for a draw.
        full_mass: A full mass matrix, k x k, or a diagonal one.
        initial: Where chains start: ``(k,)`` or ``(C, k)``; ``"prior"``; None: z = 0.
        generator: Seeds each chain's generator, on the CPU; None takes torch's global generator.
        progress: Show progress bars.
        checkpoint: A file (safetensors) for the state of the chains, written atomically once the warm-up is over.
        checkpoint_every: Steps between two writes; it is also written at the end.
        resume: Go on from ``checkpoint`` if it is there, to the last bit.

    Returns:
        :class:`~lowrank_bdl.subspaces.draws.Draws`, float64; ``accept`` is the mean acceptance probability along each
        path; evaluations are likelihoods with their gradients.

    Raises:
        ImportError: If Pyro is not installed; names the extra.
        ValueError: If an argument is out of range, or ``resume`` comes without a file.
        ShapeError: If ``initial`` has another shape, or the log-likelihood gives one.
        NonFiniteError: If the log-likelihood is not finite after the warm-up.
        CheckpointError: If the file is damaged, of other settings, or of another log-likelihood.

    Cost: 3 to ``2**max_tree_depth`` likelihoods with gradients a step and chain.

    Source: Hoffman and Gelman, "The No-U-Turn sampler" (JMLR 2014); with multinomial sampling of the path, Betancourt
    (2017), as Pyro has it.
    """
    require_counts(num_chains=(num_chains, 1))
    kernel = Nuts(burn_in, step_size, target_accept, max_tree_depth, full_mass, progress)
    chains = Chains(kernel, log_joint, num_samples, num_chains, 0, thin, initial, generator)
    return run_chains(
        chains, progress=progress, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume
    )
