"""When weights are collected."""

import pytest

from lowrank_bdl.training.collection import Collection


def moments(collection: Collection, epochs: int, batches: int) -> list[tuple[int, int]]:
    pairs = [(e, b) for e in range(1, epochs + 1) for b in range(1, batches + 1)]
    return [(e, b) for e, b in pairs if collection.is_due(e, b, batches)]


def test_the_published_rule_collects_after_139_of_300_epochs() -> None:
    collection = Collection(None, start=161)
    due = [epoch for epoch in range(1, 301) if collection.in_epoch(epoch)]
    assert due[0] == 162 and due[-1] == 300 and len(due) == 139


def test_several_epochs_apart_and_in_the_middle_of_cycles() -> None:
    assert moments(Collection(None, start=2, every=3), 9, 1) == [(5, 1), (8, 1)]
    assert moments(Collection(None, start=-2, every=4), 11, 1) == [(2, 1), (6, 1), (10, 1)]


@pytest.mark.parametrize(
    "per_epoch,batches,expected", [(1, 5, [5]), (2, 5, [3, 5]), (3, 7, [3, 5, 7]), (9, 4, [1, 2, 3, 4])]
)
def test_snapshots_of_an_epoch_are_spread_and_the_last_is_at_its_end(
    per_epoch: int, batches: int, expected: list[int]
) -> None:
    assert moments(Collection(None, start=1, per_epoch=per_epoch), 2, batches) == [(2, b) for b in expected]


def test_every_step() -> None:
    assert moments(Collection(None, start=1, per_epoch=None), 2, 3) == [(2, 1), (2, 2), (2, 3)]


def test_bad_intervals_are_refused() -> None:
    with pytest.raises(ValueError, match="every must be at least 1 epoch; got 0"):
        Collection(None, every=0)
    with pytest.raises(ValueError, match="per_epoch must be at least 1, or None for every step; got 0"):
        Collection(None, per_epoch=0)
