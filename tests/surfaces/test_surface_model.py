"""The network on a surface: where it is evaluated, what gradients reach, exact resume, a bend that works."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy as ce

import lowrank_bdl as lb
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.surfaces.curves import BezierCurve, Curve, PolygonalChain
from lowrank_bdl.surfaces.surface_model import SurfaceModel
from lowrank_bdl.training.losses import SurfaceLoss, cross_entropy
from lowrank_bdl.training.trainer import Trainer


@pytest.fixture(autouse=True)
def leave_the_global_generator_as_it_was() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    convolution = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(12, 3))


def curve_of(*seeds: int, cls: type[Curve] = BezierCurve) -> Curve:
    nets = [network(seed) for seed in seeds]
    layout = lb.ParameterLayout.from_module(nets[0])
    return cls([layout.flatten(net) for net in nets], layout)


X = torch.randn(22, 2, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (22,), generator=torch.Generator().manual_seed(1))


def plain(numel: int = 6, n: int = 3) -> Tensor:
    return torch.randn(n, numel, generator=torch.Generator().manual_seed(2))


# ---- where the network is evaluated ----------------------------------------------------------------------------------


def test_training_draws_and_evaluation_takes_the_middle() -> None:
    linear = nn.Linear(2, 2)
    net = SurfaceModel(linear, BezierCurve(plain()), generator=torch.Generator().manual_seed(3))
    x = torch.ones(4, 2)
    weights = [p.clone() for p in linear.parameters()]
    first, second = net(x), net(x)
    net.generator.manual_seed(3)
    thetas = [net.surface.draw_theta(net.generator) for _ in range(2)]
    for found, theta in zip((first, second), thetas, strict=True):
        assert torch.equal(found, functional_call(linear, net.layout.unflatten(theta), (x,)))
    assert not torch.equal(first, second)
    middle = functional_call(linear, net.layout.unflatten(net.surface.center_theta()), (x,))
    assert torch.equal(net.eval()(x), middle)
    assert all(torch.equal(p, before) for p, before in zip(linear.parameters(), weights, strict=True))


def test_at_pins_the_weights_in_both_modes_and_lets_go_after_an_error() -> None:
    linear = nn.Linear(2, 2)
    net = SurfaceModel(linear, BezierCurve(plain()))
    x, (outer, inner) = torch.ones(1, 2), plain(n=2, numel=6)

    def at(theta: Tensor) -> Tensor:
        return functional_call(linear, net.layout.unflatten(theta), (x,))

    for mode in (True, False):
        net.train(mode)
        with net.at(outer):
            assert torch.equal(net(x), at(outer))
            with net.at(inner):
                assert torch.equal(net(x), at(inner))
            assert torch.equal(net(x), at(outer))
    with pytest.raises(ShapeError, match=r"theta must have shape \(6,\); got \(5,\)"), net.at(outer[:5]):
        net(x)
    assert torch.equal(net(x), at(net.surface.center_theta()))


def test_the_ends_reproduce_their_networks_to_the_last_bit() -> None:
    for cls in (BezierCurve, PolygonalChain):
        curve = curve_of(0, 5, 9, cls=cls)
        net = SurfaceModel(network(17), curve).eval()
        for seed, t in ((0, 0.0), (9, 1.0)):
            with net.at(curve(t)):
                assert torch.equal(net(X), network(seed).eval()(X))


def test_batch_norm_and_dropout_are_those_of_training() -> None:
    net = SurfaceModel(network(), curve_of(1, 2, 3))
    net(X)
    bn = net.model[1]
    assert bn.num_batches_tracked == 1 and bn.running_mean.abs().max() > 0
    net.eval()(X)
    assert bn.num_batches_tracked == 1
    theta = net.surface.center_theta()
    with net.train().at(theta):
        assert not torch.equal(net(X), net(X))  # masks


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_bend_is_its_weight_times_that_of_theta() -> None:
    """Against the same network at a leaf θ, and against finite differences of the whole thing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    layout = lb.ParameterLayout.from_module(model)
    curve = BezierCurve(plain(layout.numel, 4).double(), layout, fix_end=False)
    net = SurfaceModel(model, curve, generator=torch.Generator())
    x, y = torch.randn(5, 2).double(), torch.tensor([0, 1, 1, 0, 1])

    def value() -> Tensor:
        net.generator.manual_seed(8)
        return ce(net(x), y)

    value().backward()
    net.generator.manual_seed(8)
    t = torch.rand((), generator=net.generator, dtype=torch.float64)
    theta = curve(t).detach().requires_grad_()
    (expected,) = torch.autograd.grad(ce(functional_call(model, layout.unflatten(theta), (x,)), y), theta)
    for number, weight in enumerate(curve.coefficients(t)):
        if number == 0:
            continue
        point = curve.get_parameter(f"point_{number}")
        torch.testing.assert_close(point.grad, weight * expected, rtol=1e-10, atol=1e-14)
        numeric = torch.zeros_like(point)
        with torch.no_grad():
            for i in range(len(point)):
                ends = []
                for step in (1e-5, -2e-5):
                    point[i] += step
                    ends.append(value().item())
                point[i] += 1e-5
                numeric[i] = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(point.grad, numeric, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_tied_weights_are_one_and_parameters_that_are_left_out_are_trained_as_they_are() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    layout = lb.ParameterLayout.from_module(tied, include="*.weight")
    points = torch.stack([torch.eye(3).flatten() * scale for scale in (1.0, 2.0, 3.0)])
    net = SurfaceModel(tied, PolygonalChain(points, layout))
    with torch.no_grad():
        tied[0].bias.fill_(1.0)
        tied[1].bias.zero_()
    with net.at(net.surface(0.5)):
        found = net(torch.ones(1, 3))
    assert found.tolist() == [[6.0] * 3]  # 2 (2 + 1)
    found.sum().backward()
    assert tied[0].bias.grad.tolist() == [2.0] * 3 and tied[0].weight.grad is None
    assert net.surface.point_1.grad.tolist() == [5.0] * 9  # 2 from the first layer, 3 from the second


def test_a_surface_without_a_layout_is_of_all_trainable_parameters() -> None:
    linear = nn.Linear(2, 2)
    assert SurfaceModel(linear, BezierCurve(plain())).layout == lb.ParameterLayout.from_module(linear)
    with pytest.raises(ShapeError, match=r"points must have shape \(6,\); got \(5,\)"):
        SurfaceModel(linear, BezierCurve(plain(5)))
    layout = lb.ParameterLayout.from_module(nn.Linear(1, 3))
    with pytest.raises(ShapeError, match="Model and layout differ first at parameter 'weight'"):
        SurfaceModel(linear, BezierCurve(plain(), layout))


# ---- training --------------------------------------------------------------------------------------------------------


def batches(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    return [(X[part], Y[part]) for part in torch.randperm(22, generator=generator).split(8)]


def trainer_of(every_parameter: bool) -> Trainer:
    net = SurfaceModel(network(), curve_of(1, 2, 3))
    torch.manual_seed(11)
    parameters = net.parameters() if every_parameter else net.surface.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return Trainer(net, optimizer, SurfaceLoss(cross_entropy, weight_decay=1e-2, num_samples=2), seed=3)


@pytest.mark.parametrize("every_parameter", [False, True])
def test_a_resumed_run_is_the_whole_one_to_the_last_bit(every_parameter: bool, tmp_path: Path) -> None:
    whole = trainer_of(every_parameter)
    whole.fit(batches, 4, progress=False)
    killed = trainer_of(every_parameter)
    killed.fit(batches, 2, checkpoint=tmp_path / "run.safetensors", progress=False)
    again = trainer_of(every_parameter)
    torch.manual_seed(99)
    again.load(tmp_path / "run.safetensors")
    again.fit(batches, 4, progress=False)
    assert again.history == whole.history
    for (name, found), expected in zip(
        again.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    start, end = (network(seed) for seed in (1, 3))
    surface = again.model.surface
    assert torch.equal(surface.point_0, surface.layout.flatten(start))
    assert torch.equal(surface.point_2, surface.layout.flatten(end))
    assert not torch.equal(surface.point_1, surface.layout.flatten(network(2)))
    fresh = network()
    assert all(torch.equal(p, q) for p, q in zip(again.model.model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("cls", [BezierCurve, PolygonalChain])
def test_a_trained_bend_goes_around_the_barrier_between_a_network_and_its_mirror_image(cls: type[Curve]) -> None:
    """Negating all hidden tanh units gives the same function; half-way between the two every hidden weight is 0."""
    torch.manual_seed(0)
    x = torch.rand(200, 2) * 2 - 1
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        ce(model(x), y).backward()
        optimizer.step()
    layout = lb.ParameterLayout.from_module(model)
    start = layout.flatten(model)
    end = torch.cat([-start[:-2], start[-2:]])  # all but the last bias change their sign
    curve = cls.between(start, end, 3, layout)

    @torch.no_grad()
    def profile() -> Tensor:
        net = SurfaceModel(model, curve)
        losses = []
        for theta in curve(torch.linspace(0, 1, 21)):
            with net.at(theta):
                losses.append(ce(net(x), y))
        return torch.stack(losses)

    before = profile()
    assert before[0] < 0.1 and abs(before[0] - before[-1]) < 1e-5 and before[10] > 0.6
    net = SurfaceModel(model, curve)
    trainer = Trainer(net, torch.optim.Adam(curve.parameters(), lr=0.05), SurfaceLoss(cross_entropy))
    with torch.no_grad():  # exactly between the two there is nothing to choose a side by
        curve.point_1 += 0.1 * torch.randn(layout.numel, generator=torch.Generator().manual_seed(1))
    trainer.fit([(x, y)] * 50, 6, progress=False)
    after = profile()
    assert after.max() < before[0] + 0.1
