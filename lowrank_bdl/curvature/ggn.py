"""Generalised Gauss-Newton matrices: a network's Jacobian around a small matrix an example, as linear operators."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowrank_bdl.curvature.curvature_operator import CurvatureLinearOperator, Product, Vectors
from lowrank_bdl.curvature.loss_curvature import LossCurvatureLinearOperator
from lowrank_bdl.errors import ShapeError

OutputProduct: TypeAlias = Callable[[Tensor], Tensor | None]


class GaussNewtonLinearOperator(CurvatureLinearOperator):
    r"""A matrix :math:`\frac1N \sum_n J_n^\top M_n J_n` with :math:`J_n = \partial f_\theta(x_n) / \partial \theta`.

    Subclasses say what :math:`M_n` is, a matrix of the size of the output.
    """

    _forward_mode = True

    @abstractmethod
    def _output_product(self, outputs: Tensor, targets: Tensor, generator: torch.Generator | None) -> OutputProduct:
        """Return the map from c vectors ``(c, *outputs.shape)`` to their products with M; None is zero."""

    def _linearize(
        self, weights: dict[str, Tensor], inputs: Any, targets: Tensor, generator: torch.Generator | None
    ) -> Product:
        outputs = self._outputs(weights, inputs, targets)
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            form = str(outputs.dtype) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ShapeError(f"The network's output must be one floating-point tensor; got {form}.")
        if not outputs.requires_grad:
            raise ShapeError(f"The output must depend on the {len(weights)} parameters given; it does not.")
        middle = self._output_product(outputs.detach(), targets, generator)
        leaves = list(weights.values())
        transposed: list[tuple[Tensor, Sequence[Tensor | None]]] = []

        def push(vectors: Sequence[Tensor]) -> Tensor | None:
            if self._forward_mode and len(vectors[0]) == 1:
                try:
                    return self._push_forward(weights, vectors, inputs, targets)
                except (RuntimeError, NotImplementedError):  # an operation without such a derivative
                    self._forward_mode = False
            if not transposed:
                point = torch.zeros_like(outputs, requires_grad=True)  # J'u is linear in u: its derivative is J'
                graph = torch.autograd.grad(outputs, leaves, point, create_graph=True, allow_unused=True)
                transposed.append((point, graph))
            dual, pulled = transposed[0]
            return self._backward(pulled, [dual], vectors)[0]

        def product(vectors: Sequence[Tensor]) -> Vectors:
            moved = push(vectors)
            bent = None if moved is None else middle(moved)
            return [None] * len(leaves) if bent is None else self._backward([outputs], leaves, [bent])

        return product

    @torch.no_grad()
    def _push_forward(
        self, weights: dict[str, Tensor], vectors: Sequence[Tensor], inputs: Any, targets: Tensor
    ) -> Tensor | None:
        """Return J times one vector by forward-mode differentiation: half the other way's time for convolutions."""
        with forward_ad.dual_level():
            pairs = zip(weights.items(), vectors, strict=True)
            duals = {name: forward_ad.make_dual(weight.detach(), vector[0]) for (name, weight), vector in pairs}
            tangent = forward_ad.unpack_dual(self._outputs(duals, inputs, targets)).tangent
        return None if tangent is None else tangent.unsqueeze(0)


class GGNLinearOperator(GaussNewtonLinearOperator, LossCurvatureLinearOperator):
    r"""The generalised Gauss-Newton matrix :math:`G = \frac1N \sum_n J_n^\top \nabla_f^2 \ell(f_n, y_n) J_n`.

    It is the Hessian of the loss with the network replaced by its tangent at the weights, and positive semi-definite
    where the loss is convex in the outputs f (cross-entropy, squared error). With a loss that is a negative
    log-likelihood of an exponential family in its natural parameters it equals the expected Fisher matrix.

    Arguments, attributes, errors and what can be done with the operator are those of `HessianLinearOperator`; the
    network's output must be one tensor.

    Cost: a pass over the data for each product or block: a forward pass, and for each vector a forward pass with
    tangents (two forward passes) and a backward pass.

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation
    14 (2002).

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> G = GGNLinearOperator(net, nn.functional.mse_loss, (x, y))
        >>> G.to_dense()
        tensor([[1., 0.],
                [0., 4.]])
    """

    def _output_product(self, outputs: Tensor, targets: Tensor, generator: torch.Generator | None) -> OutputProduct:
        leaf = outputs.requires_grad_()
        loss = self._loss(leaf, targets)
        if not loss.requires_grad:
            raise ShapeError("The loss must depend on the network's output; it does not.")
        slopes = torch.autograd.grad(loss, leaf, create_graph=True)
        return lambda vectors: self._backward(slopes, [leaf], [vectors])[0]
