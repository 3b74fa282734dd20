"""Means over data do not depend on how the data are cut into batches, whatever a loss divides by."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_bdl as lb
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.loss_terms import LossTerms
from lowrank_bdl.surfaces.evaluation import evaluate_points

WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
CUTS = ([5, 3], [1, 7], [1] * 8)


def data(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    classes = torch.randint(3, (8,), generator=generator)
    tokens = torch.randint(3, (8, 4), generator=generator)
    classes[[1, 4]], tokens[0, 1:], tokens[5] = -100, -100, -100
    return {
        "x": normal(8, 2),
        "classes": classes,
        "tokens": tokens,
        "probabilities": normal(8, 3).softmax(1),
        "numbers": normal(8, 3),
        "positive": normal(8, 3).exp(),
        "signs": normal(8, 3).sign(),
        "labels": torch.randint(3, (8,), generator=generator),
        "sets": (normal(8, 3) > 0).double(),
        "indices": torch.tensor([[0, -1, -1], [1, 2, -1], [2, -1, -1], [0, 1, -1]] * 2),
    }


CROSS_ENTROPIES: list[tuple[str, Any]] = [
    (targets, partial(F.cross_entropy, weight=weight, ignore_index=ignored, label_smoothing=smoothing))
    for targets in ("classes", "tokens")
    for weight in (None, WEIGHT)
    for ignored in (-100,)
    for smoothing in (0.0, 0.3)
]
LOSSES: list[tuple[str, Any]] = [
    *CROSS_ENTROPIES,
    ("classes", nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)),
    ("probabilities", nn.CrossEntropyLoss(WEIGHT)),
    ("tokens", nn.NLLLoss(WEIGHT)),
    ("classes", F.nll_loss),
    ("numbers", nn.MSELoss()),
    ("numbers", F.l1_loss),
    ("numbers", nn.SmoothL1Loss(beta=0.3)),
    ("numbers", partial(F.huber_loss, delta=0.5)),
    ("sets", nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT)),
    ("sets", nn.SoftMarginLoss()),
    ("positive", nn.PoissonNLLLoss()),
    ("positive", partial(F.gaussian_nll_loss, var=0.5)),
    ("signs", nn.HingeEmbeddingLoss()),
    ("probabilities", nn.KLDivLoss(reduction="mean")),
    ("probabilities", nn.KLDivLoss(reduction="batchmean")),
    ("labels", nn.MultiMarginLoss(weight=WEIGHT)),
    ("sets", nn.MultiLabelSoftMarginLoss(WEIGHT)),
    ("indices", nn.MultiLabelMarginLoss()),
]
IDS = [f"{number}-{name}" for number, (name, _) in enumerate(LOSSES)]


class Tokens(nn.Linear):
    """Logits ``(N, 3, 4)`` of four tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, 3, 4)


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return (Tokens(2, 12) if name == "tokens" else nn.Sequential(nn.Linear(2, 3), nn.Tanh())).double()


def dense_hessian(net: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    layout = lb.ParameterLayout.from_module(net)

    def value(theta: Tensor) -> Tensor:
        return loss_fn(torch.func.functional_call(net, layout.unflatten(theta), (x,)), y)

    return torch.autograd.functional.hessian(value, layout.flatten(net))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize(("name", "loss_fn"), LOSSES, ids=IDS)
def test_every_loss_of_torch_is_its_mean_over_all_data(name: str, loss_fn: Any) -> None:
    net, found = network(name), data()
    x, y = found["x"], found[name]
    layout = lb.ParameterLayout.from_module(net)
    theta = layout.flatten(net)
    twice = name not in ("labels", "indices")  # torch has no second derivative of these
    expected, value = dense_hessian(net, loss_fn, x, y) if twice else None, loss_fn(net(x), y).item()
    subspace = lb.Subspace(layout, theta, torch.eye(len(theta), dtype=torch.float64))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(net(x), y), list(net.parameters()))])
    kept = (y != -100).flatten(1).any(1).sum() if y.ndim > 1 else (y != -100).sum()
    for sizes in ([8], *CUTS):
        batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        if twice:
            hessian = lb.HessianLinearOperator(net, loss_fn, batches).to_dense()
            torch.testing.assert_close(hessian, expected, rtol=1e-9, atol=1e-11)
        log_joint = lb.LogJoint(subspace, net, None, batches, loss_fn=loss_fn)
        z = torch.zeros(len(theta), dtype=torch.float64, requires_grad=True)
        log_likelihood = log_joint.log_likelihood(z)
        assert log_likelihood.item() == pytest.approx(-value * float(kept), rel=1e-10)
        (slope,) = torch.autograd.grad(log_likelihood, z)
        torch.testing.assert_close(slope, -gradient * kept, rtol=1e-9, atol=1e-11)
        points = evaluate_points(net, theta[None], batches, loss_fn, accuracy=False, progress=False)
        assert points.loss.item() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(("name", "loss_fn"), CROSS_ENTROPIES)
def test_gauss_newton_matrices_of_any_batches(name: str, loss_fn: Any) -> None:
    net, found = Tokens(2, 12).double() if name == "tokens" else nn.Linear(2, 3).double(), data()
    x, y = found["x"], found[name]
    expected = dense_hessian(net, loss_fn, x, y)  # the network is linear
    for sizes in CUTS:
        batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        torch.testing.assert_close(lb.GGNLinearOperator(net, loss_fn, batches).to_dense(), expected)


@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("name", ["classes", "tokens"])
def test_ignored_targets_are_not_wrong(name: str, ignored: int) -> None:
    net, found = network(name), data()
    x, y = found["x"], torch.where(found[name] == -100, ignored, found[name])
    right, kept = (net(x).argmax(1) == y)[y != ignored], y != ignored
    theta = lb.ParameterLayout.from_module(net).flatten(net)
    loss_fn = nn.CrossEntropyLoss(ignore_index=ignored)
    for sizes in ([8], *CUTS):
        batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        points = evaluate_points(net, theta[None], batches, loss_fn, progress=False)
        assert points.accuracy is not None and kept.sum() == len(right)
        assert points.accuracy.item() == pytest.approx(right.double().mean().item())


def padded_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=-100)


def test_an_unknown_mean_is_refused_or_named() -> None:
    net, found = network("tokens"), data()
    x, y = found["x"], found["tokens"]
    batches = list(zip(x.split([5, 3]), y.split([5, 3]), strict=True))
    with pytest.raises(ShapeError, match="pass num_terms="):
        lb.HessianLinearOperator(net, padded_mean, batches)

    def count(outputs: Tensor, targets: Tensor) -> Tensor:
        return (targets != -100).sum()

    expected = dense_hessian(net, padded_mean, x, y)
    torch.testing.assert_close(
        lb.HessianLinearOperator(net, padded_mean, batches, num_terms=count).to_dense(), expected
    )
    theta = lb.ParameterLayout.from_module(net).flatten(net)
    points = evaluate_points(net, theta[None], batches, padded_mean, num_terms=count, progress=False)
    assert points.loss.item() == pytest.approx(padded_mean(net(x), y).item())


def test_a_sum_of_torch_is_taken_as_a_sum() -> None:
    net, found = network("numbers"), data()
    x, y = found["x"], found["numbers"]
    batches = list(zip(x.split([5, 3]), y.split([5, 3]), strict=True))
    expected = dense_hessian(net, partial(F.mse_loss, reduction="sum"), x, y) / 8
    for loss_fn in (nn.MSELoss(reduction="sum"), partial(F.mse_loss, reduction="sum")):
        torch.testing.assert_close(lb.HessianLinearOperator(net, loss_fn, batches).to_dense(), expected)


def test_num_terms_must_be_a_function() -> None:
    with pytest.raises(TypeError, match="num_terms must be a function"):
        LossTerms(F.mse_loss, num_terms=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("ignored", [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3, 5]])
def test_a_half_without_terms_shows_an_unknown_mean(ignored):
    """Its mean is NaN, no more than a wrong one to be passed over; with the right number of terms it is no error."""
    torch.manual_seed(0)
    net = nn.Linear(3, 4).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 4
    y[ignored] = -100
    cut = [(x[:8], y[:8]), (x[8:], y[8:])]

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets)

    with pytest.raises(ShapeError, match="pass num_terms="):
        lb.HessianLinearOperator(net, loss_fn, cut)
    found = lb.HessianLinearOperator(net, loss_fn, cut, num_terms=lambda outputs, targets: (targets >= 0).sum())
    expected = lb.HessianLinearOperator(net, nn.CrossEntropyLoss(), (x, y))
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-12)
