r"""Kronecker factors of the Fisher matrix of one layer (K-FAC), summed over a data set.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (ICML 2015); for
convolutions Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers" (ICML
2016); for any other weight sharing this is the "expand" rule of Eschenhagen et al., "Kronecker-Factored
Approximate Curvature for Modern Neural Network Architectures" (NeurIPS 2023).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.curvature.layers import Layer, LayerCall, layer_gradients, layer_inputs
from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.eigen import eigh_psd
from lowrank_bdl.linalg.memory import require_memory
from lowrank_bdl.linalg.precision import exact_methods

_NUMBERS_AT_ONCE = 2**25
"""Unfolded inputs that exist at one time; a convolution's are kernel size times as many as its inputs."""


def example_chunks(batch_size: int, numbers_per_example: int) -> Iterator[slice]:
    """Yield slices of a batch that hold a bounded count of numbers each.

    Args:
        batch_size: Number of examples.
        numbers_per_example: What one of them needs.

    Yields:
        Slices that cover the batch in order.
    """
    size = max(1, _NUMBERS_AT_ONCE // max(1, numbers_per_example))
    yield from (slice(start, start + size) for start in range(0, batch_size, size))


@dataclass(frozen=True)
class KroneckerCurvature:
    r"""The curvature :math:`G \otimes A` of one layer by the eigendecompositions of its factors, all float64.

    Attributes:
        layer: The layer.
        left_values: Eigenvalues of G >= 0, shape ``(groups, o)``.
        left_vectors: Its eigenvectors in columns, shape ``(groups, o, o)``.
        right_values: Eigenvalues of A >= 0, shape ``(groups, m)``, a bias being the last of the m inputs.
        right_vectors: Its eigenvectors in columns, shape ``(groups, m, m)``.
    """

    layer: Layer
    left_values: Tensor
    left_vectors: Tensor
    right_values: Tensor
    right_vectors: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        """Of the curvature, shape ``(groups, o, m)``; a new tensor."""
        return self.left_values.unsqueeze(-1) * self.right_values.unsqueeze(-2)


@exact_methods
class KroneckerFactors:
    r"""Sum the factors of :math:`N \, E[a a^\top] \otimes E[g g^\top] = (\sum a a^\top) \otimes (\sum g g^\top) / R`.

    The sums run over all R positions of all examples, a 1 being appended to a if the layer has a bias. For a fully
    connected layer R = N. Products are taken in the network's dtype (at least float32), sums in float64.

    Args:
        layer: A layer that multiplies by a matrix, its weight in the layout.

    Raises:
        MemoryLimitError: If the factors do not fit the free memory.

    Cost: groups·(o² + m²) float64 numbers, three times that while they are decomposed.
    """

    def __init__(self, layer: Layer) -> None:
        weight = layer.module.get_parameter("weight")
        self.layer = layer
        self.has_bias = layer.bias is not None
        out, inner = layer.shape[0] // layer.groups, layer.shape[1:].numel() + int(self.has_bias)
        require_memory(
            24 * layer.groups * (out**2 + inner**2), weight.device, f"the Kronecker factors of layer {layer.name!r}"
        )
        self.gradient_sums = torch.zeros((layer.groups, out, out), dtype=torch.float64, device=weight.device)
        self.input_sums = torch.zeros((layer.groups, inner, inner), dtype=torch.float64, device=weight.device)
        self.count = 0

    def add_inputs(self, calls: Sequence[LayerCall]) -> None:
        """Add what entered the layer in one batch.

        Args:
            calls: All of its calls in the forward pass.

        Raises:
            ShapeError: If an input has been overwritten since.
        """
        size = self.input_sums.shape[-1] - int(self.has_bias)
        for call in calls:
            call.check(self.layer)
            positions = call.output.numel() // (len(call.output) * self.layer.groups * self.gradient_sums.shape[-1])
            for part in example_chunks(len(call.inputs), self.layer.groups * size * positions):
                rows = _merged(layer_inputs(self.layer, call.inputs[part]))
                self.input_sums[:, :size, :size] += rows @ rows.mT
                if self.has_bias:
                    totals = rows.sum(-1, dtype=torch.float64)
                    self.input_sums[:, :size, -1] += totals
                    self.input_sums[:, -1, :size] += totals
                    self.input_sums[:, -1, -1] += rows.shape[-1]
                self.count += rows.shape[-1]

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add the gradients with respect to the layer's outputs in one batch; once for each vector of scores.

        Args:
            gradients: One for each call.
        """
        for gradient in gradients:
            rows = _merged(layer_gradients(self.layer, gradient))
            self.gradient_sums += rows @ rows.mT

    def add_output_fisher(self, total: Tensor) -> None:
        """Add the gradients of one batch, where the layer's output is the network's.

        Args:
            total: Sum of E[s s'] over examples and positions, shape ``(o, o)``.
        """
        self.gradient_sums += total

    def decompose(self) -> KroneckerCurvature:
        """Return the eigendecompositions, negative eigenvalues (rounding) set to zero.

        Raises:
            NonFiniteError: If a sum is not finite.
            ShapeError: If the layer was never called.

        Cost: O(groups·(o³ + m³)).
        """
        if not self.count:
            raise ShapeError(f"Layer {self.layer.name!r} must be called in the forward pass; it never was. Exclude it.")
        if not bool(self.gradient_sums.isfinite().all() & self.input_sums.isfinite().all()):
            raise NonFiniteError(f"Layer {self.layer.name!r} must have finite inputs and gradients; got others.")
        return KroneckerCurvature(self.layer, *eigh_psd(self.gradient_sums / self.count), *eigh_psd(self.input_sums))


def _merged(rows: Tensor) -> Tensor:
    """Return ``(B, groups, n, T)`` as ``(groups, n, B T)``."""
    return rows.permute(1, 2, 0, 3).flatten(2)
