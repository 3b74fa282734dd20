"""Draws in a subspace as a posterior over the weights; no vector of weights is held until it is asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import sample_size
from lowrank_bdl.posteriors.storage import StoredPosterior, required
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.subspace import Subspace


@exact_methods
class SubspacePosterior(StoredPosterior, kind="subspace posterior"):
    r"""The uniform distribution over the weights at M coordinates, :math:`\frac1M \sum_m \delta_{\theta(z_m)}`.

    It holds the subspace and M k numbers. In :func:`lowrank_bdl.predict`, S samples are S of its draws, each used once
    while there are as many, spread evenly over the chains and their length; ask for S = M (or a multiple) to average
    over all.

    Args:
        subspace: :math:`\theta(z) = \hat\theta + P z`.
        draws: z: :class:`~lowrank_bdl.subspaces.draws.Draws`, or shape ``(M, k)``.
        provenance: Where it came from, as JSON scalars by name; None takes it from the draws.

    Attributes:
        subspace: As given.
        coordinates: z, shape ``(M, k)``, chain after chain.
        layout: The subspace's.
        provenance: As given; saved with the posterior.

    Raises:
        ShapeError: If the draws are not ``(M, k)``, M >= 1, with the subspace's k.
        NonFiniteError: If one is not finite.

    Example:
        >>> line = Subspace(None, torch.zeros(3), torch.tensor([[1.0], [2.0], [0.0]]))
        >>> posterior = SubspacePosterior(line, torch.tensor([[-1.0], [0.0], [1.0], [4.0]]))
        >>> posterior.mean, posterior.stddev
        (tensor([1., 2., 0.]), tensor([1.8708, 3.7417, 0.0000]))
        >>> posterior.members(2)
        tensor([[0., 0., 0.],
                [4., 8., 0.]])
        >>> [posterior.draw(s)[0].item() for s in range(5)]
        [-1.0, 1.0, 0.0, 4.0, -1.0]
    """

    def __init__(
        self, subspace: Subspace, draws: "Draws | Tensor", provenance: Mapping[str, Any] | None = None
    ) -> None:
        if isinstance(draws, Draws):
            facts = {"source": draws.method, "num_evaluations": draws.num_evaluations, "seconds": draws.seconds}
            provenance = facts if provenance is None else provenance
        coordinates = (draws.flat if isinstance(draws, Draws) else draws).detach()
        if coordinates.ndim != 2 or not len(coordinates) or coordinates.shape[1] != subspace.rank:
            raise ShapeError(f"draws must have shape (M, {subspace.rank}) with M >= 1; got {tuple(coordinates.shape)}.")
        bad = (~coordinates.isfinite()).any(1)
        if bool(bad.any()):
            raise NonFiniteError(f"draws must be finite; draw {int(bad.int().argmax())} is not.")
        self.subspace = subspace
        self.coordinates = coordinates
        self.layout: ParameterLayout | None = subspace.layout
        self.provenance: dict[str, Any] = dict(provenance or {})
        self._order = _spread(len(coordinates))

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.coordinates)

    def to_theta(self, z: Tensor) -> Tensor:
        """Return the weights ``(*S, D)`` at coordinates ``(*S, k)``."""
        return self.subspace.to_theta(z.to(self.subspace.origin))

    # ---- draws --------------------------------------------------------------------------------------------------

    def draw(self, s: int, generator: torch.Generator | None = None) -> Tensor:
        """Return draw number s of a sequence whose first S members are spread evenly over all M, whatever S is.

        Args:
            s: Number, from 0; number M is number 0 again.
            generator: Not used: nothing is random.

        Returns:
            Shape ``(D,)``.

        Cost: one read of the basis.
        """
        return self.to_theta(self.coordinates[self._order[s % self.num_members]])

    def sample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw members with replacement.

        Args:
            n: How many, or a shape S (``torch.Size()`` for one plain vector).
            generator: Source of the randomness; None means torch's default generator.

        Returns:
            Shape ``(n, D)`` or ``(*S, D)``.
        """
        device = self.coordinates.device if generator is None else generator.device
        chosen = torch.randint(self.num_members, sample_size(n), generator=generator, device=device)
        return self.to_theta(self.coordinates[chosen.to(self.coordinates.device)])

    def members(self, num: int | None = None) -> Tensor:
        """Return weight vectors, each once.

        Args:
            num: How many of the M, evenly spaced and the last among them; None for all.

        Returns:
            Shape ``(num, D)``: as much memory as that.

        Raises:
            ValueError: If ``num`` is not between 1 and M.
        """
        total = self.num_members
        num = total if num is None else num
        if not 1 <= num <= total:
            raise ValueError(f"the number of members must be between 1 and {total}; got {num}.")
        return self.to_theta(self.coordinates[[(i + 1) * total // num - 1 for i in range(num)]])

    # ---- moments ------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """The mean of the weights, shape ``(D,)`` [parameter]. Cost: one read of the basis."""
        return self.to_theta(self.coordinates.mean(0))

    @property
    def stddev(self) -> Tensor:
        """Marginal standard deviations of the weights (divisor M), shape ``(D,)`` [parameter].

        Cost: k reads of the basis; memory 3 D.
        """
        offsets = self.coordinates.double() - self.coordinates.double().mean(0)
        values, vectors = torch.linalg.eigh(offsets.mT @ offsets / self.num_members)
        variance = torch.zeros_like(self.subspace.origin)
        for value, vector in zip(values.clamp(min=0), vectors.mT, strict=True):
            variance += (self.to_theta(value.sqrt() * vector) - self.subspace.origin).square()
        return variance.sqrt()

    # ---- files --------------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> "SubspacePosterior":
        """Return the posterior on another device or in another dtype, as ``torch.Tensor.to``; draws keep theirs."""
        return SubspacePosterior(self.subspace.to(*args, **kwargs), self.coordinates, self.provenance)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the coordinates, and the subspace's own state."""
        tensors, metadata = self.subspace.to_state()
        named = {f"subspace.{name}": tensor for name, tensor in tensors.items()}
        return {"coordinates": self.coordinates, **named}, {"subspace": metadata}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the posterior of :meth:`to_state`."""
        (coordinates,) = required(tensors, "coordinates")
        prefix = "subspace."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        described = metadata.get("subspace")
        if not isinstance(described, dict):
            raise TypeError(f"the subspace must be an object; got {described!r:.80}")
        return cls(Subspace.from_state(own, described), coordinates, provenance)

    def __repr__(self) -> str:
        size = f"num_members={self.num_members}, rank={self.subspace.rank}, numel={self.subspace.origin.numel()}"
        return f"SubspacePosterior({size}, dtype={self.subspace.origin.dtype})"


def _spread(total: int) -> list[int]:
    """Order 0 to total - 1 so that every beginning is spread evenly: by the radical inverse in base 2."""
    bits = max(1, (total - 1).bit_length())
    reversed_bits = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [number for number in reversed_bits if number < total]
