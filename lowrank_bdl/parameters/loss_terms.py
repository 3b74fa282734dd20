"""A loss as a sum of terms and their number, so that a mean over a data set does not depend on its batches.

The mean of a batch is a sum over a denominator, which need not be the number of targets: class weights, an
``ignore_index`` and padding change it. Means over several batches add sums and denominators, and divide once.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.precision import callers_precision
from lowrank_bdl.parameters.likelihoods import examples_with_any

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
Reduction: TypeAlias = Literal["mean", "sum"]
NumTerms: TypeAlias = Callable[[Any, Any], "Tensor | float"]

_CLASS_LOSSES: tuple[Any, ...] = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
_ELEMENT_LOSSES: tuple[Any, ...] = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss),
    *(nn.SoftMarginLoss, nn.KLDivLoss, nn.HingeEmbeddingLoss),
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.gaussian_nll_loss, F.soft_margin_loss, F.kl_div),
    F.hinge_embedding_loss,
)
_ROW_LOSSES: tuple[Any, ...] = (
    *(nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss),
    *(F.multi_margin_loss, F.multilabel_margin_loss, F.multilabel_soft_margin_loss),
)
_WEIGHTED_MEANS: tuple[Any, ...] = (F.mse_loss, F.l1_loss, F.huber_loss)
"""Losses whose ``weight`` is in the denominator too."""


def scalar_loss(loss_fn: LossFn, outputs: Any, targets: Tensor, reduction: Reduction) -> Tensor:
    """Return ``loss_fn(outputs, targets)``; raises ShapeError unless it takes such outputs and gives a scalar."""
    try:
        with callers_precision():
            loss = loss_fn(outputs, targets)
    except (TypeError, AttributeError) as error:
        if isinstance(outputs, Tensor):
            raise
        raise ShapeError(
            f"loss_fn must take what the network returns; got {type(outputs).__name__}. "
            "Pass call_fn to pick the tensor."
        ) from error
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        form = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ShapeError(f"loss_fn must return a scalar tensor, the {reduction} over the batch; got {form}.")
    return loss


class LossTerms:
    """What a loss sums up over a batch, and what its mean divides by.

    The losses of torch (modules, functions, and ``functools.partial`` of a function) say themselves: a mean of
    ``cross_entropy`` divides by the summed weights of the targets that are not ignored, of ``mse_loss`` by the number
    of entries. A torch loss that was made with ``reduction="sum"`` is taken as a sum. Every other loss is taken as a
    mean over ``num_terms(outputs, targets)`` terms, by default the number of examples.

    Args:
        loss_fn: ``loss_fn(outputs, targets)`` gives a scalar.
        reduction: Whether that is the mean or the sum over a batch. A sum has as many terms as there are examples,
            unless ``num_terms`` says otherwise.
        num_terms: ``num_terms(outputs, targets)`` gives the denominator: a number, or a tensor without axes.

    Attributes:
        ignore_index: The class that the loss leaves out; None where it is not known to leave one out.

    Example:
        >>> terms = LossTerms(nn.CrossEntropyLoss(ignore_index=0))
        >>> outputs, targets = torch.zeros(3, 2), torch.tensor([0, 1, 1])
        >>> terms.total(outputs, targets), terms.number(outputs, targets)  # 2 log 2
        (tensor(1.3863), tensor(2))
    """

    def __init__(self, loss_fn: LossFn, reduction: Reduction = "mean", num_terms: NumTerms | None = None) -> None:
        if num_terms is not None and not callable(num_terms):
            raise TypeError(f"num_terms must be a function of outputs and targets; got {type(num_terms).__name__}.")
        self._loss_fn, self._reduction, self._num_terms = loss_fn, reduction, num_terms
        self._kind, settings = _torch_loss(loss_fn)
        self.ignore_index: int | None = settings.get("ignore_index", -100) if self._kind in _CLASS_LOSSES else None
        self._weight: Tensor | None = settings.get("weight")
        if settings.get("reduction") == "sum":
            self._reduction = "sum"
        self._sum_fn: LossFn | None = None
        if self._kind is not None and self._reduction == "mean" and num_terms is None:
            if settings.get("reduction") not in ("mean", "batchmean"):
                self._kind = None
            elif isinstance(loss_fn, nn.Module):
                summed: Any = copy.copy(loss_fn)
                summed.reduction = "sum"
                self._sum_fn = summed
            else:
                summed_fn: Callable[..., Any] = loss_fn
                self._sum_fn = partial(summed_fn, reduction="sum")
            self._per_row = settings.get("reduction") == "batchmean"

    def total(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the sum of the terms of a batch, a scalar that can be differentiated.

        Raises:
            ShapeError: If the loss is no scalar.
        """
        # a sum in half precision could overflow where its mean does not
        if self._sum_fn is not None and not (isinstance(outputs, Tensor) and outputs.dtype == torch.float16):
            return scalar_loss(self._sum_fn, outputs, targets, self._reduction)
        loss = scalar_loss(self._loss_fn, outputs, targets, self._reduction)
        if self._reduction == "sum":
            return loss
        wide = loss.to(torch.promote_types(loss.dtype, torch.float32))
        return wide * self.number(outputs, targets)

    def number(self, outputs: Any, targets: Tensor) -> "Tensor | float":
        """Return the number of terms of a batch: a number, or a tensor without axes; nothing waits for a device."""
        if self._num_terms is not None:
            return self._num_terms(outputs, targets)
        known = self.number_by_targets(targets)
        if known is not None or not isinstance(outputs, Tensor):
            return len(targets) if known is None else known
        if self._kind in _CLASS_LOSSES:  # of probabilities: positions count alike, whatever the weights
            return targets.numel() // outputs.shape[1 if outputs.ndim > 1 else 0]
        if self._per_row:
            return len(outputs)
        if self._kind in _ROW_LOSSES:
            return int(outputs.shape[:-1].numel())
        shape = torch.broadcast_shapes(outputs.shape, targets.shape)
        if self._weight is not None and self._kind in _WEIGHTED_MEANS:
            total: Tensor = self._weight.expand(shape).sum()
            return total
        return int(shape.numel())

    def number_by_targets(self, targets: Tensor) -> "Tensor | float | None":
        """Return the number of terms of a batch where its targets tell it without the outputs, else None."""
        if self._num_terms is not None:
            return None
        if self._sum_fn is None:
            return len(targets)
        known = self._kind in _CLASS_LOSSES and not targets.is_floating_point()
        return self._number_of_classes(targets) if known else None

    def examples(self, targets: Tensor) -> "Tensor | int":
        """Return how many examples of a batch have a target that is not ignored."""
        if self.ignore_index is None or targets.is_floating_point():
            return len(targets)
        return examples_with_any(self._kept(targets))

    def _kept(self, targets: Tensor) -> Tensor:
        assert self.ignore_index is not None
        return torch.ne(targets, self.ignore_index)

    def _number_of_classes(self, targets: Tensor) -> Tensor:
        kept = self._kept(targets)
        if self._weight is None:
            return kept.sum()
        return (self._weight[torch.where(kept, targets, 0)] * kept).sum()

    def check(self, outputs: Any, targets: Tensor) -> None:
        """Raise unless the number of terms is right, as far as one batch and its two halves show.

        Torch's own losses, and what cannot be cut by rows, are not looked at.

        Args:
            outputs: Of the network; with a row for each target.
            targets: Likewise.

        Raises:
            ShapeError: If the loss of the batch is not the mean of its halves' by their numbers of terms.

        Cost: three evaluations of the loss; three host synchronisations, six with ``num_terms``.
        """
        count = len(targets)
        if self._sum_fn is not None or count < 2 or not isinstance(outputs, Tensor):
            return
        if outputs.ndim == 0 or len(outputs) != count:
            return
        middle = (count + 1) // 2
        halves = [(outputs[:middle], targets[:middle]), (outputs[middle:], targets[middle:])]
        totals = []
        for part in [(outputs, targets), *halves]:
            known = self._num_terms is not None or self._reduction == "sum"
            nothing = known and float(self.number(*part)) == 0  # whose mean is NaN, rightly
            totals.append(0.0 if nothing else float(self.total(*part)))
        error, size = abs(totals[0] - totals[1] - totals[2]), max(map(abs, totals))
        # a half without terms has a mean of NaN, which shows that the number is not that of its examples
        if not error <= torch.finfo(outputs.dtype).eps ** 0.5 * size and math.isfinite(totals[0]):
            means = "" if self._reduction == "sum" else " times its number of terms (num_terms=, else of examples)"
            raise ShapeError(
                f"the loss of a batch{means} must be the sum of its halves': expected {totals[1] + totals[2]:.6g}, got "
                f"{totals[0]:.6g}. A mean over something else than examples (class weights, ignored targets, padding) "
                "does that: pass num_terms=lambda outputs, targets: ..., what the mean divides by; or check=False."
            )


def _torch_loss(loss_fn: Any) -> tuple[Any, dict[str, Any]]:
    """Return which of torch's losses a function is, and its settings; None for others."""
    known = (*_CLASS_LOSSES, *_ELEMENT_LOSSES, *_ROW_LOSSES)
    if isinstance(loss_fn, nn.Module):
        if type(loss_fn) not in known or loss_fn._forward_hooks or loss_fn._forward_pre_hooks:
            return None, {}
        names = ("reduction", "weight", "ignore_index")
        return type(loss_fn), {name: getattr(loss_fn, name) for name in names if hasattr(loss_fn, name)}
    settings: dict[str, Any] = {"reduction": "mean"}
    if isinstance(loss_fn, partial):
        if loss_fn.args:
            return None, {}
        settings.update(loss_fn.keywords)
        loss_fn = loss_fn.func
    if settings.get("size_average") is not None or settings.get("reduce") is not None:
        return None, {}
    return (loss_fn, settings) if any(loss_fn is one for one in known) else (None, {})
