"""The notebook: its cells run, and the file in the repository is made of them."""

import base64
import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments import synthetic_regression_notebook as tool
from experiments.synthetic_regression_report import Picture

TINY = (
    "--epochs 6 --swag_start 2 --max_num_models 3 --hidden 6 --curve_epochs 2 --random_rank 2 --num_samples 8 "
    "--chains 2 --burn_in 1 --small_hidden 3 --members 3 --member_steps 3 --mfvi_steps 3 --grid 11 --rows 40 "
    "--methods SGD,SWAG,PCA+ESS,Curve+ESS,Ensemble"
)


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tool.NOTEBOOK.read_text(encoding="utf-8"))
    return found


def test_the_notebook_is_made_of_these_cells_and_small() -> None:
    assert tool.NOTEBOOK.stat().st_size < 300_000
    found = committed()
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in found["cells"]]
    assert cells == list(tool.CELLS)
    assert len({cell["id"] for cell in found["cells"]}) == len(cells)


def test_the_notebook_was_executed_in_order() -> None:
    code = [cell for cell in committed()["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code)
    pictures = [output["data"]["image/png"] for cell in code for output in cell["outputs"] if "data" in output]
    assert len(pictures) == 3
    for picture in pictures:
        size = Image.open(BytesIO(base64.b64decode(picture))).size
        assert min(size) > 200
    text = "".join("".join(o["text"]) for cell in code for o in cell["outputs"] if o["output_type"] == "stream")
    assert "HMC, all weights" in text and "synthetic_regression/data.npy" in text and "error" not in text.lower()


def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SYNTHETIC_REGRESSION_FLAGS", f"--dir {tmp_path / 'run'} {TINY}")
    out = tmp_path / "made" / "toy.ipynb"
    assert tool.main(["--out", str(out)]) == 0
    assert f"written to {out}" in capsys.readouterr().out
    made = json.loads(out.read_text(encoding="utf-8"))
    assert [cell["source"] for cell in made["cells"]] == [cell["source"] for cell in committed()["cells"]]
    printed = "".join(
        "".join(output["text"]) for cell in made["cells"] for output in cell.get("outputs", []) if "text" in output
    )
    assert "drawn with seed 1: 40 rows" in printed and "ESS, curve subspace" in printed
    pictures = [o["data"] for cell in made["cells"] for o in cell.get("outputs", []) if "data" in o]
    assert [data["text/plain"] for data in pictures] == [
        ["Picture(bands.png)"], ["Picture(all_weights.png)"], ["Picture(correlations.png)"],
    ]  # fmt: skip
    assert os.listdir(tmp_path / "run" / "cells")


def test_outputs_are_what_a_cell_prints_and_its_last_value(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    assert tool.run_code("a = 2", namespace) == [] and namespace["a"] == 2
    assert tool.run_code("print(a)\nprint('b')\nNone", namespace) == [
        {"output_type": "stream", "name": "stdout", "text": ["2\n", "b\n"]}
    ]
    assert tool.run_code("a + 1", namespace) == [
        {"output_type": "display_data", "data": {"text/plain": ["3"]}, "metadata": {}}
    ]
    with pytest.raises(ZeroDivisionError, match="division"):
        tool.run_code("1 / 0", namespace)
    picture = tmp_path / "a.png"
    Image.new("RGB", (4, 3), (255, 0, 0)).save(picture)
    (shown,) = tool.run_code("picture", {"picture": Picture(picture)})
    image = Image.open(BytesIO(base64.b64decode(shown["data"]["image/png"]))).convert("RGB")
    assert image.size == (4, 3) and image.getpixel((1, 1)) == (255, 0, 0)
