"""A tiny finished training run for the tests of `experiments.plane` and `experiments.width`."""

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from experiments import train, train_report
from experiments.surface_bench import Bench

TRAIN = (
    "--dataset digits --model SmallConvNet --train_limit 64 --batch_size 16 --epochs 6 --lr_init 0.05 --swa "
    "--swa_start 2 --swa_lr 0.05 --cov_mat --max_num_models 4 --num_samples 2 --snapshots --eval_freq 6 --threads 1"
).split()
LIMITS = "--train_limit 40 --eval_limit 50 --batch_size 16 --threads 1".split()


def make_run(folder: Path) -> Path:
    """Train for four iterates after the warm-up."""
    path = folder / "trained"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(train_report, "draw_figures", lambda *_: None)
        assert train.main(["--dir", str(path), *TRAIN]) == 0
    return path


def quietly(main: Callable[[Sequence[str]], int], *arguments: str) -> int:
    with redirect_stdout(StringIO()):
        return main(arguments)


def by_hand(bench: Bench, theta: Tensor) -> dict[str, float]:
    """Loss and error of a network that owns the weights, its batch-norm statistics those of its training images."""
    model = bench.model
    bench.layout.assign_(model, theta)
    lb.recalibrate_batch_norm_(model, bench.options["bn_loader"])
    found = {}
    for name, batches in bench.images.items():
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        with torch.no_grad():
            outputs = model.eval()(x)
        found[f"{name}_loss"] = cross_entropy(outputs, y).item()
        found[f"{name}_error"] = (outputs.argmax(1) != y).double().mean().item()
    return found


def killed_after(passes: int) -> Callable[..., Any]:
    """Return what, in place of `Kept.write`, writes and then stops the process at a pass."""
    from experiments.surface_bench import Kept

    write, count = Kept.write, [0]

    def instead(self: Kept, values: Any) -> None:
        write(self, values)
        count[0] += 1
        if count[0] == passes:
            raise KeyboardInterrupt

    return instead


def refused(
    main: Callable[[Sequence[str]], int], prog: str, capsys: pytest.CaptureFixture[str], path: Path, *arguments: str
) -> str:
    """Return the one line with which a script refuses its arguments; nothing is written then."""
    try:
        status = main(["--dir", str(path), *arguments])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    captured = capsys.readouterr()
    assert status == 2 and not path.exists() and captured.err.startswith(f"{prog}: error:")
    assert captured.err.count("\n") == 1
    return captured.err
