"""Kronecker factors: exact where they must be, and their definition for convolutions and shared weights."""

import pytest
import torch
from torch import nn

from lowrank_bdl.curvature import kronecker_factors
from lowrank_bdl.curvature.fisher import fisher_sums
from lowrank_bdl.curvature.kronecker_factors import KroneckerFactors, example_chunks
from lowrank_bdl.curvature.layers import Layer
from lowrank_bdl.curvature.scores import CategoricalScores, GaussianScores
from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, ShapeError
from lowrank_bdl.linalg import memory
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.curvature.cases import NETS, batches, build, categorical_hessians, jacobians, outputs_of
from tests.oracles import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # of torch's own


def factors(net, loader, labels, likelihood=None, **options):
    layout = ParameterLayout.from_module(net, **options)
    likelihood = CategoricalScores() if likelihood is None else likelihood
    sums = fisher_sums(net, layout.flatten(net), layout, loader, likelihood, labels, kronecker=True, diagonal=False)
    return layout, sums.kronecker


def dense(curvature):
    """G kron A of every group, in the order of the flat vector: the weight, then the bias."""
    left = (curvature.left_vectors * curvature.left_values[:, None]) @ curvature.left_vectors.mT
    right = (curvature.right_vectors * curvature.right_values[:, None]) @ curvature.right_vectors.mT
    groups, out, inner = curvature.eigenvalues.shape
    full = torch.block_diag(*(torch.kron(a, b) for a, b in zip(left, right, strict=True)))
    places = torch.arange(len(full)).view(groups, out, inner)
    if curvature.layer.bias is not None:
        places = torch.cat([places[..., :-1].flatten(), places[..., -1].flatten()])
    places = places.flatten()
    return full[places][:, places]


def block(layout, matrix, name):
    start = layout.slices[name].start
    own = [key for key in layout.names if key.rpartition(".")[0] == name.rpartition(".")[0]]
    stop = max(layout.slices[key].stop for key in own)
    return matrix[start:stop, start:stop]


def gauss_newton(net, x, hessians):
    jacobian = jacobians(net, x)
    return torch.einsum("nki,nkl,nlj->ij", jacobian, hessians, jacobian)


def deep_linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2)).double()


def test_deep_linear_network_with_squared_loss_has_exact_blocks():
    """G is the same for every example, so the mean of products is the product of means (Bernacchia et al., 2018)."""
    net = deep_linear()
    x, y = torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    variance = 0.3
    loader = batches(x, y[:, :2], (4, 2, 3))
    layout, found = factors(net, loader, "expected", GaussianScores(variance))
    exact = gauss_newton(net, x, torch.eye(2, dtype=torch.float64).expand(9, 2, 2) / variance)
    assert list(found) == ["0.weight", "1.weight", "2.weight"]
    for name, curvature in found.items():
        assert_close(dense(curvature), block(layout, exact, name), cond=10)


@pytest.mark.parametrize("labels", ["true", "expected"])
def test_one_layer_and_one_example_are_exact(labels):
    net, x, y = build("linear", count=1)
    layout, found = factors(net, [(x, y)], labels)
    outputs, jacobian = outputs_of(net, x), jacobians(net, x)[0]
    if labels == "expected":
        hessian = categorical_hessians(outputs)[0]
    else:
        score = outputs.softmax(-1)[0] - nn.functional.one_hot(y, 3)[0]
        hessian = torch.outer(score, score)
    assert_close(dense(found["weight"]), jacobian.mT @ hessian @ jacobian, cond=10)


def test_one_convolution_with_one_position_and_one_example_is_exact():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, (2, 3), padding=0), nn.Flatten()).double()
        x = torch.randn(1, 2, 2, 3).double()
    _, found = factors(net, [(x, torch.tensor([1]))], "expected")
    exact = gauss_newton(net, x, categorical_hessians(outputs_of(net, x)))
    assert_close(dense(found["0.weight"]), exact, cond=10)


def definition(net, name, x, y, labels):
    """A and G of a layer called once, by a loop over examples and positions and a conv written as index arithmetic."""
    layer = net.get_submodule(name)
    is_conv = isinstance(layer, nn.Conv2d)
    groups = layer.groups if is_conv else 1
    out, inner = layer.weight.shape[0] // groups, layer.weight[0].numel()
    left, right = torch.zeros(groups, out, out).double(), torch.zeros(groups, inner + 1, inner + 1).double()
    count, seen = 0, {}

    def hook(module, args, output):
        seen["input"], seen["output"] = args[0].detach(), output
        return output.clone()

    handle = layer.register_forward_hook(hook)
    net.eval()
    for example, target in zip(x, y, strict=True):
        logits = net(example[None])
        probs = logits.detach().softmax(-1)[0]
        chosen = {"true": [(target.item(), 1.0)], "expected": [(c, probs[c].item()) for c in range(3)]}[labels]
        rows = positions(layer, seen["input"][0]) if is_conv else seen["input"].view(-1, 1, inner)
        for row in rows:
            for group in range(groups):
                a = torch.cat([row[group], torch.ones(1).double()])
                right[group] += torch.outer(a, a)
        for label, weight in chosen:
            loss = -logits.log_softmax(-1)[0, label]
            (gradient,) = torch.autograd.grad(loss, seen["output"], retain_graph=True)
            gradient = gradient[0].flatten(1).mT if is_conv else gradient.view(-1, out)
            for row in gradient:
                for group, g in enumerate(row.view(groups, out)):
                    left[group] += weight * torch.outer(g, g)
        count += len(rows)
    handle.remove()
    if layer.bias is None:
        right = right[:, :-1, :-1]
    return left / count, right


def positions(conv, image):
    """Inputs (T, groups, m) of every position of one padded image."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    if conv.padding == "same":
        th, tw = dh * (kh - 1), dw * (kw - 1)
        margins = (tw // 2, tw - tw // 2, th // 2, th - th // 2)
    else:
        ph, pw = (0, 0) if conv.padding == "valid" else conv.padding
        margins = (pw, pw, ph, ph)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    image = nn.functional.pad(image[None], margins, mode=mode)[0]
    height = (image.shape[1] - dh * (kh - 1) - 1) // sh + 1
    width = (image.shape[2] - dw * (kw - 1) - 1) // sw + 1
    rows = []
    for i in range(height):
        for j in range(width):
            patch = image[:, i * sh : i * sh + dh * kh : dh, j * sw : j * sw + dw * kw : dw][:, :kh, :kw]
            rows.append(patch.reshape(conv.groups, -1))
    return torch.stack(rows)


LAYERS = [(name, "0") for name in NETS if name.startswith("conv")]
LAYERS += [("conv groups", "3"), ("in place", "0"), ("residual", "conv1"), ("residual", "conv2"), ("residual", "head")]
LAYERS += [("positions", "embed"), ("positions", "head")]


@pytest.mark.parametrize("labels", ["true", "expected"])
@pytest.mark.parametrize("name, layer", LAYERS, ids=str)
def test_definition(name, layer, labels):
    net, x, y = build(name)
    left, right = definition(net, layer, x, y, labels)
    _, found = factors(net, batches(x, y), labels)
    curvature = found[f"{layer}.weight"]
    assert_close((curvature.left_vectors * curvature.left_values[:, None]) @ curvature.left_vectors.mT, left, cond=10)
    assert_close(
        (curvature.right_vectors * curvature.right_values[:, None]) @ curvature.right_vectors.mT, right, cond=10
    )


def test_a_layer_called_several_times_pools_its_calls():
    """Two equal calls double the curvature, as two positions do: their products are not crossed."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x):
            return self.layer(x) + self.layer(x)

    net, (x, y) = Twice(), (torch.randn(5, 3).double(), torch.randn(5, 3).double())
    rule = GaussianScores(1.0)
    _, found = factors(net, [(x, y)], "expected", rule)
    _, single = factors(net.layer, [(x, y)], "expected", rule)
    # A doubles; G sums over twice the positions and is divided by twice the count
    assert_close(dense(found["layer.weight"]), 2 * dense(single["weight"]), cond=10)


def test_ragged_batches_chunks_and_precision(monkeypatch):
    net, x, y = build("residual")
    _, whole = factors(net, [(x, y)], "expected")
    _, ragged = factors(net, batches(x, y, (5, 2)), "expected")
    monkeypatch.setattr(kronecker_factors, "_NUMBERS_AT_ONCE", 1)
    _, chunked = factors(net, [(x, y)], "expected")
    single = build("residual", dtype=torch.float32)
    _, narrow = factors(single[0], [(single[1], single[2])], "expected")
    _, exact = factors(single[0].double(), [(single[1].double(), single[2])], "expected")
    for name in whole:
        assert_close(dense(ragged[name]), dense(whole[name]), cond=10)
        assert_close(dense(chunked[name]), dense(whole[name]), cond=10)
        assert_close(dense(narrow[name]), dense(exact[name]), torch.float32, 10)
        assert narrow[name].eigenvalues.dtype == torch.float64


def test_what_has_no_block():
    """Tied, reused or wrongly laid out weights get none; nor does a bias without its weight."""
    for name in ("tied", "functional", "time first"):
        net, x, y = build(name)
        for loader in (batches(x, y), [(x, y)]):
            expected = ["second.weight"] if name == "functional" else []
            assert list(factors(net, loader, "true")[1]) == expected
    net, x, y = build("mlp")
    assert list(factors(net, [(x, y)], "true", include="*.bias")[1]) == []
    _, found = factors(net, [(x, y)], "true", include="*.weight")
    assert found["0.weight"].layer.bias is None and found["0.weight"].right_values.shape == (1, 3)


def test_chunks_cover_the_batch(monkeypatch):
    monkeypatch.setattr(kronecker_factors, "_NUMBERS_AT_ONCE", 10)
    assert [tuple(range(7))[part] for part in example_chunks(7, 4)] == [(0, 1), (2, 3), (4, 5), (6,)]
    assert [tuple(range(2))[part] for part in example_chunks(2, 1000)] == [(0,), (1,)]


def test_refusals(monkeypatch):
    layer = Layer("head", nn.Linear(3, 2), "head.weight", "head.bias")
    with pytest.raises(ShapeError, match="Layer 'head' must be called in the forward pass; it never was"):
        KroneckerFactors(layer).decompose()
    broken = KroneckerFactors(layer)
    broken.count, broken.gradient_sums[0, 0, 0] = 1, float("inf")
    with pytest.raises(NonFiniteError, match="Layer 'head' must have finite inputs and gradients"):
        broken.decompose()
    monkeypatch.setattr(memory, "available_memory", lambda device: 100)
    with pytest.raises(MemoryLimitError, match="the Kronecker factors of layer 'head' needs 0.00 GiB"):
        KroneckerFactors(layer)
