"""Simplexes of low loss between solutions: SPRO, and what it draws.

Benton, Maddox, Lotfi and Wilson, "Loss Surface Simplexes for Mode Connecting Volumes and Fast Ensembling" (ICML 2021).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_bdl.errors import CheckpointError, ShapeError
from lowrank_bdl.linalg.devices import generator_on, sums_device
from lowrank_bdl.linalg.moments import column_chunks
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.simplex_volume import log_simplex_volume
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import sample_size
from lowrank_bdl.posteriors.storage import required
from lowrank_bdl.surfaces.surface import Surface, require_points


@exact_methods
class SimplicialComplex(Surface, kind="simplicial complex"):
    r"""Simplexes that share corners in weight space, and the uniform distribution over them.

    A draw picks a simplex with probability proportional to its volume and then a point
    :math:`\theta = \sum_i w_i v_i` of it with :math:`w \sim \mathrm{Dirichlet}(1, \dots, 1)`: uniform over the complex.
    Where simplexes have different dimensions, whose volumes do not compare, each dimension gets the share of its number
    of simplexes, divided among them by volume; where none of a dimension has a volume, they are alike.

    Train a vertex with :class:`lowrank_bdl.surfaces.surface_model.SurfaceModel` around a network. Growth (SPRO) takes
    one vertex at a time: :meth:`add_vertex`, train it, add the next. Several modes with shared connecting points are
    ``SimplicialComplex(modes, [(0,), (1,), (2,)])`` grown by as many vertices. The whole is also a posterior: give it
    to ``lb.predict``.

    Args:
        vertices: m corners, a tensor ``(m, D)`` or m tensors ``(D,)`` of one dtype and device; copied [parameter].
        simplexes: Their corners' numbers, one tuple a simplex, none a face of another; None: one simplex of them all.
        layout: Names and shapes of the coordinates; None for plain vectors.
        trainable: Numbers of the vertices that are trained: parameters; the others are buffers.
        vertex_device: Where the vertices are kept, the host perhaps: a draw is put together there. None: as given.
        provenance: Where it came from, as JSON values by name.

    Attributes:
        simplexes: Sorted tuples of vertex numbers.
        layout: As given.
        provenance: As given; saved with the complex.

    Raises:
        ShapeError: If the vertices are not m >= 1 real vectors of one length, dtype and device, a simplex is empty,
            repeats a vertex, has more corners than D + 1, is a face of another or names no vertex, a vertex is in none,
            or the layout has another D.
        NonFiniteError: If an entry is not finite.

    Cost: memory of m vectors; a draw reads the corners of its simplex, and, to know the volumes, all corners if there
    are several simplexes.

    Example:
        >>> corners = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
        >>> faces = SimplicialComplex(corners, [(0, 1, 2), (0, 2, 3)])
        >>> faces.volumes().round(decimals=6).tolist(), round(faces.log_volume().exp().item(), 6)
        ([2.0, 1.0], 3.0)
        >>> faces.sample(5, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 2])
        >>> edge = SimplicialComplex(corners[:2])
        >>> edge.add_vertex(generator=torch.Generator().manual_seed(0)), edge.simplexes, edge.trainable
        (2, ((0, 1, 2),), (2,))
    """

    def __init__(
        self,
        vertices: "Tensor | Sequence[Tensor]",
        simplexes: Sequence[Sequence[int]] | None = None,
        layout: ParameterLayout | None = None,
        *,
        trainable: Iterable[int] = (),
        vertex_device: torch.device | str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        corners = [corner.to(device=vertex_device) for corner in require_points(vertices, layout)]
        devices = sorted({str(corner.device) for corner in corners})
        if len(devices) > 1:
            raise ShapeError(f"vertices must be on one device; got {', '.join(devices)}.")
        chosen = [range(len(corners))] if simplexes is None else simplexes
        checked = _checked_simplexes(chosen, len(corners), corners[0].numel())
        trained = _checked_numbers(trainable, len(corners))
        super().__init__(layout, provenance)
        self.simplexes, self.num_vertices = checked, len(corners)
        for number, corner in enumerate(corners):
            self.register_point(_name(number), corner, trained=number in trained)

    # ---- which vertices are trained -----------------------------------------------------------------------------

    @property
    def vertices(self) -> list[Tensor]:
        """The m corners, shape ``(D,)`` each: parameters and buffers themselves, ``vertex_0`` and so on by name."""
        return [getattr(self, _name(number)) for number in range(self.num_vertices)]

    @property
    def _first(self) -> Tensor:
        return self.vertices[0]

    @property
    def trainable(self) -> tuple[int, ...]:
        """Numbers of the vertices that are trained."""
        return tuple(number for number in range(self.num_vertices) if _name(number) in self._parameters)

    def freeze(self, vertices: Iterable[int] | None = None) -> None:
        """Fix vertices where they are: they become buffers, in the same memory.

        Args:
            vertices: Their numbers; None for all.

        Raises:
            ShapeError: If there is no such vertex.
        """
        for number in _checked_numbers(range(self.num_vertices) if vertices is None else vertices, self.num_vertices):
            vertex = getattr(self, _name(number)).detach()
            delattr(self, _name(number))
            self.register_buffer(_name(number), vertex)

    def unfreeze(self, vertices: Iterable[int] | None = None) -> None:
        """Let vertices be trained: they become parameters, in the same memory.

        Args:
            vertices: Their numbers; None for all.

        Raises:
            ShapeError: If there is no such vertex.
        """
        for number in _checked_numbers(range(self.num_vertices) if vertices is None else vertices, self.num_vertices):
            vertex = getattr(self, _name(number)).detach()
            delattr(self, _name(number))
            self.register_parameter(_name(number), nn.Parameter(vertex))

    # ---- volumes ------------------------------------------------------------------------------------------------

    def log_volumes(self) -> Tensor:
        """Return the log-volume of every simplex, differentiable; minus infinity for a flat one, 0 for a point.

        Returns:
            Shape ``(number of simplexes,)``, float64; see :func:`~lowrank_bdl.linalg.simplex_volume.log_simplex_volume`
            for units and cost.
        """
        return torch.stack(self._log_volumes())

    def _log_volumes(self) -> list[Tensor]:
        vertices = self.vertices
        return [log_simplex_volume([vertices[i] for i in simplex]) for simplex in self.simplexes]

    @torch.no_grad()
    def volumes(self) -> Tensor:
        """Return the volume of every simplex, shape ``(number of simplexes,)``, float64 [parameter^k]."""
        return self.log_volumes().exp()

    def log_volume(self) -> Tensor:
        r"""Return the log-volume of the whole complex, differentiable: the regulariser of SPRO.

        .. math:: \log V(K) = \log \sum_s V_s

        over all simplexes. With different dimensions it is the average of theirs, weighted by the number of simplexes.

        Returns:
            A float64 scalar.

        Raises:
            ShapeError: If the simplexes of a dimension have no volume, so that there is no gradient to make one.

        Source: the regulariser of Benton et al. (2021), who add up the volumes of a complex's simplexes.
        """
        values = self._log_volumes()
        total = torch.zeros((), dtype=torch.float64, device=values[0].device)
        for numbers in self._dimensions():
            solid = [values[number] for number in numbers if bool(values[number] > -torch.inf)]
            if not solid:
                flat = self.simplexes[numbers[0]]
                raise ShapeError(f"simplex {flat} has no volume: its vertices must span {len(flat) - 1} dimensions.")
            total = total + torch.stack(solid).logsumexp(0) * (len(numbers) / len(values))
        return total

    def _dimensions(self) -> list[list[int]]:
        """Return the numbers of the simplexes of every dimension."""
        groups: dict[int, list[int]] = {}
        for number, simplex in enumerate(self.simplexes):
            groups.setdefault(len(simplex), []).append(number)
        return list(groups.values())

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """Return the chance of each simplex in a draw, shape ``(number of simplexes,)``, float64."""
        if len(self.simplexes) == 1:
            return torch.ones(1, dtype=torch.float64, device=self._first.device)
        values = self.log_volumes()
        result = torch.empty_like(values)
        for numbers in self._dimensions():
            logits = values[numbers]
            if not bool((logits > -torch.inf).any()):
                logits = torch.zeros_like(logits)
            result[numbers] = logits.softmax(0) * (len(numbers) / len(values))
        return result

    # ---- draws --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def coefficients(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the weights of the vertices in points of the complex.

        Args:
            n: How many.
            generator: Source of the randomness, on any device; None means torch's default CPU generator.

        Returns:
            Shape ``(n, m)``, float64, on the generator's device: each row sums to 1 over one simplex's corners.
        """
        device = torch.device("cpu") if generator is None else sums_device(generator.device)
        generator = generator_on(device, generator)
        size = max(map(len, self.simplexes))
        table = torch.tensor([[*s, *s[:1] * (size - len(s))] for s in self.simplexes], device=device)
        inside = torch.tensor([[i < len(s) for i in range(size)] for s in self.simplexes], device=device)
        chosen = torch.zeros(n, dtype=torch.int64, device=device)
        if len(self.simplexes) > 1 and n:
            chosen = torch.multinomial(self.probabilities().to(device), n, replacement=True, generator=generator)
        # Exponential variables over their sum are Dirichlet(1).
        shares = torch.empty((n, size), dtype=torch.float64, device=device).exponential_(generator=generator)
        shares = shares * inside[chosen]
        shares /= shares.sum(1, keepdim=True)
        return shares.new_zeros(n, self.num_vertices).scatter_add_(1, table[chosen], shares)

    def to_theta(self, coefficients: Tensor) -> Tensor:
        r"""Return points :math:`\sum_i w_i v_i`, differentiable in the vertices.

        Args:
            coefficients: w, shape ``(*S, m)``; weights that sum to 1 give points of the complex's affine hull.

        Returns:
            Shape ``(*S, D)``, in the vertices' dtype and on their device; a corner to the last bit where its w is 1.

        Raises:
            ShapeError: If the last axis is not m.

        Cost: one read for each w that is not 0; twice the memory of the result.
        """
        if coefficients.ndim < 1 or coefficients.shape[-1] != self.num_vertices:
            raise ShapeError(f"coefficients must be (*S, {self.num_vertices}); got {tuple(coefficients.shape)}.")
        shape = (*coefficients.shape[:-1], self._first.numel())
        rows = [self._combine(row) for row in coefficients.reshape(-1, self.num_vertices).tolist()]
        return torch.stack(rows).view(shape) if rows else self._first.new_empty(shape)

    def _combine(self, weights: Sequence[float]) -> Tensor:
        used = [(weight, vertex) for weight, vertex in zip(weights, self.vertices, strict=True) if weight]
        theta: Tensor = used[0][0] * used[0][1] if used else torch.zeros_like(self._first)
        for weight, vertex in used[1:]:
            theta = torch.add(theta, vertex, alpha=weight)
        return theta

    def draw_theta(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one point, differentiable in the vertices; the choice of simplex and weights is a constant.

        Args:
            generator: Source of the randomness, on any device; None means torch's default CPU generator.

        Returns:
            Shape ``(D,)``, on the vertices' device.
        """
        return self.to_theta(self.coefficients(1, generator)[0])

    @torch.no_grad()
    def sample(self, n: int | Sequence[int] = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw points, all with one look at the volumes.

        Args:
            n: How many, or a shape S (``torch.Size()`` for one plain vector).
            generator: Source of the randomness, on any device; None means torch's default CPU generator.

        Returns:
            Shape ``(n, D)`` or ``(*S, D)``, detached, on the vertices' device.
        """
        shape = sample_size(n)
        return self.to_theta(self.coefficients(shape.numel(), generator).view(*shape, self.num_vertices))

    def center_theta(self) -> Tensor:
        """Return the mean of the distribution: the simplexes' centroids, each by its chance, shape ``(D,)``."""
        weights = [0.0] * self.num_vertices
        for simplex, chance in zip(self.simplexes, self.probabilities().tolist(), strict=True):
            for number in simplex:
                weights[number] += chance / len(simplex)
        return self._combine(weights)

    # ---- growth -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_vertex(
        self,
        theta: Tensor | None = None,
        simplexes: Iterable[int] | None = None,
        *,
        perturbation: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> int:
        r"""Add a vertex to simplexes, which gain a dimension; it alone is trainable then.

        It starts at the centroid c of the vertices that it joins, moved in a random direction by ``perturbation`` times
        their root mean square distance from c (times the length of c where that is 0, for the first vertex beside a
        mode): at the centroid itself the volume would be zero and its logarithm without a gradient.

        Args:
            theta: Where it starts, shape ``(D,)``, copied; None: beside the centroid.
            simplexes: Numbers of the simplexes that it joins; None for all.
            perturbation: Relative length of the move, >= 0.
            generator: Source of its direction, on any device; None means torch's default CPU generator.

        Returns:
            The new vertex's number.

        Raises:
            ShapeError: If ``theta`` is no vertex of these, there is no such simplex, or a simplex would get more than
                D + 1 corners. Nothing is changed then.
            NonFiniteError: If ``theta`` is not finite.
            ValueError: If ``perturbation`` < 0.

        Source: simplicial pointwise random optimisation (SPRO), Benton et al. (2021); the move is ours.
        """
        joined = sorted(set(range(len(self.simplexes)) if simplexes is None else simplexes))
        if not joined or joined[0] < 0 or joined[-1] >= len(self.simplexes):
            raise ShapeError(f"a vertex joins simplexes numbered in [0, {len(self.simplexes)}); got {joined}.")
        if not 0 <= perturbation < float("inf"):
            raise ValueError(f"perturbation must be at least 0 and finite; got {perturbation}.")
        first, new = self._first, self.num_vertices
        grown = [(*s, new) if number in joined else s for number, s in enumerate(self.simplexes)]
        checked = _checked_simplexes(grown, new + 1, first.numel())
        if theta is None:
            theta = self._beside_centroid(
                sorted({i for s in joined for i in self.simplexes[s]}), perturbation, generator
            )
        else:
            require_points([first, theta], self.layout)
        self.freeze()
        self.register_point(_name(new), theta.to(first.device), trained=True)
        self.simplexes, self.num_vertices = checked, new + 1
        return new

    def _beside_centroid(self, numbers: list[int], perturbation: float, generator: torch.Generator | None) -> Tensor:
        weights = [1 / len(numbers) if i in numbers else 0.0 for i in range(self.num_vertices)]
        centroid = self._combine(weights)
        vertices = self.vertices
        squares = [_square_distance(vertices[i], centroid) for i in numbers]
        spread = (sum(squares) / len(squares)) ** 0.5 or _square_distance(centroid, torch.zeros_like(centroid)) ** 0.5
        device = torch.device("cpu") if generator is None else generator.device
        dtype = torch.promote_types(centroid.dtype, torch.float32)
        direction = torch.randn(centroid.numel(), generator=generator, device=device, dtype=dtype).to(centroid.device)
        move = perturbation * spread / _square_distance(direction, torch.zeros_like(direction)) ** 0.5
        return torch.add(centroid, direction.to(centroid.dtype), alpha=move)

    # ---- files --------------------------------------------------------------------------------------------------

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the vertices, the simplexes, and which vertices are trainable."""
        tensors = {_name(number): vertex.detach() for number, vertex in enumerate(self.vertices)}
        return tensors, {"simplexes": [list(s) for s in self.simplexes], "trainable": list(self.trainable)}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the complex of :meth:`to_state`."""
        simplexes, trainable = metadata.get("simplexes"), metadata.get("trainable")
        if not _all_integers(trainable) or not isinstance(simplexes, list) or not all(map(_all_integers, simplexes)):
            raise CheckpointError(
                f"has damaged metadata: got simplexes {simplexes!r:.80}, trainable {trainable!r:.80}."
            )
        count = 1 + max((number for simplex in simplexes for number in simplex), default=0)
        vertices = required(tensors, *map(_name, range(count)))
        return cls(vertices, simplexes, layout, trainable=trainable or (), provenance=provenance)

    def __repr__(self) -> str:
        size = f"num_vertices={self.num_vertices}, simplexes={list(self.simplexes)}, trainable={list(self.trainable)}"
        return f"SimplicialComplex({size}, numel={self._first.numel()}, dtype={self._first.dtype})"


def _name(number: int) -> str:
    return f"vertex_{number}"


def _checked_numbers(numbers: Iterable[int], count: int) -> set[int]:
    result = set(numbers)
    for number in result:
        if not 0 <= number < count:
            raise ShapeError(f"a vertex's number must be in [0, {count}); got {number}.")
    return result


def _square_distance(a: Tensor, b: Tensor) -> float:
    parts = column_chunks(a.numel(), a.device)
    return sum((a[part].double() - b[part].double()).square().sum().item() for part in parts)


def _all_integers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _checked_simplexes(simplexes: Sequence[Sequence[int]], num_vertices: int, dim: int) -> tuple[tuple[int, ...], ...]:
    result = [tuple(sorted(simplex)) for simplex in simplexes]
    if not result:
        raise ShapeError("a complex needs at least 1 simplex; got none.")
    for simplex in result:
        if not simplex or simplex[0] < 0 or simplex[-1] >= num_vertices:
            raise ShapeError(f"a simplex must name vertices in [0, {num_vertices}); got {simplex}.")
        if len(set(simplex)) < len(simplex):
            raise ShapeError(f"a simplex must name each vertex once; got {simplex}.")
        if len(simplex) > dim + 1:
            raise ShapeError(f"a simplex in {dim} dimensions has at most {dim + 1} vertices; got {simplex}.")
    for one, other in combinations(result, 2):
        if set(one) <= set(other) or set(one) >= set(other):
            raise ShapeError(f"no simplex may be a face of another; got {one} and {other}.")
    unused = set(range(num_vertices)).difference(*result)
    if unused:
        raise ShapeError(f"every vertex must be in a simplex; {sorted(unused)} are in none.")
    return tuple(result)
