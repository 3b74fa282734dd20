"""What `experiments.imagenet` starts from: a tree of generated images, and weights out of a file."""

import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from experiments.common import SettingsError


def write_tree(root: Path, classes: int, per_class: int, size: int, seed: int = 0) -> None:
    """Write train/ and val/ with a folder a class of JPEG images: stripes whose direction and colours are the class's.

    Phase, width, contrast and noise differ from image to image. The files are a function of the arguments; those that
    are there already are left alone.

    Args:
        root: Made if it is not there.
        classes: Number of classes.
        per_class: Training images of each; half as many, rounded up, are for testing.
        size: Height and width [pixels]; training crops parts of it.
        seed: Of the images.
    """
    for split, count in (("train", per_class), ("val", -(-per_class // 2))):
        for c in tqdm(range(classes), desc=f"generating {split}", unit="class", leave=False, disable=None):
            folder = root / split / f"class{c:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                path = folder / f"{i:04d}.jpg"
                if not path.exists():
                    rng = np.random.default_rng([seed, c, i, split == "val"])
                    _save(path, _stripes(rng, c / classes, size))


def _stripes(rng: np.random.Generator, position: float, size: int) -> np.ndarray:
    """Pixels (size, size, 3), uint8; `position` in [0, 1) is the class's on the circle of directions and colours."""
    y, x = np.mgrid[:size, :size] / size
    angle = np.pi * position + rng.normal(0, 0.06)
    wave = np.sin(2 * np.pi * (rng.uniform(3, 7) * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform()))
    hue = 2 * np.pi * (position + np.arange(3) / 3)
    color = 0.5 + 0.18 * np.cos(hue) * rng.uniform(0.5, 1.5) + rng.normal(0, 0.08, 3)
    image = color + rng.uniform(0.1, 0.3) * wave[..., None] + rng.normal(0, 0.12, (size, size, 3))
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)


def _save(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    temporary = path.with_suffix(".partial")
    Image.fromarray(pixels).save(temporary, format="JPEG", quality=90)
    temporary.replace(path)


def load_weights_(model: nn.Module, path: str) -> None:
    """Put the weights and buffers of a file into a network; all of them must fit.

    Args:
        model: The network.
        path: A state dict, as safetensors or as torch saves it (read without unpickling anything but tensors).

    Raises:
        SettingsError: If the file is none, or of another network.
    """
    try:
        state = load_file(path) if path.endswith(".safetensors") else _tensors(path)
        model.load_state_dict(state)
    except (RuntimeError, OSError, ValueError, TypeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise SettingsError(f"--weights {path}: {' '.join(str(error).split())[:300]}") from None


def _tensors(path: str) -> dict[str, Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise TypeError(f"expected a state dict; got {type(found).__name__}")
    return found
