"""Dense predictions: counts against torchmetrics and by hand, classes that nobody has, the axis of the classes."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassJaccardIndex

from lowrank_bdl.errors import LowRankBDLError, NonFiniteError, ShapeError
from lowrank_bdl.prediction import metrics
from lowrank_bdl.prediction.dense_metrics import DenseMetrics

VOID = 11


def images(generator: torch.Generator, count: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Probabilities (N, H, W, C) in float32, and targets of which about a tenth are void."""
    logits = 2 * torch.randn(count, 7, 9, classes, generator=generator)
    targets = torch.where(
        torch.rand(count, 7, 9, generator=generator) < 0.5,
        logits.argmax(-1),
        torch.randint(classes, (count, 7, 9), generator=generator),
    )
    targets[torch.rand(count, 7, 9, generator=generator) < 0.1] = VOID
    return logits.softmax(-1), targets


def test_agrees_with_torchmetrics_and_does_not_depend_on_the_batches(generator: torch.Generator) -> None:
    probs, targets = images(generator)
    found = DenseMetrics(5, ignore_index=VOID, num_bins=10)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        found.update(probs[part], targets[part])
    flat, valid = probs[targets != VOID], targets[targets != VOID]
    assert found.num_positions == len(valid) < targets.numel()
    expected = {
        "accuracy": MulticlassAccuracy(5, average="micro")(flat, valid),
        "mean_class_accuracy": MulticlassAccuracy(5, average="macro")(flat, valid),
        "mean_iou": MulticlassJaccardIndex(5)(flat, valid),
        "ece": MulticlassCalibrationError(5, n_bins=10)(flat, valid),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value.item(), rel=1e-5), name
    assert found.nll == pytest.approx(metrics.nll(flat, valid), rel=1e-12)
    assert found.brier == pytest.approx(metrics.brier(flat, valid), rel=1e-12)
    curve = metrics.reliability_curve(flat, valid, 10)
    torch.testing.assert_close(found.reliability.confidence, curve.confidence, rtol=1e-12, atol=0, equal_nan=True)
    torch.testing.assert_close(found.reliability.accuracy, curve.accuracy, rtol=1e-12, atol=0, equal_nan=True)
    assert torch.equal(found.reliability.count, curve.count)


def test_a_class_that_nobody_has_is_left_out_of_the_mean() -> None:
    probs = torch.eye(4, dtype=torch.float64)[torch.tensor([[0, 0, 1, 1]])]
    found = DenseMetrics(4)
    found.update(probs, torch.tensor([[0, 0, 1, 2]]))  # class 2 is missed, class 3 is neither there nor predicted
    assert found.iou[:3].tolist() == [1.0, 0.5, 0.0] and math.isnan(found.iou[3])
    assert found.mean_iou == 0.5
    assert found.class_accuracy[:3].tolist() == [1.0, 1.0, 0.0] and math.isnan(found.class_accuracy[3])
    assert found.mean_class_accuracy == pytest.approx(2 / 3)
    assert found.confusion.tolist() == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_calibrated_maps_are_calibrated_whatever_the_axis_of_the_classes(generator: torch.Generator) -> None:
    """Targets drawn from the probabilities: the error is that of chance, and not that of mixed-up axes."""
    probs = (3 * torch.randn(3, 11, 120, 160, generator=generator)).softmax(1)
    drawn = torch.multinomial(probs.movedim(1, -1).reshape(-1, 11), 1, generator=generator).view(3, 120, 160)
    found, last = DenseMetrics(11, class_axis=1), DenseMetrics(11)
    found.update(probs, drawn)
    last.update(probs.movedim(1, -1), drawn)
    # 15 bins of n_b: E|gap| <= sqrt(p (1 - p) / n_b), so the expected ECE is at most sqrt(15 / n) / 2 = 0.0081
    assert found.ece == last.ece < 0.0081
    scrambled = probs.reshape(-1, 11)  # what the published notebook did: rows that mix classes and positions
    confidence, predicted = scrambled.max(-1)
    wrong = DenseMetrics(11)
    normalised = scrambled / scrambled.sum(-1, keepdim=True)
    wrong.update(normalised.view(3, 120, 160, 11), drawn)
    assert wrong.ece > 0.1
    with pytest.raises(ShapeError, match="sum to 1 over the last axis"):
        DenseMetrics(11).update(scrambled.view(3, 120, 160, 11), drawn)
    with pytest.raises(ShapeError, match=r"11 classes on axis -1; got shape \(3, 11, 120, 160\)"):
        DenseMetrics(11).update(probs, drawn)


def test_log_likelihoods_are_taken_where_probabilities_underflow() -> None:
    probs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    targets = torch.tensor([[1, 0]])
    found, own = DenseMetrics(2), DenseMetrics(2)
    found.update(probs, targets, torch.tensor([[-200.0, 0.0]]))
    own.update(probs, targets)
    assert found.nll == 100.0 and own.nll == math.inf
    ignoring = DenseMetrics(2, ignore_index=1)
    ignoring.update(probs, targets, torch.tensor([[math.nan, -3.0]]))  # whatever it is where nothing counts
    assert ignoring.nll == 3.0


def test_refuses_and_counts_nothing_of_what_it_refuses(generator: torch.Generator) -> None:
    probs, targets = images(generator)
    found = DenseMetrics(5, ignore_index=VOID)
    with pytest.raises(LowRankBDLError, match="no position with a target yet"):
        _ = found.mean_iou
    found.update(probs, torch.full_like(targets, VOID))
    assert found.num_positions == 0
    with pytest.raises(ShapeError, match=r"shape \(6, 7, 9\); got torch.int64 of shape \(6, 7\)"):
        found.update(probs, targets[..., 0])
    with pytest.raises(ShapeError, match=r"targets must be in \[0, 5\); got values from 0 to 11"):
        DenseMetrics(5).update(probs, targets)
    with pytest.raises(ShapeError, match=r"log_likelihood must have the shape of the targets"):
        found.update(probs, targets, torch.zeros(6))
    with pytest.raises(NonFiniteError, match="probs must be finite"):
        found.update(torch.full_like(probs, math.nan), targets)
    assert found.num_positions == 0
    for options, message in (({"num_classes": 1}, "num_classes must be at least 2; got 1"), (
        {"num_classes": 2, "num_bins": 0}, "num_bins must be at least 1; got 0"
    )):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            DenseMetrics(**options)


def test_on_every_device(device: torch.device, generator: torch.Generator) -> None:
    probs, targets = images(generator)
    found, expected = DenseMetrics(5, ignore_index=VOID), DenseMetrics(5, ignore_index=VOID)
    found.update(probs.to(device), targets.to(device))
    expected.update(probs, targets)
    assert found.confusion.tolist() == expected.confusion.tolist()
    assert found.ece == pytest.approx(expected.ece, rel=1e-9)
