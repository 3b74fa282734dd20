import copy
from collections import namedtuple

import pytest
import torch
from torch import nn

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.batches import to_device
from lowrank_bdl.parameters.functional import FunctionalModel, StatelessModel, evaluation_mode
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.parameters.cases import MODELS, Tied, build


def snapshot(model):
    return (
        copy.deepcopy(model.state_dict()),
        [module.training for module in model.modules()],
        [id(p) for p in model.parameters()],
    )


def assert_untouched(model, before):
    state, modes, ids = before
    assert [module.training for module in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_a_network_that_holds_the_weights(name, generator):
    model, x = build(name)
    before = snapshot(model)
    layout = ParameterLayout.from_module(model)
    theta = 0.5 * torch.randn(layout.numel, generator=generator)
    other = copy.deepcopy(model)
    layout.assign_(other, theta)
    with torch.no_grad():
        actual = FunctionalModel(model)(theta, x)
        expected = other(x)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, model(x))  # it is a function of theta
    assert_untouched(model, before)


def test_part_of_the_parameters(generator):
    model, x = build("tied")
    layout = ParameterLayout.from_module(model, "decoder")
    theta = torch.randn(layout.numel, generator=generator)
    weight, bias = theta[:9].view(3, 3), theta[9:]
    expected = model.middle(x @ weight.mT) @ weight.mT + bias  # the tied weight is used twice
    torch.testing.assert_close(FunctionalModel(model, layout)(theta, x), expected)


def test_gradients_flow_to_theta(generator):
    model, x = build("tied")
    layout = ParameterLayout.from_module(model)
    theta = layout.flatten(model).requires_grad_()
    FunctionalModel(model)(theta, x).square().sum().backward()
    model(x).square().sum().backward()
    expected = layout.flatten({name: model.get_parameter(name).grad for name in layout.names})
    torch.testing.assert_close(theta.grad, expected)
    assert theta.grad.abs().min() > 0


def test_present_dtype_of_the_model_wins(generator):
    model, x = build("conv")
    f = FunctionalModel(model.double(), ParameterLayout.from_module(build("conv")[0]))
    theta = torch.randn(f.layout.numel, generator=generator)
    assert f(theta, x.double()).dtype == torch.float64


@pytest.mark.parametrize("vmapped", [False, True])
def test_filters_have_their_channels_last_where_the_model_has(generator, vmapped):
    """Every intermediate image of the network is in that order then, although the inputs are not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(18, 2)).double()
    x = torch.randn(5, 3, 6, 6, generator=generator, dtype=torch.float64)
    f = FunctionalModel(model)
    thetas = torch.randn(2, f.layout.numel, generator=generator, dtype=torch.float64)

    def evaluated():
        if vmapped:
            return torch.vmap(lambda theta: f(theta, x))(thetas)
        return torch.stack([f(theta, x) for theta in thetas])

    def gradient():
        return torch.func.grad(lambda theta: f(theta, x).square().sum())(thetas[0])

    expected, expected_gradient = evaluated(), gradient()
    storage = thetas.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == storage for part in f.named(thetas[0]).values())  # views
    model.to(memory_format=torch.channels_last)
    assert f.named(thetas[0])["0.weight"].stride() == model[0].weight.stride() != (27, 9, 3, 1)
    order = []
    if not vmapped:
        model[2].register_forward_hook(
            lambda layer, args, out: order.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    torch.testing.assert_close(evaluated(), expected)
    torch.testing.assert_close(gradient(), expected_gradient)
    assert vmapped or (order and all(order))


def test_writes_into_buffers_are_dropped(generator):
    model, x = build("conv")
    model.train()
    before = snapshot(model)
    f = FunctionalModel(model)
    f(torch.randn(f.layout.numel, generator=generator), x)  # batch norm updates its running statistics here
    assert_untouched(model, before)


def test_buffers_can_be_overridden(generator):
    model, x = build("conv")
    buffers = {"1.running_mean": torch.tensor([1.0, -2.0]), "1.running_var": torch.tensor([4.0, 9.0])}
    given = copy.deepcopy(buffers)
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **buffers})
    f = FunctionalModel(model)
    theta = f.layout.flatten(model)
    assert torch.equal(f(theta, x, buffers), other(x))
    model.train()
    f(theta, x, buffers)
    assert all(torch.equal(buffers[name], given[name]) for name in given)  # the caller's tensors are copied as well
    with pytest.raises(ShapeError, match=r"'1.running_mean' must have shape \(2,\) as in the model; got \(3,\)"):
        f(theta, x, {"1.running_mean": torch.zeros(3)})
    with pytest.raises(ShapeError, match="'2.running_mean' must have shape None"):
        f(theta, x, {"2.running_mean": torch.zeros(2)})


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, left, *, right):
        return {"logits": self.left(left) + self.right(right)}

    def embed(self, left):
        return self.left(left)


def test_call_fn_gets_dictionaries_and_may_call_any_method(generator):
    model = TwoInputs()
    batch = {"left": torch.randn(5, 2, generator=generator), "right": torch.randn(5, 4, generator=generator)}
    f = FunctionalModel(model, call_fn=lambda m, b: m(b["left"], right=b["right"])["logits"])
    theta = torch.randn(f.layout.numel, generator=generator)
    parts = f.layout.unflatten(theta)
    left = batch["left"] @ parts["left.weight"].mT + parts["left.bias"]
    right = batch["right"] @ parts["right.weight"].mT + parts["right.bias"]
    torch.testing.assert_close(f(theta, batch), left + right)
    g = FunctionalModel(model, call_fn=lambda m, b: m.embed(b["left"]))
    torch.testing.assert_close(g(theta, batch), left)


def test_batches_without_call_fn():
    model, x = build("tied")
    f = FunctionalModel(model)
    theta = f.layout.flatten(model)
    expected = model(x)
    for batch in (x, (x,), [x, torch.zeros(5)]):
        assert torch.equal(f(theta, batch), expected)
    with pytest.raises(
        ShapeError, match=r"tensor x, \(x,\), \(x, y\) or a mapping unless call_fn .* got tuple of 3 entries"
    ):
        f(theta, (x, x, x))
    assert torch.equal(f(theta, {"x": x, "labels": None}), expected)
    with pytest.raises(ShapeError, match=r"Tied does not take \['images'\]. Pass call_fn"):
        f(theta, {"images": x})
    with pytest.raises(ShapeError, match="got str"):
        f(theta, "x")


def test_wrong_theta_and_wrong_layout():
    f = FunctionalModel(Tied())
    with pytest.raises(ShapeError, match=r"theta must have shape \(24,\); got \(2, 24\)"):
        f(torch.zeros(2, 24), torch.zeros(5, 3))
    with pytest.raises(ShapeError, match="differ first at parameter 'encoder.weight'"):
        FunctionalModel(nn.Linear(3, 3), f.layout)


def test_a_failing_call_leaves_the_model_as_it_was():
    model, _ = build("conv")
    before = snapshot(model)
    f = FunctionalModel(model)
    with pytest.raises(RuntimeError, match="to have 1 channels"):
        f(torch.zeros(f.layout.numel), torch.zeros(5, 3, 4, 4))
    assert_untouched(model, before)


def test_evaluation_mode_restores_a_mixture_of_modes():
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            raise AssertionError("an overridden train() must not be called")

    model = Stubborn(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].training = False
    modes = [module.training for module in model.modules()]
    assert modes == [True, True, True, False, True]
    with evaluation_mode(model) as same:
        assert same is model
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError, match="division"), evaluation_mode(model):
        raise ZeroDivisionError("division")
    assert [module.training for module in model.modules()] == modes


def test_modules_without_parameters():
    f = StatelessModel(nn.ReLU())
    assert f.device is None
    assert f({}, torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_to_device_keeps_the_structure():
    Pair = namedtuple("Pair", "x y")
    meta, x = torch.device("meta"), torch.zeros(2)
    moved = to_device({"a": [x, "text"], "b": Pair(x, (x, None)), "c": 3}, meta)
    assert moved["a"][0].device == moved["b"].x.device == moved["b"].y[0].device == meta
    assert moved["a"][1] == "text" and moved["b"].y[1] is None and moved["c"] == 3
    assert isinstance(moved["b"], Pair) and isinstance(moved["b"].y, tuple) and isinstance(moved["a"], list)
    assert x.device.type == "cpu"


class Normalising(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x.mul_(2))


@pytest.mark.parametrize("inference", [False, True])
def test_a_network_that_writes_into_its_inputs_sees_the_same_ones_at_every_call(inference):
    model, inputs = Normalising(), torch.arange(6.0).view(2, 3)
    with torch.inference_mode(inference):
        x = inputs.clone()
        network = FunctionalModel(model)
        theta = network.layout.flatten(model)
        for _ in range(3):
            assert torch.equal(network(theta, (x, torch.zeros(2))), model.layer(2 * inputs))
    assert torch.equal(x, inputs)
