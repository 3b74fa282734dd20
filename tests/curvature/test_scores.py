"""Gradients of the log-likelihood against automatic differentiation and torch.distributions."""

import math

import pytest
import torch
from scipy.stats import binom, chi2
from torch.distributions import Categorical, Normal
from torch.nn.functional import binary_cross_entropy_with_logits

from lowrank_bdl.curvature.scores import BernoulliScores, CategoricalScores, GaussianScores, resolve_scores
from lowrank_bdl.errors import ShapeError
from tests.oracles import assert_close


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_prob(rule, outputs, targets):
    if isinstance(rule, CategoricalScores):
        return Categorical(logits=outputs.movedim(1, -1)).log_prob(targets).sum()
    if isinstance(rule, BernoulliScores):
        return -binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
    return Normal(outputs, math.sqrt(rule.noise_variance)).log_prob(targets).sum()


CASES = {
    "classes": (CategoricalScores(), randn(4, 3), torch.tensor([0, 2, 1, 1])),
    "dense classes": (CategoricalScores(), randn(2, 3, 2, 2), torch.tensor([0, 2, 1, 1, 2, 2, 0, 1]).view(2, 2, 2)),
    "labels": (BernoulliScores(), randn(4, 2), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.3, 0.0], [0.0, 0.0]]).double()),
    "flat labels": (BernoulliScores(), randn(5), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]).double()),
    "means": (GaussianScores(0.3), randn(4, 2), randn(4, 2, seed=1)),
    "dense means": (GaussianScores(0.3), randn(2, 3, 2), randn(2, 3, 2, seed=1)),
    "flat means": (GaussianScores(2.0), randn(5), randn(5, seed=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_true_labels(name):
    rule, outputs, targets = CASES[name]
    outputs, targets = rule.check(outputs.clone().requires_grad_(), targets)
    value = log_prob(rule, outputs, targets)
    assert_close(rule.log_likelihood(outputs, targets), value.detach())
    (score,) = rule.scores(outputs, targets, "true", None)
    assert_close(score, -torch.autograd.grad(value, outputs)[0])


@pytest.mark.parametrize("name", CASES)
def test_expected_labels_give_the_hessian(name):
    """The sum of s s' is the second derivative of -log p(y | f), which depends on no y: the Gauss-Newton matrix."""
    rule, outputs, targets = CASES[name]
    scores = torch.stack(list(rule.scores(outputs, targets, "expected", None)))
    scores = scores.reshape(*scores.shape[:2], -1)
    found = torch.einsum("rni,rnj->nij", scores, scores)
    for number, example in enumerate(outputs):
        hessian = torch.autograd.functional.hessian(
            lambda flat, n=number, like=example: -log_prob(rule, flat.view(1, *like.shape), targets[n : n + 1]),
            example.flatten(),
        )
        assert_close(found[number], hessian)


def test_sampled_classes_follow_the_predicted_probabilities():
    """Chi-square test of 20,000 draws; a correct sampler fails with probability 1e-6, uniform classes always."""
    rule, number = CategoricalScores(), 20_000
    logits = torch.tensor([[2.0, 0.0, -1.0, -30.0]]).expand(number, 4)
    (score,) = rule.scores(logits, torch.zeros(number).long(), "sampled", torch.Generator().manual_seed(0))
    probs = logits.softmax(1)
    counts = (probs - score).round().sum(0).double()
    assert counts.sum() == number and counts[3] == 0
    expected = number * probs[0, :3].double()
    assert ((counts[:3] - expected).square() / expected).sum() < chi2.isf(1e-6, 2)
    assert ((counts[:3] - number / 3).square() / (number / 3)).sum() > chi2.isf(1e-6, 2)


def test_sampled_labels_follow_the_predicted_probabilities():
    """20,000 draws, binomial bounds; a correct sampler fails with probability 1e-6, even odds always."""
    number = 20_000
    logits = torch.tensor([[1.0]]).expand(number, 1)
    (score,) = BernoulliScores().scores(logits, torch.zeros(number, 1), "sampled", torch.Generator().manual_seed(0))
    ones = (logits.sigmoid() - score).round().sum().item()
    low, high = binom.ppf(5e-7, number, logits[0].sigmoid().item()), binom.isf(5e-7, number, logits[0].sigmoid().item())
    assert low <= ones <= high
    assert not low <= number / 2 <= high


def test_sampled_noise_has_the_noise_variance():
    """A chi-square sum of 20,000 squares; a correct sampler fails with probability 1e-6, twice the variance always."""
    number, variance = 20_000, 0.25
    (score,) = GaussianScores(variance).scores(
        torch.zeros(number, 1), torch.zeros(number, 1), "sampled", torch.Generator().manual_seed(0)
    )
    low, high = chi2.ppf(5e-7, number), chi2.isf(5e-7, number)
    assert low < score.double().square().sum().item() * variance < high
    assert not low < score.double().square().sum().item() * 2 * variance < high


def test_scores_keep_the_dtype_of_the_outputs():
    for rule in (CategoricalScores(), GaussianScores(), BernoulliScores()):
        outputs = torch.zeros(2, 3, dtype=torch.bfloat16)
        targets = torch.zeros(2).long() if isinstance(rule, CategoricalScores) else torch.zeros(2, 3)
        for labels in ("true", "sampled", "expected"):
            assert all(s.dtype == torch.bfloat16 for s in rule.scores(outputs, targets, labels, None))


def test_the_log_likelihood_is_computed_in_double_precision():
    logits = torch.tensor([[200.0, 0.0]])
    assert CategoricalScores().log_likelihood(logits, torch.tensor([1])).item() == -200.0
    assert CategoricalScores().log_likelihood(logits, torch.tensor([0])).dtype == torch.float64


def test_targets_are_never_broadcast():
    categorical, gaussian = CategoricalScores(), GaussianScores()
    assert gaussian.check(torch.zeros(3, 1), torch.zeros(3))[1].shape == (3, 1)
    assert gaussian.check(torch.zeros(3, 1), torch.tensor([1, 2, 3]))[1].dtype == torch.float64
    with pytest.raises(ShapeError, match=r"shape of the output, \(3, 1\); got torch.float32 of shape \(1, 3\)"):
        gaussian.check(torch.zeros(3, 1), torch.zeros(1, 3))
    with pytest.raises(ShapeError, match=r"shape of the output, \(3,\); got list"):
        gaussian.check(torch.zeros(3), [1.0, 2.0, 3.0])
    with pytest.raises(ShapeError, match=r"class indices of shape \(3,\); got torch.int64 of shape \(3, 1\)"):
        categorical.check(torch.zeros(3, 2), torch.zeros(3, 1).long())
    with pytest.raises(ShapeError, match=r"class indices of shape \(3,\); got torch.float32 of shape \(3,\)"):
        categorical.check(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ShapeError, match=r"in \[0, 2\); got values from -1 to 1"):
        categorical.check(torch.zeros(3, 2), torch.tensor([0, 1, -1]))
    with pytest.raises(ShapeError, match=r"Logits must have shape \(N, C, \*positions\), C >= 2; got \(3, 1\)"):
        categorical.check(torch.zeros(3, 1), torch.zeros(3).long())
    for rule in (categorical, gaussian):
        with pytest.raises(ShapeError, match="output must be one floating-point tensor; got tuple"):
            rule.check((torch.zeros(3, 2),), torch.zeros(3))
        with pytest.raises(ShapeError, match="one floating-point tensor; got torch.int64 of shape"):
            rule.check(torch.zeros(3, 2).long(), torch.zeros(3))


def test_names():
    assert resolve_scores("categorical", 1.0) == CategoricalScores()
    with pytest.raises(ValueError, match="likelihood must be 'categorical', 'bernoulli' or 'gaussian'; got 'poisson'"):
        resolve_scores("poisson", 1.0)
    with pytest.raises(ValueError, match="goes with likelihood='gaussian'; got 0.5 for 'categorical'"):
        resolve_scores("categorical", 0.5)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="noise_variance must be a positive number; got"):
            resolve_scores("gaussian", value)
