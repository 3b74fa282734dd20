"""Several surfaces of low loss as one posterior: ESPRO, ensembles over curves."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import sample_size
from lowrank_bdl.posteriors.storage import StoredPosterior, join_states, layout_difference, split_states


class Surface(Protocol):
    """What an ensemble of surfaces is made of: anything that draws weights."""

    @property
    def layout(self) -> ParameterLayout | None:
        """What the vectors hold; None if unknown."""

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw, shape ``(n, D)``."""


@exact_methods
class SurfaceEnsemble(StoredPosterior, kind="surface ensemble"):
    """The mixture of M surfaces' distributions in equal shares; there is no density.

    With simplexes grown from independent networks this is ESPRO: ``lb.predict`` with ``num_samples=M * n`` averages
    over n points of each.

    Args:
        surfaces: M complexes, curves, or whatever has ``layout`` and ``sample(n, generator=)``, over the same
            parameters.
        provenance: Where it came from, as JSON values by name.

    Attributes:
        surfaces: As given.
        layout: That of the surfaces.
        provenance: As given; saved with the ensemble.

    Raises:
        ShapeError: If there is no surface, or they are over different parameters.
        TypeError: If one does not draw weights.

    Source: ESPRO of Benton et al., "Loss Surface Simplexes for Mode Connecting Volumes and Fast Ensembling" (2021).

    Example:
        >>> from lowrank_bdl.surfaces.simplicial_complex import SimplicialComplex
        >>> ends = (torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [6.0]]))
        >>> ensemble = SurfaceEnsemble([SimplicialComplex(end) for end in ends])
        >>> generator = torch.Generator().manual_seed(0)
        >>> [bool(ensemble.draw(s, generator) > 2) for s in range(4)]
        [False, True, False, True]
    """

    def __init__(self, surfaces: Sequence[Surface], provenance: Mapping[str, Any] | None = None) -> None:
        if not surfaces:
            raise ShapeError("an ensemble needs at least 1 surface; got none.")
        for number, surface in enumerate(surfaces):
            lacking = [name for name in ("layout", "sample") if name not in dir(surface)]
            if lacking:
                raise TypeError(f"surface {number} is a {type(surface).__name__}, which lacks {', '.join(lacking)}.")
        layouts = [surface.layout for surface in surfaces]
        self.layout = layouts[0]
        for number, layout in enumerate(layouts[1:], start=1):
            if (layout is None) != (self.layout is None):
                raise ShapeError(f"either all surfaces have a layout or none; those of 0 and {number} differ.")
            difference = None if layout is None or self.layout is None else layout_difference(self.layout, layout)
            if difference is not None:
                raise ShapeError(f"surface {number} is over other parameters than surface 0: {difference}.")
        self.surfaces = tuple(surfaces)
        self.provenance: dict[str, Any] = dict(provenance or {})

    def draw(self, s: int, generator: torch.Generator | None = None) -> Tensor:
        """Return draw number s of a stratified sequence: of surface s modulo M.

        Args:
            s: Number of the draw, from 0.
            generator: Source of the randomness, as the surfaces take it.

        Returns:
            Shape ``(D,)``.

        Raises:
            ValueError: If ``s`` < 0.
        """
        if s < 0:
            raise ValueError(f"the number of a draw must be >= 0; got {s}.")
        return self.surfaces[s % len(self.surfaces)].sample(1, generator=generator)[0]

    def sample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw independently: each from a surface chosen at random.

        Args:
            n: How many, or a shape S (``torch.Size()`` for one plain vector).
            generator: Source of the randomness, as the surfaces take it.

        Returns:
            Shape ``(n, D)`` or ``(*S, D)``.
        """
        shape = sample_size(n)
        device = torch.device("cpu") if generator is None else generator.device
        chosen = torch.randint(len(self.surfaces), (shape.numel(),), generator=generator, device=device)
        counts = torch.bincount(chosen, minlength=len(self.surfaces)).tolist()
        parts = [s.sample(count, generator=generator) for s, count in zip(self.surfaces, counts, strict=True)]
        places = chosen.argsort(stable=True).argsort()  # of each draw among the parts, which lie surface by surface
        draws = torch.cat(parts)
        return draws[places.to(draws.device)].view(*shape, draws.shape[-1])

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the states of the surfaces.

        Raises:
            TypeError: If a surface has no file format.
        """
        tensors, parts = join_states(self.surfaces)
        return tensors, {"parts": parts}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the ensemble of :meth:`to_state`."""
        return cls(split_states(tensors, metadata.get("parts"), layout), provenance)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        kinds = sorted({type(surface).__name__ for surface in self.surfaces})
        return f"SurfaceEnsemble(num_surfaces={len(self.surfaces)}, of={', '.join(kinds)})"
