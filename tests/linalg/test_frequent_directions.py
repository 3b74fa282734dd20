"""The sketch against the dense matrix of its whole stream: the bounds of the paper, in every direction."""

import math

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.linalg.frequent_directions import FrequentDirectionsSketch
from tests.oracles import C, assert_close

F32, F64 = torch.float32, torch.float64


def stream(number: int, dim: int, decay: float, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """Rows with singular values that fall as i^-decay, the strong directions last."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(number, number, dtype=F64, generator=generator)
    right = torch.randn(number, dim, dtype=F64, generator=generator) / dim**0.5
    return (left * torch.arange(number, 0, -1, dtype=F64) ** -decay @ right).to(dtype)


def absorb(rows: Tensor, size: int) -> FrequentDirectionsSketch:
    sketch = FrequentDirectionsSketch(size, rows.shape[1], dtype=rows.dtype)
    for row in rows:
        sketch.push(row)
    return sketch


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("number", "dim", "size"), [(60, 30, 2), (60, 30, 8), (45, 100, 8), (9, 4, 3)])
def test_error_bounds(number: int, dim: int, size: int, decay: float, dtype: torch.dtype) -> None:
    rows = stream(number, dim, decay, dtype)
    sketch, exact = absorb(rows, size), rows.double()
    kept = sketch.rows.double()
    assert sketch.num_pushed == number and len(kept) <= 2 * size
    lost = torch.linalg.eigvalsh(exact.mT @ exact - kept.mT @ kept)
    rounding = 10 * C[dtype] * exact.norm().square().item()
    delta = sketch.shrinkage.item()
    assert lost.min() > -rounding
    assert lost.max() < delta + rounding
    tails = torch.linalg.svdvals(exact).square()
    for k in range(size):
        assert delta <= tails[k:].sum() / (size - k) + rounding
    if number > 2 * size:
        assert 0 < delta


def test_the_bound_is_nearly_reached() -> None:
    """Rows of equal weight in many directions: what is lost is of the size of the bound, which so says something."""
    rows = stream(60, 30, 0.0)
    sketch = absorb(rows, 4)
    lost = torch.linalg.eigvalsh(rows.mT @ rows - sketch.rows.mT @ sketch.rows)
    assert lost.max() > 0.5 * sketch.shrinkage


def test_a_stream_of_low_rank_is_kept_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 4, dtype=F64, generator=generator) @ torch.randn(4, 40, dtype=F64, generator=generator)
    sketch = absorb(rows, 5)
    assert_close(sketch.rows.mT @ sketch.rows, rows.mT @ rows, F64, 100.0)
    assert sketch.shrinkage < 1e-9
    zeros = absorb(torch.zeros(20, 3), 2)
    assert zeros.shrinkage == 0 and not zeros.rows.any()


def test_the_compiled_kernels_agree() -> None:
    rows = stream(12, 20_000, 0.5, F32)
    sketch, exact = absorb(rows, 3), rows.double()
    values = torch.linalg.svdvals(sketch.rows.double()).square()
    whole = torch.linalg.svdvals(exact).square()
    assert (values[:2] <= whole[:2] * (1 + 1e-5)).all()
    assert (values[:2] >= whole[:2] - sketch.shrinkage - 1e-5 * whole[0]).all()


def test_memory_and_state_go_on_bit_for_bit() -> None:
    rows = stream(40, 12, 1.0)
    whole, half = absorb(rows, 3), absorb(rows[:17], 3)
    place = whole.rows.data_ptr()
    assert whole.state()["storage"].shape == (6, 12)
    copy = {name: tensor.clone() for name, tensor in half.state().items()}
    again = FrequentDirectionsSketch(3, 12, dtype=F64)
    again.load_state(copy)
    for row in rows[17:]:
        again.push(row)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, again.state()[name]), name
    whole.push(rows[0])
    assert whole.rows.data_ptr() == place


def test_bad_input_changes_nothing() -> None:
    sketch = absorb(stream(4, 5, 1.0), 2)
    before = {name: tensor.clone() for name, tensor in sketch.state().items()}
    for poison in (math.nan, math.inf, 1e200):
        row = torch.zeros(5, dtype=F64)
        row[3] = poison
        with pytest.raises(NonFiniteError, match="expected entries below .* entry 3 is"):
            sketch.push(row)
    with pytest.raises(ShapeError, match=r"floating row of shape \(5,\); got \(4,\)"):
        sketch.push(torch.zeros(4))
    with pytest.raises(ShapeError, match="storage of the sketch must be .* got none"):
        sketch.load_state({})
    with pytest.raises(ShapeError, match="cannot hold 5 of 5 pushed"):
        sketch.load_state({**before, "counts": torch.tensor([5, 5])})
    assert all(torch.equal(tensor, before[name]) for name, tensor in sketch.state().items())
    with pytest.raises(ValueError, match="sketch_size must be at least 2; got 1"):
        FrequentDirectionsSketch(1, 5)
    with pytest.raises(ValueError, match="dtype must be"):
        FrequentDirectionsSketch(2, 5, dtype=torch.float16)
