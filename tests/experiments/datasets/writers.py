"""Small files in the formats in which each data set is published, with random pixels and labels.

torchvision compares each file's md5 sum with the published one. The sums of the small files are put in the place of
the published ones, so that the same check runs on them.
"""

import gzip
import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def random_images(n: int, channels: int, size: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 (n, channels, size, size) and int64 (n,) in which every class occurs."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    return rng.integers(0, 256, (n, channels, size, size), dtype=np.uint8), labels


Written = dict[str, tuple[np.ndarray, np.ndarray]]  # "train" and "test": images (n, channels, size, size), labels (n,)


def write_idx(path: Path, array: np.ndarray, magic: int = 8) -> None:
    raw = bytes([0, 0, magic, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def write_mnist(root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "MNIST", suffix: str = ".gz") -> Written:
    from torchvision import datasets

    folder = root / name / "raw"
    folder.mkdir(parents=True)
    written: Written = {}
    resources = []
    for split, prefix, n in (("train", "train", 60), ("test", "t10k", 20)):
        images, labels = written[split] = random_images(n, 1, 28, 10, seed=n)
        for kind, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels.astype(np.uint8))):
            path = folder / f"{prefix}-{kind}-ubyte{suffix}"
            write_idx(path, array)
            resources.append((path.name, md5(path)))
    monkeypatch.setattr(getattr(datasets, name), "resources", resources)
    return written


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Written:
    """CIFAR-10: batches with "labels"; CIFAR-100: one file with "fine_labels"; rows are the three colour planes."""
    from torchvision import datasets

    published, classes = getattr(datasets, name), int(name.removeprefix("CIFAR"))
    folder = root / published.base_folder
    folder.mkdir(parents=True)

    def write(file: str, content: dict[str, Any]) -> str:
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        return md5(folder / file)

    key = "labels" if classes == 10 else "fine_labels"
    written: Written = {}
    for split, n in (("train", 2 * classes), ("test", classes)):
        images, labels = written[split] = random_images(n, 3, 32, classes, seed=n)
        files = [file for file, _ in getattr(published, f"{split}_list")]
        lists = []
        for rows, file in zip(np.array_split(np.arange(n), len(files)), files, strict=True):
            lists.append([file, write(file, {"data": images[rows].reshape(-1, 3072), key: labels[rows].tolist()})])
        monkeypatch.setattr(published, f"{split}_list", lists)
    meta = published.meta
    names = [f"class {i}" for i in range(classes)]
    monkeypatch.setattr(published, "meta", {**meta, "md5": write(meta["filename"], {meta["key"]: names})})
    return written


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """MATLAB files: X (32, 32, 3, n), y (n, 1) in 1 to 10, where 10 stands for the digit 0."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    written: Written = {}
    lists = {}
    for split, n in (("train", 50), ("test", 20)):
        images, labels = written[split] = random_images(n, 3, 32, 10, seed=n)
        path = root / f"{split}_32x32.mat"
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": y})
        lists[split] = [SVHN.split_list[split][0], path.name, md5(path)]
    monkeypatch.setattr(SVHN, "split_list", lists)
    return written


def write_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Binary files: a byte a value, each colour plane column by column; labels 1 to 10. No unlabelled images."""
    from torchvision.datasets import STL10

    folder = root / STL10.base_folder
    folder.mkdir()
    written: Written = {}
    for split, n in (("train", 50), ("test", 20)):
        images, labels = written[split] = random_images(n, 3, 96, 10, seed=n)
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        files = [[f"{split}_{kind}.bin", md5(folder / f"{split}_{kind}.bin")] for kind in "Xy"]
        unlabelled = STL10.train_list[2:] if split == "train" else []
        monkeypatch.setattr(STL10, f"{split}_list", [*files, *unlabelled])
    return written


def write_tree(folder: Path, classes: list[str], per_class: int, size: tuple[int, int], suffix: str) -> np.ndarray:
    """Write ``folder/CLASS/000.suffix``, ...; return the pixels (N, height, width, 3), sorted by class."""
    from PIL import Image

    rng = np.random.default_rng(len(classes))
    arrays = rng.integers(0, 256, (len(classes) * per_class, *size, 3), dtype=np.uint8)
    for number, array in enumerate(arrays):
        path = folder / classes[number // per_class] / f"{number % per_class:03}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return arrays
