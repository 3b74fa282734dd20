"""The Hessian of a network's loss as a linear operator."""

from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.curvature.curvature_operator import Product
from lowrank_bdl.curvature.loss_curvature import LossCurvatureLinearOperator
from lowrank_bdl.errors import ShapeError


class HessianLinearOperator(LossCurvatureLinearOperator):
    r"""The Hessian of the mean loss, :math:`H = \nabla_\theta^2 \frac1N \sum_n \ell(f_\theta(x_n), y_n)`.

    ``H @ v`` takes vectors ``(D,)`` or blocks ``(D, K)``; a block shares the forward pass and the first backward pass.
    Batches count by their number of examples, however ragged they are. Weight decay is no part of the loss:
    ``H.add_diagonal(...)`` adds it. Dropout is off, and autocast as well.

    Sums, multiples and shifts of operators are operators, and every eigensolver of this library takes one;
    ``to_dense()``, ``diagonal()``, ``eigh()`` and entries ``H[i, j]``, also of these, cost a product a column.

    Args:
        model: The network, not changed. The weights are those it has now.
        loss_fn: ``loss_fn(outputs, targets)`` gives a scalar.
        data: A pair ``(x, y)`` or a mapping with ``labels``, a list of such, or a DataLoader that does not shuffle.
            Every product reads all of it; tensors are moved to the model's device batch by batch.
        layout: Which parameters are the coordinates; None takes those that ``include`` and ``exclude`` keep.
        include: Parameters to take, by name pattern or predicate; all that require a gradient if None.
        exclude: Parameters to leave out of these.
        reduction: Whether ``loss_fn`` gives the ``"mean"`` or the ``"sum"`` over a batch; H is of the mean either way.
        bn_mode: Batch norm by stored statistics (``"eval"``), or by those of the batch (``"train"``, the loss that was
            trained; it depends on how the data are cut into batches). Stored statistics are left as they are.
        check: Whether to see, by three products, that H is the same every time and symmetric.
        chunk_size: How many vectors of a block go through the graph at once; None decides by memory.
        call_fn: ``call_fn(model, batch)`` gives the outputs; None calls ``model(x)``, or
            ``model(**entries).logits`` on a mapping without its targets.
        target_fn: ``target_fn(batch)`` gives the targets; None takes y, or a mapping's ``labels`` or ``targets``.
        num_terms: ``num_terms(outputs, targets)`` gives what the mean of a batch divides by, so that the mean over all
            data does not depend on the batches. None asks torch's own losses (class weights, ``ignore_index``), and
            takes the number of examples for all others, which ``check`` looks at. See `LossTerms`.

    Raises:
        ShapeError: If no parameter is selected, the batches have no targets, or the loss is no scalar or does
            not depend on the parameters.
        ValueError: If an argument is unknown, or the data are shuffled or can be read only once.
        LowRankBDLError: If two passes over the data do not give the same matrix, or it is not symmetric.
        NonFiniteError: If a product is not finite.

    Cost: a pass over the data for each product or block: forward and backward pass, and for each vector about two
    backward passes more; the memory of both passes over one batch, and D numbers a vector.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.zeros(3, 1)
        >>> H = HessianLinearOperator(net, nn.functional.mse_loss, [(x[:2], y[:2]), (x[2:], y[2:])])
        >>> H.to_dense()  # 2 x' x / 3
        tensor([[0.6667, 0.0000],
                [0.0000, 2.6667]])
        >>> (2 * H).add_diagonal(torch.tensor(1.0)) @ torch.ones(2)
        tensor([2.3333, 6.3333])
    """

    def _linearize(
        self, weights: dict[str, Tensor], inputs: Any, targets: Tensor, generator: torch.Generator | None
    ) -> Product:
        loss = self._loss(self._outputs(weights, inputs, targets), targets)
        if not loss.requires_grad:
            raise ShapeError(f"The loss must depend on the {len(weights)} parameters given; it does not.")
        leaves = list(weights.values())
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        return lambda vectors: self._backward(gradients, leaves, vectors)
