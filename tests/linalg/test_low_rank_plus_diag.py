"""Every operation of the operator against a dense float64 oracle."""

import math
from unittest.mock import patch

import linear_operator
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, NotPSDError, ShapeError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from tests.linalg.cases import F32, F64, FEW, SMALL, Case
from tests.oracles import assert_close


def cond(matrix: Tensor) -> float:
    return torch.linalg.cond(matrix).max().item()


def quadratic(matrix: Tensor, columns: Tensor) -> Tensor:
    columns = columns.double()
    return (columns * torch.linalg.solve(matrix, columns)).sum(-2)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_products(case: Case) -> None:
    op, sigma = case.make()
    x = case.columns(*case.batch, case.dim, 4)
    assert_close(op @ x, sigma @ x.double(), case.dtype)
    assert_close(op.matmul(x[..., :1]), sigma @ x[..., :1].double(), case.dtype)
    assert (op @ x).dtype == case.dtype and (op @ x).shape == x.shape
    v = case.columns(case.dim)
    if not case.batch:
        assert_close(op @ v, sigma @ v.double(), case.dtype)
    left = case.columns(*case.batch, 5, case.dim)
    assert_close(left @ op, left.double() @ sigma, case.dtype)
    assert_close(torch.matmul(op, x), sigma @ x.double(), case.dtype)
    assert_close(op.mT @ x, sigma @ x.double(), case.dtype)
    empty = op @ x[..., :0]
    assert empty.shape == (*case.batch, case.dim, 0)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_diagonal_and_dense(case: Case) -> None:
    op, sigma = case.make()
    assert_close(op.diagonal(), sigma.diagonal(dim1=-2, dim2=-1), case.dtype)
    assert_close(torch.diagonal(op, dim1=-2, dim2=-1), sigma.diagonal(dim1=-2, dim2=-1), case.dtype)
    assert_close(op.to_dense(), sigma, case.dtype)
    assert op.diagonal().dtype == op.to_dense().dtype == op.dtype == case.dtype
    assert op.shape == sigma.shape and op.batch_shape == sigma.shape[:-2]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_solves(case: Case) -> None:
    op, sigma = case.make()
    x, left = case.columns(*case.batch, case.dim, 4), case.columns(*case.batch, 5, case.dim)
    expected = torch.linalg.solve(sigma, x.double())
    assert_close(op.solve(x), expected, case.dtype, cond(sigma))
    assert_close(torch.linalg.solve(op, x), expected, case.dtype, cond(sigma))
    assert_close(op.solve(x, left), left.double() @ expected, case.dtype, cond(sigma))
    assert op.solve(x).dtype == case.dtype
    if not case.batch:
        assert_close(op.solve(x[:, 0]), expected[:, 0], case.dtype, cond(sigma))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_log_determinant_and_quadratic_forms(case: Case) -> None:
    op, sigma = case.make()
    x = case.columns(*case.batch, case.dim, 4)
    forms, logdet = quadratic(sigma, x), torch.logdet(sigma)
    assert_close(op.logdet(), logdet, case.dtype, cond(sigma))
    assert_close(torch.logdet(op), logdet, case.dtype, cond(sigma))
    assert_close(op.inv_quad(x), forms.sum(-1), case.dtype, cond(sigma))
    value, log_det = op.inv_quad_logdet(x, logdet=True)
    assert_close(value, forms.sum(-1), case.dtype, cond(sigma))
    assert_close(log_det, logdet, case.dtype, cond(sigma))
    value, log_det = op.inv_quad_logdet(x, logdet=False, reduce_inv_quad=False)
    assert_close(value, forms, case.dtype, cond(sigma))
    assert log_det.shape == () and log_det == 0
    assert op.inv_quad_logdet(logdet=True)[0] == 0
    assert op.logdet().dtype == value.dtype == F64
    if not case.batch:
        assert_close(op.inv_quad_logdet(x[:, 0])[0], forms[0], case.dtype, cond(sigma))


@pytest.mark.parametrize(
    "batch, lead",
    [
        ((), (3,)),
        ((), (2, 3)),
        ((2,), (3, 2)),
        ((2,), (3, 1)),
        ((1,), (4,)),
        ((2, 1), (2, 5)),
        ((1, 3), (4, 2, 3)),
        ((2, 3), (3,)),
        ((2, 3), (1, 1)),
    ],
)
@pytest.mark.parametrize("mix", ["scalar", "matrix", "batch"])
def test_right_hand_sides_broadcast_without_repeating_the_matrix(batch, lead, mix) -> None:
    case = Case(batch, mix=mix if batch or mix != "batch" else "none")
    op, sigma = case.make()
    x = case.columns(*lead, case.dim, 2)
    assert_close(op @ x, sigma @ x, F64)
    assert_close(op.solve(x), torch.linalg.solve(sigma, x.expand(*torch.broadcast_shapes(batch, lead), 7, 2)), F64, 1e3)
    forms = (x * torch.linalg.solve(sigma, x.expand(*torch.broadcast_shapes(batch, lead), 7, 2))).sum(-2)
    assert_close(op.inv_quad(x, reduce_inv_quad=False), forms, F64, 1e3)
    assert_close(op.inv_quad_logdet(x, logdet=True)[0], forms.sum(-1), F64, 1e3)
    root = op.root_decomposition().root
    assert_close(root @ (root.mT @ x), sigma @ x, F64, 1e2)


def test_right_hand_sides_of_a_wrong_shape_are_refused() -> None:
    op, _ = Case((2,)).make()
    with pytest.raises(ShapeError, match=r"must have 7 rows \(..., 7, S\); got \(2, 6, 1\)"):
        op.solve(torch.zeros(2, 6, 1).double())
    with pytest.raises(ShapeError, match=r"\(3, 7, 1\) do not broadcast with \(2,\)"):
        op.inv_quad(torch.zeros(3, 7, 1).double())


@pytest.mark.parametrize("case", FEW, ids=str)
def test_expanded_operators(case: Case) -> None:
    op, sigma = case.make()
    wide = op.expand(5, *op.shape)
    sigma = sigma.expand(5, *sigma.shape)
    x = case.columns(5, *case.batch, case.dim, 3)
    assert type(wide) is LowRankPlusDiagLinearOperator and wide.shape == sigma.shape
    assert_close(wide @ x, sigma @ x.double(), case.dtype)
    assert_close(wide.solve(x), torch.linalg.solve(sigma, x.double()), case.dtype, cond(sigma))
    assert_close(wide.logdet(), torch.logdet(sigma), case.dtype, cond(sigma))
    assert_close(wide.diagonal(), sigma.diagonal(dim1=-2, dim2=-1), case.dtype)
    assert_close((wide * 2.0).solve(x), torch.linalg.solve(2 * sigma, x.double()), case.dtype, cond(sigma))
    assert_close(wide.add_jitter(0.5).to_dense(), sigma + 0.5 * torch.eye(case.dim).double(), case.dtype)
    assert wide.root.data_ptr() == op.root.data_ptr()
    assert wide.sample(2, generator=torch.Generator().manual_seed(0)).shape == (2, *wide.shape[:-1])
    root, inverse = wide.root_decomposition().root.to_dense(), wide.root_inv_decomposition().root.to_dense()
    assert_close(root @ root.mT, sigma, case.dtype, cond(sigma))
    assert_close(inverse @ inverse.mT, torch.linalg.inv(sigma), case.dtype, cond(sigma))


def test_torch_functions() -> None:
    op, sigma = Case().make()
    assert_close(torch.inverse(op).to_dense(), torch.linalg.inv(sigma), F64, 1e2)
    assert_close(torch.linalg.eigvalsh(op), torch.linalg.eigvalsh(sigma), F64, 1e2)
    assert_close(torch.sum(op, -1), sigma.sum(-1), F64)
    assert_close(op.sum(), sigma.sum(), F64)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_diagonalization(case: Case) -> None:
    op, sigma = case.make()
    values, vectors = op.diagonalization()
    vectors = vectors.to_dense()
    assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, sigma, case.dtype, 10)


def test_diagonalization_of_a_large_matrix_gives_the_top() -> None:
    case = Case((), 1000, 3)
    op, sigma = case.make()
    values, vectors = op.diagonalization("lanczos")
    expected = torch.linalg.eigvalsh(sigma).flip(0)[:3]
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=0)
    assert_close(sigma @ vectors, vectors * values, F64, 1e4)


def test_nothing_iterative_or_dense_is_ever_called() -> None:
    """linear_operator's CG, Lanczos and dense routines raise; every operation still works, above D = 800 too."""
    case = Case((), 1000, 3, "matrix")
    op, sigma = case.make()
    x = case.columns(1000, 2)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an approximate or dense routine was called")

    names = [
        "utils.linear_cg",
        "utils.linear_cg.linear_cg",
        "utils.lanczos.lanczos_tridiag",
        "utils.cholesky.psd_safe_cholesky",
        "operators._linear_operator.psd_safe_cholesky",
        "operators._linear_operator.LinearOperator.cholesky",
        "operators._linear_operator.LinearOperator._cholesky",
        "operators._linear_operator.LinearOperator._root_decomposition",
        "operators._linear_operator.LinearOperator._solve",
        "operators._linear_operator.LinearOperator.to_dense",
        "operators.sum_linear_operator.SumLinearOperator.to_dense",
    ]
    from contextlib import ExitStack

    with ExitStack() as stack:
        for name in names:
            module, _, attribute = f"linear_operator.{name}".rpartition(".")
            target = linear_operator
            found = True
            for part in module.split(".")[1:]:
                found = found and hasattr(target, part)
                target = getattr(target, part, target)
            assert found, name
            if hasattr(target, attribute) and not (name == "utils.linear_cg.linear_cg"):
                stack.enter_context(patch.object(target, attribute, refuse))
        stack.enter_context(linear_operator.settings.max_cholesky_size(1))
        stack.enter_context(linear_operator.settings.fast_computations(True, True, True))
        stack.enter_context(linear_operator.settings.skip_logdet_forward(True))
        assert_close(op @ x, sigma @ x, F64)
        assert_close(op.solve(x), torch.linalg.solve(sigma, x), F64, 1e3)
        assert_close(op.logdet(), torch.logdet(sigma), F64, 1e3)
        assert_close(linear_operator.inv_quad_logdet(op, x, logdet=True)[1], torch.logdet(sigma), F64, 1e3)
        assert_close(linear_operator.solve(op, x), torch.linalg.solve(sigma, x), F64, 1e3)
        assert_close(linear_operator.inv_quad(op, x), quadratic(sigma, x).sum(), F64, 1e3)
        assert_close(op.diagonal(), sigma.diagonal(), F64)
        for derived in (op * 2.0, op + op, op.add_jitter(0.1), op[..., :900, :900], op + DiagLinearOperator(op.diag)):
            assert type(derived) is LowRankPlusDiagLinearOperator
            y = x[: derived.shape[0]]
            assert_close(derived @ derived.solve(y), y, F64, 1e3)
            assert derived.zero_mean_mvn_samples(2).shape == (2, derived.shape[0])
        assert op.zero_mean_mvn_samples(3).shape == (3, 1000)
        root, inverse_root = op.root_decomposition().root, op.root_inv_decomposition().root
        assert_close(root @ (root.mT @ x), sigma @ x, F64, 1e2)
        assert_close(inverse_root @ (inverse_root.mT @ x), torch.linalg.solve(sigma, x), F64, 1e3)
        assert op.principal_components(2)[1].shape == (1000, 2)
        assert op.principal_components(2, of="full")[1].shape == (1000, 2)
        inverse = op.inverse()
        assert_close(inverse @ x, torch.linalg.solve(sigma, x), F64, 1e3)
        assert inverse.sample(2).shape == (2, 1000)


def test_to_dense_refuses_what_would_not_fit() -> None:
    op = LowRankPlusDiagLinearOperator(torch.zeros(1, 40_000).mT, torch.ones(40_000))
    with pytest.raises(MemoryLimitError, match=r"\(40000, 40000\) matrix needs 6\.0 GiB, more than the limit of 4 GiB"):
        op.to_dense()
    for refused in (op.inverse(), op.root_decomposition().root):
        with pytest.raises(MemoryLimitError, match=r"needs 6\.0 GiB"):
            refused.to_dense()
    small, sigma = Case().make()
    with pytest.raises(MemoryLimitError, match="limit of 1e-09 GiB"):
        small.to_dense(limit_gib=1e-9)
    assert_close(small.to_dense(limit_gib=1.0), sigma, F64)


def test_bad_arguments() -> None:
    root, diag = torch.ones(4, 2), torch.ones(4)
    with pytest.raises(ShapeError, match=r"got \(3, 2\) and \(4,\)"):
        LowRankPlusDiagLinearOperator(torch.ones(3, 2), diag)
    with pytest.raises(ShapeError, match=r"root must be \(\*B, D, K\)"):
        LowRankPlusDiagLinearOperator(torch.ones(4), diag)
    with pytest.raises(ShapeError, match=r"mix must be a scalar or \(\*B, 2, R\); got \(3, 3\)"):
        LowRankPlusDiagLinearOperator(root, diag, torch.ones(3, 3))
    with pytest.raises(ShapeError, match=r"root_scale must be \(\*B, 2, 1\); got \(2, 2\)"):
        LowRankPlusDiagLinearOperator(root, diag, root_scale=torch.ones(2, 2))
    with pytest.raises(ShapeError, match="batch shapes must broadcast"):
        LowRankPlusDiagLinearOperator(root.expand(2, 4, 2), diag.expand(3, 4))
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.float16"):
        LowRankPlusDiagLinearOperator(root, diag.half())
    with pytest.raises(TypeError, match="use from_linear_operator"):
        LowRankPlusDiagLinearOperator(root, DiagLinearOperator(diag))
    with pytest.raises(ValueError, match="number of draws must be >= 0, got -1"):
        LowRankPlusDiagLinearOperator(root, diag).sample(-1)
    with pytest.raises(NotImplementedError, match="use root_inv_decomposition"):
        LowRankPlusDiagLinearOperator(root, diag).sqrt_inv_matmul(torch.ones(4, 1))


@pytest.mark.parametrize("use", ["logdet", "solve", "inv_quad"])
def test_matrices_without_a_density_are_refused(use) -> None:
    def call(root, diag):
        op = LowRankPlusDiagLinearOperator(root, diag)
        return op.logdet() if use == "logdet" else getattr(op, use)(torch.ones(4, 1))

    root = torch.ones(4, 2)
    with pytest.raises(NotPSDError, match="2 coordinates of 4 with zero diagonal under a non-zero root"):
        call(root, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    with pytest.raises(NotPSDError, match=r"got 1 negative entries of 4, the smallest -1\.000e\+00"):
        call(root, torch.tensor([1.0, -1.0, 0.0, 1.0]))
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="got 2 NaN or infinite entries"):
            call(root, torch.tensor([1.0, bad, bad, 1.0]))
        with pytest.raises(NonFiniteError, match="the root must be finite"):
            call(root.clone().index_fill_(0, torch.tensor([1]), bad), torch.ones(4))


def test_largest_finite_variances_are_not_taken_for_infinite() -> None:
    diag = torch.full((4,), 3e38)
    op = LowRankPlusDiagLinearOperator(torch.ones(4, 1), diag)
    assert_close(op.logdet(), diag.double().log().sum(), F32)


def test_point_masses_are_left_out() -> None:
    op, sigma = Case((2,), 7, 3, "matrix").make()
    free = torch.tensor([0, 2, 3, 5, 6])
    root, diag = op.root.clone(), op.diag.clone()
    root[:, [1, 4]] = 0.0
    diag[:, [1, 4]] = 0.0
    op = LowRankPlusDiagLinearOperator(root, diag, op.mix)
    sigma = sigma[..., free, :][..., free]
    x = Case().columns(2, 7, 3)
    assert_close(op.logdet(), torch.logdet(sigma), F64, cond(sigma))
    solution = op.solve(x)
    assert_close(solution[:, free], torch.linalg.solve(sigma, x[:, free]), F64, cond(sigma))
    assert (solution[:, [1, 4]] == 0).all()
    assert (op.inv_quad(x) == math.inf).all()
    x[:, [1, 4]] = 0.0
    x[0, 1, 2] = 1e-30  # off the value in one column of one matrix
    forms = op.inv_quad(x, reduce_inv_quad=False)
    assert (forms == math.inf).sum() == 1 and forms[0, 2] == math.inf
    assert_close(forms[1], quadratic(sigma, x[:, free])[1], F64, cond(sigma))


@settings(max_examples=30)
@given(dim=st.integers(1, 9), rank=st.integers(0, 10), spread=st.floats(0, 6), seed=st.integers(0, 2**31))
def test_rotating_the_root_changes_nothing(dim, rank, spread, seed) -> None:
    op, sigma = Case((), dim, rank).make(seed, spread)
    rotation = torch.linalg.qr(Case().columns(rank, rank, seed=seed)).Q
    x = Case().columns(dim, 2, seed=seed + 1)
    for other in (
        LowRankPlusDiagLinearOperator(op.root @ rotation, op.diag),
        LowRankPlusDiagLinearOperator(op.root, op.diag, rotation),
    ):
        assert_close(other.logdet(), op.logdet(), F64, cond(sigma))
        assert_close(other.solve(x), op.solve(x), F64, cond(sigma))
        assert_close(other @ x, op @ x, F64, 10)
        assert_close(other.diagonal(), op.diagonal(), F64, 10)


@settings(max_examples=30)
@given(constant=st.floats(1e-12, 1e12), dim=st.integers(1, 9), rank=st.integers(0, 10), seed=st.integers(0, 2**31))
def test_scaling(constant, dim, rank, seed) -> None:
    op, sigma = Case((), dim, rank).make(seed)
    x = Case().columns(dim, 2, seed=seed)
    scaled = op * constant
    assert_close(scaled @ x, constant * (op @ x), F64, 10)
    assert_close(scaled.solve(x), op.solve(x) / constant, F64, cond(sigma))
    assert_close(scaled.logdet() - dim * math.log(constant), op.logdet(), F64, 1e4)
    assert_close(scaled.inv_quad(x) * constant, op.inv_quad(x), F64, cond(sigma))


@settings(max_examples=30)
@given(data=st.data(), dim=st.integers(1, 9), rank=st.integers(0, 10), seed=st.integers(0, 2**31))
def test_permuting_the_coordinates(data, dim, rank, seed) -> None:
    op, sigma = Case((), dim, rank).make(seed)
    order = torch.tensor(data.draw(st.permutations(range(dim))))
    permuted, x = op[order][:, order], Case().columns(dim, 2, seed=seed)
    assert type(permuted) is LowRankPlusDiagLinearOperator
    assert_close(permuted.logdet(), op.logdet(), F64, cond(sigma))
    assert_close(permuted.solve(x[order]), op.solve(x)[order], F64, cond(sigma))
    assert_close(permuted @ x[order], (op @ x)[order], F64, 10)


def test_from_linear_operator() -> None:
    from linear_operator.operators import LowRankRootAddedDiagLinearOperator, LowRankRootLinearOperator

    op, sigma = Case().make()
    shipped = LowRankRootAddedDiagLinearOperator(LowRankRootLinearOperator(op.root), DiagLinearOperator(op.diag))
    converted = LowRankPlusDiagLinearOperator.from_linear_operator(shipped)
    assert_close(converted.to_dense(), sigma, F64)
    assert converted.root.data_ptr() == op.root.data_ptr()
    assert LowRankPlusDiagLinearOperator.from_linear_operator(op) is op
    with pytest.raises(TypeError, match="expected a LowRankRootAddedDiagLinearOperator, got DiagLinearOperator"):
        LowRankPlusDiagLinearOperator.from_linear_operator(DiagLinearOperator(op.diag))
    assert isinstance(op, LowRankRootAddedDiagLinearOperator)
