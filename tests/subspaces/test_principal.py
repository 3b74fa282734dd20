"""Subspaces of a collected posterior against dense float64 decompositions, and the law that they stand for."""

import math

import pytest
import torch
from torch import Tensor, nn

from lowrank_bdl.errors import NonFiniteError, ShapeError, StaleError
from lowrank_bdl.linalg.minka import minka_rank
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.swag import SWAG
from lowrank_bdl.subspaces.principal import covariance_subspace, pca_subspace, principal_subspace
from tests.oracles import assert_close
from tests.statistical import assert_gaussian

F32, F64 = torch.float32, torch.float64


def rows_of(number: int, dim: int, dtype: torch.dtype = F64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, dim, generator=generator, dtype=F64)
    rows *= torch.linspace(1, 0.1, number, dtype=F64)[:, None]
    return rows.to(dtype), torch.randn(dim, generator=generator, dtype=F64).to(dtype)


def collect(updates: int = 7, rank: int = 5, centering: str = "running", dtype: torch.dtype = F64) -> SWAG:
    net = nn.Linear(3, 2).to(dtype)
    swag = SWAG(net, rank=rank, centering=centering)
    generator = torch.Generator().manual_seed(3)
    for _ in range(updates):
        swag.layout.assign_(net, torch.randn(8, generator=generator, dtype=F64))
        swag.update_parameters(net)
    return swag


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("number", "dim"), [(1, 9), (6, 30), (6, 4), (5, 20_000)])
def test_directions_are_the_scaled_left_singular_vectors(number: int, dim: int, dtype: torch.dtype) -> None:
    rows, origin = rows_of(number, dim, dtype)
    columns = rows.double().mT / math.sqrt(max(number - 1, 1))
    lengths = torch.linalg.svdvals(columns)
    for rank in dict.fromkeys((1, min(number, dim))):
        space = pca_subspace(rows, rank, origin=origin)
        assert space.dtype == dtype and space.basis.mT.is_contiguous() and torch.equal(space.origin, origin)
        basis = space.basis.double()
        assert_close(basis.mT @ basis, lengths[:rank].square().diag(), dtype, 10.0)
        best = torch.linalg.svd(columns, full_matrices=False)
        nearest = best.U[:, :rank] * lengths[:rank].square() @ best.U[:, :rank].mT if dim < 1000 else None
        if nearest is not None:
            assert_close(basis @ basis.mT, nearest, dtype, 10.0)
        else:  # the dense covariance is large; its action on its own columns is not
            image = best.U[:, :rank] * lengths[:rank].square() @ (best.U[:, :rank].mT @ columns)
            assert_close(basis @ (basis.mT @ columns), image, dtype, 10.0)
        unit = pca_subspace(rows, rank, origin=origin, orthonormal=True)
        assert_close(unit.basis.double() * lengths[:rank], basis, dtype, 10.0)
        share = float(lengths[:rank].square().sum() / lengths.square().sum())
        assert space.provenance["explained_variance"] == pytest.approx(share, rel=1e-5)
        assert (space.rank, space.provenance["rank"], unit.provenance["orthonormal"]) == (rank, rank, True)


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("updates", [3, 5, 9])
def test_all_directions_make_the_law_of_the_posterior_at_scale_one(updates: int, centering: str) -> None:
    swag = collect(updates, 5, centering)
    sigma = swag.posterior(scale=1.0).covariance
    low_rank = sigma.to_dense() - sigma.diag.diag()
    for source in (swag, swag.posterior(scale=1.0), swag.posterior(scale=0.5), swag.posterior(scale=3.0, copy=True)):
        for space in (pca_subspace(source), covariance_subspace(source)):
            assert_close(space.basis @ space.basis.mT, low_rank, F64, 100.0)
            assert torch.equal(space.origin, swag.mean) and space.layout == swag.layout
            assert space.provenance["of"]["source"] == "swag"
    assert pca_subspace(swag).rank == min(updates - 1, 5)


@pytest.mark.parametrize(("width", "ok"), [(1.0, True), (0.5**0.5, False)])  # scale 0.5: the test must have power
def test_standard_normal_coordinates_follow_that_law(width: float, ok: bool) -> None:
    rows, origin = rows_of(9, 5)
    space = pca_subspace(rows, origin=origin)
    z = torch.randn(2000, space.rank, dtype=F64, generator=torch.Generator().manual_seed(0))
    draws, covariance = space.to_theta(width * z), rows.mT @ rows / 8
    if ok:
        assert_gaussian(draws, origin, covariance)
    else:
        with pytest.raises(AssertionError, match="covariance"):
            assert_gaussian(draws, origin, covariance)


def test_raw_columns() -> None:
    swag = collect()
    space = covariance_subspace(swag)
    assert space.rank == 5
    columns = sorted((2 * space.basis).mT.tolist())  # five rows: divisor 4; the order is that of the ring
    assert_close(torch.tensor(columns, dtype=F64), torch.tensor(sorted(swag.deviations.tolist()), dtype=F64))
    rows, origin = rows_of(4, 6, F32)
    plain = covariance_subspace(rows, origin=origin)
    assert_close(plain.basis, (rows.double() / 3**0.5).mT, F32)
    assert plain.basis.mT.is_contiguous()


def test_rank_by_explained_variance_and_by_evidence() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(40, 4, dtype=F64, generator=generator)).Q.mT
    rows *= torch.tensor([10, 7, 5, 2], dtype=F64).sqrt()[:, None]  # shares .417, .708, .917, 1
    origin = torch.zeros(40, dtype=F64)
    ranks = [pca_subspace(rows, share, origin=origin).rank for share in (0.4, 0.5, 0.7, 0.71, 0.9, 0.95)]
    assert ranks == [1, 2, 2, 3, 3, 4]
    signal = torch.randn(60, 2, dtype=F64, generator=generator) @ torch.randn(2, 12, dtype=F64, generator=generator)
    data = 3 * signal + 0.1 * torch.randn(60, 12, dtype=F64, generator=generator)
    space = pca_subspace(data, "mle", origin=torch.zeros(12, dtype=F64))
    assert space.rank == 2
    values = torch.linalg.svdvals(data).square() / 59
    assert minka_rank(values, 60, 12) == 2


def test_sources_in_narrow_storage_and_with_a_layout() -> None:
    rows, origin = rows_of(5, 20_000, F32)
    half = rows.bfloat16()
    space = pca_subspace(half, 2, origin=origin)
    values = torch.linalg.svdvals(half.double()) / 2
    assert space.dtype == F32
    assert_close(space.lengths, values[:2], F32, 10.0)
    net = nn.Linear(3, 2)
    layout = ParameterLayout.from_module(net)
    rows, origin = rows_of(3, 8, F32)
    assert pca_subspace(rows, 2, origin=origin, layout=layout).layout == layout


@pytest.mark.parametrize("dtype", [F32, F64])
def test_principal_directions_of_the_whole_covariance(dtype: torch.dtype) -> None:
    swag = collect(dtype=dtype)
    sigma = swag.posterior(scale=1.0).covariance.to_dense().double()
    for source in (swag, swag.posterior(scale=0.25)):
        space = principal_subspace(source, 3, tol=1e-6, generator=torch.Generator().manual_seed(0))
        values, vectors = torch.linalg.eigh(sigma)
        expected = vectors[:, -3:] * values[-3:] @ vectors[:, -3:].mT
        basis = space.basis.double()
        assert_close(basis @ basis.mT, expected, F32, 10.0)
        assert_close(space.lengths, values.flip(0)[:3].sqrt(), F32)
        unit = principal_subspace(source, 3, orthonormal=True, generator=torch.Generator().manual_seed(0))
        assert_close(unit.lengths, torch.ones(3, dtype=F64), F32)
        assert space.basis.mT.is_contiguous() and space.layout == swag.layout


def test_a_stale_posterior_makes_no_subspace() -> None:
    swag = collect()
    posterior, space = swag.posterior(), pca_subspace(swag)
    before = space.basis.clone()
    swag.update_parameters(nn.Linear(3, 2).to(F64))
    assert torch.equal(space.basis, before)  # a basis is a copy
    for make in (pca_subspace, covariance_subspace):
        with pytest.raises(StaleError, match="changed after it was made"):
            make(posterior)


def test_bad_arguments() -> None:
    rows, origin = rows_of(4, 6)
    with pytest.raises(ShapeError, match="numerical rank 4; expected rank at most that, got 5"):
        pca_subspace(rows, 5, origin=origin)
    with pytest.raises(ShapeError, match="numerical rank 1; expected rank at most that, got 2"):
        pca_subspace(torch.ones(3, 6, dtype=F64), 2, origin=origin)
    for bad in (0, -1, 0.0, 1.0, 1.5, math.nan, True, "minka"):
        with pytest.raises(ValueError, match="rank must be an integer"):
            pca_subspace(rows, bad, origin=origin)  # type: ignore[arg-type]
    for poison in (math.nan, math.inf, 1e200):
        broken = rows.clone()
        broken[2, 3] = poison
        with pytest.raises(NonFiniteError, match="low-rank part must be finite"):
            pca_subspace(broken, 2, origin=origin)
    with pytest.raises(NonFiniteError, match="basis must be finite; entry 0 of column 0"):
        covariance_subspace(rows / 0, origin=origin)
    with pytest.raises(ShapeError, match="numerical rank 0"):
        pca_subspace(torch.zeros(3, 6), origin=torch.zeros(6))
    with pytest.raises(TypeError, match="need origin="):
        pca_subspace(rows)
    with pytest.raises(ShapeError, match=r"got \(4, 6\) and \(5,\)"):
        pca_subspace(rows, origin=origin[1:])
    with pytest.raises(TypeError, match="a SWAG has its own"):
        pca_subspace(collect(), origin=origin)
    with pytest.raises(TypeError, match="expected a SWAG or a GaussianPosterior; got str"):
        covariance_subspace("swag.pt")  # type: ignore[arg-type]
    flat = GaussianPosterior.diagonal(torch.zeros(3), torch.ones(3))
    with pytest.raises(ShapeError, match="needs at least 1 deviation; the covariance is diagonal"):
        pca_subspace(flat)
    with pytest.raises(ShapeError, match="rank must be at least 1; got 0"):
        principal_subspace(flat, 0)
