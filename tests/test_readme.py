"""What README promises: its example runs, its commands are the ones that CI runs, its links exist."""

import re
from pathlib import Path

import pytest
import torch

import lowrank_bdl as lb

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (
    'pip install -e ".[experiments]" && python -m experiments.quickstart',
    'pip install -e ".[test]" && pytest -n auto',
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_library_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, library, *_ = examples = blocks("python")  # a network, ten lines, what a posterior can do, a subspace
    assert len([line for line in library.splitlines() if line.strip()]) <= 10
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile("".join(examples), "README.md", "exec"), names)
    posterior, prediction = names["posterior"], names["prediction"]
    assert isinstance(posterior, lb.GaussianPosterior)
    assert isinstance(posterior.covariance, lb.LowRankPlusDiagLinearOperator)
    torch.testing.assert_close(prediction.mean.sum(-1), torch.ones(len(prediction.mean)))
    assert prediction.accuracy > 0.9 and names["average"].accuracy > 0.9
    assert (names["draws"].rhat() < 1.1).all()
    again = lb.GaussianPosterior.load(tmp_path / "posterior.safetensors")
    assert again.entropy().item() == posterior.entropy().item()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands_are_in_readme_and_in_ci(command: str) -> None:
    assert any(command in block for block in blocks("bash"))
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in ci


def test_links_to_files_exist() -> None:
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    assert links
    missing = [target for target in links if not (ROOT / target).exists()]
    assert not missing
