"""Matrices diagonal in a Kronecker product of eigenbases against dense float64, and the law of their draws."""

import pytest
import torch
from linear_operator.operators import DiagLinearOperator, KroneckerProductLinearOperator
from torch.distributions import MultivariateNormal, kl_divergence

from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, NotPSDError, ShapeError
from lowrank_bdl.linalg import kronecker, memory
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator, kl_kronecker
from tests.oracles import assert_close
from tests.statistical import assert_gaussian

CASES = {  # groups, o, m, bias
    "plain": (1, 3, 4, False),
    "bias": (1, 3, 4, True),
    "grouped": (2, 2, 3, False),
    "grouped with bias": (3, 2, 3, True),
    "one output": (1, 1, 5, True),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def psd(groups, size, seed):
    root = torch.randn(groups, size, size, dtype=torch.float64, generator=generator(seed))
    return root @ root.mT / size


def make(name, seed=0, dtype=torch.float64, precision=0.3):
    """The covariance (G kron A + precision I)^-1 as an operator and dense, in the order of weight, then bias."""
    groups, out, inner, has_bias = CASES[name]
    left, right = psd(groups, out, seed + 1), psd(groups, inner, seed + 2)
    (left_values, left_vectors), (right_values, right_vectors) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    table = 1 / (left_values[..., None] * right_values[:, None] + precision)
    operator = KroneckerSpectralLinearOperator(left_vectors, right_vectors, table, has_bias, dtype)
    return operator, dense_inverse(left, right, has_bias, precision)


def dense_inverse(left, right, has_bias, precision):
    groups, out, inner = len(left), left.shape[-1], right.shape[-1]
    size = out * inner
    full = torch.zeros(groups * size, groups * size, dtype=torch.float64)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        full[part, part] = torch.kron(left[group], right[group])
    full = torch.linalg.inv(full + precision * torch.eye(len(full), dtype=torch.float64))
    places = torch.arange(len(full)).view(groups, out, inner)
    order = torch.cat([places[..., :-1].flatten(), places[..., -1].flatten()]) if has_bias else places.flatten()
    return full[order][:, order]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_products_solves_and_sums(name, dtype):
    sigma, dense = make(name, dtype=dtype)
    columns = torch.randn(len(dense), 3, dtype=dtype, generator=generator(5))
    exact = columns.double()
    assert sigma.shape == dense.shape and sigma.dtype == dtype
    assert_close(sigma.to_dense(), dense, dtype)
    assert_close(sigma @ columns, dense @ exact, dtype)
    assert_close(sigma @ columns[:, 0], dense @ exact[:, 0], dtype)
    assert_close(sigma.solve(columns), torch.linalg.solve(dense, exact), dtype, 100)
    assert_close(sigma.solve(columns, columns.mT), exact.mT @ torch.linalg.solve(dense, exact), dtype, 100)
    assert_close(sigma.inverse() @ columns, torch.linalg.solve(dense, exact), dtype, 100)
    assert_close(sigma.diagonal(), dense.diagonal(), dtype)
    assert_close(sigma.logdet(), dense.logdet(), cond=100)
    squares = (exact * torch.linalg.solve(dense, exact)).sum(0)
    assert_close(sigma.inv_quad(columns), squares.sum(), cond=100)
    assert_close(sigma.inv_quad(columns[:, 0]), squares[0], cond=100)
    each, log_determinant = sigma.inv_quad_logdet(columns, logdet=True, reduce_inv_quad=False)
    assert_close(each, squares, cond=100)
    assert_close(log_determinant, dense.logdet(), cond=100)
    assert each.dtype == torch.float64 and (sigma @ columns).dtype == dtype


@pytest.mark.parametrize("name", ["plain", "grouped with bias"])
def test_it_is_a_linear_operator(name):
    sigma, dense = make(name)
    assert_close((2 * sigma).to_dense(), 2 * dense)
    assert isinstance(2 * sigma, KroneckerSpectralLinearOperator)
    assert_close((-1 * sigma).to_dense(), -dense)
    shift = torch.rand(len(dense), dtype=torch.float64, generator=generator())
    assert_close((sigma + DiagLinearOperator(shift)).to_dense(), dense + shift.diag())
    assert_close(sigma[2:5, 1:4].to_dense(), dense[2:5, 1:4])
    assert_close(sigma[..., 1:4, 1:4].to_dense(), dense[1:4, 1:4])
    assert_close(sigma[3], dense[3])
    assert sigma[:, :] is sigma
    rows, columns = torch.randint(len(dense), (2, 40), generator=generator())
    assert_close(sigma[rows, columns], dense[rows, columns])
    assert_close(sigma[-1, 0], dense[-1, 0])
    half = sigma.root_decomposition().root
    assert_close((half @ half.mT).to_dense(), dense)
    inverse_half = sigma.root_inv_decomposition().root
    assert_close((inverse_half @ inverse_half.mT).to_dense(), dense.inverse(), cond=100)
    assert isinstance(sigma.add_diagonal(torch.tensor(0.5)), KroneckerSpectralLinearOperator)
    assert_close(sigma.add_diagonal(torch.tensor([0.5])).to_dense(), dense + 0.5 * torch.eye(len(dense)).double())
    assert_close((sigma.mT @ sigma).to_dense(), dense @ dense)
    for copy in (sigma.clone(), sigma.detach(), sigma.representation_tree()(*sigma.representation())):
        assert_close(copy.to_dense(), dense)


def test_basis_is_a_kronecker_product():
    sigma, dense = make("plain")
    assert isinstance(sigma.basis, KroneckerProductLinearOperator)
    basis = sigma.basis.to_dense()[0]
    assert_close(basis @ sigma.eigenvalues.flatten().diag() @ basis.mT, dense)


def test_dtype_of_results_changes_and_what_is_stored_does_not():
    sigma, dense = make("bias")
    single = sigma.to(torch.float32)
    assert single.dtype == torch.float32 and single.left_vectors.dtype == torch.float64
    assert_close(single.double().to_dense(), dense)
    assert single.double().dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_full_covariance(name, dtype):
    """A correct sampler fails with probability at most 1e-6."""
    sigma, dense = make(name, dtype=dtype)
    mean = torch.linspace(-1, 1, len(dense), dtype=dtype)
    draws = sigma.sample(100 * len(dense), generator(11), mean)
    assert draws.dtype == dtype
    assert_gaussian(draws, mean.double(), dense)


def transposed_factor(left, right):
    """The released K-FAC's left factor: L^-1 Z, whose covariance is L^-1 L^-T and not (L L^T)^-1."""
    return torch.linalg.inv(torch.linalg.cholesky(left)), torch.linalg.inv(torch.linalg.cholesky(right)).mT


@pytest.mark.parametrize("mistake", ["std is 1/N", "wrong scale", "transposed left factor", "split damping"])
def test_the_law_has_power_against_the_usual_mistakes(mistake):
    """Each of these is what some published sampler draws from; the right one passes the same call."""
    left, right, number, precision = psd(1, 3, 1)[0], psd(1, 4, 2)[0], 10.0, 0.3
    exact = dense_inverse(number * left[None], right[None], False, precision)
    z = torch.randn(1200, 3, 4, dtype=torch.float64, generator=generator(3))
    split_left = left + precision**0.5 / number**0.5 * torch.eye(3, dtype=torch.float64)
    split_right = right + precision**0.5 / number**0.5 * torch.eye(4, dtype=torch.float64)
    lower_left, lower_right = transposed_factor(split_left, split_right)
    factored = torch.kron(torch.linalg.inv(split_left), torch.linalg.inv(split_right)) / number
    root = torch.linalg.cholesky(exact)
    good = z.flatten(1) @ root.mT
    zero = torch.zeros(12, dtype=torch.float64)
    assert_gaussian(good, zero, exact)
    if mistake == "std is 1/N":
        draws, law = good / number**0.5, exact
    elif mistake == "wrong scale":
        draws, law = good * 1.2, exact
    elif mistake == "transposed left factor":  # against its own target, so that nothing but the transpose is wrong
        draws, law = (lower_left @ z @ lower_right.mT).flatten(1) / number**0.5, factored
        assert_gaussian((lower_left.mT @ z @ lower_right.mT).flatten(1) / number**0.5, zero, factored)
    else:
        draws, law = z.flatten(1) @ torch.linalg.cholesky(factored).mT, exact
    with pytest.raises(AssertionError, match="covariance"):
        assert_gaussian(draws, zero, law)


def test_a_seeded_draw_does_not_depend_on_the_chunk(monkeypatch):
    sigma, _ = make("grouped with bias")
    whole = sigma.sample(7, generator())
    monkeypatch.setattr(kronecker, "_DRAWS_AT_ONCE", 1)
    assert_close(sigma.sample(7, generator()), whole)
    assert sigma.sample(0, generator()).shape == (0, 18)
    with pytest.raises(ValueError, match=r"number of draws must be >= 0; got -1"):
        sigma.sample(-1)
    torch.manual_seed(0)
    assert sigma.zero_mean_mvn_samples(4).shape == (4, 18)


@pytest.mark.parametrize("name", CASES)
def test_divergence(name):
    (p, dense_p), (q, dense_q) = make(name), make(name, seed=7)
    shift = torch.randn(len(dense_p), dtype=torch.float64, generator=generator(9))
    zero = torch.zeros_like(shift)
    exact = kl_divergence(MultivariateNormal(zero, dense_p), MultivariateNormal(shift, dense_q))
    assert_close(kl_kronecker(p, q, shift), exact, cond=100)
    wider, dense_wider = make(name, precision=0.1)
    exact = kl_divergence(MultivariateNormal(zero, dense_p), MultivariateNormal(shift, dense_wider))
    assert_close(kl_kronecker(p, wider, shift), exact, cond=100)
    assert kl_kronecker(p, p, zero) == 0


def test_divergence_of_nearly_equal_blocks_does_not_cancel():
    p, _ = make("plain")
    q = 1.0000001 * p
    excess = 1 / torch.tensor(1.0000001, dtype=torch.float64) - 1
    assert_close(kl_kronecker(p, q, torch.zeros(12).double()), 6 * (excess - excess.log1p()), cond=1e9)


def test_refusals(monkeypatch):
    sigma, _ = make("bias")
    left, right, values = sigma.left_vectors, sigma.right_vectors, sigma.eigenvalues
    build = KroneckerSpectralLinearOperator
    with pytest.raises(TypeError, match=r"must be float64; got torch.float32, torch.float64"):
        build(left.float(), right, values)
    with pytest.raises(TypeError, match=r"float32 or float64; got torch.float16"):
        build(left, right, values, result_dtype=torch.float16)
    with pytest.raises(ShapeError, match=r"got \(1, 4, 4\), \(1, 3, 3\), \(1, 3, 4\)"):
        build(right, left, values)
    with pytest.raises(ShapeError, match=r"m > 1 with a bias; got"):
        build(left, right[:, :1, :1], values[..., :1], has_bias=True)
    size = sigma.shape[-1]
    for shape in [(size + 1,), (size + 1, 2), (2, size, 1)]:
        with pytest.raises(ShapeError, match=rf"the right-hand side must have {size} rows; got \({shape[0]},"):
            sigma.inv_quad(torch.zeros(shape))
    with pytest.raises(NotPSDError, match=r"positive numbers; got a minimum of 0.000e\+00"):
        build(left, right, torch.zeros_like(values))
    with pytest.raises(NotPSDError, match=r"positive numbers; got a minimum of nan"):
        build(left, right, values * float("nan"))
    with pytest.raises(NonFiniteError, match=r"eigenvectors must be finite"):
        build(left * float("nan"), right, values)
    with pytest.raises(ShapeError, match=r"expected \(12, S\) or \(12,\); got \(11,\)"):
        sigma @ torch.zeros(11)
    with pytest.raises(ShapeError, match=r"blocks of one shape; got \(1, 3, 4\) and \(1, 3, 4\), with biases True and"):
        kl_kronecker(sigma, make("plain")[0], torch.zeros(12))
    monkeypatch.setattr(memory, "available_memory", lambda device: 100)
    with pytest.raises(MemoryLimitError, match=r"the dense \(12, 12\) matrix needs"):
        sigma.to_dense()
