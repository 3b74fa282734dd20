"""Graphs whose nodes have classes: citation networks read from files, and stochastic block models made here."""

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from experiments.common import SettingsError

CITATIONS = {"Cora": "cora.npz", "CiteSeer": "citeseer.npz"}
COMMUNITIES = 6  # of a block model, as in the benchmark
KEYS = ("features", "edge_index", "labels", "train_mask", "val_mask", "test_mask")
Graph: TypeAlias = Any  # torch_geometric's Data with a normalised adjacency ``adj_t`` and perhaps ``selected`` nodes


def geometric(part: str) -> Any:
    """Import a part of torch_geometric, a heavy package that graphs alone need.

    Raises:
        SettingsError: Says what to install.
    """
    try:
        return importlib.import_module(f"torch_geometric.{part}")
    except ImportError:
        raise SettingsError(
            "graphs need torch_geometric; install the extra: pip install lowrank-bdl[applications]"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Torch says of compressed sparse matrices that they are new, and that it does not check them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)", category=UserWarning)
        yield


@dataclass(frozen=True)
class GraphSet:
    """Graphs, and the classes of those of their nodes that are asked for.

    Attributes:
        graphs: Of one with ``selected`` nodes only these are predicted.
        targets: Class indices of each graph's (selected) nodes.
    """

    graphs: Sequence[Graph]
    targets: Sequence[Tensor]

    @property
    def labels(self) -> Tensor:
        """All targets, (N,)."""
        return torch.cat(list(self.targets))

    def batches(self, batch_size: int, order: Sequence[int] | None = None) -> "GraphBatches":
        """Return a re-iterable loader of ``(graph, targets)``; several graphs become one whose parts are separate."""
        return GraphBatches(self, batch_size, range(len(self.graphs)) if order is None else order)

    def shuffled(self, batch_size: int) -> "Callable[[torch.Generator], GraphBatches]":
        """Return what makes an epoch's batches, in an order drawn from the generator it is given."""
        return lambda drawn: self.batches(batch_size, torch.randperm(len(self.graphs), generator=drawn).tolist())


@dataclass(frozen=True)
class GraphBatches:
    """See `GraphSet.batches`."""

    source: GraphSet
    batch_size: int
    order: Sequence[int]

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Graph, Tensor]]:
        graphs, targets = self.source.graphs, self.source.targets
        for start in range(0, len(self.order), self.batch_size):
            part = self.order[start : start + self.batch_size]
            if len(part) == 1:
                yield graphs[part[0]], targets[part[0]]
                continue
            with quiet():
                batch = geometric("data").Batch.from_data_list([graphs[i] for i in part])
            yield batch, torch.cat([targets[i] for i in part])


@dataclass(frozen=True)
class GraphData:
    """What a network is trained on and measured with.

    Attributes:
        train: Training nodes.
        held_out: Validation nodes, then test nodes.
        num_validation: How many of these are for validation.
        num_features: Of a node.
        num_classes: Of a node.
        description: For titles and results.
    """

    train: GraphSet
    held_out: GraphSet
    num_validation: int
    num_features: int
    num_classes: int
    description: str

    @property
    def sizes(self) -> dict[str, int]:
        """Labelled nodes of each split."""
        test = len(self.held_out.labels) - self.num_validation
        return {"train": len(self.train.labels), "validation": self.num_validation, "test": test}


def normalized(x: Tensor, edge_index: Tensor) -> Graph:
    r"""Return a graph with :math:`\hat A = D^{-1/2} (A + I) D^{-1/2}`, made once for all layers and epochs.

    Args:
        x: Features of the nodes, (n, p), dense or sparse.
        edge_index: Both directions of every edge, (2, E).
    """
    transforms, data = geometric("transforms"), geometric("data")
    graph = transforms.GCNNorm()(data.Data(edge_index=edge_index, num_nodes=len(x)))
    with quiet():
        graph = transforms.ToSparseTensor(attr="edge_weight", layout=torch.sparse_csr)(graph)
    graph.x = x
    return graph


def citations(name: str, data_path: str | None, device: torch.device) -> GraphData:
    """Read a citation network with its public split; a node's words are scaled to sum to 1.

    Args:
        name: A key of `CITATIONS`.
        data_path: Folder of its file, or the folder above.
        device: Where to.

    Raises:
        SettingsError: If the file is not there or not what it should be.
    """
    if data_path is None:
        raise SettingsError(f"--dataset {name} needs --data_path, the folder of {CITATIONS[name]}")
    paths = [folder / CITATIONS[name] for folder in (Path(data_path), Path(data_path) / "planetoid")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise SettingsError(f"--data_path {data_path}: there is no {CITATIONS[name]}, nor a folder planetoid with it")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: torch.from_numpy(file[key]) for key in KEYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is not a citation network: {error}") from None
    x = found["features"].float()
    x = (x / x.sum(1, keepdim=True).clamp(min=1)).to_sparse_coo().coalesce()
    graph = normalized(x, found["edge_index"].long()).to(device)
    labels = found["labels"].long().to(device)

    def part(*masks: str) -> GraphSet:
        own = graph.clone()
        own.selected = torch.cat([found[mask].nonzero().squeeze(1) for mask in masks]).to(device)
        return GraphSet([own], [labels[own.selected]])

    classes = int(labels.max()) + 1
    train, held_out = part("train_mask"), part("val_mask", "test_mask")
    for split, nodes in (("train", train), ("validation or test", held_out)):
        if not len(nodes.labels) or nodes.labels.min() < 0:
            raise SettingsError(f"{path}: {split} nodes must be there and have classes")
    count = f"{len(labels):,} nodes, {found['edge_index'].shape[1] // 2:,} edges"
    return GraphData(train, held_out, int(found["val_mask"].sum()), x.shape[1], classes, f"{name} ({count})")


def block_model(sizes: Sequence[int], inside: float, between: float, seed: int) -> tuple[Graph, Tensor]:
    """Draw a graph of communities, which its nodes are to be told apart by: in each, one node says which it is.

    A node's feature is the number of its community, from 1, where it says so, else 0; one-hot.

    Args:
        sizes: Nodes of each community.
        inside: Probability of an edge between two nodes of a community.
        between: Probability of one between others.
        seed: Of the graph, and of who speaks.

    Returns:
        The graph and the nodes' communities.

    Source: Dwivedi et al., "Benchmarking Graph Neural Networks" (2020), section on CLUSTER.
    """
    communities = len(sizes)
    probabilities = torch.full((communities, communities), between).fill_diagonal_(inside)
    with torch.random.fork_rng(devices=[]):  # the generator of block models draws from the global state
        torch.manual_seed(seed)
        edges = geometric("utils").stochastic_blockmodel_graph(list(sizes), probabilities)
        speaking = [int(torch.randint(size, ())) for size in sizes]
    labels = torch.arange(communities).repeat_interleave(torch.tensor(sizes))
    said = torch.zeros(len(labels), dtype=torch.long)
    for community, (node, size) in enumerate(zip(speaking, sizes, strict=True)):
        said[sum(sizes[:community]) + min(node, size - 1)] = community + 1
    return normalized(one_hot(said, communities + 1).float(), edges), labels


def block_models(
    train: int, held_out: int, smallest: int, largest: int, inside: float, between: float, seed: int,
    device: torch.device,
) -> GraphData:  # fmt: skip
    """Draw graphs of six communities, whose sizes are uniform from the smallest to the largest.

    Args:
        train: Training graphs.
        held_out: Validation graphs, and as many test graphs.
        smallest: Nodes of a community.
        largest: Nodes of a community.
        inside: Probability of an edge inside a community.
        between: Probability of an edge between two.
        seed: Of all graphs: the data set is the same for every seed of a run.
        device: Where to.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> GraphSet:
        pairs = []
        for _ in range(count):
            sizes = torch.randint(smallest, largest + 1, (COMMUNITIES,), generator=generator).tolist()
            own = int(torch.randint(2**31, (), generator=generator))
            pairs.append(block_model(sizes, inside, between, own))
        return GraphSet([graph.to(device) for graph, _ in pairs], [labels.to(device) for _, labels in pairs])

    training, validation, test = draw(train), draw(held_out), draw(held_out)
    both = GraphSet([*validation.graphs, *test.graphs], [*validation.targets, *test.targets])
    count = f"{train} training graphs of {len(training.labels) / train:.0f} nodes"
    return GraphData(
        training, both, len(validation.labels), COMMUNITIES + 1, COMMUNITIES, f"stochastic block models ({count})"
    )
