"""What every experiment shares: settings from the command line, run folders, environment, tables.

A script's settings are one frozen dataclass whose fields are made with `setting`; the parser is made from it, and
`RunDir` writes it into the run's folder, so the command line, the help text and the record on disk cannot differ.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import torch

from lowrank_bdl.errors import CheckpointError, NonFiniteError

S = TypeVar("S")
PACKAGES = (
    "lowrank-bdl",
    "torch",
    "gpytorch",
    "linear-operator",
    "numpy",
    "safetensors",
    "torchvision",
    "scikit-learn",
    "torch-geometric",
    "transformers",
    "peft",
    "gymnasium",
    "stable-baselines3",
)


class SettingsError(ValueError):
    """Settings, paths or data that an experiment cannot run with; shown as one line, exit status 2."""


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    free: bool = False,
    kind: Any = None,
    alias: str | None = None,
) -> Any:
    """Make a dataclass field that is also a command-line flag.

    Args:
        default: Default value; ``dataclasses.MISSING`` makes the flag required.
        help: Text for ``--help``; the default is added to it.
        choices: Allowed values.
        free: Whether a resumed run may differ from the original in this setting.
        kind: Type of the value where the default does not tell (``None``).
        alias: A second flag for the same setting, such as ``--start``.
    """
    info = {"help": help, "choices": choices, "free": free, "kind": kind, "alias": alias}
    return dataclasses.field(default=default, metadata=info)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the description's line breaks; name every default that is a value."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default is not None and action.option_strings and action.nargs != 0
        return f"{text} (default: %(default)s)" if shown else text


def parse_settings(
    cls: type[S], argv: Sequence[str] | None, *, prog: str, description: str, check: Callable[[S], S] = lambda s: s
) -> S:
    """Make settings from a command line; whatever `check` or a file raises as `SettingsError` exits with status 2."""
    parser = OneLineParser(prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        info = field.metadata
        flags = [f"--{field.name}"] + ([info["alias"]] if info["alias"] else [])
        if field.default is False:
            parser.add_argument(*flags, action="store_true", help=info["help"])
            continue
        parser.add_argument(
            *flags,
            dest=field.name,
            default=None if field.default is dataclasses.MISSING else field.default,
            required=field.default is dataclasses.MISSING,
            type=info["kind"] or type(field.default),
            choices=info["choices"],
            help=info["help"],
            metavar=None if info["choices"] else field.name.upper(),
        )
    try:
        return check(cls(**vars(parser.parse_args(argv))))
    except SettingsError as error:
        parser.error(str(error))


def require_at_least(settings: Any, least: Mapping[str, float]) -> None:
    """Refuse settings below their least value, NaN and infinity; None is no value.

    Args:
        settings: Of a script.
        least: Name of a setting to its least value.

    Raises:
        SettingsError: Names the first such flag, its bound and its value.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not bound <= value < math.inf:
            raise SettingsError(f"--{name} must be at least {bound}; got {value}")


def require_positive(settings: Any, names: Iterable[str]) -> None:
    """Refuse settings that are not positive and finite, as :func:`require_at_least` does."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise SettingsError(f"--{name} must be positive; got {value}")


def require_fraction(settings: Any, names: Iterable[str]) -> None:
    """Refuse settings outside [0, 1), as momentum and dropout must be; as :func:`require_at_least` does."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 <= value < 1:
            raise SettingsError(f"--{name} must be at least 0 and less than 1; got {value}")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing so that a killed process leaves the old one or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` in UTF-8; see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=True) + "\n"


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and commit that a number in results.json depends on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    described: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "versions": versions,
        "commit": commit(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    return described


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of this checkout, with "+" where tracked files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def resolve_device(name: str) -> torch.device:
    """Turn a name into a device that exists here; ``auto`` is CUDA where there is some."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingsError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


class RunDir:
    """The folder of one run: settings.json, environment.json, command.sh, log.jsonl, checkpoints, results.json.

    Making one only looks, so that data, model and checkpoint can be checked before anything is written; `begin` writes.
    A run that does not go on from another replaces the files of an earlier one in the same folder.

    Args:
        settings: A frozen dataclass with fields ``dir`` and ``resume``, made with `setting`.
        outputs: Names (or patterns) of what a run of this script writes and a fresh run therefore removes first.
        device: Device of the run, recorded in environment.json.
        resuming: Whether the run goes on from another in this folder; None asks ``settings.resume``.

    Raises:
        SettingsError: If the folder holds something that is not a run; if a resume finds no run, or one made with
            other settings.
    """

    def __init__(
        self, settings: Any, outputs: Iterable[str], device: torch.device, *, resuming: bool | None = None
    ) -> None:
        self.settings, self.path, self.device = settings, Path(settings.dir), device
        self.resuming = bool(settings.resume) if resuming is None else resuming
        self._outputs = tuple(outputs)
        record = self.path / "settings.json"
        if self.path.exists() and not self.path.is_dir():
            raise SettingsError(f"--dir {self.path} is not a folder")
        if self.resuming:
            self._check_same_settings(record)
        elif self.path.is_dir() and not record.exists() and set(self.path.iterdir()) - set(self._leftovers()):
            raise SettingsError(f"--dir {self.path} holds files that are not a run's; choose an empty or a new folder")

    def begin(self) -> None:
        """Make the folder, remove stale files, and record settings, environment and command.

        Raises:
            SettingsError: If the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in self._leftovers():
                file.unlink(missing_ok=True)
            for pattern in ["results.json"] if self.resuming else self._outputs:
                for file in self.path.glob(pattern):
                    file.unlink(missing_ok=True)
            self.write_json("settings.json", dataclasses.asdict(self.settings))
            self.write_json("environment.json", environment(self.device))
            with open(self.path / "command.sh", "a", encoding="utf-8") as file:
                file.write(shlex.join([sys.executable, *sys.argv]) + "\n")
        except OSError as error:
            raise SettingsError(f"--dir {self.path}: {error.strerror}") from None

    def _leftovers(self) -> list[Path]:
        """Return the temporary files of processes that were killed while they wrote."""
        return [file for pattern in (".*.tmp", ".*.tmp.*", ".*.partial") for file in self.path.glob(pattern)]

    def _check_same_settings(self, record: Path) -> None:
        try:
            old = json.loads(record.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SettingsError(f"--resume: there is no run in {self.path} (settings.json is missing)") from None
        except (OSError, json.JSONDecodeError) as error:
            raise SettingsError(f"--resume: cannot read {record}: {error}") from None
        differing = differences(self.settings, old)
        if differing:
            raise SettingsError(f"--resume: settings differ from those of {self.path}: {differing}")

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, to_json(value))

    def read_cell(self, name: str, recipe: Any) -> dict[str, Any] | None:
        """Return what an earlier part of this run wrote under a name; None if it did not come so far.

        Args:
            name: Of the file; what it holds is a dict with an entry ``recipe``.
            recipe: What the numbers depend on, as JSON gives it back.

        Raises:
            SettingsError: If the file is damaged or of another recipe.
        """
        path = self.path / name
        try:
            cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SettingsError(f"--resume: cannot read {path}: {error}; delete it to make it again") from None
        if not isinstance(cell, dict) or cell.get("recipe") != recipe:
            raise SettingsError(f"--resume: {path} is of another recipe; delete it to make it again")
        return cell

    def log(self, **record: Any) -> None:
        """Append one record to log.jsonl."""
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        try:
            lines = (self.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # the process was killed while it wrote this line
                continue
        return records

    def write_log(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace log.jsonl: a resumed run keeps the records of the epochs that its checkpoint holds."""
        write_atomically(self.path / "log.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def fixed(settings: Any) -> dict[str, Any]:
    """Return the settings that a resumed run must share with the original, in the form that JSON gives back."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if not f.metadata["free"]}
    return dict(json.loads(json.dumps(values)))


def differences(settings: Any, old: Mapping[str, Any]) -> str:
    """Name the settings that a resumed run must not change, with their values before and now; "" if there are none.

    A setting that an old record does not know had its default then.
    """
    known = {field.name: field.default for field in dataclasses.fields(settings)} | dict(old)
    return "; ".join(
        f"{name} was {known[name]!r}, now {value!r}" for name, value in fixed(settings).items() if known[name] != value
    )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table with its first column left-aligned and the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def run_script(prog: str, work: Callable[[], str], *, threads: int | None = 0, go_on: str = "--resume") -> int:
    """Run a script's work and print what it returns; whatever stops it is one line on stderr.

    The global random generators, the number of threads and cuDNN's choice of algorithms are given back as they were.

    Args:
        prog: Name of the script, for messages.
        work: The script; may seed the global generators.
        threads: CPU threads, 0 or None for torch's choice.
        go_on: Flag with which an interrupted run goes on.

    Returns:
        The exit status: 0, 2 for what cannot run, 130 for an interrupt.
    """
    before = torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        with torch.random.fork_rng(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            print(work())
    except (SettingsError, CheckpointError, NonFiniteError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; go on with the same command and {go_on}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(before)
    return 0


def peak_memory(work: Callable[[], S], device: torch.device) -> tuple[S, int]:
    """Run `work` and return its result with the most tensor memory it held at once beyond what existed before [bytes].

    On CUDA this is the allocator's own count; on the CPU, where torch keeps none, the running sum of the
    allocations and releases that torch's profiler records.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports a missing GPU as an error
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        result = work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return result, peak
