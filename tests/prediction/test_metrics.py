import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.prediction import metrics


def problem(n=200, classes=4, seed=0, sharpness=2.0, dtype=torch.float64):
    rand = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, classes, generator=rand, dtype=torch.float64)
    targets = torch.multinomial((0.5 * logits).softmax(1), 1, generator=rand).squeeze(1)
    return logits.softmax(1).to(dtype), targets


def test_accuracy_nll_and_brier_by_hand():
    probs, targets = problem()
    rows = list(zip(probs.tolist(), targets.tolist(), strict=True))
    assert metrics.accuracy(probs, targets) == sum(p.index(max(p)) == y for p, y in rows) / 200
    assert metrics.nll(probs, targets) == pytest.approx(-sum(math.log(p[y]) for p, y in rows) / 200, rel=1e-12)
    expected = sum(sum((q - (c == y)) ** 2 for c, q in enumerate(p)) for p, y in rows) / 200
    assert metrics.brier(probs, targets) == pytest.approx(expected, rel=1e-12)


def test_nll_and_brier_agree_with_sklearn():
    probs, targets = problem(classes=2)
    assert metrics.nll(probs, targets) == pytest.approx(log_loss(targets, probs), rel=1e-12)
    assert metrics.brier(probs, targets) == pytest.approx(2 * brier_score_loss(targets, probs[:, 1]), rel=1e-12)


def test_extremes():
    sure = torch.eye(3)
    assert metrics.nll(sure, torch.arange(3)) == 0
    assert metrics.brier(sure, torch.arange(3)) == 0
    assert metrics.brier(sure, torch.tensor([1, 2, 0])) == 2
    assert metrics.nll(sure, torch.tensor([1, 1, 2])) == math.inf


def test_dense_predictions_count_every_position():
    probs, targets = problem(24)
    dense, where = probs.view(2, 3, 4, 4), targets.view(2, 3, 4)
    for metric in (metrics.accuracy, metrics.nll, metrics.brier, metrics.ece):
        assert metric(dense, where) == metric(probs, targets)


def curve_by_hand(probs, targets, num_bins):
    """Equal-width bins [b/B, (b+1)/B), the last one closed, as lists."""
    bins = [[] for _ in range(num_bins)]
    for p, y in zip(probs.tolist(), targets.tolist(), strict=True):
        b = sum(max(p) >= k / num_bins for k in range(1, num_bins))
        bins[b].append((max(p), p.index(max(p)) == y))
    return bins


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_reliability_curve_by_hand(num_bins):
    probs, targets = problem()
    curve = metrics.reliability_curve(probs, targets, num_bins)
    bins = curve_by_hand(probs, targets, num_bins)
    assert curve.count.tolist() == [len(b) for b in bins]
    total = 0.0
    for b, confidence, right in zip(bins, curve.confidence.tolist(), curve.accuracy.tolist(), strict=True):
        if not b:
            assert math.isnan(confidence) and math.isnan(right)
            continue
        assert confidence == pytest.approx(sum(c for c, _ in b) / len(b), rel=1e-12)
        assert right == pytest.approx(sum(r for _, r in b) / len(b), rel=1e-12)
        total += abs(right - confidence) * len(b) / 200
    assert curve.ece == metrics.ece(probs, targets, num_bins) == pytest.approx(total, rel=1e-12)
    assert total > 0.05  # the problem is over-confident, so that an error of 0 would show


@pytest.mark.parametrize("num_bins", [5, 20])
def test_equal_width_ece_agrees_with_torchmetrics(num_bins):
    probs, targets = problem(dtype=torch.float64)
    expected = multiclass_calibration_error(probs, targets, num_classes=4, n_bins=num_bins, norm="l1")
    assert metrics.ece(probs, targets, num_bins) == pytest.approx(expected.item(), rel=1e-6)  # it sums in float32


def test_sure_predictions_are_counted():
    probs = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5)  # every confidence is exactly 1
    targets = torch.zeros(10, dtype=torch.long)
    for binning in ("width", "mass"):
        curve = metrics.reliability_curve(probs, targets, 4, binning)
        assert curve.count.sum() == 10 and curve.count.max() == 10
        assert curve.ece == 0.5


@settings(max_examples=50)
@given(seed=st.integers(0, 2**31), num_bins=st.integers(1, 12), binning=st.sampled_from(["width", "mass"]))
def test_closed_intervals_lose_no_example(seed, num_bins, binning):
    """Confidences on every edge there is, 1 included, many of them tied: counts and sums are those of all examples."""
    rand = torch.Generator().manual_seed(seed)
    steps = torch.randint(num_bins + 1, (80,), generator=rand)
    confidence = torch.maximum(steps, num_bins - steps).double() / num_bins
    probs, targets = torch.stack([confidence, 1 - confidence], 1), torch.randint(2, (80,), generator=rand)
    curve = metrics.reliability_curve(probs, targets, num_bins, binning)
    filled = curve.count > 0
    assert curve.count.sum() == 80 and len(curve.count) == num_bins
    total = (curve.confidence * curve.count)[filled].sum().item()
    assert total == pytest.approx(confidence.sum().item(), rel=1e-12)
    hits = (curve.accuracy * curve.count)[filled].sum().item()
    assert hits == pytest.approx((probs.argmax(1) == targets).sum().item(), rel=1e-12)
    tied = [curve.confidence[i].item() for i in range(num_bins) if curve.count[i] > 0]
    assert tied == sorted(set(tied))  # equal confidences share a bin


def test_a_confidence_on_an_edge_is_in_the_bin_above():
    probs = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [0.7, 0.3]])
    assert metrics.reliability_curve(probs, torch.zeros(4).long(), 4).count.tolist() == [0, 0, 2, 2]


def test_equal_mass_bins_hold_equally_many():
    probs, targets = problem(203)
    curve = metrics.reliability_curve(probs, targets, 20, "mass")
    assert curve.count.sum() == 203 and set(curve.count.tolist()) == {10, 11}
    assert (curve.confidence.diff() > 0).all()
    order = probs.max(1).values.argsort()
    first = order[: curve.count[0]]
    right = (probs.argmax(1) == targets)[first].double().mean()
    torch.testing.assert_close(curve.accuracy[0], right, rtol=1e-12, atol=0)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**31), levels=st.integers(1, 6), binning=st.sampled_from(["width", "mass"]))
def test_order_of_examples_does_not_matter_with_ties(seed, levels, binning):
    rand = torch.Generator().manual_seed(seed)
    confidence = 0.5 + 0.5 * torch.randint(levels + 1, (60,), generator=rand) / levels
    probs, targets = torch.stack([confidence, 1 - confidence], 1), torch.randint(2, (60,), generator=rand)
    perm = torch.randperm(60, generator=rand)
    one = metrics.reliability_curve(probs, targets, 8, binning)
    two = metrics.reliability_curve(probs[perm], targets[perm], 8, binning)
    assert torch.equal(one.count, two.count) and one.count.sum() == 60
    torch.testing.assert_close(one.accuracy, two.accuracy, rtol=1e-12, atol=0, equal_nan=True)


def test_auroc_is_the_fraction_of_ordered_pairs():
    rand = torch.Generator().manual_seed(0)
    low = torch.randint(8, (40,), generator=rand).double()  # many ties
    high = torch.randint(3, 12, (30,), generator=rand).double()
    pairs = [(b > a) + 0.5 * (b == a) for a in low.tolist() for b in high.tolist()]
    assert metrics.auroc(low, high) == pytest.approx(sum(pairs) / 1200, rel=1e-15)
    assert metrics.auroc(high, low) == pytest.approx(1 - sum(pairs) / 1200, rel=1e-15)
    labels = torch.cat([torch.zeros(40), torch.ones(30)])
    assert metrics.auroc(low, high) == pytest.approx(roc_auc_score(labels, torch.cat([low, high])), rel=1e-12)
    scores = torch.cat([low, high]) / 20  # torchmetrics takes scores in [0, 1] as they are
    assert metrics.auroc(low, high) == pytest.approx(binary_auroc(scores, labels.long()).item(), rel=1e-6)


def test_auroc_keeps_large_scores_apart():
    low, high = torch.full((5,), 100.0), torch.full((5,), 101.0)
    assert metrics.auroc(low, high) == 1.0
    scores, labels = torch.cat([low, high]), torch.tensor([0] * 5 + [1] * 5)
    assert binary_auroc(scores, labels).item() == 0.5  # through a sigmoid, which is why ours is our own
    assert metrics.auroc(torch.tensor([-math.inf, 0.0]), torch.tensor([math.inf, 0.0])) == 0.875


@pytest.mark.parametrize("rate", [0.07, 0.5, 0.95, 1.0])
def test_false_positive_rate_by_hand(rate):
    rand = torch.Generator().manual_seed(0)
    low, high = torch.randn(200, generator=rand), 1 + torch.randn(100, generator=rand)
    fpr, tpr, _ = roc_curve([0] * 200 + [1] * 100, torch.cat([low, high]), drop_intermediate=False)
    expected = min(f for f, t in zip(fpr, tpr, strict=True) if t >= rate - 1e-9)
    assert metrics.false_positive_rate(low, high, rate) == pytest.approx(expected, rel=1e-12)


def average_precision_by_hand(low, high):
    """Sum over the distinct scores from above of the gain in recall times the precision there."""
    total, recall = 0.0, 0.0
    for threshold in sorted({*low, *high}, reverse=True):
        true, false = sum(s >= threshold for s in high), sum(s >= threshold for s in low)
        total += (true / len(high) - recall) * true / (true + false)
        recall = true / len(high)
    return total


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), levels=st.integers(1, 30), sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_average_precision_agrees_with_sklearn_and_by_hand_with_ties(seed, levels, sizes):
    rand = torch.Generator().manual_seed(seed)
    low = torch.randint(levels, (sizes[0],), generator=rand).double()
    high = torch.randint(1, levels + 1, (sizes[1],), generator=rand).double()
    found = metrics.average_precision(low, high)
    labels = [0] * len(low) + [1] * len(high)
    assert found == pytest.approx(average_precision_score(labels, torch.cat([low, high])), rel=1e-12)
    assert found == pytest.approx(average_precision_by_hand(low.tolist(), high.tolist()), rel=1e-12)
    shuffled = (low[torch.randperm(len(low), generator=rand)], high[torch.randperm(len(high), generator=rand)])
    assert metrics.average_precision(*shuffled) == found


def test_average_precision_of_extremes():
    low, high = torch.zeros(30), torch.ones(10)
    assert metrics.average_precision(low, high) == 1.0
    assert metrics.average_precision(high, high) == 0.5  # nothing is said: the proportion of positives
    assert metrics.average_precision(low, torch.zeros(10)) == 0.25
    inverted = metrics.average_precision(torch.full((4,), math.inf), torch.tensor([-math.inf, 0.0]))
    assert inverted == pytest.approx((1 / 5 + 2 / 6) / 2, rel=1e-15)


def divergence_by_hand(first, second, edges, smoothing):
    """KL(p || q) + KL(q || p) of histograms of counts plus smoothing, as scipy gives it."""
    p, q = (np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] + smoothing for v in (first, second))
    return entropy(p / p.sum(), q / q.sum()) + entropy(q / q.sum(), p / p.sum())


@pytest.mark.parametrize("smoothing", [1e-30, 1e-7, 1e-1])
def test_histogram_divergence_is_the_published_one_with_no_value_lost(smoothing):
    rand = np.random.default_rng(0)
    inside, outside = 10 ** rand.normal(-3, 2.5, 500), 10 ** rand.normal(-0.5, 0.6, 300)
    edges = np.logspace(-8, 0.5, 30)
    assert (inside < edges[0]).any() and (outside > edges[-1]).any()
    found = metrics.histogram_divergence(torch.tensor(inside), torch.tensor(outside), smoothing=smoothing)
    assert found == pytest.approx(divergence_by_hand(inside, outside, edges, smoothing), rel=1e-9)
    swapped = metrics.histogram_divergence(torch.tensor(outside), torch.tensor(inside), smoothing=smoothing)
    assert swapped == pytest.approx(found, rel=1e-12)


def test_histogram_divergence_on_edges_of_ones_own():
    edges = torch.tensor([0.0, 1.0, 2.0, 3.0])
    # 1.0 is in [1, 2); 3.0 and 9.0 in the last bin, -1.0 in the first
    first, second = torch.tensor([-1.0, 0.0, 1.0, 3.0]), torch.tensor([0.5, 1.5, 1.9, 9.0])
    expected = 2 * (1 / 4) * math.log(2)  # (2, 1, 1) against (1, 2, 1)
    assert metrics.histogram_divergence(first, second, edges=edges) == pytest.approx(expected, abs=1e-7)
    disjoint = [
        metrics.histogram_divergence(torch.zeros(4), torch.full((4,), 2.5), edges=edges, smoothing=smoothing)
        for smoothing in (1e-3, 1e-6)
    ]
    assert disjoint[1] - disjoint[0] == pytest.approx(2 * math.log(1e3), rel=1e-3)  # as the docstring warns


def test_histogram_divergence_refuses_bad_input():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="smoothing must be > 0 and finite; got 0"):
        metrics.histogram_divergence(x, x, smoothing=0)
    with pytest.raises(ShapeError, match="second must hold at least one score"):
        metrics.histogram_divergence(x, x[:0])
    with pytest.raises(NonFiniteError, match="first must not hold NaN"):
        metrics.histogram_divergence(x * torch.nan, x)
    for edges in (torch.ones(3), torch.tensor([0.0, 1.0]), torch.ones(2, 2)):
        with pytest.raises(ShapeError, match="edges must be at least 3 increasing numbers; got shape"):
            metrics.histogram_divergence(x, x, edges=edges)


@pytest.mark.parametrize("metric", [metrics.accuracy, metrics.nll, metrics.brier, metrics.ece])
@pytest.mark.parametrize(
    "probs,targets,error,message",
    [
        (torch.eye(2), torch.zeros(3).long(), ShapeError, r"got \(2, 2\) and \(3,\)"),
        (torch.eye(2), torch.zeros(2, 1).long(), ShapeError, r"got \(2, 2\) and \(2, 1\)"),
        (torch.zeros(0, 2), torch.zeros(0).long(), ShapeError, "at least one of them"),
        (torch.eye(2), torch.zeros(2), ShapeError, "integer class indices; got torch.float32"),
        (torch.eye(2), torch.tensor([0, 2]), ShapeError, r"in \[0, 2\); got values from 0 to 2"),
        (torch.eye(2), torch.tensor([0, -100]), ShapeError, r"in \[0, 2\); got values from -100 to 0"),
        (torch.eye(2) * torch.nan, torch.tensor([0, 1]), NonFiniteError, "probs must be finite"),
        (3 * torch.eye(2), torch.tensor([0, 1]), ShapeError, r"off by 2.0e\+00 \(are they logits\?\)"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), ShapeError, "off by 5.0e-01"),
    ],
)
def test_bad_input_is_refused(metric, probs, targets, error, message):
    with pytest.raises(error, match=message):
        metric(probs, targets)


def test_bad_settings_are_refused():
    probs, targets = problem(5)
    with pytest.raises(ValueError, match="num_bins must be at least 1; got 0"):
        metrics.ece(probs, targets, 0)
    with pytest.raises(ValueError, match="'width' or 'mass'; got 'quantile'"):
        metrics.ece(probs, targets, binning="quantile")
    with pytest.raises(ShapeError, match="negatives must hold at least one score"):
        metrics.auroc(torch.zeros(0), torch.zeros(1))
    with pytest.raises(NonFiniteError, match="positives must not hold NaN"):
        metrics.auroc(torch.zeros(1), torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]; got 0"):
        metrics.false_positive_rate(torch.zeros(1), torch.zeros(1), 0)


def test_half_precision_probabilities_pass_the_check():
    probs, targets = problem(classes=100)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert metrics.accuracy(probs.to(dtype), targets) == pytest.approx(metrics.accuracy(probs, targets), abs=0.02)
