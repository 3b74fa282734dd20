"""The file of final weights: what it holds, what it refuses, whose network it fits."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_bdl as lb
from experiments.train_weights import KIND, FinalWeights, buffers_of, final_weights, read_weights, write_weights
from lowrank_bdl.linalg.files import read_tensors, write_tensors


def make(width: int = 3, norm: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(width)
        net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.Linear(width, 2))
    net(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))  # statistics of its own
    return net


@pytest.fixture
def weights() -> FinalWeights:
    net = make()
    layout = lb.ParameterLayout.from_module(net)
    part = lb.ParameterLayout.from_module(net, include="2")
    sources = {"SGD": layout.flatten(net), "SWA": torch.full((part.numel,), 7.0), "EMA": torch.ones(layout.numel)}
    return final_weights(net, sources, {"SWA": part})


def test_partly_collected_vectors_are_filled_up_with_the_last_iterate(weights: FinalWeights) -> None:
    swa = weights.layout.unflatten(weights.thetas["SWA"])
    last = weights.layout.unflatten(weights.last)
    for name, value in swa.items():
        assert torch.equal(value, torch.full_like(value, 7.0) if name.startswith("2.") else last[name])
    assert torch.equal(weights.start, weights.thetas["SWA"])
    without = FinalWeights({"SGD": weights.last}, weights.layout, weights.buffers)
    assert torch.equal(without.start, weights.last)


def test_a_file_gives_back_what_was_written(weights: FinalWeights, tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", weights)
    found = read_weights(tmp_path / "w.safetensors")
    assert found.layout == weights.layout and list(found.thetas) == ["SGD", "SWA", "EMA"]
    for mine, theirs in ((found.thetas, weights.thetas), (found.buffers, weights.buffers)):
        assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert found.digest() == weights.digest()
    net = make(3)
    nn.init.zeros_(net[0].weight)
    net[1].reset_running_stats()
    found.load_into_(net)
    expected = make()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in net.state_dict().items())
    found.load_into_(net, found.thetas["EMA"])
    assert all(torch.equal(p, torch.ones_like(p)) for p in net.parameters())


def test_the_digest_tells_start_weights_and_buffers_apart(weights: FinalWeights) -> None:
    moved = {**weights.buffers, "1.running_mean": weights.buffers["1.running_mean"] + 1e-6}
    other = [
        FinalWeights({"SGD": weights.last}, weights.layout, weights.buffers),
        FinalWeights(weights.thetas, weights.layout, moved),
    ]
    assert len({found.digest() for found in (weights, *other)}) == 3


@pytest.mark.parametrize(
    "net,message",
    [
        (make(4), r"parameter '0.weight': expected shape \(4, 2\), got \(3, 2\)"),
        (make(norm=False), "parameter number 2: expected '2.weight', got '1.weight'"),
        (
            nn.Sequential(*make(), nn.Linear(2, 2)),
            r"parameter '3.weight': expected shape \(2, 2\), got no such parameter",
        ),
        (
            nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)),
            r"buffer '1.running_mean': expected no such buffer, got \(3,\)",
        ),
    ],
)
def test_another_network_is_refused_and_left_alone(net: nn.Module, message: str, weights: FinalWeights) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(lb.CheckpointError, match=f"the weights are of another network: {message}"):
        weights.load_into_(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_tied_weights_are_no_buffers() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    assert sorted(buffers_of(net)) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]


def test_damaged_files_are_named(weights: FinalWeights, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, weights)
    tensors, metadata = read_tensors(path, KIND, ())
    whole = path.read_bytes()
    for size in (0, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(lb.CheckpointError, match="w.safetensors is truncated or no safetensors file"):
            read_weights(path)
    nan = tensors["theta/SWA"].clone().index_fill_(0, torch.tensor([3]), float("nan"))
    cases = [
        ({**tensors, "theta/SWA": nan}, metadata, r"SWA must hold 23 finite numbers; got shape \(23,\), 1 not finite"),
        ({**tensors, "theta/SWA": nan[:5]}, metadata, r"SWA must hold 23 finite numbers; got shape \(5,\)"),
        ({k: v for k, v in tensors.items() if k != "theta/EMA"}, metadata, "it lists .* and holds"),
        (tensors, {**metadata, "sources": []}, "damaged header: no sources or buffers"),
        (tensors, {**metadata, "layout": None}, "A layout needs names, shapes, dtypes and aliases"),
    ]
    for damaged, header, message in cases:
        write_tensors(path, KIND, damaged, header)
        with pytest.raises(lb.CheckpointError, match=message):
            read_weights(path)
    with pytest.raises(FileNotFoundError, match="no such file: .*gone"):
        read_weights(tmp_path / "gone")
