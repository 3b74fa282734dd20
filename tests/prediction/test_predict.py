import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Poisson, StudentT

from lowrank_bdl.errors import LowRankBDLError, NonFiniteError, ShapeError
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm_
from lowrank_bdl.parameters.batches import targets_of
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.empirical import EmpiricalPosterior
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.mixture import MixturePosterior
from lowrank_bdl.prediction.draws import WeightDraws
from lowrank_bdl.prediction.predict import predict, predict_batches


class Posterior:
    """θ = mean + 0.3 z; counts its calls."""

    def __init__(self, layout, model):
        self.layout, self.mean, self.calls = layout, layout.flatten(model), 0

    def sample(self, n, *, generator=None):
        self.calls += 1
        noise = torch.randn(n, len(self.mean), generator=generator, dtype=self.mean.dtype)
        return self.mean + 0.3 * noise


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.head = nn.Linear(3, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1  # a network that writes into its own buffer
        return self.head(self.dropout(self.norm(self.conv(x)).relu()).mean((2, 3)))


def conv_problem(dtype=torch.float64, sizes=(6, 6, 3), seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ConvNet().to(dtype)
        loader = [(torch.randn(n, 1, 5, 5, dtype=dtype), torch.randint(4, (n,))) for n in sizes]
    return model, Posterior(ParameterLayout.from_module(model), model), loader


def run(model, posterior, loader, num_samples=5, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "progress": False, "bn_loader": "stored", **options}
    return predict(model, posterior, loader, num_samples, **options)


def thetas_of(posterior, num_samples=5, seed=0):
    """The very draws predict uses, through its public parts."""
    return torch.stack(list(WeightDraws(posterior, num_samples, torch.Generator().manual_seed(seed))))


def assert_close64(actual, expected, rtol=1e-12):
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("recalibrated", [False, True])
def test_classification_by_hand(recalibrated):
    model, posterior, loader = conv_problem()
    bn_loader = [x for x, _ in conv_problem(sizes=(8, 8, 5), seed=1)[2]]
    found = run(model, posterior, loader, bn_loader=bn_loader if recalibrated else "stored", keep_samples=True)
    probs = []
    for theta in thetas_of(posterior):
        other = copy.deepcopy(model)
        posterior.layout.assign_(other, theta)
        if recalibrated:
            recalibrate_batch_norm_(other, bn_loader)
        other.eval()
        probs.append(torch.cat([other(x).softmax(1) for x, _ in loader]).detach())
    probs, y = torch.stack(probs), torch.cat([y for _, y in loader])
    assert probs.std(0).max() > 0.01  # the samples differ
    per_sample = probs[:, torch.arange(15), y].log()
    mean = probs.mean(0)
    entropy, expected_entropy = -(mean * mean.log()).sum(1), -(probs * probs.log()).sum(2).mean(0)
    assert_close64(found.mean, mean)
    assert_close64(found.sample_means, probs)
    assert_close64(found.sample_log_likelihood, per_sample)
    assert_close64(found.entropy, entropy)
    assert_close64(found.expected_entropy, expected_entropy)
    assert_close64(found.mutual_information, entropy - expected_entropy)
    assert_close64(found.log_likelihood, mean[torch.arange(15), y].log())
    assert torch.equal(found.targets, y)
    assert found.num_samples == 5
    assert found.nll == pytest.approx(-mean[torch.arange(15), y].log().mean().item(), rel=1e-12)
    assert found.accuracy == (mean.argmax(1) == y).double().mean().item()
    one_hot = nn.functional.one_hot(y, 4)
    assert found.brier == pytest.approx((mean - one_hot).square().sum(1).mean().item(), rel=1e-12)
    assert torch.equal(found.predicted_class, mean.argmax(1))
    curve = found.reliability_curve(1, "mass")
    assert curve.ece == pytest.approx(abs(found.accuracy - mean.max(1).values.mean().item()), rel=1e-12)
    for n in range(1, 6):
        expected = -probs[:n].mean(0)[torch.arange(15), y].log().mean().item()
        assert found.nll_by_num_samples[n - 1].item() == pytest.approx(expected, rel=1e-12)
    assert (found.mutual_information > 0).all()


def test_batch_norm_loader_changes_the_prediction_and_is_read_once():
    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    model, posterior, loader = conv_problem()
    bn_loader = Counted(loader)
    with_statistics = run(model, posterior, loader, bn_loader=bn_loader, max_bytes=0)
    assert bn_loader.passes == 1
    assert not torch.allclose(with_statistics.mean, run(model, posterior, loader).mean)


@pytest.mark.parametrize("with_bn", [False, True])
def test_draws_that_do_not_fit_are_regenerated_with_the_same_result(with_bn):
    model, posterior, loader = conv_problem()
    bn_loader = loader if with_bn else "stored"
    held = run(model, posterior, loader, bn_loader=bn_loader)
    calls = posterior.calls
    assert calls == 5
    again = run(model, posterior, loader, bn_loader=bn_loader, max_bytes=2 * posterior.mean.nbytes)
    assert posterior.calls - calls == 2 + 3 * (6 if with_bn else 3)  # three are drawn again for every batch
    for name in ("mean", "entropy", "mutual_information", "sample_log_likelihood"):
        assert torch.equal(getattr(held, name), getattr(again, name))


def test_the_same_samples_serve_every_batch():
    model, posterior, loader = conv_problem()
    whole = [(torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader]))]
    assert_close64(run(model, posterior, loader).mean, run(model, posterior, whole).mean, rtol=1e-13)


def test_the_model_is_not_changed():
    model, posterior, loader = conv_problem()
    model.train()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    ids = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    rng = torch.get_rng_state()
    run(model, posterior, loader, bn_loader=loader)
    with pytest.raises(RuntimeError, match="to have 1 channels"):
        run(model, posterior, [torch.zeros(2, 2, 5, 5, dtype=torch.float64)])
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before) and list(after) == list(before)
    assert [module.training for module in model.modules()] == modes
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == ids
    assert torch.equal(torch.get_rng_state(), rng)  # no dropout, no global draw
    assert not model.conv.weight.requires_grad and model.head.weight.grad is None


def test_same_seed_same_result_other_seed_other_result():
    model, posterior, loader = conv_problem()
    assert torch.equal(run(model, posterior, loader).mean, run(model, posterior, loader).mean)
    assert not torch.equal(run(model, posterior, loader).mean, run(model, posterior, loader, seed=1).mean)


def test_given_weights():
    model, posterior, loader = conv_problem()
    thetas = thetas_of(posterior)
    drawn = run(model, posterior, loader)
    given = run(model, thetas, loader, num_samples=99)
    assert given.num_samples == 5 and torch.equal(given.mean, drawn.mean)
    one = run(model, thetas[0], loader)
    model.eval()
    assert one.num_samples == 1
    posterior.layout.assign_(model, thetas[0])
    with torch.no_grad():
        assert_close64(one.mean, torch.cat([model(x).softmax(1) for x, _ in loader]))
    assert one.mutual_information.abs().max() < 1e-14  # one sample knows nothing of the others


def test_part_of_the_parameters_through_the_layout():
    model, _, loader = conv_problem()
    layout = ParameterLayout.from_module(model, "head")
    posterior = Posterior(layout, model)
    found = run(model, posterior, loader)
    probs = []
    for theta in thetas_of(posterior):
        other = copy.deepcopy(model).eval()
        layout.assign_(other, theta)
        probs.append(torch.cat([other(x).softmax(1) for x, _ in loader]).detach())
    assert_close64(found.mean, torch.stack(probs).mean(0))
    posterior.layout = None
    assert torch.equal(run(model, posterior, loader, layout=layout).mean, found.mean)
    with pytest.raises(ShapeError, match=r"vectors of length 52 as in the layout; got 16"):
        run(model, posterior, loader)


def test_data_and_draws_are_moved_to_the_model(device):
    model, posterior, loader = conv_problem()
    expected = run(model, posterior, loader, bn_loader=loader)
    found = run(model.to(device), posterior, loader, bn_loader=loader)  # the posterior and its generator stay
    assert found.mean.device.type == found.targets.device.type == device.type
    torch.testing.assert_close(found.mean, expected.mean.to(device), rtol=1e-9, atol=1e-12)
    posterior.mean = posterior.mean.to(device)
    given = run(model, posterior.mean, [x for x, _ in loader])
    assert given.mean.device.type == device.type


def test_float32_agrees_with_float64():
    model, posterior, loader = conv_problem()
    thetas = thetas_of(posterior)
    exact = run(model, thetas, loader)
    single = run(model.float(), thetas, [(x.float(), y) for x, y in loader])  # theta is cast, x must fit the model
    assert single.mean.dtype == single.entropy.dtype == single.sample_log_likelihood.dtype == torch.float32
    for name in ("mean", "entropy", "expected_entropy", "log_likelihood"):
        assert_close64(getattr(single, name), getattr(exact, name), rtol=1e-5)
    assert (single.mutual_information - exact.mutual_information).abs().max() < 1e-6


def test_half_precision_models_give_single_precision_probabilities():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 4).bfloat16()
    loader = [(torch.eye(3).bfloat16(), torch.tensor([0, 1, 2]))]
    found = run(model, Posterior(ParameterLayout.from_module(model), model), loader)
    assert found.mean.dtype == found.log_likelihood.dtype == torch.float32
    assert_close64(found.mean.sum(1), torch.ones(3, dtype=torch.float64), rtol=1e-6)


def linear_problem(outputs=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(3, outputs).double()
        x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    return model, Posterior(ParameterLayout.from_module(model), model), [(x[:4], y[:4]), (x[4:], y[4:])]


@pytest.mark.parametrize("head", ["fixed", "tensor", "pair"])
def test_regression_by_hand(head):
    model, posterior, loader = linear_problem(2 if head == "fixed" else 4)
    options = {"fixed": {"noise_variance": 0.5}, "tensor": {}, "pair": {"call_fn": lambda m, b: split(m(b[0]))}}[head]

    def split(f):
        return f[:, :2], torch.nn.functional.softplus(f[:, 2:])

    found = run(model, posterior, loader, likelihood="gaussian", keep_samples=True, **options)
    x, y = (torch.cat([batch[i] for batch in loader]) for i in (0, 1))
    f = torch.stack([x @ t[: 3 * (len(t) // 4)].view(-1, 3).T + t[3 * (len(t) // 4) :] for t in thetas_of(posterior)])
    mu, var = (f, torch.full_like(f, 0.5)) if head == "fixed" else (f[..., :2], (1 + f[..., 2:].exp()).log())
    per_sample = (-0.5 * ((y - mu).square() / var + (2 * math.pi * var).log())).sum(-1)
    mean, total = mu.mean(0), (var + mu.square()).mean(0) - mu.mean(0).square()
    entropy = (0.5 * (2 * math.pi * math.e * total).log()).sum(-1)
    expected_entropy = (0.5 * (2 * math.pi * math.e * var).log()).sum(-1).mean(0)
    for actual, expected in {
        found.mean: mean,
        found.variance: total,
        found.aleatoric_variance: var.mean(0),
        found.epistemic_variance: mu.var(0, correction=0),
        found.sample_means: mu,
        found.sample_log_likelihood: per_sample,
        found.log_likelihood: per_sample.exp().mean(0).log(),
        found.entropy: entropy,
        found.expected_entropy: expected_entropy,
        found.mutual_information: entropy - expected_entropy,
    }.items():
        assert_close64(actual, expected, rtol=1e-11)
    assert torch.equal(found.targets, y)
    moment_matched = torch.distributions.Normal(mean, total.sqrt()).log_prob(y).sum(-1)
    assert (moment_matched - found.log_likelihood).abs().max() > 1e-3  # the mixture's, not the matched Gaussian's
    assert (found.mutual_information > 0).all()
    for ask in (lambda: found.accuracy, lambda: found.predicted_class, lambda: found.brier, found.reliability_curve):
        with pytest.raises(LowRankBDLError, match="needs class probabilities; the likelihood is a numeric one"):
            ask()


def test_one_target_without_an_axis_is_not_broadcast():
    model, posterior, loader = linear_problem(1)
    flat = run(model, posterior, [(x, y[:, 0]) for x, y in loader], likelihood="gaussian", noise_variance=1.0)
    column = run(model, posterior, [(x, y[:, :1]) for x, y in loader], likelihood="gaussian", noise_variance=1.0)
    assert flat.sample_log_likelihood.shape == (5, 7)
    assert torch.equal(flat.sample_log_likelihood, column.sample_log_likelihood)


def test_other_likelihoods():
    model, posterior, loader = linear_problem(1)
    binary = [(x, (y[:, :1] > 0).long()) for x, y in loader]
    found = run(model, posterior, binary, likelihood=lambda f: Bernoulli(logits=f))
    p = found.mean
    assert p.shape == (7, 1)
    assert_close64(found.entropy, -(p * p.log() + (1 - p) * (1 - p).log()))
    assert (found.mutual_information > 0).all()
    y = torch.cat([y for _, y in binary])
    assert_close64(found.log_likelihood, torch.where(y == 1, p, 1 - p).log())
    counts = [(x, y[:, :1].abs().round()) for x, y in loader]
    rates = run(model, posterior, counts, likelihood=lambda f: Independent(Poisson(f.exp()), 1))
    assert rates.entropy is None and rates.mutual_information is None  # torch has no closed form
    assert rates.sample_log_likelihood.shape == (5, 7)
    assert_close64(rates.variance, rates.mean + rates.epistemic_variance)
    heavy = run(model, posterior, counts, likelihood=lambda f: StudentT(5.0, f))
    assert heavy.entropy is None and heavy.expected_entropy.shape == (7, 1)


def test_dense_classification_keeps_positions_before_classes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Conv2d(1, 3, 3, padding=1).double()
        loader = [(torch.randn(n, 1, 4, 5).double(), torch.randint(3, (n, 4, 5))) for n in (2, 1)]
    posterior = Posterior(ParameterLayout.from_module(model), model)
    found = run(model, posterior, loader)
    assert found.mean.shape == (3, 4, 5, 3) and found.entropy.shape == (3, 4, 5)
    assert found.sample_log_likelihood.shape == (5, 3, 4, 5)
    probs = torch.stack(
        [
            torch.cat([nn.functional.conv2d(x, t[:27].view(3, 1, 3, 3), t[27:], padding=1) for x, _ in loader])
            for t in thetas_of(posterior)
        ]
    ).softmax(2)
    y = torch.cat([y for _, y in loader])
    assert_close64(found.mean.movedim(-1, 1), probs.mean(0))
    assert_close64(found.log_likelihood, probs.mean(0).gather(1, y.unsqueeze(1)).squeeze(1).log())
    assert found.nll_by_num_samples.shape == (5,)
    assert found.nll_by_num_samples[-1].item() == pytest.approx(found.nll, rel=1e-12)


def test_tokens_as_independent_classes():
    model, posterior, loader = linear_problem(6)
    tokens = [(x, torch.ones(len(x), 2).long()) for x, _ in loader]
    found = run(model, posterior, tokens, likelihood=lambda f: Independent(Categorical(logits=f.view(-1, 2, 3)), 1))
    assert found.mean.shape == (7, 2, 3)
    assert found.sample_log_likelihood.shape == (5, 7)
    assert (found.mutual_information > 0).all()


def test_unlabelled_data_and_dictionaries():
    model, posterior, loader = conv_problem()
    labelled = run(model, posterior, loader)
    for batches in ([x for x, _ in loader], [(x,) for x, _ in loader], [[x, None] for x, _ in loader]):
        found = run(model, posterior, batches)
        assert torch.equal(found.mean, labelled.mean) and found.targets is None
        for name in ("nll", "accuracy", "brier", "log_likelihood", "nll_by_num_samples"):
            with pytest.raises(LowRankBDLError, match="needs targets; the loader gave none"):
                getattr(found, name)
    batches = [{"image": x, "labels": y} for x, y in loader]
    found = run(model, posterior, batches, call_fn=lambda m, b: m(b["image"]), bn_loader=batches)
    assert torch.equal(found.mean, run(model, posterior, loader, bn_loader=loader).mean)
    assert torch.equal(found.targets, labelled.targets)
    batches = [(x, x, {"class": y}) for x, y in loader]
    found = run(model, posterior, batches, call_fn=lambda m, b: m(b[1]), target_fn=lambda b: b[2]["class"])
    assert torch.equal(found.sample_log_likelihood, labelled.sample_log_likelihood)


def test_targets_are_found_in_what_loaders_give():
    y = torch.zeros(2)
    for batch in ((None, y), [None, y], {"x": 1, "target": y}, {"label": y}):
        assert targets_of(batch) is y
    for batch in (y, (y,), (y, y, y), {"x": y}, (y, ["a", "b"])):
        assert targets_of(batch) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mutual_information_is_not_negative_even_for_nearly_equal_samples(dtype):
    model, posterior, loader = conv_problem(dtype)
    noise = torch.randn(4, posterior.mean.numel(), generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = run(model, posterior.mean + 1e-3 * noise, loader).mutual_information
    assert found.min() >= 0 and 0 < found.max() < 1e-4
    assert run(model, posterior.mean, loader).mutual_information.abs().max() == 0
    model, posterior, loader = linear_problem(2)
    model = model.to(dtype)
    thetas = posterior.mean.to(dtype) + 1e-3 * noise[:, :8]
    options = {"likelihood": "gaussian", "noise_variance": 0.1}
    found = run(model, thetas, [(x.to(dtype), y) for x, y in loader], **options).mutual_information
    assert found.min() > 0 and found.max() < 1e-3


def test_wild_samples_are_named():
    model, posterior, loader = conv_problem()
    thetas = thetas_of(posterior)
    thetas[2, -1] = torch.nan
    with pytest.raises(NonFiniteError, match="not be NaN .* sample 2 in batch 0"):
        run(model, thetas, loader)
    model, posterior, loader = linear_problem(2)
    thetas = thetas_of(posterior)
    with pytest.raises(NonFiniteError, match="variances must be > 0; got others from sample 0 in batch 0"):
        run(model, thetas, loader, likelihood="gaussian", call_fn=lambda m, b: (m(b[0]), 0 * m(b[0])))


def test_bad_input_is_refused():
    model, posterior, loader = conv_problem()
    with pytest.raises(ShapeError, match="loader must give at least one batch; got none"):
        run(model, posterior, [])
    with pytest.raises(ShapeError, match="loader must give at least one batch; got none"):
        run(model, posterior, loader, bn_loader=[])
    with pytest.raises(ShapeError, match="num_samples must be at least 1; got 0"):
        run(model, posterior, loader, num_samples=0)
    with pytest.raises(ShapeError, match=r"shape \(52,\) or \(S, 52\) with S >= 1; got \(3, 51\)"):
        run(model, torch.zeros(3, 51), loader)
    with pytest.raises(ShapeError, match=r"got \(0, 52\)"):
        run(model, torch.zeros(0, 52), loader)
    with pytest.raises(ShapeError, match="differ first at parameter 'conv.weight'"):
        run(nn.Linear(2, 2), posterior, loader)
    with pytest.raises(ShapeError, match=r"all batches must have sample_log_likelihood or none; got it from 1 of 2"):
        run(model, posterior, [loader[0], loader[1][0]])
    with pytest.raises(ShapeError, match=r"integer class indices of shape \(6,\)"):
        run(model, posterior, [(loader[0][0], loader[0][1].double())])
    with pytest.raises(ValueError, match="got 'probit'"):
        run(model, posterior, loader, likelihood="probit")
    with pytest.raises(ShapeError, match="unless call_fn is given; .* does not take"):
        run(model, posterior, [{"nothing": 1}])
    with pytest.raises(TypeError, match=r"must draw weights, sample\(n, generator=\), .* got ParameterLayout"):
        run(model, posterior.layout, loader)
    growing = iter(range(2, 9))
    with pytest.raises(ShapeError, match=r"prediction must have shape \(6, 2\); got \(6, 3\)"):
        run(model, posterior, [loader[0][0]], call_fn=lambda m, b: m(b).new_zeros(6, next(growing)))
    growing = iter([2] * 5 + [3] * 5)
    with pytest.raises(ShapeError, match=r"must give mean of one shape an example; got \[\(2,\), \(3,\)\]"):
        run(model, posterior, [loader[0][0]] * 2, call_fn=lambda m, b: m(b).new_zeros(6, next(growing)))
    with pytest.raises(LowRankBDLError, match="these are classes: see entropy"):
        _ = run(model, posterior, loader).variance


def test_progress_bars_can_be_switched_off(terminal):
    model, posterior, loader = conv_problem()
    run(model, posterior, loader, bn_loader=loader)
    assert terminal.readouterr().err == ""
    run(model, posterior, loader, bn_loader=loader, progress=True)
    shown = terminal.readouterr().err
    assert "batch-norm statistics:   0%" in shown and "predict:   0%" in shown and "0/3" in shown
    assert shown.endswith("\r") and "\n" not in shown  # nothing is left on the screen


def test_a_fraction_of_the_batch_norm_batches():
    model, posterior, loader = conv_problem(sizes=(6, 6, 3, 5))
    found = run(model, posterior, loader, bn_loader=loader, bn_fraction=0.5)
    assert torch.equal(found.mean, run(model, posterior, loader, bn_loader=loader[:2]).mean)
    assert not torch.equal(found.mean, run(model, posterior, loader, bn_loader=loader).mean)
    with pytest.raises(ValueError, match=r"fraction of batches must be in \(0, 1\]; got 1.5"):
        run(model, posterior, loader, bn_loader=loader, bn_fraction=1.5)
    with pytest.raises(TypeError, match="loader that knows its length; got list_iterator without one"):
        run(model, posterior, loader, bn_loader=iter(loader), bn_fraction=0.5)


class Numbered(Posterior):
    """Draw s is around s: which one is asked for shows in the result."""

    def draw(self, s, *, generator=None):
        return self.mean + s + 0.1 * torch.randn(len(self.mean), generator=generator, dtype=self.mean.dtype)


def test_numbered_draws_are_used_where_there_are_any():
    model, posterior, loader = conv_problem()
    numbered = Numbered(posterior.layout, model)
    thetas = thetas_of(numbered)
    assert [round((theta - numbered.mean).mean().item()) for theta in thetas] == [0, 1, 2, 3, 4]
    found = run(model, numbered, loader, max_bytes=0)
    assert torch.equal(found.mean, run(model, thetas, loader).mean) and numbered.calls == 0
    assert torch.equal(thetas_of(numbered, 3), thetas[:3])  # draw s does not depend on S


class Ensemble(Posterior):
    def __init__(self, layout, model, thetas):
        super().__init__(layout, model)
        self.thetas = thetas

    def members(self, num=None):
        return self.thetas if num is None else self.thetas[torch.linspace(0, len(self.thetas) - 1, num).round().long()]


def test_an_ensemble_is_averaged_over_its_members():
    model, posterior, loader = conv_problem()
    thetas = thetas_of(posterior)
    ensemble = Ensemble(posterior.layout, model, thetas)
    for asked in (5, 30):
        found = run(model, ensemble, loader, num_samples=asked, bn_loader=loader)
        assert found.num_samples == 5 and ensemble.calls == 0
        assert torch.equal(found.mean, run(model, thetas, loader, bn_loader=loader).mean)
    some = run(model, ensemble, loader, num_samples=3)
    assert torch.equal(some.mean, run(model, thetas[[0, 2, 4]], loader).mean)
    with pytest.raises(ShapeError, match="num_samples must be at least 1; got 0"):
        run(model, ensemble, loader, num_samples=0)
    with pytest.raises(ShapeError, match=r"or \(S, 52\) with S >= 1; got \(5, 51\)"):
        run(model, Ensemble(posterior.layout, model, thetas[:, 1:]), loader)


def test_the_librarys_own_mixtures_and_ensembles():
    model, posterior, loader = conv_problem()
    far = [
        GaussianPosterior.diagonal(posterior.mean + shift, torch.full_like(posterior.mean, 0.01), posterior.layout)
        for shift in (0.0, 1.0)
    ]
    drawn = thetas_of(MixturePosterior(far), 6)
    centres = [round((theta - posterior.mean).mean().item()) for theta in drawn]
    assert sorted(centres) == [0, 0, 0, 1, 1, 1]  # its share each; plain draws: 1 time in 3
    found = run(model, MixturePosterior(far), loader, num_samples=6)
    assert torch.equal(found.mean, run(model, drawn, loader).mean)
    ensemble = EmpiricalPosterior(drawn, posterior.layout)
    assert torch.equal(run(model, ensemble, loader, num_samples=30).mean, found.mean)
    assert torch.equal(
        run(model, ensemble, loader, num_samples=3).sample_log_likelihood, found.sample_log_likelihood[1::2]
    )


@pytest.mark.parametrize("dropout", [False, True])
def test_batch_by_batch_is_the_same_prediction(dropout):
    model, posterior, loader = conv_problem()
    options = dict(bn_loader=[x for x, _ in loader], dropout=dropout, keep_samples=True)
    whole = run(model, posterior, loader, **options)
    taken = []

    def watched():
        for batch in loader:
            taken.append(batch)
            yield batch

    before, mode = copy.deepcopy(model.state_dict()), model.training
    found = predict_batches(
        model, posterior, watched(), 5, generator=torch.Generator().manual_seed(0), progress=False, **options
    )
    assert not taken
    start = 0
    for i, part in enumerate(found):
        assert len(taken) == i + 1  # nothing is read ahead, and while a batch is ours the model is as it was
        assert model.training == mode and model.dropout.training == mode
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        stop = start + len(part.mean)
        for name in ("mean", "entropy", "expected_entropy", "mutual_information", "targets"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[start:stop])
        for name in ("sample_log_likelihood", "sample_means"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, start:stop])
        assert part.num_samples == whole.num_samples == 5
        start = stop
    assert start == len(whole.mean)
    with pytest.raises(ShapeError, match="at least one batch; got none"):
        next(predict_batches(model, posterior, [], bn_loader="stored", progress=False))


def test_its_representation_is_three_lines_of_shapes():
    """Not the numbers, which can be millions."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    x, y = torch.randn(50, 3), torch.randint(2, (50,))
    theta = torch.cat([p.detach().flatten() for p in network.parameters()])
    text = repr(predict(network, theta, [(x, y)], progress=False))
    assert len(text.splitlines()) == 3 and len(text) < 300
    assert "mean=(50, 2) torch.float32" in text and "targets=(50,)" in text and "tensor(" not in text
