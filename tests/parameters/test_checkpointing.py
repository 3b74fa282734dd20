"""Activation checkpointing: derivatives at given weights are those of the network without it."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lowrank_bdl as lb
from lowrank_bdl.parameters import checkpointing
from lowrank_bdl.surfaces.surface_model import SurfaceModel
from lowrank_bdl.training.low_precision import QuantizedModel
from lowrank_bdl.training.variational import MeanFieldModel

WAYS = ("closure", "nested", "sequential", "wrapped", "densenet")


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())


class Net(nn.Module):
    """A small network that has its body under checkpoints, or not."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.body, self.head = way, body(), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        reentrant = self.way == "reentrant"
        if self.way in ("closure", "reentrant"):
            x = checkpoint(lambda x: self.norm(self.body(x)), x, use_reentrant=reentrant)
        elif self.way == "nested":
            inner = lambda x: checkpoint(self.body, x, use_reentrant=False)  # noqa: E731
            x = checkpoint(lambda x: self.norm(inner(x)), x, use_reentrant=False)
        elif self.way == "sequential":
            x = self.norm(checkpoint_sequential(self.body, 2, x, use_reentrant=False))
        else:
            x = self.norm(self.body(x))
        return self.head(x)


def pair(way: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """A network with checkpoints, the same one without, and data, float64."""
    torch.manual_seed(0)
    if way == "densenet":
        models = pytest.importorskip("torchvision.models.densenet")
        nets = [models.DenseNet(4, (2, 2), 4, 2, num_classes=2, memory_efficient=on).double() for on in (True, False)]
        x = torch.randn(6, 3, 32, 32).double()
    else:
        nets = [Net(way).double(), Net("none").double()]
        x = torch.randn(6, 3).double()
    nets[1].load_state_dict(nets[0].state_dict())
    if way == "wrapped":
        nets[0].body = nn.Sequential(checkpoint_wrapper(nets[0].body))
        nets[1].body = nn.Sequential(nets[1].body)
    return nets[0], nets[1], (x, torch.randint(2, (6,)))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Relative to the norm, which must not be a rounding error itself."""
    assert expected.norm() > 1e-6
    assert (found - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_curvature_at_other_weights(way: str, matrix: str) -> None:
    found = []
    *nets, data = pair(way)
    for net in nets:
        if matrix == "fisher":
            operator = lb.FisherLinearOperator(net, "categorical", data)
        else:
            kind = lb.HessianLinearOperator if matrix == "hessian" else lb.GGNLinearOperator
            operator = kind(net, F.cross_entropy, data)
        operator = operator.at(operator.theta * 1.3)
        vectors = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(1)).double()
        found.append(torch.cat([operator @ vectors, (operator @ vectors[:, 0]).unsqueeze(1)], 1))
    assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("way", WAYS)
def test_functional_model_whose_backward_pass_is_the_callers(way: str) -> None:
    found = []
    *nets, (x, y) = pair(way)
    for net in nets:
        f = lb.FunctionalModel(net)
        thetas = [(f.layout.flatten(net) * s).requires_grad_() for s in (0.7, 1.3)]
        losses = [F.cross_entropy(f(theta, x), y) for theta in thetas]  # both graphs before either backward pass
        (losses[0] * losses[1]).backward()
        found.append(torch.cat([theta.grad for theta in thetas]))
        assert all(p.grad is None for p in net.parameters())
    assert_close(*found)


@pytest.mark.parametrize("way", WAYS[:-1])
def test_second_derivative_of_a_functional_model(way: str) -> None:
    *nets, (x, y) = pair(way)
    found = []
    for net in nets:
        f = lb.FunctionalModel(net)
        theta = (f.layout.flatten(net) * 1.3).requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(f(theta, x), y), theta, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), theta)[0])
    assert_close(*found)


@pytest.mark.parametrize("way", WAYS[:-1])
def test_gradient_of_the_log_joint_and_gradient_covariance_and_laplace(way: str) -> None:
    *nets, data = pair(way)
    joints, covariances, diagonals = [], [], []
    for net in nets:
        layout = lb.ParameterLayout.from_module(net)
        basis = torch.linalg.qr(torch.randn(layout.numel, 2, generator=torch.Generator().manual_seed(2)).double())[0]
        joint = lb.LogJoint(lb.Subspace(layout, layout.flatten(net), basis), net, "categorical", data)
        z = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).double().requires_grad_()
        joints.append(torch.autograd.grad(joint(z).sum(), z)[0])
        collector = lb.GradientCovariance(net, F.cross_entropy)
        for _ in range(2):
            collector.update(data)
        covariances.append(collector.mean)
        laplace = lb.DiagonalLaplace(net, labels="expected")
        layout.assign_(net, layout.flatten(net) * 1.2)  # a model that has moved on since
        laplace.fit([data], progress=False)
        diagonals.append(laplace.fisher_diagonal)
    assert_close(*joints)
    assert_close(*covariances)
    assert_close(*diagonals)


@pytest.mark.parametrize("way", WAYS[:-1])
@pytest.mark.parametrize("kind", ["surface", "mean field", "quantized"])
def test_networks_that_train_other_tensors(way: str, kind: str) -> None:
    *nets, (x, y) = pair(way)
    found = []
    for net in nets:
        layout = lb.ParameterLayout.from_module(net)
        start = layout.flatten(net)
        generator = torch.Generator().manual_seed(3)
        if kind == "surface":
            trained: nn.Module = SurfaceModel(net, lb.BezierCurve.between(start * 1.4, start * 0.8), generator)
        elif kind == "mean field":
            trained = MeanFieldModel(net, init_std=0.3, generator=generator)
        else:
            trained = QuantizedModel(net, 3)
        for _ in range(2):
            F.cross_entropy(trained(x), y).backward()
        found.append(torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None]))
    assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_hugging_face_gradient_checkpointing() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )
    net = transformers.GPT2LMHeadModel(config).double().train()
    ids = torch.randint(11, (3, 8))
    theta = lb.ParameterLayout.from_module(net).flatten(net) * 1.5
    f = lb.FunctionalModel(net, call_fn=lambda model, batch: model(batch, use_cache=False).logits)

    def gradient() -> Tensor:
        leaf = theta.clone().requires_grad_()
        F.cross_entropy(f(leaf, ids).flatten(0, 1), ids.flatten()).backward()
        return leaf.grad

    expected = gradient()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(gradient(), expected)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(lb.LowRankBDLError, match="use_reentrant=False"):
        gradient()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_are_refused_before_a_gradient_is_lost() -> None:
    net, plain, (x, y) = pair("reentrant")
    x = x.requires_grad_()
    with pytest.raises(lb.LowRankBDLError, match="need checkpoints with use_reentrant=False"):
        lb.HessianLinearOperator(net, F.cross_entropy, (x.detach(), y))
    theta = lb.ParameterLayout.from_module(net).flatten(net)
    curve = lb.BezierCurve.between(theta, theta * 2)
    for trained in (SurfaceModel(net, curve), MeanFieldModel(net, init_std=0.1)):
        with pytest.raises(lb.LowRankBDLError, match="need checkpoints with use_reentrant=False"):
            trained(x)
    assert all(p.grad is None for p in net.parameters()) and x.grad is None
    means = [lb.predict(each, theta, [x], progress=False).mean for each in (net, plain)]
    assert torch.equal(*means)


def test_gradient_of_the_inputs_through_a_reentrant_checkpoint_is_that_at_the_given_weights() -> None:
    *nets, (x, y) = pair("reentrant")
    found = []
    for net in nets:
        f, leaf = lb.FunctionalModel(net), x.clone().requires_grad_()
        F.cross_entropy(f(f.layout.flatten(net) * 1.3, leaf), y).backward()
        found.append(leaf.grad)
    assert_close(*found)


def test_torch_is_left_as_it_was() -> None:
    net, _, (x, y) = pair("closure")
    names = ("_CheckpointFrame", "_checkpoint_hook", "CheckpointFunction")
    before = [getattr(torch_checkpoint, name) for name in names]
    f = lb.FunctionalModel(net)
    theta = f.layout.flatten(net).requires_grad_()
    F.cross_entropy(f(theta, x), y).backward()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        f(theta, x[:, :2])
    assert [getattr(torch_checkpoint, name) for name in names] == before
    assert checkpointing._count == 0 and checkpointing._running.rerun is None


def test_a_network_in_another_thread_keeps_its_own_checkpoints() -> None:
    net, plain, (x, y) = pair("closure")
    inside, done = threading.Event(), threading.Event()
    gradients: list[Tensor] = []

    def own_training_step() -> None:
        inside.wait(10)
        F.cross_entropy(net(x), y).backward()
        gradients.append(net.body[0].weight.grad.clone())
        done.set()

    other = Net("closure").double()
    thread = threading.Thread(target=own_training_step)
    thread.start()

    def call(model: nn.Module, batch: Tensor) -> Tensor:
        inside.set()
        done.wait(10)
        return model(batch)

    f = lb.FunctionalModel(other, call_fn=call)
    theta = torch.zeros(f.layout.numel).double().requires_grad_()
    f(theta, x).sum().backward()
    thread.join()
    F.cross_entropy(plain(x), y).backward()
    assert_close(gradients[0], plain.body[0].weight.grad)
