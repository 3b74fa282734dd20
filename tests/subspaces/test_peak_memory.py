"""Peaks of allocation: nothing of the size of the deviations is made but a basis that is the result."""

from collections.abc import Callable

import pytest
import torch

from lowrank_bdl.linalg.frequent_directions import FrequentDirectionsSketch
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.subspaces.curve import curve_subspace
from lowrank_bdl.subspaces.directions import random_subspace
from lowrank_bdl.subspaces.principal import covariance_subspace, pca_subspace
from lowrank_bdl.subspaces.subspace import Subspace
from tests.allocations import peak_vectors

D, K = 2**20, 12
SLACK = 3.0
"""Vectors of D: chunks, and the mean or a column; less than K, so that it hides no second basis."""


def posterior() -> GaussianPosterior:
    rows = torch.randn(K, D, generator=torch.Generator().manual_seed(0))
    return GaussianPosterior(torch.zeros(D), LowRankPlusDiagLinearOperator(rows.mT, torch.ones(D)))


@pytest.mark.parametrize("make", [pca_subspace, covariance_subspace])
def test_a_subspace_of_a_posterior_allocates_its_basis(make: Callable[[GaussianPosterior], Subspace]) -> None:
    source = posterior()
    make(source)
    assert K <= peak_vectors(lambda: make(source), D) < K + SLACK


def test_other_subspaces_allocate_their_basis() -> None:
    origin, points = torch.zeros(D), torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    assert peak_vectors(lambda: random_subspace(None, origin, K), D) < K + SLACK
    assert peak_vectors(lambda: random_subspace(None, origin, K, length=1.0), D) < 2 * K + SLACK
    assert peak_vectors(lambda: curve_subspace(points), D) < 3 + 1 + SLACK + 1  # chunks of every point in float64


def test_a_structured_basis_is_a_few_vectors_whatever_its_rank() -> None:
    origin, rank = torch.zeros(D), 50
    assert peak_vectors(lambda: random_subspace(None, origin, rank, structured=True), D) < 4.0
    space = random_subspace(None, origin, rank, structured=True)
    z = torch.zeros(rank)
    assert peak_vectors(lambda: space.to_theta(z), D) < 6.0
    assert peak_vectors(lambda: space.project(origin), D) < 20.0  # float64, and rows of the Gram matrix by chunks


def test_a_shrinking_sketch_stays_in_place() -> None:
    sketch = FrequentDirectionsSketch(K // 2, D)
    row = torch.randn(D, generator=torch.Generator().manual_seed(0))
    for _ in range(K):
        sketch.push(row.roll(1))
    assert peak_vectors(lambda: sketch.push(row), D) < SLACK
    assert len(sketch.rows) == K // 2
