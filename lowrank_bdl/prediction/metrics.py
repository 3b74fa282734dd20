"""How good probabilities are: accuracy, proper scores, calibration, detection of foreign inputs.

Sums are in float64. Every metric of probabilities takes ``(..., C)`` with the classes last and targets ``(...)``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import to_float64
from lowrank_bdl.linalg.precision import exact


@exact
def checked_probabilities(probs: Tensor) -> Tensor:
    """Refuse what are no probabilities.

    Args:
        probs: Class probabilities, shape ``(..., C)``, at least one row; sums may be off by rounding.

    Returns:
        The same as ``(N, C)`` in float64.

    Raises:
        ShapeError: If there is no row, or one is negative or does not sum to 1.
        NonFiniteError: If a probability is NaN or infinite.
    """
    if probs.ndim < 2 or probs.numel() == 0:
        raise ShapeError(f"probs must have shape (..., C) with the classes last; got {tuple(probs.shape)}.")
    p = to_float64(probs.detach()).flatten(0, -2)
    if not bool(p.isfinite().all()):
        raise NonFiniteError("probs must be finite; got NaN or infinite values.")
    rounding = 4 * torch.finfo(probs.dtype).eps * p.shape[1] ** 0.5 + 1e-6
    error = max((p.sum(1) - 1).abs().max().item(), -p.min().item())
    if error > rounding:
        raise ShapeError(f"probs must be >= 0 and sum to 1 over the last axis; off by {error:.1e} (are they logits?).")
    return p


@exact
def checked_targets(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse what are no probabilities or not the classes of as many examples.

    Args:
        probs: Class probabilities, shape ``(..., C)``.
        targets: Class indices, shape ``(...)``.

    Returns:
        Probabilities ``(N, C)`` in float64 and class indices ``(N,)`` in int64.

    Raises:
        ShapeError: If shapes or classes do not fit, or rows are not probabilities.
        NonFiniteError: If a probability is NaN or infinite.
    """
    if probs.ndim < 2 or targets.shape != probs.shape[:-1] or targets.numel() == 0:
        raise ShapeError(
            "probs must have shape (..., C) with the classes last and targets (...), at least one of them; "
            f"got {tuple(probs.shape)} and {tuple(targets.shape)}."
        )
    if targets.is_floating_point():
        raise ShapeError(f"targets must be integer class indices; got {targets.dtype}.")
    p = checked_probabilities(probs)
    classes = targets.to(p.device).flatten().long()
    if not bool(((classes >= 0) & (classes < p.shape[1])).all()):
        low, high = classes.min().item(), classes.max().item()
        raise ShapeError(f"targets must be in [0, {p.shape[1]}); got values from {low} to {high}.")
    return p, classes


@exact
def accuracy(probs: Tensor, targets: Tensor) -> float:
    """Fraction of examples whose most probable class is the target.

    Args:
        probs: Class probabilities, shape ``(..., C)``.
        targets: Class indices, shape ``(...)``.

    Returns:
        A number in [0, 1].

    Raises:
        ShapeError: If shapes or classes do not fit, or rows are not probabilities.
        NonFiniteError: If a probability is NaN or infinite.

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
        0.5
    """
    p, classes = checked_targets(probs, targets)
    return (p.argmax(1) == classes).double().mean().item()


@exact
def nll(probs: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood, −mean log p(target) [nats].

    Probabilities that underflowed to 0 give infinity; :attr:`Predictive.nll` works from log-likelihoods instead.

    Args:
        probs: Class probabilities, shape ``(..., C)``.
        targets: Class indices, shape ``(...)``.

    Returns:
        A number >= 0, possibly infinite.

    Raises:
        ShapeError: If shapes or classes do not fit, or rows are not probabilities.
        NonFiniteError: If a probability is NaN or infinite.

    Example:
        >>> round(nll(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)
        0.6931
    """
    p, classes = checked_targets(probs, targets)
    return -p.gather(1, classes.unsqueeze(1)).log().mean().item()


@exact
def brier(probs: Tensor, targets: Tensor) -> float:
    r"""Brier score, the mean of :math:`\sum_c (p_c - 1[c = y])^2`, between 0 and 2.

    Args:
        probs: Class probabilities, shape ``(..., C)``.
        targets: Class indices, shape ``(...)``.

    Returns:
        A number in [0, 2]; two classes give twice what the one-sided definition gives.

    Raises:
        ShapeError: If shapes or classes do not fit, or rows are not probabilities.
        NonFiniteError: If a probability is NaN or infinite.

    Source: Brier, "Verification of forecasts expressed in terms of probability" (1950), eq. 2.

    Example:
        >>> brier(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        0.5
    """
    p, classes = checked_targets(probs, targets)
    hit = p.gather(1, classes.unsqueeze(1)).squeeze(1)
    return (p.square().sum(1) - 2 * hit + 1).mean().item()


@dataclass(frozen=True)
class ReliabilityCurve:
    """Confidence against accuracy in bins of confidence.

    Attributes:
        confidence: Mean confidence in each bin, ``(num_bins,)`` float64, NaN where a bin is empty.
        accuracy: Fraction that is right in each bin, likewise.
        count: Number of examples in each bin, ``(num_bins,)`` int64; sums to N.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def ece(self) -> float:
        """Mean over examples of their bin's |accuracy − confidence|, in [0, 1]."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return (gap * self.count).sum().item() / int(self.count.sum())


@exact
def reliability_curve(probs: Tensor, targets: Tensor, num_bins: int = 15, binning: str = "width") -> ReliabilityCurve:
    """Compare the confidence (largest probability) with how often it is right.

    Every example is in exactly one bin, also those with confidence 0 or 1 and ties.

    Args:
        probs: Class probabilities, shape ``(..., C)``.
        targets: Class indices, shape ``(...)``.
        num_bins: Number of bins, >= 1.
        binning: ``"width"``: bin b covers [b/B, (b+1)/B), the last one includes 1. ``"mass"``: bins of N/B examples in
            order of confidence; equal confidences are never parted, so that the order of the examples cannot matter,
            and bins are unequal, or empty, where there are many.

    Returns:
        The curve.

    Raises:
        ShapeError: If shapes or classes do not fit, or rows are not probabilities.
        NonFiniteError: If a probability is NaN or infinite.
        ValueError: If ``num_bins`` < 1 or ``binning`` is unknown.

    Cost: O(N C + N log N).

    Example:
        >>> curve = reliability_curve(torch.tensor([[0.96, 0.04], [0.0, 1.0]]), torch.tensor([0, 0]), num_bins=10)
        >>> curve.count.tolist()[-1], curve.accuracy[-1].item(), round(curve.ece, 4)
        (2, 0.5, 0.48)
    """
    p, classes = checked_targets(probs, targets)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1; got {num_bins}.")
    confidence, predicted = p.max(1)
    if binning == "width":
        inner = torch.linspace(0, 1, num_bins + 1, dtype=p.dtype, device=p.device)[1:-1]
        index = torch.bucketize(confidence, inner, right=True)
    elif binning == "mass":
        lowest_rank = torch.searchsorted(confidence.sort().values, confidence)  # shared by equal confidences
        index = lowest_rank * num_bins // len(confidence)
    else:
        raise ValueError(f"binning must be 'width' or 'mass'; got {binning!r}.")
    count = torch.bincount(index, minlength=num_bins)
    right = (predicted == classes).to(p.dtype)
    total = torch.zeros(2, num_bins, dtype=p.dtype, device=p.device)
    total.index_add_(1, index, torch.stack([confidence, right]))
    return ReliabilityCurve(total[0] / count, total[1] / count, count)


@exact
def ece(probs: Tensor, targets: Tensor, num_bins: int = 15, binning: str = "width") -> float:
    r"""Expected calibration error, :math:`\sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|`.

    Args:
        probs: Class probabilities, shape ``(..., C)``.
        targets: Class indices, shape ``(...)``.
        num_bins: Number of bins.
        binning: ``"width"`` or ``"mass"``, see :func:`reliability_curve`.

    Returns:
        A number in [0, 1].

    Raises:
        ShapeError: If shapes or classes do not fit, or rows are not probabilities.
        NonFiniteError: If a probability is NaN or infinite.
        ValueError: If ``num_bins`` < 1 or ``binning`` is unknown.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), eq. 3.

    Example:
        >>> round(ece(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1])), 6)
        0.0
    """
    return reliability_curve(probs, targets, num_bins, binning).ece


def _checked_scores(
    negatives: Tensor, positives: Tensor, names: tuple[str, str] = ("negatives", "positives")
) -> tuple[Tensor, Tensor]:
    scores = []
    for name, tensor in zip(names, (negatives, positives), strict=True):
        flat = to_float64(tensor.detach()).flatten()
        if flat.numel() == 0:
            raise ShapeError(f"{name} must hold at least one score; got none.")
        if bool(flat.isnan().any()):
            raise NonFiniteError(f"{name} must not hold NaN.")
        scores.append(flat)
    return scores[0], scores[1]


@exact
def auroc(negatives: Tensor, positives: Tensor) -> float:
    r"""Area under the ROC curve, :math:`P(s^- < s^+) + \tfrac12 P(s^- = s^+)`, exactly.

    For the detection of foreign inputs, ``negatives`` are the scores (entropies, say) of familiar examples and
    ``positives`` those of foreign ones. Counted from ranks, so any increasing map of the scores leaves it unchanged;
    torchmetrics would send scores beyond [0, 1] through a sigmoid, which makes large ones equal.

    Args:
        negatives: Scores of the examples that should score low, any shape.
        positives: Scores of those that should score high, any shape.

    Returns:
        A number in [0, 1]; 0.5 for scores that say nothing.

    Raises:
        ShapeError: If one of them is empty.
        NonFiniteError: If a score is NaN.

    Cost: O(N log N).

    Source: Mann and Whitney, "On a test of whether one of two random variables is stochastically larger than the
    other" (1947); Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic (ROC)
    curve" (1982).

    Example:
        >>> auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.3]))
        0.875
    """
    low, high = _checked_scores(negatives, positives)
    low = low.sort().values
    below = torch.searchsorted(low, high)
    not_above = torch.searchsorted(low, high, right=True)
    return int((below + not_above).sum()) / (2 * len(low) * len(high))


@exact
def false_positive_rate(negatives: Tensor, positives: Tensor, true_positive_rate: float = 0.95) -> float:
    """Fraction of negatives at or above the threshold that catches the wanted fraction of positives (FPR@95).

    Args:
        negatives: Scores of the examples that should score low, any shape.
        positives: Scores of those that should score high, any shape.
        true_positive_rate: Least fraction of positives to catch, in (0, 1].

    Returns:
        A number in [0, 1].

    Raises:
        ShapeError: If one of them is empty.
        NonFiniteError: If a score is NaN.
        ValueError: If the rate is outside (0, 1].

    Example:
        >>> false_positive_rate(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.5, 0.9]), true_positive_rate=1.0)
        0.3333333333333333
    """
    low, high = _checked_scores(negatives, positives)
    if not 0 < true_positive_rate <= 1:
        raise ValueError(f"true_positive_rate must be in (0, 1]; got {true_positive_rate}.")
    rank = math.ceil(true_positive_rate * len(high) * (1 - 1e-12))  # 0.07 * 100 is a little more than 7
    threshold = high.sort(descending=True).values[rank - 1]
    return (low >= threshold).double().mean().item()


@exact
def average_precision(negatives: Tensor, positives: Tensor) -> float:
    r"""Area under the precision-recall curve as a step function (AUPR), :math:`\sum_n (R_n - R_{n-1}) P_n`.

    The thresholds n are the distinct scores from above, so equal scores are accepted together and the order of the
    examples cannot matter. This equals the mean over the positives of the precision at their own score. Unlike the
    AUROC it depends on the proportion of positives, which is its value for scores that say nothing.

    Args:
        negatives: Scores of the examples that should score low, any shape.
        positives: Scores of those that should score high, any shape.

    Returns:
        A number in (0, 1].

    Raises:
        ShapeError: If one of them is empty.
        NonFiniteError: If a score is NaN.

    Cost: O(N log N).

    Source: Davis and Goadrich, "The relationship between precision-recall and ROC curves" (2006), on why not to
    interpolate linearly.

    Example:
        >>> average_precision(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.3]))
        0.8333333333333333
    """
    low, high = _checked_scores(negatives, positives)
    low, high = low.sort().values, high.sort().values
    false = len(low) - torch.searchsorted(low, high)  # accepted at the positive's own score
    true = len(high) - torch.searchsorted(high, high)
    return (true / (true + false).double()).mean().item()


@exact
def histogram_divergence(
    first: Tensor, second: Tensor, *, edges: Tensor | None = None, smoothing: float = 1e-7
) -> float:
    r"""Symmetric KL divergence of two histograms, :math:`KL(h_1 \| h_2) + KL(h_2 \| h_1)` [nats].

    Made for predictive entropies of familiar and of foreign examples: the larger, the better they are told apart. Each
    histogram is of counts plus ``smoothing``, normalised. Where one has an empty bin and the other has not, the value
    grows without limit as the smoothing shrinks, so compare values of one smoothing only, and read the AUROC beside it.

    Args:
        first: Values of one set, any shape; entropies [nats] with the default edges.
        second: Values of the other set, any shape.
        edges: Edges of the bins, increasing, shape ``(B + 1,)``. None takes the published ones, 30 edges evenly spaced
            in the logarithm from 1e-8 to 10^0.5. Bin b covers [edge b, edge b + 1); values below the first edge count
            in the first bin and those from the last edge up in the last (the published code dropped both).
        smoothing: Number > 0 added to every count; the published value is 1e-7.

    Returns:
        A number >= 0.

    Raises:
        ShapeError: If a set is empty, or the edges are not increasing with at least 2 bins.
        NonFiniteError: If a value is NaN.
        ValueError: If the smoothing is not > 0.

    Cost: O(N log B).

    Source: Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning" (2019), section 5.3 and the
    notebook that came with it.

    Example:
        >>> round(histogram_divergence(torch.tensor([0.1, 1.0]), torch.tensor([1.0, 1.0])), 2)
        8.41
        >>> histogram_divergence(torch.tensor([0.1, 1.0]), torch.tensor([1.0, 0.1]))
        0.0
    """
    if not 0 < smoothing < math.inf:
        raise ValueError(f"smoothing must be > 0 and finite; got {smoothing}.")
    values = _checked_scores(first, second, names=("first", "second"))
    if edges is None:
        edges = torch.logspace(-8, 0.5, 30, dtype=torch.float64)
    if edges.ndim != 1 or len(edges) < 3 or not bool((edges.diff() > 0).all()):
        raise ShapeError(f"edges must be at least 3 increasing numbers; got shape {tuple(edges.shape)}.")
    inner = edges[1:-1].to(values[0]).contiguous()
    counts = [torch.bincount(torch.bucketize(v, inner, right=True), minlength=len(edges) - 1) for v in values]
    one, other = ((count + smoothing) / (count + smoothing).sum() for count in (c.double() for c in counts))
    return ((one - other) * (one.log() - other.log())).sum().item()
