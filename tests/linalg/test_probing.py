"""Products with probes: what is accepted, how probes are drawn, what is refused."""

import pytest
import torch
from linear_operator.operators import DenseLinearOperator
from torch import Tensor

from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, ShapeError
from lowrank_bdl.linalg import memory, probing
from lowrank_bdl.linalg.probing import ProbedMatrix, estimate_mean, exact_estimate, require_count, row_dots
from tests.linalg.estimates import seeded


def test_operators_tensors_and_functions_give_the_same_products() -> None:
    dense = torch.randn(7, 7, generator=seeded(0)).double()
    rows = torch.randn(3, 7, generator=seeded(1)).double()
    counts: list[int] = []
    for given in (DenseLinearOperator(dense), dense):
        probed = ProbedMatrix(given, progress=counts.append)
        assert (probed.size, probed.dtype, probed.work_dtype) == (7, torch.float64, torch.float64)
        torch.testing.assert_close(probed.product(rows), rows @ dense.mT)
    probed = ProbedMatrix(lambda v: dense @ v, 7, torch.float64, progress=counts.append)
    torch.testing.assert_close(probed.product(rows), rows @ dense.mT)
    probed.product(rows[:2])
    assert counts == [3, 3, 3, 5] and probed.num_matvecs == 5


def test_half_precision_is_multiplied_as_it_is_and_summed_in_float32() -> None:
    seen: list[Tensor] = []
    probed = ProbedMatrix(lambda v: (seen.append(v), 2 * v)[1], 3, torch.bfloat16)
    product = probed.product(torch.full((1, 3), 1.0 + 2**-12))
    assert seen[0].dtype == torch.bfloat16 and product.dtype == torch.float32 and bool((product == 2).all())
    assert ProbedMatrix(lambda v: v, 3).dtype == torch.get_default_dtype()


def test_no_graph_is_kept() -> None:
    weight = torch.ones(4, requires_grad=True)
    assert not ProbedMatrix(lambda v: weight * v, 4).product(torch.ones(2, 4)).requires_grad
    assert not ProbedMatrix(torch.diag(weight)).product(torch.ones(2, 4)).requires_grad


def test_probes_are_signs_that_do_not_depend_on_their_number() -> None:
    probed = ProbedMatrix(torch.eye(1000).double())
    many, few = probed.probes(5, seeded(3)), probed.probes(2, seeded(3))
    assert torch.equal(many[:2], few) and bool((many.abs() == 1).all())
    g = seeded(3)
    assert torch.equal(torch.cat((probed.probes(1, g), probed.probes(4, g))), many)
    state = torch.random.get_rng_state()
    probed.probes(2, seeded(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    # 5000 signs: sums within 5.2 standard deviations but for 2e-7; so for the products of neighbours
    assert abs(many.sum().item()) < 5.2 * 5000**0.5 and abs((many[:, 1:] * many[:, :-1]).sum().item()) < 5.2 * 5000**0.5


def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "BLOCK_BYTES", 3 * 2 * 10 * 8)
    assert list(ProbedMatrix(torch.eye(10).double()).blocks(7, 2, "test")) == [3, 3, 1]
    assert list(ProbedMatrix(torch.eye(10).double()).blocks(2, 2, "test")) == [2]
    assert list(ProbedMatrix(torch.eye(10).double()).blocks(2, 100, "test")) == [1, 1]
    assert list(ProbedMatrix(lambda v: v, 10).blocks(3, 1, "test")) == [1, 1, 1]
    monkeypatch.setattr(memory, "available_memory", lambda device: 2 * 3 * 10 * 8 - 1)
    with pytest.raises(MemoryLimitError, match=r"the test needs 0\.00 GiB on cpu"):
        next(ProbedMatrix(torch.eye(10).double()).blocks(7, 2, "the test"))


def test_estimates_of_means() -> None:
    estimate = estimate_mean(torch.tensor([1.0, 2.0, 6.0]).double(), 9)
    assert estimate.value.item() == 3.0 and estimate.num_matvecs == 9 and estimate.truncation.item() == 0
    assert estimate.standard_error.item() == pytest.approx((14 / 2 / 3) ** 0.5)
    single = estimate_mean(torch.tensor([4.0]).double(), 1)
    assert single.value.item() == 4.0 and bool(single.standard_error.isnan())
    exact = exact_estimate(torch.ones(3).double())
    assert exact.num_matvecs == 0 and torch.equal(exact.standard_error, torch.zeros(3).double())


def test_inner_products_of_rows_are_summed_in_float64() -> None:
    rows = torch.ones(1, 2**25)
    rows[0, 0] = 2.0**30
    assert row_dots(rows[:, :], torch.ones_like(rows)).tolist() == [2.0**30 + 2**25 - 1]


def test_bad_matrices() -> None:
    for shape in ((3, 4), (2, 3, 3), (3,), (0, 0)):
        with pytest.raises(ShapeError, match=r"the matrix must be \(D, D\) with D >= 1; got \("):
            ProbedMatrix(torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"must be \(D, D\) with D >= 1; got \(2, 4, 4\)"):
        ProbedMatrix(DenseLinearOperator(torch.eye(4).expand(2, 4, 4)))
    with pytest.raises(ShapeError, match="size must be left out or 3, that of the matrix; got 4"):
        ProbedMatrix(torch.eye(3), size=4)
    with pytest.raises(ValueError, match="a function as matrix needs its size: size=D"):
        ProbedMatrix(lambda v: v)
    with pytest.raises(ValueError, match="size must be an integer >= 1; got 0"):
        ProbedMatrix(lambda v: v, 0)
    with pytest.raises(TypeError, match="must be a LinearOperator, a tensor or a function; got list"):
        ProbedMatrix([[1.0]])  # type: ignore[arg-type]
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=f"must hold real floating-point numbers; got {dtype}"):
            ProbedMatrix(torch.eye(3, dtype=dtype))


def test_bad_products() -> None:
    with pytest.raises(ShapeError, match=r"the function must give \(3,\) for a vector of that shape; got \(2,\)"):
        ProbedMatrix(lambda v: v[:2], 3).product(torch.ones(1, 3))
    probed = ProbedMatrix(torch.eye(3))
    probed.product(torch.ones(4, 3))
    with pytest.raises(NonFiniteError, match="holds NaN or infinity, or overflows: one of the first 4"):
        probed.require_finite(torch.ones(2), torch.tensor([1.0, torch.nan]))
    probed.require_finite(torch.ones(2))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_bad_counts(value) -> None:
    with pytest.raises(ValueError, match=f"num_probes must be an integer >= 1; got {value!r}"):
        require_count("num_probes", value)
    require_count("num_probes", 1)
