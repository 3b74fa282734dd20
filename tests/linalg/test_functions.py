"""Gradients against finite differences in float64, and against autograd through a dense matrix."""

import gpytorch
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import kl_divergence

from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from tests.linalg.cases import F32, F64, Case
from tests.oracles import assert_close

Operator = LowRankPlusDiagLinearOperator
CASES = [
    Case((), 5, 2),
    Case((), 5, 2, "scalar"),
    Case((), 5, 3, "matrix"),
    Case((2,), 4, 2, "scalar"),
    Case((2,), 4, 2, "matrix"),
    Case((2,), 4, 2, "batch"),
    Case((), 3, 5, "matrix"),
    Case((), 1, 1, "scalar"),
    Case((), 3, 0),
]


def leaves(case: Case) -> list[Tensor]:
    op, _ = case.make()
    return [t.detach().clone().requires_grad_() for t in (op.root, op.diag, op.mix)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "use", ["matmul", "vector", "solve", "diagonal", "logdet", "inv_quad", "both", "lead", "dense"]
)
def test_gradients_of_the_operator(case: Case, use: str) -> None:
    x = case.columns(*case.batch, case.dim, 2).requires_grad_()
    functions = {
        "matmul": lambda op, x: op @ x,
        "vector": lambda op, x: op.solve(x[..., :1]),
        "solve": lambda op, x: op.solve(x),
        "diagonal": lambda op, x: op.diagonal(),
        "logdet": lambda op, x: op.logdet(),
        "inv_quad": lambda op, x: op.inv_quad(x, reduce_inv_quad=False),
        "both": lambda op, x: torch.stack(op.inv_quad_logdet(x, logdet=True)),
        "lead": lambda op, x: op.expand(2, *op.shape).solve(torch.stack((x, 2 * x))),
        "dense": lambda op, x: op.to_dense(),
    }
    tensors = leaves(case)
    assert gradcheck(
        lambda r, d, m, x: functions[use](Operator(r, d, m), x), (*tensors, x), fast_mode=case is not CASES[2]
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("use", ["log_prob", "one", "entropy", "rsample", "base_samples", "kl p", "kl q", "inverse"])
def test_gradients_of_the_distribution(case: Case, use: str) -> None:
    value = case.columns(3, *case.batch, case.dim).requires_grad_()
    mean = case.columns(*case.batch, case.dim, seed=9).requires_grad_()
    other = MultivariateNormal(mean.detach() + 0.3, Case(case.batch, case.dim, 2).make(seed=7)[0])
    noise = case.columns(3, *case.batch, case.dim, seed=4).requires_grad_()

    def call(r: Tensor, d: Tensor, m: Tensor, mean: Tensor, value: Tensor) -> Tensor:
        normal = MultivariateNormal(mean, Operator(r, d, m))
        if use == "log_prob":
            return normal.log_prob(value)
        if use == "one":
            return normal.log_prob(value[0])
        if use == "entropy":
            return normal.entropy()
        if use == "rsample":
            return normal.rsample((2,), generator=torch.Generator().manual_seed(1))
        if use == "inverse":
            inverse = MultivariateNormal(mean, Operator(r, d, m).inverse())
            return inverse.rsample((2,), generator=torch.Generator().manual_seed(1)).sum(0) + inverse.log_prob(
                value[0]
            ).unsqueeze(-1)
        return kl_divergence(normal, other) if use == "kl p" else kl_divergence(other, normal)

    if use == "base_samples":

        def transform(r: Tensor, d: Tensor, m: Tensor, mean: Tensor, noise: Tensor) -> Tensor:
            return MultivariateNormal(mean, Operator(r, d, m)).rsample(base_samples=noise)

        assert gradcheck(transform, (*leaves(case), mean, noise))
        return
    assert gradcheck(call, (*leaves(case), mean, value), fast_mode=case is not CASES[2])


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_gradients_through_gpytorch(case: Case) -> None:
    value = case.columns(*case.batch, case.dim)
    tensors = leaves(case)
    plain = gpytorch.distributions.MultivariateNormal(torch.zeros_like(value), Operator(*tensors))
    actual = torch.autograd.grad(plain.log_prob(value).sum(), tensors)
    ours = MultivariateNormal(torch.zeros_like(value), Operator(*tensors)).log_prob(value)
    for a, b in zip(actual, torch.autograd.grad(ours.sum(), tensors), strict=True):
        assert_close(a, b.double(), F64, 1e2)


@pytest.mark.parametrize("use", ["log_prob", "matmul", "solve", "diagonal"])
@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_gradients_in_float32_and_to_a_narrow_root(use: str, storage: torch.dtype | None) -> None:
    op, _ = Case((2,), 40, 3, "matrix", F32, storage).make()
    x = Case(dtype=F32).columns(2, 40, 2)
    tensors = [t.detach().clone().requires_grad_() for t in (op.root, op.diag, op.mix)]

    def call(op: Operator, x: Tensor) -> Tensor:
        if use == "log_prob":
            return op.inv_quad_logdet(x, logdet=True)[0].sum() + op.inv_quad_logdet(x, logdet=True)[1].sum()
        return (op.diagonal() if use == "diagonal" else getattr(op, use)(x)).square().sum()

    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(call(Operator(*wide), x.double()), wide)
    actual = torch.autograd.grad(call(Operator(*tensors), x), tensors)
    for a, b, t in zip(actual, expected, tensors, strict=True):
        assert a.dtype == t.dtype and a.shape == t.shape
        assert_close(a, b, F32 if a.dtype != torch.bfloat16 else torch.bfloat16, 30 if a.dtype != torch.bfloat16 else 1)


def test_two_calls_and_two_backward_passes() -> None:
    """The factorisation is shared by both calls, the graphs are not."""
    tensors = leaves(Case((), 5, 2, "matrix"))
    op = Operator(*tensors)
    x = Case().columns(5, 1)
    once = torch.autograd.grad(Operator(*tensors).inv_quad_logdet(x, logdet=True)[1], tensors)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(op.logdet(), tensors), once, strict=True))
    first, second = op.logdet(), op.logdet()
    first.backward()
    second.backward()
    assert all(torch.allclose(t.grad, 2 * g) for t, g in zip(tensors, once, strict=True))
    loss = op.inv_quad(x) + op.solve(x).sum() + op.diagonal().sum() + (op @ x).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def test_a_call_without_gradients_does_not_leave_its_mark() -> None:
    tensors = leaves(Case((), 5, 2, "matrix"))
    op, x = Operator(*tensors), Case().columns(5, 1)
    with torch.no_grad():
        for value in (op.logdet(), op.solve(x), op.inv_quad(x), op.diagonal()):
            assert not value.requires_grad
    expected = torch.autograd.grad(Operator(*tensors).logdet(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(op.logdet(), tensors), expected, strict=True))
    with torch.no_grad():
        assert not op.logdet().requires_grad  # nor the other way round
    assert not op.capacitance().logdet.requires_grad


def test_a_backward_pass_after_an_in_place_change_is_refused() -> None:
    tensors = leaves(Case((), 5, 2, "matrix"))
    op = Operator(*tensors)
    loss = op.logdet() + op.solve(Case().columns(5, 1)).sum()
    with torch.no_grad():
        tensors[1].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_at_point_masses_are_finite() -> None:
    root, diag, mix = leaves(Case((), 5, 2, "matrix"))
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]).double()
    root, diag = (root.detach() * keep.unsqueeze(-1)).requires_grad_(), (diag.detach() * keep).requires_grad_()
    mean = torch.zeros(5).double().requires_grad_()
    normal = MultivariateNormal(mean, Operator(root, diag, mix))
    other = MultivariateNormal(mean.detach(), Operator(root.detach(), 2 * diag.detach()))
    value = Case().columns(5) * keep
    small = MultivariateNormal(mean[keep > 0], Operator(root[keep > 0], diag[keep > 0], mix))
    small_other = MultivariateNormal(
        mean[keep > 0].detach(), Operator(root[keep > 0].detach(), 2 * diag[keep > 0].detach())
    )
    pairs = {
        "log_prob": (normal.log_prob(value), small.log_prob(value[keep > 0])),
        "entropy": (normal.entropy(), small.entropy()),
        "kl": (kl_divergence(normal, other), kl_divergence(small, small_other)),
    }
    for name, (whole, part) in pairs.items():
        assert_close(whole.detach(), part.detach(), F64, 10)
        grads = [torch.autograd.grad(v, (root, diag, mix), retain_graph=True) for v in (whole, part)]
        for a, b in zip(*grads, strict=True):
            assert a.isfinite().all(), name
            assert_close(a, b, F64, 1e3)
    draws = normal.rsample((3,), generator=torch.Generator().manual_seed(0))
    assert (draws[:, 1] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(draws.square().sum(), (root, diag, mix)))


def test_gradient_to_a_zero_mix_is_zero() -> None:
    root, diag, _ = leaves(Case((), 5, 2))
    mix = torch.tensor(0.0).double().requires_grad_()
    value, logdet = Operator(root, diag, mix).inv_quad_logdet(Case().columns(5, 1), logdet=True)
    assert torch.autograd.grad(value + logdet, mix)[0] == 0
