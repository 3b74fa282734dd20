"""Choose one positive number, a noise level say, by a walk along a geometric grid."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A level, and what was tried for it.

    Attributes:
        level: The best of the tried ones.
        tried: Each level with its score, in the order of the trials; infinite where nothing could be predicted.
        at_bound: Whether the walk ended because it had gone as far as it may, so that a level beyond may be better.
    """

    level: float
    tried: tuple[tuple[float, float], ...]
    at_bound: bool = False


def choose(
    score: Callable[[float], float], start: float, *, factor: float = 2.0, tolerance: float = 1e-5, max_steps: int = 8
) -> Choice:
    """Walk from `start` up or down, whichever is better, until the score no longer falls.

    Every method with a level to choose walks in the same way, so none is tuned harder than another.

    Args:
        score: Less is better; NaN counts as infinite.
        start: Positive; the published level where there is one.
        factor: From one level to the next, > 1.
        tolerance: Least decrease that counts; a step that gains less ends the walk.
        max_steps: Most steps in the better direction.

    Returns:
        The level with the lowest score, and all that were tried: at most max_steps + 2.

    Raises:
        ValueError: If start or factor is out of range, or every score tried is infinite.
    """
    if not (0 < start < math.inf and factor > 1):
        raise ValueError(f"start must be positive and factor more than 1; got {start} and {factor}")
    tried: dict[float, float] = {}

    def at(step: int) -> float:
        level = start * factor**step
        if level not in tried:
            found = score(level)
            tried[level] = math.inf if math.isnan(found) else found
        return tried[level]

    here, up, down = at(0), at(1), at(-1)
    direction = 1 if up < down else -1
    step, best = 0, here
    if math.isinf(here) and math.isinf(min(up, down)):  # all too large, as a level that ruins the network is
        while math.isinf(best) and -step < max_steps:
            step -= 1
            best = at(step)
        direction = -1
    while abs(step) < max_steps and at(step + direction) < best - tolerance:
        step += direction
        best = at(step)
    if math.isinf(best):
        raise ValueError(f"nothing can be predicted at any level from {min(tried):.3g} to {max(tried):.3g}")
    return Choice(start * factor**step, tuple(tried.items()), at_bound=abs(step) == max_steps)
