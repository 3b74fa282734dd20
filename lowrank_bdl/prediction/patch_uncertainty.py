"""Whether the parts of an image that are predicted badly are also the uncertain ones."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowrank_bdl.errors import LowRankBDLError, ShapeError
from lowrank_bdl.prediction import metrics
from lowrank_bdl.prediction.dense_metrics import chosen_positions


@dataclass(frozen=True)
class UncertaintyCurve:
    """Accuracy of patches against a threshold on their uncertainty; see :class:`PatchUncertainty`.

    Attributes:
        thresholds: ``(T,)`` float64, in [0, 1].
        accurate_if_certain: p(accurate | certain) at each threshold, ``(T,)``; NaN where no patch is certain.
        uncertain_if_inaccurate: p(uncertain | inaccurate), ``(T,)``; NaN where no patch is inaccurate.
        pavpu: Patch accuracy versus patch uncertainty: the fraction of patches that are accurate and certain, or
            inaccurate and uncertain, ``(T,)``.
    """

    thresholds: Tensor
    accurate_if_certain: Tensor
    uncertain_if_inaccurate: Tensor
    pavpu: Tensor


class PatchUncertainty:
    r"""Whether patches of an image that are predicted badly are also the uncertain ones.

    An image is cut into squares. A square is accurate if more than half of its labelled pixels are right, and uncertain
    if the mean over them of the entropy, as a fraction of log C, is above a threshold. Squares without a labelled pixel
    count nowhere; those at the border may be cut off.

    Args:
        num_classes: C >= 2.
        patch_size: Side of a square [pixels], >= 1.
        num_thresholds: Thresholds from 0 to 1, evenly spaced, >= 2.
        ignore_index: Target of pixels to leave out; None leaves none out.

    Raises:
        ValueError: If a number is out of range.

    Cost: O(pixels · C) a batch.

    Source: Mukhoti and Gal, "Evaluating Bayesian Deep Learning Methods for Semantic Segmentation" (2018), section 3;
    there the thresholds are fractions of the range of entropies that was found, which differs from method to method.

    Example:
        >>> probs = torch.tensor([0.5, 0.5]).expand(1, 2, 2, 2).clone()
        >>> probs[:, :, 0] = torch.tensor([1.0, 0.0])  # sure and right on the left, in doubt and wrong on the right
        >>> found = PatchUncertainty(2, patch_size=1, num_thresholds=3)
        >>> found.update(probs, torch.tensor([[[0, 1], [0, 1]]]))
        >>> found.curve.pavpu.tolist(), found.curve.accurate_if_certain.tolist()
        ([1.0, 1.0, 0.5], [1.0, 1.0, 0.5])
    """

    def __init__(
        self, num_classes: int, *, patch_size: int = 4, num_thresholds: int = 21, ignore_index: int | None = None
    ) -> None:
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("patch_size", patch_size, 1),
            ("num_thresholds", num_thresholds, 2),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}.")
        self.num_classes, self.patch_size, self.ignore_index = num_classes, patch_size, ignore_index
        self.thresholds = torch.linspace(0, 1, num_thresholds, dtype=torch.float64)
        # inaccurate and accurate patches by the number of thresholds that they are above
        self._count = torch.zeros(2, num_thresholds + 1, dtype=torch.int64)

    def update(self, probs: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            probs: Class probabilities ``(N, H, W, C)``.
            targets: Class indices ``(N, H, W)``, or ``ignore_index``.

        Raises:
            ShapeError: If shapes or classes do not fit, or rows are no probabilities.
            NonFiniteError: If a probability is NaN or infinite.
        """
        if probs.ndim != 4:
            raise ShapeError(f"probs must have shape (N, H, W, C); got {tuple(probs.shape)}.")
        p, classes, labelled = chosen_positions(probs, targets, self.ignore_index, self.num_classes)
        if len(classes) == 0:
            return
        p, classes = metrics.checked_targets(p, classes)
        right, doubt = (torch.zeros(targets.shape, dtype=torch.float64, device=probs.device) for _ in range(2))
        right[labelled] = (p.argmax(-1) == classes).double()
        doubt[labelled] = torch.special.entr(p.clamp(min=0)).sum(-1) / math.log(self.num_classes)
        sums = torch.stack([labelled.double(), right, doubt], 1)
        pool = functional.avg_pool2d(sums, self.patch_size, ceil_mode=True, count_include_pad=False, divisor_override=1)
        size, right, doubt = pool.movedim(1, 0).flatten(1)
        used = size > 0
        accurate = right[used] > size[used] / 2
        above = torch.searchsorted(self.thresholds.to(doubt.device), (doubt[used] / size[used]).clamp(max=1.0))
        index = accurate * self._count.shape[1] + above
        counts = torch.bincount(index, minlength=self._count.numel()).view_as(self._count)
        self._count = self._count.to(counts.device) + counts

    @property
    def num_patches(self) -> int:
        """Patches counted."""
        return int(self._count.sum())

    @property
    def curve(self) -> UncertaintyCurve:
        """The three fractions at every threshold.

        Raises:
            LowRankBDLError: Before the first patch.
        """
        if self.num_patches == 0:
            raise LowRankBDLError("There is no patch with a target yet; call update(probs, targets) first.")
        certain = self._count.cumsum(1)[:, :-1]  # not above threshold t
        uncertain = self._count.sum(1, keepdim=True) - certain
        return UncertaintyCurve(
            self.thresholds.to(certain.device),
            certain[1] / certain.sum(0).double(),
            uncertain[0] / self._count[0].sum().double(),
            (certain[1] + uncertain[0]) / self._count.sum().double(),
        )
