"""Derivatives of any order, in every mode of torch, against the dense matrix."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian

from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from tests.oracles import assert_close

SHAPES = {
    "plain": ((5, 2), (5,), ()),
    "wide": ((3, 5), (3,), ()),  # K > D
    "rank 0": ((4, 0), (4,), ()),
    "batch": ((2, 4, 2), (2, 4), ()),
    "broadcast root": ((4, 2), (2, 4), ()),
    "mix": ((5, 3), (5,), (3, 2)),
    "batched mix": ((2, 4, 3), (2, 4), (2, 3, 2)),
}
Tensors = tuple[Tensor, ...]


def inputs(name: str) -> Tensors:
    """Return root, diagonal, mix and two right-hand sides of a case, float64 leaves."""
    generator = torch.Generator().manual_seed(sorted(SHAPES).index(name))
    root_shape, diag_shape, mix_shape = SHAPES[name]
    root, mix = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (root_shape, mix_shape))
    diag = torch.rand(diag_shape, generator=generator, dtype=torch.float64) + 0.5
    columns = torch.randn((*diag_shape, 2), generator=generator, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (root, diag, mix + 0.5 if mix.ndim == 0 else mix, columns))


def covariance(root: Tensor, diag: Tensor, mix: Tensor) -> Tensor:
    """Return the dense matrix, differentiable."""
    mixed = root @ mix if mix.ndim else root * mix
    return mixed @ mixed.mT + torch.diag_embed(diag)


def operator(*tensors: Tensor) -> LowRankPlusDiagLinearOperator:
    return LowRankPlusDiagLinearOperator(*tensors)


def normal(r: Tensor, d: Tensor, m: Tensor, x: Tensor) -> MultivariateNormal:
    return MultivariateNormal(x[..., 0], operator(r, d, m))


def dense_normal(r: Tensor, d: Tensor, m: Tensor, x: Tensor) -> torch.distributions.MultivariateNormal:
    return torch.distributions.MultivariateNormal(x[..., 0], covariance(r, d, m), validate_args=False)


def dense_kl(r: Tensor, d: Tensor, m: Tensor, x: Tensor) -> Tensor:
    p, q = dense_normal(r, d, m, x), dense_normal(r * 0.5, d + 1, m, x * 0.5)
    return torch.distributions.kl_divergence(p, q)


def root_of(matrix: Tensor, diag: Tensor) -> Tensor:
    """Return D^1/2 times the symmetric root of D^-1/2 Sigma D^-1/2, dense."""
    std = diag.sqrt()
    root = matrix / std[..., None] / std[..., None, :]
    inverse = torch.eye(diag.shape[-1], dtype=diag.dtype).expand_as(root)
    for _ in range(12):  # Denman & Beavers: eigenvectors would have no derivative where eigenvalues are equal
        root, inverse = (root + inverse.inverse()) / 2, (inverse + root.inverse()) / 2
    return std[..., None] * root


Pair = tuple[Callable[..., Tensor], Callable[..., Tensor]]
OPERATIONS: dict[str, Pair] = {
    "matmul": (lambda r, d, m, x: operator(r, d, m) @ x, lambda r, d, m, x: covariance(r, d, m) @ x),
    "solve": (
        lambda r, d, m, x: operator(r, d, m).solve(x),
        lambda r, d, m, x: torch.linalg.solve(covariance(r, d, m), x),
    ),
    "inv_quad": (
        lambda r, d, m, x: operator(r, d, m).inv_quad(x),
        lambda r, d, m, x: (x * torch.linalg.solve(covariance(r, d, m), x)).sum((-2, -1)),
    ),
    "inv_quad_logdet": (
        lambda r, d, m, x: sum(operator(r, d, m).inv_quad_logdet(x, logdet=True)),
        lambda r, d, m, x: (
            (x * torch.linalg.solve(covariance(r, d, m), x)).sum((-2, -1)) + covariance(r, d, m).logdet()
        ),
    ),
    "logdet": (lambda r, d, m, x: operator(r, d, m).logdet(), lambda r, d, m, x: covariance(r, d, m).logdet()),
    "diagonal": (
        lambda r, d, m, x: operator(r, d, m).diagonal(),
        lambda r, d, m, x: covariance(r, d, m).diagonal(dim1=-2, dim2=-1),
    ),
    "project": (
        lambda r, d, m, x: operator(r, d, m).project(x),
        lambda r, d, m, x: (r @ m if m.ndim else r * m).mT @ x,
    ),
    "to_dense": (lambda r, d, m, x: operator(r, d, m).to_dense(), lambda r, d, m, x: covariance(r, d, m)),
    "inverse product": (
        lambda r, d, m, x: operator(r, d, m).inverse() @ x,
        lambda r, d, m, x: torch.linalg.solve(covariance(r, d, m), x),
    ),
    "inverse diagonal": (
        lambda r, d, m, x: operator(r, d, m).inverse().diagonal(),
        lambda r, d, m, x: torch.linalg.inv(covariance(r, d, m)).diagonal(dim1=-2, dim2=-1),
    ),
    "scaled and shifted": (
        lambda r, d, m, x: ((operator(r, d, m) * 2.0).add_jitter(0.5)).inverse().solve(x),
        lambda r, d, m, x: 2 * covariance(r, d, m) @ x + 0.5 * x,
    ),
    "block": (
        lambda r, d, m, x: operator(r, d, m)[..., :2, 1:] @ x[..., 1:, :],
        lambda r, d, m, x: covariance(r, d, m)[..., :2, 1:] @ x[..., 1:, :],
    ),
    "log_prob": (
        lambda r, d, m, x: normal(r, d, m, x).log_prob(x[..., 1]),
        lambda r, d, m, x: dense_normal(r, d, m, x).log_prob(x[..., 1]),
    ),
    "entropy": (lambda r, d, m, x: normal(r, d, m, x).entropy(), lambda r, d, m, x: dense_normal(r, d, m, x).entropy()),
    "kl": (
        lambda r, d, m, x: torch.distributions.kl_divergence(normal(r, d, m, x), normal(r * 0.5, d + 1, m, x * 0.5)),
        dense_kl,
    ),
    "base_samples": (
        lambda r, d, m, x: normal(r, d, m, x).rsample(base_samples=x[..., 1]),
        lambda r, d, m, x: x[..., 0] + (root_of(covariance(r, d, m), d) @ x[..., 1:]).squeeze(-1),
    ),
    "inverse root": (
        lambda r, d, m, x: operator(r, d, m).root_inv_decomposition().root.mT @ x,
        lambda r, d, m, x: torch.linalg.solve(root_of(covariance(r, d, m), d), x),
    ),
}


def total(function: Callable[..., Tensor], tensors: Tensors) -> Tensor:
    """Return a scalar that gives every entry of a result a weight and a curvature of its own."""
    result = function(*tensors)
    weights = torch.linspace(0.3, 1.7, result.numel(), dtype=result.dtype).reshape(result.shape)
    return (weights * result).sum() + (result * weights).square().sum() / 7


def derivatives(function: Callable[..., Tensor], tensors: Tensors, order: int) -> list[Tensor]:
    """Return the gradient, and derivatives of it along fixed directions up to an order, each flat."""
    found, value = [], total(function, tensors)
    for _ in range(order):
        gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in gradients])
        found.append(flat.detach())
        value = (flat * torch.linspace(-1.0, 1.3, len(flat), dtype=flat.dtype)).sum()
        value = value + 0 * total(function, tensors)  # a zero derivative has no graph of its own
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_to_the_third_are_those_of_the_dense_matrix(name: str, shape: str) -> None:
    ours, dense = OPERATIONS[name]
    tensors = inputs(shape)
    assert_close(ours(*tensors).detach(), dense(*tensors).detach())
    for mine, right in zip(derivatives(ours, tensors, 3), derivatives(dense, tensors, 3), strict=True):
        assert_close(mine, right, cond=1e4)


@pytest.mark.parametrize("shape", ["plain", "wide", "batch", "mix"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradgradcheck(name: str, shape: str) -> None:
    ours, _ = OPERATIONS[name]
    tensors = inputs(shape)
    assert gradcheck(ours, tensors)
    assert gradgradcheck(ours, tensors)


def every_mode(function: Callable[[Tensor], Tensor], point: Tensor) -> list[Tensor]:
    """Return the Hessian of a scalar function by every way that torch has, first by plain autograd."""
    func = torch.func
    return [
        hessian(function, point),
        func.hessian(function)(point),
        func.jacrev(func.jacrev(function))(point),
        func.jacfwd(func.jacfwd(function))(point),
        func.jacrev(func.grad(function))(point),
        torch.stack([func.jvp(func.grad(function), (point,), (e,))[1] for e in torch.eye(len(point)).double()]),
        torch.stack([func.vjp(func.grad(function), point)[1](e)[0] for e in torch.eye(len(point)).double()]),
        jacobian(lambda t: jacobian(function, t, create_graph=True), point, vectorize=True),
        hessian(function, point, vectorize=True, outer_jacobian_strategy="forward-mode"),
    ]


@pytest.mark.parametrize("shape", ["plain", "wide", "mix", "rank 0"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_hessians_of_every_mode_of_torch(name: str, shape: str) -> None:
    tensors = tuple(t.detach() for t in inputs(shape))
    sizes = [t.numel() for t in tensors]

    def scalar(function: Callable[..., Tensor], flat: Tensor) -> Tensor:
        pieces = (p.reshape(t.shape) for p, t in zip(flat.split(sizes), tensors, strict=True))
        return total(function, tuple(pieces))

    ours, dense = OPERATIONS[name]
    point = torch.cat([t.reshape(-1) for t in tensors])
    right = hessian(lambda flat: scalar(dense, flat), point)
    for found in every_mode(lambda flat: scalar(ours, flat), point):
        assert_close(found, right, cond=1e4)


@pytest.mark.parametrize("name", OPERATIONS)
def test_vmap_over_matrices(name: str) -> None:
    ours, dense = OPERATIONS[name]
    tensors = tuple(t.detach() for t in inputs("batched mix"))
    assert_close(torch.vmap(ours)(*tensors), torch.stack([dense(*row) for row in zip(*tensors, strict=True)]))
    gradient = torch.vmap(torch.func.grad(lambda *row: total(ours, row), argnums=(0, 1, 2, 3)))(*tensors)
    for position, found in enumerate(gradient):
        each = [
            torch.func.grad(lambda *t: total(dense, t), argnums=position)(*row) for row in zip(*tensors, strict=True)
        ]
        assert_close(found, torch.stack(each), cond=1e4)


def test_many_gradients_at_once_with_a_graph() -> None:
    root, diag, mix, columns = inputs("plain")

    def twice(function: Callable[[Tensor], Tensor]) -> Tensor:
        found = jacobian(lambda t: jacobian(function, t, create_graph=True, vectorize=True), diag, vectorize=True)
        assert isinstance(found, Tensor)
        return found

    ours, dense = OPERATIONS["log_prob"]
    right = twice(lambda d: dense(root, d, mix, columns))
    assert_close(twice(lambda d: ours(root, d, mix, columns)), right, cond=1e4)
    with pytest.raises(NotImplementedError, match="need incoming gradients one by one, or torch.func"):
        twice(lambda d: OPERATIONS["base_samples"][0](root, d, mix, columns))
