"""Corruptions of bytes: from a seed, more and more of them, one severity a file; and what is read back."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import corruptions
from experiments.common import SettingsError, to_json
from experiments.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
    file_name,
    generator_for,
    load_corrupted,
    names_for,
    read_images,
    write_images,
)
from experiments.datasets import load_dataset
from tests.experiments.datasets.writers import write_cifar

# The same change whatever the generator says
CERTAIN = {
    "gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "saturate", "jpeg_compression", "pixelate",
}  # fmt: skip
# Not more and more of one thing; see the module
UNEVEN = {"saturate", "glass_blur", "elastic_transform", "motion_blur"}


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Pieces of the two photographs that ship with scikit-learn: (70, 32, 32, 3), uint8."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pieces = []
    for photograph in load_sample_images().images:
        small = np.asarray(Image.fromarray(photograph).reduce(2))
        rows, columns = (size // 32 for size in small.shape[:2])
        pieces += [small[32 * r : 32 * r + 32, 32 * c : 32 * c + 32] for r in range(rows) for c in range(columns)]
    return torch.from_numpy(np.stack(pieces)[::2].copy())


def changes(images: Tensor, name: str, severities: Sequence[int] = SEVERITIES) -> list[float]:
    """Mean absolute change of a pixel at each severity, with the same draws."""
    generators = (torch.Generator().manual_seed(0) for _ in severities)
    found = (corrupt(images, name, s, g) for s, g in zip(severities, generators, strict=True))
    return [(each.double() - images.double()).abs().mean().item() for each in found]


def test_there_are_at_least_twelve_and_five_severities_of_each() -> None:
    assert len(CORRUPTIONS) >= 12 and all(len(kind.parameters) == 5 for kind in CORRUPTIONS.values())
    assert len(set(names_for(3))) == len(CORRUPTIONS)
    assert set(names_for(3)) - set(names_for(1)) == {"saturate"}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_generator_decides_and_nothing_else(name: str, photographs: Tensor) -> None:
    images = photographs[:6]
    before, kept = torch.get_rng_state(), images.clone()
    first, again, other = (corrupt(images, name, 3, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert first.dtype == torch.uint8 and first.shape == images.shape and first.is_contiguous()
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name in CERTAIN)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(images, kept)
    assert not torch.equal(first, images)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - UNEVEN))
def test_damage_grows_with_severity(name: str, photographs: Tensor) -> None:
    found = changes(photographs, name)
    assert found[0] > 0.5 and all(low < high for low, high in zip(found, found[1:], strict=False)), found


def test_damage_of_uneven_corruptions(photographs: Tensor) -> None:
    less, least, more, most, extreme = changes(photographs, "saturate")
    assert less < least and more < most < extreme  # colours turned down; up
    one, two, three, four, five = changes(photographs, "motion_blur")
    assert one < two < three == pytest.approx(four, abs=1e-3) and four < five
    one, two, three, four, five = changes(photographs, "glass_blur")
    assert max(one, two, three) < min(four, five)  # a second round of swaps
    assert two > three and four > five  # with equal swaps, smoothing brings neighbours together
    affine = changes(photographs, "elastic_transform")
    assert min(affine) > 5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grey_and_oblong_images(name: str, photographs: Tensor) -> None:
    grey = photographs[:3, :28, :24, :1].contiguous()
    if name == "saturate":
        with pytest.raises(SettingsError, match="saturate needs colours; the images are grey"):
            corrupt(grey, name, 1, torch.Generator())
        return
    found = corrupt(grey, name, 5, torch.Generator().manual_seed(0))
    assert found.shape == grey.shape and found.dtype == torch.uint8 and not torch.equal(found, grey)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_image_has_draws_of_its_own(name: str, photographs: Tensor) -> None:
    same = (photographs[4:5] // 2).expand(4, -1, -1, -1)  # darker, so that no draw is lost in white
    found = corrupt(same, name, 5, torch.Generator().manual_seed(0))
    differ = [not torch.equal(found[0], other) for other in found[1:]]
    assert differ == [name not in CERTAIN] * 3


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_image_leaks_into_another(name: str, photographs: Tensor) -> None:
    """With the same draws an image becomes the same, whatever lies beside it."""
    images = photographs[:4].contiguous()
    others = images.clone()
    others[[0, 1, 3]] = 255 - others[[0, 1, 3]]
    found, changed = (corrupt(each, name, 4, torch.Generator().manual_seed(0)) for each in (images, others))
    if name == "shot_noise":  # draws a random number of random numbers for each pixel
        found, changed = (corrupt(each[2:], name, 4, torch.Generator().manual_seed(0)) for each in (images, others))
        assert torch.equal(found[0], changed[0])
    else:
        assert torch.equal(found[2], changed[2]) and not torch.equal(found[1], changed[1])


@pytest.mark.parametrize("name", ["gaussian_noise", "contrast", "fog"])
def test_more_images_than_are_corrupted_at_once(
    name: str, photographs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = photographs[:7]
    monkeypatch.setattr(corruptions, "_CHUNK", 3)
    found = corrupt(images, name, 2, torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(0)
    expected = torch.cat([corrupt(images[start : start + 3], name, 2, draws) for start in (0, 3, 6)])
    assert torch.equal(found, expected)


def test_values_are_rounded_and_bounded() -> None:
    image = torch.tensor([0, 1, 99, 100, 254, 255], dtype=torch.uint8).view(1, 1, 6, 1)
    found = corrupt(image, "brightness", 1, torch.Generator())  # 0.05 of 255 is 12.75
    assert found.flatten().tolist() == [13, 14, 112, 113, 255, 255]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"name": "frost"}, "unknown corruption 'frost'; known are "),
        ({"severity": 0}, "the severity must be 1 to 5; got 0"),
        ({"severity": 6}, "the severity must be 1 to 5; got 6"),
        (
            {"images": torch.zeros(1, 8, 8, 3)},
            "images must be uint8 of shape .N, H, W, C., C = 1 or 3; got torch.float32",
        ),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, r"got torch.uint8 of \(1, 3, 8, 8\)"),
        ({"images": torch.zeros(8, 8, 3, dtype=torch.uint8)}, r"got torch.uint8 of \(8, 8, 3\)"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    usual = {"images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "name": "fog", "severity": 1}
    with pytest.raises(SettingsError, match=message):
        corrupt(**{**usual, **change}, generator=torch.Generator())  # type: ignore[arg-type]


def test_generators_depend_on_seed_name_and_severity() -> None:
    keys = [(seed, name, severity) for seed in (0, 1) for name in CORRUPTIONS for severity in SEVERITIES]
    seeds = [generator_for(*key).initial_seed() for key in keys]
    assert len(set(seeds)) == len(keys) and seeds == [generator_for(*key).initial_seed() for key in keys]
    assert generator_for(0, "fog", 1).initial_seed() == 7966057361835709363  # the same on every machine


# ---- files -----------------------------------------------------------------------------------------------------------


def write(
    folder: Path, shape: tuple[int, ...] = (20, 32, 32, 3), labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(len(images)) % 10 if labels is None else labels
    write_images(folder / file_name("fog", 2), images, labels)
    return images, labels


def test_images_are_normalised_as_the_networks_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    data = load_dataset("CIFAR10", str(tmp_path))
    images, labels = write(tmp_path)
    found = load_corrupted(tmp_path, "fog", 2, data)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    expected = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.inputs.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.targets, labels)
    with np.load(tmp_path / "fog_2.npz") as file:
        assert sorted(file) == ["data", "labels"] and file["data"].dtype == file["labels"].dtype == np.uint8


def test_half_of_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    _, labels = write(tmp_path)
    whole = load_corrupted(tmp_path, "fog", 2, load_dataset("CIFAR10", str(tmp_path)))
    found = load_corrupted(tmp_path, "fog", 2, load_dataset("CIFAR10", str(tmp_path), split_classes=1))
    kept = torch.isin(labels, torch.tensor([3, 4, 5, 6, 7]))
    assert torch.equal(found.inputs, whole.inputs[kept]) and torch.equal(found.targets, labels[kept] - 3)


def test_the_published_layout_is_read_one_severity_at_a_time(tmp_path: Path) -> None:
    images, labels = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8), np.arange(50) % 10
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", labels.astype(np.uint8))
    for severity in SEVERITIES:
        found = read_images(tmp_path, "fog", severity)
        part = slice(10 * (severity - 1), 10 * severity)
        assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), images[part])
        assert found.targets.tolist() == labels[part].tolist()
    data = load_dataset("digits")
    assert load_corrupted(tmp_path, "fog", 5, data).inputs.shape == (10, 1, 8, 8)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    data = load_dataset("digits")
    with pytest.raises(SettingsError, match=r"there is no .*fog_2.npz; python -m experiments.corrupt makes it"):
        load_corrupted(tmp_path, "fog", 2, data)
    with pytest.raises(SettingsError, match="the severity must be 1 to 5; got 6"):
        load_corrupted(tmp_path, "fog", 6, data)
    write(tmp_path)
    with pytest.raises(
        SettingsError, match=re.escape("have shape (3, 32, 32); the network for digits takes (1, 8, 8)")
    ):
        load_corrupted(tmp_path, "fog", 2, data)
    write(tmp_path, (4, 8, 8, 1), torch.tensor([0, 1, 2, 10]))
    with pytest.raises(SettingsError, match="fog has label 10; digits has 10 classes"):
        load_corrupted(tmp_path, "fog", 2, data)
    write(tmp_path, (4, 8, 8, 1))
    path = tmp_path / "fog_2.npz"
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(SettingsError, match=r"cannot read .*fog_2.npz: .*; delete it and make it again"):
            load_corrupted(tmp_path, "fog", 2, data)
    np.savez(path, data=np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(SettingsError, match=r"cannot read .*fog_2.npz: .*labels"):
        load_corrupted(tmp_path, "fog", 2, data)
    np.savez(path, data=np.zeros((4, 8, 8, 1)), labels=np.zeros(4, int))
    with pytest.raises(SettingsError, match=r"expected uint8 images .N, H, W, C.; got float64 of \(4, 8, 8, 1\)"):
        load_corrupted(tmp_path, "fog", 2, data)
    for labels in (np.zeros(3, int), np.zeros(4), np.array([0, 1, 2, -1])):
        np.savez(path, data=np.zeros((4, 8, 8, 1), np.uint8), labels=labels)
        with pytest.raises(SettingsError, match="expected 4 labels, integers from 0; got "):
            load_corrupted(tmp_path, "fog", 2, data)
    write(tmp_path, (4, 8, 8, 1))
    (tmp_path / "settings.json").write_text(to_json({"dataset": "MNIST"}))
    with pytest.raises(SettingsError, match="holds corrupted images of MNIST; the network was trained on digits"):
        load_corrupted(tmp_path, "fog", 2, data)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = write(tmp_path)
    before = (tmp_path / "fog_2.npz").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_images(tmp_path / "fog_2.npz", 255 - images, torch.zeros(20))
    assert (tmp_path / "fog_2.npz").read_bytes() == before
