"""Networks that others wrote, every curvature and prediction of them against dense float64 matrices.

The oracles use one backward pass a number, by ``torch.autograd`` alone, on copies of the networks in which whatever
torch cannot differentiate twice is written in plain operations.
"""

import contextlib
import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import lowrank_bdl as lb
from tests.oracles import assert_close

CLASSES = 3


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=8, n_layer=1, n_head=2, n_inner=12, num_labels=CLASSES, pad_token_id=0
    )
    net = transformers.GPT2ForSequenceClassification(config)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return Logits(net), lambda n: torch.randint(1, 7, (n, 5)), None


def gpt2_checkpointed():
    """Parts are computed again in the backward pass, after which the plain one's weights must be in place."""
    net, inputs, _ = gpt2()
    plain = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # another name from version 6 on
        net.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return AsInTraining(net), inputs, AsInTraining(plain)


class AsInTraining(nn.Module):
    """Checkpoints in evaluation mode too: transformers leaves them out there."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, x):
        for module in self.net.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        return self.net(x)


def vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=4, patch_size=2,
        num_channels=1, num_labels=CLASSES,
    )  # fmt: skip
    net = transformers.ViTForImageClassification(config)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return Logits(net), lambda n: torch.randn(n, 1, 4, 4, dtype=torch.float64), None


def densenet():
    models = pytest.importorskip("torchvision.models")

    def make(memory_efficient):
        return models.DenseNet(3, (1, 1), 4, 2, num_classes=CLASSES, memory_efficient=memory_efficient)

    net = make(True)
    plain = make(False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    plain.load_state_dict(net.state_dict())
    return net, lambda n: torch.randn(n, 3, 32, 32, dtype=torch.float64), plain


class Logits(nn.Module):
    """The logits of a Hugging Face model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).logits


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.LSTM(2, 4, num_layers=2), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.inner(x)[0][-1])


class Contrastive(nn.Module):
    """Similarities of an image with a text for each class, as CLIP has them, and their scale without an axis."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 4, bias=False), nn.Linear(5, 4, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(5.0)))
        self.register_buffer("prompts", torch.randn(CLASSES, 5))

    def forward(self, x):
        image = nn.functional.normalize(self.image(x), dim=-1)
        text = nn.functional.normalize(self.text(self.prompts), dim=-1)
        return self.logit_scale.exp() * image @ text.mT


class Words(nn.Module):
    def __init__(self, plain=False):
        super().__init__()
        options = {} if plain else {"sparse": True, "max_norm": 1.0, "padding_idx": 0}
        self.plain = plain
        self.words, self.head = nn.Embedding(7, 4, **options), nn.Linear(4, CLASSES)

    def forward(self, x):
        if not self.plain:
            return self.head(self.words(x).tanh().mean(1))
        weight = self.words.weight
        norms = weight.norm(dim=1, keepdim=True)
        # torch renormalises without a gradient: the scale of a row is a constant, and a padding row takes none
        scaled = weight + (weight * ((1 / (norms + 1e-7)).where(norms > 1, 1.0) - 1)).detach()
        rows = torch.where((torch.arange(7) == 0)[:, None], scaled.detach(), scaled)
        return self.head(rows[x].tanh().mean(1))


def lstm():
    return TimeFirst(), lambda n: torch.randn(n, n, 2, dtype=torch.float64), None


def clip():
    return Contrastive(), lambda n: torch.randn(n, 6, dtype=torch.float64), None


def test_the_checkpoints_of_gpt2_are_in_use():
    calls = []
    net, inputs, _ = seeded(gpt2_checkpointed)
    layers = [module for module in net.modules() if getattr(module, "_gradient_checkpointing_func", None)]
    assert layers
    for module in layers:
        function = module._gradient_checkpointing_func
        module._gradient_checkpointing_func = lambda *args, function=function: calls.append(1) or function(*args)
    net(inputs(2))
    assert calls


def words():
    net, plain = Words(), Words(plain=True)
    nn.init.normal_(net.words.weight)
    plain.load_state_dict(net.state_dict())
    return net, lambda n: torch.randint(7, (n, 5)), plain


NETS = {
    "gpt2": gpt2,
    "gpt2 checkpointed": gpt2_checkpointed,
    "vit": vit,
    "densenet": densenet,
    "lstm": lstm,
    "clip": clip,
    "words": words,
}


class Case:
    """A network, its data, and everything about it from dense matrices."""

    def __init__(self, name):
        def make():
            net, inputs, plain = NETS[name]()
            net = net.double()
            plain = copy.deepcopy(net) if plain is None else plain.double()
            data = [(inputs(n), torch.randint(CLASSES, (n,))) for n in (3, 3)]
            return net.train(), plain.eval(), data

        self.net, self.plain, self.data = seeded(make)
        self.layout = lb.ParameterLayout.from_module(self.net)
        self.theta = self.layout.flatten(self.net)
        self.count = sum(len(y) for _, y in self.data)

    def outputs(self, theta, x):
        """The plain network's outputs at weights, and these weights as leaves."""
        leaves = {name: part.clone().requires_grad_() for name, part in self.layout.unflatten(theta.detach()).items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(self.plain, leaves, (x,)), list(leaves.values())

    def rows(self, values, leaves, create_graph=False):
        found = []
        for value in values:
            if not value.requires_grad:
                found.append(torch.zeros(self.layout.numel, dtype=torch.float64))
                continue
            parts = torch.autograd.grad(
                value, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
            found.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(found)

    def hessian(self):
        total = 0
        for x, y in self.data:
            outputs, leaves = self.outputs(self.theta, x)
            gradient = self.rows([cross_entropy(outputs, y, reduction="sum")], leaves, create_graph=True)[0]
            total = total + self.rows(gradient, leaves)
        return total / self.count

    def ggn_and_gradients(self):
        total, gradients = 0, []
        for x, y in self.data:
            outputs, leaves = self.outputs(self.theta, x)
            jacobian = self.rows(outputs.flatten(), leaves).view(*outputs.shape, -1)
            probs = outputs.detach().softmax(1)
            middle = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
            total = total + (jacobian.mT @ middle @ jacobian).sum(0)
            slopes = probs - nn.functional.one_hot(y, CLASSES)
            gradients.append((slopes[:, None] @ jacobian)[:, 0])
        return total / self.count, torch.cat(gradients)


SLOW = {"gpt2", "gpt2 checkpointed", "vit", "densenet"}  # thousands of weights, one backward pass each in the oracle


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETS]
)
def case(request):
    return Case(request.param)


def near(found, expected):
    """Within 1e-9 of the largest entry."""
    assert_close(found, expected.detach(), cond=1e3)


def test_hessian(case):
    expected = case.hessian()
    operator = lb.HessianLinearOperator(case.net, cross_entropy, case.data)
    near(operator.to_dense(), expected)
    vector = torch.randn(case.layout.numel, dtype=torch.float64)
    near(operator @ vector, expected @ vector)


def test_gauss_newton_fisher_laplace_and_gradients(case):
    ggn, gradients = case.ggn_and_gradients()
    vector = torch.randn(case.layout.numel, dtype=torch.float64)
    operators = {
        "ggn": lb.GGNLinearOperator(case.net, cross_entropy, case.data),
        "unchecked": lb.GGNLinearOperator(case.net, cross_entropy, case.data, check=False),
        "expected": lb.FisherLinearOperator(case.net, "categorical", case.data),
    }
    for operator in operators.values():
        near(operator @ vector, ggn @ vector)
        near(operator.to_dense(), ggn)
    empirical = lb.FisherLinearOperator(case.net, "categorical", case.data, kind="empirical")
    near(empirical.to_dense(), gradients.mT @ gradients / case.count)

    laplace = lb.DiagonalLaplace(case.net, labels="expected").fit(case.data, progress=False)
    near(laplace.fisher_diagonal / case.count, ggn.diagonal())
    laplace = lb.DiagonalLaplace(case.net, labels="true").fit(case.data, progress=False)
    near(laplace.fisher_diagonal, gradients.square().sum(0))
    kronecker = lb.KFACLaplace(case.net, labels="expected").fit(case.data, progress=False)
    rest = kronecker.fisher.diagonal
    found = torch.cat([values.flatten() for values in rest.values()])  # some are zero but for rounding
    near(found / case.count, torch.cat([ggn.diagonal()[case.layout.slices[name]] for name in rest]))
    assert kronecker.kinds.kronecker, "every one of these has a layer with factors"

    each = lb.GradientCovariance(case.net, cross_entropy, per_example=True)
    whole = lb.GradientCovariance(case.net, cross_entropy)
    for batch in case.data:
        each.update(batch)
        whole.update(batch)
    near(each.covariance.to_dense(), gradients.mT.cov())
    near(each.mean, gradients.mean(0))
    near(whole.mean, gradients.mean(0))


def test_predictions_and_densities(case):
    draws = case.theta + 0.1 * torch.randn(4, case.layout.numel, dtype=torch.float64)
    before = draws.clone()
    predictive = lb.predict(case.net, draws, case.data, progress=False, bn_loader="stored")
    every = []
    for draw in before:
        logits = torch.cat([case.outputs(draw, x)[0] for x, _ in case.data])
        every.append(logits.softmax(1))
    near(predictive.mean, torch.stack(every).mean(0))
    assert torch.equal(draws, before)

    subspace = lb.Subspace(case.layout, case.theta, torch.eye(case.layout.numel, dtype=torch.float64))
    joint = lb.LogJoint(subspace, case.net, "categorical", case.data)
    z = (draws[0] - case.theta).requires_grad_()
    value = joint.log_likelihood(z)
    (slope,) = torch.autograd.grad(value, z)
    expected, gradient = 0, 0
    for x, y in case.data:
        outputs, leaves = case.outputs(before[0], x)
        loss = cross_entropy(outputs, y, reduction="sum")
        expected, gradient = expected - loss.detach(), gradient - case.rows([loss], leaves)[0]
    near(value.double(), expected)
    near(slope.double(), gradient)

    if case.layout.numel > 300:
        return
    hessian = torch.autograd.functional.hessian(joint.log_likelihood, torch.zeros_like(case.theta))
    near(hessian / -case.count, case.hessian())


class Slopes(nn.Module):
    """The forces of an energy: derivatives with respect to the inputs inside the forward pass."""

    def __init__(self, way):
        super().__init__()
        self.energy, self.way = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), way

    def forward(self, x):
        if self.way == "explicit":  # d/dx w2 tanh(W1 x + b1)
            first, _, second = self.energy
            return (second.weight * (1 - first(x).tanh().square())) @ first.weight
        if self.way == "func":
            return torch.func.vmap(torch.func.grad(lambda v: self.energy(v).sum()))(x)
        with torch.enable_grad() if self.way == "enabled" else contextlib.nullcontext():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("way", ["grad", "enabled", "func"])
def test_networks_that_take_derivatives_themselves(way):
    torch.manual_seed(0)
    net, plain = Slopes(way).double(), Slopes("explicit").double()
    plain.load_state_dict(net.state_dict())
    layout = lb.ParameterLayout.from_module(net)
    theta = layout.flatten(net)
    x, y = torch.randn(2, 8, 3, dtype=torch.float64)
    data = [(x[:5], y[:5]), (x[5:], y[5:])]

    def outputs(at):
        return torch.func.functional_call(plain, dict(layout.unflatten(at)), (x,))

    jacobian = torch.func.jacrev(outputs)(theta)
    fisher = torch.einsum("ncd,nce->de", jacobian, jacobian) / 8
    hessian = torch.func.hessian(lambda at: mse_loss(outputs(at), y))(theta)
    vector = torch.randn_like(theta)
    near(lb.HessianLinearOperator(net, mse_loss, data).to_dense(), hessian)
    for operator, expected in (
        (lb.GGNLinearOperator(net, mse_loss, data), fisher * 2 / 3),
        (lb.FisherLinearOperator(net, "gaussian", data), fisher),
    ):
        near(operator.to_dense(), expected)
        near(operator @ vector, expected @ vector)
    laplace = lb.DiagonalLaplace(net, likelihood="gaussian", labels="expected").fit(data, progress=False)
    near(laplace.fisher_diagonal / 8, fisher.diagonal())
    kronecker = lb.KFACLaplace(net, likelihood="gaussian", labels="expected").fit(data, progress=False)
    assert not kronecker.kinds.kronecker, "what enters a layer does not tell its gradient"
    near(layout.flatten(kronecker.fisher.diagonal, dtype=torch.float64) / 8, fisher.diagonal())
    each = lb.GradientCovariance(net, mse_loss, per_example=True)
    for batch in data:
        each.update(batch)
    gradients = torch.einsum("ncd,nc->nd", jacobian, outputs(theta).detach() - y) * 2 / 3
    near(each.covariance.to_dense(), gradients.mT.cov())

    draws = theta + 0.1 * torch.randn(3, layout.numel, dtype=torch.float64)
    predictive = lb.predict(net, draws, data, likelihood="gaussian", noise_variance=1.0, progress=False)
    near(predictive.mean, torch.stack([outputs(draw) for draw in draws]).mean(0))
    subspace = lb.Subspace(layout, theta, torch.eye(layout.numel, dtype=torch.float64))
    joint = lb.LogJoint(subspace, net, "gaussian", data, noise_variance=1.0)
    z = torch.zeros_like(theta)
    errors = (outputs(theta) - y).square().sum()
    near(joint.log_likelihood(z).double(), -0.5 * errors - 12 * math.log(2 * math.pi))
    near(torch.autograd.functional.jacobian(joint.log_likelihood, z), -4 * gradients.sum(0) * 3 / 8)
    near(torch.autograd.functional.hessian(joint.log_likelihood, z), -12 * hessian)


class Gaps(nn.Module):
    """A parameter without entries, one without axes, and layers of no width."""

    def __init__(self):
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.narrow, self.wide = nn.Linear(3, 0), nn.Linear(0, CLASSES)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.scale * self.head(x) + self.wide(self.narrow(x)) + self.none.sum()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_parameters_without_entries_or_axes():
    torch.manual_seed(0)
    net = Gaps().double()
    layout = lb.ParameterLayout.from_module(net)
    theta = layout.flatten(net)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(CLASSES, (8,))

    def outputs(at):
        return torch.func.functional_call(net, dict(layout.unflatten(at)), (x,))

    jacobian, probs = torch.func.jacrev(outputs)(theta), outputs(theta).detach().softmax(1)
    middle = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    ggn = (jacobian.mT @ middle @ jacobian).mean(0)
    near(lb.GGNLinearOperator(net, cross_entropy, (x, y)).to_dense(), ggn)
    near(lb.FisherLinearOperator(net, "categorical", (x, y)).to_dense(), ggn)
    hessian = torch.func.hessian(lambda at: cross_entropy(outputs(at), y))(theta)
    near(lb.HessianLinearOperator(net, cross_entropy, (x, y)).to_dense(), hessian)
    laplace = lb.DiagonalLaplace(net, labels="expected").fit([(x, y)], progress=False)
    near(laplace.fisher_diagonal / 8, ggn.diagonal())
    kronecker = lb.KFACLaplace(net, labels="expected").fit([(x, y)], progress=False)
    assert kronecker.kinds.kronecker == ("head.weight", "head.bias")
    assert set(kronecker.kinds.diagonal) == set(layout.names) - {"head.weight", "head.bias"}
    near(kronecker.fisher.diagonal["scale"] / 8, ggn[0, 0])
    draws = kronecker.posterior(prior_precision=1.0).sample(2)
    near(
        lb.predict(net, draws, [(x, y)], progress=False).mean,
        torch.stack([outputs(d).softmax(1) for d in draws]).mean(0),
    )
    each = lb.GradientCovariance(net, cross_entropy, per_example=True)
    each.update((x, y))
    gradients = ((probs - nn.functional.one_hot(y, CLASSES))[:, None] @ jacobian)[:, 0]
    near(each.covariance.to_dense(), gradients.mT.cov())

    swag = lb.SWAG(net, rank=3)
    for _ in range(4):
        layout.assign_(net, layout.flatten(net) + 0.1 * torch.randn_like(theta))
        swag.update_parameters(net)
    posterior = swag.posterior()
    for include, size in (("none", 0), ("scale", 1), ("narrow", 0)):
        marginal = posterior.marginal([include])
        assert marginal.sample(2).shape == (2, size)
        point = marginal.mean + 0.1
        dense = marginal.covariance.to_dense().double()
        expected = torch.distributions.MultivariateNormal(marginal.mean.double(), dense) if size else None
        near(marginal.log_prob(point).double(), expected.log_prob(point.double()) if size else torch.zeros(()).double())


def test_a_network_whose_parameters_are_all_without_entries():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.none = nn.Parameter(torch.zeros(0, dtype=torch.float64))

        def forward(self, x):
            return x + self.none.sum()

    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(3, (8,))
    for kind in (lb.HessianLinearOperator, lb.GGNLinearOperator):
        assert kind(Net(), cross_entropy, (x, y)).to_dense().shape == (0, 0)
    each = lb.GradientCovariance(Net(), cross_entropy, per_example=True)
    each.update((x, y))
    assert each.covariance.shape == (0, 0)
    near(lb.predict(Net(), torch.zeros(2, 0), [(x, y)], progress=False).mean, x.softmax(1))
