"""What curves and simplexes share: points in weight space that are trained or fixed, and a law to draw weights by."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.moments import first_unusable
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import sample_size
from lowrank_bdl.posteriors.storage import StoredPosterior


class Surface(nn.Module, StoredPosterior):
    """A set of weight vectors between given ones; a posterior, whose draws train it too.

    Every point is a tensor of its own: a parameter if it is trained, a buffer if it is fixed. So an optimizer takes
    ``surface.parameters()``, a state dict holds all points, and ``.to()`` moves them.

    Args:
        layout: Names and shapes of the coordinates; None for plain vectors.
        provenance: Where it came from, as JSON values by name.

    Attributes:
        layout: As given.
        provenance: As given; saved with the surface.
    """

    def __init__(self, layout: ParameterLayout | None = None, provenance: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.layout = layout
        self.provenance: dict[str, Any] = dict(provenance or {})

    @abstractmethod
    def draw_theta(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one weight vector, differentiably in the points that are trained.

        Args:
            generator: Source of the randomness, on any device; None means torch's default generator of the CPU.

        Returns:
            Shape ``(D,)``, on the device of the points.
        """

    @abstractmethod
    def center_theta(self) -> Tensor:
        """Return the weight vector in the middle, shape ``(D,)``, differentiably."""

    @torch.no_grad()
    def sample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw weight vectors.

        Args:
            n: How many, or a shape S (``torch.Size()`` for one plain vector).
            generator: Source of the randomness, on any device; None means torch's default generator of the CPU.

        Returns:
            Shape ``(n, D)`` or ``(*S, D)``, detached.
        """
        shape = sample_size(n)
        center = self.center_theta()
        draws = center.new_empty((shape.numel(), len(center)))
        for row in draws:
            row.copy_(self.draw_theta(generator))
        return draws.view(*shape, len(center))

    def register_point(self, name: str, theta: Tensor, *, trained: bool) -> None:
        """Keep a copy of a point under a name, as a parameter or a buffer.

        Args:
            name: Attribute to keep it under.
            theta: Shape ``(D,)``.
            trained: Whether it is a parameter.
        """
        copy = theta.detach().clone(memory_format=torch.contiguous_format)
        if trained:
            self.register_parameter(name, nn.Parameter(copy))
        else:
            self.register_buffer(name, copy)


def require_points(points: "Tensor | Sequence[Tensor]", layout: ParameterLayout | None) -> list[Tensor]:
    """Return points of a surface one by one, if they are weight vectors that fit together.

    Args:
        points: Shape ``(n, D)``, or n vectors ``(D,)``.
        layout: What they must hold; None for plain vectors.

    Returns:
        n vectors, not copied.

    Raises:
        ShapeError: If they are not vectors of one length, which is the layout's, and of one real floating dtype.
        NonFiniteError: If an entry is not finite; names it.
    """
    if isinstance(points, Tensor) and points.ndim != 2:
        raise ShapeError(f"points must have shape (n, D); got {tuple(points.shape)}.")
    vectors = list(points)
    if not vectors:
        raise ShapeError("points must hold at least one weight vector; got none.")
    size = vectors[0].numel() if layout is None else layout.numel
    for number, vector in enumerate(vectors):
        if vector.shape != (size,) or not vector.is_floating_point() or vector.dtype != vectors[0].dtype:
            raise ShapeError(
                f"points must be vectors of {size} real floating-point numbers of one dtype; "
                f"point {number} has shape {tuple(vector.shape)} and dtype {vector.dtype}."
            )
        bad = first_unusable(vector.detach(), float("inf"))
        if bad is not None:
            raise NonFiniteError(f"points must be finite; entry {bad} of point {number} is {vector[bad].item()}.")
    return vectors
