"""Progress bars: on a terminal, and nowhere else."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    items: "Iterable[Any] | None" = None, description: str | None = None, *, show: bool, **options: Any
) -> Any:
    """Return a tqdm bar that is shown where stderr is a terminal, so that a log file or a notebook gets no residue.

    Args:
        items: What to walk; None for a bar that is advanced by ``update``.
        description: What it counts.
        show: Whether the caller wants one; False shows none anywhere.
        **options: Of ``tqdm``.
    """
    return tqdm(items, description, disable=None if show else True, **options)
