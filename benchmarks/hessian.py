"""Both ends of the spectrum of a network's Hessian, by our eigensolver and by those of other packages.

The network has 21,634 weights and has been trained for a few steps on 128 of scikit-learn's digits. Every way makes its
operator and finds the eigenpairs; products are counted by wrapping what the solver calls. Residuals ||Hv - lambda v||
are measured in float64 by products that nobody counts, and values compared with a float64 decomposition; both are
relative to the largest eigenvalue. Ways run in random order within each round, ratios are of times of the same round,
and the peak of memory is that of a process of its own, above network and images. Then the solver's own time and memory
on a diagonal matrix, against the passes over the basis that it cannot do without.

    pip install curvlinops-for-pytorch pyhessian hessian-eigenthings     # what is missing is left out
    python -m benchmarks.hessian                                         # on one thread, some ten minutes
    python -m benchmarks.hessian --images 16 --top 3 --bottom 2 --dim 20000 --steps 30 --peer_steps 20

Writes hessian-HARDWARE.json and .md into --out.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import hessian_solvers, lanczos_steps
from benchmarks.environment import environment, hardware_label
from benchmarks.harness import Check, Contender, Policy, compare, timed
from benchmarks.hessian_problem import HessianProblem, HessianSize, Reference, find_reference, judge
from benchmarks.hessian_report import markdown
from benchmarks.lanczos_steps import StepSize
from benchmarks.memory import in_own_process, peak_above
from experiments.common import write_atomically

PROG = "python -m benchmarks.hessian"
TOLERANCES = {hessian_solvers.OURS: 1e-3, hessian_solvers.OURS_TIGHT: 1e-5, hessian_solvers.OURS_WIDE: 1e-3}
ROUNDING = 2e-6
"""What a residual in float32 is off by, relative to the largest eigenvalue."""
TIMEOUT_S = 3600.0


def find(name: str, size: HessianSize, steps: int) -> Contender:
    """Return a contender by name."""
    return next(way for way in hessian_solvers.contenders(size, steps) if way.name == name)


def measure_way(name: str, size: HessianSize, steps: int, reference: Reference) -> dict[str, Any]:
    """Return peak memory, seconds and worth of one way's answer; runs in a process of its own."""
    tiny = size.tiny()
    find(name, tiny, 4).prepare(HessianProblem(tiny))()
    problem = HessianProblem(size)
    call = find(name, size, steps).prepare(problem)
    kept: list[Any] = []
    above, method = peak_above(lambda: kept.extend(timed(call, problem.device)), problem.device)
    seconds, answer = kept
    return {"above_inputs": above, "method": method, "seconds": seconds, **judge(problem, answer, reference)}


def verdict(name: str, worth: dict[str, Any]) -> Check:
    """Judge an answer: ours must keep what was asked for, of the others the worth is reported as it is."""
    if name not in TOLERANCES:
        return Check(0.0)
    limit = TOLERANCES[name] + ROUNDING
    residual = float("nan") if worth["residual"] is None else worth["residual"]
    return Check.of(residual=(residual, limit), values=(max(worth["error_top"], worth["error_bottom"]), limit))


def products_for(descent: Sequence[tuple[int, float]], residual: float | None) -> int | None:
    """Return how many products ours need for a residual; None where there is none, or ours stops short of it."""
    return None if residual is None else next((count for count, worst in descent if worst <= residual), None)


def measure(size: HessianSize, *, policy: Policy) -> dict[str, Any]:
    """Return the record of one network: what was found, and a row a way."""
    problem = HessianProblem(size)
    reference = find_reference(problem)
    steps = hessian_solvers.ours(problem, 1e-3, hessian_solvers.wide(size)).products
    ways = hessian_solvers.contenders(size, steps)
    skipped, apart = hessian_solvers.missing(ways), {}
    for way in ways:
        if way.name not in skipped:
            case = {"name": way.name, "size": size, "steps": steps, "reference": reference}
            apart[way.name] = in_own_process(measure_way, case, device=problem.device, timeout_s=TIMEOUT_S)
            print(f"{way.name}: {apart[way.name]}", file=sys.stderr)
    worth = {name: found for name, found in apart.items() if found["status"] == "ok"}
    skipped |= {name: found["reason"] for name, found in apart.items() if name not in worth}

    judged = {name: (found["seconds"], verdict(name, found)) for name, found in worth.items()}
    rows = compare(
        problem,
        ways,
        lambda problem, answer: Check(0.0),  # every answer was judged where its memory was measured
        device=problem.device,
        policy=policy,
        rng=random.Random(size.seed),
        references=(hessian_solvers.OURS,),
        skipped=skipped,
        measured={name: one for name, one in judged.items() if one[0] > policy.once_above_s or not one[1].ok},
    )
    descent = hessian_solvers.descent(problem, 1e-7, max_matvecs=max(4 * steps, 200))
    for row in rows:
        found = worth.get(row["contender"], {})
        row |= {"worth": found, "ours_for_this_residual": products_for(descent, found.get("residual"))}
    return {
        "size": asdict(size),
        "weights": problem.num_weights,
        "loss": problem.loss,
        "reference": asdict(reference),
        "fixed_steps": steps,
        "descent": descent,
        "rows": rows,
    }


def failures(record: dict[str, Any]) -> list[str]:
    """Return what is wrong or has failed; what is left out is neither."""
    rows = [row for part in (record["hessian"], *record["solver"]) for row in part["rows"]]
    found = [f"{row['contender']}: {row['reason']}" for row in rows if row["status"] in ("wrong", "failed")]
    return found + [
        f"{row['contender']}: {row['reason']}"
        for row in record["hessian"]["rows"]
        if row["status"] == "skipped" and not row["reason"].startswith("left out")
    ]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(prog=PROG, description=__doc__, formatter_class=layout)
    result.add_argument("--images", type=int, default=128, help="how many digits (at most 797)")
    result.add_argument("--train_steps", type=int, default=20, help="steps of gradient descent on them before")
    result.add_argument("--top", type=int, default=20, help="largest eigenvalues")
    result.add_argument("--bottom", type=int, default=5, help="smallest eigenvalues")
    result.add_argument("--dim", type=int, default=1_000_000, help="size of the diagonal matrix")
    result.add_argument("--steps", type=int, default=100, help="steps of ours on it")
    result.add_argument("--peer_steps", type=int, default=50, help="steps of ours and of lanczos_tridiag on it")
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--device", default="cpu")
    result.add_argument("--budget", type=float, default=60.0, help="seconds of rounds for each of the three tables")
    result.add_argument("--once_above", type=float, default=40.0, help="what takes longer is timed once [s]")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    return result


def refusal(options: argparse.Namespace) -> str | None:
    """Return why these settings cannot run, or None."""
    for name in ("images", "train_steps", "top", "bottom", "dim", "steps", "peer_steps", "threads"):
        if getattr(options, name) < 1:
            return f"--{name} must be at least 1; got {getattr(options, name)}"
    if options.images > 797:
        return f"--images must be at most 797; got {options.images}"
    least = options.top + options.bottom + 1
    for name in ("steps", "peer_steps"):
        if not least <= getattr(options, name) <= options.dim:
            return f"--{name} must be between --top + --bottom + 1 = {least} and --dim; got {getattr(options, name)}"
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    options = parser().parse_args(argv)
    reason = refusal(options)
    if reason is not None:
        print(f"{PROG}: error: {reason}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    policy = Policy(options.budget, min_rounds=2, max_rounds=20, once_above_s=options.once_above)
    ends = {"top": options.top, "bottom": options.bottom, "seed": options.seed, "device": options.device}
    size = HessianSize(images=options.images, train_steps=options.train_steps, **ends)
    diagonal = StepSize(dim=options.dim, steps=options.peer_steps, **ends)
    try:
        record = {
            "format": "lowrank_bdl-hessian",
            "version": 1,
            "environment": environment(device),
            "peers": hessian_solvers.versions(),
            "hessian": measure(size, policy=policy),
            "solver": [
                lanczos_steps.measure(diagonal, peer=True, policy=policy, timeout_s=TIMEOUT_S),
                lanczos_steps.measure(
                    replace(diagonal, steps=options.steps), peer=False, policy=policy, timeout_s=TIMEOUT_S
                ),
            ],
        }
    finally:
        torch.set_num_threads(before)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"hessian-{hardware_label(device)}"
    write_atomically(stem.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    write_atomically(stem.with_suffix(".md"), markdown(record))
    print(markdown(record))
    wrong = failures(record)
    for line in wrong:
        print(f"{PROG}: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
