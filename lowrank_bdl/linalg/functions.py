r"""Autograd functions of low-rank-plus-diagonal matrices, with closed-form gradients.

Gradients to :math:`U = R M` are sums of outer products of D-vectors and R-vectors, so a backward pass is one more walk
over the root and allocates nothing D x K but the gradient itself. Where a gradient is to be differentiated again it is
taken through the plain torch operations of `plain.py`, and where torch transforms the code the value is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from lowrank_bdl.errors import NotPSDError
from lowrank_bdl.linalg import plain
from lowrank_bdl.linalg.capacitance import Capacitance, Projection
from lowrank_bdl.linalg.devices import require_float64
from lowrank_bdl.linalg.factors import LowRankFactors, inverse_std, project
from lowrank_bdl.linalg.kernels import diagonal, lift_, matmul
from lowrank_bdl.linalg.precision import exact_methods
from lowrank_bdl.linalg.ridge import Ridge, ridge
from lowrank_bdl.linalg.transforms import backward_is_transformed, differentiable_gradients, transformed

Pairs = Sequence[tuple[Tensor, Tensor]]


def _root_gradient(factors: LowRankFactors, pairs: Pairs, inner: Tensor | None = None) -> Tensor:
    r"""Return :math:`(\sum_j l_j r_j^\top) M^\top + D^{-1} R P`, shape ``(*B, D, K)`` over ``(*B, K, D)`` storage.

    Args:
        factors: The matrix.
        pairs: Tuples of l, shape ``(*B, D, S)``, and r, shape ``(*B, R, S)``.
        inner: P, shape ``(*B, K, K)``, symmetric.
    """
    dtype = factors.diag.dtype
    mixed = [(left, factors.mix_forward(right).to(dtype)) for left, right in pairs]
    shape = (*factors.batch_shape, factors.root.shape[-1], factors.dim)
    result = torch.zeros(shape, dtype=dtype, device=factors.diag.device)
    for part in factors.chunks():
        chunk = result[..., part]
        for left, right in mixed:
            lift_(chunk, right.mT, left[..., part, :].mT.to(dtype))
        if inner is not None:
            weight = inverse_std(factors.diag[..., part], dtype).square().unsqueeze(-2)
            lift_(chunk, inner.to(dtype), factors.rows(part, dtype) * weight)
    return result.mT.to(factors.root.dtype)


def _mix_gradient(factors: LowRankFactors, pairs: Pairs, extra: Tensor | None = None) -> Tensor:
    """Return the gradient to the mix, given gradients ``left @ right.mT`` to U and ``extra`` = R'(the rest) (K x R)."""
    total = sum(project(factors, left) @ right.mT for left, right in pairs)
    total = total if extra is None else total + extra
    assert isinstance(total, Tensor)
    if factors.mix.ndim == 0:
        total = total.diagonal(dim1=-2, dim2=-1).sum()
    elif factors.mix.ndim == 2 and total.ndim > 2:
        total = total.sum(tuple(range(total.ndim - 2)))
    return total.to(factors.mix.dtype)


def _low_rank_gradients(
    factors: LowRankFactors, pairs: Pairs, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients to the root and the mix where ``needs`` (root, mix) says so."""
    root = _root_gradient(factors, pairs) if needs[0] else None
    return root, _mix_gradient(factors, pairs) if needs[1] else None


@exact_methods
class MatmulFunction(Function):
    """``(diag(d) + U U') X``, differentiable in the root, the diagonal, the mix and X."""

    @staticmethod
    def forward(ctx: Any, factors: LowRankFactors, root: Tensor, diag: Tensor, mix: Tensor, columns: Tensor) -> Tensor:
        """Compute the value and keep what the gradient needs."""
        ctx.factors = factors
        ctx.save_for_backward(root, diag, mix, columns)
        return matmul(factors, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient to every argument, None where none was asked for."""
        factors, columns, *_ = _restore(ctx, 1)
        if backward_is_transformed(grad):
            tensors = (factors.root, factors.diag, factors.mix, columns)
            return None, *_plain_gradients(ctx, factors, plain.matmul, tensors, (grad,), 1)
        inner = factors.mix_transposed(project(factors, columns))
        grad_inner = factors.mix_transposed(project(factors, grad))
        needs = ctx.needs_input_grad
        root, mix = _low_rank_gradients(factors, ((grad, inner), (columns, grad_inner)), (needs[1], needs[3]))
        diag = (grad * columns).sum(-1) if needs[2] else None
        return None, root, diag, mix, matmul(factors, grad) if needs[4] else None


@exact_methods
class SolveFunction(Function):
    """``(diag(d) + U U')^-1 X``, differentiable in the root, the diagonal, the mix and X."""

    @staticmethod
    def forward(
        ctx: Any,
        factors: LowRankFactors,
        capacitance: Capacitance,
        projection: Projection | None,
        root: Tensor,
        diag: Tensor,
        mix: Tensor,
        columns: Tensor,
    ) -> Tensor:
        """Compute the value and keep what the gradient needs."""
        result = ridge(factors, capacitance, columns, solve=True, projection=projection)
        assert result.solution is not None
        ctx.factors, ctx.capacitance, ctx.weights = factors, result.capacitance, result.weights
        ctx.save_for_backward(root, diag, mix, columns, result.solution)
        return result.solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient to every argument, None where none was asked for."""
        factors, columns, solution = _restore(ctx, 3)
        if backward_is_transformed(grad):
            tensors = (factors.root, factors.diag, factors.mix, columns)
            return None, None, None, *_plain_gradients(ctx, factors, plain.solve, tensors, (grad,), 3)
        result = ridge(factors, ctx.capacitance, grad, solve=True)
        assert result.solution is not None
        needs = ctx.needs_input_grad
        pairs = ((result.solution, -ctx.weights), (solution, -result.weights))
        root, mix = _low_rank_gradients(factors, pairs, (needs[3], needs[5]))
        diag = -(result.solution * solution).sum(-1) if needs[4] else None
        return None, None, None, root, diag, mix, result.solution if needs[6] else None


@exact_methods
class DiagonalFunction(Function):
    """``d + rowsum(U * U)``, differentiable in the root, the diagonal and the mix."""

    @staticmethod
    def forward(ctx: Any, factors: LowRankFactors, root: Tensor, diag: Tensor, mix: Tensor) -> Tensor:
        """Compute the value and keep what the gradient needs."""
        ctx.factors = factors
        ctx.save_for_backward(root, diag, mix)
        return diagonal(factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient to every argument, None where none was asked for."""
        factors, *_ = _restore(ctx, 1)
        if backward_is_transformed(grad):
            tensors = (factors.root, factors.diag, factors.mix)
            return None, *_plain_gradients(ctx, factors, plain.diagonal, tensors, (grad,), 1)
        needs, dtype = ctx.needs_input_grad, factors.diag.dtype
        root = mix = None
        double = factors.mix.double()
        identity = torch.eye(factors.root.shape[-1], dtype=torch.float64, device=grad.device)
        outer = 2 * (double @ double.mT if double.ndim else double.square() * identity)
        if needs[1]:  # 2 diag(g) R M M'
            shape = (*factors.batch_shape, factors.root.shape[-1], factors.dim)
            root = torch.empty(shape, dtype=dtype, device=grad.device)
            for part in factors.chunks():
                root[..., part] = (outer.to(dtype) @ factors.rows(part, dtype)) * grad[..., None, part]
            root = root.mT.to(factors.root.dtype)
        if needs[3]:  # 2 R' diag(g) R M
            weighted = factors.zeros(factors.root.shape[-1], factors.root.shape[-1])
            for part in factors.chunks():
                rows = factors.rows(part, dtype)
                weighted += ((rows * grad[..., None, part]) @ rows.mT).double()
            mix = _mix_gradient(factors, (), 2 * (weighted @ double if double.ndim else weighted * double))
        return None, root, grad if needs[2] else None, mix


@exact_methods
class InvQuadLogdetFunction(Function):
    """``x' S^-1 x`` for every column x minus the mean, and ``log|S|``, differentiable in all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        factors: LowRankFactors,
        capacitance: Capacitance,
        projection: Projection | None,
        keep: list[Ridge],
        root: Tensor,
        diag: Tensor,
        mix: Tensor,
        columns: Tensor,
        mean: Tensor | None,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute the value and keep what the gradient needs."""
        result = ridge(factors, capacitance, columns, mean=mean, solve=needs_grad, projection=projection)
        keep.append(result)
        if needs_grad:
            ctx.factors, ctx.capacitance, ctx.weights = factors, result.capacitance, result.weights
            ctx.save_for_backward(root, diag, mix, columns, mean, result.solution)
        return result.quadratic, result.capacitance.logdet.clone()  # a cached tensor must not join this graph

    @staticmethod
    def backward(ctx: Any, grad_quadratic: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient to every argument, None where none was asked for."""
        factors, columns, mean, solution = _restore(ctx, 4)
        require_float64(solution.device, "The derivative of a density")
        if backward_is_transformed(grad_quadratic, grad_logdet):
            tensors = (factors.root, factors.diag, factors.mix, columns, mean)
            outer = (grad_quadratic, grad_logdet)
            gradients = _plain_gradients(ctx, factors, plain.inv_quad_logdet, tensors, outer, 4)
            return None, None, None, None, *gradients, None
        needs, weights, dtype = ctx.needs_input_grad, ctx.weights, factors.diag.dtype
        scale = (2 * grad_quadratic).unsqueeze(-2)  # (*B, 1, S)
        to_columns = solution * scale.to(dtype) if needs[7] or needs[8] else None
        pairs = ((solution, -scale * weights),)
        inverse = ctx.capacitance.solve(torch.eye(factors.rank, dtype=torch.float64, device=solution.device))
        double = factors.mix.double()
        if double.ndim == 0:
            inner = double.square() * inverse
            extra = torch.where(double == 0, 0.0, inverse @ ctx.capacitance.gram / double)
        else:
            inner = double @ inverse @ double.mT  # M C^-1 M'
        inner = 2 * grad_logdet[..., None, None] * inner
        root = _root_gradient(factors, pairs, inner) if needs[4] else None
        diag = None
        if needs[5]:
            wide = dtype if ctx.capacitance.method == "storage" else torch.float64
            diag = -(solution.square() * (0.5 * scale).to(dtype)).sum(-1)
            for part in factors.chunks():
                inverse_diag = inverse_std(factors.diag[..., part], wide).square()
                rows = factors.rows(part, wide)
                leverage = (rows * (inner.to(wide) @ rows)).sum(-2).mul_(0.5 * inverse_diag)
                diag[..., part] += (grad_logdet[..., None].to(wide) - leverage).mul_(inverse_diag).to(dtype)
        mix = None
        if needs[6]:
            if double.ndim:
                unmixed = factors.zeros(factors.root.shape[-1], factors.root.shape[-1])
                for part in factors.chunks():
                    rows = factors.rows(part, torch.float64)
                    weight = inverse_std(factors.diag[..., part], torch.float64).square().unsqueeze(-2)
                    unmixed += (rows * weight) @ rows.mT
                extra = unmixed @ double @ inverse
            mix = _mix_gradient(factors, pairs, 2 * grad_logdet[..., None, None] * extra)
        to_mean = -to_columns.sum(-1) if to_columns is not None and needs[8] else None
        return None, None, None, None, root, diag, mix, to_columns if needs[7] else None, to_mean, None


def apply_matmul(factors: LowRankFactors, columns: Tensor) -> Tensor:
    """Return ``Sigma X``, differentiable any number of times; shapes as for `MatmulFunction`."""
    if transformed():
        return plain.matmul(factors, columns)
    result: Tensor = MatmulFunction.apply(factors, factors.root, factors.diag, factors.mix, columns)
    return result


def apply_diagonal(factors: LowRankFactors) -> Tensor:
    """Return the diagonal of Sigma, differentiable any number of times."""
    if transformed():
        return plain.diagonal(factors)
    result: Tensor = DiagonalFunction.apply(factors, factors.root, factors.diag, factors.mix)
    return result


def _restore(ctx: Any, place: int) -> tuple[Any, ...]:
    """Return the factors, checked by autograd for in-place changes since the forward pass, and what else was saved.

    Args:
        ctx: Of the function.
        place: Of the root among its arguments.
    """
    scale = ctx.factors.scale
    if scale is not None and ctx.needs_input_grad[place]:
        raise NotImplementedError(
            "expected a root of plain numbers where its gradient is wanted; got codes with block scales. "
            "Call detach() on the root, or decode it."
        )
    root, diag, mix, *others = ctx.saved_tensors
    return LowRankFactors(root, diag, mix, scale), *others


def _plain_gradients(
    ctx: Any,
    factors: LowRankFactors,
    compute: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    outer: Sequence[Tensor | None],
    place: int,
) -> tuple[Tensor | None, ...]:
    """Return gradients to ``tensors`` (root, diag, mix and what follows), which can be differentiated again.

    Args:
        ctx: Of the function.
        factors: The matrix.
        compute: An operation of `plain.py`.
        tensors: Its inputs, from the root on.
        outer: The incoming gradients.
        place: Of the root among the arguments of the function.

    Raises:
        NotPSDError: If the matrix is one that only a QR factorisation resolves: its second derivatives are lost.
    """
    capacitance = getattr(ctx, "capacitance", None)
    if capacitance is not None and capacitance.method == "qr":
        raise NotPSDError(
            "second derivatives need variances that are not too far below the deviations; here float64 loses them. "
            f"Raise the smallest variances, {factors.diag[factors.diag > 0].min().item():.1e} and up, with "
            "add_jitter()."
        )

    def of_tensors(root: Tensor, diag: Tensor, mix: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
        return compute(LowRankFactors(root, diag, mix, factors.scale), *others)

    needs = ctx.needs_input_grad[place : place + len(tensors)]
    return differentiable_gradients(of_tensors, tensors, outer, needs)
