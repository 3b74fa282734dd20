"""Segmentation, end to end on a tiny folder; crops and weights of classes; the folder's layouts; refusals."""

import json
import math
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from experiments import segmentation
from experiments.common import SettingsError
from experiments.segmentation_data import (
    CLASS_NAMES,
    VOID,
    class_counts,
    cropped,
    find_pairs,
    median_frequency_weights,
    read_scenes,
    spread,
)

CPU = torch.device("cpu")
TINY = (
    "--model FCDenseNet57 --epochs 3 --crop 32 --batch_size 2 --ft_start 2 --ft_batch_size 2 --swa_start 1 "
    "--max_num_models 2 --num_samples 2 --bn_size 2 --eval_freq 3 --checkpoint_freq 1 "
    "--maps 2 --threads 1"
).split()


def write_camvid(root: Path, height: int = 32, width: int = 40) -> Path:
    """Scenes of sky above road, with a car in them: a network can learn that from the colours."""
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 255, (12, 3))
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        lines = []
        for i in range(count):
            labels = np.full((height, width), 3, np.uint8)
            labels[: height // 2 + int(rng.integers(-4, 5))] = 0
            left = int(rng.integers(0, width - 12))
            labels[height // 2 :, left : left + 12] = 8
            labels[:2] = VOID
            pixels = np.clip(palette[labels] + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
            for folder, values in ((split, pixels), (f"{split}annot", labels)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / folder / f"{i}.png")
            lines.append(f"/SegNet/CamVid/{split}/{i}.png /SegNet/CamVid/{split}annot/{i}.png")
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_camvid(tmp_path_factory.mktemp("camvid"))


def run(path: Path, camvid: Path, *more: str) -> int:
    return segmentation.main(["--dir", str(path), "--data_path", str(camvid), *TINY, *more])


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(camvid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("segmentation") / "run"
    with redirect_stdout(StringIO()) as printed:
        assert run(path, camvid) == 0
    (path.parent / "stdout").write_text(printed.getvalue())
    return path


def test_a_run_writes_what_it_says(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    assert names == {
        "cells/seed-1.json", "checkpoint-1.safetensors", "maps.png", "training.png", "calibration.png", "classes.png",
        "methods.png", "table.txt", "log.jsonl", "results.json", "settings.json", "environment.json", "command.sh",
    }  # fmt: skip
    for name in ("maps.png", "calibration.png", "classes.png"):
        picture = imread(finished / name)
        assert picture.shape[1] > 900 and picture[..., :3].std() > 0.05
    lines = (finished / "table.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[2:8]] == ["Majority", "SGD", "Dropout", "SWA", "SWAG-Diag", "SWAG"]
    assert (finished.parent / "stdout").read_text().startswith("method")


def test_what_is_measured_is_of_the_labelled_pixels(finished: Path, camvid: Path) -> None:
    found = results(finished)
    scenes = read_scenes(str(camvid), "val", CPU)
    labelled = scenes.labels[scenes.labels != VOID]
    assert labelled.numel() < scenes.labels.numel()
    (cell,) = found["cells"]
    for curves in cell["curves"].values():
        assert sum(curves["pixels"]["count"]) == labelled.numel()
    counts = class_counts(read_scenes(str(camvid), "train", CPU).labels).sum(0)
    share = ((counts + 1) / (counts + 1).sum()).double()
    most = int(counts.argmax())
    majority = cell["methods"]["Majority"]
    assert majority["accuracy"] == pytest.approx(100 * (labelled == most).double().mean().item(), rel=1e-9)
    assert majority["nll"] == pytest.approx(-share.log()[labelled.long()].mean().item(), rel=1e-6)
    expected = 100 * (labelled == most).double().mean().item() / 3  # three classes are there; two are never found
    assert majority["mean_iou"] == pytest.approx(expected, rel=1e-9)
    for method in ("SGD", "Dropout", "SWA", "SWAG-Diag", "SWAG"):
        assert 0 <= cell["methods"][method]["ece"] <= 100 and math.isfinite(cell["methods"][method]["nll"])
    assert cell["methods"]["SGD"] != cell["methods"]["Dropout"] and cell["methods"]["SWA"] != cell["methods"]["SWAG"]
    assert cell["snapshots"] == 2 and cell["parameters"] == 1_376_795


def test_goes_on_from_the_last_checkpoint_with_the_same_numbers(finished: Path, camvid: Path, tmp_path: Path) -> None:
    """Killed in the last epoch: that epoch does the same arithmetic again, dropout included."""
    path = tmp_path / "run"

    def stopping(*args: Any) -> None:  # the first evaluation is after the last epoch, before its checkpoint
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "measure", stopping)
        assert run(path, camvid) == 130
    assert (path / "checkpoint-1.safetensors").exists() and not list((path / "cells").iterdir())
    with redirect_stdout(StringIO()):
        assert run(path, camvid, "--resume") == 0
    (old,), (new,) = results(finished)["cells"], results(path)["cells"]
    assert new["methods"] == old["methods"] and new["curves"]["SWAG"]["iou"] == pytest.approx(
        old["curves"]["SWAG"]["iou"], nan_ok=True, rel=0
    )


def test_the_aleatoric_loss_and_weights_of_classes(camvid: Path, tmp_path: Path) -> None:
    with redirect_stdout(StringIO()):
        options = "--loss aleatoric --aleatoric_draws 2 --use_weights --epochs 2 --ft_start 5 --swa_start 0 --use_test"
        options += " --channels_last --amp bfloat16 --optimizer Adam --lr_init 0.001"
        assert run(tmp_path / "run", camvid, *options.split(), "--train_limit", "2", "--eval_limit", "1") == 0
    found = results(tmp_path / "run")
    assert found["data"]["scenes"] == {"train": 2, "held_out": 1}
    assert "Adam" in found["summary"] and "SGD" not in found["summary"]
    assert math.isfinite(found["summary"]["SWAG"]["nll"]["mean"])


# ---- data ------------------------------------------------------------------------------------------------------------


def test_crops_cut_image_and_labels_alike(generator: torch.Generator) -> None:
    labels = torch.arange(8 * 12, dtype=torch.uint8).view(1, 8, 12).expand(200, 8, 12)
    images = labels.unsqueeze(1).expand(200, 3, 8, 12)
    cut, cut_labels = cropped(images, labels, 5, generator)
    assert cut.shape == (200, 3, 5, 5) and torch.equal(cut[:, 1], cut_labels)
    down = cut_labels.int().diff(dim=1)
    across = cut_labels.int().diff(dim=2)
    assert (down == 12).all() and ((across == 1).flatten(1).all(1) | (across == -1).flatten(1).all(1)).all()
    corners = torch.minimum(cut_labels[:, 0, 0], cut_labels[:, 0, -1])
    assert set(corners.tolist()) == {12 * row + column for row in range(4) for column in range(8)}
    mirrored = int((across[:, 0, 0] == -1).sum())
    assert 60 <= mirrored <= 140  # of 200, one in two: further off once in 10^7
    whole, _ = cropped(images, labels, None, generator)
    assert whole.shape == images.shape


def test_rare_classes_weigh_more() -> None:
    labels = torch.full((2, 4, 5), VOID, dtype=torch.uint8)
    labels[0, :2] = 0  # 10 pixels of sky, and in this image alone 2 of cars
    labels[0, 2, :2] = 8
    labels[1, :3] = 0  # 15 of sky, 5 of road
    labels[1, 3] = 3
    weights = median_frequency_weights(class_counts(labels))
    frequency = {0: 25 / 32, 3: 5 / 20, 8: 2 / 12}
    for c in range(len(CLASS_NAMES)):
        assert weights[c].item() == pytest.approx(frequency[3] / frequency[c] if c in frequency else 1.0, rel=1e-6)


def test_layouts_of_the_folder(camvid: Path, tmp_path: Path) -> None:
    listed = find_pairs(camvid, "test")
    assert [path.name for path, _ in listed] == ["0.png", "1.png", "2.png"]
    other = write_camvid(tmp_path / "other")
    (other / "test.txt").unlink()
    assert [(a.name, b.parent.name) for a, b in find_pairs(other, "test")] == [
        (f"{i}.png", "testannot") for i in range(3)
    ]
    scenes = read_scenes(str(other), "test", CPU, limit=2)
    assert len(scenes) == 2 and scenes.images.dtype == torch.uint8
    inputs, labels = next(iter(scenes.batches(2)))
    assert inputs.shape == (2, 3, 32, 40) and labels.dtype == torch.int64
    assert spread(3, 2) == [0, 1] and spread(100, 4) == [0, 25, 50, 75]
    assert spread(3, None) == spread(3, 7) == [0, 1, 2]
    assert torch.equal(scenes.spread(1).images, scenes.images[:1])
    ordered = [batch[1] for batch in scenes.as_trained(1, 32, seed=3)]
    assert all(torch.equal(a, b[1]) for a, b in zip(ordered, scenes.as_trained(1, 32, seed=3), strict=True))


def test_refuses_damaged_folders(tmp_path: Path) -> None:
    root = write_camvid(tmp_path)
    with pytest.raises(SettingsError, match="no pairs of image and labels for validation"):
        find_pairs(root, "validation")
    with pytest.raises(SettingsError, match="--data_path is needed"):
        read_scenes(None, "train", CPU)
    (root / "train" / "2.png").write_bytes(b"no image")
    with pytest.raises(SettingsError, match=r"cannot read the image .*2\.png"):
        read_scenes(str(root), "train", CPU)
    Image.fromarray(np.full((32, 40), 12, np.uint8)).save(root / "valannot" / "1.png")
    with pytest.raises(SettingsError, match="labels must be 0 to 11; got 12"):
        read_scenes(str(root), "val", CPU)
    Image.fromarray(np.zeros((32, 41), np.uint8)).save(root / "valannot" / "1.png")
    with pytest.raises(SettingsError, match="must have the size of the first"):
        read_scenes(str(root), "val", CPU)
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(root / "testannot" / "0.png")
    with pytest.raises(SettingsError, match="expected bytes, one a pixel"):
        read_scenes(str(root), "test", CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--crop 33", "--crop must fit into the scenes, which have 32 x 40 pixels; got 33"),
        ("--crop 16", "--crop must be at least 32; got 16"),
        ("--swa_start 2", "SWAG needs at least 2 snapshots; these settings take 1"),
        ("--lr_init 0", "--lr_init must be positive; got 0.0"),
        ("--model VGG16", "--model VGG16 is a network for classification, and this is segmentation"),
        ("--seeds 0", "--seeds must be at least 1; got 0"),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_is_written(
    camvid: Path, tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    try:
        status = run(path, camvid, *options.split())
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2 and not path.exists()
    assert message in capsys.readouterr().err
