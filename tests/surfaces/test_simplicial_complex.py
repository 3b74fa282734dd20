"""Simplicial complexes: the law of their draws, volumes, growth, training, files."""

import math

import pytest
import torch
from scipy.stats import beta, chisquare, kstest
from torch import nn

import lowrank_bdl as lb
from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.linalg.simplex_volume import log_simplex_volume
from lowrank_bdl.surfaces.simplicial_complex import SimplicialComplex
from lowrank_bdl.surfaces.surface_model import SurfaceModel
from lowrank_bdl.training.losses import SurfaceLoss, cross_entropy, of_output
from lowrank_bdl.training.trainer import Trainer
from tests.oracles import assert_close
from tests.statistical import ALPHA

FAN = [(0, 1, 4), (1, 2, 4), (2, 3, 4), (3, 0, 4)]
SQUARE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.3, 0.1]], dtype=torch.float64)


def corners(m, dim, seed=0, dtype=torch.float64):
    return torch.randn(m, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the law of the draws --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_weights_in_a_simplex_are_dirichlet(k):
    """Each weight is Beta(1, k), all orders of them are alike; squared shares are not of that law and fail."""
    weights = SimplicialComplex(corners(k + 1, 6)).coefficients(4000, seeded())
    assert weights.shape == (4000, k + 1)
    assert_close(weights.sum(1), torch.ones(4000, dtype=torch.float64))
    for column in weights.T:
        assert kstest(column.numpy(), beta(1, k).cdf).pvalue > ALPHA
    orders = (weights.argsort(1) * (k + 1) ** torch.arange(k + 1)).sum(1).unique(return_counts=True)[1]
    assert len(orders) == math.factorial(k + 1) and chisquare(orders.numpy()).pvalue > ALPHA
    wrong = weights.square() / weights.square().sum(1, keepdim=True)
    assert kstest(wrong[:, 0].numpy(), beta(1, k).cdf).pvalue < ALPHA


def grid_counts(points):
    cells = (points * 5).long().clamp(0, 4)
    return torch.bincount(5 * cells[:, 0] + cells[:, 1], minlength=25).numpy()


def test_draws_are_uniform_over_a_complex_of_unequal_simplexes():
    """A square cut into four triangles around a point off its middle; triangles picked alike fail."""
    fan = SimplicialComplex(SQUARE, FAN)
    assert_close(fan.probabilities(), torch.tensor([0.05, 0.35, 0.45, 0.15], dtype=torch.float64), cond=10)
    points = fan.sample(4000, seeded())
    assert chisquare(grid_counts(points)).pvalue > ALPHA
    alike = torch.cat([SimplicialComplex(SQUARE[list(face)]).sample(1000, seeded(i)) for i, face in enumerate(FAN)])
    assert chisquare(grid_counts(alike)).pvalue < ALPHA


def test_each_dimension_has_the_share_of_its_simplexes():
    edges = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [5.0, 5.0], [6.0, 7.0]], dtype=torch.float64)
    mixed = SimplicialComplex(edges, [(0, 1), (3,), (0, 2), (4,)])
    assert_close(mixed.probabilities(), torch.tensor([0.125, 0.25, 0.375, 0.25], dtype=torch.float64), cond=10)
    assert_close(mixed.log_volume(), torch.tensor(0.5 * math.log(4) + 0.5 * math.log(2), dtype=torch.float64))
    weights = mixed.coefficients(4000, seeded())
    counts = [int((weights[:, i] == 1).sum()) for i in (3, 4)]
    counts += [int((weights[:, i] > 0).sum()) for i in (1, 2)]
    assert chisquare(counts, [1000, 1000, 500, 1500]).pvalue > ALPHA


def test_simplexes_without_a_volume_are_alike():
    flat = SimplicialComplex(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [5.0, 5.0]]), [(0, 1, 2), (1, 2, 3)])
    assert flat.probabilities().tolist() == [0.5, 0.5] and flat.volumes().tolist() == [0.0, 0.0]
    one_flat = SimplicialComplex(torch.tensor([[0.0, 0], [1, 1], [2, 2], [5, 0]]), [(0, 1, 2), (1, 2, 3)])
    assert one_flat.probabilities().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_center_is_the_mean_of_the_law(dtype):
    fan = SimplicialComplex(SQUARE.to(dtype), FAN)
    assert_close(fan.center_theta(), torch.tensor([0.5, 0.5], dtype=torch.float64), dtype)
    single = corners(4, 6, dtype=dtype)
    assert_close(SimplicialComplex(single).center_theta(), single.double().mean(0), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_points_are_combinations_of_corners(dtype):
    vertices = corners(5, 7, dtype=dtype)
    surface = SimplicialComplex(vertices, [(0, 1, 2), (2, 3, 4)], trainable=range(5))
    weights = surface.coefficients(6, seeded())
    assert ((weights > 0).sum(1) == 3).all()
    theta = surface.to_theta(weights.view(2, 3, 5))
    assert theta.dtype == dtype and theta.shape == (2, 3, 7)
    assert_close(theta.view(6, 7), weights @ vertices.double(), dtype)
    assert torch.equal(surface.to_theta(torch.eye(5)), vertices)  # corners to the last bit
    assert torch.equal(surface.to_theta(torch.zeros(2, 5)), torch.zeros(2, 7, dtype=dtype))
    assert surface.to_theta(weights[:0]).shape == (0, 7)
    assert torch.equal(surface.sample(6, seeded()), surface.sample(torch.Size([2, 3]), seeded()).view(6, 7))


@pytest.mark.parametrize("n,shape", [(0, (0, 7)), (3, (3, 7)), (torch.Size(), (7,)), ((2, 3), (2, 3, 7))])
def test_sample_shapes_and_generators(n, shape):
    surface = SimplicialComplex(corners(4, 7), [(0, 1), (1, 2), (2, 3)], trainable=[1])
    state = torch.get_rng_state()
    one, same = (surface.sample(n, seeded(3)) for _ in range(2))
    assert one.shape == shape and torch.equal(one, same) and not one.requires_grad
    assert torch.equal(state, torch.get_rng_state())


def test_gradient_of_a_draw_is_its_weights():
    surface = SimplicialComplex(corners(3, 5), trainable=[0, 2])
    weights = surface.coefficients(1, seeded())[0]
    direction = corners(1, 5, seed=1)[0]
    (surface.draw_theta(seeded()) @ direction).backward()
    assert_close(surface.vertex_0.grad, weights[0] * direction)
    assert_close(surface.vertex_2.grad, weights[2] * direction)
    assert not surface.vertex_1.requires_grad


# ---- volumes ---------------------------------------------------------------------------------------------------------


def test_volumes_of_simplexes_and_their_total():
    vertices = corners(6, 9, dtype=torch.float32)
    simplexes = [(0, 1, 2), (1, 2, 3), (3, 4, 5)]
    surface = SimplicialComplex(vertices, simplexes)
    each = torch.stack([log_simplex_volume(vertices[list(simplex)]) for simplex in simplexes])
    assert torch.equal(surface.log_volumes(), each)
    assert_close(surface.volumes(), each.exp())
    assert_close(surface.log_volume(), each.exp().sum().log())


def test_gradient_of_the_total_volume():
    free, fixed = corners(2, 4), corners(3, 4, seed=1)

    def value(a, b):
        surface = SimplicialComplex([*fixed, *free], [(0, 1, 3), (1, 3, 4), (2, 4)], trainable=[3, 4])
        surface.vertex_3.data, surface.vertex_4.data = a.detach(), b.detach()
        return surface

    surface = value(*free)
    surface.log_volume().backward()
    step = 1e-6
    for row, found in enumerate((surface.vertex_3.grad, surface.vertex_4.grad)):
        for column in range(4):
            moved = [free.clone(), free.clone()]
            moved[0][row, column] += step
            moved[1][row, column] -= step
            slope = (value(*moved[0]).log_volume() - value(*moved[1]).log_volume()) / (2 * step)
            assert abs(found[column] - slope) < 1e-7 * max(1, abs(slope))


def test_flat_simplexes_add_nothing_to_the_total_or_its_gradient():
    vertices = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [5.0, 0.0]], dtype=torch.float64)
    surface = SimplicialComplex(vertices, [(0, 1, 2), (1, 2, 3)], trainable=range(4))
    assert_close(surface.log_volume(), torch.tensor(math.log(2.5), dtype=torch.float64), cond=10)
    surface.log_volume().backward()
    assert surface.vertex_0.grad is None and torch.isfinite(surface.vertex_1.grad).all()
    with pytest.raises(ShapeError, match=r"simplex \(0, 1, 2\) has no volume: its vertices must span 2 dimensions"):
        SimplicialComplex(vertices[:3]).log_volume()


def test_points_have_a_volume_of_one_each():
    surface = SimplicialComplex(corners(3, 2), [(0,), (1,), (2,)])
    assert surface.volumes().tolist() == [1, 1, 1]
    assert_close(surface.log_volume(), torch.tensor(math.log(3), dtype=torch.float64))


# ---- growth and training ---------------------------------------------------------------------------------------------


def test_vertices_are_copies_in_memory_of_their_own():
    vertices = corners(3, 4)
    surface = SimplicialComplex(vertices, trainable=[0])
    assert len({vertices.data_ptr(), *(v.untyped_storage().data_ptr() for v in surface.vertices)}) == 4
    assert all(v.untyped_storage().nbytes() == 4 * 8 for v in surface.vertices)
    with torch.no_grad():
        surface.vertex_0.zero_()
    assert torch.equal(vertices, corners(3, 4))


def test_frozen_vertices_are_buffers_in_the_same_memory():
    surface = SimplicialComplex(corners(3, 4), trainable=[2])
    assert surface.trainable == (2,) and [name for name, _ in surface.named_parameters()] == ["vertex_2"]
    assert set(surface.state_dict()) == {"vertex_0", "vertex_1", "vertex_2"}
    pointers = [v.data_ptr() for v in surface.vertices]
    surface.freeze()
    assert surface.trainable == () and not list(surface.parameters())
    surface.unfreeze([0, 1])
    surface.freeze([0])
    assert surface.trainable == (1,) and [v.data_ptr() for v in surface.vertices] == pointers
    surface.unfreeze()
    assert surface.trainable == (0, 1, 2) and torch.equal(torch.stack(surface.vertices), corners(3, 4))
    for change in (surface.freeze, surface.unfreeze):
        with pytest.raises(ShapeError, match=r"number must be in \[0, 3\); got 3"):
            change([0, 3])
    assert surface.trainable == (0, 1, 2)


@pytest.mark.parametrize("modes", [1, 2, 3])
def test_growth_vertex_by_vertex(modes):
    vertices = corners(modes, 500)
    surface = SimplicialComplex(vertices, [(i,) for i in range(modes)])
    for added in range(3):
        joined = torch.stack(surface.vertices)
        centroid = joined.mean(0)
        spread = (joined - centroid).square().sum(1).mean().sqrt() if len(joined) > 1 else centroid.norm()
        new = surface.add_vertex(generator=seeded(added), perturbation=0.1)
        assert new == modes + added and surface.trainable == (new,)
        assert surface.simplexes == tuple((i, *range(modes, new + 1)) for i in range(modes))
        assert_close((surface.vertices[-1] - centroid).norm(), 0.1 * spread, cond=100)
        assert torch.equal(torch.stack(surface.vertices[:-1]), joined)
        assert torch.isfinite(surface.log_volume()) and (surface.volumes() > 0).all()


def test_growth_is_a_function_of_the_generator_and_may_be_told_where():
    starts = [SimplicialComplex(corners(2, 6)) for _ in range(3)]
    for surface, seed in zip(starts, (0, 0, 1), strict=True):
        surface.add_vertex(generator=seeded(seed))
    assert torch.equal(starts[0].vertex_2, starts[1].vertex_2) and not torch.equal(
        starts[0].vertex_2, starts[2].vertex_2
    )
    theta = corners(1, 6, seed=5)[0]
    told = SimplicialComplex(corners(3, 6), [(0, 1), (2,)])
    assert told.add_vertex(theta, simplexes=[1]) == 3 and told.simplexes == ((0, 1), (2, 3))
    assert torch.equal(told.vertex_3, theta) and told.vertex_3.data_ptr() != theta.data_ptr()
    still = SimplicialComplex(corners(2, 6), [(0,), (1,)])
    still.add_vertex(perturbation=0)
    assert_close(still.vertex_2, corners(2, 6).mean(0))
    assert still.trainable == (2,)


def test_refused_growth_changes_nothing():
    surface = SimplicialComplex(corners(3, 2), [(0, 1), (2,)], trainable=[0])
    for arguments, error, message in [
        (dict(simplexes=[2]), ShapeError, r"simplexes numbered in \[0, 2\); got \[2\]"),
        (dict(simplexes=[]), ShapeError, r"got \[\]"),
        (dict(theta=torch.zeros(3)), ShapeError, r"point 1 has shape \(3,\)"),
        (dict(theta=torch.full((2,), math.nan, dtype=torch.float64)), NonFiniteError, "entry 0 of point 1 is nan"),
        (dict(perturbation=-1.0), ValueError, "perturbation must be at least 0 and finite; got -1.0"),
    ]:
        with pytest.raises(error, match=message):
            surface.add_vertex(**arguments)
    surface.add_vertex(simplexes=[0], generator=seeded())
    with pytest.raises(ShapeError, match=r"in 2 dimensions has at most 3 vertices; got \(0, 1, 3, 4\)"):
        surface.add_vertex()
    assert surface.simplexes == ((0, 1, 3), (2,)) and surface.num_vertices == 4 and surface.trainable == (3,)


X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


def grown(volume, steps=25):
    net = network()
    layout = lb.ParameterLayout.from_module(net)
    surface = SimplicialComplex([layout.flatten(net)], layout=layout)
    for number in range(2):
        surface.add_vertex(generator=seeded(number))
        model = SurfaceModel(net, surface, generator=seeded(10 + number))
        optimizer = torch.optim.SGD(surface.parameters(), lr=0.1, momentum=0.9)
        loss = SurfaceLoss(cross_entropy, volume=volume, num_samples=2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, X, Y)[0].backward()
            optimizer.step()
    return net, surface, loss


def test_training_moves_the_new_vertex_alone_and_the_volume_term_widens_the_simplex():
    net, narrow, loss = grown(volume=0.0)
    start = network()
    assert torch.equal(narrow.vertex_0, narrow.layout.flatten(start))
    assert torch.equal(narrow.layout.flatten(net), narrow.vertex_0) and narrow.trainable == (2,)
    _, wide, _ = grown(volume=0.02)
    assert wide.log_volume() > narrow.log_volume() + math.log(3)
    for surface in (narrow, wide):  # every point of it is as good as the network trained on its own
        for theta in surface.sample(20, seeded()):
            surface.layout.assign_(start, theta)
            assert cross_entropy(start, X, Y)[0] < 0.35


def test_training_resumes_to_the_last_bit(tmp_path):
    def trainer():
        net = network()
        layout = lb.ParameterLayout.from_module(net)
        surface = SimplicialComplex([layout.flatten(network(s)) for s in range(3)], [(0,), (1,), (2,)], layout)
        surface.add_vertex(generator=seeded())
        model = SurfaceModel(net, surface)
        loss = SurfaceLoss(cross_entropy, weight_decay=1e-3, volume=1e-3, num_samples=2)
        return Trainer(model, torch.optim.SGD(surface.parameters(), lr=0.1, momentum=0.9), loss), surface

    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = [(X[:20], Y[:20]), (X[20:], Y[20:])]
        whole, expected = trainer()
        whole.fit(data, 4, progress=False)
        torch.manual_seed(0)
        first, _ = trainer()
        first.fit(data, 2, checkpoint=tmp_path / "run.safetensors", progress=False)
        torch.manual_seed(7)
        second, found = trainer()
        second.load(tmp_path / "run.safetensors")
        second.fit(data, 4, progress=False)
    assert second.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(found.vertices, expected.vertices, strict=True))


def test_vertices_may_stay_on_the_host(device):
    net = nn.Linear(2, 1).to(device)
    surface = SimplicialComplex(torch.ones(2, 3, device=device), vertex_device="cpu", trainable=[1])
    assert {v.device.type for v in surface.vertices} == {"cpu"}
    model = SurfaceModel(net, surface)
    squared = of_output(nn.functional.mse_loss)
    loss, output = SurfaceLoss(squared, weight_decay=0.1)(
        model, torch.ones(4, 2, device=device), torch.zeros(4, 1).to(device)
    )
    loss.backward()
    assert output.device.type == device.type and surface.vertex_1.grad.device.type == "cpu"
    assert surface.vertex_1.grad.abs().min() > 0
    found = lb.predict(net, surface, [torch.ones(4, 2)], 3, likelihood="gaussian", noise_variance=1.0, progress=False)
    torch.testing.assert_close(found.mean.flatten(), torch.full((4,), 3.0, device=device))


def test_predictions_average_over_draws():
    net = network()
    layout = lb.ParameterLayout.from_module(net)
    surface = SimplicialComplex([layout.flatten(network(s)) for s in range(3)], layout=layout)
    found, again = (lb.predict(net, surface, [X], 8, generator=seeded(), progress=False) for _ in range(2))
    assert torch.equal(found.mean, again.mean)
    corner = lb.predict(net, SimplicialComplex([layout.flatten(net)], layout=layout), [X], 2, progress=False)
    torch.testing.assert_close(corner.mean, net(X).softmax(1).detach())
    assert not torch.allclose(found.mean, corner.mean, atol=1e-2)


# ---- files and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_saved_complex_is_the_same_to_the_last_bit(dtype, tmp_path):
    layout = lb.ParameterLayout.from_module(nn.Linear(2, 3))
    surface = SimplicialComplex(
        corners(4, 9, dtype=dtype), [(0, 1, 2), (2, 3)], layout, trainable=[3], provenance={"seed": 1}
    )
    surface.save(tmp_path / "complex.safetensors")
    for loaded in (
        SimplicialComplex.load(tmp_path / "complex.safetensors", layout),
        lb.load_posterior(tmp_path / "complex.safetensors"),
    ):
        assert type(loaded) is SimplicialComplex and loaded.layout == layout and loaded.provenance == {"seed": 1}
        assert loaded.simplexes == surface.simplexes and loaded.trainable == (3,)
        assert all(torch.equal(a, b) for a, b in zip(loaded.vertices, surface.vertices, strict=True))


def test_damaged_files(tmp_path):
    path = tmp_path / "complex.safetensors"
    SimplicialComplex(corners(3, 4)).save(path)
    tensors, metadata = read_tensors(path, "simplicial complex", ())
    for changes, message in [
        ({"simplexes": None}, "damaged metadata: got simplexes None"),
        ({"simplexes": [[0, 1.5]]}, "damaged metadata"),
        ({"trainable": "all"}, "damaged metadata: .* trainable 'all'"),
        ({"simplexes": [[0, 1, 2, 3]]}, "lacks vertex_3"),
        ({"simplexes": []}, "contradicts itself: a complex needs at least 1 simplex"),
        ({"trainable": [5]}, r"contradicts itself: a vertex's number must be in \[0, 3\); got 5"),
    ]:
        write_tensors(path, "simplicial complex", tensors, {**metadata, **changes})
        with pytest.raises(CheckpointError, match=message):
            SimplicialComplex.load(path)
    write_tensors(path, "simplicial complex", {**tensors, "vertex_1": torch.zeros(2)}, metadata)
    with pytest.raises(CheckpointError, match="contradicts itself: points must be vectors of 4"):
        SimplicialComplex.load(path)


@pytest.mark.parametrize(
    "simplexes,message",
    [
        ([], "at least 1 simplex; got none"),
        ([()], r"vertices in \[0, 3\); got \(\)"),
        ([(0, 1, 3)], r"vertices in \[0, 3\); got \(0, 1, 3\)"),
        ([(0, -1)], r"vertices in \[0, 3\); got \(-1, 0\)"),
        ([(0, 1, 1)], r"each vertex once; got \(0, 1, 1\)"),
        ([(0, 1), (2, 1), (1, 0)], r"face of another; got \(0, 1\) and \(0, 1\)"),
        ([(0, 1, 2), (2,)], r"face of another; got \(0, 1, 2\) and \(2,\)"),
        ([(0, 1)], r"every vertex must be in a simplex; \[2\] are in none"),
    ],
)
def test_simplexes_that_make_no_complex(simplexes, message):
    with pytest.raises(ShapeError, match=message):
        SimplicialComplex(corners(3, 4), simplexes)


def test_refusals():
    with pytest.raises(ShapeError, match=r"points must have shape \(n, D\); got \(3,\)"):
        SimplicialComplex(torch.zeros(3))
    with pytest.raises(ShapeError, match="at least one weight vector; got none"):
        SimplicialComplex([])
    with pytest.raises(ShapeError, match=r"point 1 has shape \(3,\) and dtype torch.float64"):
        SimplicialComplex([torch.zeros(3), torch.zeros(3, dtype=torch.float64)])
    with pytest.raises(ShapeError, match="in 1 dimensions has at most 2 vertices"):
        SimplicialComplex(torch.tensor([[0.0], [1.0], [2.0]]))
    with pytest.raises(ShapeError, match="points must be vectors of 3"):
        SimplicialComplex(torch.zeros(2, 4), layout=lb.ParameterLayout.from_module(nn.Linear(2, 1)))
    with pytest.raises(ShapeError, match=r"number must be in \[0, 2\); got 2"):
        SimplicialComplex(corners(2, 3), trainable=[2])
    surface = SimplicialComplex(corners(2, 3), trainable=[1])
    with pytest.raises(ShapeError, match=r"coefficients must be \(\*S, 2\); got \(3,\)"):
        surface.to_theta(torch.zeros(3))
    shown = "SimplicialComplex(num_vertices=2, simplexes=[(0, 1)], trainable=[1], numel=3, dtype=torch.float64)"
    assert repr(surface) == shown
