"""DeviationBuffer against a list of the last K rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.ring_buffer import DeviationBuffer

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


def row(i, numel=5000):
    generator = torch.Generator().manual_seed(i)
    return 1e-9 * torch.randn(numel, generator=generator)


def same_bits(a, b):
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def stored(x, dtype):
    """What one row looks like after a trip through a buffer of its own."""
    single = DeviationBuffer(1, x.numel(), dtype=dtype)
    single.push(x)
    return single.rows(torch.float32)[0]


@given(rank=st.integers(0, 6), pushes=st.integers(0, 20))
def test_keeps_the_newest_rows_in_order_of_age(rank, pushes):
    buffer = DeviationBuffer(rank, 2)
    for i in range(pushes):
        buffer.push(torch.tensor([float(i), -float(i)]))
    newest = list(range(pushes))[-rank:] if rank else []
    assert len(buffer) == len(newest) and buffer.num_pushed == pushes
    assert buffer.age_order().dtype == torch.int64
    assert buffer.rows()[:, 0].tolist() == newest
    assert buffer.storage[buffer.age_order(), 1].tolist() == [-float(i) for i in newest]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_storage_dtype(dtype):
    buffer = DeviationBuffer(3, 5000, dtype=dtype)
    for i in range(5):
        buffer.push(row(i))
    assert buffer.storage.dtype == dtype
    rounding = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    for i, kept in zip((2, 3, 4), buffer.rows(torch.float32), strict=True):
        assert torch.equal(kept, stored(row(i), dtype))
        if dtype in rounding:
            assert ((kept - row(i)).abs() <= rounding[dtype] * row(i).abs() + 1e-9 * 2**-30).all()


def test_storage_is_never_reallocated():
    buffer = DeviationBuffer(3, 100)
    address, root, version = buffer.storage.data_ptr(), buffer.storage.mT, buffer.storage._version
    for i in range(7):
        buffer.push(row(i, 100))
        assert root._version > version  # sharers can tell
        version = root._version
    assert buffer.storage.data_ptr() == address
    assert torch.equal(root[:, 6 % 3], row(6, 100))


def test_rank_zero_counts_and_marks_itself_changed():
    buffer = DeviationBuffer(0, 4)
    shared, version = buffer.storage.mT, buffer.storage._version
    buffer.push(torch.ones(4))
    assert buffer.num_pushed == 1 and buffer.rows().shape == (0, 4) and shared._version > version


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stop", [2, 5])
def test_resuming_from_the_state_is_bit_exact(dtype, stop):
    whole, first = DeviationBuffer(3, 5000, dtype=dtype), DeviationBuffer(3, 5000, dtype=dtype)
    for i in range(8):
        whole.push(row(i))
        if i < stop:
            first.push(row(i))
    resumed = DeviationBuffer.from_state({name: tensor.clone() for name, tensor in first.state().items()})
    for i in range(stop, 8):
        resumed.push(row(i))
    assert whole.state().keys() == resumed.state().keys()
    for name, tensor in whole.state().items():
        assert same_bits(resumed.state()[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_row_changes_nothing(dtype, bad):
    buffer = DeviationBuffer(2, 10, dtype=dtype)
    buffer.push(torch.ones(10))
    before = {name: tensor.clone() for name, tensor in buffer.state().items()}
    x = torch.ones(10)
    x[4] = bad
    with pytest.raises(NonFiniteError, match="expected (a )?finite row"):
        buffer.push(x)
    for name, tensor in buffer.state().items():
        assert same_bits(before[name], tensor), name


def test_row_that_overflows_the_storage_is_refused():
    with pytest.raises(NonFiniteError, match="entry 0 is 1e\\+300"):
        DeviationBuffer(1, 1).push(torch.tensor([1e300], dtype=torch.float64))


def test_error_messages():
    with pytest.raises(ValueError, match="rank must be >= 0; got -1"):
        DeviationBuffer(-1, 2)
    with pytest.raises(ValueError, match="storage dtype must be"):
        DeviationBuffer(1, 2, dtype=torch.int32)
    buffer = DeviationBuffer(1, 2, dtype=torch.float16)
    with pytest.raises(ShapeError, match=r"row of shape \(2,\); got \(3,\), torch.float32"):
        buffer.push(torch.ones(3))
    with pytest.raises(ShapeError, match="missing num_pushed"):
        DeviationBuffer.from_state({"storage": torch.ones(1, 2)})
    with pytest.raises(ShapeError, match=r"must have shape \(1, 1\); got None"):
        DeviationBuffer.from_state({"storage": buffer.storage, "num_pushed": torch.zeros(())})
