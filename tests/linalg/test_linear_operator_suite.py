"""linear_operator's own suite for its operators, run on ours, settings that would switch it to CG or Lanczos included.

It runs in float64: log-determinants and quadratic forms are float64 here whatever the operator's dtype.
"""

import unittest

import pytest
import torch
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase
from torch import Tensor

from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator

pytestmark = pytest.mark.filterwarnings("ignore::linear_operator.utils.warnings.NumericalWarning")


class TestLowRankPlusDiag(LinearOperatorTestCase, unittest.TestCase):
    seed = 0
    should_test_sample = True
    should_call_cg = should_call_lanczos = should_call_lanczos_diagonalization = False

    def setUp(self) -> None:
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        super().setUp()

    def test_half(self) -> None:
        with pytest.raises(TypeError, match=r"diag must be float32 or float64, got torch\.float16"):
            self.create_linear_op().half()

    def test_sqrt_inv_matmul(self) -> None:  # no closed form of this structure: refused, not approximated by CG
        with pytest.raises(NotImplementedError, match="use root_inv_decomposition"):
            self.create_linear_op().sqrt_inv_matmul(torch.randn(5, 3))

    test_sqrt_inv_matmul_no_lhs = test_sqrt_inv_matmul

    def create_linear_op(self) -> LowRankPlusDiagLinearOperator:
        diag = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.7])
        return LowRankPlusDiagLinearOperator(torch.randn(5, 2), diag).requires_grad_(True)

    def evaluate_linear_op(self, linear_op: LowRankPlusDiagLinearOperator) -> Tensor:
        root = linear_op.root * linear_op.mix if linear_op.mix.ndim == 0 else linear_op.root @ linear_op.mix
        return (root.double() @ root.double().mT + torch.diag_embed(linear_op.diag.double())).to(linear_op.dtype)


class TestBatchedWithMix(TestLowRankPlusDiag):
    def create_linear_op(self) -> LowRankPlusDiagLinearOperator:
        mix = torch.tensor([[1.0, 0.5, 0.0], [0.3, -1.0, 0.2]])
        return LowRankPlusDiagLinearOperator(torch.randn(3, 5, 2), torch.rand(3, 5) + 0.5, mix).requires_grad_(True)


class TestMultiBatch(TestLowRankPlusDiag):
    def create_linear_op(self) -> LowRankPlusDiagLinearOperator:
        return LowRankPlusDiagLinearOperator(torch.randn(2, 3, 5, 2), torch.rand(2, 3, 5) + 0.5).requires_grad_(True)


del LinearOperatorTestCase  # pytest would collect the abstract case too
