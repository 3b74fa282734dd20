"""Posterior draws that are identified by seeds, so that they need not all be held at once."""

from collections.abc import Collection, Iterator
from typing import Protocol

import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.memory import available_memory
from lowrank_bdl.parameters.layout import ParameterLayout

_UNKNOWN_MEMORY = 4 << 30  # assumed free where the system does not say
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that seeds of different draws differ in every number of low bits


class SamplesWeights(Protocol):
    """Anything that draws weight vectors: a Gaussian, a mixture, an ensemble, a chain."""

    @property
    def layout(self) -> ParameterLayout | None:
        """What the vectors hold; None if unknown."""

    def sample(self, sample_shape: int, /, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, D)`` weight vectors."""


class WeightDraws(Collection[Tensor]):
    """S draws from a posterior, each from a generator of its own; what does not fit is drawn again when needed.

    Draw s depends on the posterior, the base seed and s only: not on S, on how many are kept, or on the order of use.

    Args:
        posterior: Draws weight vectors.
        num_samples: S >= 1.
        generator: Gives the base seed; None takes it from torch's global generator.
        max_bytes: Keep as many draws as fit in this; None allows a quarter of the free memory of the draws' device.
        device: Device of the posterior, whose draws need generators there; None is the generator's.
        target_device: Where to keep the draws, the network's device; None is where they are made.

    Attributes:
        dim: D.

    Raises:
        ShapeError: If ``num_samples`` < 1, or the posterior does not give ``(1, D)``.

    Cost: at most max(max_bytes, D numbers) of memory; iterating costs one draw for each that is not kept.

    Example:
        >>> class Coin:
        ...     layout = None
        ...     def sample(self, n, *, generator=None):
        ...         return torch.randint(2, (n, 1), generator=generator)
        >>> kept = WeightDraws(Coin(), 4, torch.Generator().manual_seed(0))
        >>> again = WeightDraws(Coin(), 4, torch.Generator().manual_seed(0), max_bytes=0)
        >>> [int(theta) for theta in kept] == [int(theta) for theta in again]
        True
    """

    def __init__(
        self,
        posterior: SamplesWeights,
        num_samples: int,
        generator: torch.Generator | None = None,
        max_bytes: int | None = None,
        device: torch.device | None = None,
        target_device: torch.device | None = None,
    ) -> None:
        if num_samples < 1:
            raise ShapeError(f"num_samples must be at least 1; got {num_samples}.")
        self._posterior = posterior
        self._num_samples = num_samples
        seed_device = torch.device("cpu") if generator is None else generator.device
        self._device = device or seed_device
        self._target_device = target_device
        self._seed = int(torch.randint(2**62, (), generator=generator, device=seed_device).item())
        first = self._draw(0)
        self.dim = first.numel()
        if max_bytes is None:
            free = available_memory(first.device)
            max_bytes = (_UNKNOWN_MEMORY if free is None else free) // 4
        keep = min(num_samples, max_bytes // max(first.nbytes, 1))
        self._kept = [first, *(self._draw(s) for s in range(1, keep))][:keep]

    def _draw(self, s: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed((self._seed + s * _GOLDEN) % 2**63)
        theta = self._posterior.sample(1, generator=generator)
        if theta.ndim != 2 or theta.shape[0] != 1:
            raise ShapeError(f"posterior.sample(1) must have shape (1, D); got {tuple(theta.shape)}.")
        return theta[0] if self._target_device is None else theta[0].to(self._target_device)

    @property
    def num_kept(self) -> int:
        """How many draws are held in memory."""
        return len(self._kept)

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._kept
        for s in range(len(self._kept), self._num_samples):
            yield self._draw(s)

    def __contains__(self, theta: object) -> bool:
        return isinstance(theta, Tensor) and any(torch.equal(theta, draw) for draw in self)
