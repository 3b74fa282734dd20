"""Nested state survives the way through JSON and tensors."""

import json

import pytest
import torch

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.training.packing import pack, unpack


def through_json(tree: object) -> object:
    skeleton, tensors = pack(tree)
    return unpack(json.loads(json.dumps(skeleton, allow_nan=False)), tensors)


def test_types_and_keys_survive() -> None:
    tree = {"state": {0: {"n": 3, "x": None}, "0": 1.5}, "betas": (0.9, True), "empty": [], "inf": -float("inf")}
    found = through_json(tree)
    assert found == tree and isinstance(found["betas"], tuple) and list(found["state"]) == [0, "0"]
    assert through_json(float("nan")) != through_json(float("nan"))


def test_permuted_tensors_keep_their_strides() -> None:
    filters = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    skeleton, tensors = pack({"w": filters})
    copy = {name: tensor.contiguous() for name, tensor in tensors.items()}  # what a file does
    found = unpack(skeleton, copy)["w"]
    assert torch.equal(found, filters) and found.stride() == filters.stride()


def test_shared_memory_is_written_once() -> None:
    weight = torch.arange(6.0)
    skeleton, tensors = pack({"a": weight, "tied": weight, "part": weight[:3], "none": torch.empty(0)})
    assert list(tensors) == ["a", "part", "none"]
    assert tensors["part"].untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
    found = unpack(skeleton, tensors)
    assert torch.equal(found["tied"], weight) and torch.equal(found["part"], weight[:3])


def test_what_is_no_state_is_named() -> None:
    with pytest.raises(TypeError, match="a.1.f: state must be made of tensors, numbers.*got builtin_function"):
        pack({"a": [0, {"f": len}]})
    with pytest.raises(TypeError, match=r"keys must be strings or integers; got \[1.5\]"):
        pack({1.5: 0})


@pytest.mark.parametrize("skeleton", [{"tensor": "gone"}, {"list": 3}, {"dict": [1]}, {}, {"dict": [["a"]]}])
def test_a_damaged_skeleton_is_reported(skeleton: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint's state is damaged"):
        unpack(skeleton, {})
