"""No operation of any operator is answered by an iteration: each is exact, or refused."""

from collections.abc import Callable
from functools import partial

import mpmath
import pytest
import torch
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
)
from torch import Tensor

from lowrank_bdl.errors import NotPSDError, ShapeError
from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.expanded import ExpandedLinearOperator
from lowrank_bdl.linalg.hadamard import RandomizedHadamardLinearOperator
from lowrank_bdl.linalg.inverse import InverseLowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.roots import LowRankPlusDiagRoot
from lowrank_bdl.linalg.structured import SumOfLinearOperators
from tests.linalg.cases import Case
from tests.linalg.operations import (
    F64,
    NO_NUMBERS,
    columns,
    no_iterations,
    plain,
    refused_operations,
    square_operations,
)
from tests.oracles import assert_close

N = 12


def low_rank(seed: int = 0, size: int = N) -> LowRankPlusDiagLinearOperator:
    return LowRankPlusDiagLinearOperator(columns(size, 3, seed=seed), columns(size, seed=seed + 1).abs() + 0.5, 0.7)


def kronecker(seed: int = 0) -> KroneckerSpectralLinearOperator:
    left = torch.linalg.qr(columns(2, 2, 2, seed=seed)).Q
    right = torch.linalg.qr(columns(2, 3, 3, seed=seed)).Q
    values = columns(2, 2, 3, seed=seed).abs() + 0.4
    return KroneckerSpectralLinearOperator(left, right, values, has_bias=True, result_dtype=F64)


def blocks() -> BlockDiagonalLinearOperator:
    return BlockDiagonalLinearOperator(low_rank(size=3), low_rank(5, 4).inverse(), low_rank(7, 5))


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "low-rank plus diagonal": low_rank,
    "inverse": lambda: low_rank().inverse(),
    "Kronecker": kronecker,
    "block-diagonal": blocks,
    "block-diagonal with a Kronecker block": lambda: BlockDiagonalLinearOperator(kronecker(), low_rank(3)),
    "block of an inverse": lambda: low_rank(size=20).inverse()[3:15, 3:15],
    "block of a Kronecker": lambda: BlockDiagonalLinearOperator(kronecker(), kronecker(4))[4:16, 4:16],
    "root": lambda: LowRankPlusDiagRoot(low_rank()),
    "square of a root": lambda: low_rank().root_decomposition(),
    "square of Kronecker roots": lambda: kronecker().root_inv_decomposition(),
    "square of roots of blocks": lambda: blocks().root_decomposition(),
    "negative multiple": lambda: low_rank() * -2,
    "sum": lambda: low_rank() + low_rank(2).inverse(),
    "product": lambda: low_rank() @ low_rank(2).inverse(),
}
NEVER = {"abs", "exp", "log", "sqrt", "solve_triangular", "detach_"}
"""What no operator here has."""
DENSE_ONLY = {
    *("pivoted_cholesky", "cat_rows", "prod", "torch.mul by an operator", "solve of a sum with a tensor"),
    *("sqrt_inv_matmul", "sqrt_inv_matmul from the left"),
}
"""What only small matrices have."""


def dense(op: LinearOperator) -> Tensor:
    """Return the oracle from products with unit vectors, which the tests of each class check against formulas."""
    return op @ torch.eye(op.shape[-1], dtype=F64)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operation_of_a_small_matrix_is_exact_or_refused(name: str) -> None:
    op = OPERATORS[name]()
    refused = refused_operations(op, dense(op), 800)
    assert refused >= {"abs", "solve_triangular"}
    if name in ("low-rank plus diagonal", "inverse", "Kronecker", "block-diagonal"):
        assert refused - NEVER <= {"sqrt_inv_matmul", "sqrt_inv_matmul from the left"}, refused


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operation_of_a_large_matrix_is_exact_or_refused(name: str) -> None:
    op = OPERATORS[name]()
    refused = refused_operations(op, dense(op), 4)
    if name == "low-rank plus diagonal":
        assert refused <= NEVER | DENSE_ONLY, refused
    if name == "inverse":
        assert refused <= NEVER | DENSE_ONLY | {"solve of a difference"}, refused
    if name == "Kronecker":
        assert refused <= NEVER | DENSE_ONLY | {"solve of a sum with a diagonal"}, refused
    if name.startswith("square of"):
        assert not refused & {"solve", "logdet", "inverse", "zero_mean_mvn_samples", "solve of a multiple", "inv_quad"}
    if name == "block-diagonal":
        assert refused <= NEVER | DENSE_ONLY | {"solve of a difference"}, refused


def test_the_watch_sees_linear_operators_own_iterations() -> None:
    matrix = dense(low_rank())
    theirs = DenseLinearOperator(matrix)
    with no_iterations(4) as calls:
        theirs.solve(columns(N, 1)), theirs.add_jitter(0.1).logdet(), theirs.root_decomposition().root.to_dense()
        theirs.pivoted_cholesky(2), theirs.cholesky()
    assert {"linear_cg", "lanczos_tridiag", "pivoted_cholesky", "psd_safe_cholesky"} <= set(calls)


def test_rectangular_operators() -> None:
    basis = RandomizedHadamardLinearOperator.random(10, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    matrix = basis @ torch.eye(4, dtype=F64)
    part, block = low_rank()[2:9, :4], low_rank().inverse()[[0, 5]]
    for op, oracle in (
        (basis, matrix),
        (basis.mT, matrix.mT),
        (part, dense(low_rank())[2:9, :4]),
        (block, torch.linalg.inv(dense(low_rank()))[[0, 5]]),
    ):
        height, width = oracle.shape
        x, left = columns(width, 2), columns(3, height)
        with no_iterations(4) as calls:
            pairs = [
                (op @ x, oracle @ x),
                (left @ op, left @ oracle),
                (op.mT, oracle.mT),
                (op * -3, oracle * -3),
                (op / 2 + op, oracle * 1.5),
                (op @ op.mT, oracle @ oracle.mT),
                (op[1:, [2, 0]], oracle[1:, [2, 0]]),
                (op[0], oracle[0]),
                (op[:, 1], oracle[:, 1]),
                (op.sum(), oracle.sum()),
                (op.sum(-1), oracle.sum(-1)),
                (op.sum(-2), oracle.sum(-2)),
                (op.unsqueeze(0), oracle[None]),
                (op.expand(2, height, width) @ x, (oracle @ x).expand(2, -1, -1)),
                (op.svd()[1], torch.linalg.svdvals(oracle)),
                (op.clone(), oracle),
                (op.to(F64), oracle),
                (op.double() @ x, oracle @ x),
            ]
            for got, want in pairs:
                assert_close(plain(got), want)
            for refused in (
                op.logdet,
                op.cholesky,
                op.eigvalsh,
                op.root_decomposition,
                op.diagonal,
                partial(op.solve, x),
            ):
                with pytest.raises(ShapeError, match=rf"needs a square matrix; got shape \({height}, {width}\)"):
                    refused()
        assert not calls
    assert part.float().dtype is torch.float32 and part.float().rows.dtype is torch.int64


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_sums_of_precisions(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sigma^-1 + E and Sigma_1^-1 + Sigma_2^-1 are inverses of low-rank-plus-diagonal matrices again."""
    mixes = ("none", "scalar", "matrix") + (("batch",) if batch else ())
    for mix, rank in [(mix, 3) for mix in mixes] + [("none", 0), ("scalar", 9)]:
        (op, sigma), (other, second) = Case(batch, 7, rank, mix, dtype).make(), Case((), 7, 2, "scalar", dtype).make(5)
        eye = torch.eye(7, dtype=F64)
        precision, entries = torch.linalg.inv(sigma), columns(7).abs() * (torch.arange(7) > 2)
        wide = columns(3, *batch, 7).abs()
        for found, expected in (
            (op.inverse().add_jitter(0.3), precision + 0.3 * eye),
            (op.inverse().add_diagonal(entries.to(dtype)), precision + torch.diag(entries)),
            (op.inverse() + DiagLinearOperator(wide[0].to(dtype)), precision + torch.diag_embed(wide[0])),
            (
                op.inverse().add_diagonal(wide.to(dtype)) if not batch else op.inverse() + 0,
                precision + torch.diag_embed(wide) if not batch else precision,
            ),
            (op.inverse() + other.inverse(), precision + torch.linalg.inv(second)),
            (other.inverse() + op.inverse(), precision + torch.linalg.inv(second)),
            (op.inverse() * 2.5 + op.inverse(), 3.5 * precision),
            (op.inverse() / 4, precision / 4),
        ):
            assert type(found) is InverseLowRankPlusDiagLinearOperator and found.dtype == dtype
            cond = torch.linalg.cond(expected).max().item()
            x = columns(7, 2)
            assert_close(found @ x.to(dtype), expected @ x, dtype, cond)
            assert_close(found.solve(x.to(dtype)), torch.linalg.solve(expected, x), dtype, cond)
            assert_close(found.logdet(), torch.logdet(expected), dtype, 10 * cond)
            assert_close(found.diagonal(), expected.diagonal(dim1=-2, dim2=-1), dtype, cond)


def test_sums_of_precisions_with_point_masses_and_far_scales() -> None:
    """A point mass has no precision of its own; variances of 1e-9 and precisions of 1e9 leave nothing to cancel."""
    root, diag = columns(6, 2), columns(6).abs() + 0.1
    root[1], diag[1] = 0, 0
    sigma = LowRankPlusDiagLinearOperator(root, diag)
    keep = torch.arange(6) != 1
    expected = torch.diag(torch.full((6,), 0.5, dtype=F64))
    expected[keep[:, None] & keep] += torch.linalg.inv(sigma.to_dense()[keep][:, keep]).flatten()
    assert_close(sigma.inverse().add_jitter(0.5).to_dense(), expected, F64, 100)
    unknown = sigma.inverse() + sigma.inverse()
    assert_close(unknown @ torch.eye(6, dtype=F64), 2 * sigma.inverse().to_dense(), F64)
    scale = torch.tensor([1e-9, 1e-5, 1.0, 1e3, 1e6, 1e-3], dtype=F64)
    op = LowRankPlusDiagLinearOperator(columns(6, 2) * scale.sqrt()[:, None], scale)
    with mpmath.workdps(60):
        exact = mpmath.matrix(op.to_dense().tolist()) ** -1 + 1000 * mpmath.eye(6)
        logdet = float(mpmath.log(mpmath.det(exact)))
    assert abs(op.inverse().add_jitter(1000.0).logdet().item() - logdet) < 1e-9 * abs(logdet)


def test_gradients_of_sums_of_precisions() -> None:
    def logdet(root: Tensor, diag: Tensor, added: Tensor) -> Tensor:
        sigma = LowRankPlusDiagLinearOperator(root, diag)
        return (sigma.inverse().add_diagonal(added) + (sigma * 2).inverse()).logdet()

    arguments = (columns(5, 2), columns(5).abs() + 0.5, columns(5, seed=8).abs())
    assert torch.autograd.gradcheck(logdet, [argument.requires_grad_() for argument in arguments])


@pytest.mark.parametrize("name", ["multiple", "sum", "product", "block", "expanded"])
def test_gradients_of_composed_operators(name: str) -> None:
    """Solves, determinants and products reach the tensors of the parts."""

    def use(root: Tensor, diag: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        op = LowRankPlusDiagLinearOperator(root, diag)
        other = {
            "multiple": lambda: op * -2,
            "sum": lambda: op + op.inverse(),
            "product": lambda: op @ op.inverse() @ op,
            "block": lambda: op.inverse()[:4][:, torch.tensor([1, 0, 3, 2])],
            "expanded": lambda: ExpandedLinearOperator(op.inverse(), torch.Size((2,))),
        }[name]()
        x = x[: other.shape[-1]]
        return other.solve(x), other @ x, other.to_dense()

    arguments = [columns(5, 2), columns(5).abs() + 0.5, columns(5, 2, seed=8)]
    assert torch.autograd.gradcheck(use, [argument.requires_grad_() for argument in arguments])


def test_precisions_that_cannot_be_added_exactly_are_refused_or_kept_as_sums() -> None:
    op = low_rank()
    less = op.inverse().add_diagonal(torch.full((N,), -1e-3, dtype=F64))
    assert type(less) is SumOfLinearOperators
    assert_close(less @ torch.eye(N, dtype=F64), torch.linalg.inv(dense(op)) - 1e-3 * torch.eye(N, dtype=F64))
    with pytest.raises(ShapeError, match=r"diag must end in 1 or 12 entries; got shape \(2,\)"):
        op.inverse().add_diagonal(torch.ones(2, dtype=F64))
    twins = torch.ones(N, 2, dtype=F64) * torch.tensor([1.0, 1 + 1e-14], dtype=F64)
    with pytest.raises(NotPSDError, match="a sum of precisions needs variances that are not too far below"):
        LowRankPlusDiagLinearOperator(twins * 1e9, torch.full((N,), 1e-9, dtype=F64)).inverse().add_jitter(1e9)


def test_kronecker_operators_keep_their_basis() -> None:
    a, matrix = kronecker(), dense(kronecker())
    shared = a.add_jitter(0.5) * 0.25
    eye = torch.eye(N, dtype=F64)
    for found, expected in (
        (a + shared, 1.25 * matrix + 0.125 * eye),
        (a - shared, 0.75 * matrix - 0.125 * eye),
        (a + DiagLinearOperator(torch.full((N,), 2.0, dtype=F64)), matrix + 2 * eye),
        (a + ConstantDiagLinearOperator(torch.tensor([2.0], dtype=F64), N), matrix + 2 * eye),
        (a.add_jitter(-0.1), matrix - 0.1 * eye),
        (a / 3, matrix / 3),
    ):
        assert type(found) is KroneckerSpectralLinearOperator
        assert_close(dense(found), expected)
    for other in (kronecker(3), kronecker().to(torch.float32), a.add_jitter(9.0) * -1):
        assert type(a + other) is SumOfLinearOperators
    with pytest.raises(NotImplementedError, match=r"solve\(\) of a SumOfLinearOperators has no exact form.*got 900"):
        large = low_rank(size=900)
        (large + large.inverse()).solve(columns(900, 1))


def test_precisions_above_800_coordinates() -> None:
    """The very cases that were answered by conjugate gradients and by 100 Lanczos vectors."""
    op = low_rank(size=900)
    precision, x = torch.linalg.inv(op.to_dense()), columns(900, 2)
    shifted = precision + 0.1 * torch.eye(900, dtype=F64)
    with no_iterations(800) as calls:
        assert_close((op.inverse() * 2).solve(x), op.to_dense() @ x / 2, F64, 100)
        assert_close((op.inverse() * 2).logdet(), torch.logdet(2 * precision), F64, 100)
        assert_close(op.inverse().add_jitter(0.1).solve(x), torch.linalg.solve(shifted, x), F64, 100)
        values, vectors = op.inverse().diagonalization()
        assert values.shape == (900,)
        vectors = vectors.to_dense()
        assert_close((vectors * values) @ vectors.mT, precision, F64, 100)
        with pytest.raises(NotImplementedError, match="diagonalization takes method 'symeig' or None; got 'lanczos'"):
            op.inverse().diagonalization("lanczos")
    assert not calls


def test_every_public_method_is_among_the_operations() -> None:
    names = " ".join(square_operations(N)).replace("negative", "neg") + " to_dense"
    public = {name for name in dir(LinearOperator) if not name.startswith("_")}
    missing = {name for name in public - NO_NUMBERS if not any(word == name for word in names.split())}
    assert not missing
