"""Block-diagonal matrices of unequal blocks: every operation against the dense float64 matrix, none of them dense."""

import unittest
from unittest import mock

import pytest
import torch
from linear_operator.operators import (
    DenseLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    ZeroLinearOperator,
)
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase
from torch import Tensor

from lowrank_bdl.errors import MemoryLimitError, ShapeError
from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from tests.oracles import assert_close
from tests.statistical import assert_gaussian

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::linear_operator.utils.warnings.NumericalWarning")


def spd(size: int, generator: torch.Generator, dtype: torch.dtype = F64) -> Tensor:
    root = torch.randn(size, size + 2, generator=generator, dtype=F64)
    return (root @ root.mT / size + torch.eye(size, dtype=F64)).to(dtype)


def blocks(dtype: torch.dtype = F64) -> list[LinearOperator]:
    """Blocks of sizes 4, 1, 6, 3: low-rank plus diagonal, of rank 0, a Kronecker product, diagonal."""
    g = torch.Generator().manual_seed(0)
    low_rank = LowRankPlusDiagLinearOperator(
        torch.randn(4, 2, generator=g).to(dtype), torch.rand(4, generator=g).to(dtype) + 0.5, 0.7
    )
    single = LowRankPlusDiagLinearOperator(torch.empty(1, 0, dtype=dtype), torch.tensor([0.3], dtype=dtype))
    kronecker = KroneckerProductLinearOperator(
        DenseLinearOperator(spd(2, g, dtype)), DenseLinearOperator(spd(3, g, dtype))
    )
    return [low_rank, single, kronecker, DiagLinearOperator(torch.rand(3, generator=g).to(dtype) + 0.5)]


def case(dtype: torch.dtype = F64) -> tuple[BlockDiagonalLinearOperator, Tensor]:
    parts = blocks(dtype)
    return BlockDiagonalLinearOperator(*parts), torch.block_diag(*(part.to_dense().double() for part in parts))


def columns(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("shape", [(14,), (14, 1), (14, 3)])
def test_products_solves_and_quadratic_forms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sigma, dense = case(dtype)
    cond = torch.linalg.cond(dense).item()
    rhs = columns(*shape, dtype=dtype)
    assert_close(sigma @ rhs, dense @ rhs.double(), dtype)
    assert_close(sigma.solve(rhs), torch.linalg.solve(dense, rhs.double()), dtype, cond=cond)
    assert_close(sigma.inv_quad(rhs), (rhs.double() * torch.linalg.solve(dense, rhs.double())).sum(), dtype, cond=cond)
    quadratic, logdet = sigma.inv_quad_logdet(rhs, logdet=True)
    assert quadratic.dtype == logdet.dtype == F64
    assert_close(quadratic, (rhs.double() * torch.linalg.solve(dense, rhs.double())).sum(), dtype, cond=cond)
    assert_close(logdet, dense.logdet(), dtype)
    if len(shape) == 2:
        each = sigma.inv_quad(rhs, reduce_inv_quad=False)
        assert_close(each, (rhs.double() * torch.linalg.solve(dense, rhs.double())).sum(0), dtype, cond=cond)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_diagonal_logdet_dense_and_dtypes(dtype: torch.dtype) -> None:
    sigma, dense = case(dtype)
    assert sigma.shape == (14, 14) and sigma.dtype == dtype
    assert_close(sigma.to_dense(), dense, dtype)
    assert_close(sigma.diagonal(), dense.diagonal(), dtype)
    assert_close(sigma.logdet(), dense.logdet(), dtype)
    assert_close(sigma.double().to_dense(), dense, dtype)
    assert [part.stop - part.start for part in sigma.slices] == [4, 1, 6, 3]


def test_sums_and_multiples_stay_block_diagonal() -> None:
    sigma, dense = case()
    by_entry = torch.rand(14, generator=torch.Generator().manual_seed(3), dtype=F64)
    for changed, expected in (
        (sigma * 2.5, dense * 2.5),
        (sigma.add_diagonal(by_entry), dense + torch.diag(by_entry)),
        (sigma.add_jitter(0.1), dense + 0.1 * torch.eye(14, dtype=F64)),
        (sigma.mT, dense),
    ):
        assert isinstance(changed, BlockDiagonalLinearOperator)
        assert_close(changed.to_dense(), expected)
        assert_close(changed.logdet(), expected.logdet())
    assert isinstance(sigma * 0, ZeroLinearOperator)


@pytest.mark.parametrize("part", [slice(0, 14), slice(2, 11), slice(4, 5), slice(5, None), slice(-3, None)])
def test_runs_of_coordinates_stay_block_diagonal(part: slice) -> None:
    sigma, dense = case()
    cut = sigma[part, part]
    assert isinstance(cut, BlockDiagonalLinearOperator)
    assert_close(cut.to_dense(), dense[part, part])


def test_other_indices() -> None:
    sigma, dense = case()
    index = torch.tensor([13, 0, 5, 7])
    assert_close(sigma[index][:, index].to_dense(), dense[index][:, index])
    assert_close(sigma[1:6, 4:].to_dense(), dense[1:6, 4:])
    assert_close(sigma[::3, ::3].to_dense(), dense[::3, ::3])
    assert_close(sigma[3], dense[3])
    assert_close(sigma[index, index.flip(0)], dense[index, index.flip(0)])
    assert_close(sigma[2, 3], dense[2, 3])
    assert sigma[2, 8] == 0
    assert sigma[5:5, 5:5].shape == (0, 0)


def test_batches_of_block_diagonal_matrices() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [
        LowRankPlusDiagLinearOperator(torch.randn(2, size, 1, generator=g).double(), torch.ones(2, size).double())
        for size in (2, 3)
    ]
    sigma = BlockDiagonalLinearOperator(*parts)
    dense = torch.stack([torch.block_diag(*(part.to_dense()[i] for part in parts)) for i in range(2)])
    rhs = columns(2, 5, 3)
    assert sigma.shape == (2, 5, 5)
    assert_close(sigma.to_dense(), dense)
    assert_close(sigma[1].to_dense(), dense[1])
    assert_close(sigma[0, 1:4, 1:4].to_dense(), dense[0, 1:4, 1:4])
    assert_close(sigma.solve(rhs), torch.linalg.solve(dense, rhs), cond=10)
    assert_close(sigma.logdet(), dense.logdet())
    assert_close(sigma[0].expand(4, 5, 5).logdet(), dense[0].logdet().expand(4))


def test_draws_have_the_full_covariance() -> None:
    """False-alarm rate ALPHA; a scale that is 10 % off fails."""
    sigma, dense = case()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = sigma.zero_mean_mvn_samples(4000)
    assert_gaussian(draws, torch.zeros(14, dtype=F64), dense)
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(draws * 1.05, torch.zeros(14, dtype=F64), dense)


def test_roots() -> None:
    low_rank, single, _, diagonal = blocks()
    sigma = BlockDiagonalLinearOperator(low_rank, single, diagonal)
    dense = sigma.to_dense()
    root, inverse = sigma.root_decomposition().root.to_dense(), sigma.root_inv_decomposition().root.to_dense()
    assert_close(root @ root.mT, dense)
    assert_close(inverse @ inverse.mT, torch.linalg.inv(dense))


def test_gradients_reach_every_block() -> None:
    sigma, _ = case()
    rhs = columns(14, 2)
    sigma.requires_grad_(True)
    (sigma @ rhs).square().sum().backward()
    parameters = [tensor for tensor in sigma.representation() if tensor.requires_grad and tensor.numel()]
    assert len(parameters) >= 5 and all(tensor.grad is not None for tensor in parameters)


def test_nothing_is_dense() -> None:
    """A million coordinates in three blocks: a dense 10^6 x 10^6 matrix would need 3.6 TiB."""
    parts = [
        LowRankPlusDiagLinearOperator(torch.randn(3, size).mT, torch.rand(size) + 0.5) for size in (400_000, 1, 599_999)
    ]
    sigma = BlockDiagonalLinearOperator(*parts)
    with mock.patch.object(LinearOperator, "to_dense", side_effect=AssertionError("dense")):
        rhs = torch.ones(1_000_000)
        assert (sigma @ rhs).shape == sigma.solve(rhs).shape == sigma.diagonal().shape == (1_000_000,)
        assert all(value.isfinite() for value in sigma.inv_quad_logdet(rhs, logdet=True))
        assert sigma.zero_mean_mvn_samples(1).shape == (1, 1_000_000)
    with pytest.raises(MemoryLimitError, match=r"the dense \(1000000, 1000000\) matrix needs 3725.3 GiB"):
        sigma.to_dense()


def test_refusals() -> None:
    sigma, _ = case()
    with pytest.raises(ShapeError, match="at least 1 block; got none"):
        BlockDiagonalLinearOperator()
    with pytest.raises(TypeError, match="block 1 is a Tensor"):
        BlockDiagonalLinearOperator(blocks()[0], torch.eye(2))
    with pytest.raises(ShapeError, match=r"block 1 is \(2, 3\), block 0 is \(4, 4\)"):
        BlockDiagonalLinearOperator(blocks()[0], DenseLinearOperator(torch.ones(2, 3, dtype=F64)))
    with pytest.raises(TypeError, match="one dtype and device; block 1 is torch.float32"):
        BlockDiagonalLinearOperator(blocks()[0], blocks(torch.float32)[0])
    for use in (sigma.matmul, sigma.solve, sigma.inv_quad):
        with pytest.raises(ShapeError, match=r"must have 14 rows; got \(13, 1\)"):
            use(torch.ones(13, 1, dtype=F64))
    with pytest.raises(ShapeError, match=r"diag must end in 1 or 14 entries; got shape \(3,\)"):
        sigma.add_diagonal(torch.ones(3, dtype=F64))
    with pytest.raises(NotImplementedError, match="takes method 'symeig' or None; got 'lanczos'"):
        sigma.diagonalization("lanczos")
    with pytest.raises(NotImplementedError, match="no tridiagonal matrices here"):
        sigma._solve(torch.ones(14, 1, dtype=F64), num_tridiag=1)


class TestSuite(LinearOperatorTestCase, unittest.TestCase):
    """linear_operator's own suite, in float64: log-determinants and quadratic forms are float64 here."""

    seed = 0
    should_test_sample = True
    should_call_cg = should_call_lanczos = should_call_lanczos_diagonalization = False

    def setUp(self) -> None:
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(F64)
        super().setUp()

    def test_half(self) -> None:
        with pytest.raises(TypeError, match=r"diag must be float32 or float64, got torch\.float16"):
            self.create_linear_op().half()

    def create_linear_op(self) -> BlockDiagonalLinearOperator:
        low_rank = LowRankPlusDiagLinearOperator(torch.randn(3, 2), torch.tensor([0.5, 1.0, 2.0]))
        diagonal = LowRankPlusDiagLinearOperator(torch.randn(2, 1), torch.tensor([1.5, 0.7]))
        return BlockDiagonalLinearOperator(low_rank, diagonal).requires_grad_(True)

    def evaluate_linear_op(self, linear_op: BlockDiagonalLinearOperator) -> Tensor:
        return torch.block_diag(
            *(block.root @ block.root.mT * block.mix**2 + torch.diag(block.diag) for block in linear_op.blocks)
        )


del LinearOperatorTestCase  # pytest would collect the abstract case too
