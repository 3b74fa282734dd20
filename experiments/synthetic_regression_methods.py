"""The methods of `experiments.synthetic_regression`: each gives weights, whose functions are what is compared."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import lowrank_bdl as lb
from experiments.common import RunDir, fixed, to_json
from experiments.synthetic_regression_data import ToySet, features
from experiments.synthetic_regression_networks import (
    Networks,
    curve_losses,
    evaluate,
    make_net,
    num_epochs,
    prior_stddevs,
    train,
)
from experiments.synthetic_regression_settings import METHODS, Settings, units_of
from experiments.synthetic_regression_target import AllWeights

MOST_DRAWS = 1000  # of SWAG, the prior and MFVI, which cost nothing


@dataclass(frozen=True)
class Outcome:
    """What a method gives.

    Attributes:
        net: The network.
        thetas: Weights (S, D), in the network's dtype.
        chains: How many chains the S draws are of, one after the other; None where they are independent.
        details: Facts on the fit.
    """

    net: torch.nn.Module
    thetas: Tensor
    chains: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Bench:
    """What the methods share; networks are trained, or read, when a method first asks for them.

    Args:
        settings: Of the run.
        data: The set.
        run: Where networks are kept; None keeps them nowhere.
    """

    def __init__(self, settings: Settings, data: ToySet, run: RunDir | None = None) -> None:
        self.settings, self.data, self.run = settings, data, run
        self.grid = torch.linspace(-settings.x_max, settings.x_max, settings.grid, dtype=torch.float64)
        self.inputs = features(data.train[0])
        self.targets = data.train[1].float()
        self.net = make_net(units_of("hidden", settings.hidden))
        self.layout = lb.ParameterLayout.from_module(self.net)
        self.small_net = make_net(units_of("small_hidden", settings.small_hidden)).double()  # for HMC's energies
        self.seconds: dict[str, float] = {}

    @property
    def recipe(self) -> dict[str, Any]:
        """What all numbers depend on."""
        return {**fixed(self.settings), "data": self.data.digest}

    def generator(self, method: str) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.settings.seed + METHODS.index(method))

    @cached_property
    def networks(self) -> Networks:
        """The trained networks."""
        digest = hashlib.sha256(to_json(self.recipe).encode()).hexdigest()
        kept = None if self.run is None else Networks.load(self.run.path, self.layout, digest)
        if kept is not None:
            return kept
        with tqdm(total=num_epochs(self.settings), desc="training", unit="epoch", leave=False) as bar:
            found = train(self.settings, self.net, self.inputs, self.targets, bar.update)
        if self.run is not None:
            found.save(self.run.path, digest)
        return found

    @cached_property
    def all_weights(self) -> AllWeights:
        """The one posterior of the second part."""
        return AllWeights(
            lb.ParameterLayout.from_module(self.small_net),
            prior_stddevs(self.small_net, self.settings.prior_std),
            self.inputs.double(),
            self.data.train[1],
            self.settings.noise_variance,
        )

    def functions(self, outcome: Outcome) -> Tensor:
        """Return the functions of a method's weights on the grid, (S, G), float64."""
        inputs = features(self.grid).to(outcome.thetas.dtype)
        layout = lb.ParameterLayout.from_module(outcome.net)
        parts = [evaluate(layout, thetas, inputs) for thetas in outcome.thetas.split(50)]
        return torch.cat(parts).double()


# ---- subspaces ----------------------------------------------------------------------------------------------------


def subspace_of(bench: Bench, construction: str) -> lb.Subspace:
    """Make a subspace: random or principal directions around SWA, or the plane of the curve."""
    networks, settings = bench.networks, bench.settings
    if construction == "curve":
        points = torch.stack([networks.solutions[0], networks.bend, networks.solutions[1]])
        return lb.curve_subspace(points, bench.layout, control_points=True)
    if construction == "pca":
        return lb.pca_subspace(networks.swag)
    rank = min(settings.random_rank, bench.layout.numel)
    generator = torch.Generator().manual_seed(settings.seed)
    return lb.random_subspace(
        bench.layout, networks.swag.mean, rank, length=settings.random_length, generator=generator
    )


def joint_of(bench: Bench, construction: str, temperature: float | None = None) -> lb.LogJoint:
    """Return the posterior in a subspace."""
    settings = bench.settings
    return lb.LogJoint(
        subspace_of(bench, construction),
        bench.net,
        "gaussian",
        (bench.inputs, bench.targets.unsqueeze(1)),
        noise_variance=settings.noise_variance,
        temperature=temperature or getattr(settings, f"{construction}_temperature"),
        prior_std=getattr(settings, f"{construction}_prior_std"),
    )


def _in_subspace(
    bench: Bench, construction: str, joint: lb.LogJoint, draws: lb.Draws, *, independent: bool = False
) -> Outcome:
    subspace = joint.subspace
    assert isinstance(subspace, lb.Subspace)
    details = {
        "subspace": construction,
        "rank": subspace.rank,
        "lengths": subspace.lengths.tolist(),
        "temperature": joint.temperature,
        "prior_std": joint.prior_std,
        **_facts(draws, independent),
    }
    if construction == "curve":
        details["losses"] = curve_losses(bench.networks, bench.inputs, bench.targets)
    posterior = lb.SubspacePosterior(subspace, draws)
    thetas = posterior.to_theta(posterior.coordinates)  # chain after chain
    return Outcome(bench.net, thetas, None if independent else draws.num_chains, details)


def _facts(draws: lb.Draws, independent: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"evaluations": draws.num_evaluations}
    if not independent:
        facts |= {"largest_rhat": draws.rhat().max().item(), "smallest_ess": draws.ess().min().item()}
    if draws.accept is not None:
        facts["acceptance"] = draws.accept.mean().item()
    if draws.elbo is not None:
        facts["elbo"] = draws.elbo[-max(1, len(draws.elbo) // 10) :].mean().item()
    return facts


def _sgd(bench: Bench) -> Outcome:
    return Outcome(bench.net, bench.networks.solutions[:1])


def _swag(bench: Bench) -> Outcome:
    thetas = bench.networks.swag.sample(min(MOST_DRAWS, bench.settings.num_samples), generator=bench.generator("SWAG"))
    return Outcome(bench.net, thetas, None, {"scale": bench.settings.scale})


def _ess(bench: Bench, construction: str, name: str) -> Outcome:
    settings, joint = bench.settings, joint_of(bench, construction)
    draws = lb.elliptical_slice(
        joint,
        settings.num_samples // settings.chains,
        num_chains=settings.chains,
        burn_in=settings.burn_in,
        thin=settings.thin,
        generator=bench.generator(name),
        progress=True,
    )
    return _in_subspace(bench, construction, joint, draws)


def _vi(bench: Bench) -> Outcome:
    settings = bench.settings
    joint = joint_of(bench, settings.vi_subspace)
    draws = lb.variational(
        joint,
        settings.num_samples,
        num_steps=settings.vi_steps,
        num_draws=2,
        lr=settings.vi_lr,
        generator=bench.generator("VI"),
        progress=True,
    )
    return _in_subspace(bench, settings.vi_subspace, joint, draws, independent=True)


def _nuts(bench: Bench) -> Outcome:
    settings = bench.settings
    joint = joint_of(bench, settings.nuts_subspace, settings.nuts_temperature)
    draws = lb.nuts(
        joint,
        settings.nuts_samples,
        burn_in=settings.nuts_warmup,
        max_tree_depth=5,
        generator=bench.generator("NUTS"),
        progress=True,
    )
    return _in_subspace(bench, settings.nuts_subspace, joint, draws)


# ---- all weights of a small network, one prior and likelihood -----------------------------------------------------


def _prior(bench: Bench) -> Outcome:
    return Outcome(bench.small_net, bench.all_weights.sample_prior(MOST_DRAWS, bench.generator("Prior")))


def _hmc(bench: Bench) -> Outcome:
    settings, target = bench.settings, bench.all_weights
    draws = lb.nuts(
        target,
        settings.hmc_samples,
        num_chains=settings.hmc_chains,
        burn_in=settings.hmc_warmup,
        step_size=0.05,
        max_tree_depth=settings.hmc_depth,
        full_mass=False,
        initial="prior",
        generator=bench.generator("HMC"),
        progress=True,
    )
    return Outcome(bench.small_net, target.to_theta(draws.flat), draws.num_chains, _facts(draws, False))


def _ensemble(bench: Bench) -> Outcome:
    """Modes of the posterior, each from another draw of the prior: its regularised networks, nothing else."""
    target, generator, modes = bench.all_weights, bench.generator("Ensemble"), []
    for _ in tqdm(range(bench.settings.members), "members", unit="network", leave=False):
        modes.append(
            lb.map_estimate(
                target, method="adam", num_steps=bench.settings.member_steps, initial="prior", generator=generator
            )
        )
    thetas = target.to_theta(torch.cat([mode.flat for mode in modes]))
    values = [mode.log_joints.item() for mode in modes]
    evaluations = sum(mode.num_evaluations for mode in modes)
    return Outcome(bench.small_net, thetas, None, {"log_joints": values, "evaluations": evaluations})


def _mfvi(bench: Bench) -> Outcome:
    target = bench.all_weights
    draws = lb.variational(
        target,
        MOST_DRAWS,
        num_steps=bench.settings.mfvi_steps,
        lr=0.02,
        initial="prior",
        generator=bench.generator("MFVI"),
        progress=True,
    )
    return Outcome(bench.small_net, target.to_theta(draws.flat), None, _facts(draws, True))


FITS: dict[str, Callable[[Bench], Outcome]] = {
    "SGD": _sgd,
    "SWAG": _swag,
    "Random+ESS": partial(_ess, construction="random", name="Random+ESS"),
    "PCA+ESS": partial(_ess, construction="pca", name="PCA+ESS"),
    "Curve+ESS": partial(_ess, construction="curve", name="Curve+ESS"),
    "VI": _vi,
    "NUTS": _nuts,
    "Prior": _prior,
    "HMC": _hmc,
    "Ensemble": _ensemble,
    "MFVI": _mfvi,
}
