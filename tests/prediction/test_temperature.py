import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn

from lowrank_bdl.errors import LowRankBDLError, NonFiniteError, ShapeError
from lowrank_bdl.prediction import metrics
from lowrank_bdl.prediction.predict import predict
from lowrank_bdl.prediction.temperature import TemperatureScaling


def miscalibrated(true_temperature, n=20_000, classes=5, seed=0, dtype=torch.float64):
    """Probabilities softmax(z) of examples whose classes are drawn from softmax(z / T)."""
    rand = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, classes, generator=rand, dtype=torch.float64)
    targets = torch.multinomial((logits / true_temperature).softmax(1), 1, generator=rand).squeeze(1)
    return logits.softmax(1).to(dtype), targets


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_true_temperature_is_recovered(true_temperature, dtype):
    """Each class occurs as often as softmax(z / T) says, but for rounding: no sampling error blurs the answer."""
    logits = 2 * true_temperature * torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = ((logits / true_temperature).softmax(1) * 1000).round().long()
    targets = torch.cat([torch.arange(3).repeat_interleave(row) for row in counts])
    probabilities = logits.softmax(1).repeat_interleave(counts.sum(1), 0).to(dtype)
    scaling = TemperatureScaling().fit(probabilities, targets)
    assert scaling.converged
    assert scaling.temperature == pytest.approx(true_temperature, rel=2e-3)


def test_drawn_classes_give_the_true_temperature_up_to_its_standard_error():
    """Four standard errors, from the Fisher information at the truth, are 6e-5 of false alarms."""
    probabilities, targets = miscalibrated(3.0)
    scaling = TemperatureScaling().fit(probabilities, targets)
    scaled = probabilities.log() / 3
    weights = scaled.softmax(1)
    information = ((weights * scaled.square()).sum(1) - (weights * scaled).sum(1).square()).sum().item()
    assert abs(math.log(scaling.temperature / 3)) < 4 / math.sqrt(information) < 0.06


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 5), sharpness=st.floats(0.1, 10), noise=st.floats(0.05, 0.6))
def test_nothing_on_a_grid_is_better(seed, classes, sharpness, noise):
    rand = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(50, classes, generator=rand, dtype=torch.float64)
    wrong = torch.rand(50, generator=rand) < noise
    targets = torch.where(wrong, torch.randint(classes, (50,), generator=rand), logits.argmax(1))
    probabilities = logits.softmax(1)
    scaling = TemperatureScaling().fit(probabilities, targets)
    found = -scaling.log_likelihood(probabilities, targets).mean().item()
    for step in torch.linspace(math.log(0.0101), math.log(99), 40, dtype=torch.float64).tolist():
        other = -TemperatureScaling(math.exp(step)).log_likelihood(probabilities, targets).mean().item()
        assert found <= other * (1 + 1e-12)
    if scaling.converged:

        def loss(step):
            return -TemperatureScaling(math.exp(step)).log_likelihood(probabilities, targets).mean().item()

        at = math.log(scaling.temperature)
        expected = minimize_scalar(loss, bracket=(at - 0.5, at, at + 0.5), options={"xtol": 1e-9})
        assert at == pytest.approx(expected.x, abs=1e-6)  # the oracle cannot see below sqrt(eps)


def test_the_slope_vanishes_at_the_answer():
    probabilities, targets = miscalibrated(3.0, n=500)
    scaling = TemperatureScaling().fit(probabilities, targets)
    log_temperature = torch.tensor(math.log(scaling.temperature), dtype=torch.float64, requires_grad=True)
    nn.functional.cross_entropy(probabilities.log() / log_temperature.exp(), targets).backward()
    assert abs(log_temperature.grad.item()) < 1e-9


def test_scaled_probabilities_by_hand():
    probabilities, targets = miscalibrated(2.0, n=20, classes=3)
    scaling = TemperatureScaling(2.5)
    powers = probabilities ** (1 / 2.5)
    expected = powers / powers.sum(1, keepdim=True)
    torch.testing.assert_close(scaling(probabilities), expected, rtol=1e-12, atol=0)
    by_hand = expected[torch.arange(20), targets].log()
    torch.testing.assert_close(scaling.log_likelihood(probabilities, targets), by_hand, rtol=1e-12, atol=0)
    assert torch.equal(scaling(probabilities).argmax(1), probabilities.argmax(1))
    single = scaling(probabilities.float())
    assert single.dtype == scaling.log_likelihood(probabilities.float(), targets).dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(TemperatureScaling()(probabilities), probabilities, rtol=1e-14, atol=0)


def test_dense_predictions_count_every_position():
    probabilities, targets = miscalibrated(2.0, n=24, classes=3)
    dense, where = probabilities.view(2, 3, 4, 3), targets.view(2, 3, 4)
    flat = TemperatureScaling().fit(probabilities, targets)
    assert TemperatureScaling().fit(dense, where).temperature == flat.temperature
    assert torch.equal(flat(dense), flat(probabilities).view(2, 3, 4, 3))
    assert torch.equal(flat.log_likelihood(dense, where).flatten(), flat.log_likelihood(probabilities, targets))


def test_a_predictive_brings_its_own_targets():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 4).double()
        loader = [(torch.randn(60, 3).double(), torch.randint(4, (60,)))]
        thetas = torch.randn(5, 16).double()
    found = predict(model, thetas, loader, progress=False)
    scaling = TemperatureScaling().fit(found)
    assert scaling.temperature == TemperatureScaling().fit(found.mean, found.targets).temperature != 1
    assert torch.equal(scaling(found), scaling(found.mean))
    scaled = scaling.log_likelihood(found)
    assert -scaled.mean().item() == pytest.approx(metrics.nll(scaling(found), found.targets), rel=1e-12)
    assert -scaled.mean().item() < found.nll
    with pytest.raises(TypeError, match="must be left out with a Predictive"):
        scaling.fit(found, found.targets)
    unlabelled = predict(model, thetas, [loader[0][0]], progress=False)
    with pytest.raises(ShapeError, match="targets must be given"):
        scaling.fit(unlabelled)
    numeric = predict(model, thetas, loader[0][:1], likelihood="gaussian", noise_variance=1.0, progress=False)
    with pytest.raises(LowRankBDLError, match="needs class probabilities; the likelihood is a numeric one"):
        scaling(numeric)


def test_no_minimum_inside_is_said():
    sure = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    always_right = TemperatureScaling().fit(sure, torch.tensor([0, 1]))
    assert (always_right.temperature, always_right.converged) == (0.01, False)
    always_wrong = TemperatureScaling().fit(sure, torch.tensor([1, 0]), bounds=(0.5, 8.0))
    assert (always_wrong.temperature, always_wrong.converged) == (8.0, False)
    flat = TemperatureScaling().fit(torch.full((4, 2), 0.5), torch.tensor([0, 1, 1, 1]))
    assert (flat.temperature, flat.converged) == (1.0, False)
    one_hot = TemperatureScaling().fit(torch.eye(2), torch.tensor([0, 1]))
    assert (one_hot.temperature, one_hot.converged) == (0.01, False)
    again = always_right.fit(*miscalibrated(2.0, n=2000))
    assert again is always_right and again.converged


def test_underflowed_probabilities_keep_the_loss_finite():
    probabilities = torch.tensor([[1.0, 0.0]] * 9 + [[0.0, 1.0]])
    targets = torch.zeros(10, dtype=torch.long)
    scaling = TemperatureScaling().fit(probabilities, targets)
    # nine of ten are right: the best two-class temperature gives log odds log 9 from the floor's -log tiny
    assert scaling.temperature == pytest.approx(-math.log(torch.finfo(torch.float32).tiny) / math.log(9), rel=1e-6)
    sharp = TemperatureScaling(0.1).log_likelihood(probabilities, targets)
    assert sharp.isfinite().all() and sharp[-1] < -800
    assert scaling(probabilities).sum(1).tolist() == pytest.approx([1.0] * 10)


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0 and finite; got"):
        TemperatureScaling(temperature)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, math.inf)])
def test_bad_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds must be 0 < low < high < infinity; got"):
        TemperatureScaling().fit(*miscalibrated(1.0, n=5), bounds=bounds)


def test_bad_input_is_refused_and_the_temperature_stays():
    scaling = TemperatureScaling(1.5)
    probabilities, targets = miscalibrated(1.0, n=5)
    with pytest.raises(ShapeError, match="targets must be given"):
        scaling.fit(probabilities)
    with pytest.raises(ShapeError, match=r"got \(5, 5\) and \(4,\)"):
        scaling.fit(probabilities, targets[:4])
    with pytest.raises(ShapeError, match="are they logits"):
        scaling(probabilities.log())
    with pytest.raises(ShapeError, match=r"classes last; got \(3,\)"):
        scaling(torch.ones(3) / 3)
    with pytest.raises(NonFiniteError, match="probs must be finite"):
        scaling.log_likelihood(probabilities * torch.nan, targets)
    assert scaling.temperature == 1.5 and repr(scaling) == "TemperatureScaling(temperature=1.5)"


@pytest.mark.parametrize("positions", [(), (4,)])
def test_ignored_targets_do_not_count(positions):
    torch.manual_seed(0)
    probabilities = torch.randn(60, *positions, 3).double().softmax(-1)
    targets = torch.randint(3, (60, *positions))
    targets.view(-1)[::3] = -100
    kept = targets != -100
    found = TemperatureScaling().fit(probabilities, targets)
    assert found.temperature == TemperatureScaling().fit(probabilities[kept], targets[kept]).temperature != 1.0
