"""Seeds, cells, table and figure that the applications share."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from experiments import seed_study
from experiments.common import RunDir, SettingsError, setting
from experiments.seed_study import Measure
from lowrank_bdl.errors import NonFiniteError

MEASURES = (Measure("accuracy", "accuracy [%]"), Measure("nll", "NLL [nats]", 3, less_is_better=True))


@dataclass(frozen=True)
class Settings:
    """Of a script."""

    dir: str = setting("", "folder", free=True)
    seeds: int = setting(3, "number of seeds", free=True)
    first_seed: int = setting(5, "first of them", free=True)
    lr: float = setting(0.1, "learning rate")
    resume: bool = setting(False, "go on", free=True)


def measure(seed: int) -> dict[str, Any]:
    return {
        "methods": {"majority": {"accuracy": 10.0}, "SWA": {"accuracy": 90.0 + seed, "nll": 0.125 * seed}},
        "images": 7,
    }


def start(path: Path, **options: Any) -> tuple[Settings, RunDir]:
    settings = Settings(dir=str(path), **options)
    run = RunDir(settings, seed_study.OUTPUTS, torch.device("cpu"))
    run.begin()
    return settings, run


def test_table_figure_and_record(tmp_path: Path) -> None:
    settings, run = start(tmp_path / "run")
    cells = seed_study.run_seeds(settings, run, measure)
    assert [cell["seed"] for cell in cells] == [5, 6, 7] and all(cell["images"] == 7 for cell in cells)
    text = seed_study.finish(
        settings, run, cells, MEASURES, baseline="majority", title="A net on data", notes=["A note."], extra=1
    )
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "method" and "accuracy [%] ↑" in lines[0] and "NLL [nats] ↓" in lines[0]
    assert lines[2].split() == ["majority", "(baseline)", "10.00", "±", "0.00", "–"]
    assert lines[3].split() == ["SWA", "96.00", "±", "1.00", "0.750", "±", "0.125"]
    assert "A net on data: 3 seeds, mean ± standard deviation over them. A note." in text
    assert (run.path / "table.txt").read_text().splitlines()[:4] == lines[:4]
    found = json.loads((run.path / "results.json").read_text())
    assert found["summary"]["SWA"]["accuracy"] == {"mean": 96.0, "std": 1.0, "values": [95.0, 96.0, 97.0]}
    assert found["baseline"] == "majority" and found["extra"] == 1 and len(found["cells"]) == 3
    assert "nll" not in found["summary"]["majority"]
    picture = imread(run.path / "methods.png")
    assert picture.shape[1] > 600 and picture[..., :3].std() > 0.01


@pytest.mark.parametrize(
    "means,less_is_better,hidden",
    [
        ({"unigram": 26.0, "bigram": 11.0, "SGD": 3.2, "SWA": 3.1}, True, {"unigram", "bigram"}),
        ({"unigram": 10.0, "SGD": 95.0, "SWA": 95.5}, False, {"unigram"}),
        ({"unigram": 10.0, "SGD": 70.0, "SWA": 90.0}, False, set()),  # a difference that is seen beside the baseline
        ({"unigram": 10.0, "SGD": 40.0, "SWA": 90.0}, False, set()),  # one alone is near the best
        ({"unigram": 0.0, "SGD": 9.0, "SWA": 9.1}, True, set()),  # the baseline is the best
        ({"SGD": 3.2, "SWA": 3.1}, True, set()),
        ({"unigram": 26.0, "SGD": math.nan, "SWA": 3.1}, True, set()),
        ({"unigram": 5.0, "SGD": 5.0, "SWA": 5.0}, True, set()),
    ],
)
def test_the_axis_leaves_out_a_baseline_that_would_hide_everything_else(
    tmp_path: Path, means: dict[str, float], less_is_better: bool, hidden: set[str]
) -> None:
    levels = {method: {"mean": mean, "values": [mean - 0.01, mean + 0.01]} for method, mean in means.items()}
    assert seed_study.near_the_best(levels, "unigram", less_is_better) == set(means) - hidden
    measure = Measure("level", "level", less_is_better=less_is_better)
    found = {method: {"level": level} for method, level in levels.items()}
    seed_study.draw(tmp_path / "methods.png", found, [measure], "unigram", "A net")
    assert imread(tmp_path / "methods.png")[..., :3].std() > 0.01


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    settings, run = start(tmp_path / "run", seeds=1)
    cells = seed_study.run_seeds(settings, run, measure)
    text = seed_study.finish(settings, run, cells, MEASURES, baseline="majority", title="A net")
    assert "±" not in text.splitlines()[3] and "one seed" in text
    assert math.isnan(seed_study.summary(cells, MEASURES)["SWA"]["nll"]["std"])


def test_goes_on_with_the_seeds_that_are_left(tmp_path: Path) -> None:
    settings, run = start(tmp_path / "run")
    called: list[int] = []

    def breaking(seed: int) -> dict[str, Any]:
        called.append(seed)
        if seed == 6:
            raise KeyboardInterrupt("stopped")
        return measure(seed)

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        seed_study.run_seeds(settings, run, breaking)
    assert called == [5, 6]
    settings, run = start(tmp_path / "run", resume=True, seeds=4)
    called.clear()
    cells = seed_study.run_seeds(settings, run, lambda seed: called.append(seed) or measure(seed))  # type: ignore[func-returns-value]
    assert called == [6, 7, 8] and [cell["seed"] for cell in cells] == [5, 6, 7, 8]
    assert list(seed_study.summary(cells, MEASURES)) == ["majority", "SWA"]  # as measured, not as sorted in the file
    (run.path / "cells" / "seed-6.json").write_text("{")
    with pytest.raises(SettingsError, match=r"--resume: cannot read .*seed-6\.json"):
        seed_study.run_seeds(settings, run, measure)
    with pytest.raises(SettingsError, match=r"settings differ from those of .*: lr was 0\.1, now 0\.2"):
        start(tmp_path / "run", resume=True, lr=0.2)
    settings, run = start(tmp_path / "run")  # afresh: nothing is left of the earlier one
    assert not list((run.path / "cells").iterdir())


def test_says_which_seed_diverged_and_refuses_bad_numbers(tmp_path: Path) -> None:
    settings, run = start(tmp_path / "run")

    def diverging(seed: int) -> dict[str, Any]:
        raise NonFiniteError("the loss is nan")

    with pytest.raises(SettingsError, match="seed 5: the loss is nan"):
        seed_study.run_seeds(settings, run, diverging)
    with pytest.raises(SettingsError, match="--seeds must be at least 1; got 0"):
        seed_study.check_seeds(Settings(seeds=0))
    with pytest.raises(SettingsError, match="--first_seed must be at least 0; got -1"):
        seed_study.check_seeds(Settings(first_seed=-1))
