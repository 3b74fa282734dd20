"""Choosing parameters by name pattern or predicate."""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor

from lowrank_bdl.errors import ShapeError

Predicate: TypeAlias = Callable[[str, Tensor], bool]
Pattern: TypeAlias = "str | re.Pattern[str]"
Selector: TypeAlias = "Pattern | Iterable[Pattern] | Predicate"


def _matches(pattern: Pattern, name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _pattern_list(selector: "Pattern | Iterable[Pattern]", role: str) -> list[Pattern]:
    patterns = [selector] if isinstance(selector, (str, re.Pattern)) else list(selector)
    for pattern in patterns:
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(
                f"{role} must be a pattern, a list of patterns or a predicate(name, parameter); "
                f"got an entry of type {type(pattern).__name__}."
            )
    return patterns


def _chosen(
    selector: Selector, groups: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor], role: str
) -> set[str]:
    if callable(selector):
        return {first for first, names in groups.items() if any(selector(name, tensors[first]) for name in names)}
    chosen: set[str] = set()
    for pattern in _pattern_list(selector, role):
        hits = {first for first, names in groups.items() if any(_matches(pattern, name) for name in names)}
        if not hits and role == "include":  # a misspelt include would silently shrink the posterior
            shown = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
            known = ", ".join(list(groups)[:5]) + (", ..." if len(groups) > 5 else "")
            raise ShapeError(f"include pattern {shown!r} matches none of the {len(groups)} parameters ({known}).")
        chosen |= hits
    return chosen


def select(
    groups: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, Tensor],
    include: "Selector | None",
    exclude: "Selector | None",
) -> list[str]:
    """Return the keys of ``groups`` that ``include`` picks and ``exclude`` does not, in their order.

    A string is a shell glob (case-sensitive, ``*`` also crosses dots) for the whole name or for a module above it, so
    ``"head"`` picks ``head.weight`` and ``head.bias``; a string that starts with ``"re:"`` and a compiled pattern are
    regular expressions searched for anywhere in the name. A tied parameter has several names and is one parameter: it
    is picked, or excluded, when any of its names is.

    Args:
        groups: First name of each parameter to all of its names (the first one included).
        tensors: First name to the parameter, handed to predicates.
        include: What to keep; None keeps everything.
        exclude: What to leave out of that; None leaves nothing out. A pattern that matches nothing is no error here.

    Returns:
        The selected first names, possibly none.

    Raises:
        ShapeError: If a pattern of ``include`` matches no parameter.
        TypeError: If a selector is neither a pattern, an iterable of patterns nor callable.

    Example:
        >>> import torch
        >>> groups = {"body.weight": ("body.weight",), "head.weight": ("head.weight",), "head.bias": ("head.bias",)}
        >>> select(groups, {name: torch.empty(2) for name in groups}, include="head", exclude="*.bias")
        ['head.weight']
    """
    kept = set(groups) if include is None else _chosen(include, groups, tensors, "include")
    if exclude is not None:
        kept -= _chosen(exclude, groups, tensors, "exclude")
    return [first for first in groups if first in kept]
