"""Time and peak memory of every operation against size and rank, beside peers and the limits of this machine.

    python -m benchmarks.rank_scaling                    # everything, about 35 minutes on two cores
    python -m benchmarks.rank_scaling --quick            # a smoke run of under a minute
    python -m benchmarks.rank_scaling --dims 36000000 --ranks 50 --operations sample log_prob_new   # your own question

Writes NAME.json, NAME.md and NAME-*.png into benchmarks/results (or --out), where NAME is the date and the hardware.
The JSON file is written after every comparison; --resume goes on with one that was interrupted.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.suite import Settings


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.rank_scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    result.add_argument("--dims", type=_count, nargs="+", help="sizes D, such as 1e5 1e6 1e7 3.6e7")
    result.add_argument("--ranks", type=_count, nargs="+", help="ranks K; default 1 5 10 20 50 100")
    result.add_argument(
        "--main-rank", type=_count, help="rank at which everything is measured; default 20, else the largest"
    )
    result.add_argument("--models", nargs="*", choices=("330-tensors", "36M", "tiny"), help="networks to collect from")
    result.add_argument("--operations", nargs="+", help="names of operations; all by default")
    result.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    result.add_argument("--device", default="cpu")
    result.add_argument("--threads", type=_count, help="threads on the CPU; torch's choice by default")
    result.add_argument("--max-minutes", type=float, default=60.0, help="start no comparison after this long")
    result.add_argument("--no-memory", action="store_true", help="leave out the measurements of memory")
    result.add_argument("--no-plots", action="store_true")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="a directory or a .json file"
    )
    result.add_argument("--label", help="hardware in file names, such as 2-core-cpu; found out by default")
    result.add_argument("--resume", action="store_true", help="go on with the same output file")
    result.add_argument(
        "--report-only", action="store_true", help="write tables and plots of an existing --out file again"
    )
    return result


def _count(text: str) -> int:
    value = int(float(text))
    if value != float(text) or value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; return the exit status."""
    options = parser().parse_args(argv)
    warnings.simplefilter("ignore")  # those of peers; ours are tested elsewhere
    from benchmarks import report, suite, targets
    from benchmarks.environment import hardware_label
    from benchmarks.measure import REGISTRY

    unknown = [name for name in options.operations or () if name not in REGISTRY]
    if unknown:
        print(f"unknown operations {', '.join(unknown)}; there are: {', '.join(REGISTRY)}", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available", file=sys.stderr)
        return 2
    name = f"{time.strftime('%Y-%m-%d')}-{options.label or hardware_label(device)}{'-quick' if options.quick else ''}"
    out: Path = options.out if options.out.suffix == ".json" else options.out / f"{name}.json"
    if options.report_only:
        import json

        record = json.loads(out.read_text())
        record["targets"], record["state_slope"] = targets.judge(record), targets.state_slope(record)
    else:
        run = suite.Run(_settings(options), out, resume=options.resume)
        try:
            record = run.execute()
        except KeyboardInterrupt:
            print(f"\ninterrupted; {out} holds what was measured, and --resume --out {out} goes on", file=sys.stderr)
            return 130
    figures: list[Path] = []
    if not options.no_plots:
        from benchmarks import plots

        figures = plots.draw(record, out.with_suffix(""))
    document = out.with_suffix(".md")
    document.write_text(report.markdown(record, [figure.name for figure in figures]))
    met = [target["met"] for target in record["targets"]]
    print(f"{sum(m is True for m in met)} targets met, {sum(m is False for m in met)} missed; {document}")
    return 0


def _settings(options: argparse.Namespace) -> "Settings":
    from benchmarks.suite import Settings

    defaults = Settings()
    if options.quick:
        dims, ranks, models, state_model, scale = (50_000,), (5, 20), ("330-tensors",), "330-tensors", 0.05
    else:
        dims, ranks, models, state_model, scale = (
            defaults.dims,
            defaults.ranks,
            defaults.models,
            defaults.state_model,
            1.0,
        )
    ranks = tuple(options.ranks) if options.ranks else ranks
    main_rank = options.main_rank or (defaults.main_rank if defaults.main_rank in ranks else max(ranks))
    if options.models is not None:
        models = tuple(options.models)
        state_model = models[-1] if models else None
    return Settings(
        dims=tuple(options.dims) if options.dims else dims,
        ranks=ranks,
        main_rank=main_rank,
        models=models,
        state_model=state_model,
        operations=None if options.operations is None else tuple(options.operations),
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        scale=scale,
        max_minutes=options.max_minutes,
        seed=options.seed,
        memory=not options.no_memory,
        quick=options.quick,
    )


if __name__ == "__main__":
    sys.exit(main())
