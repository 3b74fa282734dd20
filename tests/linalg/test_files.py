"""Files: atomic, versioned, never unpickled, and nothing but a clear error for anything else."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.linalg import files
from lowrank_bdl.linalg.files import read_tensors, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64)}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "x.safetensors", "kind", TENSORS, {"n": 1, "name": "é"})
    return tmp_path / "x.safetensors"


def test_round_trip(path):
    tensors, metadata = read_tensors(path, "kind", ["a", "b"])
    assert metadata == {"n": 1, "name": "é"} and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in TENSORS.items())


NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW], ids=str)
def test_every_storage_dtype_and_empty_tensors(dtype, tmp_path):
    tensor = torch.randn(3, 5).to(dtype)
    write_tensors(tmp_path / "x", "kind", {"t": tensor, "none": tensor[:0]}, {})
    back, _ = read_tensors(tmp_path / "x", "kind", ["t"])
    assert back["t"].dtype == dtype and torch.equal(back["t"].float(), tensor.float()) and back["none"].shape == (0, 5)


def test_views_are_written_as_what_they_show(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "x", "kind", {"transposed": base.mT, "rows": base[1:], "columns": base[:, 1:3]}, {})
    back, _ = read_tensors(tmp_path / "x", "kind", [])
    assert torch.equal(back["transposed"], base.mT) and torch.equal(back["rows"], base[1:])
    assert torch.equal(back["columns"], base[:, 1:3])


def test_every_truncation_is_refused(path, tmp_path):
    content = path.read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
            read_tensors(tmp_path / "cut", "kind", ["a"])
    (tmp_path / "long").write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        read_tensors(tmp_path / "long", "kind", ["a"])


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickles_are_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Bomb()))
    torch.save({"a": Bomb()}, tmp_path / "y.safetensors")
    for name in ("x.safetensors", "y.safetensors"):
        with pytest.raises(CheckpointError, match="no safetensors file"):
            read_tensors(tmp_path / name, "kind", ["a"])
    assert not (tmp_path / "exploded").exists()


def header(**changes):
    return {"format": "lowrank_bdl", "version": "1", "kind": "kind", "metadata": "{}", **changes}


@pytest.mark.parametrize(
    "metadata,message",
    [
        (None, "is no file of lowrank_bdl; its format is None"),
        (header(format="pt"), "is no file of lowrank_bdl; its format is 'pt'"),
        (header(version="2"), "format version 2; this library reads up to 1. Update"),
        (header(version="new"), "damaged header"),
        (header(kind="model"), "holds a 'model'; expected a 'kind'"),
        (header(metadata="{"), "damaged header"),
        (header(metadata="[]"), "damaged header: metadata must be an object"),
        ({"format": "lowrank_bdl", "version": "1"}, "damaged header: 'metadata'"),
    ],
)
def test_foreign_newer_and_damaged_headers(metadata, message, tmp_path):
    save_file(TENSORS, tmp_path / "x", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "x", "kind", ["a"])


def test_missing_tensor_and_missing_file(path, tmp_path):
    with pytest.raises(CheckpointError, match="lacks c, d"):
        read_tensors(path, "kind", ["a", "c", "d"])
    with pytest.raises(FileNotFoundError, match="no such file: .*nowhere"):
        read_tensors(tmp_path / "nowhere", "kind", [])
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tensors(tmp_path, "kind", [])


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_write_that_dies_leaves_the_old_file(step, path, monkeypatch):
    before = path.read_bytes()

    def die(*args, **kwargs):
        raise KeyboardInterrupt("killed")

    monkeypatch.setattr(files if step == "save_file" else files.os, step, die)
    with pytest.raises(KeyboardInterrupt, match="^killed$"):
        write_tensors(path, "kind", {"a": torch.zeros(100)}, {})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no partial file stays


def test_unknown_dtype(tmp_path):
    write_tensors(tmp_path / "x", "kind", {"a": torch.zeros(2, dtype=torch.uint16)}, {})
    with pytest.raises(CheckpointError, match="'a' has the unknown dtype U16"):
        read_tensors(tmp_path / "x", "kind", ["a"])


def test_tensors_outlive_the_file(path):
    tensors, _ = read_tensors(path, "kind", ["a"], device="cpu")
    path.write_bytes(b"")
    assert torch.equal(tensors["a"], TENSORS["a"])


def test_unwritable_directory_and_bad_metadata(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        write_tensors(tmp_path / "no" / "x", "kind", TENSORS, {})
    before = path.read_bytes()
    for bad in ({"x": torch.zeros(1)}, {"x": float("nan")}):
        with pytest.raises(TypeError, match="metadata must be plain JSON values"):
            write_tensors(path, "kind", TENSORS, bad)
    assert path.read_bytes() == before


def test_mode_follows_the_umask(path, tmp_path):
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_header_is_plain_json(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    parsed = json.loads(content[8 : 8 + size])
    assert json.loads(parsed["__metadata__"]["metadata"]) == {"n": 1, "name": "é"}


def test_kind_is_read_from_the_header_alone(path, tmp_path):
    assert files.read_kind(path) == "kind"
    with pytest.raises(FileNotFoundError, match="no such file: .*nowhere"):
        files.read_kind(tmp_path / "nowhere")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        files.read_kind(tmp_path / "cut")


def test_tensors_that_share_memory_are_written_each_for_itself(tmp_path):
    base = torch.arange(6.0)
    views = {"whole": base, "again": base, "head": base[:2], "tail": base[3:], "none": base[:0]}
    write_tensors(tmp_path / "x", "kind", views, {})
    back, _ = read_tensors(tmp_path / "x", "kind", list(views))
    assert all(torch.equal(back[name], tensor) for name, tensor in views.items())
