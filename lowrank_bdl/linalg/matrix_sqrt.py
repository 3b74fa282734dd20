r"""The square root of a symmetric positive-definite matrix, differentiable any number of times, in every mode of torch.

Derivatives of eigenvectors do not exist where eigenvalues meet; those of the square root do. With
:math:`S = C^{1/2}`, :math:`S\,dS + dS\,S = dC` (Lyapunov's equation), whose solution by the eigenvectors of S divides
by sums of eigenvalues only (Higham, Functions of Matrices, 2008, 3.2).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lowrank_bdl.linalg.transforms import many_at_once


def symmetric_sqrt(matrix: Tensor) -> Tensor:
    """Return the square root of symmetric positive-definite matrices ``(*B, R, R)``."""
    result: Tensor = _SymmetricSqrt.apply(matrix)
    return result


def solve_lyapunov(root: Tensor, right: Tensor) -> Tensor:
    """Return X with ``S X + X S = right`` for symmetric positive-definite S, all ``(*B, R, R)``."""
    result: Tensor = _Lyapunov.apply(root, right)
    return result


class _SymmetricSqrt(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        root: Tensor = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
        return root

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _require_one(grad)
        return solve_lyapunov(ctx.saved_tensors[0], grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return solve_lyapunov(ctx.saved_tensors[0], tangent)


class _Lyapunov(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(root: Tensor, right: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(root)
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        solution: Tensor = vectors @ ((vectors.mT @ right @ vectors) / sums) @ vectors.mT
        return solution

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        _require_one(grad)
        root, solution = ctx.saved_tensors
        adjoint = solve_lyapunov(root, grad)
        return -(adjoint @ solution.mT + solution.mT @ adjoint), adjoint

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, right: Tensor | None) -> Tensor:
        root, solution = ctx.saved_tensors
        total = torch.zeros_like(solution) if right is None else right
        if tangent is not None:
            total = total - tangent @ solution - solution @ tangent
        return solve_lyapunov(root, total)


def _require_one(grad: Tensor) -> None:
    """Refuse to differentiate gradients that `torch.autograd` takes many at a time: its vmap loses their graph."""
    if many_at_once(grad) and torch.is_grad_enabled():
        raise NotImplementedError(
            "second derivatives of a matrix root need incoming gradients one by one, or torch.func; got many at once "
            "(vectorize=True or is_grads_batched=True with create_graph=True)."
        )
