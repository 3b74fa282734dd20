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
from lowrank_bdl.linalg.devices import norm_in_float64

OutputProduct: TypeAlias = Callable[[Tensor], Tensor | None]


class GaussNewtonLinearOperator(CurvatureLinearOperator):
    r"""A matrix :math:`\frac1N \sum_n J_n^\top M_n J_n` with :math:`J_n = \partial f_\theta(x_n) / \partial \theta`.

    Subclasses say what :math:`M_n` is, a matrix of the size of the output.

    J times one vector is taken by forward-mode differentiation where that gives the matrix of reverse mode, as the
    first such product finds out: ``no_grad`` blocks, ``Embedding(padding_idx=...)``, hooks on gradients and functions
    with a backward pass of their own (straight-through estimators) are seen by reverse mode alone, which is what
    training follows.
    """

    _forward_mode: bool | None = None  # None until it is known

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
                except RuntimeError:  # an operation without such a derivative
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

    def _products(self, rows: Tensor) -> Tensor:
        if len(rows) != 1 or self._forward_mode is not None:
            return super()._products(rows)
        # a vector of its own: whoever multiplies by a unit vector sees one parameter
        probe = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
        results = super()._products(torch.cat([rows, probe]))
        self._product_again(probe, results[1])
        return results[:1]

    def _product_again(self, probe: Tensor, first: Tensor) -> Tensor:
        self._forward_mode = True
        again = super()._products(probe)[0]
        norms = [norm_in_float64(v) for v in (again - first, first)]
        # false alarms cost time alone, so that the bound can be near rounding; a zero product shows nothing
        if self._forward_mode and not bool(norms[0] < self._rounding() ** (2 / 3) * norms[1]):
            self._forward_mode = False
            return super()._products(probe)[0]
        return again

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
