"""Block floating point and uniform levels: grids, exponents, unbiased rounding, refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.training.quantization import block_floating_point, round_uniform, uniform_step


def reference(values: list[float], bits: int, noise: list[float]) -> list[float]:
    """The definition, one number after the other, in Python's own floats."""
    largest = max(abs(value) for value in values)
    if largest == 0:
        return [0.0] * len(values)
    delta = 2.0 ** (math.floor(math.log2(largest)) - (bits - 2))
    limit = 2 ** (bits - 1)
    return [delta * min(max(math.floor(x / delta + u), -limit), limit - 1) for x, u in zip(values, noise, strict=True)]


@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=8),
    st.integers(2, 16),
    st.integers(0, 2**31),
)
def test_is_the_definition(values: list[float], bits: int, seed: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    if x.abs().max() < 1e-290:
        x = torch.zeros_like(x)
    noise = torch.rand(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = block_floating_point(x, bits, generator=torch.Generator().manual_seed(seed))
    assert found.tolist() == reference(x.tolist(), bits, noise.tolist())
    nearest = block_floating_point(x, bits, rounding="nearest")
    assert nearest.tolist() == reference(x.tolist(), bits, [0.5] * len(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_gets_at_most_that_many_levels(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(4000, generator=generator).to(dtype)
    found = block_floating_point(x, 4, generator=generator)
    assert found.dtype == dtype and len(found.unique()) <= 16
    step = 2.0 ** (math.floor(math.log2(x.abs().max().item())) - 2)
    assert torch.equal(found.double() / step, (found.double() / step).round())
    inside = (x.double() / step < 7) & (x.double() / step > -8)
    assert bool(((found.double() - x.double()).abs()[inside] < step).all())


def test_what_the_format_holds_is_left_alone(generator: torch.Generator) -> None:
    x = block_floating_point(torch.randn(50, generator=generator), 8, generator=generator)
    assert torch.equal(block_floating_point(x, 8, generator=generator), x)


def test_stochastic_rounding_is_unbiased_and_nearest_is_not(generator: torch.Generator) -> None:
    """Mean over 40,000 roundings of each of 6 numbers within 5 standard errors: false alarms below 4e-6."""
    x = torch.tensor([1.0, 0.3, -0.21, 0.77, -0.999, 0.01], dtype=torch.float64)
    step, count = 2.0**-2, 40_000
    rounded = torch.stack([block_floating_point(x, 4, generator=generator) for _ in range(400)])
    wide = block_floating_point(x.repeat(count // 400 - 1, 1), 4, generator=generator)
    many = torch.cat([rounded, *[block_floating_point(x.repeat(99, 1), 4, generator=generator) for _ in range(400)]])
    assert len(many) == count and wide.shape == (99, 6)
    share = x / step - (x / step).floor()
    error = step * (share * (1 - share) / count).sqrt()
    assert bool(((many.mean(0) - x).abs() <= 5 * error + 1e-12).all())
    biased = block_floating_point(x, 4, rounding="nearest")
    assert bool(((biased - x).abs() > 5 * error).any())  # the test has power


def test_blocks_along_an_axis_have_exponents_of_their_own(generator: torch.Generator) -> None:
    x = torch.randn(3, 2, 2, generator=generator) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    for dim in (0, -3):
        whole = block_floating_point(x, 6, block_dim=dim, rounding="nearest")
        parts = torch.stack([block_floating_point(row, 6, rounding="nearest") for row in x])
        assert torch.equal(whole, parts)
    assert not block_floating_point(x, 6, rounding="nearest")[0].any()  # one exponent drowns the small


def test_zeros_subnormals_and_empty_tensors() -> None:
    assert torch.equal(block_floating_point(torch.zeros(3), 8), torch.zeros(3))
    x = torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    assert torch.equal(block_floating_point(x, 8, block_dim=0), x)
    assert block_floating_point(torch.zeros(0, 2), 8).shape == (0, 2)
    small = torch.tensor([1e-38, -3e-39])
    found = block_floating_point(small, 8, rounding="nearest")
    assert bool(((found - small).abs() <= 1e-38 / 2**6).all()) and bool(found.any())
    large = torch.tensor([3e38, -1e38])
    found = block_floating_point(large, 8, rounding="nearest")
    assert bool(((found - large).abs() <= 2.0**127 / 2**6).all())


def test_the_input_is_not_changed_and_carries_no_gradient(generator: torch.Generator) -> None:
    x = torch.randn(5, generator=generator, requires_grad=True)
    before = x.detach().clone()
    assert not block_floating_point(x, 4, generator=generator).requires_grad
    assert torch.equal(x.detach(), before)


def test_refuses_bad_input() -> None:
    x = torch.ones(2, 3)
    for bits in (1, 25, True, 8.0):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 24; got"):
            block_floating_point(x, bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounding must be 'stochastic' or 'nearest'; got 'up'"):
        block_floating_point(x, 8, rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"block_dim must be an axis of values of shape \(2, 3\); got 2"):
        block_floating_point(x, 8, block_dim=2)
    with pytest.raises(ShapeError, match=r"values must be floating point; got torch\.int64"):
        block_floating_point(x.long(), 8)
    with pytest.raises(NonFiniteError, match="values must be finite to share an exponent"):
        block_floating_point(torch.tensor([1.0, math.nan]), 8)
    with pytest.raises(NonFiniteError, match="values must be finite to be put on levels"):
        uniform_step(torch.tensor([1.0, math.inf]), 8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_step_loses_no_more_than_a_fine_search(bits: int, generator: torch.Generator) -> None:
    x = torch.randn(500, generator=generator, dtype=torch.float64)
    step = uniform_step(x, bits)

    def loss(value: torch.Tensor) -> float:
        return (x - round_uniform(x, value, bits)).square().sum().item()

    fine = min(loss(value) for value in torch.linspace(0.01, 4, 4000, dtype=torch.float64))
    assert loss(step) <= 1.01 * fine
    levels = (round_uniform(x, step, bits) / step).unique()
    assert len(levels) <= 2**bits - 1 and torch.allclose(levels, levels.round())


def test_uniform_levels_of_zeros_and_of_levels() -> None:
    assert uniform_step(torch.zeros(4), 2).item() == 0
    assert torch.equal(round_uniform(torch.ones(3), 0.0, 2), torch.zeros(3))
    x = torch.tensor([-0.3, 0.0, 0.3, 0.3])
    torch.testing.assert_close(round_uniform(x, uniform_step(x, 2), 2), x)
