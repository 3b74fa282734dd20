"""Networks trained side by side are the networks that each would have become alone."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments import uci_training
from experiments.uci_training import Candidate, Recipe, Stack, batches_of, initial_weights, num_groups, train
from lowrank_bdl.models import create_model

RECIPE = Recipe(epochs=5, batch_size=8, momentum=0.9, swag_start=2, max_num_models=2, clip=0.5, double_bias_lr=True)
CANDIDATES = [Candidate(1e-2, 1e-2, 1e-3), Candidate(3e-2, 0.0, 3e-2)]
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1, keepdim=True).sin() + 0.1 * X[:, :1]).contiguous()
ROW_SETS = [torch.arange(10, 30), torch.cat([torch.arange(9), torch.arange(20, 30)]), torch.arange(30)]


def network(variance: str = "input", hidden: tuple[int, ...] = (4, 3)) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return create_model("RegNet", 1, in_features=3, hidden=hidden, variance=variance)


@pytest.mark.parametrize("variance", ["input", "constant"])
def test_a_stack_gives_each_networks_outputs(variance: str) -> None:
    net = network(variance)
    thetas = torch.randn(5, lb.ParameterLayout.from_module(net).numel, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(1))
    mean, sigma2 = Stack(net, thetas)(inputs)
    alone = lb.FunctionalModel(net)
    for row in range(5):
        own_mean, own_variance = alone(thetas[row], inputs[row])
        torch.testing.assert_close(mean[row], own_mean[:, 0])
        torch.testing.assert_close(sigma2[row], own_variance[:, 0])


def test_batches_hold_every_row_once_and_weigh_to_one() -> None:
    rows, weights = batches_of(ROW_SETS, 8, torch.Generator().manual_seed(0))
    assert rows.shape == weights.shape == (4, 3, 8)
    torch.testing.assert_close(weights.sum(2), torch.ones(4, 3))
    for place, own in enumerate(ROW_SETS):
        kept = weights[:, place] > 0
        assert sorted(rows[:, place][kept].tolist()) == own.tolist()
        sizes = kept.sum(1)
        assert sizes.max() - sizes.min() <= 1


def alone(net: nn.Module, place: int, candidate: Candidate) -> tuple[Tensor, lb.SWAG]:
    """Train one network by torch's own optimizer, clipping and loss on the batches that the stack saw."""
    layout, net = lb.ParameterLayout.from_module(net), copy.deepcopy(net)
    layout.assign_(net, initial_weights(network(hidden=(4, 3)), len(ROW_SETS), seed=7)[place])
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    others = [p for name, p in net.named_parameters() if not name.endswith("bias")]
    groups = [{"params": others}, {"params": biases}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=candidate.wd)
    swag, generator = lb.SWAG(net, rank=2), torch.Generator().manual_seed(7)
    for epoch in range(5):
        rate = candidate.lr + min(max((epoch / 2 - 0.5) / 0.4, 0), 1) * (candidate.swag_lr - candidate.lr)
        for group, factor in zip(optimizer.param_groups, (1.0, 2.0), strict=True):
            group["lr"] = factor * rate
        rows, weights = batches_of(ROW_SETS, 8, generator)
        for batch in range(len(rows)):
            own = rows[batch, place][weights[batch, place] > 0]
            optimizer.zero_grad()
            mean, variance = net(X[own])
            nn.functional.gaussian_nll_loss(mean, Y[own], variance).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
        if epoch >= 2:
            swag.update_parameters(net)
    return layout.flatten(net), swag


def test_each_network_is_as_if_trained_alone() -> None:
    net = network()
    found = train(net, X, Y, ROW_SETS, CANDIDATES, RECIPE, seed=7)
    assert len(found) == 2 and all(len(own) == 3 for own in found)
    for candidate, networks in zip(CANDIDATES, found, strict=True):
        for place, own in enumerate(networks):
            last, swag = alone(net, place, candidate)
            assert own.swag is not None and own.swag.n_averaged == 3
            torch.testing.assert_close(own.last, last, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(own.swag.mean, swag.mean, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(own.swag.variance, swag.variance, atol=2e-5, rtol=2e-3)
            torch.testing.assert_close(own.swag.deviations, swag.deviations, atol=2e-5, rtol=1e-3)
    assert (found[0][2].last - found[1][2].last).abs().max() > 0.05  # candidates differ, far beyond the tolerance


def test_groups_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net, calls = network(), []
    together = train(net, X, Y, ROW_SETS, CANDIDATES, RECIPE, seed=7)
    monkeypatch.setattr(uci_training, "MOST_WEIGHTS", 1)
    assert num_groups(net, 3, 2) == 2
    apart = train(net, X, Y, ROW_SETS, CANDIDATES, RECIPE, seed=7, progress=lambda: calls.append(1))
    assert len(calls) == 2 * RECIPE.epochs
    for one, other in zip(sum(together, []), sum(apart, []), strict=True):
        torch.testing.assert_close(one.last, other.last, atol=1e-6, rtol=1e-5)
        assert one.swag is not None and other.swag is not None
        torch.testing.assert_close(one.swag.posterior().stddev, other.swag.posterior().stddev, atol=1e-6, rtol=1e-4)


def test_a_network_that_diverges_leaves_the_others_alone() -> None:
    wild = Candidate(1e12, 0.0, 1e12)
    found = train(network(), X, Y, ROW_SETS, [CANDIDATES[0], wild], RECIPE, seed=7)
    expected = train(network(), X, Y, ROW_SETS, [CANDIDATES[0]], RECIPE, seed=7)
    assert all(own.swag is None for own in found[1])
    for own, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(own.last, other.last, atol=1e-6, rtol=1e-5)


def test_the_same_seed_is_the_same_run_and_no_global_state_moves() -> None:
    before = torch.get_rng_state()
    first = train(network(), X, Y, ROW_SETS, CANDIDATES[:1], RECIPE, seed=3)
    again = train(network(), X, Y, ROW_SETS, CANDIDATES[:1], RECIPE, seed=3)
    other = train(network(), X, Y, ROW_SETS, CANDIDATES[:1], RECIPE, seed=4)
    assert torch.equal(first[0][0].last, again[0][0].last) and not torch.equal(first[0][0].last, other[0][0].last)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_the_doubled_rate_biases_are_as_others() -> None:
    recipe = dataclasses.replace(RECIPE, double_bias_lr=False)
    one = train(network(), X, Y, ROW_SETS, CANDIDATES[:1], recipe, seed=3)[0][0].last
    two = train(network(), X, Y, ROW_SETS, CANDIDATES[:1], RECIPE, seed=3)[0][0].last
    assert not torch.allclose(one, two)
