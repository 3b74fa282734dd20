"""Rows in few bits: error bounds, idempotence, ragged ranges of columns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.block_scaling import decode_rows, encode_rows, needs_scale, num_blocks

NARROW = {torch.float16: 2.0**-11, torch.float8_e4m3fn: 2.0**-4}
ALL = [*NARROW, torch.int8]


def rows(numel=10_000, seed=0, size=1e-9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, numel, generator=generator, dtype=torch.float64)
    return (x * torch.tensor([1.0, 1e-6, 1e4])[:, None].double() * size).to(dtype)


@pytest.mark.parametrize("dtype", list(NARROW))
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-25])
def test_relative_error_of_floating_codes(dtype, size):
    x = rows(size=size)
    x[:, ::7] *= 1e-2  # entries of unequal size in one block
    back = decode_rows(*encode_rows(x, dtype), torch.float32).double()
    largest = x.abs().amax(dim=-1, keepdim=True).double()
    # the floor is half a subnormal step of a block whose largest entry is as large as that of the row
    steps = {torch.float16: 2.0**-39, torch.float8_e4m3fn: 2.0**-17}
    assert ((back - x.double()).abs() <= NARROW[dtype] * x.double().abs() + steps[dtype] * largest).all()


def test_error_of_int8():
    x = rows()
    back = decode_rows(*encode_rows(x, torch.int8), torch.float32)
    largest = torch.cat([part.abs().amax(-1, keepdim=True).expand_as(part) for part in x.split(4096, -1)], -1)
    assert ((back - x).abs() <= largest / 254 * (1 + 1e-5)).all()


def test_plain_float16_would_underflow():
    """The reason why scales exist."""
    x = rows()
    assert (x.half() == 0).float().mean() > 0.6
    assert (decode_rows(*encode_rows(x, torch.float16), torch.float32)[x != 0] != 0).all()


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("numel", [1, 4095, 4096, 4097, 140_000])
def test_shapes_and_blocks(dtype, numel):
    x = rows(numel)
    codes, scale = encode_rows(x, dtype)
    assert codes.shape == x.shape and codes.dtype == dtype
    assert scale.shape == (3, num_blocks(numel)) and scale.dtype == torch.float32
    for b in range(num_blocks(numel)):  # each block is encoded by itself
        part = slice(4096 * b, 4096 * (b + 1))
        alone, alone_scale = encode_rows(x[:, part], dtype)
        assert torch.equal(alone.float(), codes[:, part].float()) and torch.equal(alone_scale, scale[:, b : b + 1])


@pytest.mark.parametrize("dtype", list(NARROW))
def test_encoding_again_changes_no_bit(dtype):
    codes, scale = encode_rows(rows(), dtype)
    again, again_scale = encode_rows(decode_rows(codes, scale, torch.float32), dtype)
    decoded, decoded_again = decode_rows(codes, scale, torch.float32), decode_rows(again, again_scale, torch.float32)
    assert torch.equal(decoded, decoded_again)


@pytest.mark.parametrize("dtype", ALL)
@given(data=st.data())
def test_any_range_of_columns(dtype, data):
    numel, block = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    start = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(start, numel))
    codes, scale = encode_rows(rows(numel, seed=numel), dtype, block)
    whole = decode_rows(codes, scale, torch.float64, block)
    part = decode_rows(codes[:, start:end], scale, torch.float64, block, start=start)
    assert torch.equal(part, whole[:, start:end])
    expected = codes.double() * scale.double().repeat_interleave(block, -1)[:, :numel]
    assert torch.equal(whole, expected)


def test_transposed_view_and_batch_axes():
    x = rows(50).unflatten(-1, (2, 25)).movedim(-2, 0)  # (2, 3, 25), not contiguous
    codes, scale = encode_rows(x, torch.float16, block=8)
    assert scale.shape == (2, 3, 4)
    root = codes.mT.contiguous()  # (2, 25, 3)
    torch.testing.assert_close(decode_rows(root.mT, scale, torch.float32, 8), x, rtol=5e-4, atol=0)


@pytest.mark.parametrize("dtype", ALL)
def test_extreme_values(dtype):
    zero = torch.zeros(1, 10)
    codes, scale = encode_rows(zero, dtype)
    assert torch.equal(decode_rows(codes, scale, torch.float32), zero) and torch.equal(scale, torch.ones(1, 1))
    huge = torch.tensor([[3e38, -3e38, 1.0]])
    back = decode_rows(*encode_rows(huge, dtype), torch.float32)
    torch.testing.assert_close(back[0, :2], huge[0, :2], rtol=7e-2, atol=0)
    tiny = decode_rows(*encode_rows(torch.tensor([[1e-44, 0.0]]), dtype), torch.float32)
    assert tiny.isfinite().all() and (tiny.abs() <= 2e-38).all()


def test_empty_rows():
    codes, scale = encode_rows(torch.empty(3, 0), torch.float16)
    assert codes.shape == (3, 0) and scale.shape == (3, 0)
    codes, scale = encode_rows(torch.empty(0, 10), torch.float16)
    assert decode_rows(codes, scale, torch.float32).shape == (0, 10)


def test_out_is_written_and_untouched_on_error():
    x = rows(20)
    out = torch.zeros(3, 20, dtype=torch.float16), torch.zeros(3, 1)
    codes, scale = encode_rows(x, torch.float16, out=out)
    assert codes is out[0] and scale is out[1] and codes.any()
    before = codes.clone(), scale.clone()
    for bad in (float("nan"), float("inf")):
        x[1, 3] = bad
        with pytest.raises(NonFiniteError, match="finite rows to encode as torch.float16"):
            encode_rows(x, torch.float16, out=out)
    assert torch.equal(codes, before[0]) and torch.equal(scale, before[1])
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        encode_rows(torch.tensor([[1e300]], dtype=torch.float64), torch.float16)


def test_error_messages():
    assert not needs_scale(torch.bfloat16)
    with pytest.raises(ValueError, match=r"float8_e4m3fn or int8; got torch.int64"):
        needs_scale(torch.int64)
    with pytest.raises(ValueError, match=r"rows in torch.bfloat16 take no scale"):
        encode_rows(torch.ones(1, 2), torch.bfloat16)
    with pytest.raises(ShapeError, match=r"out must be torch.float16 codes \(1, 2\) and scales \(1, 1\)"):
        encode_rows(torch.ones(1, 2), torch.float16, out=(torch.ones(1, 3).half(), torch.ones(1, 1)))
    with pytest.raises(ShapeError, match=r"for columns 4095 to 4097; got \(1, 1\)"):
        decode_rows(torch.ones(1, 2).half(), torch.ones(1, 1), torch.float32, start=4095)
