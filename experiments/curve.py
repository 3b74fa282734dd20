"""Connect two trained networks by curves of low loss, and measure loss and error along them.

line       the straight line between the two, w(t) = (1 - t) w_1 + t w_2
PolyChain  a polygonal chain with trained bends
Bezier     a Bezier curve with trained bends

A curve is trained as its network is, at a t drawn anew for every batch (Garipov et al., 2018). Along each path the
training loss is the regularised one, with the weights' own norm; batch-norm statistics are recomputed at every point
from training images, augmented as they were trained on; losses and errors are of images as they are. The ends are
finished runs of experiments.train, or files of weights; without them two networks are trained, as such runs. With
--ckpt nothing is trained: the path goes straight from file to file, such as the checkpoints of one run.

Examples:
  python -m experiments.curve --toy two_spirals --dir runs/spirals
  python -m experiments.train --dir runs/digits-1 --dataset digits --model SmallConvNet --epochs 60 --lr_init 0.05
  python -m experiments.train --dir runs/digits-2 --dataset digits --model SmallConvNet --epochs 60 --lr_init 0.05
      --seed 2
  python -m experiments.curve --init_start runs/digits-1 --init_end runs/digits-2 --dir runs/digits-curve --epochs 60
  python -m experiments.curve --model PreResNet20 --dataset CIFAR10 --data_path DATA_DIR --use_test --wd 3e-4
      --endpoint_epochs 150 --endpoint_lr 0.1 --epochs 100 --lr 0.03 --dir runs/preresnet20-curve
  python -m experiments.curve --ckpt runs/digits-1/checkpoint-25.safetensors,runs/digits-1,runs/digits-2
      --dir runs/digits-chain

Writes to --dir: curve-NAME.safetensors (read by lowrank_bdl.load_posterior), values-NAME.npz (losses and errors at
every t), profile.png, of the toy decisions.png, table.txt, log.jsonl, checkpoint-NAME.safetensors (while a curve is
trained), start/ and end/ (runs of experiments.train, where they are made here), results.json (last), settings.json,
environment.json, command.sh
"""

import sys
import time
from collections.abc import Sequence

from torch import Tensor

from experiments import curve_plots, curve_report
from experiments.common import (
    RunDir,
    SettingsError,
    parse_settings,
    resolve_device,
    run_script,
    write_atomically,
)
from experiments.curve_bench import (
    Bench,
    digest_of,
    endpoint_runs,
    evaluate,
    given_points,
    grid_of,
    open_bench,
    train_ends,
    trained_curve,
    untrained_paths,
)
from experiments.curve_settings import Settings, check
from experiments.uncertainty_members import is_finished
from lowrank_bdl.errors import LowRankBDLError

PROG = "python -m experiments.curve"
OUTPUTS = (
    "results.json", "log.jsonl", "table.txt", "curve-*.safetensors", "checkpoint-*.safetensors", "values-*.npz",
    "profile.png", "decisions.png",
)  # fmt: skip


def experiment(bench: Bench, run: RunDir, points: list[Tensor]) -> str:
    """Train, evaluate, draw, and write results.json last; return the table."""
    settings, began = bench.settings, time.perf_counter()
    points = points or train_ends(bench, run)
    paths = untrained_paths(bench, points)
    for name in settings.curves:
        paths[name] = trained_curve(bench, run, name, points).to(points[0].device)
    trained = time.perf_counter()
    values = {name: evaluate(bench, run, name, path) for name, path in paths.items()}
    grids = {name: grid_of(settings, path) for name, path in paths.items()}
    every = {name: curve_report.measured(bench, found) for name, found in values.items()}
    found = {name: curve_report.results_of(bench, path, grids[name], values[name]) for name, path in paths.items()}
    title = f"{bench.recipe.model} on {bench.data.name}"
    curve_plots.profiles(run.path / "profile.png", grids, every, len(points), bench.shown, title)
    if settings.toy is not None:
        curve_plots.decisions(run.path / "decisions.png", bench, paths)
    text = curve_report.table(bench, found)
    write_atomically(run.path / "table.txt", text + "\n")
    run.write_json(
        "results.json",
        {
            **bench.facts,
            "weight_decay": bench.weight_decay,
            "ends": digest_of(points),
            "paths": found,
            "seconds": {"train": trained - began, "evaluate": time.perf_counter() - trained},
        },
    )
    return text


def work(settings: Settings) -> str:
    """Check everything, then connect and measure; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    bench = open_bench(settings, device)
    points = given_points(bench)
    if not points and settings.toy is None:
        for own in endpoint_runs(bench):
            is_finished(own)  # refuses a folder with another run
    run.begin()
    try:
        return f"{experiment(bench, run, points)}\n\nwritten to {run.path}"
    except LowRankBDLError as error:
        raise SettingsError(" ".join(str(error).split())) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
