"""Write `experiments.synthetic_regression` as an executed notebook, of that script's own functions.

The cells are run here, one after the other in one namespace, and what they print and show is written beside them, in
the notebook format; neither Jupyter nor nbformat is needed to make the file, and any of them opens it.

Examples:
  SYNTHETIC_REGRESSION_FLAGS="--data_path DATA_DIR --dir runs/toy --resume" python -m
      experiments.synthetic_regression_notebook
"""

import argparse
import ast
import base64
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.common import write_atomically

PROG = "python -m experiments.synthetic_regression_notebook"
NOTEBOOK = Path(__file__).parent / "notebooks" / "synthetic_regression.ipynb"
COLORS = 96  # in a picture of the notebook, which keeps it small

Cells = Sequence[tuple[str, str]]

CELLS: Cells = (
    (
        "markdown",
        """\
# Regression on one number: what is inference in subspaces sure of?

Izmailov et al., *Subspace Inference for Bayesian Deep Learning* (2019), compare predictive bands on a set with three
clusters of x. A network of 15,801 weights sees the features (x/2, (x/2)²). Its posterior is sampled in a few directions
of weight space: random ones, the principal ones of the iterates of SGD, and the plane of a curve of low loss between
two solutions.

Every function used here is that of `python -m experiments.synthetic_regression`. Its flags are read from the
environment variable `SYNTHETIC_REGRESSION_FLAGS`; `--data_path` names the folder with the published set, without it a
like one is drawn. With `--resume` the finished parts of an earlier run in `--dir` are read, not computed anew.""",
    ),
    (
        "code",
        """\
import os
import shlex

from experiments import synthetic_regression as script
from experiments import synthetic_regression_report as report
from experiments.common import parse_settings

flags = shlex.split(os.environ.get("SYNTHETIC_REGRESSION_FLAGS", ""))
settings = parse_settings(script.Settings, flags, prog="notebook", description="", check=script.check)
run, bench, cells = script.prepare(settings)
print(report.notes(bench.data, settings.noise_variance))""",
    ),
    (
        "markdown",
        """\
## Training and sampling

Two networks are trained by SGD; the snapshots of the first give SWAG, and a curve is bent between the two. Each method
is one cell of the run, kept in its folder as soon as it is there.""",
    ),
    (
        "code",
        """\
cells = script.experiment(run, bench, cells)
for cell in cells.values():
    print(f"{report.title_of(cell):28} {cell['draws']:5} draws of {cell['parameters']:6,} weights")""",
    ),
    (
        "markdown",
        """\
## The published figure

Bands are the mean of f and one, two and three standard deviations; dotted lines add the noise of the likelihood.""",
    ),
    ("code", 'report.Picture(run.path / "bands.png")'),
    (
        "markdown",
        """\
## All weights, one prior and likelihood

On a network of a few hundred weights nothing has to be left out: Hamiltonian Monte Carlo over all weights, an ensemble
of posterior modes, and mean-field variational inference share one prior and one likelihood with each other, so that
what differs is the inference alone.""",
    ),
    ("code", 'report.Picture(run.path / "all_weights.png")'),
    (
        "markdown",
        """\
R-hat compares chains that start at draws from the prior: of the coordinates z (weights in units of the prior), which
permutations of the hidden units make multimodal, and of f(x), which they leave alone.""",
    ),
    ("code", 'print((run.path / "table.txt").read_text())'),
    (
        "markdown",
        """\
## What a law of the weights says about functions

Correlations of f(x) with f(x′), over draws from the prior and from what each method found.""",
    ),
    ("code", 'report.Picture(run.path / "correlations.png")'),
    (
        "markdown",
        """\
## What is seen here

In the run shown, on the published set:

- SGD is equally sure everywhere. Every subspace grows less sure outside the data, beyond |x| = 7.2; in the gaps between
  the clusters only SWAG's band is wide, and it is as wide on the data, as its scale of 10 knows nothing of them.
- The plane of the curve holds one narrow, bent valley. One Gaussian cannot follow it, so VI's band is the narrowest;
  elliptical slice sampling and the no-U-turn sampler move slowly along it, and so does the former in random directions:
  R-hat of z is above 1.05 there, and only the principal subspace has mixed.
- Over all weights of the small network HMC is sure on the data and grows unsure in both gaps and outside. The ensemble
  of modes is too sure in the gaps and on the data, but unsure outside; mean-field VI is unsure on the data, where it
  fits badly, and too sure outside. HMC's chains agree on f over most of the axis, not on the weights.
- The noise variance of 0.05 is the published one; the rows scatter with about 0.003. All intervals therefore hold all
  held-out rows, and log-likelihoods differ little. `--noise_variance 0.003`, with temperatures of 1, fits the rows.""",
    ),
)


def shrink(picture: bytes) -> bytes:
    """Return a picture with a palette of few colours."""
    buffer = BytesIO()
    small = Image.open(BytesIO(picture)).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    small.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def run_code(source: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one cell and return its outputs: what it prints, and its last expression, if that is not None."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(StringIO()) as printed:
        exec(compile(tree, "<cell>", "exec"), namespace)
        value = None if last is None else eval(compile(last, "<cell>", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        data: dict[str, Any] = {"text/plain": _lines(repr(value))}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(shrink(value._repr_png_())).decode()
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def execute(cells: Cells = CELLS) -> list[list[dict[str, Any]]]:
    """Run all code cells in one namespace and return the outputs of each cell, none of text.

    Raises:
        Exception: Whatever a cell raises.
    """
    namespace: dict[str, Any] = {"__name__": "__notebook__"}
    return [run_code(source, namespace) if kind == "code" else [] for kind, source in cells]


def notebook(cells: Cells, outputs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the notebook as JSON, in format 4.5."""
    made: list[dict[str, Any]] = []
    count = 0
    for number, ((kind, source), own) in enumerate(zip(cells, outputs, strict=True)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": _lines(source)}
        if kind == "code":
            count += 1
            cell |= {"execution_count": count, "outputs": list(own)}
        made.append(cell)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells and write the notebook; return the exit status."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=NOTEBOOK, help="file to write")
    out = parser.parse_args(argv).out
    made = notebook(CELLS, execute())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
