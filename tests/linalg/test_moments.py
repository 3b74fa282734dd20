"""StreamingMoments against a float64 two-pass computation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.moments import StreamingMoments, column_chunks, first_unusable


def weights(seed, count=40, numel=20_000, sd=1e-4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (1 + sd * torch.randn(count, numel, generator=generator, dtype=torch.float64)).to(dtype)


def collect(rows, **kwargs):
    moments = StreamingMoments(rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32), **kwargs)
    for row in rows:
        moments.update(row)
    return moments


def relative_error(actual, expected):
    return ((actual.double() - expected).abs() / expected).max().item()


def naive_variance(rows):
    """E[x²] − E[x]² in the dtype of the rows, as released SWAG code keeps it."""
    return (rows.square().mean(0) - rows.mean(0).square()) * rows.shape[0] / (rows.shape[0] - 1)


@pytest.mark.parametrize("seed", range(5))
def test_variance_of_weights_near_one(seed):
    rows = weights(seed)
    moments, expected = collect(rows), rows.double().var(0)
    assert relative_error(moments.variance(), expected) <= 1e-5  # the requirement is 1e-4
    assert (moments.mean.double() - rows.double().mean(0)).abs().max() <= 2**-24  # correctly rounded but for a tie
    assert relative_error(naive_variance(rows), expected) > 1  # this test tells the two apart


def test_variance_far_from_the_first_vector():
    """The shift is only the first vector: a drift of 1000 standard deviations must not spoil the rest."""
    rows = weights(0)
    rows[0] += 0.1
    assert relative_error(collect(rows).variance(), rows.double().var(0)) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_vectors_get_float32_sums(dtype):
    rows = weights(1, sd=0.05, dtype=dtype)
    moments = StreamingMoments(rows.shape[1])
    for row in rows:
        moments.update(row)
    assert moments.mean.dtype == moments.variance().dtype == torch.float32
    assert relative_error(moments.variance(), rows.double().var(0)) <= 1e-5


def test_float64_stays_float64():
    rows = weights(2, dtype=torch.float64)
    moments = collect(rows)
    assert moments.variance().dtype == torch.float64
    assert relative_error(moments.variance(), rows.var(0)) <= 1e-9  # eps · mean / sd = 2e-12


@pytest.mark.parametrize("split", [0, 1, 17, 39, 40])
def test_merge_equals_one_run(split):
    rows = weights(3)
    whole, left, right = collect(rows), collect(rows[:split]), collect(rows[split:])
    before = {name: tensor.clone() for name, tensor in right.state().items()}
    left.merge(right)
    assert left.count == whole.count == 40
    assert relative_error(left.variance(), whole.variance().double()) <= 1e-6
    assert (left.mean - whole.mean).abs().max() <= 2**-23
    assert all(torch.equal(before[name], tensor) for name, tensor in right.state().items())


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12), st.integers(0, 12), st.integers(0, 2))
def test_any_split_and_correction(values, split, prior):
    rows = torch.tensor(values, dtype=torch.float64)[:, None]
    known = {"prior_mean": torch.tensor([5.0]), "prior_count": prior} if prior else {}
    left = StreamingMoments(1, dtype=torch.float64, **known)
    right = StreamingMoments(1, dtype=torch.float64)
    for i, row in enumerate(rows):
        (left if i < split else right).update(row)
    left.merge(right)
    torch.testing.assert_close(left.variance(0), rows.var(0, correction=0), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(left.variance(), rows.var(0), rtol=1e-9, atol=1e-11)
    expected = (rows.sum(0) + prior * 5) / (len(values) + prior)
    torch.testing.assert_close(left.mean, expected, rtol=1e-9, atol=1e-11)


def test_merge_of_different_dtypes_and_of_nothing():
    rows = weights(4, count=6)
    wide = collect(rows.double())
    wide.merge(collect(rows))
    torch.testing.assert_close(wide.variance(0), rows.double().var(0, correction=0), rtol=1e-6, atol=0)
    empty = StreamingMoments(rows.shape[1])
    empty.merge(StreamingMoments(rows.shape[1]))
    assert empty.count == 0


def test_prior_mean_counts_in_the_mean_only():
    rows = weights(5, sd=0.1, numel=50)
    prior = rows[:10].mean(0)
    moments = collect(rows[10:], prior_mean=prior, prior_count=10)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.variance(), rows[10:].var(0), rtol=1e-5, atol=0)
    assert (moments.count, moments.prior_count) == (30, 10)
    fresh = StreamingMoments(50, prior_mean=prior, prior_count=10)
    assert torch.equal(fresh.mean, prior)


def test_center_is_exactly_zero_for_the_first_vector():
    rows = weights(6, count=2, numel=100)
    moments = collect(rows[:1])
    assert torch.equal(moments.center_(rows[0].clone()), torch.zeros(100))
    moments.update(rows[1])
    expected = rows[1].double() - rows.double().mean(0)
    assert relative_error(moments.center_(rows[1].clone()).abs(), expected.abs()) <= 1e-6


def test_constant_stream_has_zero_variance():
    moments = collect(torch.full((7, 3), 0.1))
    assert torch.equal(moments.variance(), torch.zeros(3))
    assert torch.equal(moments.mean, torch.full((3,), 0.1))


def test_resuming_from_the_state_is_bit_exact():
    rows = weights(7, count=9, numel=300)
    whole, first = collect(rows), collect(rows[:4])
    resumed = StreamingMoments.from_state({name: tensor.clone() for name, tensor in first.state().items()})
    for row in rows[4:]:
        resumed.update(row)
    assert resumed.count == 9
    for name, tensor in whole.state().items():
        assert torch.equal(resumed.state()[name], tensor), name


def test_from_state_shares_memory():
    moments = collect(weights(8, count=2, numel=3))
    StreamingMoments.from_state(moments.state()).update(torch.ones(3))
    assert moments.count == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_unusable_vector_changes_nothing(bad):
    moments = collect(weights(9, count=3, numel=200_000))  # more than one chunk
    before = {name: tensor.clone() for name, tensor in moments.state().items()}
    x = torch.ones(200_000)
    x[150_001] = bad
    with pytest.raises(NonFiniteError, match=r"below 4\.6e\+18 in magnitude; entry 150001 is"):
        moments.update(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in moments.state().items())


def test_first_unusable_of_nothing_and_of_good_values():
    assert first_unusable(torch.empty(0), 1.0) is None
    assert first_unusable(torch.tensor([0.5, -0.5]), 1.0) is None
    assert first_unusable(torch.tensor([0.5, -1.0]), 1.0) == 1


@pytest.mark.parametrize("numel,block", [(0, 1), (5, 1), (300_000, 4096), (131_072, 65_536)])
def test_chunks_cover_the_axis_in_whole_blocks(numel, block):
    chunks = list(column_chunks(numel, torch.device("cpu"), block))
    assert [i for part in chunks for i in (part.start, part.stop)][1:-1:2] == [part.start for part in chunks[1:]]
    assert sum(part.stop - part.start for part in chunks) == numel
    assert all(part.start % block == 0 for part in chunks)


def test_error_messages():
    with pytest.raises(ValueError, match=r"must be torch.float32 or torch.float64; got torch.float16"):
        StreamingMoments(2, dtype=torch.float16)
    with pytest.raises(ValueError, match="exactly if prior_mean is given; got 3"):
        StreamingMoments(2, prior_count=3)
    with pytest.raises(ShapeError, match=r"expected shape \(2,\); got \(3,\)"):
        StreamingMoments(2, prior_mean=torch.ones(3), prior_count=1)
    moments = StreamingMoments(2)
    with pytest.raises(ShapeError, match=r"expected shape \(2,\); got \(1, 2\)"):
        moments.update(torch.ones(1, 2))
    with pytest.raises(ShapeError, match="expected a real floating dtype; got torch.int64"):
        moments.update(torch.ones(2, dtype=torch.int64))
    moments.update(torch.ones(2))
    with pytest.raises(ValueError, match="correction=1 needs more than 1 vectors; got 1"):
        moments.variance()
    assert torch.equal(moments.variance(correction=0), torch.zeros(2))
    with pytest.raises(ShapeError, match="expected moments of 2 coordinates; got 3"):
        moments.merge(StreamingMoments(3))
    with pytest.raises(ValueError, match="without a prior mean; got one of 4 vectors"):
        moments.merge(StreamingMoments(2, prior_mean=torch.ones(2), prior_count=4))
    with pytest.raises(ShapeError, match="missing sum_sq, count, prior_count"):
        StreamingMoments.from_state({"shift": torch.ones(2), "offset": torch.ones(2)})
    with pytest.raises(ShapeError, match=r"sum_sq must have the shape \(2,\) and dtype torch.float32 of shift"):
        StreamingMoments.from_state({**moments.state(), "sum_sq": torch.ones(3)})


@pytest.mark.parametrize("prior_count", [0, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_deviations_written_on_the_way_are_those_from_the_new_mean(prior_count, stored):
    g = torch.Generator().manual_seed(0)
    prior = torch.randn(1000, generator=g) if prior_count else None
    moments = StreamingMoments(1000, prior_mean=prior, prior_count=prior_count)
    for _ in range(4):
        x, row = torch.randn(1000, generator=g), torch.full((1000,), float("nan"), dtype=stored)
        moments.update(x, deviation=row)
        assert torch.equal(row, moments.center_(x.clone()).to(stored))
        rounding = 2.0**-8 if stored is torch.bfloat16 else 1e-6
        torch.testing.assert_close(row.double(), x.double() - moments.mean.double(), rtol=rounding, atol=1e-6)
