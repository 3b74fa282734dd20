"""How good the predictions for every position of an image are, summed up batch by batch.

A few hundred images have tens of millions of pixels: no probability is kept, only counts.
"""

import torch
from torch import Tensor

from lowrank_bdl.errors import LowRankBDLError, ShapeError
from lowrank_bdl.linalg.devices import to_float64
from lowrank_bdl.prediction import metrics
from lowrank_bdl.prediction.metrics import ReliabilityCurve


class DenseMetrics:
    """Accuracy, intersection over union, NLL, Brier score and calibration of dense predictions, over many images.

    Positions whose target is ``ignore_index`` count nowhere. Sums are exact integers or float64, so that the result
    does not depend on how the images are put into batches (up to rounding in float64).

    The classes are on the last axis of what :func:`~lowrank_bdl.prediction.predict.predict_batches` gives and on the
    second of what a convolutional network gives; say which. (Flattening ``(N, C, H, W)`` to ``(-1, C)`` mixes classes
    with positions while every row may still look like probabilities; a published table of calibration errors was made
    that way.)

    Args:
        num_classes: C >= 2.
        ignore_index: Target of positions to leave out; None leaves none out.
        num_bins: Bins of equal width in the calibration curve.
        class_axis: Axis of the classes in the probabilities.

    Attributes:
        confusion: Positions of each target class (row) by the class predicted (column), ``(C, C)`` int64.

    Raises:
        ValueError: If ``num_classes`` < 2 or ``num_bins`` < 1.

    Cost: O(positions · C) a batch, and memory of a float64 copy of its probabilities.

    Example:
        >>> found = DenseMetrics(2, ignore_index=255)
        >>> found.update(torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]]), torch.tensor([[0, 1, 255]]))
        >>> found.update(torch.tensor([[[0.7, 0.3]]]), torch.tensor([[1]]))
        >>> round(found.accuracy, 4), [round(value, 2) for value in found.iou.tolist()], round(found.mean_iou, 4)
        (0.6667, [0.5, 0.5], 0.5)
    """

    def __init__(
        self, num_classes: int, *, ignore_index: int | None = None, num_bins: int = 15, class_axis: int = -1
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}.")
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1; got {num_bins}.")
        self.num_classes, self.ignore_index, self.class_axis = num_classes, ignore_index, class_axis
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self._bins = torch.zeros(2, num_bins, dtype=torch.float64)  # summed confidence; number of right ones
        self._bin_count = torch.zeros(num_bins, dtype=torch.int64)
        self._nll = self._brier = 0.0

    def update(self, probs: Tensor, targets: Tensor, log_likelihood: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            probs: Class probabilities, ``(N, *positions, C)``, or with the classes where ``class_axis`` says.
            targets: Class indices ``(N, *positions)``, or ``ignore_index``.
            log_likelihood: log p(target) ``(N, *positions)`` [nats], such as ``Predictive.log_likelihood``, whatever it
                is at positions left out; None takes it from ``probs``, where it is −∞ if they underflow.

        Raises:
            ShapeError: If shapes or classes do not fit, or there are no probabilities along the axis of the classes.
                Nothing is counted.
            NonFiniteError: If a probability is NaN or infinite. Nothing is counted.
        """
        p, classes, chosen = chosen_positions(probs, targets, self.ignore_index, self.num_classes, self.class_axis)
        if log_likelihood is not None and log_likelihood.shape != targets.shape:
            raise ShapeError(
                f"log_likelihood must have the shape of the targets, {tuple(targets.shape)}; "
                f"got {tuple(log_likelihood.shape)}."
            )
        if len(classes) == 0:
            return
        curve = metrics.reliability_curve(p, classes, len(self._bin_count))
        if log_likelihood is None:
            nll = metrics.nll(p, classes) * len(classes)
        else:
            nll = -to_float64(log_likelihood[chosen]).sum().item()
        pairs = classes * self.num_classes + p.argmax(-1)
        counts = torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.confusion)
        sums = torch.stack([curve.confidence, curve.accuracy]).nan_to_num(0.0) * curve.count
        place = sums.device  # what was counted before follows the predictions to their device, if that has float64
        self.confusion = self.confusion.to(place) + counts.to(place)
        self._bins = self._bins.to(place) + sums
        self._bin_count = self._bin_count.to(place) + curve.count
        self._nll += nll
        self._brier += metrics.brier(p, classes) * len(classes)

    @property
    def num_positions(self) -> int:
        """Positions counted."""
        return int(self.confusion.sum())

    def _mean(self, total: float) -> float:
        if self.num_positions == 0:
            raise LowRankBDLError("There is no position with a target yet; call update(probs, targets) first.")
        return total / self.num_positions

    @property
    def accuracy(self) -> float:
        """Fraction of positions whose most probable class is the target (global accuracy)."""
        return self._mean(int(self.confusion.trace()))

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a position [nats]."""
        return self._mean(self._nll)

    @property
    def brier(self) -> float:
        """Mean Brier score of a position, in [0, 2]."""
        return self._mean(self._brier)

    @property
    def class_accuracy(self) -> Tensor:
        """Fraction of each class's positions that are found, ``(C,)`` float64; NaN for a class without any."""
        return self.confusion.diagonal() / self.confusion.sum(1).double()

    @property
    def iou(self) -> Tensor:
        r"""Intersection over union of each class, :math:`TP / (TP + FP + FN)`, ``(C,)`` float64.

        NaN for a class that is neither a target nor predicted anywhere: it is nobody's mistake, and no success.
        """
        found = self.confusion.diagonal()
        return found / (self.confusion.sum(0) + self.confusion.sum(1) - found).double()

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that are a target or predicted somewhere; all images pooled."""
        self._mean(0.0)
        return self.iou.nanmean().item()

    @property
    def mean_class_accuracy(self) -> float:
        """Mean over the classes that are a target somewhere."""
        self._mean(0.0)
        return self.class_accuracy.nanmean().item()

    @property
    def reliability(self) -> ReliabilityCurve:
        """Confidence against accuracy in bins of equal width; its ``ece`` is the calibration error of a position."""
        self._mean(0.0)
        confidence, right = self._bins / self._bin_count
        return ReliabilityCurve(confidence, right, self._bin_count.clone())

    @property
    def ece(self) -> float:
        """Expected calibration error of a position, in [0, 1]."""
        return self.reliability.ece


def chosen_positions(
    probs: Tensor, targets: Tensor, ignore_index: int | None, num_classes: int, class_axis: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the classes to the end and leave out the positions that do not count.

    Args:
        probs: Class probabilities.
        targets: Class indices ``(N, *positions)``.
        ignore_index: Target of positions to leave out, or None.
        num_classes: C.
        class_axis: Axis of the classes.

    Returns:
        Probabilities ``(M, C)`` and classes ``(M,)`` of the M positions that count, and where they are, a mask of the
        targets' shape.

    Raises:
        ShapeError: If the shapes do not fit.
    """
    if probs.ndim < 2 or not -probs.ndim <= class_axis < probs.ndim or probs.shape[class_axis] != num_classes:
        raise ShapeError(f"probs must have {num_classes} classes on axis {class_axis}; got shape {tuple(probs.shape)}.")
    moved = probs.detach().movedim(class_axis, -1)
    if targets.shape != moved.shape[:-1] or targets.is_floating_point():
        raise ShapeError(
            f"targets must be integer class indices of shape {tuple(moved.shape[:-1])}; "
            f"got {targets.dtype} of shape {tuple(targets.shape)}."
        )
    chosen = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    return moved[chosen], targets[chosen].long(), chosen
