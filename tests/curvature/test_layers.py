"""What a layer sees of each example, and that recording changes nothing."""

import pytest
import torch
from torch import nn

from lowrank_bdl.curvature.layers import Layer, find_layers, layer_gradients, layer_inputs, recorded
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.curvature.cases import NETS, build
from tests.oracles import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # of torch's own
CONVS = [name for name in NETS if name.startswith("conv")]


def of(module):
    return Layer("", module, "weight", None if module.bias is None else "bias")


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_multiplies_each_position(name):
    """The weight as a matrix times the inputs is the output; every stride, padding, dilation and group."""
    net, x, _ = build(name)
    conv = net[0]
    layer = of(conv)
    inputs = layer_inputs(layer, x)
    matrix = conv.weight.detach().flatten(1).unflatten(0, (conv.groups, -1))
    bias = 0 if conv.bias is None else conv.bias.detach()[:, None, None]
    product = (matrix @ inputs).flatten(1, 2)
    assert_close(product, (conv(x).detach() - bias).flatten(2))
    assert torch.equal(layer_gradients(layer, conv(x)).flatten(1, 2), conv(x).detach().flatten(2))


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3), (5, 2, 4, 3)], ids=str)
def test_a_fully_connected_layer_multiplies_each_position(shape):
    linear = nn.Linear(3, 2).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = linear.weight.detach() @ layer_inputs(of(linear), x)[:, 0] + linear.bias.detach()[:, None]
    assert_close(product.mT.reshape(*shape[:-1], 2), linear(x).detach())
    assert_close(layer_gradients(of(linear), linear(x))[:, 0], product)


def test_narrow_inputs_are_widened():
    linear = nn.Linear(3, 2)
    assert layer_inputs(of(linear), torch.ones(4, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert layer_gradients(of(linear), torch.ones(4, 2, dtype=torch.float16)).dtype == torch.float32


def test_which_layers_are_found():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.ModuleDict(
        {
            "plain": nn.Linear(2, 2),
            "own": Own(2, 2),
            "frozen": nn.Linear(2, 2, bias=False).requires_grad_(False),
            "tied": nn.Linear(2, 2),
            "twin": nn.Linear(2, 2),
            "conv": nn.Conv2d(1, 1, 1),
            "conv1d": nn.Conv1d(1, 1, 1),
            "norm": nn.BatchNorm2d(2, affine=True),
            "bare": nn.BatchNorm1d(2, affine=False),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        }
    )
    net["twin"].weight = net["tied"].weight
    found = {layer.name: layer.parameters for layer in find_layers(net, ParameterLayout.from_module(net))}
    assert found == {
        "plain": ("plain.weight", "plain.bias"),
        "tied": ("tied.bias",),
        "twin": ("twin.bias",),
        "conv": ("conv.weight", "conv.bias"),
        "norm": ("norm.weight", "norm.bias"),
        "parametrized": ("parametrized.bias",),
    }


def test_batch_norm_without_running_statistics_is_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ShapeError, match=r"Batch-norm layer '1' keeps no running statistics.*track_running_stats=True"):
        find_layers(net, ParameterLayout.from_module(net))


def test_recording_keeps_what_the_layer_gave():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    layers = {layer.name: layer for layer in find_layers(net, ParameterLayout.from_module(net))}
    with recorded(layers) as calls:
        output = net(x)
    assert torch.equal(output, net(x))
    (call,) = calls["0"]
    assert torch.equal(call.output, net[0](x)) and bool((call.output < 0).any())
    assert not net[0]._forward_hooks and len(calls["0"]) == 1  # the later calls were not recorded


def test_hooks_are_removed_after_an_error():
    net = nn.Linear(3, 4)
    with pytest.raises(RuntimeError, match="stop"), recorded({"": of(net)}):
        raise RuntimeError("stop")
    assert not net._forward_hooks


def test_an_overwritten_input_is_noticed():
    net = nn.Linear(3, 4)
    x = torch.ones(2, 3)
    with recorded({"": of(net)}) as calls:
        net(x)
    calls[""][0].check(of(net))
    x.add_(1)
    with pytest.raises(ShapeError, match="The input of layer '' must not be changed in place after the layer used it"):
        calls[""][0].check(of(net))
