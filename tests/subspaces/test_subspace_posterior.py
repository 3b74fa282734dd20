"""Draws in a subspace as a posterior over weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.storage import load_posterior
from lowrank_bdl.prediction.predict import predict
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.subspace import Subspace
from lowrank_bdl.subspaces.subspace_posterior import SubspacePosterior
from tests.oracles import assert_close


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture
def subspace(net: nn.Module, generator: torch.Generator) -> Subspace:
    layout = ParameterLayout.from_module(net)
    return Subspace(layout, layout.flatten(net).detach(), torch.randn(layout.numel, 2, generator=generator))


@pytest.fixture
def posterior(subspace: Subspace, generator: torch.Generator) -> SubspacePosterior:
    z = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    return SubspacePosterior(subspace, Draws(z, z.sum(-1), "elliptical slice", 40, 1.5))


def test_weights_are_those_of_the_coordinates(posterior: SubspacePosterior, subspace: Subspace) -> None:
    thetas = posterior.members()
    expected = subspace.origin.double() + posterior.coordinates @ subspace.basis.double().mT
    assert_close(thetas, expected, torch.float32)
    assert_close(posterior.mean, expected.mean(0), torch.float32)
    assert_close(posterior.stddev, expected.std(0, correction=0), torch.float32, cond=10)
    assert posterior.layout is subspace.layout and posterior.num_members == 10
    assert posterior.provenance == {"source": "elliptical slice", "num_evaluations": 40, "seconds": 1.5}


@pytest.mark.parametrize("num,rows", [(1, [9]), (2, [4, 9]), (3, [2, 5, 9]), (10, list(range(10)))])
def test_members_are_evenly_spaced(num: int, rows: list[int], posterior: SubspacePosterior) -> None:
    torch.testing.assert_close(posterior.members(num), posterior.members()[rows])


@pytest.mark.parametrize("total", [1, 2, 3, 8, 13])
def test_numbered_draws_are_each_once_and_spread(total: int) -> None:
    line = Subspace(None, torch.zeros(1), torch.ones(1, 1))
    posterior = SubspacePosterior(line, torch.arange(float(total)).unsqueeze(1))
    order = [int(posterior.draw(s).item()) for s in range(total)]
    assert sorted(order) == list(range(total))
    assert [int(posterior.draw(s + total).item()) for s in range(total)] == order
    for count in range(1, total + 1):  # any beginning has a draw near everywhere
        chosen = sorted(order[:count])
        gaps = [b - a for a, b in zip([-1, *chosen], [*chosen, total], strict=True)]
        assert max(gaps) <= 2 * total / count + 1


def test_sample_is_uniform_over_the_members(posterior: SubspacePosterior, generator: torch.Generator) -> None:
    drawn = posterior.sample(4000, generator=generator)
    which = torch.cdist(drawn, posterior.members()).argmin(1)
    counts = torch.bincount(which, minlength=10).double()
    statistic = (counts - 400).square().sum().item() / 400
    assert statistic < 44.8  # chi-square, 9 degrees of freedom: a false alarm in a million
    assert posterior.sample(torch.Size()).shape == posterior.mean.shape


def test_predict_averages_over_every_draw_once(net: nn.Module, posterior: SubspacePosterior) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    found = predict(net, posterior, [x], num_samples=10, progress=False)
    expected = predict(net, posterior.members(), [x], progress=False)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
    again = predict(net, posterior, [x], num_samples=10, progress=False, max_bytes=0)  # nothing kept
    torch.testing.assert_close(again.mean, found.mean, rtol=0, atol=0)


def test_predict_never_asks_for_all_weights(
    net: nn.Module, posterior: SubspacePosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SubspacePosterior, "members", lambda *_: pytest.fail("n x D"))
    predict(net, posterior, [torch.zeros(2, 3)], num_samples=3, progress=False)


def test_file_gives_everything_back(posterior: SubspacePosterior, subspace: Subspace, tmp_path: Path) -> None:
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    again = load_posterior(path, subspace.layout)
    assert isinstance(again, SubspacePosterior)
    assert torch.equal(again.coordinates, posterior.coordinates) and again.provenance == posterior.provenance
    torch.testing.assert_close(again.draw(3), posterior.draw(3), rtol=1e-6, atol=1e-6)  # stored another way around
    assert path.stat().st_size < posterior.members().nbytes + 4096  # two columns, not ten
    other = ParameterLayout.from_module(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="is of other parameters"):
        SubspacePosterior.load(path, other)


def test_refuses_draws_that_do_not_fit(subspace: Subspace, posterior: SubspacePosterior) -> None:
    with pytest.raises(ShapeError, match=r"draws must have shape \(M, 2\) with M >= 1; got \(4, 3\)"):
        SubspacePosterior(subspace, torch.zeros(4, 3))
    with pytest.raises(ShapeError, match=r"got \(0, 2\)"):
        SubspacePosterior(subspace, torch.zeros(0, 2))
    with pytest.raises(NonFiniteError, match="draw 1 is not"):
        SubspacePosterior(subspace, torch.tensor([[0.0, 0.0], [torch.nan, 0.0]]))
    with pytest.raises(ValueError, match="between 1 and 10; got 11"):
        posterior.members(11)
    assert repr(posterior) == "SubspacePosterior(num_members=10, rank=2, numel=26, dtype=torch.float32)"
    assert posterior.to(torch.float64).mean.dtype == torch.float64
