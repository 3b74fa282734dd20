"""Operators for SciPy and operators of curvlinops."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from linear_operator.operators import DenseLinearOperator
from torch.nn.functional import cross_entropy

from lowrank_bdl.curvature.adapters import from_curvlinops, to_scipy
from lowrank_bdl.curvature.hessian import HessianLinearOperator
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.lanczos import lanczos
from tests.curvature.dense import build_large, dense_hessian
from tests.oracles import assert_close


def test_both_ends_of_the_spectrum_by_arpack():
    net, data = build_large("residual")
    hessian = HessianLinearOperator(net, cross_entropy, data)
    operator = to_scipy(hessian)
    found = scipy.sparse.linalg.eigsh(operator, 6, which="BE", return_eigenvectors=False)
    values = torch.linalg.eigvalsh(dense_hessian(net, data))
    assert_close(torch.from_numpy(np.sort(found)), torch.cat([values[:3], values[-3:]]), cond=1e4)
    assert operator.dtype == np.float64 and operator.shape == tuple(hessian.shape)


@pytest.mark.parametrize("dtype, expected", [(torch.float64, np.float64), (torch.float32, np.float32)])
def test_products_of_a_rectangular_matrix(dtype, expected):
    matrix = torch.arange(6.0, dtype=dtype).view(2, 3)
    operator = to_scipy(DenseLinearOperator(matrix))
    assert operator.dtype == expected
    vectors = np.random.default_rng(0).normal(size=(3, 4))
    assert_close(torch.from_numpy(operator @ vectors), matrix.double() @ torch.from_numpy(vectors), dtype)
    assert_close(torch.from_numpy(operator @ vectors[:, 0]), matrix.double() @ torch.from_numpy(vectors[:, 0]), dtype)
    assert_close(torch.from_numpy(operator.H @ vectors[:2]), matrix.double().mT @ torch.from_numpy(vectors[:2]), dtype)
    adjoint = operator.rmatvec(vectors[:2, 0].copy())
    assert_close(torch.from_numpy(adjoint), matrix.double().mT @ torch.from_numpy(vectors[:2, 0].copy()), dtype)


def test_batches_of_matrices_are_no_operator_of_scipy():
    with pytest.raises(ShapeError, match=r"expected shape \(m, n\), got \(2, 3, 3\)"):
        to_scipy(DenseLinearOperator(torch.eye(3).expand(2, 3, 3)))


class Peer:
    """What curvlinops 3 offers: products with vectors and matrices, and an adjoint."""

    def __init__(self, matrix, self_adjoint=False):
        self.matrix = matrix
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device
        self.SELF_ADJOINT = self_adjoint

    def __matmul__(self, other):
        assert other.ndim <= 2, "no batches"
        return self.matrix @ other

    def adjoint(self):
        return Peer(self.matrix.mT)


def test_a_foreign_operator_is_one_of_ours():
    matrix = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    operator = from_curvlinops(Peer(matrix))
    assert operator.shape == (3, 4) and operator.dtype == torch.float64 and operator.device == matrix.device
    for shape in ((4,), (4, 2), (5, 4, 2), (2, 5, 4, 1)):
        vectors = torch.randn(*shape, dtype=torch.float64)
        assert_close(operator @ vectors, matrix @ vectors)
    assert_close(operator.mT.to_dense(), matrix.mT)
    assert_close((2 * operator + DenseLinearOperator(matrix)).to_dense(), 3 * matrix)
    symmetric = from_curvlinops(Peer(matrix @ matrix.mT, self_adjoint=True))
    assert symmetric.mT is symmetric
    top = lanczos(symmetric, 1, generator=torch.Generator().manual_seed(0))
    assert_close(top.eigenvalues, torch.linalg.eigvalsh(matrix @ matrix.mT)[-1:], cond=1e4)


def test_refuses_what_is_no_operator():
    with pytest.raises(TypeError, match="an operator of curvlinops, with an attribute 'dtype'; got <class '.*obj"):
        from_curvlinops(type("obj", (), {"shape": (1, 1)})())
