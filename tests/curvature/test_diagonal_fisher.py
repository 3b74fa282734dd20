"""The diagonal Fisher matrix against one dense Jacobian an example, for every kind of layer and label."""

import pytest
import torch
from torch import nn

from lowrank_bdl.curvature import examples, kronecker_factors
from lowrank_bdl.curvature.fisher import fisher_sums
from lowrank_bdl.curvature.scores import CategoricalScores, GaussianScores
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.curvature.cases import NETS, batches, build, categorical_hessians, jacobians, outputs_of
from tests.oracles import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # of torch's own
CATEGORICAL = CategoricalScores()


def diagonal(net, loader, labels, likelihood=CATEGORICAL, generator=None, **options):
    layout = ParameterLayout.from_module(net, **options)
    theta = layout.flatten(net)
    sums = fisher_sums(
        net, theta, layout, loader, likelihood, labels, kronecker=False, diagonal=True, generator=generator
    )
    return layout.flatten(sums.diagonal, dtype=torch.float64), sums


def expected(jacobian, scores):
    """The sum over examples and vectors of scores (N, R, outputs) of squared gradients."""
    return torch.einsum("nrk,nkd->nrd", scores, jacobian).square().sum((0, 1))


@pytest.mark.parametrize("name", NETS)
def test_every_layer_and_label(name):
    """True and expected labels, ragged batches; one batch of all, in which the positions of a net may be as many."""
    net, x, y = build(name)
    jacobian, outputs = jacobians(net, x), outputs_of(net, x)
    true = (outputs.softmax(-1) - nn.functional.one_hot(y, 3))[:, None]
    roots = torch.linalg.eigh(categorical_hessians(outputs))
    expectation = (roots.eigenvectors * roots.eigenvalues.clamp(min=0).sqrt()[:, None]).mT
    for loader in (batches(x, y), [(x, y)]):
        assert_close(diagonal(net, loader, "true")[0], expected(jacobian, true), cond=10)
        assert_close(diagonal(net, loader, "expected")[0], expected(jacobian, expectation), cond=10)


@pytest.mark.parametrize("name", ["mlp", "residual", "positions"])
def test_single_precision(name):
    net, x, y = build(name, dtype=torch.float32)
    true = (outputs_of(net, x).softmax(-1) - nn.functional.one_hot(y, 3))[:, None]
    exact = expected(jacobians(net, x), true)
    assert_close(diagonal(net, batches(x, y), "true")[0], exact, torch.float32, 10)


@pytest.mark.parametrize("labels", ["true", "expected"])
def test_gaussian_likelihood(labels):
    net, x, _ = build("mlp")
    y = torch.randn(len(x), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variance = 0.25
    scores = (outputs_of(net, x) - y)[:, None] / variance
    if labels == "expected":
        scores = torch.eye(3, dtype=torch.float64).expand(len(x), 3, 3) / variance**0.5
    found, _ = diagonal(net, batches(x, y), labels, GaussianScores(variance))
    assert_close(found, expected(jacobians(net, x), scores), cond=10)


@pytest.mark.parametrize("likelihood", [CATEGORICAL, GaussianScores(0.5)], ids=["categorical", "gaussian"])
def test_sampled_labels_are_unbiased(likelihood):
    """The mean over many draws, in standard errors: P(any of 31 beyond 6.5) < 1e-6 under t(59)."""
    net, x, y = build("mlp")
    y = y if likelihood is CATEGORICAL else torch.zeros(len(x), 3, dtype=torch.float64)
    exact, _ = diagonal(net, [(x, y)], "expected", likelihood)
    repeats = 60
    many = [(x.repeat(400, 1), y.repeat(400, *[1] * (y.ndim - 1)))]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([diagonal(net, many, "sampled", likelihood, generator)[0] / 400 for _ in range(repeats)])
    errors = (draws.mean(0) - exact) / (draws.std(0) / repeats**0.5)
    assert errors.abs().max() < 6.5
    true, _ = diagonal(net, [(x, y)], "true", likelihood)
    assert ((true - exact) / (draws.std(0) / repeats**0.5)).abs().max() > 20  # the empirical Fisher would be seen


def test_sampled_labels_come_from_the_generator():
    net, x, y = build("conv")
    draw = lambda seed: diagonal(net, [(x, y)], "sampled", generator=torch.Generator().manual_seed(seed))[0]  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_it_is_no_square_of_a_batch_mean():
    """Batches of one and one batch of all give the same sums, which a squared mean gradient does not."""
    net, x, y = build("residual")
    one = diagonal(net, batches(x, y, [1] * 7), "true")[0]
    assert_close(diagonal(net, [(x, y)], "true")[0], one)
    jacobian, outputs = jacobians(net, x), outputs_of(net, x)
    mean = torch.einsum("nk,nkd->nd", outputs.softmax(-1) - nn.functional.one_hot(y, 3), jacobian).mean(0)
    assert not torch.allclose(one, len(x) * mean.square(), rtol=0.5)


def test_chunks_change_nothing(monkeypatch):
    net, x, y = build("positions")
    whole = diagonal(net, [(x, y)], "expected")[0]
    monkeypatch.setattr(kronecker_factors, "_NUMBERS_AT_ONCE", 1)
    assert_close(diagonal(net, [(x, y)], "expected")[0], whole)


def test_a_part_of_the_parameters():
    net, x, y = build("residual")
    everything, _ = diagonal(net, [(x, y)], "true")
    layout = ParameterLayout.from_module(net)
    for options in ({"include": "*.bias"}, {"include": "conv2"}, {"exclude": ["bn", "head.weight"]}):
        _, where = layout.subset(**options)
        assert_close(diagonal(net, [(x, y)], "true", **options)[0], everything[where])


def test_examples_one_by_one_where_vmap_cannot(monkeypatch):
    """A recurrent layer has no batching rule; the result is the same as where there is one."""
    calls = []
    real = examples.vmap

    def counted(function, **options):
        calls.append(options)
        return real(function, **options)

    monkeypatch.setattr(examples, "vmap", counted)
    net, x, y = build("positions")
    exact = diagonal(net, batches(x, y), "true")[0]
    assert len(calls) == 3

    def refuse(function, **options):
        def fail(*args):
            raise RuntimeError("no batching rule")

        calls.append(options)
        return fail

    monkeypatch.setattr(examples, "vmap", refuse)
    assert_close(diagonal(net, batches(x, y), "true")[0], exact)
    assert len(calls) == 4  # asked once, then never again


def test_inputs_in_mappings():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, inputs):
            return inputs["x"] * self.weight

    net, x = Pair(), torch.randn(2, 3, dtype=torch.float64)
    slopes = (net.weight * x).softmax(1) - torch.eye(3, dtype=torch.float64)[:2]
    expected = (slopes * x).square().sum(0)
    assert_close(diagonal(net, [({"x": x}, torch.tensor([0, 1]))], "true")[0], expected.detach())
