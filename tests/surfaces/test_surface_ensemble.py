"""Ensembles of surfaces: shares of the draws, predictions, files."""

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

import lowrank_bdl as lb
from lowrank_bdl.errors import CheckpointError, ShapeError
from lowrank_bdl.surfaces.curves import PolygonalChain
from lowrank_bdl.surfaces.simplicial_complex import SimplicialComplex
from lowrank_bdl.surfaces.surface_ensemble import SurfaceEnsemble
from tests.statistical import ALPHA

LAYOUT = lb.ParameterLayout.from_module(nn.Linear(2, 2))


def surfaces(layout=LAYOUT):
    """Three whose points lie near 0, 10 and 20 in every coordinate."""
    ends = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0)) + 10 * torch.arange(3)[:, None, None]
    return [
        SimplicialComplex(ends[0], layout=layout),
        PolygonalChain(ends[1], layout),
        SimplicialComplex(ends[2], layout=layout),
    ]


def owners(draws):
    return (draws.mean(1) / 10).round().long()


def test_draws_go_round():
    ensemble = SurfaceEnsemble(surfaces())
    draws = torch.stack([ensemble.draw(s, torch.Generator().manual_seed(s)) for s in range(9)])
    assert owners(draws).tolist() == [0, 1, 2] * 3 and ensemble.layout == LAYOUT
    expected = ensemble.surfaces[1].sample(1, torch.Generator().manual_seed(4))[0]
    assert torch.equal(draws[4], expected)
    with pytest.raises(ValueError, match="number of a draw must be >= 0; got -1"):
        ensemble.draw(-1)


def test_samples_come_from_all_alike():
    """False-alarm rate ALPHA; going round, which has less variance, is seen in pairs of draws."""
    ensemble = SurfaceEnsemble(surfaces())
    found = owners(ensemble.sample(1800, torch.Generator().manual_seed(0)))
    assert chisquare(torch.bincount(found, minlength=3).numpy()).pvalue > ALPHA
    pairs = torch.bincount(3 * found[0::2] + found[1::2], minlength=9)
    assert chisquare(pairs.numpy()).pvalue > ALPHA
    round_robin = torch.arange(1800) % 3
    assert chisquare(torch.bincount(3 * round_robin[0::2] + round_robin[1::2], minlength=9).numpy()).pvalue < ALPHA


@pytest.mark.parametrize("n,shape", [(0, (0, 6)), (4, (4, 6)), (torch.Size(), (6,)), ((2, 3), (2, 3, 6))])
def test_sample_shapes_and_generators(n, shape):
    ensemble = SurfaceEnsemble(surfaces())
    one, same = (ensemble.sample(n, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == shape and torch.equal(one, same)


def test_predictions_average_over_equal_numbers_of_points():
    net = nn.Linear(2, 2)
    points = [torch.full((1, 6), 0.0), torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 50.0]])]
    ensemble = SurfaceEnsemble([SimplicialComplex(point, layout=LAYOUT) for point in points])
    found = lb.predict(net, ensemble, [torch.ones(1, 2)], num_samples=6, progress=False)
    torch.testing.assert_close(found.mean, torch.tensor([[0.25, 0.75]]))


def test_saved_ensemble_is_the_same_to_the_last_bit(tmp_path):
    ensemble = SurfaceEnsemble(surfaces(), {"seed": 3})
    ensemble.save(tmp_path / "ensemble.safetensors")
    loaded = lb.load_posterior(tmp_path / "ensemble.safetensors", LAYOUT)
    assert type(loaded) is SurfaceEnsemble and loaded.provenance == {"seed": 3}
    assert [type(s) for s in loaded.surfaces] == [type(s) for s in ensemble.surfaces]
    for s in range(3):
        drawn = [e.draw(s, torch.Generator().manual_seed(s)) for e in (ensemble, loaded)]
        assert torch.equal(*drawn)
    with pytest.raises(CheckpointError, match="holds a 'surface ensemble'; expected a 'simplicial complex'"):
        SimplicialComplex.load(tmp_path / "ensemble.safetensors")


def test_refusals():
    with pytest.raises(ShapeError, match="at least 1 surface; got none"):
        SurfaceEnsemble([])
    with pytest.raises(TypeError, match="surface 1 is a Linear, which lacks layout, sample"):
        SurfaceEnsemble([surfaces()[0], nn.Linear(2, 2)])
    with pytest.raises(ShapeError, match="either all surfaces have a layout or none; those of 0 and 1 differ"):
        SurfaceEnsemble([surfaces()[0], surfaces(None)[1]])
    other = lb.ParameterLayout.from_module(nn.Linear(1, 3))
    with pytest.raises(ShapeError, match=r"surface 1 is over other parameters than surface 0: parameter 'weight'"):
        SurfaceEnsemble([surfaces()[0], surfaces(other)[1]])
    assert repr(SurfaceEnsemble(surfaces())) == "SurfaceEnsemble(num_surfaces=3, of=PolygonalChain, SimplicialComplex)"
