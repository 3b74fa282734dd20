"""What slice samplers share: a bracket that shrinks towards the present state until a point on the slice is found."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_bdl.subspaces.chains import UniformStream

_NARROWEST = 1e-12
"""A bracket this narrow, of its first width, holds the present state alone, which is on the slice: the chain stays."""


@dataclass(frozen=True)
class Found:
    """Where C chains go.

    Attributes:
        where: Position in the bracket, shape ``(C,)``.
        payload: What ``evaluate`` gave beside the value there, shape ``(C,)``.
        proposals: Positions that were evaluated, shape ``(C,)``.
        moved: False where the bracket closed on the present state.
    """

    where: Tensor
    payload: Tensor
    proposals: Tensor
    moved: Tensor


def shrink(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    threshold: Tensor,
    first: Tensor,
    centre: Tensor,
    low: Tensor,
    high: Tensor,
    stream: UniformStream,
) -> Found:
    """Propose positions, C chains side by side, until each has one whose value lies above its threshold.

    Args:
        evaluate: From chains ``(A,)`` and their positions ``(A,)`` to values and payloads ``(A,)``; NaN is no value
            above any threshold.
        threshold: Shape ``(C,)``.
        first: The first positions, shape ``(C,)``.
        centre: The present states' positions, inside the brackets.
        low: Lower ends of the brackets.
        high: Upper ends.
        stream: Source of the positions after the first.

    Returns:
        What was found.

    Source: Neal, "Slice sampling" (2003), figure 5.
    """
    where, low, high, narrowest = first.clone(), low.clone(), high.clone(), _NARROWEST * (high - low)
    payload, proposals = torch.zeros_like(first), torch.zeros_like(first)
    moved = torch.zeros_like(first, dtype=torch.bool)
    active = torch.arange(len(first), device=first.device)
    while len(active):
        tried = where[active]
        values, beside = evaluate(active, tried)
        proposals[active] += 1
        accepted = values > threshold[active]
        moved[active[accepted]] = True
        payload[active[accepted]] = beside[accepted]
        active, tried = active[~accepted], tried[~accepted]
        below = tried < centre[active]
        low[active] = torch.where(below, tried, low[active])
        high[active] = torch.where(below, high[active], tried)
        active = active[(high - low)[active] > narrowest[active]]
        if len(active):
            where[active] = low[active] + stream.take(active) * (high - low)[active]
    return Found(where, payload, proposals, moved)
