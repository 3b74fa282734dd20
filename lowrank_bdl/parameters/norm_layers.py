"""Layers that normalise by running statistics: which there are, which are left alone, which ones are out of date."""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.functional import FunctionalModel
from lowrank_bdl.parameters.selection import Pattern, Predicate, select
from lowrank_bdl.parameters.wrappers import plain_names

LayerSelector: TypeAlias = "Pattern | Iterable[Pattern] | Callable[[str, nn.Module], bool]"


def tracking_layers(model: nn.Module, exclude: "LayerSelector | None" = None) -> dict[str, _BatchNorm]:
    """Return torch's batch norms that keep running statistics, by name.

    Args:
        model: Any module.
        exclude: Layers to leave out: a pattern, several, or ``predicate(name, layer)``, as of `ParameterLayout`.

    Raises:
        ShapeError: If a pattern matches no layer with running statistics at all.
    """
    plain = plain_names(model)
    every = {plain(path): module for path, module in model.named_modules() if _keeps_statistics(module)}
    kept = _without(every, exclude)
    return {name: every[name] for name in kept if isinstance(every[name], _BatchNorm)}


def other_layers(model: nn.Module, exclude: "LayerSelector | None" = None) -> dict[str, nn.Module]:
    """Return layers with running statistics that are none of torch's batch norms, by name.

    Such are ``InstanceNorm`` with ``track_running_stats=True`` and what has buffers ``running_...`` or ``moving_...``;
    a layer of a class that calls itself frozen never moves its own.

    Args:
        model: Any module.
        exclude: Layers to leave out.
    """
    plain = plain_names(model)
    every = {plain(path): module for path, module in model.named_modules() if _keeps_statistics(module)}
    return {name: every[name] for name in _without(every, exclude) if not isinstance(every[name], _BatchNorm)}


def _keeps_statistics(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.running_mean is not None and module.running_var is not None
    if "Frozen" in type(module).__name__:
        return False
    found = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()]
    return any(re.match("(running|moving)_", name) for name in found)


def _without(layers: Mapping[str, nn.Module], exclude: "LayerSelector | None") -> list[str]:
    if exclude is None or not layers:
        return list(layers)
    groups = {name: (name,) for name in layers}
    things = cast("Mapping[str, Tensor]", layers)  # only a predicate looks at them, and it is one for layers
    if callable(exclude):
        return select(groups, things, None, cast("Predicate", exclude))
    patterns = [exclude] if isinstance(exclude, (str, re.Pattern)) else list(exclude)
    for pattern in patterns:
        if len(select(groups, things, None, [pattern])) == len(layers):
            shown = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
            raise ShapeError(
                f"bn_exclude pattern {shown!r} must match a layer with running statistics; got {_listed(layers)}."
            )
    return select(groups, things, None, patterns)


def _listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in list(names)[:3]) + (", ..." if len(names) > 3 else "")


def _levels_to_the_caller() -> int:
    """How many calls up from here the first one outside this library and torch is."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("lowrank_bdl", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def warn_of_other_layers(model: nn.Module, exclude: "LayerSelector | None") -> None:
    """Name the layers whose statistics stay as they are although those of batch norms are computed anew.

    Args:
        model: Any module.
        exclude: Layers that are meant to stay.
    """
    others = other_layers(model, exclude)
    if others:
        kinds = sorted({type(layer).__name__ for layer in others.values()})
        warnings.warn(
            f"{_listed(others)} ({', '.join(kinds)}) keep running statistics that are not recomputed: only those of "
            "torch's batch norms are. Name them in bn_exclude= if they may stay as they are.",
            UserWarning,
            stacklevel=_levels_to_the_caller(),
        )


def warn_of_stored_statistics(
    network: FunctionalModel, weights: Collection[Tensor], exclude: "LayerSelector | None"
) -> None:
    """Name the layers that normalise by statistics of other weights than those that are given.

    Nothing is said where the statistics are right: of the model's own weights, and of layers that come before the first
    parameter in the layout, in the order in which the model's modules were made.

    Args:
        network: The network.
        weights: Vectors ``(D,)``.
        exclude: Layers that are meant to stay.

    Cost: a look at every layer's name; one comparison of D numbers if one weight vector is given.
    """
    model = network.stateless.model
    stale = [*tracking_layers(model, exclude), *other_layers(model, exclude)]
    if not stale:
        return
    plain = plain_names(model)
    order = {plain(path): number for number, (path, _) in enumerate(model.named_modules())}
    moved = min(order.get(name.rpartition(".")[0], 0) for name in network.layout.names)
    stale = [name for name in stale if order[name] > moved]
    if not stale or _are_the_models(network, weights):
        return
    warnings.warn(
        f"the network normalises by running statistics ({_listed(stale)}) that were not computed for these weights: "
        "give training data as bn_loader=, or bn_loader='stored' where the stored statistics are meant.",
        UserWarning,
        stacklevel=_levels_to_the_caller(),
    )


def _are_the_models(network: FunctionalModel, weights: Collection[Tensor]) -> bool:
    if len(weights) != 1:
        return False
    theta = next(iter(weights))
    return torch.equal(network.layout.flatten(network.stateless.model).to(theta), theta)
