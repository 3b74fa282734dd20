import copy
import math

import pytest
import torch
from torch import nn

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.prediction.draws import WeightDraws
from lowrank_bdl.prediction.dropout import DropoutMasks
from lowrank_bdl.prediction.predict import predict

UNITS = 12


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def masks_of(num_samples=20, sizes=(8, 8, 4), seed=0, rate=0.5, **options):
    """The masks (S, N, units) that predict applies, +1 where a unit is kept and -1 where it is dropped."""
    model = seeded(lambda: nn.Sequential(nn.Linear(1, UNITS, bias=False), nn.Dropout(rate)).double())
    loader = [torch.ones(n, 1, dtype=torch.float64) for n in sizes]
    found = run(model, torch.ones(UNITS).double(), loader, num_samples, seed, noise_variance=1.0, **options)
    assert set(found.sample_means.unique().tolist()) == {0.0, 1 / (1 - rate)}  # what is kept is scaled up
    return (found.sample_means > 0).double() * 2 - 1


def run(model, posterior, loader, num_samples=5, seed=0, **options):
    options = {"dropout": True, "progress": False, "keep_samples": True, "bn_loader": "stored", **options}
    if "noise_variance" in options:
        options["likelihood"] = "gaussian"
    return predict(model, posterior, loader, num_samples, generator=torch.Generator().manual_seed(seed), **options)


def test_masks_are_fair_and_independent_over_samples_examples_and_units():
    """Every mean and every covariance of the +-1 masks, by Hoeffding's bound; false alarms under 1e-6 in all.

    A mask shared by the examples of a batch, by samples or by batches would give a covariance of 1 somewhere.
    """
    masks = masks_of(num_samples=120, sizes=(40, 40, 20))
    tested = 0
    for moved in (masks, masks.transpose(0, 1), masks.movedim(2, 0)):  # rows: samples, examples, units
        rows = moved.flatten(1)
        count, length = rows.shape
        bound = math.sqrt(2 * math.log(2 * 3 * count**2 / 1e-6) / length)
        assert rows.mean(1).abs().max() < bound < 0.25
        covariance = rows @ rows.mT / length
        assert (covariance - torch.eye(count).double()).abs().max() < bound
        tested += count**2
    assert tested > 20_000


def test_the_rate_is_the_layers():
    """The dropped fraction of 24,000 units, within 5 standard errors."""
    dropped = (1 - masks_of(100, rate=0.2)) / 2
    assert abs(dropped.mean().item() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / dropped.numel()) < 0.02


def test_masks_are_a_function_of_the_generator():
    masks = masks_of()
    assert torch.equal(masks_of(), masks)
    assert not torch.equal(masks_of(seed=1), masks)
    assert torch.equal(masks_of(num_samples=7), masks[:7])  # sample s keeps its masks whatever S is
    assert torch.equal(masks_of(sizes=(8, 8))[:, :16], masks[:, :16])


def test_the_global_generator_neither_matters_nor_changes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torch.get_rng_state()
        one = masks_of()
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        assert torch.equal(masks_of(), one)


def test_a_loader_that_shuffles_by_the_global_generator_goes_on_undisturbed():
    def shuffled():
        for _ in range(3):
            yield torch.rand(2, 3)

    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = list(shuffled())
        seen = []
        torch.manual_seed(0)
        run(model, torch.zeros(16), shuffled(), call_fn=lambda m, x: (seen.append(x), m(x))[1])
    assert [any(torch.equal(x, y) for y in seen) for x in expected] == [True] * 3
    assert len(seen) == 15


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.4)
        self.second, self.alpha = nn.Linear(6, 4), nn.AlphaDropout(0.3)

    def forward(self, x):
        x = nn.functional.dropout(self.first(x), 0.9, self.training)  # not a dropout layer: it stays off
        return self.alpha(self.second(self.dropout(self.norm(x).relu())))


class Posterior:
    def __init__(self, model):
        self.layout = ParameterLayout.from_module(model)
        self.mean = self.layout.flatten(model)

    def sample(self, n, *, generator=None):
        return self.mean + 0.3 * torch.randn(n, len(self.mean), generator=generator, dtype=self.mean.dtype)


def problem(sizes=(5, 3)):
    model = seeded(lambda: Net().double())
    loader = [seeded(lambda n=n: (torch.randn(n, 3).double(), torch.randint(4, (n,))), n) for n in sizes]
    return model, Posterior(model), loader


def test_around_draws_by_hand():
    model, posterior, loader = problem()
    found = run(model, posterior, loader)
    generator = torch.Generator().manual_seed(0)
    thetas = list(WeightDraws(posterior, 5, generator))  # the draws are those without dropout
    masks = DropoutMasks(model, None, generator)
    probs = []
    for s, theta in enumerate(thetas):
        other = copy.deepcopy(model).eval()
        posterior.layout.assign_(other, theta)
        other.dropout.train()
        other.alpha.train()
        pieces = []
        for b, (x, _) in enumerate(loader):
            with masks.drawn(sample=s, batch=b):
                pieces.append(other(x).softmax(1).detach())
        probs.append(torch.cat(pieces))
    torch.testing.assert_close(found.sample_means, torch.stack(probs), rtol=1e-12, atol=1e-14)
    without = run(model, posterior, loader, dropout=False)
    assert (found.sample_means - without.sample_means).abs().amax((1, 2)).min() > 0.01
    regenerated = run(model, posterior, loader, max_bytes=0)
    assert torch.equal(regenerated.sample_means, found.sample_means)


def test_one_weight_vector_gives_monte_carlo_dropout():
    model, posterior, loader = problem()
    found = run(model, posterior.mean, loader, num_samples=6)
    assert found.num_samples == 6 and len(found.sample_means.unique(dim=0)) == 6
    assert (found.mutual_information > 0).all()
    assert run(model, posterior.mean, loader, num_samples=6, dropout=False).num_samples == 1
    several = run(model, torch.stack([posterior.mean] * 2), loader, num_samples=6)
    assert several.num_samples == 2
    assert torch.equal(several.sample_means, found.sample_means[:2])
    with pytest.raises(ShapeError, match="num_samples must be at least 1; got 0"):
        run(model, posterior.mean, loader, num_samples=0)


def test_the_mean_of_a_linear_network_is_that_without_dropout():
    """E[mask] = 1: the mean over 4,000 masks within 5 standard errors, the variance within 10 % (its error is 2 %)."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1, bias=False)).double()
    x, w = torch.tensor([1.0, -2.0, 3.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    draws = run(model, w, [x.expand(40, 3)], num_samples=100, noise_variance=1.0).sample_means
    variance = (w * x).square().sum().item()  # p / (1 - p) = 1
    assert abs(draws.mean().item() - (w * x).sum().item()) < 5 * math.sqrt(variance / 4000)
    assert draws.var().item() == pytest.approx(variance, rel=0.1)


def test_batch_norm_statistics_are_computed_once_and_without_dropout():
    model, posterior, loader = problem(sizes=(6, 6))
    calls = []

    def call_fn(network, batch):
        calls.append([m.training for m in (network, network.norm, network.dropout)])
        return network(batch[0])

    found = run(model, posterior.mean, loader, num_samples=4, bn_loader=loader, call_fn=call_fn)
    assert calls[:2] == [[False, True, False]] * 2  # one pass for the one weight vector
    assert calls[2:] == [[False, False, True]] * 8
    assert not torch.equal(found.mean, run(model, posterior.mean, loader, num_samples=4).mean)


def test_modes_come_back_also_after_an_error():
    model, posterior, loader = problem()
    model.train()
    model.norm.eval()
    model.alpha.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    run(model, posterior, loader, bn_loader=loader)
    assert [module.training for module in model.modules()] == modes

    def broken(network, batch):
        assert network.dropout.training and network.alpha.training and not network.norm.training
        network(batch[0])
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(model, posterior, loader, call_fn=broken)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layers", [[], [nn.Dropout(0.0)]], ids=["none", "rate-0"])
def test_a_network_without_dropout_is_refused(layers):
    with pytest.raises(ValueError, match="needs a model with dropout layers of a rate above 0; this one has none"):
        run(nn.Sequential(nn.Linear(1, 2), *layers), torch.zeros(4), [torch.ones(1, 1)])


def test_masks_on_the_device_of_the_network(device):
    model, posterior, loader = problem()
    model = model.to(device)
    state = torch.get_rng_state()
    one, same = (run(model, posterior, loader) for _ in range(2))
    assert one.mean.device.type == device.type and torch.equal(one.sample_means, same.sample_means)
    assert not torch.equal(one.sample_means, run(model, posterior, loader, dropout=False).sample_means)
    assert torch.equal(torch.get_rng_state(), state)


class Attentive(nn.Module):
    def __init__(self, stacked):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1) if stacked else layer
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "encoder"])
def test_dropout_inside_transformer_layers(stacked):
    """In evaluation mode torch's fused kernels take such a layer's place: they know no dropout, and no error either."""
    model = seeded(lambda: Attentive(stacked))
    weights = ParameterLayout.from_module(model).flatten(model)
    found = run(model, weights, [torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))], num_samples=6)
    assert bool((found.sample_means.std(0) > 1e-3).all())
    assert torch.backends.mha.get_fastpath_enabled()
