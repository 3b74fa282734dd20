"""Minka's evidence against scikit-learn's, and against the sum written out where dimensions outnumber samples."""

import math

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.minka import minka_log_evidence, minka_rank
from tests.oracles import assert_close

F64 = torch.float64


def spectrum(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(count, dtype=F64, generator=generator)).exp().sort(descending=True).values


@pytest.mark.parametrize(("count", "samples"), [(2, 5), (6, 20), (30, 1000)])
def test_agrees_with_scikit_learn(count: int, samples: int) -> None:
    pca = pytest.importorskip("sklearn.decomposition._pca", reason="scikit-learn is not installed")
    values = spectrum(count, count)
    expected = [pca._assess_dimension(values.numpy(), k, samples) for k in range(1, count)]
    found = minka_log_evidence(values, samples, count)
    assert_close(found[:-1], torch.tensor(expected, dtype=F64), F64, 10.0)
    assert found[-1] == -math.inf
    assert minka_rank(values, samples, count) == pca._infer_dimension(values.numpy(), samples)


def test_number_of_components_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(500, 3, dtype=F64, generator=generator) @ torch.randn(3, 12, dtype=F64, generator=generator)
    data += 0.05 * torch.randn(500, 12, dtype=F64, generator=generator)
    values = torch.linalg.eigvalsh(data.T.cov()).flip(0)
    assert minka_rank(values, 500, 12) == 3


def written_out(values: Tensor, n: int, d: int, k: int) -> float:
    """Minka's equations, term by term, in mpmath-free Python floats."""
    lam = [*values.tolist(), *[0.0] * (d - len(values))]
    v = sum(lam[k:]) / (d - k)
    hat = lam[:k] + [v] * (d - k)
    log_u = -k * math.log(2)
    for i in range(1, k + 1):
        log_u += math.lgamma((d - i + 1) / 2) - (d - i + 1) / 2 * math.log(math.pi)
    log_a = 0.0
    for i in range(k):
        for j in range(i + 1, d):
            log_a += math.log((1 / hat[j] - 1 / hat[i]) * (lam[i] - lam[j]) * n)
    m = d * k - k * (k + 1) / 2
    fit = -n / 2 * sum(map(math.log, lam[:k])) - n * (d - k) / 2 * math.log(v)
    return log_u + fit + (m + k) / 2 * math.log(2 * math.pi) - log_a / 2 - k / 2 * math.log(n)


def test_zero_eigenvalues_in_closed_form() -> None:
    values = spectrum(6, 0)
    expected = [written_out(values, 7, 40, k) for k in range(1, 6)]
    found = minka_log_evidence(values, 7, 40)
    assert_close(found[:5], torch.tensor(expected, dtype=F64), F64, 10.0)
    assert found[5] == -math.inf  # nothing is left for the noise
    assert minka_log_evidence(values, 7, 10_000_000)[:5].isfinite().all()


def test_edges() -> None:
    assert minka_rank(torch.tensor([1.0]), 5, 3) == 1
    assert minka_rank(torch.tensor([1.0, 0.0, 0.0]), 5, 3) == 1
    with pytest.raises(ShapeError, match="R from 1 to d = 1; got"):
        minka_log_evidence(torch.ones(2), 5, 1)
    with pytest.raises(ShapeError, match="must be >= 0 and descending"):
        minka_log_evidence(torch.tensor([1.0, 2.0]), 5, 3)
    with pytest.raises(ShapeError, match="must be >= 0 and descending"):
        minka_log_evidence(torch.tensor([1.0, math.nan]), 5, 3)
