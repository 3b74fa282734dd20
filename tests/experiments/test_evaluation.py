"""What the experiments measure, against dense algebra and direct evaluation."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from experiments.datasets import Datasets, Split
from experiments.evaluation import (
    average_curve,
    classification_metrics,
    describe_posterior,
    evaluate_method,
    losses_along_rays,
    rays,
    validate,
)
from experiments.models import SmallConvNet


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallConvNet(1, 8, 3, width=2)


@pytest.fixture
def data() -> Datasets:
    generator = torch.Generator().manual_seed(0)
    splits = [
        Split(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in (40, 30, 50)
    ]
    return Datasets("noise", *splits, class_names=("a", "b", "c"))


@pytest.fixture
def posterior(model: nn.Module) -> lb.GaussianPosterior:
    layout = lb.ParameterLayout.from_module(model)
    generator = torch.Generator().manual_seed(1)
    root = 0.02 * torch.randn(4, layout.numel, generator=generator).mT
    diag = 1e-4 * torch.rand(layout.numel, generator=generator) + 1e-5
    return lb.GaussianPosterior(layout.flatten(model), lb.LowRankPlusDiagLinearOperator(root, diag), layout)


def test_rays_are_unit_vectors_with_the_posterior_s_own_deviation(posterior: lb.GaussianPosterior) -> None:
    units, stddevs, names = rays(posterior, seed=0)
    covariance = posterior.covariance.to_dense().double()
    assert names == ["component 1", "component 2", "component 3", "random direction"]
    torch.testing.assert_close(units.norm(dim=-1), torch.ones(4), rtol=1e-5, atol=0)
    expected = torch.einsum("rd,de,re->r", units.double(), covariance, units.double()).sqrt()
    torch.testing.assert_close(torch.tensor(stddevs).double(), expected, rtol=1e-4, atol=0)
    root = posterior.covariance.root
    leading = torch.linalg.svd(root, full_matrices=False)[0][:, :3]
    torch.testing.assert_close((units[:3] @ leading).abs(), torch.eye(3), rtol=0, atol=1e-4)


def test_the_loss_along_a_ray_is_the_loss_of_those_weights(
    model: nn.Module, data: Datasets, posterior: lb.GaussianPosterior
) -> None:
    units, stddevs, _ = rays(posterior, seed=0)
    steps = np.array([-2.0, 0.0, 2.0])
    found = losses_along_rays(
        model, posterior, units, stddevs, steps, {"train": data.train, "test": data.test}, data.train
    )
    assert found["train"].shape == found["test"].shape == (4, 3)
    theta = posterior.mean + 2.0 * stddevs[1] * units[1]
    posterior.layout.assign_(model, theta)
    lb.recalibrate_batch_norm_(model, data.train.batches(500))
    model.eval()
    for name, split in (("train", data.train), ("test", data.test)):
        loss = cross_entropy(model(split.inputs), split.targets).item()
        assert found[name][1, 2] == pytest.approx(loss, rel=1e-4)
    assert np.ptp(found["train"][:, 1]) < 1e-6  # every ray starts at the same weights


def test_validate_weighs_images_equally_and_keeps_the_mode(model: nn.Module, data: Datasets) -> None:
    model.train()
    found = validate(model, data.test, batch_size=7)
    assert model.training
    logits = model.eval()(data.test.inputs)
    assert found["nll"] == pytest.approx(cross_entropy(logits, data.test.targets).item(), rel=1e-5)
    assert found["accuracy"] == (logits.argmax(-1) == data.test.targets).double().mean().item()


def test_one_weight_vector_is_evaluated_as_a_network(model: nn.Module, data: Datasets) -> None:
    theta = lb.ParameterLayout.from_module(model).flatten(model)
    splits = {"validation": data.validation, "test": data.test, "shifted": data.test.rotated()}
    found = evaluate_method(model, theta, splits, data.train, num_samples=5, seed=0)
    lb.recalibrate_batch_norm_(model, data.train.batches(500))
    model.eval()
    for name, split in splits.items():
        logits = model(split.inputs)
        assert found.metrics[name]["nll"] == pytest.approx(cross_entropy(logits, split.targets).item(), rel=1e-4)
        assert found.metrics[name]["accuracy"] == (logits.argmax(-1) == split.targets).double().mean().item()
        assert torch.equal(found.targets[name], split.targets)
        torch.testing.assert_close(found.probabilities[name], logits.softmax(-1), rtol=1e-4, atol=1e-5)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(found.entropy[name], entropy, rtol=1e-4, atol=1e-5)
    assert {name: values.shape for name, values in found.sample_log_likelihood.items()} == {
        "validation": (1, 30), "test": (1, 50), "shifted": (1, 50),
    }  # fmt: skip


def test_samples_are_averaged_as_probabilities(
    model: nn.Module, data: Datasets, posterior: lb.GaussianPosterior
) -> None:
    found = evaluate_method(model, posterior, {"test": data.test}, data.train, num_samples=6, seed=0)
    mean, low, high = average_curve(found.sample_log_likelihood["test"], seed=0)
    assert found.sample_log_likelihood["test"].shape == (6, 50)
    assert mean[-1] == pytest.approx(found.metrics["test"]["nll"], rel=1e-5)
    assert (low <= high).all() and mean[0] > mean[-1]


def test_part_of_the_weights_is_evaluated_with_the_rest_of_the_model(model: nn.Module, data: Datasets) -> None:
    head = lb.ParameterLayout.from_module(model, include="*.bias")
    theta = head.flatten(model) + 0.5
    found = evaluate_method(model, theta, {"test": data.test}, data.train, num_samples=1, seed=0, layout=head)
    head.assign_(model, theta)
    whole = lb.ParameterLayout.from_module(model).flatten(model)
    expected = evaluate_method(model, whole, {"test": data.test}, data.train, num_samples=1, seed=0)
    assert found.metrics == expected.metrics


def test_standard_errors_are_those_of_repeated_data(generator: torch.Generator) -> None:
    """The spread of each metric over fresh data sets is what one data set says it is."""
    logits = 2 * torch.randn(200 * 400, 4, generator=generator, dtype=torch.float64)
    probabilities = logits.softmax(-1)
    sharper = (1.5 * logits).softmax(-1)  # overconfident, so that the calibration error is no noise around zero
    targets = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    likelihood = sharper.gather(1, targets[:, None]).log().squeeze(1)
    found = [
        classification_metrics(p, t, ll, resamples=100 if n < 20 else 2)
        for n, (p, t, ll) in enumerate(zip(sharper.split(400), targets.split(400), likelihood.split(400), strict=True))
    ]
    for name in ("accuracy", "nll", "brier", "ece"):
        spread = torch.tensor([row[name] for row in found]).std().item()
        claimed = torch.tensor([row[f"{name}_se"] for row in found[:20]]).mean().item()
        # a standard deviation from 200 values is within 25 % of the truth but once in 10^6; the bootstrap adds its own
        assert claimed == pytest.approx(spread, rel=0.25 if name != "ece" else 0.35), name
    assert found[0]["nll"] == pytest.approx(lb.metrics.nll(sharper[:400], targets[:400]), rel=1e-12)


def test_the_description_of_a_posterior_is_that_of_a_dense_gaussian(posterior: lb.GaussianPosterior) -> None:
    found = describe_posterior(posterior, num_samples=400, seed=0)
    dim = posterior.mean.numel()
    covariance = posterior.covariance.to_dense().double()
    dense = torch.distributions.MultivariateNormal(posterior.mean.double(), covariance)
    assert found["entropy_nats"] == pytest.approx(dense.entropy().item(), abs=0.01)
    assert found["log_density_at_mean_nats"] == pytest.approx(dense.log_prob(posterior.mean.double()).item(), abs=0.01)
    # the mean of 400 log-densities has standard deviation sqrt(D / 2 / 400); 6 of them are exceeded once in 10^9
    assert found["log_density_of_draws_nats"] == pytest.approx(-dense.entropy().item(), abs=6 * (dim / 800) ** 0.5)
    assert found["rank"] == 4 and found["parameters"] == dim and found["peak_bytes"] >= 400 * dim * 4
