"""MNIST and Fashion-MNIST: grey images of 28x28 pixels in idx files.

torchvision reads these from extracted files only and would have to write them first, so they are read here, gzipped or
not. Of a gzipped file the md5 sum must be the published one, which is torchvision's; an extracted file has none, so its
header, its length and its labels are what is checked.
"""

import gzip
import hashlib
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.common import SettingsError
from experiments.datasets.sources import InMemory, Source, how_to_fetch, import_torchvision

PREFIX = {True: "train", False: "t10k"}


def read_idx(folder: Path, name: str, shape: tuple[int, ...], md5: Mapping[str, str]) -> Tensor:
    """Read one idx file: bytes 0-3 magic (8 for uint8, then the number of axes), a 32-bit size an axis, the values.

    Args:
        folder: Folder with ``name.gz`` or ``name``; the first is preferred, since it can be checked.
        name: File name without suffix.
        shape: Expected sizes after the first.
        md5: Sums of the gzipped files by their names.

    Returns:
        uint8 (N, *shape).
    """
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)
    if path is None:
        raise SettingsError(f"there is no {name}.gz and no {name} in {folder}")
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            if hashlib.md5(raw, usedforsecurity=False).hexdigest() != md5[path.name]:
                raise SettingsError(f"{path} is damaged or another data set's: its md5 sum is not the published one")
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise SettingsError(f"cannot read {path}: {error}") from None
    axes = 1 + len(shape)
    start = 4 + 4 * axes
    sizes = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    if raw[:4] != bytes([0, 0, 8, axes]) or sizes[1:] != shape or len(raw) != start + int(np.prod(sizes)):
        wanted = ", ".join(["N", *map(str, shape)])
        raise SettingsError(f"{path} is not an idx file of shape ({wanted}): wrong header or length")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(sizes).copy())


def read_idx_pair(root: Path, train: bool, *, name: str) -> InMemory:
    """Read images and labels from ``root/NAME/raw``, ``root/raw`` or ``root`` itself."""
    import_torchvision(name)
    from torchvision import datasets

    published = getattr(datasets, name)
    prefix = PREFIX[train]
    folders = [root / name / "raw", root / "raw", root]
    folder = next((f for f in folders if any(f.glob(f"{prefix}-images-idx3-ubyte*"))), None)
    if folder is None:
        where = f"in it, in raw/ or in {name}/raw/"
        raise SettingsError(f"--data_path {root}: no {prefix}-images-idx3-ubyte(.gz) {where}; {how_to_fetch(name)}")
    md5 = dict(published.resources)
    images = read_idx(folder, f"{prefix}-images-idx3-ubyte", (28, 28), md5).unsqueeze(1)
    targets = read_idx(folder, f"{prefix}-labels-idx1-ubyte", (), md5).long()
    if len(images) != len(targets):
        raise SettingsError(f"{folder}: {len(images)} {prefix} images, but {len(targets)} labels")
    names = tuple(label.split(" - ")[0] for label in published.classes)
    if len(targets) and targets.max() >= len(names):
        raise SettingsError(f"{folder}: a {prefix} label is {targets.max()}; expected 0 to {len(names) - 1}")
    return InMemory(images, targets, names)


MNIST = Source(partial(read_idx_pair, name="MNIST"), (0.1307,), (0.3081,), how_to_fetch("MNIST"))
FASHION_MNIST = Source(partial(read_idx_pair, name="FashionMNIST"), (0.2860,), (0.3530,), how_to_fetch("FashionMNIST"))
