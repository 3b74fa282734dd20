"""The statistical test of the error bars itself: its rate of false alarms."""

import torch

from tests.linalg.estimates import assert_honest, seeded


def test_false_alarms_are_as_rare_as_stated() -> None:
    """At 1e-2, where it can be counted: honest error bars of 5 chi-square samples, more skewed than any used here."""
    alarms, trials = 0, 400
    g = seeded(0)
    for _ in range(trials):
        samples = torch.randn(1000, 5, generator=g).double().square()
        try:
            assert_honest(samples.mean(1), samples.std(1) / 5**0.5, torch.ones(()).double(), alpha=1e-2)
        except AssertionError:
            alarms += 1
    assert alarms <= 20  # 4 expected at the nominal rate; 20 of 400 have a chance below 1e-8 then
