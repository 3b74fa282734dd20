"""Trees of image files: read exactly, in an order that is a function of the generator, with damage named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from experiments.common import SettingsError
from experiments.datasets import Datasets, LabelledImages, Split, load_dataset
from experiments.datasets.image_folder import StreamedSplit
from tests.experiments.datasets.writers import write_tree

CLASSES = ["ant", "bee", "cat"]
RAW = dict(mean=[0] * 3, std=[1] * 3)


def load(root: Path, **options: object) -> Datasets:
    return load_dataset("ImageFolder", str(root), **{"image_size": 8, **RAW, **options})


def read(split: LabelledImages, batch_size: int = 4) -> Split:
    return Split.concatenate(Split(*batch) for batch in split.batches(batch_size))


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Ten PNG files of 8x8 pixels a class for training, two for testing: (N, 3, 8, 8) in [0, 1], sorted by class."""
    found = {}
    for name, per_class in (("train", 10), ("val", 2)):
        arrays = write_tree(tmp_path / name, CLASSES, per_class, (8, 8), "png")
        found[name] = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    return found


def test_files_are_read_back_exactly(tmp_path: Path, tree: dict[str, torch.Tensor]) -> None:
    data = load(tmp_path, use_test=True)
    for split, name, per_class in ((data.train, "train", 10), (data.test, "val", 2)):
        whole = read(split)
        assert torch.equal(whole.inputs, tree[name]) and len(split) == 3 * per_class
        assert whole.targets.tolist() == split.targets.tolist() == [c for c in range(3) for _ in range(per_class)]
    assert data.validation is None and data.class_names == tuple(CLASSES)
    assert (data.num_classes, data.channels, data.image_size) == (3, 3, 8)


def test_jpeg_files_are_those_that_pillow_reads(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_tree(tmp_path / name, CLASSES, 1, (16, 16), "jpg")
    Image.new("L", (16, 16), 77).save(tmp_path / "test" / "bee" / "001.png")  # grey becomes RGB
    paths = [tmp_path / "test" / file for file in ("ant/000.jpg", "bee/000.jpg", "bee/001.png", "cat/000.jpg")]
    expected = torch.stack([pil_to_tensor(Image.open(path).convert("RGB")) for path in paths]) / 255
    whole = read(load(tmp_path, use_test=True, image_size=16).test)
    assert torch.equal(whole.inputs, expected) and whole.targets.tolist() == [0, 1, 1, 2]


def test_validation_images_are_a_fixed_random_tenth(tmp_path: Path, tree: dict[str, torch.Tensor]) -> None:
    data, again = load(tmp_path), load(tmp_path)
    train, held_out = read(data.train), read(data.validation)
    assert (len(train), len(held_out)) == (27, 3) and data.test is None
    assert torch.equal(held_out.inputs, read(again.validation).inputs)
    together = torch.cat([train.inputs, held_out.inputs]).flatten(1)
    assert torch.equal(together.unique(dim=0), tree["train"].flatten(1).unique(dim=0)) and len(together) == 30
    assert held_out.targets.tolist() != [2, 2, 2]  # the last files are all of one class
    assert data.facts["validation"] == "a fixed random choice of 3 of the 30 official training images"


def test_a_tree_with_val_and_test_has_its_own_validation_images(tmp_path: Path, tree: dict[str, torch.Tensor]) -> None:
    test = torch.from_numpy(write_tree(tmp_path / "test", CLASSES, 1, (8, 8), "png")).permute(0, 3, 1, 2) / 255
    data = load(tmp_path, use_test=True, validation=True)
    assert torch.equal(read(data.validation).inputs, tree["val"]) and torch.equal(read(data.test).inputs, test)
    assert len(data.train) == 30 and data.facts["validation"] == "the data set's own validation images"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_is_that_of_images_in_memory(tmp_path: Path, tree: dict[str, torch.Tensor], num_workers: int) -> None:
    data, before = load(tmp_path, use_test=True, num_workers=num_workers), torch.get_rng_state()
    streamed = data.train.shuffled(7, torch.Generator().manual_seed(5))
    resident = Split(tree["train"], data.train.targets).shuffled(7, torch.Generator().manual_seed(5))
    assert len(streamed) == len(resident) == 5
    for _ in range(2):  # re-iterable
        for (inputs, targets), (expected, labels) in zip(streamed, resident, strict=True):
            assert torch.equal(inputs, expected) and torch.equal(targets, labels)
    assert torch.equal(torch.get_rng_state(), before)  # a DataLoader left alone would have drawn from it


def test_larger_images_are_resized_and_cropped_as_for_imagenet(tmp_path: Path) -> None:
    """The shorter side becomes 256/224 of the size; of a picture with a bright half, that half stays where it was."""
    for name in ("train", "test"):
        picture = np.zeros((40, 80, 3), np.uint8)
        picture[:, 40:] = 255
        (tmp_path / name / "half").mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / name / "half" / "0.png")
    data = load(tmp_path, use_test=True, image_size=14)
    image = read(data.test).inputs[0]
    assert image.shape == (3, 14, 14)
    assert (image[:, :, :6] == 0).all() and (image[:, :, 8:] == 1).all()
    rows = np.arange(32, dtype=np.uint8) * 8
    Image.fromarray(np.broadcast_to(rows[:, None, None], (32, 32, 3)).copy()).save(tmp_path / "test/half/0.png")
    found = read(load(tmp_path, use_test=True, image_size=14).test).inputs[0, 0, :, 0] * 255
    # 32 rows become 16, each the mean of a few around its centre; the central 14 are rows 1 to 14
    assert found.tolist() == pytest.approx([8 * (2 * row + 0.5) for row in range(1, 15)], abs=1.5)


def test_first_selects_files_and_normalisation_is_applied(tmp_path: Path, tree: dict[str, torch.Tensor]) -> None:
    data = load(tmp_path, use_test=True, mean=[0.5, 0.25, 0.0], std=[0.5, 0.25, 2.0])
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    whole = read(data.train.first(13))
    torch.testing.assert_close(whole.inputs, (tree["train"][:13] - mean) / std, rtol=1e-6, atol=1e-6)
    assert whole.targets.tolist() == [0] * 10 + [1] * 3 and len(data.train.first(99)) == 30


def test_labels_limits_and_default_size(tmp_path: Path, tree: dict[str, torch.Tensor]) -> None:
    np.save(tmp_path / "labels.npy", np.full(30, 2))
    data = load(tmp_path, label_arr=str(tmp_path / "labels.npy"), train_limit=6, image_size=None)
    assert data.train.targets.tolist() == [2] * 6 and data.train.shape == (3, 224, 224)
    assert load_dataset("ImageFolder", str(tmp_path)).mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_named_in_one_line(tmp_path: Path, tree: dict[str, torch.Tensor], num_workers: int) -> None:
    path = tmp_path / "train" / "bee" / "003.png"
    path.write_bytes(path.read_bytes()[:-40])
    data = load(tmp_path, use_test=True, num_workers=num_workers)
    with pytest.raises(SettingsError, match="^cannot read the image .*003.png: [^\n]+$"):
        list(data.train.batches(8))
    path.write_bytes(b"no picture at all")
    with pytest.raises(SettingsError, match="^cannot read the image .*003.png: cannot identify image file[^\n]*$"):
        list(data.train.batches(8))


def test_trees_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no train/ in it; DIR holds train/CLASS"):
        load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(SettingsError, match="train: Couldn't find any class folder"):
        load(tmp_path)
    write_tree(tmp_path / "train", CLASSES, 4, (8, 8), "png")
    with pytest.raises(SettingsError, match="there is no test/ and no val/ in it"):
        load(tmp_path, use_test=True)
    write_tree(tmp_path / "val", ["ant", "bee", "dog"], 1, (8, 8), "png")
    with pytest.raises(SettingsError, match="its classes are not those of train/; in only one of them: cat, dog"):
        load(tmp_path, use_test=True)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(SettingsError, match="^[^\n]*train: Found no valid file for the classes empty[^\n]*$"):
        load(tmp_path)


def test_random_crops_are_a_function_of_the_seed(tmp_path: Path, tree: dict[str, torch.Tensor]) -> None:
    write_tree(tmp_path / "large" / "train", CLASSES, 3, (40, 56), "png")
    write_tree(tmp_path / "large" / "val", CLASSES, 1, (40, 56), "png")
    split = load(tmp_path / "large", use_test=True, image_size=16).train
    assert isinstance(split, StreamedSplit)
    state = torch.get_rng_state()
    batches = split.random_crops(4, seed=3)
    first, again = list(batches), list(batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(targets) for _, targets in first] == [4, 4, 1] and len(batches) == 3
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, again, strict=True))
    assert first[0][0].shape == (4, 3, 16, 16)
    assert sorted(torch.cat([targets for _, targets in first]).tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    other = next(iter(split.random_crops(4, seed=4)))[0]
    assert not torch.equal(first[0][0], other)
    in_batches_of_2 = torch.cat([images for images, _ in split.random_crops(2, seed=3)])
    assert torch.equal(torch.cat([images for images, _ in first]), in_batches_of_2)
