"""The weight vectors to average over; draws are identified by seeds, so that they need not all be held at once."""

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


def require_samples(num_samples: int) -> None:
    """Refuse an average over nothing.

    Args:
        num_samples: S.

    Raises:
        ShapeError: If S < 1.
    """
    if num_samples < 1:
        raise ShapeError(f"num_samples must be at least 1; got {num_samples}.")


def base_seed(generator: torch.Generator | None) -> int:
    """Draw the seed from which :func:`generator_of` makes many generators.

    Args:
        generator: Source; None takes torch's global generator.

    Returns:
        A number below 2^62.
    """
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device).item())


def generator_of(device: torch.device, seed: int, stream: int) -> torch.Generator:
    """Make the generator of one of many streams.

    Args:
        device: Where it draws.
        seed: From :func:`base_seed`.
        stream: Number of the stream; those below 2^32 are all different.

    Returns:
        A fresh generator.
    """
    return torch.Generator(device).manual_seed((seed + stream * _GOLDEN) % 2**63)


class WeightDraws(Collection[Tensor]):
    """S draws from a posterior, each from a generator of its own; what does not fit is drawn again when needed.

    Draw s depends on the posterior, the base seed and s only: not on S, on how many are kept, or on the order of use.
    A posterior whose draws are not exchangeable (a mixture that gives each component its share) has a method
    ``draw(s, generator=) -> (D,)``, which is then used in place of ``sample``.

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
        ShapeError: If ``num_samples`` < 1, or the posterior does not give ``(1, D)``, or ``(D,)`` from ``draw``.

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
        require_samples(num_samples)
        self._posterior = posterior
        self._num_samples = num_samples
        self._device = device or (torch.device("cpu") if generator is None else generator.device)
        self._target_device = target_device
        self._seed = base_seed(generator)
        first = self._draw(0)
        self.dim = first.numel()
        if max_bytes is None:
            free = available_memory(first.device)
            max_bytes = (_UNKNOWN_MEMORY if free is None else free) // 4
        keep = min(num_samples, max_bytes // max(first.nbytes, 1))
        self._kept = [first, *(self._draw(s) for s in range(1, keep))][:keep]

    def _draw(self, s: int) -> Tensor:
        generator = generator_of(self._device, self._seed, s)
        numbered = getattr(self._posterior, "draw", None)
        if callable(numbered):
            theta: Tensor = numbered(s, generator=generator)
            if theta.ndim != 1:
                raise ShapeError(f"posterior.draw({s}) must have shape (D,); got {tuple(theta.shape)}.")
        else:
            drawn = self._posterior.sample(1, generator=generator)
            if drawn.ndim != 2 or drawn.shape[0] != 1:
                raise ShapeError(f"posterior.sample(1) must have shape (1, D); got {tuple(drawn.shape)}.")
            theta = drawn[0]
        return theta if self._target_device is None else theta.to(self._target_device)

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


def weight_vectors(
    posterior: "SamplesWeights | Tensor",
    num_samples: int,
    layout: ParameterLayout,
    *,
    generator: torch.Generator | None = None,
    max_bytes: int | None = None,
    device: torch.device | None = None,
) -> Collection[Tensor]:
    """Give the weight vectors that a prediction averages over, from whatever describes them.

    Args:
        posterior: Given weights ``(D,)`` or ``(S, D)``; an ensemble, which has ``members(num=None) -> (m, D)`` (all,
            or ``num`` of them) and no ``draw``; or what draws weights.
        num_samples: S >= 1; an ensemble gives ``min(S, M)`` of its M members, given weights are taken as they are.
        layout: What a vector holds.
        generator: Source of the seeds of draws.
        max_bytes: As for :class:`WeightDraws`.
        device: The network's device, where draws are kept; None leaves them where they are made.

    Returns:
        Vectors ``(D,)``; the same ones in every iteration.

    Raises:
        ShapeError: If ``num_samples`` < 1 or the vectors do not fit the layout.
        TypeError: If ``posterior`` neither draws weights nor is a tensor.
    """
    if isinstance(posterior, Tensor):
        return _given(posterior, layout)
    if not callable(getattr(posterior, "sample", None)):  # a collector, say, instead of its posterior
        raise TypeError(
            "posterior must draw weights, sample(n, generator=), or be a tensor of weights; "
            f"got {type(posterior).__name__}."
        )
    require_samples(num_samples)
    members = getattr(posterior, "members", None)
    if callable(members) and not callable(getattr(posterior, "draw", None)):  # draws are made one at a time
        every: Tensor = members()
        return _given(every if num_samples >= len(every) else members(num_samples), layout)
    mean = getattr(posterior, "mean", None)
    origin = mean.device if isinstance(mean, Tensor) else generator.device if generator is not None else device
    draws = WeightDraws(posterior, num_samples, generator, max_bytes, origin, device)
    if draws.dim != layout.numel:
        raise ShapeError(f"The posterior must draw vectors of length {layout.numel} as in the layout; got {draws.dim}.")
    return draws


def _given(thetas: Tensor, layout: ParameterLayout) -> tuple[Tensor, ...]:
    if thetas.ndim not in (1, 2) or thetas.shape[-1] != layout.numel or len(thetas) == 0:
        raise ShapeError(
            f"Given weights must have shape ({layout.numel},) or (S, {layout.numel}) with S >= 1; "
            f"got {tuple(thetas.shape)}."
        )
    return tuple(thetas.unbind(0)) if thetas.ndim == 2 else (thetas,)
