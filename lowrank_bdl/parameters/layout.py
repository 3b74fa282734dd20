"""The map between a network's named parameters and one flat vector."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank_bdl.errors import CheckpointError, ShapeError
from lowrank_bdl.parameters.selection import Selector, select
from lowrank_bdl.parameters.wrappers import named_parameters, require_values, without_wrappers


def _named_groups(model: nn.Module) -> tuple[dict[str, tuple[str, ...]], dict[str, nn.Parameter]]:
    """First name of every parameter to all its names, and to the parameter itself."""
    first_name: dict[int, str] = {}
    groups: dict[str, tuple[str, ...]] = {}
    tensors: dict[str, nn.Parameter] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False).items():
        first = first_name.setdefault(id(parameter), name)
        groups[first] = groups.get(first, ()) + (name,)
        tensors[first] = parameter
    return groups, tensors


@dataclass(frozen=True)
class ParameterLayout:
    r"""Where each named parameter of a network lies in the flat vector :math:`\theta \in \mathbb{R}^D`.

    Parameters are keyed by name, in the order of ``named_parameters()``. A tied parameter occurs once, under its first
    name; its other names are kept as aliases. Names are without those of torch's wrappers (``module.`` of data-parallel
    and averaged models, ``_orig_mod.`` of compiled ones, ``_checkpoint_wrapped_module.``). The layout holds no tensor:
    it is hashable, comparable and cheap to copy.

    Attributes:
        names: The P parameter names.
        shapes: Their P shapes.
        dtypes: Their P dtypes, to which :meth:`unflatten` casts.
        aliases: Pairs ``(other name, first name)`` of tied parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> layout = ParameterLayout.from_module(net, exclude="*.bias")
        >>> layout.names, layout.numel
        (('0.weight', '2.weight'), 8)
        >>> theta = layout.flatten(net)
        >>> torch.equal(layout.unflatten(theta)["2.weight"], net[2].weight)
        True
        >>> {name: tuple(t.shape) for name, t in layout.unflatten(torch.zeros(5, 8)).items()}
        {'0.weight': (5, 2, 3), '2.weight': (5, 1, 2)}
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    aliases: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a layout that is empty or contradicts itself."""
        if not self.names:
            raise ShapeError("A layout needs at least one parameter; got none.")
        if not len(self.names) == len(self.shapes) == len(self.dtypes):
            raise ShapeError(
                "A layout needs as many shapes and dtypes as names; "
                f"got {len(self.names)} names, {len(self.shapes)} shapes and {len(self.dtypes)} dtypes."
            )
        every_name = [*self.names, *(alias for alias, _ in self.aliases)]
        if len(set(every_name)) < len(every_name):
            twice = next(name for name in every_name if every_name.count(name) > 1)
            raise ShapeError(f"A layout needs distinct names; got {twice!r} more than once.")
        for alias, first in self.aliases:
            if first not in self.names:
                raise ShapeError(f"Alias {alias!r} must point to a name of the layout; got {first!r}.")
        for name, dtype in zip(self.names, self.dtypes, strict=True):
            if not dtype.is_floating_point:
                raise ShapeError(f"Parameter {name!r} must have a real floating-point dtype; got {dtype}. Exclude it.")

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        include: "Selector | None" = None,
        exclude: "Selector | None" = None,
        *,
        trainable_only: bool = True,
    ) -> "ParameterLayout":
        """Read the layout off a module.

        Args:
            model: Any module; nothing in it is changed.
            include: What to keep: a glob such as ``"*.weight"`` or ``"head"`` (a module: everything below it), a
                regular expression as ``"re:..."`` or compiled, a list of those, or ``predicate(name, parameter)``.
                None keeps everything.
            exclude: What to leave out of that, in the same forms.
            trainable_only: Leave out parameters that do not require a gradient, whatever ``include`` says.

        Returns:
            The layout of the selected parameters.

        Raises:
            ShapeError: If nothing is selected, an include pattern matches nothing, or a selected parameter is not
                real floating-point or not yet initialised (lazy).

        Cost: O(number of parameter tensors); no tensor is read.

        Example:
            >>> lstm = nn.LSTM(2, 3, num_layers=2)
            >>> ParameterLayout.from_module(lstm, include="re:_l1$", exclude=lambda name, p: p.ndim < 2).names
            ('weight_ih_l1', 'weight_hh_l1')
        """
        groups, tensors = _named_groups(model)
        names = select(groups, tensors, include, exclude)
        frozen = {name for name in names if not tensors[name].requires_grad} if trainable_only else set()
        names = [name for name in names if name not in frozen]
        if not names:
            raise ShapeError(
                f"No parameter is selected: the model ({type(model).__name__}) has {len(groups)}, of which the filters "
                f"keep {len(frozen)}, all frozen (requires_grad is False)."
                if frozen
                else f"No parameter is selected: the model ({type(model).__name__}) has {len(groups)} "
                "and the filters keep none."
            )
        for name in names:
            if is_lazy(tensors[name]):
                raise ShapeError(f"Parameter {name!r} has no shape yet (lazy module); run one forward pass first.")
        return cls(
            names=tuple(names),
            shapes=tuple(tensors[name].shape for name in names),
            dtypes=tuple(tensors[name].dtype for name in names),
            aliases=tuple((other, name) for name in names for other in groups[name][1:]),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Name to the coordinates of that parameter in θ."""
        ends = list(accumulate(self.sizes))
        return {n: slice(end - size, end) for n, size, end in zip(self.names, self.sizes, ends, strict=True)}

    @cached_property
    def numel(self) -> int:
        """D, the length of θ."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of θ: float64 where a parameter is, else float32, never less."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    def name_of(self, coordinate: int) -> str:
        """Name of the parameter that entry ``coordinate`` of θ belongs to.

        Args:
            coordinate: Integer in [0, D).

        Returns:
            The parameter's name.

        Raises:
            IndexError: If the coordinate is outside [0, D).

        Example:
            >>> ParameterLayout.from_module(nn.Linear(3, 2)).name_of(6)
            'bias'
        """
        if not 0 <= coordinate < self.numel:
            raise IndexError(f"coordinate must be in [0, {self.numel}); got {coordinate}.")
        return self.names[bisect_right([s.stop for s in self.slices.values()], coordinate)]

    def difference(self, other: "ParameterLayout") -> str | None:
        """Say where two layouts first differ in name, shape or dtype.

        Args:
            other: The layout to compare with.

        Returns:
            A sentence naming the first parameter that differs, this layout being what is expected; None if all agree.

        Example:
            >>> a, b = (ParameterLayout.from_module(nn.Linear(3, k)) for k in (2, 4))
            >>> a.difference(b)
            "parameter 'weight': expected shape (2, 3), got (4, 3)"
        """
        for i, name in enumerate(self.names):
            if i >= len(other.names):
                return f"parameter {name!r}: expected shape {tuple(self.shapes[i])}, got no such parameter"
            if name != other.names[i]:
                return f"parameter number {i}: expected {name!r}, got {other.names[i]!r}"
            if self.shapes[i] != other.shapes[i]:
                return f"parameter {name!r}: expected shape {tuple(self.shapes[i])}, got {tuple(other.shapes[i])}"
            if self.dtypes[i] != other.dtypes[i]:
                return f"parameter {name!r}: expected dtype {self.dtypes[i]}, got {other.dtypes[i]}"
        if len(other.names) > len(self.names):
            return f"parameter {other.names[len(self.names)]!r}: not expected"
        if self.aliases != other.aliases:
            return f"tied names: expected {dict(self.aliases)}, got {dict(other.aliases)}"
        return None

    def check(self, model: nn.Module) -> None:
        """Refuse a model that does not have these parameters.

        Names, shapes and ties must agree; the dtype may differ (``model.half()`` keeps its layout) and the model may
        own more parameters, since a layout may be of a part of it.

        Args:
            model: The model to compare with.

        Raises:
            ShapeError: Names the first parameter that differs, with the expected and the found shape.
        """
        self.parameters_of(model)

    def parameters_of(self, model: nn.Module) -> list[nn.Parameter]:
        """The model's own parameters in the order of the layout (not copies).

        Args:
            model: A model that passes :meth:`check`.

        Returns:
            P parameters.

        Raises:
            ShapeError: As :meth:`check`.
        """
        present = named_parameters(model, remove_duplicate=False)
        owner: dict[int, str] = {}
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in present:
                raise ShapeError(
                    f"Model and layout differ first at parameter {name!r}: expected shape {tuple(shape)}, "
                    f"got no such parameter in {type(model).__name__}.{self._wrapper_hint(name, present)}"
                )
            if is_lazy(present[name]) or present[name].shape != shape:
                found = "an uninitialised (lazy) one" if is_lazy(present[name]) else tuple(present[name].shape)
                raise ShapeError(
                    f"Model and layout differ first at parameter {name!r}: expected shape {tuple(shape)}, got {found}."
                )
            if (other := owner.setdefault(id(present[name]), name)) != name:
                raise ShapeError(
                    f"Model and layout differ first at parameter {name!r}: expected a parameter of its own, "
                    f"got one tied to {other!r}."
                )
        for alias, first in self.aliases:
            if present.get(alias) is not present[first]:
                raise ShapeError(
                    f"Model and layout differ first at parameter {alias!r}: expected it tied to {first!r}, "
                    f"got {'a parameter of its own' if alias in present else 'no such parameter'}."
                )
        return [present[name] for name in self.names]

    @staticmethod
    def _wrapper_hint(name: str, present: Mapping[str, object]) -> str:
        if f"module.{name}" in present:
            return f" It has {f'module.{name}'!r}: pass the wrapped network, model.module."
        if (inner := name.removeprefix("module.")) != name and inner in present:
            return f" It has {inner!r}: the layout was made from a wrapped network."
        return ""

    @torch.no_grad()
    def flatten(
        self, source: "nn.Module | Mapping[str, Tensor]", out: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Copy parameters into one vector, in a single copy.

        Args:
            source: A model, or name to tensor ``(*S, *shape)`` with the same leading axes for all (gradients, a state
                dict, the result of :meth:`unflatten`); further names in it are ignored.
            out: Where to write, shape ``(*S, D)``; allocated on the first parameter's device if None.
            dtype: Dtype of the result; None takes ``out``'s, or float32 (float64 if a parameter is).

        Returns:
            θ, shape ``(*S, D)``, detached; ``out`` itself if it was given.

        Raises:
            ShapeError: If model and layout differ, or ``out`` has another shape or a dtype other than ``dtype``.
            LowRankBDLError: If a parameter has no values (on the meta device).

        Cost: O(D) time; no memory beyond the result.
        """
        if isinstance(source, nn.Module):
            tensors: list[Tensor] = list(self.parameters_of(source))
            batch: tuple[int, ...] = ()
        else:
            tensors, batch = self._tensors_of(source)
        if out is None or not out.is_meta:
            require_values(zip(self.names, tensors, strict=True))
        shape = (*batch, self.numel)
        if out is None:
            out = torch.empty(shape, dtype=dtype or self.dtype, device=tensors[0].device)
        elif out.shape != shape or (dtype is not None and out.dtype != dtype):
            raise ShapeError(
                f"out must have shape {shape}{f' and dtype {dtype}' if dtype else ''}; "
                f"got shape {tuple(out.shape)} and dtype {out.dtype}."
            )
        for tensor, where, own in zip(tensors, self.slices.values(), self.shapes, strict=True):
            out[..., where].view((*batch, *own)).copy_(tensor.to_dense() if tensor.is_sparse else tensor)
        return out

    def _tensors_of(self, source: Mapping[str, Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
        tensors: list[Tensor] = []
        batch: tuple[int, ...] = ()
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in source:
                raise ShapeError(f"Parameter {name!r} of shape {tuple(shape)} is missing from the mapping.")
            found = tuple(source[name].shape)
            if not tensors:
                batch = found[: len(found) - len(shape)]
            if found != (*batch, *shape):
                raise ShapeError(f"Parameter {name!r} must have shape {(*batch, *shape)}; got {found}.")
            tensors.append(source[name])
        return tensors, batch

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Split θ into named tensors.

        Args:
            theta: Shape ``(*S, D)``.

        Returns:
            Name to ``(*S, *shape)``: a view of ``theta`` where its dtype is the parameter's own, else cast to that.
            Differentiable with respect to ``theta``.

        Raises:
            ShapeError: If the last axis is not D.

        Cost: O(P); O(S·D) for those that are cast. The gradient is put together in one pass over θ.
        """
        if theta.ndim == 0 or theta.shape[-1] != self.numel:
            raise ShapeError(f"theta must have shape (*S, {self.numel}); got {tuple(theta.shape)}.")
        batch = theta.shape[:-1]
        parts = theta.split(self.sizes, -1)  # its gradient is one concatenation; that of P slices is P vectors of D
        return {
            name: part.view((*batch, *shape)).to(dtype)
            for name, part, shape, dtype in zip(self.names, parts, self.shapes, self.dtypes, strict=True)
        }

    @torch.no_grad()
    def assign_(self, model: nn.Module, theta: Tensor) -> None:
        """Write θ into the model's parameters, in place.

        Args:
            model: A model that passes :meth:`check`; its other parameters and its buffers stay.
            theta: Shape ``(D,)``, cast to each parameter's dtype and device.

        Raises:
            ShapeError: If model and layout differ or ``theta`` is not ``(D,)``; nothing is written then.

        Cost: O(D) time, no memory.

        Example:
            >>> net = nn.Linear(2, 1)
            >>> ParameterLayout.from_module(net).assign_(net, torch.tensor([1.0, 2.0, 3.0]))
            >>> net(torch.ones(2)).item()
            6.0
        """
        if theta.shape != (self.numel,):
            raise ShapeError(f"theta must have shape ({self.numel},); got {tuple(theta.shape)}.")
        for parameter, where in zip(self.parameters_of(model), self.slices.values(), strict=True):
            parameter.copy_(theta[where].view(parameter.shape))

    def subset(
        self, include: "Selector | None" = None, exclude: "Selector | None" = None
    ) -> "tuple[ParameterLayout, slice | Tensor]":
        """Layout of some of the parameters, and where they lie in θ.

        Args:
            include: As in :meth:`from_module`; a predicate gets a tensor without storage (device ``meta``) of the
                parameter's shape and dtype.
            exclude: Likewise.

        Returns:
            The smaller layout and its coordinates: a slice where they are consecutive, else a LongTensor, so that
            ``theta[..., coordinates]`` is the marginal's vector.

        Raises:
            ShapeError: If nothing is left.

        Example:
            >>> layout = ParameterLayout.from_module(nn.Linear(3, 2))
            >>> layout.subset("bias")[1]
            slice(6, 8, None)
        """
        groups = {name: (name, *(a for a, first in self.aliases if first == name)) for name in self.names}
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True)
        }
        kept = select(groups, tensors, include, exclude)
        if not kept:
            raise ShapeError(f"No parameter is selected: the layout has {len(self.names)} and the filters keep none.")
        layout = ParameterLayout(
            names=tuple(kept),
            shapes=tuple(tensors[name].shape for name in kept),
            dtypes=tuple(tensors[name].dtype for name in kept),
            aliases=tuple((alias, first) for alias, first in self.aliases if first in kept),
        )
        pieces = [self.slices[name] for name in kept]
        if all(left.stop == right.start for left, right in zip(pieces, pieces[1:], strict=False)):
            return layout, slice(pieces[0].start, pieces[-1].stop)
        return layout, torch.cat([torch.arange(piece.start, piece.stop) for piece in pieces])

    def to_metadata(self) -> dict[str, Any]:
        """The layout as plain lists, strings and numbers, fit for JSON.

        Returns:
            ``{"names": [...], "shapes": [[...]], "dtypes": ["float32", ...], "aliases": [[other, first], ...]}``.
        """
        return {
            "names": list(self.names),
            "shapes": [list(shape) for shape in self.shapes],
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.dtypes],
            "aliases": [list(pair) for pair in self.aliases],
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "ParameterLayout":
        """Rebuild a layout from :meth:`to_metadata`.

        Args:
            metadata: What :meth:`to_metadata` gave, possibly after a trip through JSON.

        Returns:
            An equal layout; without the names of compiled networks' and checkpoints' wrappers, which early files have.

        Raises:
            CheckpointError: If a field is missing or malformed.

        Example:
            >>> import json
            >>> layout = ParameterLayout.from_module(nn.Linear(3, 2))
            >>> ParameterLayout.from_metadata(json.loads(json.dumps(layout.to_metadata()))) == layout
            True
        """
        try:
            names, shapes, dtypes, aliases = (metadata[key] for key in ("names", "shapes", "dtypes", "aliases"))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"A layout needs names, shapes, dtypes and aliases; missing: {error}.") from error
        if not all(isinstance(field, list) for field in (names, shapes, dtypes, aliases)):
            raise CheckpointError("The layout's names, shapes, dtypes and aliases must be lists.")
        if not all(isinstance(name, str) for name in names):
            raise CheckpointError("The layout's names must be strings.")
        for shape in shapes:
            if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                raise CheckpointError(f"A layout's shape must be a list of integers >= 0; got {shape!r}.")
        for pair in aliases:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
                raise CheckpointError(f"A layout's alias must be a pair of names; got {pair!r}.")
        found = [getattr(torch, dtype, None) if isinstance(dtype, str) else None for dtype in dtypes]
        for text, dtype in zip(dtypes, found, strict=True):
            if not isinstance(dtype, torch.dtype):
                raise CheckpointError(f"A layout's dtype must be the name of a torch dtype; got {text!r}.")
        names = [without_wrappers(name) for name in names]
        aliases = [[without_wrappers(name) for name in pair] for pair in aliases]
        try:
            return cls(
                tuple(names),
                tuple(torch.Size(shape) for shape in shapes),
                tuple(dtype for dtype in found if isinstance(dtype, torch.dtype)),
                tuple((alias, first) for alias, first in aliases),
            )
        except ShapeError as error:
            raise CheckpointError(f"The layout in the file contradicts itself: {error}") from error
