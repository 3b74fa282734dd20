import pytest
import torch
from torch import nn

from lowrank_bdl.errors import LowRankBDLError, ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.prediction.predict import predict


class Counter(nn.Module):
    """Passes its input on and counts its calls; has no parameters."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class ConvNet(nn.Module):
    """Convolution, batch norm, pooling, in-place ReLU, and a buffer that the forward pass writes into."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 4)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.passes += 1
        x = nn.functional.max_pool2d(self.norm(self.conv(x)), 2)
        return self.head(nn.functional.relu(x, inplace=True).flatten(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.first(x).tanh())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixed, self.norm = nn.Linear(4, 12), nn.LayerNorm(4)

    def forward(self, x):
        query, key, value = self.mixed(x).chunk(3, dim=-1)
        return self.norm((query @ key.mT).softmax(-1) @ value + x).mean(1)


def perceptron(*sizes):
    layers = [layer for pair in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(Counter(), *layers[:-1])


NETWORKS = {
    "perceptron": (lambda: perceptron(5, 7, 4), (5,)),
    "conv": (ConvNet, (1, 6, 6)),
    "tied": (Tied, (5,)),
    "attention": (Attention, (3, 4)),
}


def problem(name, num_samples=5, sizes=(6, 3), dtype=torch.float64):
    make, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().to(dtype)
        loader = [torch.randn(n, *shape, dtype=dtype) for n in sizes]
        layout = ParameterLayout.from_module(model)
        thetas = layout.flatten(model) + 0.3 * torch.randn(num_samples, layout.numel, dtype=dtype)
    return model, thetas, loader


def run(model, thetas, loader, **options):
    return predict(model, thetas, loader, **{"keep_samples": True, "progress": False, "bn_loader": "stored", **options})


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, None])
def test_at_once_agrees_with_one_after_another(name, dtype, tolerance, chunk_size):
    model, thetas, loader = problem(name, dtype=dtype)
    options = {"bn_loader": loader} if name == "conv" else {}
    expected = run(model, thetas, loader, vectorize=False, **options)
    found = run(model, thetas, loader, vectorize=True, chunk_size=chunk_size, **options)
    assert expected.sample_means.std(0).max() > 0.01  # the samples differ
    torch.testing.assert_close(found.sample_means, expected.sample_means, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.mean, expected.mean, rtol=tolerance, atol=tolerance)


def test_structured_outputs_through_call_fn():
    model, thetas, loader = problem("perceptron")

    def call_fn(network, x):
        return {"mean": network(x), "extra": (network(x).exp(), x)}

    options = {"call_fn": call_fn, "likelihood": lambda out: torch.distributions.Normal(out["mean"], out["extra"][0])}
    expected, found = (run(model, thetas, loader, vectorize=choice, **options) for choice in (False, True))
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size,calls", [(1, 10), (2, 6), (3, 4), (99, 2)])
def test_chunks(chunk_size, calls):
    model, thetas, loader = problem("perceptron")
    run(model, thetas, loader, vectorize=True, chunk_size=chunk_size)
    assert model[0].calls == calls  # two batches of ceil(5 / chunk_size)


def calls_of(loader=None, vectorize="auto", thetas=None, model=None, **options):
    default, weights, batches = problem("perceptron", num_samples=10)
    model = default if model is None else model
    run(model, weights if thetas is None else thetas, loader or batches, vectorize=vectorize, **options)
    return model[0].calls


def test_auto_takes_small_perceptrons_together():
    assert calls_of() == 1 + 2  # one to find the chunk size, and one a batch
    assert calls_of(vectorize=False) == 20


def test_auto_leaves_everything_else_alone():
    wide, thetas, loader = problem("perceptron", num_samples=10, sizes=(70_000, 3))  # 4 million products
    assert calls_of(loader, thetas=thetas, model=wide) == 1 + 20
    assert calls_of(thetas=thetas[0]) == 2  # one network: nothing to take together
    assert calls_of(call_fn=lambda network, x: network(x)) == 20
    hooked = perceptron(5, 7, 4).double()
    hooked[1].register_forward_hook(lambda module, args, output: None)
    assert calls_of(model=hooked) == 20
    normed = nn.Sequential(Counter(), nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    weights = torch.randn(10, 32, generator=torch.Generator().manual_seed(0)).double()
    assert calls_of(model=normed, thetas=weights) == 20
    compiled = perceptron(5, 7, 4).double()
    compiled._orig_mod = nn.Identity()  # as torch.compile wraps a network
    assert calls_of(model=compiled) == 20


def test_the_chunk_goes_by_the_largest_layer():
    model, thetas, _ = problem("perceptron", num_samples=10)
    rows = (2 << 20) // (3 * (7 + 7) * 8)  # the ReLU's input and output of three networks fill the limit
    assert calls_of([torch.zeros(rows, 5).double()], thetas=thetas, model=model, vectorize=True) == 1 + 4
    model[0].calls = 0
    assert calls_of([torch.zeros(10 * rows, 5).double()], thetas=thetas, model=model, vectorize=True) == 1 + 5
    assert not any(module._forward_hooks for module in model.modules())


class Branching(nn.Module):
    """Looks at the numbers, which torch.vmap cannot."""

    def __init__(self):
        super().__init__()
        self.counter, self.linear = Counter(), nn.Linear(5, 4)

    def __getitem__(self, i):
        return self.counter

    def forward(self, x):
        x = self.linear(self.counter(x))
        return x if x.sum() > 0 else -x


def test_what_cannot_be_done_at_once():
    model = Branching().double()
    _, _, loader = problem("perceptron")
    thetas = torch.randn(10, 24, generator=torch.Generator().manual_seed(0)).double()
    expected = run(model, thetas, loader, vectorize=False)
    model.counter.calls = 0
    found = run(model, thetas, loader)
    assert torch.equal(found.sample_means, expected.sample_means)
    assert model.counter.calls == 1 + 1 + 20  # tried once, and not again
    with pytest.raises(LowRankBDLError, match="cannot be evaluated under several weight vectors at once .*data-dep"):
        run(model, thetas, loader, vectorize=True)


def test_the_networks_own_errors_stay_as_they_are():
    model, thetas, _ = problem("perceptron")
    for vectorize in (True, "auto"):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            run(model, thetas, [torch.zeros(2, 6).double()], vectorize=vectorize, chunk_size=2)
    with pytest.raises(ShapeError, match="unless call_fn is given; Sequential does not take"):
        run(model, thetas, [{"x": 1}], vectorize=True, chunk_size=2)


def test_draws_that_are_made_anew_serve_chunks_too():
    model, thetas, loader = problem("perceptron")

    class Posterior:
        layout = ParameterLayout.from_module(model)
        mean = thetas[0]

        def sample(self, n, *, generator=None):
            return self.mean + torch.randn(n, len(self.mean), generator=generator, dtype=torch.float64)

    results = [
        predict(
            model,
            Posterior(),
            loader,
            7,
            generator=torch.Generator().manual_seed(0),
            max_bytes=max_bytes,
            vectorize=vectorize,
            chunk_size=3,
            progress=False,
        ).mean
        for max_bytes, vectorize in ((None, False), (None, True), (0, True))
    ]
    assert torch.equal(results[1], results[2])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_bad_settings_are_refused_before_anything_is_read():
    class Forbidden:
        def __iter__(self):
            raise AssertionError("the loader was read")

    model, thetas, _ = problem("conv")
    for vectorize in ("yes", 1, None):
        with pytest.raises(ValueError, match="vectorize must be True, False or 'auto'; got"):
            run(model, thetas, Forbidden(), bn_loader=Forbidden(), vectorize=vectorize)
    with pytest.raises(ValueError, match="chunk_size must be at least 1; got 0"):
        run(model, thetas, Forbidden(), bn_loader=Forbidden(), chunk_size=0)
    model.dropout = nn.Dropout(0.5)
    with pytest.raises(ValueError, match="vectorize=True cannot be combined with dropout"):
        run(model, thetas, Forbidden(), bn_loader=Forbidden(), dropout=True, vectorize=True)


def test_on_the_device_of_the_network(device):
    model, thetas, loader = problem("conv")
    expected = run(model, thetas, loader, vectorize=False)
    found = run(model.to(device), thetas, loader, vectorize=True)
    assert found.mean.device.type == device.type
    torch.testing.assert_close(found.mean, expected.mean.to(device), rtol=1e-9, atol=1e-12)
