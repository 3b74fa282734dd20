"""What happened on the fake device, and at which line of the library."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PACKAGE = "/lowrank_bdl/"
WAITS = ("sync", "h2d", "d2h")


@dataclass
class Section:
    """What happened in one part of a program.

    Attributes:
        ops: Operation -> launches.
        syncs: (kind, operation, file:line) -> times; kinds that end with ``-async`` make nobody wait.
        places: file:line -> launches.
        num_bytes: Bytes that the launches read and wrote.
        largest: Bytes of the largest result.
    """

    ops: "Counter[str]" = field(default_factory=Counter)
    syncs: "Counter[tuple[str, str, str]]" = field(default_factory=Counter)
    places: "Counter[str]" = field(default_factory=Counter)
    num_bytes: int = 0
    largest: int = 0

    @property
    def launches(self) -> int:
        return sum(self.ops.values())

    @property
    def num_syncs(self) -> int:
        """How often the host waited for the device."""
        return sum(count for (kind, _, _), count in self.syncs.items() if kind in WAITS)

    def where(self, *kinds: str) -> str:
        """Say where the host waited (or, of the given kinds, what else happened)."""
        kinds = kinds or WAITS
        found = [(line, name, times) for (kind, name, line), times in self.syncs.items() if kind in kinds]
        return ", ".join(f"{line} {name}{f' x{times}' if times > 1 else ''}" for line, name, times in sorted(found))


class Log:
    """Counts events into every section that is open."""

    def __init__(self) -> None:
        self._open: list[Section] = []

    @contextmanager
    def section(self) -> Iterator[Section]:
        part = Section()
        self._open.append(part)
        try:
            yield part
        finally:
            self._open = [other for other in self._open if other is not part]

    @contextmanager
    def paused(self) -> Iterator[None]:
        kept, self._open = self._open, []
        try:
            yield
        finally:
            self._open = kept

    def note(self, kind: str, operation: str) -> None:
        for part in self._open:
            part.syncs[kind, operation, line()] += 1

    def launched(self, name: str, num_bytes: int, largest: int = 0) -> None:
        for part in self._open:
            part.ops[name] += 1
            part.places[line()] += 1
            part.num_bytes += num_bytes
            part.largest = max(part.largest, largest)


def line() -> str:
    """Return the innermost line of the library on the stack, else of whoever called torch."""
    frame, first = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name:
            return f"{name.split(PACKAGE)[-1]}:{frame.f_lineno}"
        if not first and "/torch/" not in name and "/fake_device/" not in name and not name.startswith("<"):
            first = f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return first
