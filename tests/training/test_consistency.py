"""The consistency loss against its formula written out, in float64; what gets a gradient; whose batch statistics."""

import math

import pytest
import torch
from torch import Tensor, nn

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.training.consistency import UNLABELLED, ConsistencyLoss, labelled_accuracy, sigmoid_rampup

N, C = 5, 3


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()


@pytest.fixture
def views(generator: torch.Generator) -> Tensor:
    return torch.randn(2, N, 4, generator=generator, dtype=torch.float64)


@pytest.fixture
def targets() -> Tensor:
    return torch.tensor([2, UNLABELLED, 0, UNLABELLED, UNLABELLED])


def by_hand(logits: Tensor, goal: Tensor, targets: Tensor, weight: float, kind: str) -> float:
    """The documented sum, example by example and class by class."""
    total = 0.0
    for i in range(N):
        f, g = logits[i].softmax(0).tolist(), goal[i].softmax(0).tolist()
        if targets[i] != UNLABELLED:
            total -= math.log(f[int(targets[i])]) / N
        each = [(a - b) ** 2 if kind == "mse" else b * (math.log(b) - math.log(a)) for a, b in zip(f, g, strict=True)]
        total += weight * sum(each) / (N * C)
    return total


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("mean_teacher", [False, True])
def test_the_loss_is_its_formula(kind: str, mean_teacher: bool, views: Tensor, targets: Tensor) -> None:
    net, teacher = network(0), network(1) if mean_teacher else None
    loss, output = ConsistencyLoss(7.0, teacher, kind)(net, views, targets)
    assert torch.equal(output, net(views[0]))
    expected = by_hand(output, (teacher or net)(views[1]), targets, 7.0, kind)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_what_the_teacher_says_is_a_constant(views: Tensor, targets: Tensor) -> None:
    net, same = network(0), network(0)
    for teacher in (None, same):
        net.zero_grad()
        ConsistencyLoss(3.0, teacher)(net, views, targets)[0].backward()
        found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        goal = same(views[1]).softmax(-1).detach()
        net.zero_grad()
        logits = net(views[0])
        chosen = targets != UNLABELLED
        nll = nn.functional.cross_entropy(logits[chosen], targets[chosen], reduction="sum") / N
        (nll + 3.0 * (logits.softmax(-1) - goal).square().mean()).backward()
        expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert all(p.grad is None for p in same.parameters())


def test_unsure_teachers_are_not_followed(views: Tensor) -> None:
    nothing = torch.full((N,), UNLABELLED)
    net, teacher = network(0), network(1)
    goal = teacher(views[1]).softmax(-1)
    level = goal.amax(-1).sort().values[2:4].mean().item()  # two of the five are surer
    loss, output = ConsistencyLoss(2.0, teacher, confidence=level)(net, views, nothing)
    sure = goal.amax(-1) > level
    assert int(sure.sum()) == 2
    expected = 2.0 * (output.softmax(-1) - goal)[sure].square().sum() / (N * C)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_domains_apart_have_their_own_batch_statistics(views: Tensor, targets: Tensor) -> None:
    net = nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.Linear(4, C)).double()
    loss, output = ConsistencyLoss(5.0, separate=True)(net, views, targets)
    labelled = targets != UNLABELLED

    def logits(x: Tensor) -> Tensor:
        standardised = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        found: Tensor = net[1](standardised)
        return found

    expected = torch.empty_like(output)
    expected[labelled], expected[~labelled] = logits(views[0, labelled]), logits(views[0, ~labelled])
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    nll = nn.functional.cross_entropy(expected[labelled], targets[labelled])
    other = logits(views[1, ~labelled]).softmax(-1)
    consistency = (expected[~labelled].softmax(-1) - other).square().mean()
    assert loss.item() == pytest.approx((nll + 5.0 * consistency).item(), rel=1e-10)
    mixed, _ = ConsistencyLoss(0.0)(net, views, targets)
    assert abs(mixed.item() * N / 2 - nll.item()) > 1e-3  # statistics of the whole batch are others


def test_batches_of_one_kind_alone(views: Tensor) -> None:
    net = network(0)
    classes, nothing = torch.tensor([0, 1, 2, 0, 1]), torch.full((N,), UNLABELLED)
    loss, output = ConsistencyLoss(5.0, separate=True)(net, views, classes)
    assert torch.equal(loss, nn.functional.cross_entropy(output, classes, reduction="sum") / N)
    only = ConsistencyLoss(5.0, separate=True)(net, views, nothing)[0]
    torch.testing.assert_close(only, ConsistencyLoss(5.0)(net, views, nothing)[0], rtol=0, atol=0)


def test_a_weight_that_is_a_function_is_asked_at_every_batch(views: Tensor, targets: Tensor) -> None:
    net, ramp = network(0), iter([0.0, 2.0, -1.0])
    loss = ConsistencyLoss(lambda: next(ramp))
    first, second = (loss(net, views, targets)[0] for _ in range(2))
    assert torch.equal(first, ConsistencyLoss(0.0)(net, views, targets)[0])
    assert torch.equal(second, ConsistencyLoss(2.0)(net, views, targets)[0]) and second > first
    with pytest.raises(ValueError, match="weight must be at least 0 and finite; got -1"):
        loss(net, views, targets)


def test_half_precision_is_judged_in_single_precision(views: Tensor, targets: Tensor) -> None:
    half = views[..., :C].bfloat16()
    loss, output = ConsistencyLoss(1.0)(nn.Identity(), half, targets)
    assert output.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, ConsistencyLoss(1.0)(nn.Identity(), half.float(), targets)[0])


def test_rampup() -> None:
    assert sigmoid_rampup(0, 5) == math.exp(-5) and sigmoid_rampup(5, 5) == sigmoid_rampup(80, 5) == 1.0
    assert sigmoid_rampup(3, 5) == pytest.approx(math.exp(-5 * 0.16), rel=1e-15)
    assert sigmoid_rampup(0, 0) == 1.0


def test_accuracy_is_of_labelled_examples() -> None:
    logits = torch.eye(3)[[0, 1, 2, 0]]
    assert labelled_accuracy(logits, torch.tensor([0, 2, UNLABELLED, UNLABELLED])).item() == 0.5
    assert math.isnan(labelled_accuracy(logits, torch.full((4,), UNLABELLED)).item())


def test_refusals(views: Tensor, targets: Tensor) -> None:
    for arguments, message in (
        (dict(weight=math.inf), "weight must be at least 0 and finite; got inf"),
        (dict(weight=1.0, kind="l1"), "kind must be 'mse' or 'kl'; got 'l1'"),
        (dict(weight=1.0, confidence=1.0), r"confidence must be in \[0, 1\), or None; got 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ConsistencyLoss(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"two views of each example, \(2, 5, \.\.\.\); got \(5, 4\)"):
        ConsistencyLoss(1.0)(network(0), views[0], targets)
    with pytest.raises(ValueError, match="time must be at least 0 and finite; got -1"):
        sigmoid_rampup(-1, 5)
    with pytest.raises(ValueError, match="length must be at least 0 and finite; got nan"):
        sigmoid_rampup(1, math.nan)
