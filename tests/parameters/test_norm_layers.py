"""Which layers' statistics are computed anew, which stay on purpose, and which are named as they would be wrong."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from lowrank_bdl.parameters.norm_layers import other_layers, tracking_layers


class Norm(nn.Module):
    """A batch norm of one's own, with running statistics."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / self.running_var.sqrt()


class FrozenNorm(Norm):
    """Its statistics were never those of a batch."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    net = nn.Sequential(body, nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for layer in (body[1], net[2]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return net


def problem() -> tuple[nn.Sequential, Tensor, list[tuple[Tensor, Tensor]]]:
    net = network()
    layout = lb.ParameterLayout.from_module(net)
    thetas = layout.flatten(net) * torch.tensor([[0.7], [1.5]])
    return net, thetas, [(torch.randn(9, 3), torch.arange(9) % 2) for _ in range(2)]


def predict(net: nn.Module, thetas: Tensor, loader: object, **options: object) -> lb.Predictive:
    return lb.predict(net, thetas, loader, progress=False, keep_samples=True, **options)  # type: ignore[arg-type]


def test_statistics_of_other_weights_are_said_once_with_the_argument_that_mends_it() -> None:
    net, thetas, loader = problem()
    with pytest.warns(UserWarning, match=r"\('0\.1', '2'\) that were not computed for .*: .*bn_loader=") as said:
        predict(net, thetas, loader)
    assert len(said) == 1 and said[0].filename == __file__
    with pytest.warns(UserWarning, match=r"\('2'\)"):
        predict(net, thetas, loader, bn_exclude="0")


def test_nothing_is_said_where_the_statistics_are_right_or_meant() -> None:
    net, thetas, loader = problem()
    stored = predict(net, thetas, loader, bn_loader="stored")
    predict(net, thetas, loader, bn_loader=loader)
    predict(net, lb.ParameterLayout.from_module(net).flatten(net), loader)  # the model's own weights
    predict(net, thetas, loader, bn_exclude=["0.*", "2"])
    head = lb.ParameterLayout.from_module(net, include="4")
    predict(net, torch.randn(3, head.numel), loader, layout=head)  # nothing before a batch norm moves
    predict(nn.Linear(3, 2), torch.randn(2, 8), loader)
    norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4))
    predict(norm, torch.randn(2, 16 + 8 + 8), loader)
    other = copy.deepcopy(net)
    lb.ParameterLayout.from_module(net).assign_(other, thetas[1])
    torch.testing.assert_close(stored.sample_means[1], torch.cat([other(x) for x, _ in loader]).softmax(-1))
    with pytest.raises(ValueError, match="bn_loader must be batches, 'stored' or None; got 'none'"):
        predict(net, thetas, loader, bn_loader="none")


def test_a_frozen_backbone_keeps_its_statistics_and_normalises_by_them() -> None:
    net, thetas, loader = problem()
    state = copy.deepcopy(net.state_dict())
    for exclude in ("0", "re:^0", ["0.1"], lambda name, layer: name == "0.1" and isinstance(layer, nn.BatchNorm1d)):
        found = lb.recalibrate_batch_norm(net, thetas, loader, bn_exclude=exclude)
        assert list(found) == ["2.running_mean", "2.running_var", "2.num_batches_tracked"]
        for row, theta in enumerate(thetas):
            other = copy.deepcopy(net)
            lb.ParameterLayout.from_module(net).assign_(other, theta)
            with torch.no_grad():
                inputs = torch.cat([other[1](other[0](x)) for x, _ in loader])  # by the stored statistics
            torch.testing.assert_close(found["2.running_mean"][row], inputs.mean(0))
            torch.testing.assert_close(found["2.running_var"][row], inputs.var(0))
            lb.recalibrate_batch_norm_(other, loader, bn_exclude=exclude)
            assert torch.equal(other[0][1].running_mean, state["0.1.running_mean"])
            torch.testing.assert_close(other[2].running_var, found["2.running_var"][row])
    assert lb.recalibrate_batch_norm(net, thetas, [], bn_exclude=["0", "2"]) == {}
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    with_head = predict(net, thetas, loader, bn_loader=loader, bn_exclude="0")
    assert not torch.allclose(with_head.mean, predict(net, thetas, loader, bn_loader=loader).mean)
    with pytest.raises(lb.ShapeError, match=r"bn_exclude pattern 'backbone' must match a layer .*; got '0\.1', '2'"):
        lb.recalibrate_batch_norm(net, thetas, loader, bn_exclude=["0", "backbone"])


@pytest.mark.parametrize("layer", [Norm(4), nn.InstanceNorm1d(4, track_running_stats=True)])
def test_layers_that_are_not_recomputed_are_named(layer: nn.Module) -> None:
    net, thetas, loader = problem()
    net.insert(4, nn.Sequential(layer))
    inputs = loader
    if not isinstance(layer, Norm):
        net[4] = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Upsample(3), layer, nn.AvgPool1d(3), nn.Flatten())
    name = "4.0" if isinstance(layer, Norm) else "4.2"
    kind = type(layer).__name__
    for call in (
        lambda **options: lb.recalibrate_batch_norm(net, thetas, inputs, **options),
        lambda **options: lb.recalibrate_batch_norm_(net, inputs, **options),
        lambda **options: predict(net, thetas, inputs, bn_loader=inputs, **options),
    ):
        with pytest.warns(UserWarning, match=rf"'{name}' \({kind}\) keep .* that are not recomputed") as said:
            call()
        assert len(said) == 1 and said[0].filename == __file__
        call(bn_exclude=name)
    with pytest.warns(UserWarning, match=rf"'{name}'"):
        predict(net, thetas, inputs)
    alone = nn.Sequential(nn.Linear(3, 4), layer) if isinstance(layer, Norm) else None
    if alone is not None:
        with pytest.warns(UserWarning, match=r"'1' \(Norm\)"):
            assert lb.recalibrate_batch_norm(alone, torch.randn(2, 16), inputs) == {}


def test_which_layers_count() -> None:
    net = nn.Sequential(
        nn.BatchNorm1d(2),
        nn.SyncBatchNorm(2),
        nn.BatchNorm1d(2, track_running_stats=False),
        FrozenNorm(2),
        Norm(2),
        nn.InstanceNorm2d(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
        nn.GroupNorm(1, 2),
    )
    assert list(tracking_layers(net)) == ["0", "1"] and list(other_layers(net)) == ["4", "6"]
    wrapped = nn.DataParallel(net)
    assert list(tracking_layers(wrapped, "1")) == ["0"] and list(other_layers(wrapped, ["4"])) == ["6"]


def test_a_warning_is_no_error_by_itself() -> None:
    net, thetas, loader = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = predict(net, thetas, loader)
    assert torch.equal(found.mean, predict(net, thetas, loader, bn_loader="stored").mean)
