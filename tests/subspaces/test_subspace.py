"""Coordinates, weights and files of a subspace, against dense float64 algebra."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.files import write_tensors
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.subspaces.subspace import KIND, Subspace
from tests.oracles import assert_close

F32, F64 = torch.float32, torch.float64
LARGE = 20_000
"""Coordinates beyond which the compiled kernels take over."""


def make(dim: int, rank: int, dtype: torch.dtype = F64, transposed: bool = True, seed: int = 0) -> Subspace:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, dim, generator=generator, dtype=F64) * torch.logspace(0, -3, rank, dtype=F64)[:, None]
    rows, origin = rows.to(dtype), torch.randn(dim, generator=generator, dtype=F64).to(dtype)
    return Subspace(None, origin, rows.mT if transposed else rows.mT.contiguous())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("dim", "rank", "transposed"), [(7, 1, True), (30, 4, True), (30, 4, False), (LARGE, 5, True)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_weights_and_coordinates(
    dim: int, rank: int, transposed: bool, dtype: torch.dtype, batch: tuple[int, ...]
) -> None:
    space = make(dim, rank, dtype, transposed)
    assert (space.rank, space.numel, space.dtype) == (rank, dim, dtype)
    origin, basis = space.origin.double(), space.basis.double()
    z = torch.randn(*batch, rank, generator=torch.Generator().manual_seed(1), dtype=F64)
    theta = space.to_theta(z)
    assert theta.dtype == dtype and theta.shape == (*batch, dim)
    assert_close(theta, origin + z.to(dtype).double() @ basis.mT, dtype)
    other = torch.randn(*batch, dim, generator=torch.Generator().manual_seed(2), dtype=F64).to(dtype)
    found = space.project(other)
    offsets = (other - space.origin).double().reshape(-1, dim).mT
    expected = torch.linalg.lstsq(basis, offsets).solution.mT.reshape(*batch, rank)
    assert found.dtype == dtype
    assert_close(found, expected, dtype, 10.0)


def test_coordinates_come_back_to_the_rounding_of_the_weights() -> None:
    z = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert_close(make(30, 4).project(make(30, 4).to_theta(z)), z, F64, 1e3)


def test_gradients_reach_the_coordinates() -> None:
    space = make(30, 4)
    for batch in ((), (3,), (2, 2)):
        z = torch.randn(*batch, 4, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(space.to_theta, z)
    z, weight = torch.randn(3, 4, dtype=F64), torch.randn(30, dtype=F64)
    batched = torch.func.vmap(torch.func.grad(lambda point: (space.to_theta(point) * weight).sum()))(z)
    assert_close(batched, (weight @ space.basis).expand(3, 4), F64)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("dim", [30, LARGE])
def test_orthonormal_spans_the_same(dim: int, dtype: torch.dtype) -> None:
    space = make(dim, 4, dtype)
    same = space.orthonormal()
    basis, unit = space.basis.double(), same.basis.double()
    assert same.dtype == dtype and same.basis.mT.is_contiguous()
    assert_close(unit.mT @ unit, torch.eye(4, dtype=F64), dtype)
    assert_close(unit @ (unit.mT @ basis), basis, dtype, 10.0)
    assert_close(space.gram, basis.mT @ basis)
    assert_close(space.lengths, basis.norm(dim=0))
    assert torch.equal(same.origin, space.origin)


def test_dependent_columns() -> None:
    basis = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=F64)
    space = Subspace(None, torch.zeros(3, dtype=F64), basis)
    assert_close(space.project(torch.tensor([3.0, 1.0, 5.0], dtype=F64)), torch.tensor([1.0, 0.5, 0.0], dtype=F64))
    unit = space.orthonormal()
    assert unit.rank == 1
    assert_close(unit.basis.abs(), torch.tensor([[0.5], [0.5], [0.0]], dtype=F64).sqrt())
    with pytest.raises(ShapeError, match="needs a column that is not zero; got none"):
        Subspace(None, torch.zeros(3), torch.zeros(3, 2)).orthonormal()


def test_dtype_and_device_of_a_copy(device: torch.device) -> None:
    space = make(30, 4, F32)
    moved = space.to(device, F64)
    assert (moved.dtype, moved.device.type, moved.basis.dtype) == (F64, device.type, F64)
    assert moved.basis.mT.is_contiguous()
    assert torch.equal(moved.basis.to("cpu", F32), space.basis)


def network() -> tuple[nn.Module, ParameterLayout, Subspace]:
    net = nn.Linear(3, 2)
    layout = ParameterLayout.from_module(net)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(2, layout.numel, generator=generator).mT
    return net, layout, Subspace(layout, layout.flatten(net), basis, {"source": "test", "scale": 1.0})


def test_files_give_back_every_bit(tmp_path: Path) -> None:
    _, layout, space = network()
    space.save(tmp_path / "a.safetensors")
    found = Subspace.load(tmp_path / "a.safetensors", layout)
    assert torch.equal(found.origin, space.origin) and torch.equal(found.basis, space.basis)
    assert found.layout == layout and found.provenance == space.provenance
    assert found.basis.mT.is_contiguous()
    plain = Subspace(None, space.origin, space.basis.contiguous())
    plain.save(tmp_path / "a.safetensors")
    assert Subspace.load(tmp_path / "a.safetensors").layout is None
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    _, _, space = network()
    file = tmp_path / "a.safetensors"
    space.save(file)
    with pytest.raises(CheckpointError, match=r"of other parameters: parameter 'weight': expected shape \(4, 3\)"):
        Subspace.load(file, ParameterLayout.from_module(nn.Linear(3, 4)))
    write_tensors(file, KIND, {"origin": space.origin}, {})
    with pytest.raises(CheckpointError, match="no usable subspace: lacks basis"):
        Subspace.load(file)
    write_tensors(file, KIND, {"origin": space.origin, "basis": space.basis}, {})
    with pytest.raises(CheckpointError, match=r"no usable subspace: origin must be \(D,\) and basis"):
        Subspace.load(file)
    write_tensors(file, "gaussian posterior", {"origin": space.origin}, {})
    with pytest.raises(CheckpointError, match="expected a 'subspace'"):
        Subspace.load(file)
    Subspace(None, space.origin, space.basis).save(file)
    with pytest.raises(CheckpointError, match="of other parameters: no layout"):
        Subspace.load(file, space.layout)


def test_bad_arguments() -> None:
    _, layout, space = network()
    zeros: Tensor = torch.zeros(8)
    with pytest.raises(TypeError, match="basis must be float32 or float64; got torch.float16"):
        Subspace(None, zeros, torch.zeros(8, 2, dtype=torch.float16))
    with pytest.raises(ShapeError, match=r"got \(8,\) and \(8, 0\)"):
        Subspace(None, zeros, torch.zeros(8, 0))
    with pytest.raises(ShapeError, match=r"got \(8,\) and \(2, 8\)"):
        Subspace(None, zeros, torch.zeros(2, 8))
    with pytest.raises(ShapeError, match="layout has 8 coordinates; origin and basis have 9"):
        Subspace(layout, torch.zeros(9), torch.zeros(9, 1))
    with pytest.raises(NonFiniteError, match="origin must be finite; entry 0 is nan"):
        Subspace(None, zeros / 0, torch.zeros(8, 1))
    with pytest.raises(NonFiniteError, match="basis must be finite; entry 3 of column 1 is inf"):
        Subspace(None, zeros, torch.zeros(8, 2).index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(torch.inf)))
    with pytest.raises(ShapeError, match=r"z must have shape \(\*S, 2\); got \(3,\)"):
        space.to_theta(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"theta must have shape \(\*S, 8\); got \(\)"):
        space.project(torch.zeros(()))
    assert repr(space) == "Subspace(numel=8, rank=2, dtype=torch.float32)"
