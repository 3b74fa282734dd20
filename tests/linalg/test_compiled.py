"""The compiled kernels against dense float64, and against the kernels written in torch that they stand in for."""

import pytest
import torch
from torch import Tensor

from lowrank_bdl.linalg import compiled
from lowrank_bdl.linalg.capacitance import factorize
from lowrank_bdl.linalg.factors import LowRankFactors
from lowrank_bdl.linalg.kernels import finish_draw_, matmul
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.moments import StreamingMoments
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from lowrank_bdl.linalg.ridge import ridge
from tests.oracles import assert_close

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C compiler, or its library does not load")

DIMS = (1, 15, 1023, 1024, 1025, 3000)
RANKS = (1, 3, 4, 5, 20, 33)
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiled kernels take small matrices too, on two threads."""
    monkeypatch.setattr(compiled, "SMALLEST", 1)
    monkeypatch.setattr(compiled, "A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def problem(dim: int, rank: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return root, diag, x and mean; two point masses where there is room."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, dim, generator=g, dtype=torch.float64)
    diag = (torch.rand(dim, generator=g, dtype=torch.float64) * 4 - 2).exp()
    x, mean = torch.randn(2, dim, generator=g, dtype=torch.float64)
    if dim > 4:
        diag[[1, dim - 1]] = 0.0
        rows[:, [1, dim - 1]] = 0.0
    return rows.to(dtype).mT, diag.to(dtype), x.to(dtype), mean.to(dtype)


def inverse(diag: Tensor) -> Tensor:
    return torch.where(diag > 0, 1 / diag.double(), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dim", DIMS)
def test_sums(dim, rank, dtype):
    """Gram matrix, projection, residual and logarithms, for widths around the block and ranks around the tile."""
    root, diag, x, mean = problem(dim, rank, dtype)
    wide, weight, centred = root.double(), inverse(diag), x.double() - mean.double()
    for arithmetic in {dtype, torch.float64}:
        products, sums = compiled.gram(root, diag, arithmetic, x, mean)
        assert_close(products, wide.mT * weight @ wide, arithmetic if dtype is torch.float64 else dtype)
        expected = torch.cat((wide.mT @ (weight * centred), (weight * centred.square()).sum()[None]))
        scale = dtype if dtype is torch.float32 else arithmetic
        assert sums is not None
        assert_close(sums, expected, scale, cond=4.0)
        assert_close(compiled.project(root, diag, x, mean, arithmetic), expected, scale, cond=4.0)
        plain = torch.cat((wide.mT @ x.double(), x.double().square().sum()[None]))
        assert_close(compiled.project(root, None, x, None, arithmetic), plain, scale, cond=4.0)
        assert_close(compiled.gram(root, None, arithmetic)[0], wide.mT @ wide, scale)
        z = torch.randn(rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        residual = centred - wide @ z
        squares, quotient = compiled.residual(root, diag, x, mean, z, arithmetic, solve=True)
        expected = torch.stack([t.sum() for t in (residual.square() * weight, (residual * weight).square())])
        assert_close(squares[:2], expected, scale, cond=10.0)
        assert_close(squares[2], (centred * weight).square().sum(), scale)
        assert quotient is not None
        assert_close(quotient, residual * weight, scale, cond=10.0)
        squares, quotient = compiled.residual(root, diag, x, mean, z, arithmetic, solve=False)
        assert quotient is None
        assert_close(squares[:2], expected, scale, cond=10.0)
    log_sum, zeros, bad = compiled.scan(diag)
    assert_close(log_sum, diag.double()[diag > 0].log().sum(), torch.float64, cond=10.0)
    assert (zeros, bad) == (int((diag == 0).sum()), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dim", DIMS)
def test_vectors(dim, rank, dtype):
    """What is as long as the matrix is wide: products, draws, combinations of rows, the diagonal."""
    root, diag, x, mean = problem(dim, rank, dtype)
    wide = root.double()
    z = torch.randn(rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low_rank = wide @ z
    out = compiled.lift(root, diag, x, mean, z, torch.full_like(x, torch.nan), std=True)
    assert_close(out, mean.double() + diag.double().sqrt() * x.double() + low_rank, dtype)
    alias = x.clone()
    version = alias._version
    assert compiled.lift(root, diag, alias, None, z, alias, std=False) is alias and alias._version > version
    assert_close(alias, diag.double() * x.double() + low_rank, dtype)
    for count in (1, 2, 3, 4, 5, 6, 13):
        weights = torch.randn(count, rank, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for arithmetic in {dtype, torch.float64}:
            assert_close(compiled.rotate(root, weights, arithmetic), weights @ wide.mT, dtype)
    assert_close(compiled.diagonal(root, diag, 0.25), diag.double() + 0.25 * wide.square().sum(-1), dtype)


def test_rows_apart():
    """A slice of wider storage is read in place; what is not K x D storage is left to torch."""
    root, diag, x, _ = problem(3000, 5, torch.float32)
    part = slice(7, 2500)
    view = root[part]
    assert view.stride(1) == 3000 and compiled.applies(view, diag[part], x[part])
    expected = compiled.gram(root[part].mT.contiguous().mT, diag[part], torch.float32)[0]
    assert torch.equal(compiled.gram(view, diag[part], torch.float32)[0], expected)
    tall = root.contiguous()
    assert not compiled.applies(tall, diag) and not compiled.applies(root[::2], diag[::2])
    assert not compiled.applies(root.double(), diag) and not compiled.applies(root.bfloat16(), diag)
    assert not compiled.applies(root, diag, x.double()) and not compiled.applies(root, diag, x[:5])
    assert not compiled.applies(root[None], diag[None]) and not compiled.applies(root[:, :0], diag)
    assert not compiled.applies(root.to("meta"), diag.to("meta"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather(dtype):
    """Runs of coordinates, which are copied whole, and scattered ones, in the operator as in the kernel."""
    root, diag, x, _ = problem(5000, 5, dtype)
    g = torch.Generator().manual_seed(1)
    runs = torch.cat((torch.arange(1000, 3500), torch.arange(10), torch.arange(4000, 5000)))
    for index in (runs, torch.randperm(5000, generator=g)[:1500], runs.flip(0), runs[:0], runs[::2]):
        assert torch.equal(compiled.gather(root, index), root.mT[:, index])
    operator = LowRankPlusDiagLinearOperator(root, diag.clamp_min(0.1))
    block = operator[runs][:, runs]
    expected = LowRankPlusDiagLinearOperator(root.mT[:, runs].mT, diag.clamp_min(0.1)[runs])
    assert torch.equal(block.root, expected.root) and torch.equal(block.diag, expected.diag)
    leaf = root.clone().requires_grad_()
    chosen = LowRankPlusDiagLinearOperator(leaf, diag.clamp_min(0.1)).select(runs, runs)
    chosen.solve(x[runs]).sum().backward()  # a gather that is asked for a gradient is left to torch
    assert leaf.grad is not None and bool((leaf.grad[runs] != 0).any()) and not bool(leaf.grad[3600:3900].any())


def test_scan_counts_and_takes_subnormals():
    tiny = torch.tensor([5e-324, 1e-310, 2.2e-308, 1e308, 3.0], dtype=torch.float64)
    assert_close(compiled.scan(tiny)[0], tiny.log().sum(), torch.float64)
    diag = torch.tensor([1e-45, 3e38, 0.0, -1.0, torch.nan, torch.inf, 0.5])
    log_sum, zeros, bad = compiled.scan(diag)
    assert (zeros, bad) == (1, 3)
    assert_close(log_sum, diag.double()[[0, 1, 6]].log().sum(), torch.float64)


def test_nan_is_passed_on():
    root, diag, x, mean = problem(3000, 5, torch.float32)
    x[2000] = torch.nan
    operator = LowRankPlusDiagLinearOperator(root, diag.clamp_min(0.1))
    assert MultivariateNormal(mean, operator).log_prob(x).isnan()
    assert operator.solve(x).isnan().all()
    assert operator.matmul(x).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dim", DIMS)
def test_subtraction_in_place(dim, rank, dtype):
    """A vector less a combination of columns, its norm, and its projection by the same read."""
    root, _, x, _ = problem(dim, rank, dtype)
    z = torch.randn(rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, version = x.clone(), x._version
    sums = compiled.subtract_(root, left, z, project=True)
    assert_close(left, x.double() - root.double() @ z, dtype, cond=10.0)
    expected = torch.cat((root.double().mT @ left.double(), left.double().square().sum()[None]))
    assert_close(sums, expected, dtype, cond=4.0)
    again = x.clone()
    norm = compiled.subtract_(root, again, z, project=False)
    assert torch.equal(again, left) and norm[-1] == sums[-1] and (norm[:-1] == 0).all()
    assert again._version > version


def test_threads_do_not_change_a_sum(monkeypatch):
    root, diag, x, mean = problem(200_000, 7, torch.float32)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        products, sums = compiled.gram(root, diag, torch.float32, x, mean)
        left = x.clone()
        found = (sums, compiled.project(root, diag, x, mean, torch.float32), left)
        results.append(torch.cat((products.flatten(), compiled.subtract_(root, left, sums[:-1], True), *found)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stated_rounding(dtype):
    """The error estimate that the one-pass quadratic form relies on, checked where sums are long."""
    root, diag, x, mean = problem(300_000, 8, dtype)
    products, sums = compiled.gram(root, diag, dtype, x, mean)
    wide, weight, centred = root.double(), inverse(diag), x.double() - mean.double()
    exact = torch.cat((wide.mT * weight @ wide, (wide.mT @ (weight * centred))[:, None]), dim=-1)
    norms = exact.diagonal().sqrt()
    size = torch.cat((norms[:, None] * norms, norms[:, None] * (weight * centred.square()).sum().sqrt()), dim=-1)
    error = ((torch.cat((products, sums[:-1, None]), dim=-1) - exact).abs() / size).max().item()
    assert error < max(compiled.rounding(300_000, dtype), 2e-13)  # the oracle itself rounds


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3], ids=lambda s: f"root x {s:g}")
@pytest.mark.parametrize("far", [0.0, 30.0], ids=["a draw", "far off"])
def test_quadratic_form(scale, far, monkeypatch):
    """One pass where that is precise enough, two where it is not: the same value to 1e-5 in float32 either way."""
    root, diag, _, mean = problem(50_000, 20, torch.float32)
    diag = diag.clamp_min(0.1)
    root = (root.mT * scale).mT
    operator, exact = (
        LowRankPlusDiagLinearOperator(root, diag),
        LowRankPlusDiagLinearOperator(root.double(), diag.double()),
    )
    x = operator.sample(1, torch.Generator().manual_seed(3), mean)[0] + far * root[:, 0]
    with monkeypatch.context() as context:
        context.setattr(compiled, "library", lambda: None)
        expected = exact.inv_quad((x.double() - mean.double()).unsqueeze(-1))
    factors = operator.factors
    result = ridge(factors, factorize(factors), x.unsqueeze(-1), mean=mean)
    assert_close(result.quadratic[0], expected, torch.float32)
    with monkeypatch.context() as context:
        context.setattr(compiled, "library", lambda: None)
        plain = ridge(factors, factorize(factors), x.unsqueeze(-1), mean=mean)
    assert_close(result.quadratic, plain.quadratic, torch.float32)
    assert_close(result.weights, plain.weights, torch.float32, cond=10.0)


def test_far_values_take_the_second_pass(monkeypatch):
    """The subtraction would lose a value that lies far along the low-rank part; the residual does not."""
    root, diag, _, _ = problem(50_000, 4, torch.float32)
    root, diag = (root.mT * 1e3).mT, diag.clamp_min(0.1)
    x = 1e3 * root[:, 0] + diag.sqrt() * torch.randn(50_000, generator=torch.Generator().manual_seed(5))
    factors = LowRankFactors(root, diag, torch.ones(()))
    passes = []
    original = compiled.residual
    monkeypatch.setattr(compiled, "residual", lambda *a: passes.append(a) or original(*a))
    value = ridge(factors, factorize(factors), x.unsqueeze(-1)).quadratic
    assert passes
    wide = LowRankFactors(root.double(), diag.double(), torch.ones(()))
    assert_close(value, ridge(wide, factorize(wide), x.double().unsqueeze(-1)).quadratic, torch.float32)


def test_a_draw_is_that_of_torch(monkeypatch):
    """The same normals give the same draw, to rounding, as the path without a compiler."""
    root, diag, x, mean = problem(40_000, 20, torch.float32)
    factors = LowRankFactors(root, diag, torch.ones(()))
    inner = torch.randn(20, 1, generator=torch.Generator().manual_seed(1))
    ours = finish_draw_(factors, x[None].clone(), inner, mean)
    product = matmul(factors, x[:, None])
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert_close(ours, finish_draw_(factors, x[None].clone(), inner, mean).double(), torch.float32)
    assert_close(product, matmul(factors, x[:, None]).double(), torch.float32)


def test_factorisation_takes_the_projection_along(monkeypatch):
    root, diag, x, mean = problem(40_000, 6, torch.float32)
    monkeypatch.setattr(compiled, "project", lambda *a: pytest.fail("the factorisation read the root already"))
    normal = MultivariateNormal(mean, LowRankPlusDiagLinearOperator(root, diag.clamp_min(0.1)))
    value = normal.log_prob(x)
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "SMALLEST", 1)
    wide = MultivariateNormal(mean.double(), LowRankPlusDiagLinearOperator(root.double(), diag.clamp_min(0.1).double()))
    assert_close(value, wide.log_prob(x.double()), torch.float32)
    assert_close(normal.log_prob(x), value, torch.float64, cond=1e4)  # the second time it is projected alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prior", [0, 3])
def test_collection_is_that_of_torch(dtype, prior, monkeypatch):
    thetas = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) + 5
    start = torch.zeros(3000, dtype=dtype)
    results = []
    for library in (compiled.library, lambda: None):
        monkeypatch.setattr(compiled, "library", library)
        moments = StreamingMoments(3000, dtype=dtype, prior_mean=start if prior else None, prior_count=prior)
        rows = torch.full((4, 3000), torch.nan, dtype=dtype)
        for theta, row in zip(thetas, rows, strict=True):
            version = row._version
            moments.update(theta, deviation=row)
            assert row._version > version
        results.append((moments.mean, moments.variance(), rows))
    for ours, plain in zip(*results, strict=True):
        assert_close(ours, plain.double(), dtype)
    if not prior:
        assert_close(results[0][0], thetas.double().mean(0), dtype)
        assert_close(results[0][1], thetas.double().var(0), dtype, cond=10.0)


def test_no_memory_is_an_error(monkeypatch):
    class Full:
        def __getattr__(self, name):
            return lambda *arguments: 1

    root, diag, _, _ = problem(3000, 5, torch.float32)
    monkeypatch.setattr(compiled, "library", lambda: Full())
    with pytest.raises(MemoryError, match="gram_float_float could not allocate"):
        compiled.gram(root, diag, torch.float32)
