"""The collector of frequent directions against dense covariances of all iterates."""

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.posteriors.swag import SWAG
from lowrank_bdl.subspaces.frequent_directions import FrequentDirections
from lowrank_bdl.subspaces.principal import pca_subspace
from lowrank_bdl.training.packing import pack, unpack
from tests.oracles import assert_close

F32, F64 = torch.float32, torch.float64


def iterates(number: int, dim: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = 2.0 ** -torch.arange(dim, dtype=F64)
    return torch.randn(number, dim, dtype=F64, generator=generator) * scales + 1


def collect(thetas: Tensor, size: int, centering: str = "running") -> FrequentDirections:
    collector = FrequentDirections(thetas.shape[1], size, centering=centering, dtype=thetas.dtype)
    for theta in thetas:
        collector.update(theta)
    return collector


def covariance(thetas: Tensor, centering: str) -> Tensor:
    """Divide by iterates absorbed minus 1, about the running or the final mean."""
    if centering == "final":
        return thetas.mT.cov()
    rows = torch.stack([theta - thetas[: t + 1].mean(0) for t, theta in enumerate(thetas)])
    return rows.mT @ rows / (len(thetas) - 1)


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize(("number", "size"), [(2, 2), (7, 4), (100, 3), (100, 13)])
def test_covariance_within_the_bound(number: int, size: int, centering: str) -> None:
    thetas = iterates(number)
    collector, exact = collect(thetas, size, centering), covariance(thetas, centering)
    space = collector.subspace()
    lost = torch.linalg.eigvalsh(exact - space.basis @ space.basis.mT)
    assert collector.n_averaged == number
    assert lost.min() > -1e-12
    assert lost.max() < collector.error_bound + 1e-12
    assert (collector.error_bound < 1e-12) == (number <= 2 * size + 1 or size > 12)
    assert_close(space.origin, thetas.mean(0), F64, 10.0)
    assert space.provenance["of"]["error_bound"] == collector.error_bound
    assert_close(space.gram, space.gram.diagonal().diag(), F64, 100.0)


def test_leading_directions_of_more_iterates_than_columns() -> None:
    thetas = iterates(300)
    space = collect(thetas, 6, "final").subspace(rank=2)
    exact = covariance(thetas, "final")
    values, vectors = torch.linalg.eigh(exact)
    cosines = torch.linalg.svdvals(vectors[:, -2:].mT @ space.orthonormal().basis)
    assert cosines.min() > 0.999
    assert ((space.lengths.square() - values.flip(0)[:2]).abs() <= collect(thetas, 6, "final").error_bound).all()
    assert collect(thetas, 6).subspace(0.5).rank == 1
    assert collect(thetas, 6).subspace(2, orthonormal=True).lengths.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("centering", ["running", "final"])
def test_few_iterates_give_the_subspace_of_swag(centering: str) -> None:
    net = nn.Linear(3, 2).to(F64)
    swag, sketch = SWAG(net, rank=10, centering=centering), FrequentDirections(net, 6, centering=centering)
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        swag.layout.assign_(net, torch.randn(8, dtype=F64, generator=generator))
        swag.update_parameters(net)
        sketch.update_parameters(net)
    expected, found = pca_subspace(swag), sketch.subspace()
    assert_close(found.basis @ found.basis.mT, expected.basis @ expected.basis.mT, F64, 100.0)
    assert_close(found.origin, expected.origin)
    assert found.layout == swag.layout


def test_collection_goes_on_bit_for_bit() -> None:
    thetas = iterates(40).float()
    whole, half = collect(thetas, 3), collect(thetas[:23], 3)
    again = FrequentDirections(12, 3)
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    for theta in thetas[23:]:
        again.update(theta)
    a, b = whole.state_dict(), again.state_dict()
    for part in ("moments", "sketch"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    assert whole.error_bound == again.error_bound > 0


def test_the_state_passes_through_a_checkpoint_of_a_trainer() -> None:
    net = nn.Linear(3, 2)
    sketch, again = FrequentDirections(net, 2, centering="final"), FrequentDirections(net, 2, centering="final")
    for step in range(8):
        nn.init.normal_(net.weight, generator=torch.Generator().manual_seed(step))
        sketch.update_parameters(net)
    skeleton, tensors = pack(sketch.state_dict())
    again.load_state_dict(unpack(json.loads(json.dumps(skeleton)), tensors))
    assert again.error_bound == sketch.error_bound > 0
    assert torch.equal(again.subspace().basis, sketch.subspace().basis)


def test_states_that_do_not_fit_change_nothing() -> None:
    net, other = nn.Linear(3, 2), nn.Linear(3, 3)
    sketch = FrequentDirections(net, 3)
    sketch.update_parameters(net)
    before = copy.deepcopy(sketch.state_dict())
    good = copy.deepcopy(before)
    bad: list[tuple[dict[str, object], str]] = [
        ({}, "lacks moments, sketch, centering, layout"),
        ({**good, "centering": "final"}, "expected a state with centering 'running'; got 'final'"),
        (FrequentDirections(other, 3).state_dict(), "of other parameters: parameter 'weight'"),
        (FrequentDirections(8, 3).state_dict(), "one of state and collector is of plain vectors"),
        (FrequentDirections(net, 4).state_dict(), r"does not fit: storage of the sketch must be \(6, 8\)"),
        ({**good, "moments": {}}, "the state's shift is missing"),
    ]
    for state, message in bad:
        with pytest.raises(CheckpointError, match=message):
            sketch.load_state_dict(state)
    after = sketch.state_dict()
    for part in ("moments", "sketch"):
        assert all(torch.equal(before[part][name], after[part][name]) for name in before[part])


def test_bad_input() -> None:
    net = nn.Linear(3, 2)
    sketch = FrequentDirections(net, 3)
    with pytest.raises(ValueError, match="mean needs at least 1 iterate"):
        _ = sketch.mean
    sketch.update_parameters(net)
    with pytest.raises(ValueError, match="needs at least 2 iterates; got 1"):
        sketch.subspace()
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.bias[1] = math.nan
    with pytest.raises(NonFiniteError, match="parameter 'bias' has nan at flat index 1"):
        sketch.update_parameters(broken)
    with pytest.raises(ShapeError, match="differ first at parameter 'weight'"):
        sketch.update_parameters(nn.Linear(4, 2))
    with pytest.raises(NonFiniteError, match="entry 2 is inf"):
        sketch.update(torch.tensor([0.0, 0, torch.inf, 0, 0, 0, 0, 0]))
    with pytest.raises(ShapeError, match=r"expected a floating \(8,\); got \(7,\)"):
        sketch.update(torch.zeros(7))
    assert sketch.n_averaged == 1
    with pytest.raises(ShapeError, match="call update"):
        FrequentDirections(8, 3).update_parameters(net)
    with pytest.raises(TypeError, match="must be a network or D >= 1; got 'net'"):
        FrequentDirections("net")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="centering must be one of running, final; got 'none'"):
        FrequentDirections(net, centering="none")
    with pytest.raises(ValueError, match="sketch_size must be at least 2; got 1"):
        FrequentDirections(net, 1)
