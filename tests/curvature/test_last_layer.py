"""The expected Fisher of networks that end in a fully connected layer: in closed form, and through few vectors."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lowrank_bdl.curvature import fisher
from lowrank_bdl.curvature.fisher import fisher_sums
from lowrank_bdl.curvature.scores import CategoricalScores, GaussianScores
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.oracles import assert_close

CLASSES = 30


class Widening(nn.Module):
    """Ends in a layer with more outputs than inputs; ``second`` runs twice, and what is inside changes in place."""

    def __init__(self, width=4, classes=CLASSES, bias=True):
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, classes, bias=bias)

    def forward(self, x):
        x = torch.relu_(self.second(self.second(self.first(x)).tanh()) + 0.3)
        return self.head(x)


class Scaled(Widening):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        return super().forward(x * self.scale)


class Changed(Widening):
    """Goes on after its last layer: that is not the output."""

    def forward(self, x):
        return super().forward(x) * 0.5


class ChangedInPlace(Widening):
    """Goes on after its last layer, within the same tensor."""

    def forward(self, x):
        return super().forward(x).mul_(torch.linspace(0.5, 2, CLASSES, dtype=x.dtype))


class Skipped(Widening):
    """What is added to the last layer's result depends on the weights too."""

    def __init__(self, inplace=False):
        super().__init__()
        self.skip, self.inplace = nn.Linear(3, CLASSES), inplace

    def forward(self, x):
        result = super().forward(x)
        other = self.skip(x).tanh()
        return result.add_(other) if self.inplace else result + other


class TwoHeads(Widening):
    """The last layer's input also reaches the output by another way."""

    def __init__(self):
        super().__init__()
        self.skip = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.second(self.first(x)).tanh()
        return self.head(x) + self.skip(x)


NETS = {
    "wide": Widening,
    "narrow": lambda: Widening(8, 3),
    "square": lambda: Widening(5, 5, bias=False),
    "one layer": lambda: nn.Linear(3, CLASSES),
    "another parameter": Scaled,
    "changed": Changed,
    "changed in place": ChangedInPlace,
    "skipped": Skipped,
    "skipped in place": lambda: Skipped(inplace=True),
    "two heads": TwoHeads,
}
RULES = {"categorical": CategoricalScores(), "gaussian": GaussianScores(0.3)}


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETS[name]().double()
        x = torch.randn(7, 3, dtype=torch.float64)
        classes = net(x).shape[1]
        y = torch.randint(classes, (7,))
    return net, x, y, classes


def sums_of(net, data, rule, kronecker, layout=None, theta=None):
    layout = ParameterLayout.from_module(net) if layout is None else layout
    theta = layout.flatten(net) if theta is None else theta
    return fisher_sums(net, theta, layout, data, rule, "expected", kronecker=kronecker, diagonal=True)


def every_score(net, theta, layout, x, likelihood, classes):
    """Gradients of the log-likelihood by the weights and by each layer's outputs, in the square root of E[s s']."""
    calls = {}
    hooks = [
        module.register_forward_hook(lambda m, _, out, name=name: calls.setdefault(name, []).append(out) or out.clone())
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear)
    ]
    weights = {name: part.requires_grad_() for name, part in layout.unflatten(theta.clone()).items()}
    outputs = functional_call(net, weights, (x,))
    for hook in hooks:
        hook.remove()
    flat = [(name, out) for name, outs in calls.items() for out in outs]
    totals = {name: torch.zeros(outs[0].shape[1], outs[0].shape[1]).double() for name, outs in calls.items()}
    diagonal = torch.zeros_like(theta)
    for n in range(len(x)):
        p = outputs[n].detach().softmax(0)
        middle = p.diag() - p.outer(p) if likelihood == "categorical" else torch.eye(classes).double() / 0.3
        jacobian, by_outputs = [], {name: [] for name in calls}
        for c in range(classes):
            parts = torch.autograd.grad(outputs[n, c], list(weights.values()), retain_graph=True, allow_unused=True)
            rows = [torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), parts, strict=True)]
            jacobian.append(torch.cat([row.flatten() for row in rows]))
            found = torch.autograd.grad(outputs[n, c], [out for _, out in flat], retain_graph=True)
            for name in calls:
                each = [g[n] for (other, _), g in zip(flat, found, strict=True) if other == name]
                by_outputs[name].append(torch.stack(each))
        jacobian = torch.stack(jacobian)
        diagonal += (jacobian.mT @ middle @ jacobian).diagonal()
        for name, rows in by_outputs.items():
            stacked = torch.stack(rows)  # (classes, calls, outputs)
            totals[name] += torch.einsum("cto,cd,dtp->op", stacked, middle, stacked)
    return totals, diagonal, {name: len(x) * len(outs) for name, outs in calls.items()}


@pytest.mark.parametrize("likelihood", RULES)
@pytest.mark.parametrize("name", NETS)
def test_factors_and_diagonals(name, likelihood):
    net, x, y, classes = build(name)
    layout = ParameterLayout.from_module(net)
    theta = layout.flatten(net) * 1.1  # not where the network is
    targets = y if likelihood == "categorical" else torch.randn(7, classes, dtype=torch.float64)
    data = [(x[:4], targets[:4]), (x[4:], targets[4:])]
    totals, diagonal, counts = every_score(net, theta, layout, x, likelihood, classes)
    sums = sums_of(net, data, RULES[likelihood], True, theta=theta)
    assert set(sums.kronecker) == {f"{n}.weight" if n else "weight" for n in totals}
    for layer, total in totals.items():
        curvature = sums.kronecker[f"{layer}.weight" if layer else "weight"]
        vectors = curvature.left_vectors[0]
        found = vectors * curvature.left_values[0] @ vectors.mT
        assert_close(found, total / counts[layer], cond=100)
    whole = layout.flatten(sums_of(net, data, RULES[likelihood], False, theta=theta).diagonal, dtype=torch.float64)
    assert_close(whole, diagonal, cond=100)


@pytest.mark.parametrize("kronecker", [True, False])
def test_a_part_of_the_last_layer(kronecker):
    """Its weight or its bias alone; the rest is not treated, and stands where the network has it."""
    net, x, y, _ = build("wide")
    for include in (["head.weight"], ["head.bias", "first"], ["second", "head.weight"], ["first"]):
        layout = ParameterLayout.from_module(net, include)
        sums = sums_of(net, [(x, y)], RULES["categorical"], kronecker, layout)
        full = ParameterLayout.from_module(net)
        _, diagonal, _ = every_score(net, full.flatten(net), full, x, "categorical", CLASSES)
        for name, values in sums.diagonal.items():
            assert_close(values.flatten(), diagonal[full.slices[name]], cond=100)
        assert set(sums.diagonal) | {n for each in sums.kronecker.values() for n in each.layer.parameters} == set(
            layout.names
        )


@pytest.fixture
def passes(monkeypatch):
    """A list with an entry for each vector of scores that goes back through a network."""
    calls = []
    real = fisher._output_gradients

    def counted(backward, outputs, scores, layers):
        calls.extend(scores)
        return real(backward, outputs, scores, layers)

    monkeypatch.setattr(fisher, "_trusted", lambda network, weights, layers, inputs: layers)
    monkeypatch.setattr(fisher, "_output_gradients", counted)
    return calls


@pytest.mark.parametrize("name, expected", [("wide", 4), ("narrow", 3), ("one layer", 0), ("two heads", CLASSES)])
def test_backward_passes(name, expected, passes):
    net, x, y, _ = build(name)
    sums_of(net, [(x, y)], RULES["categorical"], True)
    assert len(passes) == expected


class Tagger(nn.Module):
    """A class for every position of a sequence: logits (N, C, T), or (N, T, C) of regressions."""

    def __init__(self, width, classes, features_last):
        super().__init__()
        self.first, self.head = nn.Linear(3, width), nn.Linear(width, classes)
        self.features_last = features_last

    def forward(self, x):  # every position sees all others
        hidden = self.first(x).tanh()
        logits = self.head(hidden + hidden.cumsum(1).sin())
        return logits if self.features_last else logits.mT


@pytest.mark.parametrize("width, classes", [(4, 9), (9, 4)])
@pytest.mark.parametrize("likelihood", RULES)
def test_sequences(likelihood, width, classes):
    torch.manual_seed(0)
    net = Tagger(width, classes, likelihood == "gaussian").double()
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    y = torch.randint(classes, (6, 5)) if likelihood == "categorical" else torch.randn(6, 5, classes).double()
    data = [(x[:2], y[:2]), (x[2:], y[2:])]

    weights = {name: part.detach().requires_grad_() for name, part in net.named_parameters()}
    hooked = {}
    for name in ("first", "head"):
        net.get_submodule(name).register_forward_hook(lambda m, _, out, name=name: hooked.__setitem__(name, out))
    logits = functional_call(net, weights, (x,))
    logits = logits if likelihood == "gaussian" else logits.mT
    probs = logits.detach().softmax(-1)
    middle = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
    if likelihood == "gaussian":
        middle = (torch.eye(classes).double() / 0.3).expand_as(middle)
    diagonal = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    factors = {"first": torch.zeros(width, width).double(), "head": torch.zeros(classes, classes).double()}
    for n in range(6):
        for t in range(5):
            wanted = [*weights.values(), *hooked.values()]
            rows = [torch.autograd.grad(logits[n, t, c], wanted, retain_graph=True) for c in range(classes)]
            stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
            for total, jacobian in zip(diagonal.values(), stacked, strict=False):
                flat = jacobian.flatten(1)
                total += (flat * (middle[n, t] @ flat)).sum(0).view_as(total)
            for name, jacobian in zip(hooked, stacked[len(weights) :], strict=True):
                at = jacobian[:, n]  # (C, positions, outputs of the layer)
                factors[name] += torch.einsum("cto,cd,dtp->op", at, middle[n, t], at)

    found = sums_of(net, data, RULES[likelihood], False).diagonal
    for name, expected in diagonal.items():
        assert_close(found[name], expected.detach(), cond=100)
    for name, curvature in sums_of(net, data, RULES[likelihood], True).kronecker.items():
        vectors = curvature.left_vectors[0]
        total = factors[name.removesuffix(".weight")] / 30
        assert_close(vectors * curvature.left_values[0] @ vectors.mT, total, cond=100)


def test_a_thousand_classes_at_every_position_take_no_pass_for_each_class(passes):
    net = Tagger(4, 1000, False)
    sums_of(net, [(torch.randn(8, 5, 3), torch.randint(1000, (8, 5)))], RULES["categorical"], True)
    assert len(passes) == 4 * 5
