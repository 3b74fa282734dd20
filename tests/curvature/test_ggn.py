"""The generalised Gauss-Newton matrix against J' M J with a dense Jacobian and a dense Hessian in the outputs."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, smooth_l1_loss

from lowrank_bdl.curvature.ggn import GGNLinearOperator
from lowrank_bdl.curvature.hessian import HessianLinearOperator
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.curvature.cases import NETS, batches, build, categorical_hessians, jacobians, outputs_of
from tests.curvature.dense import build_large, dense_ggn
from tests.oracles import assert_close


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_layer_in_ragged_batches(name):
    net, x, y = build(name)
    jacobian, middle = jacobians(net, x), categorical_hessians(outputs_of(net, x))
    expected = (jacobian.mT @ middle @ jacobian).mean(0)
    together = GGNLinearOperator(net, cross_entropy, batches(x, y))
    assert_close(together.to_dense(), expected, cond=10)
    one_by_one = GGNLinearOperator(net, cross_entropy, batches(x, y), chunk_size=1)
    assert_close(one_by_one.to_dense(), expected, cond=10)
    assert one_by_one._forward_mode


@pytest.mark.parametrize("name, bn_mode", [("mlp", "eval"), ("tied", "eval"), ("conv", "eval"), ("conv", "train")])
def test_every_eigenvalue_of_networks_of_500_to_800_weights(name, bn_mode):
    net, data = build_large(name)
    ggn = GGNLinearOperator(net, cross_entropy, data, bn_mode=bn_mode)
    assert 500 <= ggn.shape[0] <= 800
    expected = dense_ggn(net, data, bn_mode=bn_mode)
    found = ggn.to_dense()
    assert_close(found, expected, cond=100)
    vectors = torch.eye(ggn.shape[0], dtype=torch.float64)[:, ::50]
    assert_close(torch.stack([ggn @ vector for vector in vectors.mT], dim=1), expected[:, ::50], cond=100)
    values = torch.linalg.eigvalsh(found)
    assert (values - torch.linalg.eigvalsh(expected)).abs().max() <= 1e-10 * values.max()
    assert values.min() >= -1e-12 * values.max(), "positive semi-definite"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_fn", [mse_loss, smooth_l1_loss])
def test_other_losses(loss_fn, reduction):
    net, x, _ = build("conv")
    y = 0.3 * torch.randn(7, 3, dtype=torch.float64)
    data = batches(x, y)

    def reduced(outputs, targets):
        return loss_fn(outputs, targets, reduction=reduction)

    expected = dense_ggn(net, data, loss_fn)
    if reduction == "sum":
        expected = 3 * expected  # the mean is also over the outputs
    assert_close(GGNLinearOperator(net, reduced, data, reduction=reduction).to_dense(), expected, cond=10)


def test_a_part_of_the_parameters():
    net, data = build_large("residual")
    layout = ParameterLayout.from_module(net, include=["conv1", "head.bias"])
    found = GGNLinearOperator(net, cross_entropy, data, layout=layout).to_dense()
    assert_close(found, dense_ggn(net, data, layout=layout), cond=10)


def test_a_linear_network_has_no_other_curvature_than_that():
    net, x, y = build("linear")
    data = batches(x, y)
    ggn = GGNLinearOperator(net, cross_entropy, data)
    assert_close(ggn.to_dense(), HessianLinearOperator(net, cross_entropy, data).to_dense())
    assert ggn.to_dense().any()


def test_a_loss_that_is_linear_in_the_outputs_has_none():
    net, x, _ = build("mlp")
    data = (x, torch.randn(7, 3, dtype=torch.float64))
    assert not GGNLinearOperator(net, lambda f, y: (f * y).mean(), data).to_dense().any()


def test_single_precision():
    net, data = build_large("residual", dtype=torch.float32)
    expected = dense_ggn(net, data)
    found = GGNLinearOperator(net, cross_entropy, data).to_dense()
    assert found.dtype == torch.float32 and (found - expected).norm() <= 1e-5 * expected.norm()


def test_refuses_outputs_that_are_no_tensor_and_losses_that_are_not_of_them():
    net, x, y = build("mlp")
    with pytest.raises(ShapeError, match="output must be one floating-point tensor; got tuple"):
        GGNLinearOperator(net, cross_entropy, (x, y), call_fn=lambda model, batch: (model(batch[0]),))
    with pytest.raises(ShapeError, match="output must depend on the 3 parameters given; it does not"):
        GGNLinearOperator(net, cross_entropy, (x, y), call_fn=lambda model, batch: batch[0])
    with pytest.raises(ShapeError, match="loss must depend on the network's output; it does not"):
        GGNLinearOperator(net, lambda f, t: t.double().mean(), (x, y))
    with pytest.raises(ShapeError, match=r"must return a scalar tensor, the sum over the batch; got shape \(7,\)"):
        GGNLinearOperator(net, lambda f, t: cross_entropy(f, t, reduction="none"), (x, y), reduction="sum")
    assert isinstance(net, nn.Module) and net.training
