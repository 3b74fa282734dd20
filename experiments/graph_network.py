"""A graph convolutional network of torch_geometric that classifies nodes; importing this imports torch_geometric."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch_geometric.nn import GCNConv
from torch_geometric.nn.models import GCN

from experiments.graph_data import Graph

NORMS = {"none": None, "batch": "BatchNorm", "layer": "LayerNorm"}


class SymmetricProduct(torch.autograd.Function):
    """A sparse symmetric matrix times a dense one, whose gradient needs no transpose (torch sorts all entries for it).

    Source: the gradient of A X is Aᵀ G = A G.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, dense: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor]:
        return None, ctx.matrix @ outer


class SymmetricGCNConv(GCNConv):
    """Kipf and Welling's convolution on a symmetric adjacency that is normalised already."""

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Tensor:
        return SymmetricProduct.apply(adj_t, x)


class _Layers(GCN):
    def init_conv(self, in_channels: Any, out_channels: int, **options: Any) -> GCNConv:
        return SymmetricGCNConv(in_channels, out_channels, normalize=False, **options)


class NodeClassifier(nn.Module):
    """Convolutions on graphs, with dropout before each: ``model(graph)`` gives logits, a row a (selected) node.

    Args:
        num_features: Of a node.
        num_classes: Of a node.
        hidden: Width of the layers between.
        layers: Convolutions, at least 2.
        rate: Of dropout.
        norm: A key of `NORMS`.

    Source: Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks" (2017).
    """

    def __init__(self, num_features: int, num_classes: int, hidden: int, layers: int, rate: float, norm: str) -> None:
        super().__init__()
        self.rate = rate
        self.network = _Layers(num_features, hidden, layers, num_classes, dropout=rate, norm=NORMS[norm])

    def forward(self, graph: Graph) -> Tensor:
        logits: Tensor = self.network(self._thinned(graph.x), graph.adj_t)
        return logits[graph.selected] if "selected" in graph else logits

    def _thinned(self, x: Tensor) -> Tensor:
        """Drop features at random in training; of sparse ones the zeros need no random number."""
        if not x.is_sparse:
            return x  # one-hot: without its one a node says nothing
        values = dropout(x.values(), self.rate, self.training)
        return torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True, check_invariants=False)
