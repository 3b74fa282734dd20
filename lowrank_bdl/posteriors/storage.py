"""What every posterior that can be saved shares: one file, a layout that is compared, and loading by kind."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.files import read_kind, read_tensors, write_tensors
from lowrank_bdl.parameters.layout import ParameterLayout

_CLASSES: "dict[str, type[StoredPosterior]]" = {}


class StoredPosterior(ABC):
    """A posterior that becomes named tensors and JSON, and back; a subclass gives ``kind=`` in its class statement.

    Attributes:
        kind: What the file is said to hold.
        layout: Names and shapes of the coordinates, or None.
        provenance: Where it came from, as JSON values by name; saved with the posterior.
    """

    kind: ClassVar[str]
    layout: ParameterLayout | None
    provenance: dict[str, Any]

    def __init_subclass__(cls, *, kind: str | None = None, **options: Any) -> None:
        """Let :func:`load_posterior` find the class by its kind."""
        super().__init_subclass__(**options)
        if kind is not None:
            cls.kind = kind
            _CLASSES[kind] = cls

    @abstractmethod
    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by name, shared where they can be, and JSON metadata, without layout and provenance."""

    @classmethod
    @abstractmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        layout: ParameterLayout | None,
        provenance: Mapping[str, Any],
    ) -> Self:
        """Return the posterior of :meth:`to_state`, owning the tensors it is given.

        Raises:
            CheckpointError: If a tensor is missing or holds unusable numbers; so do ShapeError, TypeError and
                NonFiniteError become one.
        """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the posterior to one safetensors file, atomically: the old file or the new one, never a part.

        The file's metadata hold the format's name and version, the kind, the layout (names, shapes, dtypes) and the
        provenance.

        Args:
            path: The file; its directory must exist.

        Raises:
            StaleError: If it shares its deviations with a collector that has been updated since.
            TypeError: If the provenance is not JSON, or a part of the posterior has no file format.
            OSError: If the file cannot be written.

        Cost: no copy of a tensor that lies in memory as it lies in the file.
        """
        tensors, metadata = self.to_state()
        layout = None if self.layout is None else self.layout.to_metadata()
        write_tensors(path, self.kind, tensors, {**metadata, "layout": layout, "provenance": self.provenance})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        layout: ParameterLayout | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Self:
        """Read what :meth:`save` wrote; nothing is unpickled.

        Args:
            path: The file.
            layout: If given, the file's layout must equal it (dtypes aside).
            device: Where the tensors go; the CPU if None.

        Raises:
            CheckpointError: If the file is truncated, foreign, of another kind or a newer version, lacks a tensor,
                holds unusable numbers, or is of other parameters than ``layout``.
            FileNotFoundError: If there is no such file.
        """
        name = os.fspath(path)
        tensors, metadata = read_tensors(path, cls.kind, (), device)
        found = metadata.pop("layout", None)
        own = None if found is None else ParameterLayout.from_metadata(found)
        if layout is not None:
            if own is None:
                raise CheckpointError(f"{name} holds no layout to compare with the one given.")
            difference = layout_difference(layout, own)
            if difference is not None:
                raise CheckpointError(f"{name} is of other parameters: {difference}.")
        try:
            return cls.from_state(tensors, metadata, own, metadata.pop("provenance", None) or {})
        except CheckpointError as error:
            raise CheckpointError(f"{name} {error}") from error
        except (ShapeError, TypeError, NonFiniteError, ValueError) as error:
            raise CheckpointError(f"{name} contradicts itself: {error}") from error


def load_posterior(
    path: str | os.PathLike[str],
    layout: ParameterLayout | None = None,
    *,
    device: torch.device | str | None = None,
) -> StoredPosterior:
    """Read a posterior of any kind: the file says which.

    Args:
        path: What ``posterior.save`` wrote.
        layout: If given, the file's layout must equal it (dtypes aside).
        device: Where the tensors go; the CPU if None.

    Returns:
        The posterior, of the class that was saved.

    Raises:
        CheckpointError: If the file is truncated, foreign, of a newer version, no posterior, lacks a tensor, holds
            unusable numbers, or is of other parameters than ``layout``.
        FileNotFoundError: If there is no such file.

    Example:
        >>> import tempfile
        >>> from lowrank_bdl.posteriors.gaussian import GaussianPosterior
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     GaussianPosterior.diagonal(torch.zeros(3), torch.ones(3)).save(f"{folder}/posterior.safetensors")
        ...     load_posterior(f"{folder}/posterior.safetensors")
        GaussianPosterior(numel=3, rank=0, dtype=torch.float32)
    """
    kind = read_kind(path)
    if kind not in _CLASSES:
        known = ", ".join(repr(name) for name in sorted(_CLASSES))
        raise CheckpointError(f"{os.fspath(path)} holds a {kind!r}; expected a posterior, one of {known}.")
    return _CLASSES[kind].load(path, layout, device=device)


def required(tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """Return tensors by name.

    Raises:
        CheckpointError: Names all that are missing.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(f"lacks {', '.join(missing)}.")
    return [tensors[name] for name in names]


def join_states(parts: Sequence[object]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the states of several posteriors as one: tensors named ``number.name``, and metadata in a list.

    Raises:
        TypeError: If a part cannot be saved; names it.
    """
    tensors: dict[str, Tensor] = {}
    metadata: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        if not isinstance(part, StoredPosterior):
            raise TypeError(
                f"part {number} of the posterior has no file format: expected a StoredPosterior, "
                f"got {type(part).__name__}."
            )
        own, described = part.to_state()
        tensors.update({f"{number}.{name}": tensor for name, tensor in own.items()})
        metadata.append({**described, "kind": part.kind, "provenance": part.provenance})
    return tensors, metadata


def split_states(
    tensors: Mapping[str, Tensor], metadata: object, layout: ParameterLayout | None = None
) -> list[StoredPosterior]:
    """Return the posteriors of :func:`join_states`.

    Args:
        tensors: All tensors, named ``number.name``.
        metadata: The list of their metadata.
        layout: Of every one of them.

    Raises:
        CheckpointError: If the metadata are damaged, or a part is of an unknown kind or refuses its tensors.
    """
    if not isinstance(metadata, list) or not all(isinstance(part, dict) for part in metadata):
        raise CheckpointError(f"has damaged metadata: its parts must be a list of objects, got {metadata!r:.80}.")
    parts = []
    for number, described in enumerate(metadata):
        if described.get("kind") not in _CLASSES:
            raise CheckpointError(f"has a part of unknown kind {described.get('kind')!r}; update lowrank_bdl.")
        prefix = f"{number}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        kind = _CLASSES[described["kind"]]
        try:
            parts.append(kind.from_state(own, described, layout, described.get("provenance") or {}))
        except CheckpointError as error:
            raise CheckpointError(f"(its part {number}) {error}") from error
    return parts


def layout_difference(expected: ParameterLayout, found: ParameterLayout) -> str | None:
    """Say where names or shapes differ first: a cast network and an untied copy have the same coordinates."""
    plain = [replace(layout, dtypes=(torch.float32,) * len(layout.names), aliases=()) for layout in (expected, found)]
    return plain[0].difference(plain[1])
