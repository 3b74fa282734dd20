"""What benchmarks share that go through several networks: flags, threads, the record and its files."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, hardware_label
from benchmarks.harness import Policy
from experiments.common import write_atomically

Measure = Callable[[str, argparse.Namespace, torch.device], dict[str, Any]]
"""Returns the record of a network, by its name and the flags; its rows are those of `harness.compare`."""


def network_parser(
    prog: str, description: str | None, networks: Sequence[str], numbers: dict[str, str], budget: float
) -> argparse.ArgumentParser:
    """Return a command line.

    Args:
        prog: Name of the script.
        description: For --help.
        networks: Those to choose from; all by default.
        numbers: Flags that take a whole number in place of each network's own, with their help.
        budget: Default of --budget [s].
    """
    layout = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(prog=prog, description=description, formatter_class=layout)
    result.add_argument("--networks", nargs="+", choices=list(networks), default=list(networks), metavar="NAME")
    for name, text in numbers.items():
        result.add_argument(f"--{name}", type=int, help=text)
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--device", default="cpu")
    result.add_argument("--budget", type=float, default=budget, help="seconds of rounds for a network")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    return result


def run_networks(
    prog: str, name: str, options: argparse.Namespace, numbers: Sequence[str], measure: Measure,
    markdown: Callable[[dict[str, Any]], str],
) -> int:  # fmt: skip
    """Measure every network, print the table, and write NAME-HARDWARE.json and .md; return the exit status.

    Args:
        prog: Name of the script, for messages.
        name: Of the benchmark.
        options: What `network_parser` parsed.
        numbers: Flags that must be at least 1 where they are given.
        measure: Measures one network.
        markdown: Lays the record out.
    """
    for flag in (*numbers, "threads"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            print(f"{prog}: error: --{flag} must be at least 1; got {value}", file=sys.stderr)
            return 2
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"{prog}: error: no CUDA device is available", file=sys.stderr)
        return 2
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        networks = {network: measure(network, options, device) for network in options.networks}
        record = {
            "format": f"lowrank_bdl-{name}",
            "version": 1,
            "environment": environment(device),
            "networks": networks,
        }
    finally:
        torch.set_num_threads(before)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{name}-{hardware_label(device)}"
    write_atomically(stem.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    write_atomically(stem.with_suffix(".md"), markdown(record))
    print(markdown(record))
    return 1 if any(row["status"] == "wrong" for found in networks.values() for row in found["rows"]) else 0


def ratio_cells(row: dict[str, Any], reference: str) -> list[str]:
    """Return a row's ratio to a reference and its 95 % interval, or in their place why there are none."""
    ratio = row.get("ratios", {}).get(reference)
    low, high = (ratio and ratio["ci95"]) or (None, None)
    return [f"{ratio['median']:.2f}" if ratio else row["status"], "" if low is None else f"{low:.2f} to {high:.2f}"]


def error_cell(row: dict[str, Any]) -> str:
    """Return a row's largest error over its tolerance."""
    return f"{row['error']:.0e}" if isinstance(row["error"], float) else ""


def policy_of(options: argparse.Namespace, **changes: Any) -> Policy:
    """Return how long a network is measured."""
    return Policy(budget_s=options.budget, max_rounds=60, **changes)
