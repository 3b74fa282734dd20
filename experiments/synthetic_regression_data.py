"""Regression on one number: the published set, or one like it, and what of it is held out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.common import SettingsError
from experiments.synthetic_regression_settings import Settings
from lowrank_bdl.models.mlp import MLP

FILE = "data.npy"
CLUSTERS = ((-7.2, -4.8), (-1.2, 1.2), (4.8, 7.2))  # where x lies in the published set
SHARES = (0.29, 0.34, 0.37)
NOISE_STD = 0.05  # about that of the published set
SPREAD = 0.5  # standard deviation of the drawn function over the clusters
MORE_ROWS = 200  # held-out rows between the clusters, of a drawn set


@dataclass(frozen=True)
class ToySet:
    """Numbers x and y, float64, shape (N,).

    Attributes:
        source: The file, or how the set was drawn.
        drawn: Whether it was drawn.
        digest: Of its numbers.
        train: Rows to learn from.
        held_out: Rows to judge by, by where they lie: "inside" the range of the training rows, "outside" it, and
            of a drawn set, whose function is known, in the "gaps" between its clusters.
    """

    source: str
    drawn: bool
    digest: str
    train: tuple[Tensor, Tensor]
    held_out: Mapping[str, tuple[Tensor, Tensor]]


def features(x: Tensor) -> Tensor:
    """Return (x / 2, (x / 2)²), the published inputs of the network, shape (N, 2), float32."""
    half = (x / 2).float()
    return torch.stack([half, half.square()], dim=-1)


def find_file(data_path: str) -> Path:
    """Find the file.

    Raises:
        SettingsError: If it is not there.
    """
    path = Path(data_path)
    for candidate in (path, path / FILE, path / "synthetic_regression" / FILE):
        if candidate.is_file():
            return candidate
    raise SettingsError(f"--data_path {data_path} is neither {FILE} nor a folder with it; leave it out to draw a set")


def read(path: Path) -> np.ndarray:
    """Read x and y, shape (N, 2).

    Raises:
        SettingsError: If the file holds no such numbers.
    """
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from None
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != 2 or len(table) < 30:
        raise SettingsError(f"{path} must hold an array (N, 2) of x and y, N >= 30; got {np.shape(table)}")
    if table.dtype.kind != "f" or not np.isfinite(table).all():
        raise SettingsError(f"{path} must hold finite floating-point numbers; got {table.dtype}")
    return table.astype(np.float64)


def draw(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a set like the published one: three clusters of x, and a random network as the function.

    Returns:
        The set (rows, 2), and more rows (n, 2) of the same function, between the clusters.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [round(share * rows) for share in SHARES[:-1]]
    counts.append(rows - sum(counts))
    parts = [
        low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
        for (low, high), count in zip(CLUSTERS, counts, strict=True)
    ]
    x = torch.cat(parts)[torch.randperm(rows, generator=generator)]
    sign = torch.rand(MORE_ROWS, generator=generator, dtype=torch.float64) < 0.5
    gap = CLUSTERS[1][1] + (CLUSTERS[2][0] - CLUSTERS[1][1]) * torch.rand(
        MORE_ROWS, generator=generator, dtype=torch.float64
    )
    between = torch.where(sign, -gap, gap)
    net = MLP(1, in_features=2, hidden=(50, 50))
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 1
            parameter.normal_(std=(2 / fan_in) ** 0.5, generator=generator)
        levels = net(features(torch.cat([x, between]))).squeeze(-1).double()
    levels = (levels - levels[:rows].mean()) * SPREAD / levels[:rows].std()
    noise = NOISE_STD * torch.randn(len(levels), generator=generator, dtype=torch.float64)
    table = torch.stack([torch.cat([x, between]), levels + noise], dim=-1).numpy()
    return table[:rows], table[rows:]


def load(settings: Settings) -> ToySet:
    """Read or draw the set, and hold rows out.

    The rows of largest |x| are "outside"; of the others, some at random are "inside".

    Raises:
        SettingsError: If there is no such file, or it cannot be used.
    """
    more = None
    if settings.data_path is not None:
        file = find_file(settings.data_path)
        table, source = read(file), str(file)
    else:
        table, more = draw(settings.rows, settings.seed)
        source = f"drawn with seed {settings.seed}: {settings.rows} rows like the published ones"
    rows = torch.from_numpy(table)
    outside = round(settings.outside_fraction * len(rows))
    inside = round(settings.test_fraction * len(rows))
    by_size = rows[:, 0].abs().argsort(stable=True)
    inner = by_size[: len(rows) - outside]
    order = inner[torch.randperm(len(inner), generator=torch.Generator().manual_seed(settings.seed))]
    parts = {"inside": order[:inside], "outside": by_size[len(rows) - outside :]}
    held_out = {name: (rows[chosen, 0], rows[chosen, 1]) for name, chosen in parts.items() if len(chosen)}
    if more is not None:
        held_out["gaps"] = (torch.from_numpy(more[:, 0]), torch.from_numpy(more[:, 1]))
    train = order[inside:].sort().values
    digest = hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()
    return ToySet(source, settings.data_path is None, digest, (rows[train, 0], rows[train, 1]), held_out)
