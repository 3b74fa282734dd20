"""What curvature matrices of a loss function have in common; the Fisher matrix has a likelihood instead."""

from torch import Tensor, nn

from lowrank_bdl.curvature.curvature_operator import CurvatureLinearOperator
from lowrank_bdl.curvature.loss_gradients import BatchNormMode, LossFn, Reduction, check_modes, scalar_loss
from lowrank_bdl.parameters.batches import CallFn, Data, TargetFn
from lowrank_bdl.parameters.layout import ParameterLayout
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
        self._loss_fn = loss_fn
        self._reduction: Reduction = reduction
        if check:
            self._run_check()

    def _batch_factor(self, size: int) -> float:
        return float(size) if self._reduction == "mean" else 1.0

    def _loss(self, outputs: object, targets: Tensor) -> Tensor:
        return scalar_loss(self._loss_fn, outputs, targets, self._reduction)
