"""Compiling and loading the kernels, and doing without."""

import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lowrank_bdl.linalg import compiler

CC = compiler.find_compiler()
needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler")


def run_python(code: str, **environment: str) -> str:
    """Run a fresh interpreter from the root of the project."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@needs_compiler
def test_built_once_by_many(tmp_path):
    """Two that compile at once end with one library and no leftovers, which later ones find."""
    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(lambda _: compiler.build(CC, tmp_path), range(2)))
    assert len(paths) == 1 and list(tmp_path.iterdir()) == list(paths)
    path = paths.pop()
    before = path.stat().st_mtime_ns
    assert compiler.build(CC, tmp_path) == path and path.stat().st_mtime_ns == before


@needs_compiler
def test_new_sources_make_a_new_library(tmp_path, monkeypatch):
    old = compiler.build(CC, tmp_path)
    source = tmp_path / "changed.c"
    source.write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(compiler, "SOURCE", source)
    assert compiler.build(CC, tmp_path) != old and old.exists()


@needs_compiler
def test_a_refusal_leaves_nothing(tmp_path, monkeypatch, caplog):
    """A source that does not compile means torch's kernels and one line in the log, nothing half-written."""
    source = tmp_path / "broken.c"
    source.write_text("this is not C\n")
    monkeypatch.setattr(compiler, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.INFO, logger=compiler.logger.name):
        assert compiler.library.__wrapped__() is None
    assert "no compiled kernels" in caplog.text and "error" in caplog.text
    assert list((tmp_path / "cache" / "lowrank_bdl").iterdir()) == []


def test_doing_without(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiler.find_compiler() is None and compiler.library.__wrapped__() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv(compiler.SWITCH, "0")
    assert compiler.library.__wrapped__() is None
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert compiler.library.__wrapped__() is None


@needs_compiler
def test_a_compiler_that_makes_rubbish(tmp_path, monkeypatch):
    """What does not load is not used."""
    fake = tmp_path / "cc"
    fake.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo rubbish > "$2"; fi; shift; done\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compiler.library.__wrapped__() is None


def test_nothing_is_compiled_by_an_import_or_by_small_matrices(tmp_path):
    code = (
        "import torch, lowrank_bdl as lb;"
        "op = lb.LowRankPlusDiagLinearOperator(torch.ones(100, 2), torch.ones(100));"
        "print(float(op.logdet()) > 0)"
    )
    assert run_python(code, XDG_CACHE_HOME=str(tmp_path)) == "True"
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_large_matrix_compiles_and_agrees_with_torch(tmp_path):
    """In fresh processes, with and without: the threads are those of torch, the results agree."""
    code = (
        "import torch, lowrank_bdl as lb; from lowrank_bdl.linalg.compiler import library;"
        "g = torch.Generator().manual_seed(0); rows = torch.randn(5, 200000, generator=g);"
        "op = lb.LowRankPlusDiagLinearOperator(rows.mT, torch.rand(200000, generator=g) + 0.1);"
        "print(library() is not None, repr(float(op.logdet())))"
    )
    used, ours = run_python(code, XDG_CACHE_HOME=str(tmp_path)).split()
    without, plain = run_python(code, XDG_CACHE_HOME=str(tmp_path), LOWRANK_BDL_COMPILED="0").split()
    assert (used, without) == ("True", "False")
    assert float(ours) == pytest.approx(float(plain), abs=1e-3)
    assert len(list((tmp_path / "lowrank_bdl").iterdir())) == 1


@needs_compiler
def test_a_user_without_a_home(monkeypatch):
    """Neither HOME nor an entry in the table of users, as in some containers: torch's kernels do the work."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(compiler.SWITCH, raising=False)
    monkeypatch.setattr(compiler.Path, "home", staticmethod(no_home))
    assert compiler.library.__wrapped__() is None
