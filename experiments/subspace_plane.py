"""The posterior's density in the plane of a subspace's first two coordinates."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.common import replacing
from lowrank_bdl.subspaces.log_joint import LogJoint

MARGIN = 0.15  # of the range of the draws, on each side
AT_ONCE = 16  # points that one pass over the images serves


@dataclass(frozen=True)
class Plane:
    """A log-joint on a grid.

    Attributes:
        x: First coordinate, (G,).
        y: Second coordinate, (G,).
        log_joint: (G, G), rows along y [nats].
        others: The coordinates from the third on, where the plane lies, (k - 2,).
    """

    x: np.ndarray
    y: np.ndarray
    log_joint: np.ndarray
    others: np.ndarray


def density(path: Path, target: LogJoint, draws: Mapping[str, Tensor], grid: int, recipe: Any) -> Plane:
    """Evaluate the log-joint where draws of several methods lie, or read it if it was evaluated before.

    Args:
        path: File (.npz) that keeps it.
        target: The log-joint.
        draws: Coordinates (M, k) of each method; the plane goes through the mean of the first.
        grid: Points along each axis.
        recipe: What the numbers depend on beside the draws, as JSON gives it back.
    """
    first = next(iter(draws.values()))
    others = first[:, 2:].mean(0)
    shown = torch.cat(list(draws.values()))[:, :2]
    low, high = shown.min(0).values, shown.max(0).values
    room = (MARGIN * (high - low)).clamp(min=1e-3 * target.prior_std)
    axes = [torch.linspace(*bounds, grid, dtype=torch.float64) for bounds in zip(low - room, high + room, strict=True)]
    identity = json.dumps([recipe, *(axis.tolist() for axis in axes), others.tolist()])
    found = _read(path, identity)
    if found is not None:
        return found
    y, x = torch.meshgrid(axes[1], axes[0], indexing="ij")
    points = torch.cat([torch.stack([x.flatten(), y.flatten()], -1), others.expand(grid * grid, -1)], -1)
    with torch.no_grad():
        parts = tqdm(points.split(AT_ONCE), path.stem, unit="part", leave=False)
        values = torch.cat([target(part) for part in parts]).cpu()
    plane = Plane(axes[0].numpy(), axes[1].numpy(), values.view(grid, grid).numpy(), others.numpy())
    with replacing(path) as file:
        np.savez(file, x=plane.x, y=plane.y, log_joint=plane.log_joint, others=plane.others, identity=identity)
    return plane


def _read(path: Path, identity: str) -> Plane | None:
    try:
        with np.load(path) as arrays:
            if str(arrays["identity"]) != identity:
                return None
            return Plane(*(arrays[name] for name in ("x", "y", "log_joint", "others")))
    except (OSError, ValueError, KeyError):
        return None
