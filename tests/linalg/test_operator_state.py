"""The factorisation that is kept, the pin on tensors of somebody else, and copies."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import StaleError
from lowrank_bdl.linalg.block_scaling import encode_rows
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from tests.linalg.cases import F32, F64, FEW, Case
from tests.oracles import assert_close, dense

INDEX = torch.tensor([2, 0, 5])
X = torch.linspace(-1, 1, 7).double().unsqueeze(-1)
Operator = LowRankPlusDiagLinearOperator

OPERATIONS: dict[str, Callable[[Operator], object]] = {
    "matmul": lambda op: op @ X,
    "left matmul": lambda op: X.mT @ op,
    "solve": lambda op: op.solve(X),
    "logdet": lambda op: op.logdet(),
    "inv_quad": lambda op: op.inv_quad(X),
    "inv_quad_logdet": lambda op: op.inv_quad_logdet(X, logdet=True),
    "diagonal": lambda op: op.diagonal(),
    "to_dense": lambda op: op.to_dense(),
    "sample": lambda op: op.sample(2),
    "sample none": lambda op: op.sample(0),
    "zero_mean_mvn_samples": lambda op: op.zero_mean_mvn_samples(2),
    "principal components": lambda op: op.principal_components(2),
    "principal components of all": lambda op: op.principal_components(2, of="full"),
    "diagonalization": lambda op: op.diagonalization(),
    "root": lambda op: op.root_decomposition().root @ X,
    "inverse root": lambda op: op.root_inv_decomposition().root @ X,
    "project": lambda op: op.project(X),
    "lift": lambda op: op.lift(torch.ones(3, 1)),
    "select": lambda op: op.select(INDEX, INDEX),
    "rows": lambda op: op[INDEX],
    "entries": lambda op: op[INDEX, INDEX],
    "slice": lambda op: op[..., 1:4, 1:4],
    "all": lambda op: op[...],
    "row": lambda op: op[1],
    "times": lambda op: op * 2.0,
    "times zero": lambda op: op * 0.0,
    "negative": lambda op: -op,
    "divided": lambda op: op / 2.0,
    "plus": lambda op: op + op,
    "plus zero": lambda op: op + 0,
    "plus diagonal": lambda op: op.add_jitter(0.1),
    "plus low rank": lambda op: op.add_low_rank(X),
    "to": lambda op: op.to(torch.float32),
    "to nothing": lambda op: op.to("cpu"),
    "double": lambda op: op.double(),
    "clone": lambda op: op.clone(),
    "detach": lambda op: op.detach(),
    "expand": lambda op: op.expand(3, 7, 7),
    "unsqueeze": lambda op: op.unsqueeze(0),
    "pickle": lambda op: pickle.dumps(op),
    "deepcopy": lambda op: copy.deepcopy(op),
    "torch.save": lambda op: torch.save(op, io.BytesIO()),
    "inverse matmul": lambda op: op.inverse() @ X,
    "inverse solve": lambda op: op.inverse().solve(X),
    "inverse diagonal": lambda op: op.inverse().diagonal(),
    "inverse sample": lambda op: op.inverse().sample(2),
    "inverse logdet": lambda op: op.inverse().logdet(),
    "inverse dense": lambda op: op.inverse().to_dense(),
    "log_prob": lambda op: MultivariateNormal(X[:, 0], op).log_prob(X[:, 0]),
    "rsample": lambda op: MultivariateNormal(X[:, 0], op).rsample(),
    "entropy": lambda op: MultivariateNormal(X[:, 0], op).entropy(),
    "variance": lambda op: MultivariateNormal(X[:, 0], op).variance,
    "kl": lambda op: torch.distributions.kl_divergence(
        MultivariateNormal(X[:, 0], op), MultivariateNormal(X[:, 0], op)
    ),
    "kl from": lambda op: torch.distributions.kl_divergence(
        MultivariateNormal(X[:, 0], Case().make()[0]), MultivariateNormal(X[:, 0], op)
    ),
    "marginal": lambda op: MultivariateNormal(X[:, 0], op)[INDEX],
}


def pinned() -> tuple[Tensor, Operator]:
    """Return (storage, operator): the K x D rows that a collector would go on writing, and a pinned operator on it."""
    storage = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).double()
    return storage, Operator(storage.mT, torch.ones(7).double()).pin()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_use_of_a_pinned_operator_after_an_in_place_change_raises(name: str) -> None:
    storage, op = pinned()
    OPERATIONS[name](op)  # works, and fills whatever is cached
    storage[1, 2] += 1.0
    with pytest.raises(StaleError, match=r"deviations behind this covariance were changed .*copy=True"):
        OPERATIONS[name](op)


@pytest.mark.parametrize("name", OPERATIONS)
def test_requiring_gradients_does_not_lift_the_pin(name: str) -> None:
    storage, op = pinned()
    op.diag.requires_grad_(True)
    storage[1, 2] += 1.0
    with pytest.raises(StaleError, match="deviations behind this covariance were changed"):
        OPERATIONS[name](op)


VIEWS: dict[str, Callable[[Operator], object]] = {
    "slice": lambda op: op[..., 1:4, 1:4],
    "times": lambda op: op * 2.0,
    "jitter": lambda op: op.add_jitter(0.1),
    "expand": lambda op: op.expand(3, 7, 7),
    "expand twice": lambda op: op.expand(3, 7, 7).expand(2, 3, 7, 7) * 2.0,
    "unsqueeze": lambda op: op.unsqueeze(0)[0],
    "detach": lambda op: op.detach(),
    "evaluate_kernel": lambda op: op.evaluate_kernel(),
    "batch": lambda op: op.expand(3, 7, 7)[1],
    "to": lambda op: op.to("cpu"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_shares_a_pinned_root_is_pinned_too(name: str) -> None:
    storage, op = pinned()
    view = VIEWS[name](op)
    view.logdet()
    storage.mul_(2.0)
    for use in (lambda: view.logdet(), lambda: view.sample(1), lambda: view.diagonal(), lambda: view * 2.0):
        with pytest.raises(StaleError, match="were changed after it was made"):
            use()


@pytest.mark.parametrize("name", ["block", "inverse", "root"])
def test_what_refers_to_a_pinned_operator_raises_too(name: str) -> None:
    storage, op = pinned()
    made = {"block": op[..., 1:3, 2:5], "inverse": op.inverse(), "root": op.root_decomposition().root}[name]
    storage.mul_(2.0)
    with pytest.raises(StaleError, match="were changed after it was made"):
        made @ X[: made.shape[-1]]
    with pytest.raises(StaleError, match="were changed after it was made"):
        made.to_dense()


def test_what_owns_its_root_is_free() -> None:
    storage, op = pinned()
    sigma = dense(op.root, op.diag)
    free = [op.clone(), copy.deepcopy(op), pickle.loads(pickle.dumps(op)), op[INDEX][:, INDEX], op + op]
    expected = [sigma, sigma, sigma, sigma[INDEX][:, INDEX], 2 * sigma]
    storage.mul_(2.0)
    for operator, matrix in zip(free, expected, strict=True):
        assert_close(operator.to_dense(), matrix, F64)
        assert_close(operator.logdet(), torch.logdet(matrix), F64, 1e3)


def test_writing_the_diagonal_or_the_mix_of_a_pinned_operator_is_a_change_too() -> None:
    for tensor in ("diag", "mix"):
        _, op = pinned()
        getattr(op, tensor).mul_(2.0)
        with pytest.raises(StaleError, match="were changed after it was made"):
            op.logdet()


@pytest.mark.parametrize("tensor", ["root", "diag", "mix"])
@pytest.mark.parametrize("kind", ["plain", "expanded", "scaled"])
def test_unpinned_operators_answer_freshly_after_an_in_place_change(tensor: str, kind: str) -> None:
    storage, op = pinned()
    op = Operator(storage.mT, torch.ones(7).double(), torch.tensor(1.0).double())
    if kind == "expanded":
        op = op.expand(2, 7, 7)
    if kind == "scaled":
        op = Operator(op.root, op.diag, torch.eye(3).double())
    op.logdet(), op.solve(X), op.root_decomposition().root @ X, op.inverse().sample(1)
    (op._core if kind == "expanded" else op).__getattribute__(tensor).mul_(1.5)
    sigma = dense(op.root, op.diag, op.mix)
    x = X.expand(*op.batch_shape, 7, 1)
    assert_close(op.logdet(), torch.logdet(sigma), F64, 1e3)
    assert_close(op.solve(x), torch.linalg.solve(sigma, x), F64, 1e3)
    assert_close(op @ x, sigma @ x, F64)
    root = op.root_decomposition().root
    assert_close(root @ (root.mT @ x), sigma @ x, F64, 1e2)
    assert_close(op.inverse() @ x, torch.linalg.solve(sigma, x), F64, 1e3)
    draws = op.sample(1, generator=torch.Generator().manual_seed(0))
    again = Operator(op.root.clone(), op.diag.clone(), op.mix.clone()).sample(
        1, generator=torch.Generator().manual_seed(0)
    )
    if kind != "expanded":
        torch.testing.assert_close(draws, again)


def test_the_factorisation_is_kept_while_nothing_changes() -> None:
    op, _ = Case(mix="matrix").make()
    first = op.capacitance()
    op.solve(X), op.logdet(), op.detach()
    assert op.capacitance() is first and op.detach().capacitance() is first
    op.diag.mul_(1.0)
    assert op.capacitance() is not first


def test_inference_mode_keeps_no_factorisation_and_stays_right() -> None:
    with torch.inference_mode():
        op, sigma = Case().make()
        assert_close(op.logdet(), torch.logdet(sigma), F64, 1e3)
        op.diag.mul_(2.0)
        assert_close(op.logdet(), torch.logdet(dense(op.root, op.diag)), F64, 1e3)
        assert op.pin() is op and op.sample(2).shape == (2, 7)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies_carry_the_tensors_and_nothing_else(case: Case, way: str) -> None:
    op, sigma = case.make()
    op.logdet(), op.to_dense(), op.diagonal(), op.root_decomposition(), op.shape

    def duplicate(operator: Operator) -> Operator:
        if way == "deepcopy":
            return copy.deepcopy(operator)
        if way == "pickle":
            return pickle.loads(pickle.dumps(operator))
        file = io.BytesIO()
        torch.save(operator, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    for operator, expected in (
        (op, sigma),
        (op.expand(3, *op.shape), sigma.expand(3, *sigma.shape)),
        (op * 2, 2 * sigma),
    ):
        other = duplicate(operator)
        assert type(other) is Operator and other._factored is None and other._pinned is None
        assert_close(other.to_dense(), expected, case.dtype)
        assert other.root.stride() == operator.root.stride() and other.mix.dtype == F64
        assert other.root.numel() == 0 or other.root.data_ptr() != op.root.data_ptr()


def test_the_size_of_a_pickle_is_that_of_the_tensors() -> None:
    op = Operator(torch.randn(5, 2000).mT, torch.ones(2000))
    need = 6 * 2000 * 4
    op.to_dense(), op.logdet(), op.principal_components(2)
    assert len(pickle.dumps(op)) < need + 3000
    assert len(pickle.dumps(op.expand(50, 2000, 2000))) < need + 3000
    assert len(pickle.dumps(op[..., :100, :100])) < need / 20 + 3000  # a slice, not the storage behind it
    file = io.BytesIO()
    torch.save(op, file)
    assert file.tell() < need + 8000


def test_copies_after_a_backward() -> None:
    op, sigma = Case(mix="matrix").make()
    op = Operator(op.root.detach().clone(), op.diag, op.mix).requires_grad_(True)
    op.inv_quad_logdet(X, logdet=True)[0].backward()
    assert op.root.is_leaf and op.root.grad is not None
    for other in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert other.requires_grad
        assert_close(other.to_dense(), sigma, F64)


def test_scaled_roots_are_pinned_too() -> None:
    codes, scale = encode_rows(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.float16)
    op = Operator(codes.mT, torch.ones(7), root_scale=scale).pin()
    op.logdet()
    codes.mul_(2)
    with pytest.raises(StaleError, match="were changed after it was made"):
        op.to(F64)
    with pytest.raises(StaleError, match="were changed after it was made"):
        op.to(F32)


@pytest.mark.parametrize("derive", ["expand", "repeat", "inverse", "distribution", "twice"])
@pytest.mark.parametrize("batched_mix", [False, True])
def test_requires_grad_after_expand_reaches_every_tensor(derive: str, batched_mix: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    diag = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
    mix = torch.randn(2, 3, generator=generator, dtype=torch.float64) if batched_mix else None
    core = LowRankPlusDiagLinearOperator(root, diag, mix)
    core.logdet()  # a factorisation of the core is at hand, and must not be used
    if derive == "repeat":
        expanded = core.repeat(3, 1, 1)
    elif derive == "twice":
        expanded = core.expand(1, 4, 4).expand(3, 4, 4)
    elif derive == "inverse":
        expanded = core.inverse().expand(3, 4, 4).base
    elif derive == "distribution":
        expanded = MultivariateNormal(diag, core).expand([3]).lazy_covariance_matrix
    else:
        expanded = core.expand(3, 4, 4)
    expanded.requires_grad_(True)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    columns = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)

    def value(op: LowRankPlusDiagLinearOperator) -> Tensor:
        terms = op.logdet() + op.inv_quad(columns) + (op @ columns + op.solve(columns)).sum((-2, -1))
        return (weights * (terms + op.diagonal().square().sum(-1))).sum()

    value(expanded).backward()
    tensors = [t.detach().clone().requires_grad_() for t in (root.expand(3, 4, 2), diag.expand(3, 4))]
    right = torch.autograd.grad(value(LowRankPlusDiagLinearOperator(*tensors, mix)), tensors)
    torch.testing.assert_close((expanded.root.grad, expanded.diag.grad), right, rtol=1e-10, atol=1e-10)
    assert root.grad is None and not root.requires_grad
    if batched_mix:
        assert expanded.mix.grad is not None


def test_gradients_of_the_core_still_reach_it_through_expand() -> None:
    root = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    diag = torch.ones(3, dtype=torch.float64)
    LowRankPlusDiagLinearOperator(root, diag).expand(5, 3, 3).logdet().sum().backward()
    assert root.grad is not None
    torch.testing.assert_close(root.grad, torch.full_like(root, 5 * 2 / 4))  # d log(1 + r'r) = 2 r / (1 + r'r)


def test_scales_that_want_a_gradient_are_refused():
    """They would get none: the kernels read them as constants."""
    root, scale = torch.ones(4, 2).to(torch.int8), torch.ones(2, 1, requires_grad=True)
    with pytest.raises(ValueError, match="root_scale must not require a gradient"):
        LowRankPlusDiagLinearOperator(root, torch.ones(4), root_scale=scale)
    LowRankPlusDiagLinearOperator(root, torch.ones(4), root_scale=scale.detach())
