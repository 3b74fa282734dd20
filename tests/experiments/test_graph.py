"""Node classification on graphs, end to end at a tiny size; data, network and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

pytest.importorskip(
    "torch_geometric", reason="graphs need torch_geometric: pip install lowrank-bdl[applications]", exc_type=ImportError
)

from experiments import graph
from experiments.graph_data import block_model, block_models, citations
from experiments.graph_network import NodeClassifier, SymmetricProduct

CPU = torch.device("cpu")
COMMON = "--threads 1 --num_samples 2 --max_num_models 3 --device cpu".split()
CLUSTER = (
    "--dataset CLUSTER --train_graphs 12 --eval_graphs 6 --min_size 4 --max_size 7 --inside 0.9 --between 0.05 "
    "--batch_size 4 --epochs 8 --swa_start 4 --hidden 16 --layers 3 --seeds 2"
).split()


@pytest.fixture(scope="module")
def citation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network as the files hold one: 3 classes of 20 papers that cite their own class, and have words of it."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    features = (rng.random((60, 30)) < 0.05).astype(np.uint8)
    features[np.arange(60), labels * 10 + rng.integers(0, 10, 60)] = 1
    upper = np.triu(rng.random((60, 60)) < np.where(labels[:, None] == labels, 0.2, 0.01), 1)
    edges = np.concatenate([np.argwhere(upper), np.argwhere(upper)[:, ::-1]]).T.astype(np.int32)
    order = rng.permutation(60)
    masks = {name: np.isin(np.arange(60), part) for name, part in zip(
        ("train_mask", "val_mask", "test_mask"), np.split(order, [15, 35]), strict=True)}  # fmt: skip
    folder = tmp_path_factory.mktemp("planetoid")
    np.savez(folder / "cora.npz", features=features, edge_index=edges, labels=labels, **masks)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "run"
    assert graph.main(["--dir", str(path), *COMMON, *CLUSTER]) == 0
    return path


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def test_communities_are_found(finished: Path) -> None:
    found = results(finished)
    assert found["order"] == ["class frequencies", "SGD", "SGD constant", "SWA", "SWAG-Diag", "SWAG"]
    assert found["sizes"]["train"] > found["sizes"]["test"] > 100 and found["cells"][0]["snapshots"] == 4
    chance = found["summary"]["class frequencies"]["accuracy"]
    assert chance["std"] == 0 and 10 < chance["mean"] < 30
    for method in found["order"][1:]:
        assert found["summary"][method]["accuracy"]["mean"] > chance["mean"] + 20
    text = (finished / "table.txt").read_text()
    assert "class frequencies (baseline)" in text and "2 seeds, mean ± standard deviation" in text
    for name in ("methods.png", "reliability.png"):
        assert imread(finished / name)[..., :3].std() > 0.01


def test_goes_on_from_finished_seeds(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(finished)["cells"]
    assert graph.main(["--dir", str(finished), *COMMON, *CLUSTER, "--resume", "--seeds", "1"]) == 0
    assert results(finished)["cells"] == before[:1]
    assert graph.main(["--dir", str(finished), *COMMON, *CLUSTER, "--resume", "--between", "0.1"]) == 2
    assert "between was 0.05, now 0.1" in capsys.readouterr().err


def test_papers_are_told_apart(citation_folder: Path, tmp_path: Path) -> None:
    flags = "--dataset Cora --seeds 1 --epochs 60 --swa_start 30 --hidden 8".split()
    path = tmp_path / "run"
    assert graph.main(["--dir", str(path), "--data_path", str(citation_folder), *COMMON, *flags]) == 0
    found = results(path)
    assert found["order"][1:3] == ["Adam", "Adam constant"] and found["settings"]["lr_init"] == 0.01
    assert found["sizes"] == {"train": 15, "validation": 20, "test": 25}
    for method in ("Adam", "SWA", "SWAG"):
        assert found["summary"][method]["accuracy"]["mean"] > found["summary"]["class frequencies"]["accuracy"]["mean"]


def test_network_is_the_formula(citation_folder: Path) -> None:
    """Two layers: Â relu(Â X W₀ + b₀) W₁ + b₁ with Â = D^-½ (A + I) D^-½, dense in float64."""
    data = citations("Cora", str(citation_folder), CPU)
    own, targets = next(iter(data.held_out.batches(1)))
    with np.load(citation_folder / "cora.npz") as file:
        adjacency = np.eye(60)
        adjacency[tuple(file["edge_index"])] = 1
        x = file["features"] / np.maximum(file["features"].sum(1, keepdims=True), 1)
        nodes = np.concatenate([np.flatnonzero(file["val_mask"]), np.flatnonzero(file["test_mask"])])
        assert np.array_equal(targets.numpy(), file["labels"][nodes])
    scale = adjacency.sum(1) ** -0.5
    adjacency = scale[:, None] * adjacency * scale
    torch.manual_seed(0)
    model = NodeClassifier(30, 3, 5, 2, 0.5, "none").eval()
    (w0, b0), (w1, b1) = (
        (conv.lin.weight.detach().double().numpy().T, conv.bias.detach().double().numpy())
        for conv in model.network.convs
    )
    expected = adjacency @ np.maximum(adjacency @ x @ w0 + b0, 0) @ w1 + b1
    np.testing.assert_allclose(model(own).detach().numpy(), expected[nodes], rtol=1e-5, atol=1e-6)


def test_dropout_of_sparse_words(citation_folder: Path) -> None:
    graph_of = citations("Cora", str(citation_folder), CPU).train.graphs[0]
    model = NodeClassifier(30, 3, 5, 2, 0.5, "none")
    torch.manual_seed(0)
    thinned = model._thinned(graph_of.x).to_dense()
    before = graph_of.x.to_dense()
    kept = thinned != 0
    torch.testing.assert_close(thinned[kept], 2 * before[kept])
    assert 0.3 < kept.sum() / (before != 0).sum() < 0.7
    assert torch.equal(model.eval()._thinned(graph_of.x).to_dense(), before)


def test_gradient_of_a_symmetric_product() -> None:
    dense = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = (dense + dense.mT).relu().to_sparse_coo()
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SymmetricProduct.apply(matrix, x), (x,))


def test_block_models_have_their_law() -> None:
    """Edges inside and between communities: each count within 5 standard deviations of the binomial's mean."""
    sizes, inside, between = [40, 50, 60], 0.5, 0.1
    own, labels = block_model(sizes, inside, between, seed=3)
    assert torch.equal(labels.bincount(), torch.tensor(sizes))
    adjacency = own.adj_t.to_dense() != 0
    assert torch.equal(adjacency, adjacency.mT) and bool(adjacency.diagonal().all())
    same = labels[:, None] == labels
    above = torch.ones_like(same).triu(1)
    for pairs, probability in ((same & above, inside), (~same & above, between)):
        count, mean = int(adjacency[pairs].sum()), int(pairs.sum()) * probability
        assert abs(count - mean) < 5 * (mean * (1 - probability)) ** 0.5
    speaking = own.x[:, 1:].sum(1) > 0
    assert int(speaking.sum()) == 3 and torch.equal(own.x[speaking].argmax(1) - 1, labels[speaking])
    again, _ = block_model(sizes, inside, between, seed=3)
    assert torch.equal(again.adj_t.to_dense(), own.adj_t.to_dense())


def test_a_batch_of_graphs_is_each_of_them() -> None:
    data = block_models(3, 2, 3, 6, 0.8, 0.1, 0, CPU)
    torch.manual_seed(0)
    model = NodeClassifier(7, 6, 5, 3, 0.0, "none").eval()
    batch, targets = next(iter(data.train.batches(3)))
    alone = [model(own) for own in data.train.graphs]
    torch.testing.assert_close(model(batch), torch.cat(alone))
    assert torch.equal(targets, data.train.labels) and len(data.train.batches(2)) == 2
    orders = [data.train.shuffled(1)(torch.Generator().manual_seed(seed)).order for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1] and any(order != orders[0] for order in orders)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset Cora", "--dataset Cora needs --data_path, the folder of cora.npz"),
        ("--dataset Cora --data_path nowhere", "--data_path nowhere: there is no cora.npz"),
        ("--epochs 101", "--epochs must leave two collected iterates after --swa_start 100; got 101"),
        ("--dataset CLUSTER --max_size 4", "--max_size must be at least --min_size 5; got 4"),
        ("--between 2", "--between must be from 0 to 1; got 2.0"),
        ("--dropout 1", "--dropout must be at least 0 and less than 1; got 1.0"),
        ("--swa_lr 0", "--swa_lr must be positive; got 0.0"),
        ("--layers 1", "--layers must be at least 2; got 1"),
    ],
)
def test_refuses_what_cannot_run(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = graph.main(["--dir", str(tmp_path / "run"), *flags.split()])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_refuses_files_of_another_kind(citation_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cora.npz").write_bytes(b"no archive")
    with pytest.raises(graph.SettingsError, match=r"cora\.npz is not a citation network"):
        citations("Cora", str(tmp_path), CPU)
    with np.load(citation_folder / "cora.npz") as file:
        found = dict(file)
    found["labels"] = np.where(found["test_mask"], -1, found["labels"])
    np.savez(tmp_path / "cora.npz", **found)
    with pytest.raises(graph.SettingsError, match="validation or test nodes must be there and have classes"):
        citations("Cora", str(tmp_path), CPU)
