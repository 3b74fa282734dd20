"""The comparison of eigensolvers counts, judges and leaves out as it says."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import hessian, hessian_solvers, lanczos_steps
from benchmarks.hessian import products_for, verdict
from benchmarks.hessian_problem import (
    NUM_WEIGHTS,
    Answer,
    HessianProblem,
    HessianSize,
    Reference,
    find_reference,
    judge,
    network,
)
from benchmarks.lanczos_steps import FLOOR, PEER, StepProblem, StepSize

SIZE = HessianSize(images=4, train_steps=1, top=3, bottom=2)


@pytest.fixture(scope="module")
def problem() -> HessianProblem:
    return HessianProblem(SIZE)


@pytest.fixture(scope="module")
def reference(problem: HessianProblem) -> Reference:
    return find_reference(problem)


@pytest.mark.slow
def test_the_script_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"images": 4, "train_steps": 1, "top": 3, "bottom": 2, "dim": 20_000, "steps": 30, "peer_steps": 20}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    assert hessian.main([*flags, "--budget", "0.1", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("hessian-*.json")
    record = json.loads(file.read_text())
    assert record["hessian"]["weights"] == NUM_WEIGHTS and record["environment"]["threads"] == 1
    rows = {row["contender"]: row for row in record["hessian"]["rows"]}
    for name, tol in hessian.TOLERANCES.items():
        worth = rows[name]["worth"]
        assert rows[name]["status"] == "ok" and len(rows[name]["times_s"]) >= 2
        assert worth["residual"] <= tol + hessian.ROUNDING and worth["above_inputs"] > 0
        assert 0 < rows[name]["ours_for_this_residual"] <= worth["products"] + 2
    assert rows[hessian_solvers.OURS]["ratios"][hessian_solvers.OURS]["median"] == 1.0
    for name, row in rows.items():
        left_out = row["status"] == "skipped"
        assert left_out == (name in hessian_solvers.missing(hessian_solvers.contenders(SIZE, 10)))
        assert not left_out or row["reason"].startswith("left out: ")
    for part, steps in zip(record["solver"], (20, 30), strict=True):
        kinds = {row["contender"]: row for row in part["rows"]}
        assert part["steps"] == steps and set(kinds) >= {FLOOR, lanczos_steps.OURS}
        assert kinds[lanczos_steps.OURS]["ratios"][FLOOR]["median"] > 0
        assert kinds[lanczos_steps.OURS]["memory"]["vectors_beyond_basis"] > 0
    assert (PEER in {row["contender"] for row in record["solver"][0]["rows"]}, PEER in kinds) == (True, False)
    table = file.with_suffix(".md").read_text()
    assert all(name in table for name in (*rows, FLOOR)) and table in capsys.readouterr().out


def test_the_network_has_the_weights_it_is_named_for() -> None:
    assert sum(p.numel() for p in network().parameters()) == NUM_WEIGHTS == 21_634


def test_exact_products_are_those_of_the_hessian(problem: HessianProblem) -> None:
    vector, step = torch.randn(NUM_WEIGHTS, generator=torch.Generator().manual_seed(1)).double(), 1e-6
    gradients = []
    for sign in (1, -1):
        parameters = nn.utils.parameters_to_vector(problem.model.parameters()).detach().double()
        moved = copy.deepcopy(problem.model).double()
        nn.utils.vector_to_parameters(parameters + sign * step * vector / vector.norm(), moved.parameters())
        loss = nn.functional.cross_entropy(moved(problem.x.double()), problem.y)
        gradients.append(nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(moved.parameters()))))
    expected = (gradients[0] - gradients[1]) / (2 * step) * vector.norm()
    product = problem.exact(vector)
    assert (product - expected).norm() < 1e-5 * product.norm()


def test_ours_is_counted_and_right(problem: HessianProblem, reference: Reference) -> None:
    assert reference.residual < 1e-8
    answer = hessian_solvers.ours(problem, 1e-5, hessian_solvers.wide(SIZE))
    worth = judge(problem, answer, reference)
    assert verdict(hessian_solvers.OURS_TIGHT, worth).ok and worth["residual"] < 1.2e-5
    assert (worth["found_top"], worth["found_bottom"]) == (3, 2)
    descent = hessian_solvers.descent(problem, 1e-5, 300)
    assert descent[-1][0] == answer.products >= (products_for(descent, 1e-5) or 0) > 0
    assert products_for(descent, None) is None and products_for(descent, 1e-9) is None


def test_answers_are_judged(problem: HessianProblem, reference: Reference) -> None:
    answer = hessian_solvers.ours(problem, 1e-5)
    doubled = Answer(answer.top[[0, 0, 1]], answer.top_vectors[:, [0, 0, 1]], answer.bottom, answer.bottom_vectors, 7)
    worth = judge(problem, doubled, reference)
    gap = max(abs(reference.top[1] - reference.top[0]), abs(reference.top[2] - reference.top[1])) / reference.scale
    assert worth["error_top"] == pytest.approx(gap, rel=1e-3) and worth["residual"] < 1.2e-5
    assert not verdict(hessian_solvers.OURS_TIGHT, worth).ok
    nothing = Answer(answer.top, 0 * answer.top_vectors, answer.bottom[:0], answer.bottom_vectors[:, :0], 7)
    worth = judge(problem, nothing, reference)
    assert worth["residual_top"] == float("inf") and worth["found_bottom"] == 0
    assert worth["residual"] is None and worth["residual_bottom"] is None and worth["error_bottom"] is None


@pytest.mark.parametrize("way", hessian_solvers.contenders(SIZE, 40), ids=lambda way: way.name)
def test_every_way_that_is_installed_gives_an_answer(
    way: hessian.Contender, problem: HessianProblem, reference: Reference
) -> None:
    if way.name in hessian_solvers.missing([way]):
        pytest.skip(f"{way.package} is not installed")
    before = [p.detach().clone() for p in problem.model.parameters()]
    worth = judge(problem, way.prepare(problem)(), reference)
    assert worth["products"] >= 5 and worth["found_top"] > 0
    if "defaults" not in way.name and "to_diag" not in way.name:
        assert worth["residual"] < 2e-3 and max(worth["error_top"], worth["error_bottom"]) < 2e-3
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(problem.model.parameters(), before, strict=True))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_solvers, "version_of", lambda package: None if package == "pyhessian" else "1.0")
    left_out = hessian_solvers.missing(hessian_solvers.contenders(SIZE, 10))
    assert left_out == {"pyhessian, its defaults": "left out: pyhessian is not installed"}


def test_steps_are_judged() -> None:
    problem = StepProblem(StepSize(3_000, 30, 4, 2))
    answer = lanczos_steps.own_steps(problem)()
    assert answer.num_matvecs == 30 and lanczos_steps.check(problem, answer).ok
    assert not lanczos_steps.check(StepProblem(StepSize(3_000, 29, 4, 2)), answer).ok
    basis, projected = lanczos_steps.peer_steps(problem)()
    assert lanczos_steps.check(problem, (basis, projected)).ok
    assert not lanczos_steps.check(problem, (basis * 1.001, projected)).ok


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "0"], "--images must be at least 1; got 0"),
        (["--images", "798"], "--images must be at most 797; got 798"),
        (["--steps", "25"], "--steps must be between --top + --bottom + 1 = 26 and --dim; got 25"),
        (["--dim", "40"], "--steps must be between --top + --bottom + 1 = 26 and --dim; got 100"),
    ],
)
def test_bad_settings_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert hessian.main([*flags, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()
