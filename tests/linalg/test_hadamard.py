"""The fast transform and the random directions made of it, against dense matrices and the exact law of the signs."""

from itertools import permutations, product

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.hadamard import RandomizedHadamardLinearOperator, hadamard_transform
from tests.oracles import assert_close

F64 = torch.float64


@pytest.mark.parametrize("n", [1, 2, 8, 16, 32, 64, 512])
def test_transform(n: int, device: torch.device) -> None:
    matrix = torch.from_numpy(hadamard(n)).double()
    x = torch.randn(2, 3, n, dtype=F64, generator=torch.Generator().manual_seed(n))
    found = hadamard_transform(x.to(device)).to("cpu")
    assert_close(found, x @ matrix, F64, 10.0)
    assert_close(hadamard_transform(found), n * x, F64, 10.0)
    assert_close(hadamard_transform(x.float()), x.float().double() @ matrix, torch.float32)
    assert_close(torch.func.vmap(hadamard_transform)(x), x @ matrix, F64, 10.0)


def test_transform_has_a_gradient_and_refuses_other_lengths() -> None:
    assert torch.autograd.gradcheck(hadamard_transform, torch.randn(2, 8, dtype=F64, requires_grad=True))
    for bad in (torch.zeros(12), torch.zeros(()), torch.zeros(3, 0)):
        with pytest.raises(ShapeError, match="must be a power of two; got shape"):
            hadamard_transform(bad)


def dense(operator: RandomizedHadamardLinearOperator) -> Tensor:
    """Return P entry by entry, as its definition has it."""
    n, dim = len(operator.inner_signs), len(operator.outer_signs)
    matrix = torch.from_numpy(hadamard(n)).double()
    whole = operator.outer_signs[:, None] * (matrix[:dim] @ (operator.inner_signs[:, None] * matrix)) / n**0.5
    return whole[:, operator.columns] @ operator.mix.double()


@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (2, 2), (5, 3), (64, 10), (200, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_products(dim: int, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    plain = RandomizedHadamardLinearOperator.random(dim, rank, dtype=dtype, generator=generator)
    mix = torch.randn(rank, 2, dtype=F64, generator=generator)
    for operator in (plain, plain.mixed(mix), plain.mixed(mix).to(F64)):
        matrix = dense(operator)
        assert operator.dtype == operator.mix.dtype and operator.shape == matrix.shape
        right = torch.randn(operator.shape[1], 4, dtype=F64, generator=generator).to(operator.dtype)
        left = torch.randn(dim, 4, dtype=F64, generator=generator).to(operator.dtype)
        assert_close(operator.matmul(right), matrix @ right.double(), operator.dtype, 10.0)
        assert_close(operator.matmul(right[:, 0]), matrix @ right[:, 0].double(), operator.dtype, 10.0)
        assert_close(operator.mT.matmul(left), matrix.mT @ left.double(), operator.dtype, 10.0)
        assert_close(operator.mT.matmul(left[:, 0]), matrix.mT @ left[:, 0].double(), operator.dtype, 10.0)
        assert_close(operator.to_dense(), matrix, operator.dtype, 10.0)
        assert_close(operator.mT.mT.to_dense(), matrix, operator.dtype, 10.0)
        assert_close(operator.gram(), matrix.mT @ matrix, F64, 10.0)
    assert_close(plain.mixed(mix).to_dense(), dense(plain) @ mix.to(dtype).double(), dtype, 10.0)


def test_mean_and_covariance_of_the_entries_are_exact() -> None:
    """All 6,144 equally likely choices at D = 3, n = 4, k = 2: mean 0 and covariance I, without a random draw."""
    total, squares, count = torch.zeros(6, dtype=F64), torch.zeros(6, 6, dtype=F64), 0
    for signs in product((1, -1), repeat=9):
        inner, outer, last = signs[:4], signs[4:7], torch.tensor(signs[7:], dtype=F64)
        matrix = torch.from_numpy(hadamard(4)).double()
        whole = torch.tensor(outer)[:, None] * (matrix[:3] @ (torch.tensor(inner)[:, None] * matrix)) / 2
        for columns in permutations(range(4), 2):
            entries = (whole[:, list(columns)] * last).flatten()
            total, squares, count = total + entries, squares + entries.outer(entries), count + 1
    assert count == 6144
    assert_close(total, torch.zeros(6, dtype=F64))
    assert_close(squares / count, torch.eye(6, dtype=F64))


def test_draws_are_uniform() -> None:
    """Signs and columns, each choice with its share: chance of a false alarm under 1e-6 (a deviation of 5.5 sigma)."""
    generator, trials = torch.Generator().manual_seed(0), 2000
    operators = [RandomizedHadamardLinearOperator.random(3, 2, generator=generator) for _ in range(trials)]
    signs = torch.stack([torch.cat([o.inner_signs, o.outer_signs, o.mix.diag()]) for o in operators]).double()
    products = signs.mT @ signs / trials - torch.eye(9, dtype=F64)
    assert max(products.abs().max(), signs.mean(0).abs().max()) < 5.5 / trials**0.5
    pairs = torch.stack([4 * o.columns[0] + o.columns[1] for o in operators]).bincount(minlength=16).double()
    share = torch.full((16,), 1 / 12, dtype=F64)
    share[::5] = 0
    assert ((pairs / trials - share).abs() <= 5.5 * (share * (1 - share) / trials).sqrt()).all()


def test_a_seed_fixes_the_directions_and_they_are_nearly_orthonormal() -> None:
    first, second, third = (
        RandomizedHadamardLinearOperator.random(3000, 8, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.to_dense(), second.to_dense()) and not torch.equal(first.to_dense(), third.to_dense())
    cosines = first.gram() / 3000 - torch.eye(8, dtype=F64)
    assert 0 < cosines.abs().max() < 5.5 / 3000**0.5
    square = RandomizedHadamardLinearOperator.random(4096, 8, dtype=F64)
    assert_close(square.gram(), 4096 * torch.eye(8, dtype=F64))
    entries = first.to_dense().double()
    assert abs(entries.pow(4).mean() / entries.square().mean().square() - 3) < 0.2


def test_bad_tensors() -> None:
    ones, one = torch.ones(4, dtype=torch.int8), torch.ones(1, 1)
    columns = torch.zeros(1, dtype=torch.int64)
    make = RandomizedHadamardLinearOperator
    with pytest.raises(ShapeError, match=r"D <= n, columns \(k,\) and mix \(k, r\); got \[\(4,\), \(5,\)"):
        make(ones, torch.ones(5, dtype=torch.int8), columns, one)
    with pytest.raises(ShapeError, match="n must be a power of two.*got 3"):
        make(ones[:3], ones[:3], columns, one)
    with pytest.raises(ShapeError, match=r"columns must be in \[0, 4\); got 4 to 4"):
        make(ones, ones, columns + 4, one)
    with pytest.raises(TypeError, match="signs must be int8 and columns int64; got torch.int64"):
        make(ones.long(), ones, columns, one)
    with pytest.raises(TypeError, match="mix must be float32 or float64; got torch.float16"):
        make(ones, ones, columns, one.half())
    with pytest.raises(TypeError, match="signs must be 1 or -1"):
        make(ones * 0, ones, columns, one)
    with pytest.raises(ShapeError, match="rank must be between 1 and D = 3; got 4"):
        make.random(3, 4)
    operator = make.random(3, 2)
    for wrong in (operator, operator.mT):
        with pytest.raises(ShapeError, match=r"expected \(\d, S\) or"):
            wrong.matmul(torch.zeros(7))
    with pytest.raises(ShapeError, match="missing mix"):
        make.from_state({"inner_signs": ones, "outer_signs": ones, "columns": columns})
