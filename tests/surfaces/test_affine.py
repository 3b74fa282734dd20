import pytest
import torch

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.surfaces.affine import AffineSurface, orthonormal
from tests.oracles import assert_close

DIM = 4000


def test_gram_schmidt_agrees_with_qr_and_keeps_the_first_line():
    rows = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthonormal(rows)
    q, r = torch.linalg.qr(rows.mT)
    assert_close(found, (q * r.diagonal().sign()).mT)
    assert_close(found[0], rows[0] / rows[0].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_parallel_directions_of_very_different_lengths_come_out_orthogonal(dtype):
    generator = torch.Generator().manual_seed(1)
    u, r = torch.randn(2, DIM, generator=generator, dtype=dtype)
    found = orthonormal(torch.stack([1e6 * u, 1e-3 * (u + 1e-4 * r)])).double()
    assert (found @ found.mT - torch.eye(2)).abs().max() < (2e-7 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("second", [0.0, 1.0, -3.0])
def test_parallel_directions_are_refused(second):
    u = torch.randn(DIM, generator=torch.Generator().manual_seed(2))
    with pytest.raises(ShapeError, match="none zero, none parallel; got 2 of lengths"):
        orthonormal(torch.stack([u, second * u]))
    with pytest.raises(ShapeError, match="none zero, none parallel"):
        AffineSurface(None, torch.zeros(DIM), (u, second * u))


def test_half_precision_is_raised_to_single():
    surface = AffineSurface(None, torch.zeros(3).bfloat16(), torch.eye(3).bfloat16()[:2])
    assert surface.origin.dtype == surface.directions.dtype == torch.float32
    assert surface.lengths.tolist() == [1.0, 1.0] and surface.rank == 2
