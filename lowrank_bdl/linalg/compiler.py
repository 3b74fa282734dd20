"""Compiles the C kernels of this package once for a machine, with the system's own compiler, and loads them.

The library is kept in the user's cache folder under a name that depends on the sources, the compiler and the
instructions of the processor. It uses the OpenMP threads of torch. Without a compiler, or where anything at all goes
wrong, there is no library, and the kernels written in torch do the work. ``LOWRANK_BDL_COMPILED=0`` asks for that.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SWITCH = "LOWRANK_BDL_COMPILED"
"""Environment variable; ``0`` means that nothing is compiled or loaded."""
SOURCE = Path(__file__).with_name("compiled.c")
HEADER = SOURCE.with_suffix(".h")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp", "-Werror")
TIMEOUT = 120
"""Seconds that one run of the compiler may take."""

logger = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, compiled now if this machine has not done so before; None where that fails."""
    compiler = find_compiler()
    if os.environ.get(SWITCH, "1") == "0" or compiler is None:
        return None
    try:
        return ctypes.CDLL(str(build(compiler, cache_folder())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        logger.info("no compiled kernels, torch's are used: %s %s", error, (output or b"").decode(errors="replace"))
        return None


def find_compiler() -> str | None:
    """Return the path of the C compiler: ``$CC``, else cc, gcc or clang; None if there is none."""
    names = (os.environ["CC"],) if os.environ.get("CC") else ("cc", "gcc", "clang")
    return next((path for path in map(shutil.which, names) if path is not None), None)


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/lowrank_bdl``, by default in ``~/.cache``.

    Raises:
        RuntimeError: If the user has no home: neither ``HOME`` nor an entry in the system's table of users.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank_bdl"


def build(compiler: str, folder: Path) -> Path:
    """Return the shared library in `folder`, made first if it is not there.

    Raises:
        OSError: If the folder cannot be written.
        subprocess.SubprocessError: If the compiler refuses or takes too long.
    """
    # The predefined macros name the compiler's version and every instruction set of this processor.
    macros = _run(compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull)
    key = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), HEADER.read_bytes(), " ".join(FLAGS).encode(), macros)))
    target = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        _run(compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled))
        # Linked without -fopenmp: its functions are found in the OpenMP library that torch has loaded.
        _run(compiler, "-shared", str(compiled), "-o", str(linked), "-lm")
        os.replace(linked, target)  # another process may be doing the same
    return target


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL).stdout
