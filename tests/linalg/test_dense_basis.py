import pytest
import torch

from lowrank_bdl.linalg.dense_basis import DenseBasis
from tests.oracles import assert_close

DIM, RANK = 20_000, 3  # more than one chunk


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def basis(request):
    return DenseBasis(torch.randn(RANK, DIM, generator=torch.Generator().manual_seed(0), dtype=request.param).mT)


def test_products_agree_with_dense_ones(basis):
    dense, dtype = basis.matrix.double(), basis.matrix.dtype
    rows = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)
    mix = torch.randn(RANK, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    origin = rows[0]
    for number in (1, 4):
        z = torch.randn(number, RANK, generator=torch.Generator().manual_seed(3), dtype=dtype)
        assert_close(basis.lift(z, origin), origin.double() + z.double() @ dense.mT, dtype)
        assert_close(basis.inner_products(rows[:number]), dense.mT @ rows[:number].double().mT)
    assert_close(basis.gram(), dense.mT @ dense)
    assert_close(basis.mixed(mix), dense @ mix, dtype)
    assert basis.mixed(mix).mT.is_contiguous() and basis.mixed(mix).dtype == dtype


def test_is_differentiable_in_the_coordinates(basis):
    z = torch.zeros(2, RANK, dtype=basis.matrix.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(basis.lift(z, basis.matrix[:, 0]).sum(), z)
    assert_close(slope, basis.matrix.double().sum(0).expand(2, RANK), basis.matrix.dtype, cond=100)


def test_copies_and_state_keep_the_rows_of_storage(basis):
    moved = basis.to(torch.float64)
    assert moved.dtype == torch.float64 and moved.mT.is_contiguous()
    assert basis.to_state()["basis"].data_ptr() == basis.matrix.data_ptr()
