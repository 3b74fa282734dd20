"""Random directions: their law in full; eigenvectors: their scaling."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_bdl.errors import MemoryLimitError, NotConvergedError, ShapeError
from lowrank_bdl.linalg.hadamard import RandomizedHadamardLinearOperator
from lowrank_bdl.linalg.lanczos import Eigenpairs, lanczos
from lowrank_bdl.subspaces.directions import eigen_subspace, random_subspace
from lowrank_bdl.subspaces.subspace import Subspace
from tests.oracles import assert_close
from tests.statistical import assert_gaussian

F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize(("width", "ok"), [(1.0, True), (1.2, False)])  # a wrong length: the test must have power
def test_dense_directions_are_standard_normal(width: float, ok: bool) -> None:
    generator, origin = torch.Generator().manual_seed(0), torch.zeros(3, dtype=F64)
    draws = torch.stack([random_subspace(None, origin, 2, generator=generator).basis.flatten() for _ in range(600)])
    zero, eye = torch.zeros(6, dtype=F64), torch.eye(6, dtype=F64)
    if ok:
        assert_gaussian(width * draws, zero, eye)
    else:
        with pytest.raises(AssertionError, match="covariance"):
            assert_gaussian(width * draws, zero, eye)


def second_moment_is_uniform(draws: Tensor, length: float) -> bool:
    """Whether E[p p'] = length² I / D for orthonormal columns, each within 5.5 sigma: false alarms under 1e-6."""
    number, dim = draws.shape
    squares = draws[:, :, None] * draws[:, None, :]
    off = squares.mean(0) - length**2 / dim * torch.eye(dim, dtype=F64)
    return bool((off.abs() < 5.5 * squares.std(0) / number**0.5).all())


@pytest.mark.parametrize("structured", [False, True])
def test_directions_of_a_length_have_no_preferred_axis(structured: bool) -> None:
    generator, origin = torch.Generator().manual_seed(1), torch.zeros(8, dtype=F64)
    spaces = [
        random_subspace(None, origin, 2, length=3.0, structured=structured, generator=generator) for _ in range(500)
    ]
    assert_close(torch.stack([space.lengths for space in spaces]), torch.full((500, 2), 3.0, dtype=F64), F64, 10.0)
    eye = torch.eye(2, dtype=F64)
    draws = torch.stack([space.to_theta(eye) for space in spaces])  # (500, 2, 8)
    assert_close(draws @ draws.mT, (9 * eye).expand(500, 2, 2), F64, 10.0)
    for column in draws.unbind(1):
        assert second_moment_is_uniform(column, 3.0)
        assert not second_moment_is_uniform(column, 2.5)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("length", [None, 2.0])
def test_a_structured_basis_is_its_dense_matrix(dtype: torch.dtype, length: float | None, tmp_path: Path) -> None:
    dim = 300
    origin = torch.randn(dim, dtype=dtype, generator=torch.Generator().manual_seed(0))
    make = torch.Generator().manual_seed(1)
    space = random_subspace(None, origin, 4, length=length, structured=True, generator=make)
    assert isinstance(space.basis, RandomizedHadamardLinearOperator)
    dense = Subspace(None, origin, space.basis.to_dense())
    z = torch.randn(2, 3, 4, dtype=dtype, generator=make)
    theta = space.to_theta(z)
    assert theta.dtype == dtype and theta.shape == (2, 3, dim)
    assert_close(theta, dense.to_theta(z).double(), dtype, 10.0)
    assert_close(space.project(theta), dense.to(F64).project(theta).double(), dtype, 100.0)
    assert_close(space.to_theta(z[0, 0]), theta[0, 0].double(), dtype, 10.0)
    assert_close(space.gram, dense.gram, dtype, 10.0)
    assert_close(space.orthonormal().gram, torch.eye(4, dtype=F64), dtype, 10.0)
    space.save(tmp_path / "space")
    assert (tmp_path / "space").stat().st_size < dim * (1 + 2 + dtype.itemsize) + 2000  # signs and origin, no D x k
    again = Subspace.load(tmp_path / "space")
    assert torch.equal(again.to_theta(z), theta) and again.provenance == space.provenance
    moved = space.to(F64)
    assert moved.dtype == moved.basis.dtype == F64
    assert_close(moved.to_theta(z.double()), theta.double(), dtype, 10.0)


def test_gradients_pass_through_a_structured_basis() -> None:
    origin = torch.randn(11, dtype=F64, generator=torch.Generator().manual_seed(0))
    space = random_subspace(None, origin, 3, structured=True, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(space.to_theta, torch.randn(2, 3, dtype=F64, requires_grad=True))
    z = torch.randn(5, 3, dtype=F64)
    gradients = torch.func.vmap(torch.func.grad(lambda point: space.to_theta(point).square().sum()))(z)
    assert isinstance(space.basis, RandomizedHadamardLinearOperator)
    assert_close(gradients, 2 * space.to_theta(z) @ space.basis.to_dense(), F64, 10.0)


def test_a_seed_fixes_the_directions_and_the_global_state_stays() -> None:
    origin, state = torch.zeros(20), torch.get_rng_state()
    for structured in (False, True):
        first, second, other = (
            random_subspace(None, origin, 3, structured=structured, generator=torch.Generator().manual_seed(seed))
            for seed in (0, 0, 1)
        )
        eye = torch.eye(3)
        assert torch.equal(first.to_theta(eye), second.to_theta(eye))
        assert not torch.equal(first.to_theta(eye), other.to_theta(eye))
    assert torch.equal(state, torch.get_rng_state())


def test_bad_random_directions() -> None:
    with pytest.raises(ShapeError, match="rank must be between 1 and D = 3; got 4"):
        random_subspace(None, torch.zeros(3), 4)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="length must be a positive number"):
            random_subspace(None, torch.zeros(3), 2, length=bad)
    with pytest.raises(MemoryLimitError, match="a basis of 1000000 x 1,000,000 numbers needs 3725.29 GiB"):
        random_subspace(None, torch.zeros(1_000_000), 1_000_000)


def eigenpairs(values: list[float]) -> tuple[Tensor, Eigenpairs]:
    matrix = torch.diag(torch.tensor(values, dtype=F64))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
    matrix = rotation @ matrix @ rotation.mT
    return matrix, lanczos(matrix.matmul, 3, "LA", tol=1e-10, start=torch.ones(6, dtype=F64))


def test_eigenvectors_scaled_to_the_laplace_law() -> None:
    matrix, pairs = eigenpairs([9.0, 4.0, 1.0, 0.1, 0.0, -0.5])
    origin = torch.zeros(6, dtype=F64)
    plain = eigen_subspace(None, origin, pairs)
    assert_close(plain.lengths, torch.ones(3, dtype=F64))
    space = eigen_subspace(None, origin, pairs, prior_precision=0.5, num_data=10.0)
    precision = 10 * matrix + 0.5 * torch.eye(6, dtype=F64)
    inside = space.basis.mT @ precision @ space.basis
    assert_close(inside, torch.eye(3, dtype=F64), F64, 1e4)  # z ~ N(0, I) has this precision in the subspace
    assert space.basis.mT.is_contiguous() and space.provenance["num_data"] == 10.0


def test_bad_eigenpairs() -> None:
    _, pairs = eigenpairs([1.0, 0.5, -2.0, -3.0, -4.0, -5.0])
    with pytest.raises(ValueError, match=r"prior_precision > 0; the smallest is -1\.\d+e\+00"):
        eigen_subspace(None, torch.zeros(6, dtype=F64), pairs, prior_precision=0.5)
    broken = Eigenpairs(
        pairs.eigenvalues, pairs.eigenvectors, pairs.residuals, torch.tensor([True, False, True]), pairs.num_matvecs
    )
    with pytest.raises(NotConvergedError, match="expected converged eigenpairs; 1 of 3 are not"):
        eigen_subspace(None, torch.zeros(6, dtype=F64), broken)
