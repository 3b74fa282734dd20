"""The loop that every chain shares: starts, burn-in, thinning, records, checkpoints."""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import generator_on, sums_device, to_float64
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.progress import progress_bar
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.log_joint import Target

KIND = "subspace chains"
SAME_TARGET = 1e-3
"""A log-likelihood may differ from the one recorded by this share of it, or as many nats: rounding, not new data."""

State: TypeAlias = dict[str, Tensor]


class CountedTarget:
    """A target that counts, and checks what it is given back.

    Args:
        target: What is sampled.

    Attributes:
        num_evaluations: Coordinates whose likelihood was computed so far.
        facts: What is known of the target, as JSON values.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self.rank, self.prior_std = target.rank, target.prior_std
        self.num_evaluations = 0
        temperature = getattr(target, "temperature", None)
        self.facts = {"rank": target.rank, "prior_std": target.prior_std, "temperature": temperature}

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Return log-likelihoods of ``(S, k)`` coordinates, shape ``(S,)``, float64."""
        return self._counted(z, self._target.log_likelihood(z))

    def log_likelihood_above(self, z: Tensor, thresholds: Tensor) -> Tensor:
        """Return log-likelihoods of ``(S, k)`` coordinates, where above ``(S,)`` thresholds; else what is not above.

        A target may save work by a method of this name: the likelihood need not be computed to its end.
        """
        shortcut = getattr(self._target, "log_likelihood_above", None)
        found = shortcut(z, thresholds) if callable(shortcut) else self._target.log_likelihood(z)
        return self._counted(z, found).detach()

    def _counted(self, z: Tensor, values: Tensor) -> Tensor:
        self.num_evaluations += len(z)
        if values.shape != z.shape[:1]:
            raise ShapeError(f"log_likelihood must give {(len(z),)} of z {tuple(z.shape)}; got {tuple(values.shape)}.")
        return to_float64(values)

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the prior's log-densities of ``(S, k)`` coordinates, shape ``(S,)``, float64."""
        return to_float64(self._target.log_prior(z))

    def estimate(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Return estimates of :meth:`log_likelihood` from one batch, which ``generator`` chooses.

        Raises:
            TypeError: If the target has no ``estimate_log_likelihood(z, generator)``.
        """
        estimate = getattr(self._target, "estimate_log_likelihood", None)
        if not callable(estimate):
            raise TypeError(f"minibatches need estimate_log_likelihood; {type(self._target).__name__} has none.")
        values: Tensor = estimate(z, generator)
        return to_float64(values)

    def gradient(self, z: Tensor, generators: "Sequence[torch.Generator] | None" = None) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood of ``(S, k)`` coordinates, and the gradient of the log-joint ``(S, k)``.

        Args:
            z: Coordinates.
            generators: Take estimates from one batch each, which these choose, in place of all data.
        """
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            if generators is None:
                values = self.log_likelihood(leaf)
            else:
                rows = zip(leaf.split(1), generators, strict=True)
                values = torch.cat([self.estimate(row, generator) for row, generator in rows])
            (gradient,) = torch.autograd.grad((values + self.log_prior(leaf)).sum(), leaf)
        return values.detach(), gradient

    def described(
        self,
        z: Tensor,
        method: str,
        began: float,
        trace: "Tensor | None",
        settings: dict[str, Any],
        **fitted: Tensor,
    ) -> Draws:
        """Return independent ``(n, k)`` coordinates as one chain, with their log-joints and what else is known.

        Args:
            z: The coordinates.
            method: What made them.
            began: When, by ``time.perf_counter``.
            trace: Of the objective.
            settings: Of the method; those of the target are added.
            **fitted: ``location`` and ``scale_tril``, of a fitted Gaussian.
        """
        with torch.no_grad():
            log_joints = self.log_likelihood(z) + self.log_prior(z)
        settings = {**self.facts, **settings}
        count, seconds = self.num_evaluations, time.perf_counter() - began
        return Draws(z[None], log_joints[None], method, count, seconds, trace=trace, settings=settings, **fitted)


class Kernel(ABC):
    """One step of a Markov chain, for C chains side by side; tensors alone make up its state.

    Attributes:
        name: The method, as in ``Draws.method``.
        exact: Whether ``log_likelihood`` in the state is that of all data, and not an estimate.
    """

    name: ClassVar[str]
    exact = True

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what a chain must share to go on from another's file, as JSON values."""

    def start(self, z: Tensor, target: CountedTarget, generators: Sequence[torch.Generator]) -> State:
        """Return the state at ``(C, k)`` coordinates, with the entries ``z`` and ``log_likelihood``."""
        return {"z": z, "log_likelihood": target.log_likelihood(z)}

    @abstractmethod
    def step(self, state: State, target: CountedTarget, generators: Sequence[torch.Generator]) -> tuple[State, Tensor]:
        """Return the next state, and the share of accepted proposals, ``(C,)``."""


def normals(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw ``(C, *shape)`` standard normals, each chain's from its own generator."""
    return torch.stack([torch.randn(shape, dtype=torch.float64, generator=g, device=g.device) for g in generators])


def uniforms(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw ``(C, *shape)`` numbers in [0, 1), each chain's from its own generator."""
    return torch.stack([torch.rand(shape, dtype=torch.float64, generator=g, device=g.device) for g in generators])


class UniformStream:
    """Numbers in [0, 1) for chains of which fewer and fewer go on; drawn several at once, each chain's from its own.

    Args:
        generators: One a chain.
        at_once: How many numbers are drawn together.
    """

    def __init__(self, generators: Sequence[torch.Generator], at_once: int = 8) -> None:
        self._generators = generators
        self._shares = uniforms((at_once,), generators)
        self._used = 0

    def take(self, active: "Tensor | None" = None) -> Tensor:
        """Return the next number of the chains ``active`` (A,), no more than last time; None: of all."""
        if self._used == self._shares.shape[1]:
            numbers = range(len(self._generators)) if active is None else active.tolist()
            rows = slice(None) if active is None else active
            self._shares[rows] = uniforms(self._shares.shape[1:], [self._generators[number] for number in numbers])
            self._used = 0
        self._used += 1
        column = self._shares[:, self._used - 1]
        return column.clone() if active is None else column[active]


def require_counts(**counts: "tuple[int, int]") -> None:
    """Refuse numbers below their least value.

    Args:
        **counts: Name to (value, least value).

    Raises:
        ValueError: Names the first that is too small.
    """
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")


def seeded(generator: "torch.Generator | None", count: int) -> list[torch.Generator]:
    """Make generators, number c a function of the source and c alone.

    Args:
        generator: The source, and where they draw; None takes torch's global generator, on the CPU.
        count: How many.
    """
    device = torch.device("cpu") if generator is None else sums_device(generator.device)
    generator = generator_on(device, generator)
    seeds = [int(torch.randint(2**62, (), generator=generator, device=device).item()) for _ in range(count)]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def starts(initial: "Tensor | str | None", target: Target, generators: Sequence[torch.Generator]) -> Tensor:
    """Return where chains start.

    Args:
        initial: ``(k,)`` or ``(C, k)``; ``"prior"`` draws from the prior; None is the subspace's origin.
        target: Says k and the prior.
        generators: One a chain.

    Returns:
        Shape ``(C, k)``, float64, where the generators are.

    Raises:
        ShapeError: If ``initial`` has another shape.
        ValueError: If it is another word.
        NonFiniteError: If it is not finite.
    """
    rank, count, device = target.rank, len(generators), generators[0].device
    if isinstance(initial, str):
        if initial != "prior":
            raise ValueError(f"initial must be coordinates, 'prior' or None; got {initial!r}.")
        return target.prior_std * normals((rank,), generators)
    if initial is None:
        return torch.zeros(count, rank, dtype=torch.float64, device=device)
    if initial.shape not in ((rank,), (count, rank)):
        raise ShapeError(f"initial must have shape ({rank},) or ({count}, {rank}); got {tuple(initial.shape)}.")
    if not bool(initial.isfinite().all()):
        raise NonFiniteError(f"initial must be finite; got {initial.tolist()}.")
    return initial.detach().to(device, torch.float64).expand(count, rank).clone()


class Chains:
    """C chains in lockstep, and what they have recorded.

    Args:
        kernel: The step.
        target: What is sampled.
        num_samples: Draws to record of each chain.
        num_chains: C.
        burn_in: Steps before the first that counts.
        thin: Steps for each draw.
        initial: See :func:`starts`.
        generator: Seeds a generator for each chain.
    """

    def __init__(
        self,
        kernel: Kernel,
        target: Target,
        num_samples: int,
        num_chains: int,
        burn_in: int,
        thin: int,
        initial: "Tensor | str | None",
        generator: "torch.Generator | None",
    ) -> None:
        require_counts(num_samples=(num_samples, 1), num_chains=(num_chains, 1), burn_in=(burn_in, 0), thin=(thin, 1))
        self.kernel, self.target = kernel, CountedTarget(target)
        self.num_samples, self.burn_in, self.thin = num_samples, burn_in, thin
        self.generators = seeded(generator, num_chains)
        self.initial = starts(initial, target, self.generators)
        device = self.initial.device
        self.state: State = {}
        self.step = 0
        self.seconds = 0.0
        self.draws = torch.empty(num_chains, num_samples, target.rank, dtype=torch.float64, device=device)
        self.log_joints = self.draws.new_empty(num_chains, num_samples)
        self.accept = self.draws.new_empty(num_chains, num_samples)
        self.accepted = self.draws.new_zeros(num_chains)  # since the last draw
        counts = {"num_chains": num_chains, "burn_in": burn_in, "thin": thin}
        self.facts = {"method": kernel.name, **counts, **self.target.facts, **kernel.settings()}

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return self.burn_in + self.num_samples * self.thin

    @property
    def recorded(self) -> int:
        """Draws of each chain so far."""
        return max(0, self.step - self.burn_in) // self.thin

    def begin(self) -> None:
        """Evaluate the starts.

        Raises:
            NonFiniteError: If the log-likelihood of one is not finite.
        """
        self.state = self.kernel.start(self.initial, self.target, self.generators)
        found = self.state["log_likelihood"]
        if not bool(found.isfinite().all()):
            raise NonFiniteError(
                f"the log-likelihood must be finite where chains start; got {found.tolist()}. Choose another initial."
            )

    def advance(self) -> None:
        """Take one step, and record it if it is one that counts."""
        self.state, accept = self.kernel.step(self.state, self.target, self.generators)
        if not bool(self.state["z"].isfinite().all()):
            raise NonFiniteError(f"{self.kernel.name} diverged at step {self.step}; use a smaller step size.")
        self.step += 1
        self.accepted += accept
        since = self.step - self.burn_in
        if since == 0:
            self.accepted.zero_()
        elif since > 0 and since % self.thin == 0:
            number = since // self.thin - 1
            self.draws[:, number] = self.state["z"]
            self.log_joints[:, number] = self.state["log_likelihood"] + self.target.log_prior(self.state["z"])
            self.accept[:, number] = self.accepted / self.thin
            self.accepted.zero_()

    def result(self) -> Draws:
        """Return what was recorded."""
        return Draws(
            self.draws,
            self.log_joints,
            self.kernel.name,
            self.target.num_evaluations,
            self.seconds,
            accept=self.accept,
            settings=self.facts,
        )

    # ---- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything needed to go on; atomically."""
        count = self.recorded
        tensors = {
            "draws": self.draws[:, :count],
            "log_joints": self.log_joints[:, :count],
            "accept": self.accept[:, :count],
            "accepted": self.accepted,
            "generators": torch.stack([generator.get_state() for generator in self.generators]),
            **{f"state.{name}": value for name, value in self.state.items()},
        }
        counts = {"step": self.step, "num_evaluations": self.target.num_evaluations, "seconds": self.seconds}
        write_tensors(path, KIND, tensors, {"facts": self.facts, **counts})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file.

        Args:
            path: What :meth:`save` wrote, of chains with the same settings; more draws may be asked for now.

        Raises:
            CheckpointError: If the file is damaged, of other settings, holds more than is asked for, or is of another
                target: one evaluation a chain tells.
        """
        name = os.fspath(path)
        required = ("draws", "log_joints", "accept", "accepted", "generators", "state.z", "state.log_likelihood")
        tensors, metadata = read_tensors(name, KIND, required, self.draws.device)
        found = metadata.get("facts")
        if not isinstance(found, dict) or not {"step", "num_evaluations", "seconds"} <= set(metadata):
            raise CheckpointError(f"{name} has a damaged header: no facts and counts of chains.")
        keys = [*self.facts, *(key for key in found if key not in self.facts)]
        changes = [
            f"{k} was {found.get(k)!r}, now {self.facts.get(k)!r}" for k in keys if found.get(k) != self.facts.get(k)
        ]
        if changes:
            raise CheckpointError(f"{name} is of other chains: {'; '.join(changes)}.")
        step, recorded = metadata["step"], tensors["draws"].shape[1]
        if recorded > self.num_samples or recorded != max(0, step - self.burn_in) // self.thin:
            raise CheckpointError(f"{name} holds {recorded} draws of each chain; expected at most {self.num_samples}.")
        self.state = {key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")}
        if self.kernel.exact:
            known, now = self.state["log_likelihood"], self.target.log_likelihood(self.state["z"]).detach()
            if not bool(((now - known).abs() <= SAME_TARGET * known.abs().clamp(min=1)).all()):
                raise CheckpointError(
                    f"{name} is of another log-likelihood: it was {known.tolist()} where it is now {now.tolist()}."
                )
        self.step, self.seconds = step, metadata["seconds"]
        self.target.num_evaluations += metadata["num_evaluations"]
        for name, whole in (("draws", self.draws), ("log_joints", self.log_joints), ("accept", self.accept)):
            whole[:, :recorded] = tensors[name]
        self.accepted = tensors["accepted"]
        for generator, saved in zip(self.generators, tensors["generators"], strict=True):
            generator.set_state(saved.to("cpu", copy=True))  # states live there; of a row, torch would read the first


def run_chains(
    chains: Chains,
    *,
    progress: bool,
    checkpoint: "str | os.PathLike[str] | None",
    checkpoint_every: int,
    resume: bool,
) -> Draws:
    """Run chains to their end.

    Args:
        chains: As made.
        progress: Show a progress bar.
        checkpoint: A file for their state; written every so often and at the end.
        checkpoint_every: Steps between two writes.
        resume: Go on from the file if it is there.

    Returns:
        What they recorded.

    Raises:
        ValueError: If ``resume`` comes without a file.
    """
    require_counts(checkpoint_every=(checkpoint_every, 1))
    if resume and checkpoint is None:
        raise ValueError("resume needs a checkpoint: the file to go on from.")
    began = time.perf_counter()
    if resume and checkpoint is not None and Path(checkpoint).exists():
        chains.load(checkpoint)
    else:
        chains.begin()
    began -= chains.seconds
    with progress_bar(
        description=chains.kernel.name, total=chains.num_steps, initial=chains.step, unit="step", show=progress
    ) as bar:
        while chains.step < chains.num_steps:
            chains.advance()
            chains.seconds = time.perf_counter() - began
            if checkpoint is not None and (chains.step % checkpoint_every == 0 or chains.step == chains.num_steps):
                chains.save(checkpoint)
            mean = chains.state["log_likelihood"].mean().item()
            bar.set_postfix_str("" if math.isnan(mean) else f"log-likelihood {mean:.4g}", refresh=False)
            bar.update()
    chains.seconds = time.perf_counter() - began
    return chains.result()
