"""Mean-field weights: the law of the draws, gradients, KL, and the closed-form optimum of a linear-Gaussian model."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

import lowrank_bdl as lb
from lowrank_bdl.training import losses
from lowrank_bdl.training.losses import ELBO, cross_entropy, of_output
from lowrank_bdl.training.trainer import Trainer
from lowrank_bdl.training.variational import MeanFieldModel
from tests.statistical import assert_gaussian


def small_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def spread(net: MeanFieldModel, seed: int = 1) -> MeanFieldModel:
    """Give every weight a standard deviation of its own, 0.1 to 1.4."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rho in net.rho:
            rho.copy_(torch.rand(rho.shape, generator=generator, dtype=rho.dtype) * 3.5 - 2.3)
    return net


def flat_draws(net: MeanFieldModel, count: int) -> Tensor:
    return torch.stack([net.layout.flatten(net.draw()).detach() for _ in range(count)])


def test_draws_have_the_covariance_of_the_posterior(generator: torch.Generator) -> None:
    net = spread(MeanFieldModel(nn.Linear(2, 2).double(), init_std=0.5, generator=generator))
    posterior = net.posterior()
    variance = torch.cat([softplus(rho).detach().square().flatten() for rho in net.rho])
    mean = torch.cat([p.detach().flatten() for p in net.model.parameters()])
    draws = flat_draws(net, 3000)
    assert_gaussian(draws, mean, variance.diag())
    assert_gaussian(posterior.sample(3000, generator=generator), mean, variance.diag())
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(draws, mean, 1.2 * variance.diag())


def test_the_start_is_the_network_with_the_given_deviation() -> None:
    for std in (1e-6, 0.01, 1.0, 30.0):
        model = small_net()
        before = lb.ParameterLayout.from_module(model).flatten(model)
        posterior = MeanFieldModel(model, init_std=std).posterior()
        assert torch.equal(posterior.mean, before) and posterior.covariance.rank == 0
        torch.testing.assert_close(posterior.stddev, torch.full_like(before, std), rtol=1e-8, atol=0)


def test_training_mode_draws_and_evaluation_mode_is_the_mean() -> None:
    net = MeanFieldModel(small_net(), init_std=0.3, generator=torch.Generator().manual_seed(0))
    x = torch.ones(2, 3).double()
    before = {name: p.clone() for name, p in net.model.named_parameters()}
    assert not torch.equal(net(x), net(x))
    assert all(torch.equal(p, before[name]) for name, p in net.model.named_parameters())
    net.generator.manual_seed(5)
    drawn = net.draw()
    net.generator.manual_seed(5)
    assert torch.equal(net(x), torch.func.functional_call(net.model, drawn, (x,)))
    net.eval()
    assert torch.equal(net(x), net.model(x))


def test_batch_norm_statistics_are_those_of_training() -> None:
    net = MeanFieldModel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), init_std=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    net(x)
    assert net.model[1].num_batches_tracked == 1 and net.model[1].running_mean.abs().max() > 0
    net.eval()(x)
    assert net.model[1].num_batches_tracked == 1


def test_tied_weights_are_drawn_once() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    net = MeanFieldModel(tied, init_std=5.0, generator=torch.Generator().manual_seed(1))
    assert net.layout.names == ("0.weight", "0.bias", "1.bias") and len(net.rho) == 3
    drawn = net.draw()
    net.generator.manual_seed(1)
    found = net(torch.eye(3))
    expected = (drawn["0.weight"].mT + drawn["0.bias"]) @ drawn["0.weight"].mT + drawn["1.bias"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_excluded_parameters_have_no_variance() -> None:
    net = MeanFieldModel(small_net(), init_std=0.5, exclude="*.bias")
    assert net.layout.names == ("0.weight", "2.weight") and set(net.draw()) == set(net.layout.names)
    cross_entropy(net, torch.ones(2, 3).double(), torch.tensor([0, 1]))[0].backward()
    assert all(p.grad.abs().max() > 0 for p in net.model.parameters())


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, generator=generator).double(), torch.randint(0, 2, (6,), generator=generator)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_gradient_reaches_means_and_deviations(temperature: float, batch: tuple[Tensor, Tensor]) -> None:
    """Against finite differences of the loss with the same draws; with T = 0 the likelihood alone must reach both."""
    net = spread(MeanFieldModel(small_net(), init_std=0.5, generator=torch.Generator()))
    elbo = ELBO(cross_entropy, num_data=20, prior_std=0.7, temperature=temperature, num_draws=2)

    def value() -> Tensor:
        net.generator.manual_seed(4)
        return elbo(net, *batch)[0]

    value().backward()
    for p in net.parameters():
        flat, numeric = p.detach().view(-1), torch.zeros(p.numel()).double()
        for i in range(p.numel()):
            ends = []
            for step in (1e-5, -2e-5):
                flat[i] += step
                ends.append(value().item())
            flat[i] += 1e-5
            numeric[i] = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(p.grad.view(-1), numeric, rtol=1e-6, atol=1e-8)
        assert p.grad.abs().max() > 1e-4


def test_the_loss_is_the_mean_over_draws_plus_the_divergence(batch: tuple[Tensor, Tensor]) -> None:
    net = MeanFieldModel(small_net(), init_std=0.5, generator=torch.Generator().manual_seed(2))
    loss, output = ELBO(cross_entropy, 20, 0.7, temperature=0.5, num_draws=3)(net, *batch)
    net.generator.manual_seed(2)
    parts = [cross_entropy(net, *batch) for _ in range(3)]
    expected = sum(part[0] for part in parts) / 3 + 0.5 * net.kl(0.7) / 20
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert torch.equal(output, parts[2][1])


# ---- divergence ------------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_torch_and_of_the_posterior() -> None:
    net = spread(MeanFieldModel(small_net(), init_std=1.0))
    posterior = net.posterior()
    q, p = Normal(posterior.mean, posterior.stddev), Normal(torch.zeros(26).double(), 0.3)
    torch.testing.assert_close(net.kl(0.3), kl_divergence(q, p).sum(), rtol=1e-12, atol=0)
    prior = MeanFieldModel(small_net(), init_std=0.3)
    nn.utils.vector_to_parameters(torch.zeros(26).double(), prior.model.parameters())
    torch.testing.assert_close(net.kl(0.3), lb.kl_divergence(posterior, prior.posterior()), rtol=1e-10, atol=0)
    assert prior.kl(0.3).abs() < 1e-12  # no constant is missing


def test_the_divergence_in_single_precision_is_summed_in_double() -> None:
    wide = MeanFieldModel(nn.Linear(1000, 1000, bias=False), init_std=1e-3)
    with torch.no_grad():
        wide.model.weight.fill_(0.01)
    std = softplus(wide.rho[0][0, 0].detach()).double().item()
    mean = wide.model.weight[0, 0].double().item()
    one = math.log(0.1 / std) + (std**2 + mean**2) / (2 * 0.1**2) - 0.5
    assert wide.kl(0.1).item() == pytest.approx(1e6 * one, rel=1e-10)


# ---- closed form -----------------------------------------------------------------------------------------------------


def test_a_linear_gaussian_model_reaches_the_closed_form_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """For y ~ N(Xw, s²), w ~ N(0, p² I), the best q has the posterior's mean, and variances 1 / diag(precision).

    The expected loss is quadratic in the noise, so its mean over all sign vectors is its exact expectation: the descent
    is deterministic, and its end is compared to six digits.
    """
    generator = torch.Generator().manual_seed(0)
    num_data, s, p = 12, 0.5, 0.8
    mixing = torch.tensor([[1, 0.7, 0], [0, 1, 0.5], [0, 0, 1.0]]).double()
    x = torch.randn(num_data, 3, generator=generator).double() @ mixing
    y = torch.randn(num_data, 1, generator=generator).double()
    precision = x.mT @ x / s**2 + torch.eye(3).double() / p**2
    mean = torch.linalg.solve(precision, x.mT @ y / s**2).flatten()

    net = MeanFieldModel(nn.Linear(3, 1, bias=False).double(), init_std=0.3)
    signs = iter(torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3).repeat(10_000, 1))
    monkeypatch.setattr(Tensor, "normal_", lambda self, **_: self.copy_(next(signs).view_as(self)))

    def negative_log_likelihood(output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) ** 2 / (2 * s**2) + math.log(s * math.sqrt(2 * math.pi))).mean()

    elbo = ELBO(of_output(negative_log_likelihood), num_data, p, num_draws=8)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1, max_iter=200, tolerance_grad=1e-11, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = elbo(net, x, y)[0]
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    posterior = net.posterior()
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(posterior.stddev, precision.diagonal().rsqrt(), rtol=1e-6, atol=0)
    exact = torch.linalg.inv(precision).diagonal().sqrt()
    assert (posterior.stddev < 0.98 * exact).any()  # mean-field is narrower: the two are told apart

    # The bound: log evidence − KL(q || exact posterior), with every constant.
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(num_data).double(), p**2 * x @ x.mT + s**2 * torch.eye(num_data).double()
    )
    q = torch.distributions.MultivariateNormal(posterior.mean, posterior.stddev.square().diag())
    gap = kl_divergence(q, torch.distributions.MultivariateNormal(mean, precision_matrix=precision))
    bound = -num_data * elbo(net, x, y)[0]
    torch.testing.assert_close(bound, marginal.log_prob(y.flatten()) - gap, rtol=1e-9, atol=0)


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()

    def batches(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        return [(x[part], (x[part, 0] > 0).long()) for part in torch.randperm(20, generator=generator).split(8)]

    def make() -> Trainer:
        net = MeanFieldModel(small_net(), init_std=0.05)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(3)
        return Trainer(net, optimizer, ELBO(cross_entropy, 20, 1.0), metrics={"accuracy": losses.accuracy})

    with torch.random.fork_rng():
        whole = make()
        whole.fit(batches, 6, progress=False)
        path = tmp_path / "c.safetensors"
        make().fit(batches, 2, checkpoint=path, progress=False)
        resumed = make()
        torch.manual_seed(99)
        resumed.load(path)
        resumed.fit(batches, 6, progress=False)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    assert resumed.history == whole.history and whole.history[-1]["loss"] < whole.history[0]["loss"]


def test_the_posterior_is_a_copy_that_predicts_and_can_be_saved(tmp_path: Path) -> None:
    net = MeanFieldModel(small_net(), init_std=0.2)
    posterior = net.posterior()
    mean, std = posterior.mean.clone(), posterior.stddev.clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert torch.equal(posterior.mean, mean) and torch.equal(posterior.stddev, std)
    posterior.save(tmp_path / "q.safetensors")
    again = lb.GaussianPosterior.load(tmp_path / "q.safetensors", lb.ParameterLayout.from_module(net.model))
    assert torch.equal(again.mean, mean) and torch.equal(again.stddev, std)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: MeanFieldModel(nn.Linear(1, 1), init_std=0.0), "init_std must be positive and finite; got 0.0"),
        (lambda: MeanFieldModel(nn.Linear(1, 1), init_std=math.nan), "init_std must be positive and finite; got nan"),
        (lambda: MeanFieldModel(nn.Linear(1, 1), init_std=1.0).kl(-1.0), "prior_std must be positive and finite"),
        (lambda: ELBO(cross_entropy, 10, 0.0), "prior_std must be positive and finite; got 0.0"),
        (lambda: ELBO(cross_entropy, 0, 1.0), "num_data must be at least 1; got 0"),
        (lambda: ELBO(cross_entropy, 10, 1.0, num_draws=0), "num_draws must be at least 1; got 0"),
        (lambda: ELBO(cross_entropy, 10, 1.0, temperature=-0.5), "temperature must be at least 0 and finite; got -0.5"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_has_no_weights_to_draw_is_refused() -> None:
    with pytest.raises(lb.ShapeError, match="No parameter is selected"):
        MeanFieldModel(nn.Tanh(), init_std=1.0)
    with pytest.raises(TypeError, match="ELBO needs a MeanFieldModel; got Linear"):
        ELBO(cross_entropy, 10, 1.0)(nn.Linear(1, 2), torch.zeros(1, 1), torch.tensor([0]))
