"""What an installation brings: the library alone, and no top-level `experiments` that would shadow the user's own."""

import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_only_the_library_is_installed() -> None:
    setuptools = pytest.importorskip("setuptools")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    include = setup["options.packages.find"]["include"].split()
    packages = setuptools.find_packages(str(ROOT), include=include)
    assert {name.split(".")[0] for name in packages} == {"lowrank_bdl"}
    here = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("lowrank_bdl/**/__init__.py")
    }
    assert set(packages) == here


def test_a_source_distribution_holds_what_its_tests_need() -> None:
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").split("\n")
    named = [name for line in lines if line.startswith(("include ", "graft ")) for name in line.split()[1:]]
    assert {"CHANGELOG.md", "conftest.py", "tests", "experiments", "benchmarks"} <= set(named)
    assert all((ROOT / name).exists() for name in named)
