"""Gradient covariance against dense float64 sums over single examples, and its unbiasedness by enumeration.

The expectations here are exact sums over every possible outcome, so that their false-alarm rate is zero and a wrong
divisor (T in place of T - 1, no correction for the mean) fails by 10 % or more.
"""

from functools import partial
from itertools import permutations, product

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from lowrank_bdl.curvature.gradient_covariance import GradientCovariance
from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, NotPSDError, ShapeError, StaleError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.swag import SWAG
from tests.curvature.cases import batches, build
from tests.oracles import assert_close

SIZES = (2, 3, 1, 3, 2)


def example_gradients(net, x, y, loss_fn=cross_entropy, layout=None):
    """Gradients (N, D) of single examples by one backward pass each, batch norm by stored statistics."""
    layout = ParameterLayout.from_module(net) if layout is None else layout
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    rows = []
    for number in range(len(y)):
        weights = {name: w.detach().requires_grad_() for name, w in layout.unflatten(layout.flatten(net)).items()}
        loss = loss_fn(functional_call(net, weights, (x[number : number + 1],)), y[number : number + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(weights.values()))]))
    for module, mode in modes:
        module.training = mode
    return torch.stack(rows).double()


def scatter_root(gradients, sizes):
    """Weighted batch means minus the overall mean, shape (T, D), each by the root of its size; and the mean."""
    mean = gradients.mean(0)
    parts = gradients.split(list(sizes))
    return torch.stack([len(part) ** 0.5 * (part.mean(0) - mean) for part in parts]), mean


def collect(net, data, loss_fn=cross_entropy, **options):
    noise = GradientCovariance(net, loss_fn, **options)
    for batch in data:
        noise.update(batch)
    return noise


@pytest.mark.parametrize("rank", [0, 1, 3, 4, 5, 20])
@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "tied"])
def test_agrees_with_single_examples_for_ragged_batches(name, rank):
    net, x, y = build(name, count=sum(SIZES))
    noise = collect(net, batches(x, y, SIZES), rank=rank)
    rows, mean = scatter_root(example_gradients(net, x, y), SIZES)
    number, size = len(SIZES), max(SIZES)
    variance = rows.square().sum(0) / (number - 1) / size
    kept = rows if number <= rank + 1 else rows[number - rank :]
    low_rank = kept.mT @ kept / (number - 1) / size

    assert (noise.num_gradients, noise.num_examples, noise.batch_size) == (number, sum(SIZES), size)
    assert_close(noise.mean, mean)
    assert_close(noise.variance, variance)
    covariance = noise.covariance
    assert isinstance(covariance, LowRankPlusDiagLinearOperator)
    assert_close(covariance.to_dense(), low_rank + torch.diag(variance - low_rank.diagonal()))
    assert_close(torch.tensor(noise.trace, dtype=torch.float64), variance.sum())
    assert_close(covariance.diagonal(), variance)
    if rank >= number - 1:
        assert not covariance.diag.any(), "the sample covariance has no diagonal part, not even one of rounding"


def test_summaries_of_ragged_batches():
    net, x, y = build("mlp", count=sum(SIZES))
    noise = collect(net, batches(x, y, SIZES), rank=3)
    rows, mean = scatter_root(example_gradients(net, x, y), SIZES)
    per_example = rows.square().sum() / (len(SIZES) - 1)  # trace of the covariance of one example's gradient
    squared = mean @ mean - per_example / sum(SIZES)
    for value, expected in (
        (noise.squared_gradient_norm, squared),
        (noise.signal_to_noise, squared / (per_example / 3)),
        (noise.optimal_learning_rate(0.9, 16, num_data=50), 2 * 0.1 * len(mean) / (50 * per_example / 16)),
        (noise.optimal_learning_rate(num_data=50), 2 * len(mean) / (50 * per_example / 3)),
    ):
        assert_close(torch.tensor(value, dtype=torch.float64), expected)
    assert noise.noise_scale == (pytest.approx(float(per_example / squared), rel=1e-12) if squared > 0 else torch.inf)


def test_noise_scale_is_infinite_where_no_gradient_is_seen_and_zero_without_noise():
    net = nn.Linear(1, 1, bias=False).double()

    def loss_fn(outputs, targets):
        return (outputs * targets).mean()

    ones = torch.ones(1, 1, dtype=torch.float64)
    balanced = collect(net, [(ones, ones), (ones, -ones)], loss_fn)
    assert balanced.squared_gradient_norm == pytest.approx(-1.0)  # mean 0, variance 2 over 2 examples
    assert balanced.noise_scale == torch.inf and balanced.signal_to_noise == pytest.approx(-0.5)
    constant = collect(net, [(ones, ones), (ones, ones)], loss_fn)
    assert constant.noise_scale == 0 and constant.signal_to_noise == torch.inf
    assert constant.optimal_learning_rate(num_data=10) == torch.inf
    with pytest.raises(ValueError, match="an alignment needs noise; all gradients are equal"):
        constant.alignment(torch.ones(1))


@pytest.mark.parametrize("name", ["conv", "residual", "positions", "recurrent"])
def test_gradients_an_example(name):
    net, x, y = build(name)
    noise = collect(net, batches(x, y), per_example=True, rank=10)
    gradients = example_gradients(net, x, y)
    assert (noise.num_gradients, noise.num_examples, noise.batch_size) == (7, 7, 1)
    assert_close(noise.mean, gradients.mean(0))
    assert_close(noise.covariance.to_dense(), torch.cov(gradients.mT))


# ---- unbiasedness ----------------------------------------------------------------------------------------------------

PARTITION_SIZES = (2, 1, 2, 1)


def linear_data(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    y = torch.randn(count, 1, dtype=torch.float64, generator=generator)
    net = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.3, -0.7]]))
    return net, x, y


def test_every_partition_of_a_data_set_averages_to_the_covariance_of_its_examples():
    net, x, y = linear_data(6)
    truth = torch.cov(example_gradients(net, x, y, mse_loss).mT)
    partitions = {
        tuple(tuple(sorted(part)) for part in (order[:2], order[2:3], order[3:5], order[5:]))
        for order in permutations(range(6))
    }
    assert len(partitions) == 180
    noise = GradientCovariance(net, mse_loss, rank=1)
    sums = torch.zeros(2, 2, 2, dtype=torch.float64)
    diagonals = torch.zeros(2, dtype=torch.float64)
    for partition in partitions:
        noise.reset()
        for part in partition:
            noise.update((x[list(part)], y[list(part)]))
        sums[0] += noise.recent_covariance.to_dense() * noise.batch_size
        sums[1] += torch.diag(noise.variance) * noise.batch_size
        diagonals += noise.covariance.diagonal() * noise.batch_size
    assert_close(sums[0] / 180, truth)  # from a single gradient kept of four
    assert_close(sums[1].diagonal() / 180, truth.diagonal())
    assert_close(diagonals / 180, truth.diagonal())


def test_every_draw_of_independent_batches_averages_to_covariance_and_squared_norm():
    net, x, y = linear_data(3, seed=1)
    gradients = example_gradients(net, x, y, mse_loss)
    truth = torch.cov(gradients.mT, correction=0)  # each example is drawn from these three, with replacement
    noise = GradientCovariance(net, mse_loss, rank=1)
    draws = list(product(range(3), repeat=4))
    total, squared = torch.zeros(2, 2, dtype=torch.float64), 0.0
    for draw in draws:
        noise.reset()
        for part in (draw[:2], draw[2:3], draw[3:]):
            noise.update((x[list(part)], y[list(part)]))
        total += noise.recent_covariance.to_dense() * noise.batch_size / len(draws)
        squared += noise.squared_gradient_norm / len(draws)
    assert_close(total, truth)
    assert_close(torch.tensor(squared, dtype=torch.float64), gradients.mean(0).square().sum())


# ---- alignment -------------------------------------------------------------------------------------------------------


def test_alignment_is_the_share_of_noise_along_a_direction():
    net, x, y = build("mlp", count=sum(SIZES))
    noise = collect(net, batches(x, y, SIZES), rank=10)
    dense = noise.covariance.to_dense()
    basis = torch.linalg.qr(torch.randn(28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    shares = noise.alignment(basis * 7)
    assert_close(shares, torch.einsum("ik,ij,jk->k", basis, dense, basis) / dense.trace())
    assert_close(shares.sum(), torch.ones((), dtype=torch.float64))
    assert noise.alignment(basis[:, 0]).shape == ()
    variances, directions = noise.recent_covariance.principal_components(2)
    assert_close(noise.alignment(directions), variances / noise.trace)


def test_alignment_refuses_what_is_no_direction():
    net, x, y = build("mlp", count=sum(SIZES))
    noise = collect(net, batches(x, y, SIZES), rank=2)
    with pytest.raises(ShapeError, match=r"directions must have shape \(28,\) or \(28, k\); got \(3, 28\)"):
        noise.alignment(torch.ones(3, 28))
    with pytest.raises(ValueError, match="directions must be finite and not zero"):
        noise.alignment(torch.zeros(28))
    with pytest.raises(ValueError, match="needs rank >= 1; got rank 0"):
        collect(net, batches(x, y, SIZES), rank=0).alignment(torch.ones(28))


@pytest.mark.parametrize("rank", [0, 2, 10])
def test_overlap_with_the_covariance_of_the_iterates(rank):
    net, x, y = build("mlp", count=sum(SIZES))
    noise = collect(net, batches(x, y, SIZES), rank=rank)
    generator = torch.Generator().manual_seed(5)
    swag = SWAG(net, rank=3)
    layout = swag.layout
    start = layout.flatten(net)
    for _ in range(4):
        layout.assign_(net, start + torch.randn(28, dtype=torch.float64, generator=generator))
        swag.update_parameters(net)
    other = swag.posterior().covariance
    own, dense = noise.covariance.to_dense(), other.to_dense()
    expected = (own * dense).sum() / own.norm() / dense.norm()
    assert 0.05 < expected < 0.95
    assert_close(torch.tensor(noise.overlap(other), dtype=torch.float64), expected)
    assert noise.overlap(noise.covariance * 3.0) == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(ShapeError, match=r"covariance must have shape \(28, 28\); got \(2, 2\)"):
        noise.overlap(LowRankPlusDiagLinearOperator(torch.ones(2, 1), torch.ones(2)))
    zero = LowRankPlusDiagLinearOperator(torch.zeros(28, 1).double(), torch.zeros(28).double())
    with pytest.raises(ValueError, match="two covariances that are not zero"):
        noise.overlap(zero)


# ---- fixed weights ---------------------------------------------------------------------------------------------------


def move_weight(net):
    net[0].weight.data.add_(1e-9)


def replace_weight(net):
    net[2].weight.data = net[2].weight.data * 2


def move_frozen(net):
    net[0].bias.data.mul_(1.1)


def move_statistics(net):
    net[1].running_mean.add_(0.1)


@pytest.mark.parametrize(
    ("move", "name"),
    [
        (move_weight, "0.weight"),
        (replace_weight, "2.weight"),
        (move_frozen, "0.bias"),
        (move_statistics, "1.running_mean"),
    ],
)
def test_refuses_weights_that_moved(move, name):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    net[0].bias.requires_grad_(False)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    data = batches(x, y, (2, 2, 2))
    noise = collect(net, data[:2], rank=2)
    move(net)
    with pytest.raises(StaleError, match=f"first of the 2 gradients; '{name}' has changed. Call reset"):
        noise.update(data[2])
    assert noise.num_gradients == 2
    noise.reset()
    for batch in data:
        noise.update(batch)
    again = collect(net, data, rank=2)
    assert torch.equal(noise.covariance.to_dense(), again.covariance.to_dense())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_covariance_is_stale_after_an_update(rank):
    net, x, y = build("mlp", count=sum(SIZES))
    data = batches(x, y, SIZES)
    noise = collect(net, data[:4], rank=rank)
    covariance = noise.covariance
    noise.update(data[4])
    with pytest.raises(StaleError, match="its collector was updated"):
        covariance.diagonal()


def test_the_sample_covariance_has_no_inverse_and_says_so():
    net, x, y = build("mlp", count=sum(SIZES))
    covariance = collect(net, batches(x, y, SIZES), rank=20).covariance
    with pytest.raises(NotPSDError, match="zero diagonal under a non-zero root"):
        covariance.logdet()
    with pytest.raises(NotPSDError, match="zero diagonal under a non-zero root"):
        covariance.solve(torch.ones(28, dtype=torch.float64))


# ---- the network -----------------------------------------------------------------------------------------------------


def test_batch_norm_by_the_batch_leaves_statistics_and_modes_alone():
    net, x, y = build("residual", count=9)
    net.bn.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    sizes = (4, 3, 2)
    noise = collect(net, batches(x, y, sizes), rank=5, bn_mode="train")
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    net.train()
    rows = []
    for inputs, targets in batches(x, y, sizes):
        net.zero_grad()
        cross_entropy(net(inputs), targets).backward()  # this moves the running statistics, which play no part
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    weights = torch.tensor(sizes, dtype=torch.float64)
    mean = (weights[:, None] * torch.stack(rows)).sum(0) / 9
    root = weights.sqrt()[:, None] * (torch.stack(rows) - mean)
    assert_close(noise.covariance.to_dense(), root.mT @ root / 2 / 4, cond=10)
    noise.update((x[:4], y[:4]))  # not stale


@pytest.mark.parametrize("per_example", [False, True])
def test_dropout_is_off_and_everything_may_run_in_inference_mode(per_example):
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    with torch.inference_mode():
        x, y = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
        noise = collect(net, [(x, y), (x, y)], rank=1, per_example=per_example)
        covariance = noise.covariance
    assert noise.trace == 0 and noise.num_gradients == (8 if per_example else 2) and noise.mean.norm() > 0
    assert not covariance.diagonal().any()
    noise.update((x, y))
    with pytest.raises(StaleError, match="its collector was updated"):
        covariance.diagonal()


def test_subset_sum_reduction_and_call_fn():
    net, x, y = build("mlp", count=sum(SIZES))
    data = batches(x, y, SIZES)
    whole = collect(net, data, rank=5)
    layout = ParameterLayout.from_module(net, include="0.*")
    part = layout.numel
    same = collect(net, data, lambda f, t: cross_entropy(f, t, reduction="sum"), include="0.*", reduction="sum", rank=5)
    assert_close(same.covariance.to_dense(), whole.covariance.to_dense()[:part, :part])
    doubled = collect(net, data, exclude="2.*", rank=5, call_fn=lambda model, batch: model(batch[0] / 2 * 2))
    assert_close(doubled.covariance.to_dense(), same.covariance.to_dense())


def test_float32_variance_of_gradients_that_differ_little_from_their_mean():
    net = nn.Linear(2, 1, bias=False)
    offsets = torch.tensor([0.0, 1.0, -1.0, 2.0]) * 2.0**-12
    rows = (1 + offsets)[:, None].expand(4, 2)
    noise = collect(net, [(row[None], torch.zeros(1, 1)) for row in rows], lambda f, _: f.mean(), rank=2)
    assert_close(noise.variance, torch.cov(rows.double().mT).diagonal(), torch.float32)
    assert noise.variance.dtype == torch.float32


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_refuses_unknown_options_and_missing_gradients():
    net, x, y = build("mlp")
    with pytest.raises(ValueError, match="rank must be >= 0; got -1"):
        GradientCovariance(net, cross_entropy, rank=-1)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum; got 'none'"):
        GradientCovariance(net, cross_entropy, reduction="none")
    with pytest.raises(ValueError, match="bn_mode must be one of eval, train; got 'on'"):
        GradientCovariance(net, cross_entropy, bn_mode="on")
    with pytest.raises(ValueError, match='an example need bn_mode="eval"'):
        GradientCovariance(net, cross_entropy, bn_mode="train", per_example=True)
    with pytest.raises(MemoryLimitError, match="a gradient covariance of rank 1000000000000 over 28 parameters needs"):
        GradientCovariance(net, cross_entropy, rank=10**12)
    noise = GradientCovariance(net, cross_entropy)
    with pytest.raises(ValueError, match=r"at least 1 gradient\(s\); got 0"):
        _ = noise.mean
    noise.update((x, y))
    for name in ("variance", "covariance", "recent_covariance", "trace", "noise_scale"):
        with pytest.raises(ValueError, match=r"at least 2 gradient\(s\); got 1"):
            getattr(noise, name)
    noise.update((x, y))
    for options, message in (
        ({"momentum": 1.0, "num_data": 5}, r"momentum must be in \[0, 1\); got 1.0"),
        ({"num_data": 0}, "num_data must be >= 1; got 0"),
        ({"num_data": 5, "batch_size": 0}, "batch_size must be >= 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            noise.optimal_learning_rate(**options)


@pytest.mark.parametrize("per_example", [False, True])
def test_refuses_bad_batches_and_counts_nothing(per_example):
    net, x, y = build("mlp")
    noise = GradientCovariance(net, cross_entropy, per_example=per_example)
    for batch, message in (
        (x, r"A batch must be \(x, y\), or .*: targets are needed; got Tensor"),
        ((x, y, y), r"A batch must be \(x, y\).*got tuple of 3 entries"),
        ((x[:0], y[:0]), r"at least one example on the first axis; got \(0,\)"),
        ((x, 3), "at least one example on the first axis; got int"),
    ):
        with pytest.raises(ShapeError, match=message):
            noise.update(batch)
    for loss_fn, message in (
        (lambda f, t: cross_entropy(f, t, reduction="none"), "must return a scalar tensor, the mean over the batch"),
        (lambda f, t: 1.0, "must return a scalar tensor.*got float"),
    ):
        with pytest.raises(ShapeError, match=message):
            GradientCovariance(net, loss_fn, per_example=per_example).update((x, y))
    assert noise.num_gradients == noise.num_examples == 0


def test_refuses_a_loss_that_does_not_depend_on_the_weights_and_inputs_it_cannot_split():
    net, x, y = build("mlp")
    with pytest.raises(ShapeError, match="must depend on the 3 parameters given"):
        GradientCovariance(net, lambda f, _: f.detach().mean()).update((x, y))
    with pytest.raises(ShapeError, match=r"with the 7 examples on one axis.* got outputs of shape \(6, 3\)"):
        GradientCovariance(net, cross_entropy, per_example=True).update((x[:6], y))


def test_a_gradient_that_is_not_finite_is_named_and_not_counted():
    net, x, y = build("mlp")
    bad = x.clone()
    bad[3, 1] = torch.nan
    noise = collect(net, [(x, y)], rank=3)
    with pytest.raises(NonFiniteError, match="that of parameter '0.weight' is nan"):
        noise.update((bad, y))
    assert noise.num_gradients == 1
    noise = GradientCovariance(net, cross_entropy, rank=3, per_example=True)
    with pytest.raises(NonFiniteError, match="in example 3 of the batch; the 3 before it were counted"):
        noise.update((bad, y))
    assert_close(noise.mean, example_gradients(net, x[:3], y[:3]).mean(0))


WEIGHTED = {
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)),
    "ignored": nn.CrossEntropyLoss(ignore_index=2),
    "smoothed": partial(
        cross_entropy, weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.1, ignore_index=1
    ),
    "entries": nn.MSELoss(),
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 3, 8], [1] * 12])
def test_the_mean_is_that_of_the_loss_over_all_data_however_they_are_cut(name, per_example, sizes):
    """Whatever the mean divides by; and gradients an example have the covariance of the scaled terms."""
    torch.manual_seed(0)
    net, loss_fn = nn.Linear(4, 3).double(), WEIGHTED[name]
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.tensor([0, 1, 2] * 4)
    if name == "entries":
        y = torch.randn(12, 3, dtype=torch.float64)
    noise = GradientCovariance(net, loss_fn, rank=20, per_example=per_example)
    for batch in zip(x.split(sizes), y.split(sizes), strict=True):
        noise.update(batch)
    weights = list(net.parameters())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(net(x), y), weights)])
    torch.testing.assert_close(noise.mean, expected, rtol=1e-10, atol=1e-12)
    if per_example:
        if name == "entries":
            rows = [(loss_fn(net(x[i : i + 1]), y[i : i + 1]), 1.0) for i in range(12)]
        else:
            of = loss_fn.weight if name == "weights" else loss_fn.keywords["weight"] if name == "smoothed" else None
            of = torch.ones(3, dtype=torch.float64) if of is None else of
            kept = {"weights": -100, "ignored": 2, "smoothed": 1}[name]
            counts = [0.0 if int(label) == kept else of[label].item() for label in y]
            mean = sum(counts) / 12
            rows = [
                (loss_fn(net(x[i : i + 1]), y[i : i + 1]) if c else (net(x[i : i + 1]) * 0).sum(), c / mean)
                for i, c in enumerate(counts)
            ]
        terms = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(r, weights)]) * c for r, c in rows])
        torch.testing.assert_close(noise.covariance.to_dense(), torch.cov(terms.mT), rtol=1e-8, atol=1e-12)


def test_a_named_number_of_terms():
    """Padded sequences: a home-made mean over the positions that are not padding."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    x, y = torch.randn(9, 5, 3, dtype=torch.float64), torch.randint(2, (9, 5))
    y[torch.arange(5) >= torch.tensor([1, 5, 2, 4, 3, 1, 5, 5, 1])[:, None]] = -1

    def loss_fn(outputs, targets):
        kept = targets >= 0
        each = cross_entropy(outputs.mT, targets.clamp_min(0), reduction="none")
        return (each * kept).sum() / kept.sum()

    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(net(x), y), list(net.parameters()))])
    for per_example in (False, True):
        for sizes in ([9], [2, 7], [4, 5]):
            noise = GradientCovariance(
                net, loss_fn, rank=9, per_example=per_example, num_terms=lambda outputs, targets: (targets >= 0).sum()
            )
            for batch in zip(x.split(sizes), y.split(sizes), strict=True):
                noise.update(batch)
            torch.testing.assert_close(noise.mean, expected, rtol=1e-10, atol=1e-12)


def test_a_loss_without_terms_has_no_mean():
    noise = GradientCovariance(nn.Linear(2, 2), nn.CrossEntropyLoss(ignore_index=0), rank=2)
    for _ in range(2):
        noise.update((torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="the loss must have terms; the 2 gradients seen have 0 in all"):
        _ = noise.mean
