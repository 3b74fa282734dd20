"""A small network, correlated iterates of it, and the SWAG law computed from all of them in float64."""

import torch
from torch import nn

from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.swag import SWAG


def network(dtype=torch.float32):
    """13 parameters in four tensors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def iterates(count, model=None, seed=0, dtype=torch.float32, size=0.1):
    """Weights near 1 that move together across layers: a common direction, a drift and noise; shape (count, D)."""
    layout = ParameterLayout.from_module(network() if model is None else model)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    common = draw(count, 2) @ draw(2, layout.numel)
    drift = torch.linspace(0, 1, count, dtype=torch.float64)[:, None] * draw(layout.numel)
    return (1 + size * (common + drift + 0.5 * draw(count, layout.numel))).to(dtype)


def feed(swag, model, thetas):
    """Give the collector each row as the model's weights."""
    for theta in thetas:
        swag.layout.assign_(model, theta)
        swag.update_parameters(model)
    return swag


def dense_swag(thetas, rank, scale=0.5, centering="running", correction=1):
    """Mean and covariance from the definition: every iterate kept, everything in float64."""
    thetas = thetas.double()
    count = len(thetas)
    means = thetas.cumsum(0) / torch.arange(1, count + 1)[:, None]
    deviations = thetas - (means if centering == "running" else means[-1])
    rows = min(count, rank)
    window = deviations[count - rows :]
    covariance = torch.diag(thetas.var(0, correction=correction)) + window.mT @ window / max(rows - 1, 1)
    return means[-1], scale * covariance


def swag_posterior(seed=0, scale=0.5, count=12, rank=5, dtype=torch.float64, shift=0.0, **options):
    """A SWAG posterior, its mean and its dense covariance."""
    model = network(dtype)
    thetas = iterates(count, seed=seed, dtype=dtype) + shift
    swag = feed(SWAG(model, rank, **options), model, thetas)
    return swag.posterior(scale=scale), *dense_swag(thetas, rank, scale, options.get("centering", "running"))


def block_diagonal(covariance, layout):
    """The blocks of the parameter tensors of a dense covariance, zero elsewhere."""
    return torch.block_diag(*(covariance[where, where] for where in layout.slices.values()))
