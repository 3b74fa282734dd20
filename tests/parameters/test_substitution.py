"""No evaluation changes its arguments or the model, and the network sees the weights that it is given."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import lowrank_bdl as lb
from lowrank_bdl.parameters.substitution import Substitution
from lowrank_bdl.parameters.witness import WeightWitness
from lowrank_bdl.surfaces.surface_model import SurfaceModel


class Clamped(nn.Linear):
    """Keeps its weights within bounds by writing into them."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.5, 0.5)
        return super().forward(x)


class Doubling(nn.Linear):
    """Grows whenever it is called."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch.mul(self.weight[:1], 2, out=self.weight[:1])
            self.bias.view(-1).add_(1)
        return super().forward(x)


def writers() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(6, (8, 4))
    embedding = nn.Sequential(nn.Embedding(6, 3, max_norm=1.0), nn.Flatten(), nn.Linear(12, 2))
    bag = nn.Sequential(nn.EmbeddingBag(6, 3, max_norm=0.5, norm_type=1.0), nn.Linear(3, 2))
    clamped = nn.Sequential(Clamped(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return {
        "embedding": (embedding, ids),
        "bag": (bag, ids),
        "clamped": (clamped, torch.randn(8, 3)),
        "doubling": (nn.Sequential(nn.Linear(3, 5), Doubling(5, 2)), torch.randn(8, 3)),
    }


NAMES = ("embedding", "bag", "clamped", "doubling")


@pytest.mark.parametrize("name", NAMES)
def test_predict_changes_neither_weights_nor_model_and_starts_from_the_given_weights(name: str) -> None:
    net, x = writers()[name]
    layout = lb.ParameterLayout.from_module(net)
    # the first one is within all bounds: a forward pass writes into it, and leaves it as it is
    thetas = torch.stack([scale * torch.randn(layout.numel) for scale in (1e-3, 3.0, 5.0)])
    state, before = copy.deepcopy(net.state_dict()), thetas.clone()
    found = lb.predict(net, thetas, [x, x], progress=False, keep_samples=True)
    assert torch.equal(thetas, before)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    for theta, means in zip(thetas, found.sample_means, strict=True):
        other = copy.deepcopy(net).eval()
        layout.assign_(other, theta)
        expected = other(x).softmax(-1)
        torch.testing.assert_close(means, torch.cat([expected, expected]))


@pytest.mark.parametrize("name", NAMES)
def test_posteriors_and_ensembles_keep_their_weights(name: str) -> None:
    net, x = writers()[name]
    swag = lb.SWAG(net, rank=2)
    for _ in range(3):
        for parameter in net.parameters():
            parameter.data.normal_(0, 3)
        swag.update_parameters(net)
    posterior = swag.posterior()
    mean = posterior.mean.clone()
    lb.predict(net, posterior.mean, [x], progress=False)
    assert torch.equal(posterior.mean, mean)
    ensemble = lb.EmpiricalPosterior(torch.stack([mean, -mean]), posterior.layout)
    lb.predict(net, ensemble, [x], progress=False)
    assert torch.equal(ensemble.members(), torch.stack([mean, -mean]))


@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_the_layout_leaves_out_is_not_written_into(name: str) -> None:
    net, x = writers()[name]
    for parameter in net.parameters():
        parameter.data.normal_(0, 3)
    state = copy.deepcopy(net.state_dict())
    layout = lb.ParameterLayout.from_module(net, include=list(dict(net.named_parameters()))[-1])
    f = lb.FunctionalModel(net, layout)
    outputs = [f(torch.zeros(layout.numel), x) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["embedding", "clamped", "doubling"])  # torch differentiates EmbeddingBag once only
@pytest.mark.parametrize("kind", [lb.GGNLinearOperator, lb.HessianLinearOperator])
def test_curvature_is_the_same_one_way_and_the_other_and_changes_nothing(name: str, kind: type) -> None:
    net, x = writers()[name]
    for parameter in net.parameters():
        parameter.data.normal_(0, 2)
    state = copy.deepcopy(net.state_dict())
    operator = kind(net.double(), F.cross_entropy, (x.double() if x.is_floating_point() else x, torch.arange(8) % 2))
    theta = operator.theta.clone()
    dense = operator.to_dense()
    vector = torch.randn(len(theta)).double()
    torch.testing.assert_close(operator @ vector, dense @ vector)
    torch.testing.assert_close(dense, dense.mT)
    assert dense.norm() > 1e-6
    assert torch.equal(operator.theta, theta)
    assert all(torch.equal(value.float(), state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_log_joint_points_and_curves_keep_their_weights(name: str) -> None:
    net, x = writers()[name]
    layout = lb.ParameterLayout.from_module(net)
    origin, y = 3 * torch.randn(layout.numel), torch.arange(8) % 2
    subspace = lb.Subspace(layout, origin.clone(), torch.eye(layout.numel)[:, :2].clone())
    joint = lb.LogJoint(subspace, net, "categorical", [(x[:4], y[:4]), (x[4:], y[4:])])
    halves = [lb.LogJoint(subspace, net, "categorical", (x[part], y[part])) for part in (slice(4), slice(4, 8))]
    z = torch.zeros(2, 2)
    # the second batch starts from the given weights too
    torch.testing.assert_close(joint.log_likelihood(z), sum(half.log_likelihood(z) for half in halves))
    assert torch.equal(subspace.origin, origin)
    curve = lb.BezierCurve.between(origin.clone(), origin + 1)
    on_curve = SurfaceModel(net, curve)
    with on_curve.at(curve(0.0).detach()), torch.no_grad():
        first = on_curve(x)
        assert torch.equal(on_curve(x), first)
    given = origin.clone()
    with on_curve.at(given), torch.no_grad():
        on_curve(x), on_curve(x)
    assert torch.equal(given, origin)


def test_several_weight_vectors_at_once_start_from_the_given_ones() -> None:
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(0.5)
            return super().forward(x)

    net, x = nn.Sequential(Halved(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(8, 3)
    f = lb.FunctionalModel(net)
    thetas = 3 * torch.randn(3, f.layout.numel)
    before = thetas.clone()
    expected = torch.stack([lb.FunctionalModel(net)(theta, x) for theta in thetas])
    for _ in range(3):
        torch.testing.assert_close(torch.vmap(lambda theta: f(theta, x))(thetas), expected)
    assert torch.equal(thetas, before)


def test_no_copy_is_made_where_nothing_is_written() -> None:
    net = nn.Sequential(nn.Embedding(6, 3, max_norm=1.0), nn.Flatten(), nn.Linear(12, 2))
    f = lb.FunctionalModel(net, call_fn=lambda model, x: (model(x), [p.data_ptr() for p in model.parameters()])[1])
    theta = torch.randn(f.layout.numel)
    own = [part.data_ptr() for part in f.named(theta).values()]
    with torch.no_grad():
        seen = [f(theta, torch.randint(6, (2, 4))) for _ in range(3)]
    assert all(pointer not in seen[0] for pointer in own)
    assert own[0] not in seen[1] and seen[1][1:] == own[1:] and seen[2][1:] == own[1:]


class PutsBack(nn.Module):
    """Computes with the weights that it has kept since it was made, as a sharded module does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.kept = [self.inner.weight, self.inner.bias]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.kept)


def test_a_network_that_uses_its_own_weights_in_place_of_the_given_ones_is_refused() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    for call in (
        lambda net, theta: lb.predict(net, theta, [x], progress=False),
        lambda net, theta: lb.FunctionalModel(net)(theta, x),
        lambda net, theta: lb.HessianLinearOperator(net, F.cross_entropy, (x, y)),
        lambda net, theta: SurfaceModel(net, lb.BezierCurve.between(theta, 2 * theta))(x),
    ):
        with pytest.raises(lb.LowRankBDLError, match=r"it used its own 'inner\.(weight|bias)' in their place"):
            call(PutsBack(), torch.ones(8))
    hooked = nn.Linear(3, 2)
    kept = hooked.weight
    hooked.register_forward_pre_hook(lambda module, args: module._parameters.__setitem__("weight", kept))
    with pytest.raises(lb.LowRankBDLError, match="it used its own 'weight' in their place"):
        lb.predict(hooked, torch.zeros(8), [x], progress=False)


def test_a_network_that_uses_none_of_the_given_weights_is_refused() -> None:
    class Cached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "kept"):
                self.kept = self.weight.detach().clone(), self.bias.detach().clone()
            return F.linear(x, *self.kept)

    net, x = Cached(3, 2), torch.randn(4, 3)
    net(x)
    with pytest.raises(lb.LowRankBDLError, match="it used none of them"):
        lb.predict(net, torch.randn(2, 8), [x], progress=False)


def test_a_compiled_network_is_watched_too() -> None:
    torch._dynamo.reset()
    writes = torch.compile(nn.Sequential(Clamped(3, 5), nn.Tanh(), nn.Linear(5, 2)), backend="eager")
    x = torch.randn(8, 3)
    writes(x)  # compiled by now
    theta = 3 * torch.randn(lb.ParameterLayout.from_module(writes).numel)
    before = theta.clone()
    f = lb.FunctionalModel(writes)
    with torch.no_grad():
        first = f(theta, x)
        torch.testing.assert_close(f(theta, x), first)
    assert torch.equal(theta, before)
    back = torch.compile(PutsBack(), backend="eager")
    back(x)
    with pytest.raises(lb.LowRankBDLError, match=r"it used its own 'inner\.(weight|bias)'"):
        lb.predict(back, torch.ones(8), [x], progress=False)


def test_a_parametrization_whose_values_are_kept_is_refused() -> None:
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    theta, x = torch.randn(10), torch.randn(4, 3)
    expected = lb.FunctionalModel(net)(theta, x)
    with parametrize.cached():
        net(x)
        with pytest.raises(lb.LowRankBDLError, match=r"inside torch's parametrize\.cached\(\)"):
            lb.FunctionalModel(net)(theta, x)
    assert torch.equal(lb.FunctionalModel(net)(theta, x), expected)


def test_reading_shapes_and_views_of_own_weights_is_no_use_of_them() -> None:
    net = nn.Linear(3, 2)
    kept = net.weight

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).view(-1, kept.view(-1).shape[0] // 3)

    assert lb.FunctionalModel(net, call_fn=call)(torch.ones(8), torch.ones(4, 3)).tolist() == [[4.0, 4.0]] * 4


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_recurrent_layers_and_tied_weights_pass(make: type) -> None:
    net = make(3, 3, 2)
    f = lb.FunctionalModel(net, call_fn=lambda model, x: model(x)[0])
    x = torch.randn(5, 2, 3)
    zero = torch.zeros(f.layout.numel)
    assert f(zero, x).abs().max() == 0 and f(zero + 1, x).abs().min() > 0


def test_a_run_is_watched_once_for_each_mode() -> None:
    net, x = writers()["clamped"]
    run = Substitution(net)
    given = {name: torch.full_like(p, 9.0) for name, p in net.named_parameters()}
    for mode in (True, False, True):
        net.train(mode)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                run(given, lambda: net(x))
    assert all((tensor == 9).all() for tensor in given.values())
    assert pickle.loads(pickle.dumps(run))._written == run._written
    assert copy.deepcopy(run).module is not net


def test_witness_tells_writes_by_memory() -> None:
    base = torch.zeros(10)
    given = {"a": base[:4], "b": base[4:6].view(2, 1), "c": torch.zeros(3), "empty": torch.zeros(0)}
    own = {"a": torch.ones(4), "c": torch.ones(3)}
    with WeightWitness(given, own) as witness:
        given["b"].detach().T[0].zero_()
        torch.add(base[6:], 1, out=base[6:])  # next to all of them
        torch._foreach_mul_([given["c"]], 1.0)
        own["c"].sum()
        own["a"].view(2, 2)
    assert witness.written == {"b", "c"} and witness.own_used == ["c"]
