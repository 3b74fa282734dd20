"""Eigendecompositions of positive semi-definite matrices."""

from typing import Any

import pytest
import torch

from lowrank_bdl.linalg.eigen import eigh_psd


def moments(size: int, dead: int, batch: tuple[int, ...] = (), seed: int = 0) -> torch.Tensor:
    """Second moments of rectified features, `dead` of which are always zero, at random places."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*batch, 3 * size, size, generator=generator, dtype=torch.float64).relu()
    for part in rows.view(-1, 3 * size, size):
        part[:, torch.randperm(size, generator=generator)[:dead]] = 0
    return rows.mT @ rows


def check(matrices: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> None:
    scale = matrices.abs().max()
    torch.testing.assert_close(vectors * values.unsqueeze(-2) @ vectors.mT, matrices, rtol=0, atol=1e-12 * scale.item())
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64).expand_as(matrices)
    torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-12)
    assert (values >= 0).all()
    assert (values.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dead", [0, 1, 17, 20])
def test_the_parts_give_the_matrix_back(batch: tuple[int, ...], dead: int) -> None:
    matrices = moments(20, dead, batch)
    values, vectors = eigh_psd(matrices)
    check(matrices, values, vectors)
    assert ((values == 0).sum(-1) == dead).all()


def test_a_layer_behind_dead_rectifiers_is_decomposed() -> None:
    """LAPACK gives up on such a matrix of a trained LeNet5: 476 of 501 rows are zero."""
    matrix = moments(501, 476)
    check(matrix, *eigh_psd(matrix))


def test_where_lapack_fails_the_singular_values_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    matrices = moments(20, 3, (2,))
    expected = torch.linalg.eigvalsh(matrices)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = eigh_psd(matrices)
    check(matrices, values, vectors)
    torch.testing.assert_close(values, expected.clamp(min=0), rtol=1e-12, atol=1e-9)


def test_rounding_makes_no_eigenvalue_negative() -> None:
    rows = torch.randn(2, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, _ = eigh_psd(rows.mT @ rows)
    assert torch.linalg.eigvalsh(rows.mT @ rows).min() < 0 <= values.min()
