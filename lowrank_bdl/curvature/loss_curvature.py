"""What curvature matrices of a loss function have in common; the Fisher matrix has a likelihood instead."""

import torch
from torch import Tensor, nn

from lowrank_bdl.curvature.curvature_operator import CurvatureLinearOperator
from lowrank_bdl.curvature.loss_gradients import BatchNormMode, check_modes
from lowrank_bdl.parameters.batches import CallFn, Data, TargetFn
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.loss_terms import LossFn, LossTerms, NumTerms, Reduction
from lowrank_bdl.parameters.selection import Selector


class LossCurvatureLinearOperator(CurvatureLinearOperator):
    """A curvature matrix of the mean of ``loss_fn(outputs, targets)`` over a data set; see `HessianLinearOperator`."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Data,
        *,
        layout: ParameterLayout | None = None,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        reduction: Reduction = "mean",
        bn_mode: BatchNormMode = "eval",
        check: bool = True,
        chunk_size: int | None = None,
        call_fn: CallFn | None = None,
        target_fn: TargetFn | None = None,
        num_terms: NumTerms | None = None,
    ) -> None:
        check_modes(reduction, bn_mode)
        super().__init__(
            model,
            data,
            layout=layout,
            include=include,
            exclude=exclude,
            bn_mode=bn_mode,
            chunk_size=chunk_size,
            call_fn=call_fn,
            target_fn=target_fn,
        )
        self._terms = LossTerms(loss_fn, reduction, num_terms)
        self._unchecked = check
        if check:
            self._run_check()

    def _loss(self, outputs: object, targets: Tensor) -> Tensor:
        """Return the sum of a batch's terms, and keep their number."""
        if self._unchecked and len(targets) > 1:
            self._unchecked = False
            with torch.no_grad():
                self._terms.check(outputs, targets)
        self._num_terms = self._terms.number(outputs, targets)
        return self._terms.total(outputs, targets)
