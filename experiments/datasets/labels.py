"""Other labels than the official ones: corrupted labels from a file, and a subset of the classes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.common import SettingsError
from experiments.datasets.sources import P


def read_labels(path: str, num_images: int, num_classes: int) -> tuple[Tensor, dict[str, Any]]:
    """Read replacement labels for all official training images, as ``--label_arr`` of swa_gaussian's successors.

    Args:
        path: A ``.npy`` file of integers (N,), in the order of the official training images, pickles refused.
        num_images: N.
        num_classes: Labels are 0 to num_classes - 1.

    Returns:
        Labels (N,), and what identifies them in results.json.

    Raises:
        SettingsError: If the file cannot be read, or shape, type or range are wrong.
    """
    try:
        raw = Path(path).read_bytes()
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SettingsError(f"--label_arr {path}: cannot read it as a .npy file: {error}") from None
    if not isinstance(labels, np.ndarray):
        raise SettingsError(f"--label_arr {path}: expected one array in a .npy file; got an archive of arrays")
    if labels.shape != (num_images,):
        raise SettingsError(f"--label_arr {path}: expected shape ({num_images},); got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise SettingsError(f"--label_arr {path}: expected integers; got {labels.dtype}")
    if labels.min() < 0 or labels.max() >= num_classes:
        expected = f"expected 0 to {num_classes - 1}"
        raise SettingsError(f"--label_arr {path}: {expected}; got {labels.min()} to {labels.max()}")
    facts = {"file": Path(path).name, "sha256": hashlib.sha256(raw).hexdigest()}
    return torch.from_numpy(labels.astype(np.int64)), facts


def keep_classes(pool: P, classes: Sequence[int]) -> P:
    """Keep the images of these classes and number the classes 0, 1, ... in the given order.

    Raises:
        SettingsError: If no image is left.
    """
    new = torch.full((len(pool.class_names),), -1)
    new[list(classes)] = torch.arange(len(classes))
    kept = (new[pool.targets] >= 0).nonzero()[:, 0]
    if not len(kept):
        raise SettingsError(f"--split_classes: no image is of the classes {', '.join(map(str, classes))}")
    chosen = pool.select(kept)
    return chosen.relabelled(new[chosen.targets], tuple(pool.class_names[c] for c in classes))
