"""ImageNet's script end to end on a tiny generated tree; predicted memory; generated images; weights; refusals."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from experiments import imagenet, imagenet_memory
from experiments.common import SettingsError
from experiments.imagenet_data import load_weights_, write_tree
from experiments.models import torchvision_model

TINY = (
    "--model resnet18 --generated 3x6 --image_size 32 --batch_size 6 --epochs 2 --swa_start 1 --swa_freq 2 "
    "--max_num_models 2 --num_samples 2 --bn_fraction 0.5 --use_test --num_workers 0 --threads 1"
).split()


def run(path: Path, *more: str) -> int:
    with redirect_stdout(StringIO()) as printed:
        status = imagenet.main(["--dir", str(path), *TINY, *more])
    if status == 0:
        (path.parent / f"{path.name}.stdout").write_text(printed.getvalue())
    return status


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imagenet") / "run"
    assert run(path) == 0
    return path


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    assert {name for name in names if not name.startswith("images/")} == {
        "cells/seed-1.json", "memory.png", "training.png", "methods.png", "table.txt", "log.jsonl", "results.json",
        "settings.json", "environment.json", "command.sh",
    }  # fmt: skip
    assert sum(name.startswith("images/train/") for name in names) == 18
    assert imread(finished / "memory.png")[..., :3].std() > 0.05
    found = results(finished)
    assert list(found["summary"]) == sorted(("Majority", "SGD", "SWA", "SWAG-Diag", "SWAG"))
    assert found["cells"][0]["snapshots"] == 2
    majority = found["cells"][0]["methods"]["Majority"]
    assert majority["accuracy"] == pytest.approx(100 / 3) and majority["top5"] == 100
    assert majority["nll"] == pytest.approx(np.log(3), rel=1e-6)
    printed = (finished.parent / "run.stdout").read_text()
    assert "measured / predicted" in printed and printed.startswith((finished / "table.txt").read_text())


def test_memory_is_as_predicted(finished: Path) -> None:
    rows = [imagenet_memory.MemoryRow(**row) for row in results(finished)["cells"][0]["memory"]]
    assert [row.operation for row in rows] == ["state", "collect", "posterior", "sample"]
    for row in rows:
        assert row.ratio == pytest.approx(1, abs=0.05), row


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
def test_memory_of_fewer_bits_is_as_predicted(stored: torch.dtype) -> None:
    model = nn.Linear(1000, 2000)
    before = model.weight.detach().clone()
    rows = imagenet_memory.measure_memory(model, 20, stored, torch.device("cpu"))
    assert torch.equal(model.weight, before)
    for row in rows:
        assert row.ratio == pytest.approx(1, abs=0.05), row
    assert rows[0].measured < 0.75 * 25 * 4 * 2_002_000  # less than in float32


def test_goes_on_from_the_last_checkpoint_with_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    """Killed after the first epoch: the second one does the same arithmetic."""
    path = tmp_path / "run"

    own, calls = imagenet.measure, []

    def stopping(study: Any, found: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(study, found)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(imagenet, "measure", stopping)
        assert imagenet.main(["--dir", str(path), *TINY]) == 130
    assert (path / "checkpoint-1.safetensors").exists() and not (path / "results.json").exists()
    assert run(path, "--resume") == 0
    assert results(path)["cells"][0]["methods"] == results(finished)["cells"][0]["methods"]


def test_generated_images_tell_their_class_and_are_always_the_same(tmp_path: Path) -> None:
    write_tree(tmp_path / "a", 3, 8, 24)
    write_tree(tmp_path / "b", 3, 8, 24)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jpg"))
    assert len(files) == 3 * 8 + 3 * 4
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)

    def colors(split: str, c: int) -> np.ndarray:
        images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "a" / split / f"class{c:03d}").iterdir())]
        return np.stack(images).mean((1, 2))

    centers = np.stack([colors("train", c).mean(0) for c in range(3)])
    found = np.concatenate([((colors("val", c)[:, None] - centers) ** 2).sum(-1).argmin(-1) == c for c in range(3)])
    assert 0.5 < found.mean()  # better than chance by the mean colour alone, of 12 images


def test_weights_out_of_a_file(tmp_path: Path) -> None:
    model = torchvision_model("resnet18", 3, 3, 32)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        other = torchvision_model("resnet18", 3, 3, 32)
        load_weights_(other, str(tmp_path / name))
        assert torch.equal(other.fc.weight, model.fc.weight)
    with pytest.raises(SettingsError, match=r"--weights .*w\.pth: .*size mismatch for fc\.weight"):
        load_weights_(torchvision_model("resnet18", 4, 3, 32), str(tmp_path / "w.pth"))
    torch.save(model, tmp_path / "model.pth")
    with pytest.raises(SettingsError, match=r"--weights .*model\.pth: "):
        load_weights_(model, str(tmp_path / "model.pth"))
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name.replace("cut", "w")).read_bytes()[:1000])
        with pytest.raises(SettingsError, match=r"--weights .*cut"):
            load_weights_(model, str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model resnet19", "--model resnet19: torchvision has resnet"),
        ("--swa_start 2", "SWAG needs at least 2 snapshots; these settings take 0"),
        ("--generated 3", "--generated must be CLASSESxIMAGES, each at least 2; got '3'"),
        ("--weights nothing.pth", "--weights nothing.pth: there is no such file"),
        ("--bn_fraction 1.5", "--bn_fraction must be at most 1; got 1.5"),
        ("--data_path nowhere", "--data_path nowhere: there is no such folder"),
        ("--lr_init 0", "--lr_init must be positive; got 0.0"),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_is_written(
    tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    try:
        status = imagenet.main(["--dir", str(path), *TINY, *options.split()])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2 and not path.exists()
    assert message in capsys.readouterr().err
