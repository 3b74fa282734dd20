"""The methods of `experiments.uci`: from the networks of a split to predictions of its test rows."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.uci_bench import Bench
from experiments.uci_linear import exact_gp, neural_linear
from experiments.uci_metrics import Forecast
from experiments.uncertainty_tuning import choose
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.elliptical_slice import elliptical_slice
from lowrank_bdl.subspaces.log_joint import LogJoint
from lowrank_bdl.subspaces.nuts import nuts
from lowrank_bdl.subspaces.principal import pca_subspace
from lowrank_bdl.subspaces.subspace import Subspace
from lowrank_bdl.subspaces.subspace_posterior import SubspacePosterior
from lowrank_bdl.subspaces.variational import variational

FACTORS = {"scale": 2.0, "temperature": 10.0, "prior_std": 2.0}  # from one value tried to the next
MOST_STEPS = {"scale": 8, "temperature": 4, "prior_std": 3}  # of these in the better direction
LEAST_GAIN = 1e-3  # a walk for a level ends where the validation log-likelihood gains less [nat a row]

Levels = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """What a method predicts, and how it came to it.

    Attributes:
        forecast: Of the test rows.
        levels: Hyper-parameters that were chosen or given.
        tried: For each that was chosen, the values tried with their validation log-likelihoods.
        details: Facts on the fit.
    """

    forecast: Forecast
    levels: Levels = field(default_factory=dict)
    tried: Mapping[str, list[list[float]]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


Fit = Callable[[Bench, int, Levels, int], tuple[Any, dict[str, Any]]]
"""``fit(bench, part, levels, num_samples)``: weights, or what draws them, from a part's training rows; and facts."""


def candidate(bench: Bench, kind: str) -> Levels:
    """Return the hyper-parameters of the networks."""
    return dataclasses.asdict(bench.candidates[bench.chosen(kind)])


def tune(bench: Bench, fit: Fit, starts: Levels) -> tuple[Levels, dict[str, list[list[float]]], list[str]]:
    """Choose levels one after the other, those that a flag gives apart, on the validation rows.

    Args:
        bench: The split.
        fit: The method.
        starts: Where each walk starts, in the order of the walks.

    Returns:
        The levels, what was tried, and the levels whose walk ended at its bound.
    """
    given = {name: getattr(bench.settings, name) for name in starts}
    levels = {name: start if given[name] is None else given[name] for name, start in starts.items()}
    tried, bounds = {}, []
    for name, start in starts.items():
        if given[name] is not None:
            continue

        def score(value: float, name: str = name) -> float:
            own, samples = {**levels, name: value}, bench.settings.tune_samples
            return -bench.validate(lambda part: fit(bench, part, own, samples)[0], samples)

        found = choose(score, start, factor=FACTORS[name], tolerance=LEAST_GAIN, max_steps=MOST_STEPS[name])
        levels[name] = found.level
        tried[name] = [[value, -each] for value, each in found.tried]
        bounds += [name] if found.at_bound else []
    return levels, tried, bounds


# ---- weights --------------------------------------------------------------------------------------------------------


def swag(bench: Bench, part: int, levels: Levels, num_samples: int) -> tuple[Any, dict[str, Any]]:
    """The Gaussian around the mean of the snapshots."""
    collector = bench.network(part, "SWA").swag
    assert collector is not None
    return collector.posterior(scale=levels["scale"]), {"snapshots": collector.n_averaged}


def log_joint_of(bench: Bench, part: int, levels: Levels) -> LogJoint:
    """Return the tempered posterior of a part's training rows in its principal subspace."""
    collector = bench.network(part, "SWA").swag
    assert collector is not None
    subspace = pca_subspace(collector, bench.settings.rank)
    return LogJoint(
        subspace,
        bench.net,
        "gaussian",
        bench.training_batches(part),
        temperature=levels["temperature"],
        prior_std=levels["prior_std"],
    )


def posterior_of(log_joint: LogJoint, draws: Draws) -> tuple[Any, dict[str, Any]]:
    facts = {"rank": log_joint.rank, "evaluations": draws.num_evaluations, "fit_seconds": draws.seconds}
    if draws.num_samples >= 4:
        facts["largest_rhat"] = draws.rhat().max().item()
    assert isinstance(log_joint.subspace, Subspace)
    return SubspacePosterior(log_joint.subspace, draws), facts


def ess(bench: Bench, part: int, levels: Levels, num_samples: int) -> tuple[Any, dict[str, Any]]:
    """Elliptical slice sampling in the principal subspace."""
    settings, log_joint = bench.settings, log_joint_of(bench, part, levels)
    final = part == bench.whole
    draws = elliptical_slice(
        log_joint,
        num_samples if final else -(-num_samples // settings.chains),
        num_chains=settings.chains,
        burn_in=settings.burn_in if final else settings.burn_in // 4,
        thin=settings.thin if final else 1,
        generator=bench.generator("ess"),
    )
    return posterior_of(log_joint, draws)


def vi(bench: Bench, part: int, levels: Levels, num_samples: int) -> tuple[Any, dict[str, Any]]:
    """Mean-field variational inference in the principal subspace."""
    log_joint = log_joint_of(bench, part, levels)
    draws = variational(log_joint, num_samples, num_steps=bench.settings.vi_steps, generator=bench.generator("vi"))
    weights, facts = posterior_of(log_joint, draws)
    assert draws.elbo is not None
    return weights, {**facts, "elbo": draws.elbo[-10:].mean().item()}


def no_u_turn(bench: Bench, part: int, levels: Levels, num_samples: int) -> tuple[Any, dict[str, Any]]:
    """The no-U-turn sampler in the principal subspace; pyro's."""
    settings, log_joint = bench.settings, log_joint_of(bench, part, levels)
    draws = nuts(
        log_joint,
        num_samples,
        burn_in=settings.nuts_warmup,
        max_tree_depth=settings.nuts_depth,
        full_mass=False,
        generator=bench.generator("nuts"),
    )
    weights, facts = posterior_of(log_joint, draws)
    assert draws.accept is not None
    return weights, {**facts, "acceptance": draws.accept.mean().item()}


# ---- methods --------------------------------------------------------------------------------------------------------


def one_network(bench: Bench, kind: str) -> Outcome:
    """SGD or SWA."""
    return Outcome(bench.test(bench.weights(bench.network(bench.whole, kind), kind)), candidate(bench, kind))


def averaged(bench: Bench, fit: Fit, chosen_by: Fit, starts: Levels) -> Outcome:
    """Choose levels on the validation rows, then fit to all training rows and average.

    Args:
        bench: The split.
        fit: The method.
        chosen_by: The method that levels are chosen with; what it chose before is not chosen again.
        starts: Where the walks start.
    """
    if chosen_by not in bench.chosen_levels:
        bench.chosen_levels[chosen_by] = tune(bench, chosen_by, starts)
    levels, tried, bounds = bench.chosen_levels[chosen_by]
    weights, facts = fit(bench, bench.whole, levels, bench.settings.num_samples)
    details = {**facts, **({"at_bound": bounds} if bounds else {})}
    return Outcome(bench.test(weights), {**candidate(bench, "SWA"), **levels}, tried, details)


def linear(bench: Bench) -> Outcome:
    """Bayesian linear regression on the last hidden layer of the SWA network."""
    theta = bench.weights(bench.network(bench.whole, "SWA"), "SWA")
    forecast, facts = neural_linear(bench.net, bench.layout, theta, bench.split)
    return Outcome(forecast, candidate(bench, "SWA"), details=facts)


def gp(bench: Bench) -> Outcome:
    """An exact Gaussian process on the features."""
    settings = bench.settings
    forecast, facts = exact_gp(bench.split, settings.gp_rows, settings.gp_steps, bench.generator("gp rows"))
    return Outcome(forecast, details=facts)


SUBSPACE_STARTS = {"temperature": 100.0, "prior_std": 1.0}

METHODS: Mapping[str, Callable[[Bench], Outcome]] = {
    "SGD": lambda bench: one_network(bench, "SGD"),
    "SWA": lambda bench: one_network(bench, "SWA"),
    "SWAG": lambda bench: averaged(bench, swag, swag, {"scale": 0.5}),
    "PCA+ESS": lambda bench: averaged(bench, ess, ess, SUBSPACE_STARTS),
    "PCA+VI": lambda bench: averaged(bench, vi, ess, SUBSPACE_STARTS),  # of one posterior, not of one for each sampler
    "PCA+NUTS": lambda bench: averaged(bench, no_u_turn, ess, SUBSPACE_STARTS),
    "neural-linear": linear,
    "GP": gp,
}
