"""Operations that must keep the class, and with it the exactness and the cost, of the operator."""

import pytest
import torch
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    LowRankRootLinearOperator,
    RootLinearOperator,
    ZeroLinearOperator,
)
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.structured import LinearOperatorBlock
from tests.linalg.cases import F32, F64, FEW, Case
from tests.oracles import assert_close, dense


def check(op: object, sigma: Tensor, dtype: torch.dtype = F64) -> LowRankPlusDiagLinearOperator:
    """Assert the class, and agreement of products and log-determinant with the oracle."""
    assert type(op) is LowRankPlusDiagLinearOperator
    assert op.shape == sigma.shape and op.dtype == dtype
    assert_close(op.to_dense(), sigma, dtype)
    x = torch.ones(*sigma.shape[:-1], 1, dtype=dtype)
    assert_close(op @ x, sigma @ x.double(), dtype, 10)
    assert_close(op.logdet(), torch.logdet(sigma), dtype, torch.linalg.cond(sigma).max().item())
    return op


@pytest.mark.parametrize("case", FEW, ids=str)
def test_scaling(case: Case) -> None:
    op, sigma = case.make()
    for scaled in (op * 2.5, 2.5 * op, op.mul(torch.tensor(2.5)), op / 0.4, op * torch.tensor([2.5])):
        check(scaled, 2.5 * sigma, case.dtype)
        assert scaled.root.data_ptr() == op.root.data_ptr()  # no copy of the root
    assert_close((-op).to_dense(), -sigma, case.dtype)
    assert_close((-op) @ torch.ones(case.dim, 1).to(case.dtype), -sigma.sum(-1, keepdim=True), case.dtype, 10)
    assert_close((op * -2).diagonal(), -2 * sigma.diagonal(dim1=-2, dim2=-1), case.dtype)
    assert isinstance(op * 0, ZeroLinearOperator) and (op * 0).shape == op.shape
    assert_close((op - op * 0.5).to_dense(), 0.5 * sigma, case.dtype)


@pytest.mark.parametrize("mix", ["none", "scalar", "matrix", "batch"])
def test_scaling_by_a_constant_for_each_matrix(mix: str) -> None:
    op, sigma = Case((2,), mix=mix).make()
    constants = torch.tensor([0.5, 3.0]).double().view(2, 1, 1)
    check(op * constants, sigma * constants)
    single, sigma = Case((), mix="none" if mix == "batch" else mix).make()
    check(single.expand(2, 7, 7) * constants, sigma * constants)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_sums(case: Case) -> None:
    op, sigma = case.make()
    other, sigma2 = Case(case.batch, case.dim, 2, "scalar", case.dtype).make(seed=5)
    check(op + op, 2 * sigma, case.dtype)
    check(op + other, sigma + sigma2, case.dtype)
    check(other + op, sigma + sigma2, case.dtype)
    check(sum([op, other, op]), 2 * sigma + sigma2, case.dtype)
    factor = case.columns(*case.batch, case.dim, 2)
    low_rank = sigma + factor.double() @ factor.double().mT
    check(op + RootLinearOperator(factor), low_rank, case.dtype)
    check(op + LowRankRootLinearOperator(factor), low_rank, case.dtype)
    check(op.add_low_rank(factor), low_rank, case.dtype)
    assert (op + ZeroLinearOperator(*op.shape)) is op and op + 0 is op
    assert_close((op + sigma.to(case.dtype)).to_dense(), 2 * sigma, case.dtype)


def test_sum_of_a_matrix_and_a_batch_and_of_two_dtypes() -> None:
    (single, a), (batch, b) = Case((), 7, 2).make(), Case((3,), 7, 3, "batch").make()
    check(single + batch, a + b)
    check(batch + single, a + b)
    narrow, c = Case((), 7, 3, "matrix", F32).make()
    check(narrow + single, a + c)  # nothing of the float64 root is lost
    check(single + narrow, a + c)
    with pytest.raises(ShapeError, match=r"sizes must agree; got \[\(7, 7\), \(8, 8\)\]"):
        single + Case((), 8, 2).make()[0]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_adding_diagonals(case: Case) -> None:
    op, sigma = case.make()
    eye, entries = torch.eye(case.dim).double(), case.columns(case.dim).abs()
    check(op.add_diagonal(torch.tensor(0.5, dtype=case.dtype)), sigma + 0.5 * eye, case.dtype)
    check(op.add_diagonal(torch.tensor([0.5], dtype=case.dtype)), sigma + 0.5 * eye, case.dtype)
    check(op.add_diagonal(entries), sigma + torch.diag(entries.double()), case.dtype)
    check(op + DiagLinearOperator(entries.expand(*case.batch, -1)), sigma + torch.diag(entries.double()), case.dtype)
    constant = ConstantDiagLinearOperator(torch.full((*case.batch, 1), 0.5, dtype=case.dtype), case.dim)
    check(op + constant, sigma + 0.5 * eye, case.dtype)
    assert_close((constant + op).to_dense(), sigma + 0.5 * eye, case.dtype)  # the class of the left operand decides
    check(op.add_jitter(0.25), sigma + 0.25 * eye, case.dtype)
    if case.dim > 2:
        with pytest.raises(ShapeError, match=rf"diag must end in 1 or {case.dim} entries; got shape \(2,\)"):
            op.add_diagonal(torch.ones(2, dtype=case.dtype))


def test_adding_batches_of_diagonals() -> None:
    op, sigma = Case(mix="matrix").make()
    entries = Case().columns(3, 7).abs()
    check(op.add_diagonal(entries), sigma + torch.diag_embed(entries))
    check(op.add_diagonal(entries[:, :1]), sigma + entries[:, :1, None] * torch.eye(7).double())


INDICES = {
    "tensor": torch.tensor([3, 1, 5]),
    "negative": torch.tensor([-1, 0, -3]),
    "list": [2, 0, 6],
    "slice": slice(1, 5),
    "steps": slice(0, 7, 2),
    "negative slice": slice(-4, -1),
    "mask": torch.tensor([True, False, True, True, False, False, True]),
    "all": slice(None),
    "none": slice(3, 3),
    "one": torch.tensor([4]),
}


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("mix", ["none", "matrix", "batch"])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_diagonal_blocks_keep_the_class(index, mix, batch) -> None:
    op, sigma = Case(batch, mix=mix if batch or mix != "batch" else "scalar").make()
    expected = sigma[..., index, :][..., index]
    check(op[..., index, :][..., :, index], expected)
    check(op[..., :, index][..., index, :], expected)
    if isinstance(index, slice):
        block = check(op[..., index, index], expected)
        assert (
            block.root.numel() == 0 or block.root.untyped_storage().data_ptr() == op.root.untyped_storage().data_ptr()
        )
    if not batch:
        check(op[index][:, index], expected)
        check(op[index, :][:, index], expected)


def test_blocks_of_scaled_roots_cross_the_blocks_of_their_scales() -> None:
    op, sigma = Case((), 9000, 2, "none", F32, torch.float16).make()
    index = torch.tensor([8999, 4096, 1, 4095, 8192])
    for chosen in (index, slice(4000, 4200), slice(3, 9000, 1000)):
        check(op[chosen][:, chosen], sigma[chosen][:, chosen], F32)
    assert_close(op[..., index, index], sigma[index, index], F32)
    assert_close(op[index][:, :5].to_dense(), sigma[index][:, :5], F32)


def test_blocks_that_are_not_covariances_of_distinct_coordinates() -> None:
    op, sigma = Case((2,), mix="matrix").make()
    x = Case().columns(2, 7, 3)
    for rows, columns in (
        (torch.tensor([1, 1, 4]), torch.tensor([1, 1, 4])),  # the variance of 1 stands in four places
        (torch.tensor([-1, 6]), torch.tensor([-1, 6])),  # the same coordinate under two names
        (slice(0, 4), slice(2, 7)),
        (torch.tensor([3, 0]), torch.tensor([0, 3])),
    ):
        block = op[..., rows, :][..., :, columns]
        expected = sigma[..., rows, :][..., columns]
        assert type(block) is LinearOperatorBlock
        assert_close(block.to_dense(), expected, F64)
        assert_close(block @ x[:, : expected.shape[-1]], expected @ x[:, : expected.shape[-1]], F64, 10)
        assert_close(block.mT.to_dense(), expected.mT, F64)
    same = op[..., torch.tensor([-1, 0]), :][..., :, torch.tensor([6, 0])]
    check(same, sigma[..., [6, 0], :][..., [6, 0]])


def test_single_rows_entries_and_batches() -> None:
    op, sigma = Case((2, 3), mix="batch").make()
    index = torch.tensor([3, -1, 3])
    assert_close(op[..., 3, :], sigma[..., 3, :], F64)
    assert_close(op[..., :, -1], sigma[..., -1], F64)
    assert_close(op[..., 2, 5], sigma[..., 2, 5], F64)
    assert_close(op[..., index, index], sigma[..., index, index], F64)
    assert_close(op[..., index, torch.tensor([0, 6, 1])], sigma[..., index, [0, 6, 1]], F64)
    assert_close(op[1, 2, 3, 3], sigma[1, 2, 3, 3], F64)
    check(op[1], sigma[1])
    check(op[:, 1], sigma[:, 1])
    check(op[1, 2], sigma[1, 2])
    check(op[..., 0:2, :, :], sigma[:, 0:2])
    check(op[torch.tensor([1, 0, 1])], sigma[[1, 0, 1]])
    check(op[1, :, 1:4, 1:4], sigma[1, :, 1:4, 1:4])
    check(op[torch.tensor([1, 0]), torch.tensor([2, 0])], sigma[[1, 0], [2, 0]])


@pytest.mark.parametrize("index", [torch.tensor([0, 7]), torch.tensor([-8, 0])])
def test_coordinates_out_of_range_are_refused(index) -> None:
    op, _ = Case().make()
    for bad in (7, -8):
        with pytest.raises(IndexError, match=rf"index {bad} is out of range for axis 1"):
            op[0, bad]
    with pytest.raises(IndexError, match="too many indices for shape"):
        op[0, 0, 0]
    with pytest.raises(IndexError, match=r"coordinates must be in \[-7, 7\); got -?\d to -?\d"):
        op[index][:, index]
    with pytest.raises(IndexError, match=r"a mask of coordinates must have shape \(7,\); got \(6,\)"):
        op.select(torch.ones(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool))


def test_shapes() -> None:
    op, sigma = Case((2, 3), mix="batch").make()
    check(op.unsqueeze(0), sigma.unsqueeze(0))
    check(op.unsqueeze(1), sigma.unsqueeze(1))
    check(op.unsqueeze(0).squeeze(0), sigma)
    check(op.squeeze(0), sigma)
    check(op.permute(1, 0, 2, 3), sigma.permute(1, 0, 2, 3))
    check(op.transpose(0, 1), sigma.transpose(0, 1))
    check(op.mT, sigma)
    check(op.expand(4, 2, 3, 7, 7), sigma.expand(4, 2, 3, 7, 7))
    check(op.repeat(4, 1, 1, 1, 1), sigma.repeat(4, 1, 1, 1, 1))
    check(op[:, :1].expand(2, 5, 7, 7), sigma[:, :1].expand(2, 5, 7, 7))
    check(op.sum(0), sigma.sum(0))
    check(op.sum(-3), sigma.sum(-3))
    assert_close(op.repeat(2, 1, 1, 1).to_dense(), sigma.repeat(2, 1, 1, 1), F64)
    with pytest.raises(ShapeError, match="at least 4 sizes that end in 1, 1"):
        op.repeat(2, 2)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_dtypes(case: Case) -> None:
    op, sigma = case.make()
    wide = check(op.double(), sigma)
    check(op.to(F64), sigma)
    assert wide.root.dtype == op.root.dtype and wide.root.data_ptr() == op.root.data_ptr()  # the root is left as stored
    narrow = op.float()
    assert type(narrow) is LowRankPlusDiagLinearOperator and narrow.dtype == F32
    assert_close(narrow.to_dense(), sigma, F32)
    check(op.to("cpu"), sigma, case.dtype)
    check(op.cpu(), sigma, case.dtype)
    with pytest.raises(TypeError, match=r"got torch\.float16"):
        op.half()
    with pytest.raises(TypeError, match=r"got torch\.bfloat16"):
        op.to(torch.bfloat16)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_clone_and_detach(case: Case) -> None:
    op, sigma = case.make()
    copy = check(op.clone(), sigma, case.dtype)
    assert copy.root.numel() == 0 or copy.root.data_ptr() != op.root.data_ptr()
    assert copy.root.mT.is_contiguous()  # K x D storage
    check(torch.clone(op), sigma, case.dtype)
    detached = check(op.detach(), sigma, case.dtype)
    assert detached.root.data_ptr() == op.root.data_ptr()


def test_detached_operators_have_no_history() -> None:
    op, sigma = Case(mix="matrix").make()
    op = op.clone().requires_grad_(True)
    assert op.requires_grad and op.root.requires_grad
    for detached in (op.detach(), op.expand(2, 7, 7).detach(), (op * 2.0).detach()):
        assert not detached.requires_grad
        assert not any(t.requires_grad for t in detached.representation())
        assert not detached.logdet().requires_grad
    check(op.detach(), sigma)


def test_kxd_storage_of_a_root_stored_the_other_way() -> None:
    root = Case().columns(7, 3)
    op = LowRankPlusDiagLinearOperator(root, torch.ones(7).double())
    assert op.clone().root.mT.is_contiguous()
    check(op.clone(), dense(root, torch.ones(7)))


def test_evaluate_kernel_is_the_operator_itself() -> None:
    op, _ = Case().make()
    assert op.evaluate_kernel() is op
    assert op.representation_tree()(*op.representation()).shape == op.shape
