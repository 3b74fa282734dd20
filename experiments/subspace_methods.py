"""The methods of `experiments.subspace`: each is given a log-joint in a subspace, and returns draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.subspace_settings import Settings
from experiments.subspace_sources import Bench
from lowrank_bdl.subspaces.coordinate_slice import coordinate_slice
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.elliptical_slice import elliptical_slice
from lowrank_bdl.subspaces.langevin import sghmc, sgld
from lowrank_bdl.subspaces.log_joint import LogJoint
from lowrank_bdl.subspaces.map_estimate import low_rank_gaussian, map_estimate
from lowrank_bdl.subspaces.normalizing_flow import normalizing_flow
from lowrank_bdl.subspaces.nuts import nuts
from lowrank_bdl.subspaces.subspace import Subspace
from lowrank_bdl.subspaces.variational import variational

CHAIN, DRAWS = "chain.safetensors", "draws.safetensors"
Method = Callable[[LogJoint, Settings, Path], Draws]


def log_joint(bench: Bench, space: Subspace, temperature: float) -> LogJoint:
    """Return the log-joint of the training images and the coordinates."""
    settings = bench.settings
    normalized = settings.bn_mode if bench.normalized else "eval"
    fixed = bench.normalized and normalized == "eval"
    return LogJoint(
        space,
        bench.network_at(space.origin) if fixed else bench.model,
        "categorical",
        list(bench.batches) if settings.minibatch else bench.batches,
        temperature=temperature,
        prior_std=settings.prior_std,
        bn_loader=bench.bn_loader if normalized == "recalibrate" else None,
        bn_fraction=settings.bn_subset,
        bn_mode="train" if normalized == "train" else "eval",
    )


def draw(method: str, target: LogJoint, settings: Settings, folder: Path) -> Draws:
    """Run a method.

    Args:
        method: Its name.
        target: What it is run on.
        settings: Of the script.
        folder: Holds the state of unfinished chains; they go on from it with --resume.
    """
    return RUNNERS[method](target, settings, folder)


def _common(settings: Settings) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(settings.seed), "progress": True}


def _chain(settings: Settings, folder: Path) -> dict[str, Any]:
    return _common(settings) | {
        "num_chains": settings.num_chains,
        "burn_in": settings.burn_in,
        "thin": settings.thin,
        "initial": "prior" if settings.initial == "prior" else None,
        "checkpoint": folder / CHAIN,
        "checkpoint_every": settings.checkpoint_every,
        "resume": settings.resume,
    }


def _total(settings: Settings) -> int:
    """Return how many independent draws are as many as the chains make."""
    return settings.num_samples * settings.num_chains


def _ess(target: LogJoint, settings: Settings, folder: Path) -> Draws:
    return elliptical_slice(target, settings.num_samples, **_chain(settings, folder))


def _slice(target: LogJoint, settings: Settings, folder: Path) -> Draws:
    return coordinate_slice(target, settings.num_samples, **_chain(settings, folder))


def _nuts(target: LogJoint, settings: Settings, folder: Path) -> Draws:
    return nuts(target, settings.num_samples, **_chain(settings, folder))


def _langevin(sampler: Any) -> Method:
    def run(target: LogJoint, settings: Settings, folder: Path) -> Draws:
        assert settings.step_size is not None, "checked with the settings"
        options = {"lr": settings.step_size, "minibatch": settings.minibatch}
        draws: Draws = sampler(target, settings.num_samples, **options, **_chain(settings, folder))
        return draws

    return run


def _fit(settings: Settings) -> dict[str, Any]:
    own = {"num_steps": settings.steps, "init_std": settings.init_std, "minibatch": settings.minibatch}
    return _common(settings) | own | ({} if settings.lr is None else {"lr": settings.lr})


def _vi(covariance: Any) -> Method:
    def run(target: LogJoint, settings: Settings, folder: Path) -> Draws:
        return variational(
            target,
            _total(settings),
            covariance=covariance,
            fit_mean=not settings.no_mu,
            **_fit(settings),
        )

    return run


def _flow(target: LogJoint, settings: Settings, folder: Path) -> Draws:
    return normalizing_flow(target, _total(settings), **_fit(settings))


def _map(target: LogJoint, settings: Settings, folder: Path) -> Draws:
    return map_estimate(target, **_common(settings))


def _low_rank_gaussian(target: LogJoint, settings: Settings, folder: Path) -> Draws:
    generator = torch.Generator().manual_seed(settings.seed)
    return low_rank_gaussian(target, _total(settings), scale=settings.scale, generator=generator)


RUNNERS: dict[str, Method] = {
    "ess": _ess, "slice": _slice, "nuts": _nuts, "sgld": _langevin(sgld), "sghmc": _langevin(sghmc),
    "vi": _vi("diagonal"), "vi_full": _vi("full"), "flow": _flow, "map": _map, "low_rank_gaussian": _low_rank_gaussian,
}  # fmt: skip
