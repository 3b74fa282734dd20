"""Curves against de Casteljau's algorithm and numpy's interpolation; their law, lengths, files and refusals."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import kstest
from torch import Tensor, nn

import lowrank_bdl as lb
from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.surfaces.curves import BezierCurve, Curve, PolygonalChain
from tests.oracles import assert_close
from tests.statistical import ALPHA

CURVES = (BezierCurve, PolygonalChain)
both = pytest.mark.parametrize("cls", CURVES)


def random_points(n: int, numel: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(n, numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(cls: type[Curve], points: Tensor, t: float) -> Tensor:
    """De Casteljau's algorithm; linear interpolation of each coordinate."""
    rows = points.double()
    if cls is PolygonalChain:
        knots = np.linspace(0, 1, len(rows))
        return torch.tensor([np.interp(t, knots, column) for column in rows.T.numpy()])
    while len(rows) > 1:
        rows = (1 - t) * rows[:-1] + t * rows[1:]
    return rows[0]


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_points_of_the_curve_are_the_oracle_s(cls: type[Curve], n: int, dtype: torch.dtype) -> None:
    points = random_points(n, dtype=dtype)
    t = torch.linspace(0, 1, 12).view(3, 4)
    found = cls(points).to_theta(t)
    assert found.shape == (3, 4, 7)
    expected = torch.stack([oracle(cls, points, value) for value in t.flatten().tolist()]).view(3, 4, 7)
    assert_close(found.detach(), expected, dtype)
    assert_close(cls(points)(0.3).detach(), oracle(cls, points, 0.3), dtype)


@both
@settings(max_examples=30)
@given(n=st.integers(2, 9), t=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_weights_sum_to_one_and_the_curve_may_be_walked_backwards(
    cls: type[Curve], n: int, t: float, seed: int
) -> None:
    points = random_points(n, seed=seed)
    curve, back = cls(points), cls(points.flip(0))
    weights = curve.coefficients(t)
    assert weights.shape == (n,) and bool((weights >= 0).all())
    assert abs(weights.sum().item() - 1) < 1e-14
    assert_close(curve(t).detach(), back(1 - t).detach(), cond=n)
    assert abs(curve.length() - back.length()) <= 1e-12 * curve.length()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_ends_are_the_given_points_to_the_last_bit(cls: type[Curve], n: int, dtype: torch.dtype) -> None:
    points = random_points(n, 1000, dtype) * torch.logspace(-30, 30, 1000).to(dtype)
    curve = cls(points)
    assert torch.equal(curve(0.0), points[0]) and torch.equal(curve(1), points[-1])
    assert torch.equal(curve(torch.tensor([1.0, 0.0])), points[[-1, 0]])
    if cls is PolygonalChain:
        knots = torch.arange(n) / (n - 1)
        torch.testing.assert_close(curve(knots), points, rtol=torch.finfo(dtype).eps, atol=0)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("n", [2, 3, 6])
def test_tangent_is_the_derivative(cls: type[Curve], n: int) -> None:
    curve = cls(random_points(n))
    t = torch.tensor([0.03, 0.31, 0.47, 0.99]).double()  # at no kink of 6 points
    _, expected = torch.autograd.functional.jvp(curve.to_theta, t, torch.ones_like(t), strict=True)
    assert_close(curve.tangent(t).detach(), expected, cond=10)
    assert_close(curve.speed(t), expected.norm(dim=-1), cond=10)


def test_the_tangent_at_a_kink_is_that_of_the_right_piece_and_at_the_end_of_the_last() -> None:
    chain = PolygonalChain(torch.tensor([[0.0], [1.0], [4.0]]))
    assert chain.tangent(torch.tensor([0.0, 0.49, 0.5, 1.0])).flatten().tolist() == [2.0, 2.0, 6.0, 6.0]


@both
def test_gradients_reach_t_and_the_points(cls: type[Curve]) -> None:
    points = random_points(4, 3)

    def theta(t: Tensor, inner: Tensor, last: Tensor) -> Tensor:
        curve = cls(points, fix_end=False)
        return torch.func.functional_call(curve, {"point_1": inner, "point_3": last}, (t,))

    t = torch.tensor([0.1, 0.45, 0.9]).double().requires_grad_()
    inner, last = (points[j].clone().requires_grad_() for j in (1, 3))
    assert torch.autograd.gradcheck(theta, (t, inner, last))
    curve = cls(points)
    curve(0.4).sum().backward()
    for number, weight in ((1, curve.coefficients(0.4)[1]), (2, curve.coefficients(0.4)[2])):
        assert_close(curve.get_parameter(f"point_{number}").grad, weight.expand(3).clone())


# ---- which points are trained ----------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "ends,free",
    [((True, True), [1, 2]), ((False, True), [0, 1, 2]), ((True, False), [1, 2, 3]), ((False, False), [0, 1, 2, 3])],
)
def test_fixed_ends_are_buffers(cls: type[Curve], ends: tuple[bool, bool], free: list[int]) -> None:
    points = random_points(4)
    curve = cls(points, fix_start=ends[0], fix_end=ends[1])
    assert [name for name, _ in curve.named_parameters()] == [f"point_{j}" for j in free]
    assert sorted(curve.state_dict()) == [f"point_{j}" for j in range(4)]
    torch.optim.SGD(curve.parameters(), lr=1.0).zero_grad()
    with torch.no_grad():
        for parameter in curve.parameters():
            parameter.zero_()
    assert bool((points != 0).all())  # the curve's points are copies
    assert [bool((row == 0).all()) for row in curve.points] == [j in free for j in range(4)]


@both
def test_between_starts_as_the_straight_line(cls: type[Curve]) -> None:
    start, end = random_points(2)
    curve = cls.between(start, end, num_bends=5)
    expected = torch.stack([start + j / 4 * (end - start) for j in range(5)])
    assert_close(curve.points.detach(), expected)
    assert torch.equal(curve.points[0], start) and torch.equal(curve.points[-1], end)
    assert cls.between(start, end).num_points == 3
    line = cls.between(start, end, num_bends=2, fix_start=False)
    assert [name for name, _ in line.named_parameters()] == ["point_0"]
    assert_close(curve(0.3).detach(), torch.lerp(start, end, 0.3))


@both
def test_a_curve_moves_as_a_module_does(cls: type[Curve], device: torch.device) -> None:
    curve = cls(random_points(3, dtype=torch.float32)).to(device, torch.float64)
    theta = curve.draw_theta(torch.Generator().manual_seed(0))
    assert theta.dtype == torch.float64 and theta.device.type == device.type
    assert repr(curve).endswith("(num_points=3, numel=7, fix_start=True, fix_end=True)")
    other = cls(random_points(3, seed=1)).to(device)
    other.load_state_dict(curve.state_dict())
    assert torch.equal(other.points, curve.points)


# ---- as a distribution -----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("power,right", [(1.0, True), (1.2, False)])
def test_draws_are_uniform_in_t(cls: type[Curve], power: float, right: bool, generator: torch.Generator) -> None:
    """On a straight line t is the coordinate; the test sees a law t^1.2."""
    draws = cls(torch.tensor([[0.0, 2.0], [1.0, 2.0]]).double()).sample(4000, generator=generator)
    assert draws.shape == (4000, 2) and not draws.requires_grad and bool((draws[:, 1] == 2).all())
    assert (kstest(draws[:, 0].numpy() ** power, "uniform").pvalue > ALPHA) == right


@both
def test_draws_are_a_function_of_the_generator(
    cls: type[Curve], make_generator: Callable[..., torch.Generator]
) -> None:
    curve = cls(random_points(3))
    first, second = (curve.sample((2, 3), generator=make_generator(4)) for _ in range(2))
    assert first.shape == (2, 3, 7) and torch.equal(first, second)
    assert torch.equal(curve.sample((), generator=make_generator(4)), first[0, 0])
    assert torch.equal(curve.draw_theta(make_generator(4)), first[0, 0])
    t = torch.rand((), generator=make_generator(4), dtype=torch.float64)
    assert torch.equal(curve.draw_theta(make_generator(4)), curve(t))
    assert curve.sample(0).shape == (0, 7)
    assert torch.equal(curve.center_theta(), curve(0.5))


def test_a_curve_is_a_posterior_for_predict(generator: torch.Generator) -> None:
    net = nn.Linear(2, 2)
    layout = lb.ParameterLayout.from_module(net)
    curve = BezierCurve(random_points(3, 6, torch.float32), layout)
    batch = torch.randn(5, 2, generator=generator)
    found = lb.predict(
        net, curve, [batch], 4, generator=torch.Generator().manual_seed(1), progress=False, keep_samples=True
    )
    assert found.sample_means is not None and found.sample_means.shape == (4, 5, 2)
    assert bool((found.sample_means.std(0) > 1e-3).all())  # draws of their own


@both
def test_the_subspace_of_a_curve_holds_it(cls: type[Curve]) -> None:
    curve = cls(random_points(4, 9))
    subspace = lb.curve_subspace(curve.points, control_points=cls is BezierCurve)
    thetas = curve(torch.linspace(0, 1, 11)).detach()
    assert_close(subspace.to_theta(subspace.project(thetas)), thetas, cond=100)


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_length_of_a_chain_is_exact() -> None:
    points = random_points(6)
    expected = (points[1:] - points[:-1]).norm(dim=1).sum().item()
    for num in (1, 7):
        assert abs(PolygonalChain(points).length(num) - expected) < 1e-14 * expected


@pytest.mark.parametrize("n", [3, 4, 6])
def test_length_of_a_bezier_curve_is_the_integral_of_its_speed(n: int) -> None:
    points = random_points(n)
    curve = BezierCurve(points)
    expected, error = quad(lambda t: curve.tangent(t).norm().item(), 0, 1, epsabs=0, epsrel=1e-12)
    assert error < 1e-10 and abs(curve.length() - expected) < 1e-11 * expected
    line = BezierCurve.between(points[0], points[1], n)
    assert abs(line.length(2) - (points[1] - points[0]).norm().item()) < 1e-13


def test_length_of_short_curves_far_from_zero_does_not_cancel() -> None:
    """Points that agree in all but the last of float32's bits, 300,000 of them: three chunks."""
    start = torch.linspace(1000, 1500, 300_000)
    points = torch.stack([start, start + torch.arange(300_000) % 2 * 2**-8, start])
    expected = 2 * math.sqrt(150_000) * 2**-8
    assert abs(PolygonalChain(points).length() - expected) < 1e-12 * expected


@both
def test_arc_length_mean_is_the_trapezoidal_rule_over_chords(cls: type[Curve]) -> None:
    curve = cls(random_points(4))
    t = torch.tensor([0.0, 0.1, 0.4, 0.45, 0.8, 1.0]).double()
    values = random_points(2, 6, seed=3)
    chords = curve(t).detach().diff(dim=0).norm(dim=1)
    expected = ((values[:, 1:] + values[:, :-1]) / 2 * chords).sum(1) / chords.sum()
    assert_close(curve.arc_length_mean(t, values), expected, cond=10)
    assert_close(curve.arc_length_mean(t.float(), torch.full((6,), 3.0)), torch.tensor(3.0).double())


def test_arc_length_mean_weighs_by_length_not_by_t() -> None:
    chain = PolygonalChain(torch.tensor([[0.0], [9.0], [10.0]]))
    grid = torch.linspace(0, 1, 61)
    values = (grid < 0.5).double()
    assert abs(chain.arc_length_mean(grid, values).item() - 0.9) < 0.02  # 0.5 over t
    with pytest.raises(ValueError, match="length 0: all its points are equal"):
        PolygonalChain(torch.ones(2, 3)).arc_length_mean(grid, values)


# ---- files -----------------------------------------------------------------------------------------------------------


@both
def test_a_saved_curve_comes_back_to_the_last_bit(cls: type[Curve], tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    layout = lb.ParameterLayout.from_module(net)
    curve = cls(random_points(4, 6, torch.float32), layout, fix_end=False, provenance={"epochs": 3})
    curve.save(tmp_path / "curve.safetensors")
    for found in (cls.load(tmp_path / "curve.safetensors", layout), lb.load_posterior(tmp_path / "curve.safetensors")):
        assert isinstance(found, cls) and found.layout == layout and found.provenance == {"epochs": 3}
        assert torch.equal(found.points, curve.points)
        assert [name for name, _ in found.named_parameters()] == [name for name, _ in curve.named_parameters()]
    with pytest.raises(CheckpointError, match="is of other parameters: parameter 'weight': expected shape"):
        cls.load(tmp_path / "curve.safetensors", lb.ParameterLayout.from_module(nn.Linear(3, 2)))
    other = PolygonalChain if cls is BezierCurve else BezierCurve
    with pytest.raises(CheckpointError, match=f"holds a '{cls.kind}'; expected a '{other.kind}'"):
        other.load(tmp_path / "curve.safetensors")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_points": 4}, "lacks point_3"),
        ({"num_points": "3"}, "num_points must be of type int; got '3'"),
        ({"fix_end": None}, "fix_end must be of type bool; got None"),
        ({"num_points": 1}, "a curve needs at least 2 points; got 1"),
    ],
)
def test_a_damaged_file_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    BezierCurve(random_points(3)).save(tmp_path / "good")
    tensors, metadata = read_tensors(tmp_path / "good", "Bezier curve", ())
    write_tensors(tmp_path / "bad", "Bezier curve", tensors, metadata | changes)
    with pytest.raises(CheckpointError, match=message):
        BezierCurve.load(tmp_path / "bad")


def test_a_file_with_a_point_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    curve = BezierCurve(random_points(3))
    with torch.no_grad():
        curve.point_1[2] = float("nan")
    curve.save(tmp_path / "curve")
    with pytest.raises(CheckpointError, match="entry 2 of point 1 is nan"):
        BezierCurve.load(tmp_path / "curve")


# ---- refusals --------------------------------------------------------------------------------------------------------


@both
def test_points_that_do_not_fit_are_refused(cls: type[Curve]) -> None:
    layout = lb.ParameterLayout.from_module(nn.Linear(2, 2))
    with pytest.raises(ShapeError, match="a curve needs at least 2 points; got 1"):
        cls(torch.ones(1, 3))
    with pytest.raises(ShapeError, match=r"points must have shape \(n, D\); got \(3,\)"):
        cls(torch.ones(3))
    with pytest.raises(ShapeError, match="at least one weight vector; got none"):
        cls([])
    with pytest.raises(ShapeError, match=r"vectors of 6 real .* point 0 has shape \(3,\)"):
        cls(torch.ones(2, 3), layout)
    with pytest.raises(ShapeError, match=r"vectors of 3 real .* point 1 has shape \(4,\)"):
        cls([torch.ones(3), torch.ones(4)])
    with pytest.raises(ShapeError, match=r"of one dtype; point 1 has shape \(3,\) and dtype torch.float64"):
        cls([torch.ones(3), torch.ones(3).double()])
    with pytest.raises(ShapeError, match="point 0 has shape .* and dtype torch.int64"):
        cls(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(NonFiniteError, match="entry 1 of point 2 is inf"):
        cls(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, math.inf]]))
    with pytest.raises(ShapeError, match="num_bends counts both ends and must be at least 2; got 1"):
        cls.between(torch.zeros(3), torch.ones(3), 1)
    with pytest.raises(ShapeError, match=r"point 1 has shape \(4,\)"):
        cls.between(torch.zeros(3), torch.ones(4))


@both
@pytest.mark.parametrize("t", [-1e-9, 1.0000001, math.nan])
def test_t_outside_the_unit_interval_is_refused(cls: type[Curve], t: float) -> None:
    curve = cls(random_points(3))
    for method in (curve.to_theta, curve.tangent, curve.coefficients, curve.speed):
        with pytest.raises(ValueError, match=r"t must be in \[0, 1\]; got"):
            method(torch.tensor([0.5, t], dtype=torch.float64))


@both
def test_a_grid_that_is_none_is_refused(cls: type[Curve]) -> None:
    curve = cls(random_points(3))
    with pytest.raises(ValueError, match="t must increase"):
        curve.arc_length_mean(torch.tensor([0.0, 0.5, 0.5]), torch.ones(3))
    with pytest.raises(ShapeError, match=r"values \(\*S, T\); got \(3,\) and \(2,\)"):
        curve.arc_length_mean(torch.linspace(0, 1, 3), torch.ones(2))
    with pytest.raises(ShapeError, match=r"T >= 2 .* got \(1,\) and \(1,\)"):
        curve.arc_length_mean(torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="num must be at least 1; got 0"):
        curve.length(0)
