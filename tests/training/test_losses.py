"""Losses against autograd by hand, in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as ce
from torch.nn.functional import mse_loss

from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.surfaces.curves import BezierCurve
from lowrank_bdl.surfaces.surface_model import SurfaceModel
from lowrank_bdl.training.losses import (
    AdversarialCrossEntropy,
    GaussianPrior,
    SurfaceLoss,
    accuracy,
    cross_entropy,
    of_output,
)


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images = torch.rand(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    return images.sub(0.4).div(0.3), torch.randint(0, 3, (6,), generator=generator)


def test_cross_entropy_and_accuracy_are_means_over_the_batch(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    loss, output = cross_entropy(net, *batch)
    assert torch.equal(output, net(batch[0])) and torch.equal(loss, ce(output, batch[1]))
    assert accuracy(output, batch[1]).item() == sum((output.argmax(1) == batch[1]).tolist()) / 6
    dense = torch.zeros(2, 3, 4, 4)
    dense[:, 1] = 1
    assert accuracy(dense, torch.ones(2, 4, 4, dtype=torch.long)).item() == 1.0


def test_half_precision_logits_are_judged_in_single_precision(batch: tuple[Tensor, Tensor]) -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss, output = cross_entropy(nn.Identity(), logits, batch[1])
    assert loss.dtype == torch.float32 and output.dtype == torch.bfloat16
    assert torch.equal(loss, ce(logits.float(), batch[1]))


def test_a_function_of_the_output_is_a_loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    targets = torch.ones(6, 3, dtype=torch.float64)
    loss, output = of_output(mse_loss)(net, batch[0], targets)
    assert torch.equal(loss, (output - 1).square().mean())


def test_the_adversarial_loss_is_that_of_the_perturbed_images(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    inputs, targets = batch
    low = torch.tensor([0.0, 0.0, 0.0]).sub(0.4).div(0.3).view(3, 1, 1)
    high = torch.tensor([1.0, 1.0, 1.0]).sub(0.4).div(0.3).view(3, 1, 1)
    loss, output = AdversarialCrossEntropy(low, high, epsilon=0.1)(net, inputs, targets)
    loss.backward()
    found = [p.grad.clone() for p in net.parameters()]

    net.zero_grad()
    pixels = inputs.clone().requires_grad_()
    ce(net(pixels), targets).backward()
    attacked = (inputs + 0.1 / 0.3 * pixels.grad.sign()).clamp(-0.4 / 0.3, 0.6 / 0.3)
    assert (attacked == low.double().min()).any() or (attacked == high.double().max()).any()  # the clamp bites
    net.zero_grad()
    expected = (ce(net(inputs), targets) + ce(net(attacked), targets)) / 2
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the bounds are in single precision
    assert torch.equal(output, net(inputs))
    for gradient, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-9)
    assert not inputs.requires_grad


def test_bounds_of_raw_pixels_would_give_another_loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """What swa_gaussian does: clamping normalised images to [0, 1] moves them far more than epsilon."""
    right = AdversarialCrossEntropy(-0.4 / 0.3, 0.6 / 0.3, epsilon=0.01)(net, *batch)[0]
    wrong = AdversarialCrossEntropy(0.0, 1.0, epsilon=0.01)(net, *batch)[0]
    assert abs(right - wrong) > 1e-2 * right


def test_the_prior_s_gradient_is_that_of_weight_decay(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net[1].bias.requires_grad_(False)
    trainable = [p for p in net.parameters() if p.requires_grad]
    plain = torch.autograd.grad(cross_entropy(net, *batch)[0], trainable)
    loss, _ = GaussianPrior(cross_entropy, prior_var=0.1, num_data=500)(net, *batch)
    with_prior = torch.autograd.grad(loss, trainable)
    for p, before, after in zip(trainable, plain, with_prior, strict=True):
        torch.testing.assert_close(after - before, p.detach() / (0.1 * 500), rtol=1e-10, atol=1e-12)
    norm = sum(p.square().sum().item() for p in trainable)
    assert loss.item() - cross_entropy(net, *batch)[0].item() == pytest.approx(norm / (2 * 0.1 * 500), rel=1e-10)


def test_tied_weights_have_one_prior() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    inputs, targets = torch.zeros(1, 2), torch.tensor([0])
    loss, _ = GaussianPrior(cross_entropy, prior_var=0.5, num_data=1)(net, inputs, targets)
    expected = cross_entropy(net, inputs, targets)[0] + net[0].weight.square().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="epsilon must be >= 0; got -1"):
        AdversarialCrossEntropy(0.0, 1.0, epsilon=-1)
    with pytest.raises(ValueError, match="low must be below high everywhere; got 1.0 and 1.0"):
        AdversarialCrossEntropy(1.0, 1.0)
    with pytest.raises(ValueError, match="prior_var must be positive and finite; got 0"):
        GaussianPrior(cross_entropy, 0, 10)
    with pytest.raises(ValueError, match="num_data must be at least 1; got 0"):
        GaussianPrior(cross_entropy, 1.0, 0)


# ---- surfaces --------------------------------------------------------------------------------------------------------


class CurveWithLength(BezierCurve, kind="test curve"):
    """A surface whose volume is the distance of its ends from the bend."""

    def log_volume(self) -> Tensor:
        return (self.point_1 - self.point_0).norm().log()


def on_curve(net: nn.Module, cls: type[BezierCurve] = BezierCurve, spread: float = 1.0) -> SurfaceModel:
    layout = ParameterLayout.from_module(net)
    noise = torch.randn(3, layout.numel, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    curve = cls(layout.flatten(net) + spread * noise, layout)
    return SurfaceModel(net, curve, generator=torch.Generator().manual_seed(5))


def test_surface_loss_is_the_mean_over_draws_of_loss_and_penalty(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    surface = on_curve(net)
    value, output = SurfaceLoss(cross_entropy, weight_decay=0.3, num_samples=3)(surface, *batch)
    surface.generator.manual_seed(5)
    terms = []
    for _ in range(3):
        theta = surface.draw()
        logits = torch.func.functional_call(net, surface.layout.unflatten(theta), (batch[0],))
        terms.append(ce(logits, batch[1]) + 0.15 * theta.dot(theta))
    torch.testing.assert_close(value, torch.stack(terms).mean(), rtol=1e-12, atol=0)
    assert torch.equal(output, logits)
    (gradient,) = torch.autograd.grad(value, surface.surface.point_1)
    (expected,) = torch.autograd.grad(torch.stack(terms).mean(), surface.surface.point_1)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_more_draws_do_not_make_the_loss_larger(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """A mean, not the sum of the released simplexes: on a surface of one point the number of draws is no matter."""
    point = on_curve(net, spread=0.0)
    one, five = (SurfaceLoss(cross_entropy, weight_decay=0.1, num_samples=n)(point, *batch)[0] for n in (1, 5))
    torch.testing.assert_close(one, five, rtol=1e-12, atol=0)


def test_a_loss_that_calls_the_network_twice_sees_one_draw(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    adversarial = AdversarialCrossEntropy(-0.4 / 0.3, 0.6 / 0.3, epsilon=0.05)
    surface = on_curve(net)
    value, _ = SurfaceLoss(adversarial)(surface, *batch)
    surface.generator.manual_seed(5)
    with surface.at(surface.draw()):
        expected, _ = adversarial(surface, *batch)
    assert torch.equal(value, expected)


def test_surface_loss_in_evaluation_mode_is_that_of_the_middle(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    surface = on_curve(net).eval()
    value, _ = SurfaceLoss(cross_entropy, weight_decay=0.2)(surface, *batch)
    center = surface.surface.center_theta()
    expected = cross_entropy(surface, *batch)[0] + 0.1 * center.dot(center)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_the_volume_is_rewarded_once_a_batch(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    surface = on_curve(net, CurveWithLength)
    with_volume, _ = SurfaceLoss(cross_entropy, volume=0.7, num_samples=2)(surface, *batch)
    surface.generator.manual_seed(5)
    without, _ = SurfaceLoss(cross_entropy, num_samples=2)(surface, *batch)
    log_volume = surface.surface.log_volume()
    torch.testing.assert_close(without - with_volume, 0.7 * log_volume, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(v, surface.surface.point_1)[0] for v in (without, with_volume)]
    (expected,) = torch.autograd.grad(log_volume, surface.surface.point_1)
    torch.testing.assert_close(gradients[0] - gradients[1], 0.7 * expected, rtol=1e-8, atol=1e-12)


def test_surface_loss_refuses_what_it_cannot_weigh(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(TypeError, match="SurfaceLoss needs a SurfaceModel; got Sequential"):
        SurfaceLoss(cross_entropy)(net, *batch)
    with pytest.raises(TypeError, match="volume = 0.1 needs a surface with a log_volume; BezierCurve has none"):
        SurfaceLoss(cross_entropy, volume=0.1)(on_curve(net), *batch)
    with pytest.raises(ValueError, match="weight_decay must be at least 0 and finite; got -1"):
        SurfaceLoss(cross_entropy, weight_decay=-1)
    with pytest.raises(ValueError, match="volume must be at least 0 and finite; got inf"):
        SurfaceLoss(cross_entropy, volume=float("inf"))
    with pytest.raises(ValueError, match="num_samples must be at least 1; got 0"):
        SurfaceLoss(cross_entropy, num_samples=0)
