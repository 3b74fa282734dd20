"""Long runs of Lanczos: resumed, watched, in little memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from lowrank_bdl.errors import CheckpointError, MemoryLimitError
from lowrank_bdl.linalg import files
from lowrank_bdl.linalg.lanczos import Eigenpairs, LanczosProgress, lanczos
from tests.allocations import peak_vectors

SIZE = 150
VALUES = torch.cat((torch.tensor([-6.0, -5.0]), torch.linspace(-1, 6, SIZE - 7), torch.arange(10.0, 15)))


class Killed(Exception):
    pass


def product(values: Tensor, last: int | None = None) -> Callable[[Tensor], Tensor]:
    """Return a diagonal operator that dies at the call after ``last``."""
    calls = 0

    def multiply(vectors: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if last is not None and calls > last:
            raise Killed
        return values * vectors if vectors.ndim == 1 else values[:, None] * vectors

    return multiply


def solve(values: Tensor, last: int | None = None, **options: object) -> Eigenpairs:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(len(values), dtype=values.dtype, generator=g)
    settings = {"k": (4, 2), "start": start, "generator": g, **options}
    return lanczos(product(values, last), **settings)  # type: ignore[arg-type]


def same(a: Eigenpairs, b: Eigenpairs) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("eigenvalues", "eigenvectors", "residuals"))


LOW_RANK = torch.cat((torch.tensor([3.0, 3, 3, 2, -1, -1]), torch.zeros(SIZE - 6)))
RUNS = {
    "plain": (VALUES.double(), {"tol": 1e-6}),
    "restarts": (VALUES.double(), {"num_basis": 12, "tol": 1e-6}),
    "blocks": (VALUES.double(), {"block_size": 3, "num_basis": 30, "tol": 1e-6}),
    "float32": (VALUES, {"tol": 1e-4}),
    "bfloat16": (VALUES, {"tol": 3e-2, "basis_dtype": torch.bfloat16}),
    "breakdowns": (LOW_RANK.double(), {}),
    "confirmed": (VALUES.double(), {"tol": 1e-3, "confirm": True}),
}


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_twice_goes_on_to_the_last_bit(name: str, every: int, tmp_path: Path) -> None:
    values, options = RUNS[name]
    whole = solve(values, **options)
    path = tmp_path / "run.safetensors"
    options = {**options, "checkpoint": path, "checkpoint_every": every, "resume": True}
    for last in (every + 1, 2):
        with pytest.raises(Killed, match="^$"):
            solve(values, last, **options)
    resumed = solve(values, **options)
    assert same(resumed, whole) and torch.equal(resumed.converged, whole.converged)
    assert 0 <= resumed.num_matvecs - whole.num_matvecs <= 1  # one product checks the operator
    again = solve(values, **options)  # from the file of the end
    assert same(again, whole) and again.num_matvecs <= whole.num_matvecs + 1


def test_an_unconverged_run_is_extended_and_a_tolerance_tightened(tmp_path: Path) -> None:
    values, path = VALUES.double(), tmp_path / "run.safetensors"
    whole = solve(values, num_basis=30)
    short = solve(values, num_basis=30, max_matvecs=25, checkpoint=path)
    assert not short.converged.all() and short.num_matvecs == 25
    loose = solve(values, num_basis=30, tol=1e-3, checkpoint=path, resume=True)
    assert loose.converged.all() and loose.num_matvecs < whole.num_matvecs
    tight = solve(values, num_basis=30, checkpoint=path, resume=True)
    assert same(tight, whole) and tight.num_matvecs == whole.num_matvecs + 1


def test_files_of_other_runs_and_operators_are_refused(tmp_path: Path) -> None:
    values, path = VALUES.double(), tmp_path / "run.safetensors"
    solve(values, max_matvecs=20, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"of another run: k was \[4, 2\], now \[3, 3\]"):
        solve(values, k=(3, 3), checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match=r"of another run: dtype was 'torch.float64', now 'torch.float32'"):
        solve(VALUES, checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match=r"num_basis was 26, now 40"):
        solve(values, num_basis=40, checkpoint=path, resume=True)
    with pytest.raises(
        CheckpointError, match=r"of another operator: a product differs .* by [2-9]\.\de-02 of its norm"
    ):
        solve(values * 1.05, checkpoint=path, resume=True)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="resume needs a checkpoint"):
        solve(values, resume=True)
    path.write_bytes(before[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        solve(values, checkpoint=path, resume=True)
    assert same(solve(values, checkpoint=path), solve(values))  # without resume the file is replaced
    assert same(solve(values, checkpoint=path, resume=True), solve(values))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    values, path = VALUES.double(), tmp_path / "run.safetensors"
    solve(values, max_matvecs=20, checkpoint=path)
    tensors, metadata = files.read_tensors(path, "lanczos", ())
    files.write_tensors(path, "lanczos", {**tensors, "tail": tensors["tail"][1:]}, metadata)
    with pytest.raises(CheckpointError, match=r"contradicts itself: tail is \(20, 150\); expected \(21, 150\)"):
        solve(values, checkpoint=path, resume=True)
    files.write_tensors(path, "lanczos", tensors, {"facts": metadata["facts"]})
    with pytest.raises(CheckpointError, match="damaged header: no facts and counts of a Lanczos run"):
        solve(values, checkpoint=path, resume=True)
    files.write_tensors(path, "lanczos", {"head": tensors["head"]}, metadata)
    with pytest.raises(CheckpointError, match="lacks tail, coefficients, lost, bounds, generator"):
        solve(values, checkpoint=path, resume=True)


def test_progress_is_reported_and_can_end_the_run() -> None:
    seen: list[LanczosProgress] = []
    pairs = solve(VALUES.double(), callback=seen.append)
    assert [one.num_matvecs for one in seen] == list(range(1, len(seen) + 1)) and len(seen[0].eigenvalues) == 1
    assert seen[-1].num_matvecs == pairs.num_matvecs and seen[-1].num_converged == 6 > seen[20].num_converged
    assert torch.equal(seen[-1].eigenvalues, pairs.eigenvalues) and torch.equal(seen[-1].residuals, pairs.residuals)
    assert seen[-1].tolerance == torch.finfo(torch.float64).eps ** (2 / 3) * pairs.eigenvalues.abs().max().item()
    ended = solve(VALUES.double(), callback=lambda now: now.num_matvecs >= 12)
    assert ended.num_matvecs == 12 and not ended.converged.all()
    early = solve(VALUES.double(), callback=lambda now: True)
    assert early.num_matvecs == 6 and not early.converged.any()  # as many as pairs were asked for


@pytest.mark.parametrize("dtype, floor", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_a_basis_in_half_precision(dtype: torch.dtype, floor: float) -> None:
    pairs = solve(VALUES, tol=3 * floor, basis_dtype=dtype)
    vectors = pairs.eigenvectors.double()
    residuals = (VALUES.double()[:, None] * vectors - vectors * pairs.eigenvalues).norm(dim=0)
    assert pairs.converged.all() and pairs.eigenvectors.dtype == torch.float32
    torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-3, atol=0)  # measured, rounding of the rows included
    expected = torch.cat((VALUES[-4:].flip(0), VALUES[[1, 0]])).double()
    assert (pairs.eigenvalues - expected).abs().max() < 0.1
    assert (vectors.mT @ vectors - torch.eye(6)).abs().max() < floor
    unmeasured = solve(VALUES, tol=3 * floor, basis_dtype=dtype, verify=False)
    assert unmeasured.num_matvecs == pairs.num_matvecs - 6 and (unmeasured.residuals <= residuals).any()


def test_a_basis_elsewhere(device: torch.device) -> None:
    values = VALUES.double().to(device)
    start = torch.ones(SIZE, dtype=torch.float64, device=device)
    pairs = [lanczos(lambda v: values * v, (4, 2), start=start, basis_device=where) for where in (None, "cpu")]
    for one in pairs:
        assert one.eigenvectors.device == one.eigenvalues.device == one.converged.device == values.device
        assert one.converged.all()
    torch.testing.assert_close(pairs[0].eigenvalues, pairs[1].eigenvalues, rtol=0, atol=1e-9)


def test_vectors_of_an_operator_in_half_precision_are_in_single() -> None:
    values = torch.tensor([8.0, 4, 2, 1, -4]).bfloat16()
    pairs = lanczos(DiagLinearOperator(values), (1, 1), tol=2e-2, generator=torch.Generator().manual_seed(0))
    assert pairs.eigenvectors.dtype == torch.float32 and pairs.converged.all()
    assert (pairs.eigenvalues - torch.tensor([8.0, -4.0])).abs().max() < 0.05


@pytest.mark.parametrize("options, vectors", [({}, 22), ({"block_size": 2}, 24), ({"basis_dtype": torch.bfloat16}, 20)])
def test_memory_is_the_basis_the_vector_that_comes_next_and_its_product(
    options: dict[str, object], vectors: int
) -> None:
    """20 rows, 1 that comes next and the product; in bfloat16 half of them, 1 to work with, and the 6 eigenvectors."""
    size = 400_000
    values, start = torch.linspace(-1, 1, size).pow(5), torch.ones(size)
    multiply = product(values)

    def run() -> None:
        pairs = lanczos(multiply, (4, 2), start=start, num_basis=20, max_matvecs=24, tol=0.0, **options)
        assert not pairs.converged.any()  # it restarts, and forms all eigenvectors

    assert vectors - 4 < peak_vectors(run, size) < vectors + 0.7  # chunks


def test_memory_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_bdl.linalg.memory.available_memory", lambda device: 3 * 2**30)
    start = torch.ones(10**7)
    message = r"the Lanczos basis of 61 vectors of 10,000,000 and 1 to work with needs 2\.31 GiB"
    with pytest.raises(MemoryLimitError, match=r"61 vectors .* needs 4\.62 GiB on cpu; 3\.00 GiB are free"):
        lanczos(lambda v: v, (20, 5), start=start.double())
    monkeypatch.setattr("lowrank_bdl.linalg.memory.available_memory", lambda device: 2 * 2**30)
    with pytest.raises(MemoryLimitError, match=message):
        lanczos(lambda v: v, (20, 5), start=start)


def test_bad_options() -> None:
    op = DiagLinearOperator(torch.arange(9.0))
    with pytest.raises(ValueError, match="block_size must be at least 1; got 0"):
        lanczos(op, 1, block_size=0)
    with pytest.raises(ValueError, match="basis_dtype must be a floating dtype; got torch.int8"):
        lanczos(op, 1, basis_dtype=torch.int8)
    with pytest.raises(ValueError, match="2 pairs need num_basis >= 5 and max_matvecs >= 2; got 4 and None"):
        lanczos(op, 2, block_size=3, num_basis=4)
    with pytest.raises(ValueError, match=r"the operator must turn \(9,\) into the same shape; got \(9, 1\)"):
        lanczos(lambda v: v[:, None], 1, start=torch.ones(9))
    with pytest.raises(ValueError, match=r"the operator must turn \(9, 2\) into the same shape; got float"):
        lanczos(lambda v: 1.0, 1, block_size=2, start=torch.ones(9))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"s <= 2, the block_size; got \(9, 3\)"):
        lanczos(op, 1, block_size=2, start=torch.ones(9, 3))


def test_single_precision_stays_orthogonal_beside_large_entries() -> None:
    """Eigenvectors that are one entry each: one long float32 sum would lose all small products beside it."""
    size = 300_000
    values = 0.01 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    values[:12] = torch.logspace(2, 0, 12)
    start = torch.randn(size, generator=torch.Generator().manual_seed(1))
    pairs = lanczos(product(values), (10, 2), start=start, num_basis=30, max_matvecs=30, tol=0.0)
    vectors = pairs.eigenvectors.double()
    assert (vectors.mT @ vectors - torch.eye(12)).abs().max() < 1e-5
    measured = (values.double()[:, None] * vectors - vectors * pairs.eigenvalues).norm(dim=0)
    assert (measured - pairs.residuals).abs().max() < 1e-4  # the largest eigenvalue is 100
