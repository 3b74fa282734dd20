"""Lanczos runs do not know how large the operator is: eigenvalues scale with it, and nothing else changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_bdl.linalg.lanczos import lanczos
from lowrank_bdl.linalg.lanczos_basis import norm, power_of_two
from lowrank_bdl.linalg.lanczos_projection import column_norms

RUNS: dict[str, dict[str, Any]] = {
    "top": {"k": 3},
    "both ends": {"k": (2, 2)},
    "by size": {"k": 3, "which": "LM"},
    "confirmed": {"k": 3, "confirm": True},
    "blocks": {"k": 3, "block_size": 3},
    "restarted": {"k": 2, "num_basis": 6},
    "bfloat16 basis": {"k": 2, "basis_dtype": torch.bfloat16, "tol": 1e-2},
}
SPECTRA = {
    "spread": torch.linspace(-1, 2, 60),
    "identity": torch.ones(60),
    "low rank": torch.cat((torch.tensor([3.0, 2.0, 1.0]), torch.zeros(57))),
    "negative low rank": -torch.cat((torch.tensor([3.0, 2.0, 1.0]), torch.zeros(57))),
    "many sizes": torch.logspace(-12, 0, 60),
}
# A float32 operator scaled further down has rounding errors that underflow, and is another one.
EXPONENTS = {torch.float32: (-40, -23, 23, 60, 90), torch.float64: (-800, -530, -60, 54, 510, 900)}


def pairs_of(values: Tensor, exponent: int, **options: Any) -> Any:
    values = values * 2.0**exponent
    start = torch.randn(len(values), dtype=values.dtype, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return lanczos(
        lambda v: (v.mT * values).mT if v.ndim == 2 else v * values, start=start, generator=generator, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("run", RUNS)
def test_eigenvalues_scale_with_the_operator(run: str, name: str, dtype: torch.dtype) -> None:
    """By a power of two nothing is rounded differently: the same vectors to the bit."""
    values, options = SPECTRA[name].to(dtype), RUNS[run]
    expected = pairs_of(values, 0, **options)
    for exponent in EXPONENTS[dtype]:
        found = pairs_of(values, exponent, **options)
        assert torch.equal(torch.ldexp(found.eigenvalues, torch.tensor(-exponent)), expected.eigenvalues)
        assert torch.equal(found.eigenvectors, expected.eigenvectors)
        assert torch.equal(found.converged, expected.converged) and found.num_matvecs == expected.num_matvecs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-80, 0, 24, 55, 100])
@pytest.mark.parametrize("name", ["identity", "low rank", "negative low rank"])
def test_what_the_start_does_not_meet_is_found_at_any_scale(name: str, exponent: int, dtype: torch.dtype) -> None:
    """An invariant subspace is left by fresh directions, however much smaller they are than the operator's values."""
    values = SPECTRA[name].to(dtype)
    found = pairs_of(values, exponent, k=5)
    true = values.double().sort(descending=True).values[:5] * 2.0**exponent
    tolerance = 1e-2 if dtype == torch.float32 else 1e-8  # the square root of the residual's, as documented
    assert bool(found.converged.all())
    assert bool(((found.eigenvalues - true).abs() <= tolerance * values.abs().max() * 2.0**exponent).all())


def test_an_operator_that_is_zero() -> None:
    found = lanczos(lambda v: 0 * v, 3, start=torch.randn(20).double())
    assert found.eigenvalues.tolist() == [0.0, 0.0, 0.0] and bool(found.converged.all())


@pytest.mark.parametrize("factor", [1e-300, 1e-200, 1.0, 1e160, 1e300])
def test_norms_neither_underflow_nor_overflow(factor: float) -> None:
    vector = torch.randn(300_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(norm(vector * factor)) / factor == pytest.approx(float(vector.norm()), rel=1e-12)
    columns = vector[:12].view(4, 3)
    torch.testing.assert_close(column_norms(columns * factor) / factor, columns.norm(dim=0))
    assert (
        float(norm(torch.zeros(5).double())) == 0 and float(norm(torch.tensor([1.0, torch.inf]).double())) == torch.inf
    )


def test_powers_of_two_divide_without_rounding() -> None:
    values = torch.tensor([0.0, 1e-320, 1e-300, 0.3, 1.0, 5.0, 1e300, torch.inf], dtype=torch.float64)
    units = power_of_two(values)
    assert bool((units.frexp().mantissa == 0.5).all())
    usable = values[2:-1]
    assert bool((usable / units[2:-1] <= 1).all()) and bool((usable / units[2:-1] >= 0.5).all())
