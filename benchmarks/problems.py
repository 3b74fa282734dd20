"""Inputs of the benchmarks: Gaussians of a given size and rank, and networks to collect from."""

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.oracle import Oracle
from lowrank_bdl.parameters.layout import ParameterLayout

TILE = 2**20


@dataclass(frozen=True)
class Size:
    """What one comparison is made at: D coordinates and rank K, or a network by name."""

    numel: int
    rank: int
    dtype: str = "float32"
    device: str = "cpu"
    model: str | None = None
    seed: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes a number."""
        return getattr(torch, self.dtype).itemsize

    @property
    def dk_bytes(self) -> int:
        """Bytes of one D x K tensor, the unit of memory in the tables."""
        return self.numel * self.rank * self.itemsize


class GaussianProblem:
    """A posterior as SWAG makes them: weights ~0.05, standard deviations ~1e-3, deviations of decaying size.

    Inputs are made when they are first asked for, so that a measurement of memory holds only what its operation needs.
    """

    def __init__(self, size: Size) -> None:
        self.size, self.device, self.dtype = size, torch.device(size.device), getattr(torch, size.dtype)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def _normals(self, stream: int, *shape: int) -> Tensor:
        """Return seeded normals; beyond `TILE` columns they repeat, rescaled, since making them would take longest."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.size.seed + stream)
        result = torch.empty(shape, dtype=self.dtype, device=self.device)
        first = result[..., :TILE].copy_(
            torch.randn((*shape[:-1], min(TILE, shape[-1])), generator=generator, dtype=self.dtype, device=self.device)
        )
        for start in range(TILE, shape[-1], TILE):
            part = result[..., start : start + TILE]
            torch.mul(first[..., : part.shape[-1]], 1 + 0.5 * ((start // TILE * 7) % 5 - 2) / 4, out=part)
        return result

    @cached_property
    def storage(self) -> Tensor:
        """Deviations, (K, D)."""
        scale = 1e-3 / (1 + torch.arange(self.size.rank, dtype=self.dtype, device=self.device)).sqrt()
        return self._normals(1, self.size.rank, self.size.numel).mul_(scale.unsqueeze(-1))

    @cached_property
    def diag(self) -> Tensor:
        """Variances, (D,)."""
        return self._normals(2, self.size.numel).mul_(0.5).exp_().mul_(1e-6)

    @cached_property
    def mean(self) -> Tensor:
        """(D,)."""
        return self._normals(3, self.size.numel).mul_(0.05)

    @cached_property
    def value(self) -> Tensor:
        """A typical draw, (D,)."""
        weights = self._normals(4, self.size.rank)
        result = self._normals(5, self.size.numel).mul_(self.diag.sqrt()).add_(self.mean)
        return result.addmv_(self.storage.mT, weights)

    @cached_property
    def rhs(self) -> Tensor:
        """A right-hand side, (D,)."""
        return self._normals(6, self.size.numel)

    @cached_property
    def other_diag(self) -> Tensor:
        """Variances of a second Gaussian with the same deviations, (D,)."""
        return self.diag * 1.2

    @cached_property
    def other_mean(self) -> Tensor:
        """Its mean, (D,)."""
        return self.mean + 1e-4

    @cached_property
    def layout(self) -> ParameterLayout:
        """Sixteen parameters (fewer if D is small) of about equal size."""
        count = min(16, self.size.numel)
        step = self.size.numel // count
        sizes = [step] * (count - 1) + [self.size.numel - step * (count - 1)]
        names = tuple(f"layer{i}.{'weight' if i % 2 == 0 else 'bias'}" for i in range(count))
        return ParameterLayout(names, tuple(torch.Size((s,)) for s in sizes), (self.dtype,) * count)

    @cached_property
    def index(self) -> Tensor:
        """Coordinates of every second parameter: half of them, scattered, LongTensor."""
        index = self.layout.subset("*.weight")[1]
        assert isinstance(index, Tensor) or self.size.numel == 1
        return index.to(self.device) if isinstance(index, Tensor) else torch.arange(1, device=self.device)

    @cached_property
    def oracle(self) -> Oracle:
        """The float64 answers."""
        return Oracle(self.storage, self.diag, self.mean)

    @cached_property
    def scratch(self) -> Path:
        """A directory for files, deleted with the problem."""
        self._scratch = tempfile.TemporaryDirectory(prefix="benchmark-")
        return Path(self._scratch.name)

    def close(self) -> None:
        """Delete files and tensors."""
        if self._scratch is not None:
            self._scratch.cleanup()
        self.__dict__.clear()


class TensorBag(nn.Module):
    """A network without a forward pass: parameters of given shapes."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        self.tensors = nn.ParameterList(
            [0.05 * torch.randn(shape, generator=generator, dtype=dtype, device=device) for shape in shapes]
        )


def model_shapes(name: str) -> list[tuple[int, ...]]:
    """Return the shapes of a named network.

    ``"36M"``: few large tensors as in a WideResNet-28-10; ``"330-tensors"``: 1.7 M weights in many small ones as in a
    PreResNet-110; ``"tiny"`` for smoke runs.
    """
    if name == "36M":
        convolutions = [(640, 640, 3, 3)] * 9 + [(320, 320, 3, 3)] * 3 + [(160, 160, 3, 3)]
        return [(160, 16, 3, 3), *convolutions, *[(640,)] * 18, *[(320,)] * 6, (10, 640), (10,)]
    if name == "330-tensors":
        widths = [16] * 37 + [32] * 37 + [64] * 36
        return [shape for w in widths for shape in ((w, w, 3, 3), (w,), (w,))]
    if name == "tiny":
        return [(8, 4, 3, 3), (8,), (8, 8, 3, 3), (8,), (10, 8), (10,)]
    raise ValueError(f"unknown model {name!r}; expected 36M, 330-tensors or tiny.")


def model_numel(name: str) -> int:
    """Return the number of weights of a named network."""
    return sum(torch.Size(shape).numel() for shape in model_shapes(name))


class CollectProblem:
    """A network that moves a little between snapshots, as under SGD at a constant rate."""

    def __init__(self, size: Size) -> None:
        assert size.model is not None
        self.size, self.device, self.dtype = size, torch.device(size.device), getattr(torch, size.dtype)
        self.model = TensorBag(model_shapes(size.model), self.dtype, self.device)
        self.parameters = list(self.model.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        self.num_snapshots = size.rank + 2

    @torch.no_grad()
    def set_snapshot(self, step: int) -> None:
        """Set the weights of one iterate: a seeded step off the start."""
        generator = torch.Generator(self.device).manual_seed(step)
        for parameter, start in zip(self.parameters, self.start, strict=True):
            angle = 0.7 * step + torch.rand((), generator=generator, dtype=self.dtype, device=self.device)
            torch.add(start, torch.sin(start * 100 + angle), alpha=1e-3, out=parameter.data)

    def snapshots(self) -> Any:
        """Set every iterate in turn, the same ones each time; the last stays."""
        for step in range(self.num_snapshots):
            self.set_snapshot(step)
            yield step

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, unbiased variance and newest deviation of the iterates on a subset of coordinates, float64."""
        seen = torch.stack([self.subset(self.parameters) for _ in self.snapshots()])
        mean = seen.mean(0)
        return mean, seen.var(0), seen[-1] - mean

    def subset(self, tensors: list[Tensor], limit: int = 100_000) -> Tensor:
        """Return the leading coordinates of the first tensors as one float64 vector."""
        return torch.cat([t.detach().reshape(-1)[:limit] for t in tensors[:2]]).double()

    def subset_of_flat(self, flat: Tensor, limit: int = 100_000) -> Tensor:
        """Return the same coordinates of a flat vector."""
        first, second = (p.numel() for p in self.parameters[:2])
        return torch.cat((flat[:first][:limit], flat[first : first + second][:limit])).double()

    def close(self) -> None:
        """Drop the tensors."""
        self.__dict__.clear()
