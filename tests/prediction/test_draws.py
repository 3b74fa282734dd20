import math

import pytest
import torch

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.prediction.draws import WeightDraws


class StandardNormal:
    layout = None

    def __init__(self, dim, shape=None):
        self.dim, self.shape, self.calls = dim, shape, 0

    def sample(self, n, *, generator=None):
        self.calls += 1
        return torch.randn(self.shape or (n, self.dim), generator=generator)


def draws(num_samples=6, dim=3, seed=0, posterior=None, **options):
    return WeightDraws(posterior or StandardNormal(dim), num_samples, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("max_bytes,kept", [(None, 6), (10**9, 6), (6 * 12, 6), (2 * 12 + 11, 2), (12, 1), (0, 0)])
def test_what_does_not_fit_is_drawn_again_bit_by_bit(max_bytes, kept):
    everything = torch.stack(list(draws()))
    some = draws(max_bytes=max_bytes)
    assert (some.num_kept, len(some), some.dim) == (kept, 6, 3)
    for _ in range(2):
        assert torch.equal(torch.stack(list(some)), everything)


def test_only_missing_draws_cost_a_call():
    posterior = StandardNormal(3)
    some = draws(posterior=posterior, max_bytes=4 * 12)
    made = posterior.calls
    assert made == 4
    list(some)
    assert posterior.calls == made + 2


def test_draws_do_not_depend_on_how_many_there_are():
    assert torch.equal(torch.stack(list(draws(4))), torch.stack(list(draws(9)))[:4])


def test_seeds_come_from_the_generator():
    one, same, other = (torch.stack(list(draws(seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        default = torch.stack(list(WeightDraws(StandardNormal(3), 2)))
        torch.manual_seed(0)
        assert torch.equal(torch.stack(list(WeightDraws(StandardNormal(3), 2))), default)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    list(draws(max_bytes=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_neighbouring_seeds_are_independent_normals():
    """Mean, second moment and correlation of neighbours over 20,000 numbers; false alarms under 1e-6 each (5 sigma)."""
    x = torch.stack(list(draws(4000, dim=5))).double()
    n = x.numel()
    assert len(torch.unique(x, dim=0)) == 4000  # no two seeds alike
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / n)
    for lag in (1, 2, 7):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 / math.sqrt(n - 5 * lag)


def test_bad_posteriors_are_refused():
    with pytest.raises(ShapeError, match="num_samples must be at least 1; got 0"):
        draws(0)
    with pytest.raises(ShapeError, match=r"sample\(1\) must have shape \(1, D\); got \(3,\)"):
        draws(posterior=StandardNormal(3, shape=(3,)))
    with pytest.raises(ShapeError, match=r"shape \(1, D\); got \(2, 3\)"):
        draws(posterior=StandardNormal(3, shape=(2, 3)))
    numbered = StandardNormal(3)
    numbered.draw = lambda s, *, generator: numbered.sample(1, generator=generator)
    with pytest.raises(ShapeError, match=r"draw\(0\) must have shape \(D,\); got \(1, 3\)"):
        draws(posterior=numbered)


def test_membership():
    some = draws(max_bytes=0)
    theta = list(some)[3]
    assert theta in some and theta + 1 not in some and "theta" not in some
