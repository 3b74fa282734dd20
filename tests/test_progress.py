"""Progress bars are drawn on terminals, and nowhere else."""

import io

import pytest

from lowrank_bdl.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "show", "drawn"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_a_bar_is_drawn_where_stderr_is_a_terminal(stream, show, drawn, monkeypatch):
    """A pipe, a file or a captured stream gets nothing, whatever the caller wants."""
    written = stream()
    monkeypatch.setattr("sys.stderr", written)
    assert list(progress_bar(range(3), description="counting", show=show)) == [0, 1, 2]
    with progress_bar(total=2, description="counting", show=show) as bar:
        bar.update(2)
    assert bool(written.getvalue()) is drawn and ("counting" in written.getvalue()) is drawn
