"""The Hessian against a dense float64 one by forward-over-reverse differentiation: every entry, every eigenvalue."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lowrank_bdl.curvature.hessian import HessianLinearOperator
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.lanczos import lanczos
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.subspaces.log_joint import LogJoint
from lowrank_bdl.subspaces.subspace import Subspace
from tests.curvature.cases import NETS, batches, build
from tests.curvature.dense import build_large, dense_hessian
from tests.oracles import assert_close


def sum_loss(outputs, targets):
    return cross_entropy(outputs, targets, reduction="sum")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [name for name in NETS if name != "weight norm"])
def test_every_kind_of_layer_in_ragged_batches(name):
    net, x, y = build(name)
    data = batches(x, y)
    expected = dense_hessian(net, data)
    mean = HessianLinearOperator(net, cross_entropy, data)
    assert_close(mean.to_dense(), expected, cond=10)
    total = HessianLinearOperator(net, sum_loss, data, reduction="sum", check=False, chunk_size=4)
    assert_close(total.to_dense(), expected, cond=10)
    assert (mean.num_data, mean.dtype, mean.shape) == (7, torch.float64, torch.Size(expected.shape))


@pytest.mark.parametrize("name, bn_mode", [("mlp", "eval"), ("tied", "eval"), ("conv", "eval"), ("conv", "train")])
def test_every_eigenvalue_of_networks_of_500_to_800_weights(name, bn_mode):
    net, data = build_large(name)
    hessian = HessianLinearOperator(net, cross_entropy, data, bn_mode=bn_mode)
    assert 500 <= hessian.shape[0] <= 800
    expected = dense_hessian(net, data, bn_mode=bn_mode)
    found = hessian.to_dense()
    assert_close(found, expected, cond=100)
    values = torch.linalg.eigvalsh(expected)
    assert values[0] < -1e-3 * values[-1], "the problem must be indefinite"
    assert (torch.linalg.eigvalsh(found) - values).abs().max() <= 1e-10 * values.abs().max()
    pairs = lanczos(hessian, (3, 2), generator=torch.Generator().manual_seed(0), tol=1e-7)
    assert bool(pairs.converged.all())
    ends = torch.cat([values[-3:].flip(0), values[:2].flip(0)])
    assert (pairs.eigenvalues - ends).abs().max() <= 1e-6 * values.abs().max()


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
def test_batch_norm_by_batch_is_another_matrix_and_neither_touches_the_model(bn_mode):
    net, data = build_large("residual")
    net.conv2.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    hessian = HessianLinearOperator(net, cross_entropy, data, bn_mode=bn_mode)
    assert_close(hessian.to_dense(), dense_hessian(net, data, bn_mode=bn_mode), cond=100)
    other = dense_hessian(net, data, bn_mode="train" if bn_mode == "eval" else "eval")
    assert (hessian.to_dense() - other).norm() > 0.1 * other.norm()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "selection", [{"include": "head"}, {"exclude": ["*.bias", "bn"]}, {"include": "conv1"}, {"include": "bn.*"}]
)
def test_a_part_of_the_parameters(selection):
    net, data = build_large("residual")
    layout = ParameterLayout.from_module(net, **selection)
    expected = dense_hessian(net, data, layout=layout)
    assert_close(HessianLinearOperator(net, cross_entropy, data, **selection).to_dense(), expected, cond=10)
    whole = dense_hessian(net, data)
    rows = ParameterLayout.from_module(net).subset(layout.names)[1]
    assert_close(
        HessianLinearOperator(net, cross_entropy, data, layout=layout).to_dense(), whole[rows][:, rows], cond=10
    )


def test_frozen_parameters_are_left_out_and_may_be_put_in_by_a_layout():
    net, data = build_large("residual")
    everything = ParameterLayout.from_module(net)
    net.conv1.requires_grad_(False)
    hessian = HessianLinearOperator(net, cross_entropy, data)
    assert hessian.layout.names == everything.names[1:]
    assert_close(hessian.to_dense(), dense_hessian(net, data), cond=10)
    whole = HessianLinearOperator(net, cross_entropy, data, layout=everything)
    assert_close(whole.to_dense(), dense_hessian(net, data, layout=everything), cond=10)
    assert not net.conv1.weight.requires_grad


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("make", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_of_which_torch_gives_another_second_derivative(make, dim):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = nn.Sequential(make(nn.Linear(3, 4), dim=dim), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(3, (7,))
    layout = ParameterLayout.from_module(net)
    theta = layout.flatten(net)

    def slope(at):
        own = at.clone().requires_grad_()
        loss = cross_entropy(torch.func.functional_call(net, dict(layout.unflatten(own)), (x,)), y)
        return torch.autograd.grad(loss, own)[0]  # torch's first derivative is right

    steps = 1e-4 * torch.eye(len(theta)).double()
    near, far = (torch.stack([slope(theta + h * s) - slope(theta - h * s) for s in steps]) for h in (1, 2))
    expected = (8 * near - far) / 12e-4  # to fourth order
    assert (HessianLinearOperator(net, cross_entropy, (x, y)).to_dense() - expected).norm() < 1e-9 * expected.norm()
    subspace = Subspace(layout, theta, torch.eye(len(theta)).double())
    joint = LogJoint(subspace, net, "categorical", [(x, y)])
    found = torch.autograd.functional.hessian(joint.log_likelihood, torch.zeros_like(theta))
    assert (found + 7 * expected).norm() < 1e-9 * 7 * expected.norm()


def test_single_precision():
    net, data = build_large("residual", dtype=torch.float32)
    found = HessianLinearOperator(net, cross_entropy, data).to_dense()
    assert found.dtype == torch.float32
    expected = dense_hessian(net, data)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_half_precision_takes_and_gives_single_precision():
    net, data = build_large("mlp", dtype=torch.bfloat16)
    hessian = HessianLinearOperator(net, cross_entropy, data)
    found = hessian.to_dense()
    assert hessian.dtype == found.dtype == torch.float32
    expected = dense_hessian(net, data)
    assert (found - expected).norm() <= 3e-2 * expected.norm()


def test_a_pair_a_list_and_a_loader_are_the_same_data():
    net, x, y = build("conv", count=10)
    dataset = TensorDataset(x, y)
    expected = dense_hessian(net, [(x, y)])
    for data in ((x, y), [x, y], [(x, y)], batches(x, y, (4, 4, 2)), DataLoader(dataset, batch_size=4)):
        assert_close(HessianLinearOperator(net, cross_entropy, data).to_dense(), expected, cond=10)


def test_a_function_that_calls_the_model():
    net, x, y = build("mlp")
    data = [({"features": part}, labels) for part, labels in batches(x, y)]

    def call_fn(model, batch):
        return model(batch[0]["features"])

    hessian = HessianLinearOperator(net, cross_entropy, data, call_fn=call_fn)
    assert_close(hessian.to_dense(), dense_hessian(net, batches(x, y)), cond=10)


def test_a_linear_function_of_the_weights_has_no_curvature():
    net = nn.Linear(3, 2)
    data = (torch.randn(4, 3), torch.randn(4, 2))
    hessian = HessianLinearOperator(net, lambda outputs, targets: (outputs * targets).mean(), data)
    assert not hessian.to_dense().any()
    partly = HessianLinearOperator(net, lambda f, y: (f * y).mean() + net.bias.sum() * 0, data, include="bias")
    assert not partly.to_dense().any()


def test_a_parameter_that_is_not_used_has_none_either():
    net = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    data = (torch.randn(4, 2), torch.randn(4, 1))
    hessian = HessianLinearOperator(net, mse_loss, data, call_fn=lambda model, batch: model["used"](batch[0]))
    dense = hessian.to_dense()
    assert dense[:3, :3].any() and not dense[3:].any() and not dense[:, 3:].any()


def test_refuses_a_loss_that_is_no_scalar_or_does_not_depend_on_the_weights():
    net, x, y = build("mlp")
    with pytest.raises(ShapeError, match=r"must return a scalar tensor, the mean over the batch; got shape \(7,\)"):
        HessianLinearOperator(net, lambda f, t: cross_entropy(f, t, reduction="none"), (x, y))
    with pytest.raises(ShapeError, match="must depend on the 3 parameters given; it does not"):
        HessianLinearOperator(net, lambda f, t: f.detach().mean(), (x, y))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum; got 'none'"):
        HessianLinearOperator(net, cross_entropy, (x, y), reduction="none")
    with pytest.raises(ValueError, match="bn_mode must be one of eval, train; got 'off'"):
        HessianLinearOperator(net, cross_entropy, (x, y), bn_mode="off")
