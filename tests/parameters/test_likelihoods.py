import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, Poisson

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.likelihoods import (
    CategoricalLikelihood,
    GaussianLikelihood,
    align_targets,
    base_distribution,
    resolve_likelihood,
)


def test_categorical_is_a_softmax(generator):
    logits = torch.randn(5, 3, generator=generator)
    distribution = CategoricalLikelihood()(logits)
    torch.testing.assert_close(distribution.probs, logits.softmax(1))
    y = torch.tensor([0, 1, 2, 2, 1])
    expected = -torch.nn.functional.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(distribution.log_prob(y), expected)


def test_half_precision_logits_are_raised_to_single():
    logits = torch.tensor([[0.0, -30.0]], dtype=torch.float16)
    log_prob = CategoricalLikelihood()(logits).log_prob(torch.tensor([1]))
    assert log_prob.dtype == torch.float32
    assert log_prob.item() == pytest.approx(-30.0, rel=1e-6)
    assert CategoricalLikelihood()(logits.double()).probs.dtype == torch.float64


def test_dense_prediction_has_its_classes_on_axis_1(generator):
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    distribution = CategoricalLikelihood()(logits)
    assert distribution.batch_shape == (2, 4, 5)
    y = torch.randint(3, (2, 4, 5), generator=generator)
    expected = -torch.nn.functional.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(distribution.log_prob(y), expected)


def gaussian_by_hand(mean, variance, y):
    return sum(-0.5 * ((b - a) ** 2 / v + math.log(2 * math.pi * v)) for a, v, b in zip(mean, variance, y, strict=True))


@pytest.mark.parametrize("noise", [0.3, torch.tensor([0.3, 0.3])])
def test_gaussian_with_known_noise(noise):
    distribution = GaussianLikelihood(noise)(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    actual = distribution.log_prob(torch.tensor([[0.0, 0.0], [3.0, 5.0]]))
    expected = [gaussian_by_hand([1, 2], [0.3, 0.3], [0, 0]), gaussian_by_hand([3, 4], [0.3, 0.3], [3, 5])]
    assert actual.tolist() == pytest.approx(expected, rel=1e-6)


def test_gaussian_with_predicted_noise():
    pair = GaussianLikelihood()((torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 4.0]])))
    assert pair.log_prob(torch.zeros(1, 2)).item() == pytest.approx(
        gaussian_by_hand([1, 2], [0.5, 4], [0, 0]), rel=1e-6
    )
    raw = [math.log(math.expm1(0.5)), math.log(math.expm1(4.0))]  # inverse of softplus
    head = GaussianLikelihood()(torch.tensor([[1.0, 2.0, *raw]]))
    torch.testing.assert_close(head.mean, pair.mean)
    torch.testing.assert_close(head.variance, pair.variance)


def test_a_mean_without_a_target_axis():
    distribution = GaussianLikelihood(1.0)(torch.zeros(4))
    assert distribution.batch_shape == (4,) and distribution.event_shape == (1,)
    pair = GaussianLikelihood()((torch.zeros(4), torch.ones(4)))
    assert pair.batch_shape == (4,) and pair.variance.shape == (4, 1)


def test_targets_never_broadcast():
    column = GaussianLikelihood(1.0)(torch.zeros(4, 1))
    assert align_targets(column, torch.arange(4)).tolist() == [[0.0], [1.0], [2.0], [3.0]]
    assert align_targets(column, torch.arange(4.0).double().view(4, 1)).dtype == torch.float32
    with pytest.raises(ShapeError, match=r"shape of the prediction, \(4, 1\); got \(1, 4\)"):
        align_targets(column, torch.zeros(1, 4))
    with pytest.raises(ShapeError, match=r"shape of the prediction, \(4, 2\); got \(4,\)"):
        align_targets(GaussianLikelihood(1.0)(torch.zeros(4, 2)), torch.zeros(4))
    classes = CategoricalLikelihood()(torch.zeros(4, 3))
    assert align_targets(classes, torch.tensor([0, 1, 2, 2], dtype=torch.uint8)).dtype == torch.int64
    with pytest.raises(ShapeError, match=r"integer class indices of shape \(4,\); got torch.int64 of shape \(4, 1\)"):
        align_targets(classes, torch.zeros(4, 1).long())
    with pytest.raises(ShapeError, match="got torch.float32 of shape"):
        align_targets(classes, torch.zeros(4))
    with pytest.raises(ShapeError, match=r"in \[0, 3\); got values from -1 to 3"):
        align_targets(classes, torch.tensor([0, -1, 3, 0]))


@pytest.mark.parametrize(
    "likelihood,outputs,message",
    [
        (CategoricalLikelihood(), torch.zeros(4), r"\(N, C\) or \(N, C, \*positions\) .* got \(4,\)"),
        (CategoricalLikelihood(), torch.zeros(4, 1), r"at least 2 classes; got \(4, 1\)"),
        (CategoricalLikelihood(), (torch.zeros(4, 2),), r"logits of shape \(N, C\); got tuple. Pass call_fn"),
        (CategoricalLikelihood(), torch.zeros(4, 2).long(), "got dtype torch.int64"),
        (GaussianLikelihood(1.0), (torch.zeros(4), torch.ones(4)), "when noise_variance is given; got tuple"),
        (GaussianLikelihood(), torch.zeros(4, 3), r"shape \(N, 2k\); got \(4, 3\)"),
        (GaussianLikelihood(), torch.zeros(4), r"shape \(N, 2k\); got \(4,\)"),
        (GaussianLikelihood(), (torch.zeros(4), torch.ones(1)), r"equal shape; got shapes \[\(4,\), \(1,\)\]"),
        (GaussianLikelihood(), {"mean": 1}, r"or one tensor \(N, 2k\); got dict"),
    ],
)
def test_outputs_of_another_form_are_refused(likelihood, outputs, message):
    with pytest.raises(ShapeError, match=message):
        likelihood(outputs)


def test_names():
    assert resolve_likelihood("categorical") == CategoricalLikelihood()
    assert resolve_likelihood("gaussian") == GaussianLikelihood()
    assert resolve_likelihood(Poisson) is Poisson
    with pytest.raises(ValueError, match="a callable from outputs to a distribution; got 'binary'"):
        resolve_likelihood("binary")
    with pytest.raises(ValueError, match="goes with likelihood='gaussian'; got likelihood='categorical'"):
        resolve_likelihood("categorical", 0.1)
    with pytest.raises(ValueError, match="noise_variance must be > 0; got 0.0"):
        resolve_likelihood("gaussian", 0.0)
    with pytest.raises(ValueError, match="noise_variance must be > 0; got tensor"):
        GaussianLikelihood(torch.tensor([1.0, torch.nan]))


def test_base_distribution():
    normal = Normal(torch.zeros(2, 3), torch.ones(2, 3))
    assert base_distribution(Independent(Independent(normal, 1), 1)) is normal
    tokens = Independent(Categorical(logits=torch.zeros(2, 5, 3)), 1)
    assert align_targets(tokens, torch.full((2, 5), 2)).shape == (2, 5)
    with pytest.raises(ShapeError, match=r"in \[0, 3\)"):
        align_targets(tokens, torch.full((2, 5), 3))
