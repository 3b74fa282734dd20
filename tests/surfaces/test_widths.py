import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.subspaces.principal import pca_subspace
from lowrank_bdl.surfaces.evaluation import PointValues, evaluate_points
from lowrank_bdl.surfaces.widths import (
    WidthProfile,
    orthogonal_width,
    pca_width,
    random_orthogonal_directions,
    swag_width,
    width_profile,
)
from tests.oracles import assert_close

DIM, RANK = 12, 5


class Bowl(nn.Module):
    """Weights w whose loss, given as the output, is w' A w / 2: widths are known in closed form."""

    def __init__(self, curvature):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(curvature)))
        self.register_buffer("curvature", curvature)

    def forward(self, x):
        return 0.5 * (self.w @ self.curvature @ self.w).expand(len(x))


def loss_of(outputs, targets):
    return outputs.mean()


@pytest.fixture
def bowl():
    root = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0))
    return Bowl(root @ root.mT / DIM)


@pytest.fixture
def posterior(bowl):
    root = torch.randn(DIM, RANK, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    layout = ParameterLayout.from_module(bowl)
    return GaussianPosterior(torch.zeros(DIM), LowRankPlusDiagLinearOperator(root, torch.ones(DIM)), layout)


DATA = (torch.zeros(3, 1), torch.zeros(3))
OPTIONS = {"accuracy": False, "progress": False}


def curvatures(bowl, rows):
    unit = (rows / rows.norm(dim=1, keepdim=True)).double()
    return ((unit @ bowl.curvature.double()) * unit).sum(1)


def test_losses_are_those_of_unit_steps(bowl):
    rows = torch.randn(3, DIM, generator=torch.Generator().manual_seed(2)) * 7
    t = torch.linspace(-4, 4, 9)
    found = width_profile(bowl, bowl.w.detach(), rows, DATA, loss_of, t, **OPTIONS)
    assert_close(found.of().loss, 0.5 * curvatures(bowl, rows)[:, None] * t.double() ** 2, torch.float32, cond=4)
    assert found.names == ("direction 0", "direction 1", "direction 2") and found.stddevs is None
    assert found.distances.dtype == torch.float64


def test_half_widths_of_a_parabola(bowl):
    rows = torch.eye(DIM)[:2]
    t = torch.linspace(-3, 3, 2001, dtype=torch.float64)
    found = width_profile(bowl, bowl.w.detach(), rows, DATA, loss_of, t, **OPTIONS)
    expected = (2 * 0.5 / curvatures(bowl, rows)).sqrt()
    assert bool((expected < 3).all())
    torch.testing.assert_close(found.half_widths(0.5), expected[:, None].expand(2, 2), rtol=1e-3, atol=0)
    assert found.half_widths(1e6).tolist() == [[math.inf, math.inf]] * 2
    with pytest.raises(ValueError, match="increase must be positive; got 0"):
        found.half_widths(0)


def test_a_loss_that_jumps_to_infinity_ends_a_width():
    values = PointValues(torch.tensor([[math.inf, 0.0, 1.0, math.inf]]), None, torch.zeros(1, 4))
    profile = WidthProfile(("ray",), torch.tensor([-1.0, 0.0, 1.0, 2.0]), values, None)
    assert profile.half_widths(2.0).tolist() == [[0.0, 1.0]]


def test_principal_directions_are_top_middle_and_last(bowl, posterior):
    root = posterior.covariance.factors.root.double()
    left, singular, _ = torch.linalg.svd(root, full_matrices=False)
    t = torch.tensor([-1.0, 2.0])
    for found in (
        swag_width(bowl, posterior, DATA, loss_of, t, **OPTIONS),
        pca_width(bowl, pca_subspace(posterior), DATA, loss_of, t, **OPTIONS),
    ):
        assert found.names == ("component 1", "component 3", "component 5")
        assert_close(found.stddevs, singular[[0, 2, 4]], torch.float32, cond=4)
        expected = 0.5 * curvatures(bowl, left.mT[[0, 2, 4]])[:, None] * t.double() ** 2
        assert_close(found.of().loss, expected, torch.float32, cond=20)
    chosen = swag_width(bowl, posterior, DATA, loss_of, t, rank=2, components=[1], **OPTIONS)
    assert chosen.names == ("component 2",)
    assert_close(chosen.stddevs, singular[[1]], torch.float32, cond=4)


def test_a_rank_that_is_not_reached_is_no_obstacle(bowl, posterior):
    factors = posterior.covariance.factors
    doubled = LowRankPlusDiagLinearOperator(torch.cat([factors.root, factors.root], 1), factors.diag)
    twice = GaussianPosterior(posterior.mean, doubled, posterior.layout)
    found = swag_width(bowl, twice, DATA, loss_of, torch.ones(1), **OPTIONS)
    assert found.names == ("component 1", "component 3", "component 5")


def test_random_directions_are_orthonormal_orthogonal_to_the_span_and_of_no_preference(posterior):
    span = pca_subspace(posterior)
    generator = torch.Generator().manual_seed(3)
    rows = random_orthogonal_directions(span, 7, generator)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(7), rtol=0, atol=1e-6)
    unit = span.basis / span.basis.norm(dim=0)
    assert (rows @ unit).abs().max() < 1e-6
    draws = torch.cat([random_orthogonal_directions(span, 1, generator) for _ in range(2000)]).double()
    left = torch.linalg.svd(span.basis.double())[0][:, RANK:]
    coordinates = draws @ left
    free = DIM - RANK
    second = coordinates.mT @ coordinates / 2000
    # a squared coordinate on the unit sphere of n dimensions has variance 2 (n - 1) / (n^2 (n + 2))
    error = math.sqrt(2 * (free - 1) / (free**2 * (free + 2)) / 2000)
    assert (second - torch.eye(free) / free).abs().max() < 5 * error  # false alarm below 28 / 10^6


def test_directions_of_a_span_may_depend_on_each_other(posterior):
    span = pca_subspace(posterior)

    class Twice:
        layout, origin = span.layout, span.origin
        basis = torch.cat([span.basis, 1e-3 * span.basis[:, :2]], 1)

    rows = random_orthogonal_directions(Twice(), 3, torch.Generator().manual_seed(4))
    assert (rows @ (span.basis / span.basis.norm(dim=0))).abs().max() < 1e-6


def test_orthogonal_width_is_the_profile_of_these_directions(bowl, posterior):
    span = pca_subspace(posterior)
    t = torch.tensor([0.0, 3.0])
    rows = random_orthogonal_directions(span, 4, torch.Generator().manual_seed(5))
    found = orthogonal_width(
        bowl, span, DATA, loss_of, t, num_directions=4, generator=torch.Generator().manual_seed(5), **OPTIONS
    )
    assert found.names == ("random 1", "random 2", "random 3", "random 4")
    assert_close(found.of().loss, 0.5 * curvatures(bowl, rows)[:, None] * t.double() ** 2, torch.float32, cond=4)


def test_published_distances(bowl, posterior):
    options = {**OPTIONS, "points_per_pass": 100}
    principal = swag_width(bowl, posterior, DATA, loss_of, components=[0], **options)
    assert len(principal.distances) == 21 and principal.distances[[0, -1]].tolist() == [-30.0, 30.0]
    random = orthogonal_width(bowl, pca_subspace(posterior), DATA, loss_of, num_directions=1, **options)
    assert len(random.distances) == 31 and random.distances[[0, -1]].tolist() == [-60.0, 60.0]


def test_several_data_sets_batch_norm_and_resuming():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    layout = ParameterLayout.from_module(model)
    generator = torch.Generator().manual_seed(6)
    x, y = torch.randn(20, 3, generator=generator), torch.randint(2, (20,), generator=generator)
    sets = {"train": (x, y), "test": (x[:7], y[:7])}
    rows = torch.randn(2, layout.numel, generator=generator)
    origin, t = layout.flatten(model), torch.tensor([-1.0, 0.0, 1.0])
    seen = []
    options = {"bn_loader": [(x, y)], "layout": layout, "progress": False, "points_per_pass": 2}
    found = width_profile(
        model, origin, rows, sets, cross_entropy, t, names=["a", "b"], on_values=lambda v: seen.append(1), **options
    )
    assert len(seen) == 3 and found.of("test").accuracy.shape == (2, 3)
    thetas = torch.cat([origin + t[:, None] * row / row.norm() for row in rows])
    direct = evaluate_points(model, thetas, sets, cross_entropy, bn_loader=[(x, y)], progress=False)
    for name in sets:
        torch.testing.assert_close(found.of(name).loss.flatten(), direct[name].loss, rtol=1e-5, atol=1e-6)
    assert found.half_widths(0.01, "test").shape == (2, 2)
    again = width_profile(
        model, origin, rows, sets, cross_entropy, t, known=found.values, on_values=lambda v: seen.append(2), **options
    )
    assert len(seen) == 3 and torch.equal(again.of("train").loss, found.of("train").loss)
    with pytest.raises(ValueError, match="there are values on train, test; got None"):
        found.of()
    with pytest.raises(ShapeError, match="data came by name, and so must known"):
        width_profile(model, origin, rows, sets, cross_entropy, t, known=found.of("train"), **options)
    with pytest.raises(ShapeError, match="data are one set, and so must known be"):
        width_profile(model, origin, rows, (x, y), cross_entropy, t, known=found.values, **options)


def test_bad_widths(bowl, posterior):
    origin, rows = torch.zeros(DIM), torch.eye(DIM)[:2]
    with pytest.raises(ShapeError, match=r"directions must have shape \(K, D\)"):
        width_profile(bowl, origin, rows[0], DATA, loss_of, **OPTIONS)
    with pytest.raises(ShapeError, match="'direction 1' is"):
        width_profile(bowl, origin, torch.stack([rows[0], origin]), DATA, loss_of, **OPTIONS)
    with pytest.raises(ShapeError, match="a name for each of the 2 directions; got 1"):
        width_profile(bowl, origin, rows, DATA, loss_of, names=["one"], **OPTIONS)
    with pytest.raises(ShapeError, match=r"distances must have shape \(T,\)"):
        width_profile(bowl, origin, rows, DATA, loss_of, torch.ones(2, 2), **OPTIONS)
    with pytest.raises(ShapeError, match="numbers from 0 to 4, at least one; got \\[5\\]"):
        swag_width(bowl, posterior, DATA, loss_of, components=[5], **OPTIONS)
    with pytest.raises(ShapeError, match="rank must be at least 1; got 0"):
        swag_width(bowl, posterior, DATA, loss_of, rank=0, **OPTIONS)
    with pytest.raises(ShapeError, match="must have a low-rank part"):
        diagonal = GaussianPosterior.diagonal(origin, torch.ones(DIM), posterior.layout)
        swag_width(bowl, diagonal, DATA, loss_of, **OPTIONS)
    with pytest.raises(ShapeError, match="12 dimensions, 5 of them spanned; expected 1 to 7 directions; got 8"):
        orthogonal_width(bowl, pca_subspace(posterior), DATA, loss_of, num_directions=8, **OPTIONS)
