"""The log-joint of a network in a subspace: values, gradients, batches, temperature, batch norm, caching."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lowrank_bdl.errors import LowRankBDLError, ShapeError
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm
from lowrank_bdl.parameters.functional import FunctionalModel
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.subspaces.elliptical_slice import elliptical_slice
from lowrank_bdl.subspaces.log_joint import LogJoint
from lowrank_bdl.subspaces.subspace import Subspace
from tests.oracles import assert_close
from tests.statistical import assert_gaussian
from tests.subspaces.targets import LinearGaussian

RANK = 2


def subspace_of(model: nn.Module, generator: torch.Generator, scale: float = 0.3) -> Subspace:
    layout = ParameterLayout.from_module(model)
    origin = layout.flatten(model).detach()
    basis = scale * torch.randn(layout.numel, RANK, generator=generator, dtype=origin.dtype)
    return Subspace(layout, origin, basis)


def seeded(model: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def classifier(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype), generator)


def convnet(generator: torch.Generator) -> nn.Module:
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    return seeded(net.double(), generator)


def data(generator: torch.Generator, count: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, generator=generator, dtype=dtype)
    return x, torch.randint(3, (count,), generator=generator)


def ragged(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[:4], y[:4]), (x[4:9], y[4:9]), (x[9:], y[9:])]


def points(generator: torch.Generator, count: int = 5) -> Tensor:
    return torch.randn(count, RANK, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("vectorize", [True, False, "auto"])
def test_value_is_the_tempered_sum_plus_the_prior(vectorize: Any, generator: torch.Generator) -> None:
    net, (x, y), z = classifier(generator), data(generator), points(generator)
    subspace = subspace_of(net, generator)
    f = FunctionalModel(net)
    sums = torch.stack([-cross_entropy(f(subspace.to_theta(row), x), y, reduction="sum") for row in z])
    prior = torch.distributions.Normal(0.0, torch.tensor(1.5).double()).log_prob(z).sum(-1)
    for batches in ((x, y), ragged(x, y), DataLoader(TensorDataset(x, y), batch_size=4)):
        log_joint = LogJoint(subspace, net, "categorical", batches, temperature=5.0, prior_std=1.5, vectorize=vectorize)
        assert_close(log_joint.log_likelihood(z), sums.detach() / 5)
        assert_close(log_joint.log_prior(z), prior)
        assert_close(log_joint(z[0]), sums[0].detach() / 5 + prior[0])
        assert log_joint.num_data == 11 and log_joint.rank == RANK


@pytest.mark.parametrize("vectorize", [True, False])
def test_gradient_reaches_z_and_is_that_of_the_value(vectorize: bool, generator: torch.Generator) -> None:
    net, (x, y) = classifier(generator), data(generator)
    subspace = subspace_of(net, generator)
    log_joint = LogJoint(subspace, net, "categorical", ragged(x, y), temperature=3.0, vectorize=vectorize)
    z = points(generator, 4).requires_grad_()
    (found,) = torch.autograd.grad(log_joint(z).sum(), z)
    f = FunctionalModel(net)
    direct = [-cross_entropy(f(subspace.to_theta(row), x), y, reduction="sum") / 3 for row in z]
    (expected,) = torch.autograd.grad(torch.stack(direct).sum() + log_joint.log_prior(z).sum(), z)
    assert_close(found, expected)
    (of_likelihood,) = torch.autograd.grad(log_joint.log_likelihood(z).sum(), z)
    assert of_likelihood.abs().min() > 1e-6  # the likelihood moves z
    assert all(parameter.grad is None for parameter in net.parameters())
    z0 = z[0].detach()
    step = torch.tensor([1e-6, 0.0]).double()
    slope = (log_joint(z0 + step) - log_joint(z0 - step)) / 2e-6
    assert slope.item() == pytest.approx(expected[0, 0].item(), rel=1e-6)


def test_float32_networks_sum_in_float64(generator: torch.Generator) -> None:
    net, (x, y) = classifier(generator, torch.float32), data(generator, 3000, torch.float32)
    subspace, z = subspace_of(net, generator), points(generator, 2)
    found = LogJoint(subspace, net, "categorical", list(zip(x.split(7), y.split(7), strict=True)))(z)
    assert found.dtype == torch.float64
    exact = Subspace(subspace.layout, subspace.origin.double(), subspace.basis.double())
    double = classifier(generator)
    double.load_state_dict(net.state_dict())
    assert_close(found, LogJoint(exact, double, "categorical", (x.double(), y))(z.float().double()), torch.float32)


def test_losses_of_both_reductions_and_gaussian_targets(generator: torch.Generator) -> None:
    net, (x, y), z = classifier(generator), data(generator), points(generator, 2)
    subspace, batches = subspace_of(net, generator), ragged(x, y)
    expected = LogJoint(subspace, net, "categorical", batches)(z)
    assert_close(LogJoint(subspace, net, None, batches, loss_fn=cross_entropy)(z), expected)
    summed = LogJoint(
        subspace, net, None, batches, loss_fn=lambda f, t: cross_entropy(f, t, reduction="sum"), reduction="sum"
    )
    assert_close(summed(z), expected)
    target = torch.randn(11, 3, generator=generator, dtype=torch.float64)
    f = FunctionalModel(net)
    normal = torch.distributions.Normal(f(subspace.to_theta(z[0]), x), 0.5)
    found = LogJoint(subspace, net, "gaussian", (x, target), noise_variance=0.25).log_likelihood(z[0])
    assert_close(found, normal.log_prob(target).sum().detach())
    called = LogJoint(subspace, net, "categorical", batches, call_fn=lambda model, batch: 2 * model(batch[0]))
    assert_close(
        called.log_likelihood(z[0]), -cross_entropy(2 * f(subspace.to_theta(z[0]), x), y, reduction="sum").detach()
    )


class TestBatchNorm:
    def test_stored_statistics(self, generator: torch.Generator) -> None:
        net, (x, y), z = convnet(generator).eval(), data(generator), points(generator, 1)[0]
        x = x.unsqueeze(1)
        subspace = subspace_of(net, generator)
        expected = -cross_entropy(FunctionalModel(net)(subspace.to_theta(z), x), y, reduction="sum").detach()
        assert_close(LogJoint(subspace, net.train(), "categorical", ragged(x, y)).log_likelihood(z), expected)

    @pytest.mark.parametrize("vectorize", [True, False])
    def test_statistics_of_each_z(self, vectorize: bool, generator: torch.Generator) -> None:
        net, (x, y), z = convnet(generator).eval(), data(generator), points(generator, 3)
        x = x.unsqueeze(1)
        subspace = subspace_of(net, generator)
        f, expected = FunctionalModel(net), []
        for row in z:
            theta = subspace.to_theta(row)
            buffers = recalibrate_batch_norm(net, theta[None], ragged(x, y)[:1])
            output = f(theta, x, {name: value[0] for name, value in buffers.items()})
            expected.append(-cross_entropy(output, y, reduction="sum").detach())
        log_joint = LogJoint(
            subspace, net, "categorical", ragged(x, y), bn_loader=ragged(x, y), bn_fraction=0.3, vectorize=vectorize
        )
        assert_close(log_joint.log_likelihood(z), torch.stack(expected))

    def test_statistics_of_each_batch_as_published(self, generator: torch.Generator) -> None:
        net, (x, y), z = convnet(generator).train(), data(generator), points(generator, 1)[0]
        x = x.unsqueeze(1)
        subspace = subspace_of(net, generator)
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        f = FunctionalModel(net)
        parts = [cross_entropy(f(subspace.to_theta(z), a), b, reduction="sum") for a, b in ragged(x, y)]
        log_joint = LogJoint(subspace, net.eval(), "categorical", ragged(x, y), bn_mode="train")
        assert_close(log_joint.log_likelihood(z), -sum(parts).detach())
        assert not net.training
        assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


class TestWork:
    def test_one_z_is_evaluated_once(self, generator: torch.Generator) -> None:
        net, pair, z = classifier(generator), data(generator), points(generator, 2)
        calls: list[int] = []
        log_joint = LogJoint(
            subspace_of(net, generator), net, "categorical", pair, call_fn=lambda m, b: calls.append(1) or m(b[0])
        )
        value, again = log_joint(z[0]), log_joint(z[0].clone())
        assert torch.equal(value, again) and len(calls) == log_joint.num_evaluations == 1
        log_joint.log_likelihood(z[1])
        log_joint.log_likelihood(z[0])
        assert log_joint.num_evaluations == 3
        leaf = z[0].clone().requires_grad_()
        first = torch.autograd.grad(log_joint(leaf), leaf)[0]  # the gradient was not kept
        assert log_joint.num_evaluations == 4
        second = torch.autograd.grad(log_joint(leaf), leaf)[0]
        assert torch.equal(log_joint(z[0]), value) and log_joint.num_evaluations == 4 and torch.equal(first, second)
        log_joint(z)
        assert log_joint.num_evaluations == 6

    def test_several_z_share_one_pass_and_agree_with_one_after_the_other(self, generator: torch.Generator) -> None:
        net, (x, y), z = classifier(generator), data(generator), points(generator, 9)
        passes: list[int] = []

        class Counted:
            def __iter__(self) -> Iterator[Any]:
                passes.append(1)
                return iter(ragged(x, y))

        for options in ({"vectorize": False}, {"vectorize": True, "chunk_size": 2}, {"vectorize": "auto"}):
            log_joint = LogJoint(
                subspace_of(net, torch.Generator().manual_seed(1)), net, "categorical", Counted(), **options
            )
            passes.clear()
            values = log_joint(z)
            assert len(passes) == 1
            assert_close(values, torch.stack([log_joint(row) for row in z]))

    @pytest.mark.parametrize("vectorize", [False, True])
    def test_reading_ends_below_a_threshold(self, vectorize: bool, generator: torch.Generator) -> None:
        net, (x, y), z = classifier(generator), data(generator, 60), points(generator, 4)
        space = subspace_of(net, generator)
        batches = list(zip(x.split(10), y.split(10), strict=True))
        read: list[int] = []

        def call(model: nn.Module, batch: Any) -> Tensor:
            read.append(1)
            return model(batch[0])

        log_joint = LogJoint(
            space, net, "categorical", batches, temperature=3.0, call_fn=call, vectorize=vectorize, chunk_size=4
        )
        whole = log_joint.log_likelihood(z)
        read.clear()
        below, above = whole - 1e-9, whole + 1e-9
        torch.testing.assert_close(
            log_joint.log_likelihood_above(z, below), whole, rtol=0 if not vectorize else 1e-12, atol=0
        )
        assert log_joint.num_evaluations == 8 and len(read) == (6 if vectorize else 24)
        found = log_joint.log_likelihood_above(z, above)
        assert bool(((found >= whole - 1e-12) & (found <= above)).all())
        read.clear()
        mixed = log_joint.log_likelihood_above(z, torch.stack([below[0], whole[1] / 6, below[2], whole[3] / 1000]))
        assert_close(mixed[[0, 2]], whole[[0, 2]])
        assert whole[1] < mixed[1] <= whole[1] / 6 and whole[3] < mixed[3] <= whole[3] / 1000
        if not vectorize:
            assert 6 + 6 + 2 <= len(read) < 24
        read.clear()
        log_joint.log_likelihood_above(z, torch.full((4,), -1e-9))
        assert len(read) == (1 if vectorize else 4)  # one batch tells

    def test_a_threshold_is_of_no_use_where_densities_have_no_bound(self, generator: torch.Generator) -> None:
        log_joint, _ = linear_model(generator)
        z = points(generator, 2).to(log_joint.subspace.origin)[:, : log_joint.rank]
        assert torch.equal(log_joint.log_likelihood_above(z, torch.zeros(2)), log_joint.log_likelihood(z))
        with pytest.raises(ShapeError, match=r"thresholds must be one for each of \(S, \d+\) z; got \(3,\) and"):
            log_joint.log_likelihood_above(z, torch.zeros(3))

    def test_elliptical_slices_are_the_same_with_and_without_thresholds(self, generator: torch.Generator) -> None:
        net, (x, y) = classifier(generator), data(generator, 60)
        space = subspace_of(net, generator, 2.0)
        batches = list(zip(x.split(10), y.split(10), strict=True))
        read: list[int] = []

        def call(model: nn.Module, batch: Any) -> Tensor:
            read.append(1)
            return model(batch[0])

        class Whole(LogJoint):
            log_likelihood_above = None  # type: ignore[assignment]

        draws, calls = [], []
        for kind in (LogJoint, Whole):
            read.clear()
            target = kind(space, net, "categorical", batches, call_fn=call)
            draws.append(elliptical_slice(target, 30, num_chains=3, generator=torch.Generator().manual_seed(2)))
            calls.append(len(read))
        assert torch.equal(draws[0].draws, draws[1].draws) and torch.equal(draws[0].log_joints, draws[1].log_joints)
        assert draws[0].num_evaluations == draws[1].num_evaluations
        assert calls[0] < 0.8 * calls[1]

    def test_estimates_are_unbiased_over_the_batches(self, generator: torch.Generator) -> None:
        net, (x, y), z = classifier(generator), data(generator), points(generator, 1)[0]
        subspace = subspace_of(net, generator)
        log_joint = LogJoint(subspace, net, "categorical", ragged(x, y), temperature=2.0)
        found = {round(log_joint.estimate_log_likelihood(z, generator).item(), 9) for _ in range(60)}
        whole = log_joint.log_likelihood(z).item()
        assert len(found) == 3 and sum(found) / 3 == pytest.approx(whole, rel=1e-8)
        assert log_joint.num_evaluations == 1
        stream = LogJoint(subspace, net, "categorical", DataLoader(TensorDataset(x, y), batch_size=4))
        with pytest.raises(TypeError, match="need a list of batches, to draw from; got DataLoader"):
            stream.estimate_log_likelihood(z)

    def test_the_network_is_left_alone(self, generator: torch.Generator) -> None:
        net = convnet(generator).train()
        net[1].eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        x, y = data(generator)
        log_joint = LogJoint(subspace_of(net, generator), net, "categorical", (x.unsqueeze(1), y))
        z = points(generator, 1)[0].requires_grad_()
        log_joint(z).backward()
        assert [module.training for module in net] == [True, False, True, True, True]
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        with pytest.raises(ShapeError, match="Targets must be integer class indices"):
            LogJoint(subspace_of(net, generator), net, "categorical", (x.unsqueeze(1), y.double()))(z)
        assert [module.training for module in net] == [True, False, True, True, True]


def linear_model(generator: torch.Generator) -> tuple[LogJoint, LinearGaussian]:
    """Regression by a linear network in a plane of its weights, and the same model in closed form."""
    net = seeded(nn.Linear(3, 1).double(), generator)
    subspace = subspace_of(net, generator, scale=1.0)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    features = torch.cat([x, torch.ones(8, 1).double()], 1)
    log_joint = LogJoint(
        subspace, net, "gaussian", [(x[:5], y[:5]), (x[5:], y[5:])], noise_variance=0.5, temperature=2.5, prior_std=0.7
    )
    closed = LinearGaussian(features @ subspace.basis, y.squeeze(1) - features @ subspace.origin, 0.5**0.5, 2.5, 0.7)
    return log_joint, closed


def test_is_the_linear_gaussian_model_in_closed_form(generator: torch.Generator) -> None:
    log_joint, closed = linear_model(generator)
    z = points(generator, 6)
    constant = -8 / 2 * math.log(2 * math.pi * 0.5) / 2.5
    assert_close(log_joint(z), closed.log_likelihood(z) + closed.log_prior(z) + constant, cond=10)


def test_a_sampler_of_it_agrees_with_the_closed_form_posterior(generator: torch.Generator) -> None:
    log_joint, closed = linear_model(generator)
    draws = elliptical_slice(log_joint, 1, num_chains=1000, burn_in=25, initial="prior", generator=generator)
    assert_gaussian(draws.flat, *closed.posterior())
    assert log_joint.num_evaluations == draws.num_evaluations


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite; got 0.0"),
        ({"prior_std": math.inf}, ValueError, "prior_std must be positive and finite; got inf"),
        ({"likelihood": None}, ValueError, "exactly one of likelihood and loss_fn must be given; got neither"),
        ({"loss_fn": cross_entropy}, ValueError, "got likelihood='categorical' and a loss_fn"),
        (
            {"likelihood": "poisson"},
            ValueError,
            "likelihood must be 'categorical', 'bernoulli', 'gaussian' or a",
        ),
        ({"noise_variance": 1.0}, ValueError, "noise_variance goes with likelihood='gaussian'"),
        ({"bn_mode": "batch"}, ValueError, "bn_mode must be one of eval, train; got 'batch'"),
        ({"bn_mode": "train", "bn_loader": []}, ValueError, "has no use for a bn_loader"),
        ({"vectorize": "yes"}, ValueError, "vectorize must be True, False or 'auto'; got 'yes'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ({"data": iter([])}, ValueError, "got an iterator"),
        ({"data": []}, ShapeError, "data must hold at least one batch; got none"),
    ],
)
def test_refuses_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    generator = torch.Generator().manual_seed(0)
    net, pair = classifier(generator), data(generator)
    arguments = {"likelihood": "categorical", "data": pair, **options}
    with pytest.raises(error, match=message):
        LogJoint(subspace_of(net, generator), net, **arguments)


def test_refuses_z_and_networks_that_do_not_fit(generator: torch.Generator) -> None:
    net, pair = classifier(generator), data(generator)
    subspace = subspace_of(net, generator)
    log_joint = LogJoint(subspace, net, "categorical", pair)
    for z in (torch.zeros(3), torch.zeros(2, 3), torch.zeros(1, 1, 2), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ShapeError, match=r"z must be floating-point of shape \(2,\) or \(S, 2\); got"):
            log_joint(z)
    with pytest.raises(ShapeError, match="must be of the 31 weights of the layout; its origin has shape"):
        LogJoint(Subspace(None, torch.zeros(5), torch.ones(5, 2)), net, "categorical", pair)
    with pytest.raises(ShapeError, match="data must give at least one batch; got none"):
        LogJoint(subspace, net, "categorical", DataLoader(TensorDataset(pair[0][:0], pair[1][:0])))(torch.zeros(2))

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if bool(self.linear(x).sum() > 0) else -self.linear(x)

    branching = Branching()
    z = points(generator, 3)
    with pytest.raises(LowRankBDLError, match="cannot be evaluated at several z at once .* pass vectorize=False"):
        LogJoint(subspace_of(branching, generator), branching, "categorical", pair, vectorize=True)(z)
    assert bool(LogJoint(subspace_of(branching, generator), branching, "categorical", pair)(z).isfinite().all())


@pytest.mark.parametrize("kind", ["categorical", "loss", "batch norm", "one by one"])
def test_derivatives_of_any_order(generator: torch.Generator, kind: str) -> None:
    """Hessians by every way of torch, and a third derivative, against the network written out."""
    if kind == "batch norm":
        net = convnet(generator).eval()
        x, y = torch.randn(11, 1, 3, generator=generator).double(), torch.randint(3, (11,), generator=generator)
        options: dict[str, Any] = {"bn_loader": [(x[:6],), (x[6:],)]}
    else:
        net, (x, y) = classifier(generator), data(generator)
        options = {"vectorize": kind != "one by one"}
    subspace = subspace_of(net, generator)
    likelihood = None if kind == "loss" else "categorical"
    if kind == "loss":
        options["loss_fn"] = cross_entropy
    target = LogJoint(subspace, net, likelihood, ragged(x, y), temperature=2.0, prior_std=1.5, **options)
    z = points(generator, 1)[0].requires_grad_()
    layout = subspace.layout
    assert layout is not None
    buffers = {}
    if kind == "batch norm":
        found = recalibrate_batch_norm(net, subspace.to_theta(z.detach()).unsqueeze(0), [(x[:6],), (x[6:],)])
        buffers = {name: value[0] for name, value in found.items()}

    def right(z: Tensor) -> Tensor:
        theta = subspace.origin + subspace.basis @ z
        output = torch.func.functional_call(net, {**layout.unflatten(theta), **buffers}, (x,))
        return -cross_entropy(output, y, reduction="sum") / 2 - z.square().sum() / (2 * 1.5**2)

    dense = torch.autograd.functional.hessian(right, z)
    assert_close(torch.autograd.functional.hessian(target, z), dense, cond=1e3)
    value = target(z)  # again at the same place: from the gradients that are kept
    (slope,) = torch.autograd.grad(value, z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope[0] * slope[1], z, create_graph=True)
    (third,) = torch.autograd.grad(curvature.prod(), z)
    (slope,) = torch.autograd.grad(right(z), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope[0] * slope[1], z, create_graph=True)
    assert_close(third, torch.autograd.grad(curvature.prod(), z)[0], cond=1e3)
    if kind == "batch norm":
        with pytest.raises(NotImplementedError, match="expected a LogJoint without bn_loader under torch.func"):
            torch.func.grad(target)(z.detach())
        return
    assert_close(torch.func.hessian(target)(z.detach()), dense, cond=1e3)
    assert_close(torch.func.jacrev(torch.func.grad(target))(z.detach()), dense, cond=1e3)
    several = points(generator, 3)
    each = torch.stack([torch.func.grad(right)(row) for row in several])
    assert_close(torch.vmap(torch.func.grad(target))(several), each, cond=1e3)
