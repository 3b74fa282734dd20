"""The walk that chooses a level, against exhaustive search."""

import math

import pytest

from experiments.uncertainty_tuning import choose


@pytest.mark.parametrize("best", [-7, -3, -1, 0, 1, 2, 6])
def test_the_walk_ends_at_the_lowest_of_the_grid(best: int) -> None:
    choice = choose(lambda level: (math.log2(level / 0.1) - best - 0.2) ** 2, 0.1)
    assert choice.level == pytest.approx(0.1 * 2.0**best, rel=1e-12)
    assert choice.level == min(choice.tried, key=lambda pair: pair[1])[0]
    assert len(choice.tried) == len({level for level, _ in choice.tried}) <= 10
    assert choice.tried[0][0] == 0.1 and not choice.at_bound


@pytest.mark.parametrize(("slope", "last"), [(1.0, -8), (-1.0, 8)])
def test_the_walk_is_bounded(slope: float, last: int) -> None:
    choice = choose(lambda level: slope * math.log(level), 1.0)
    assert choice.level == 2.0**last and len(choice.tried) == 10 and choice.at_bound


def test_a_step_that_gains_less_than_the_tolerance_is_not_taken() -> None:
    assert choose(lambda level: 1e-6 * level, 1.0).level == 1.0
    assert choose(lambda level: 1e-6 * level, 1.0, tolerance=1e-8).level == 1 / 64


def test_other_factors() -> None:
    choice = choose(lambda level: abs(math.log(level, 4) - 3), 1.0, factor=4.0)
    assert choice.level == 64 and [level for level, _ in choice.tried] == [1, 4, 0.25, 16, 64, 256]


@pytest.mark.parametrize("ruined", [math.inf, math.nan])
def test_levels_that_ruin_the_network_are_left_behind(ruined: float) -> None:
    """Far too much noise: nothing can be predicted until the level is small enough."""
    choice = choose(lambda level: ruined if level > 0.1 else abs(math.log2(level) + 5), 1.0)
    assert choice.level == 2.0**-5
    assert [score for level, score in choice.tried if level > 0.1] == [math.inf] * 5  # 1, 2, 1/2, 1/4, 1/8


def test_what_cannot_be_chosen_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"nothing can be predicted at any level from 0\.00391 to 2"):
        choose(lambda level: math.inf, 1.0)
    for start, factor in ((0.0, 2.0), (math.inf, 2.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="start must be positive and factor more than 1; got"):
            choose(lambda level: 0.0, start, factor=factor)
