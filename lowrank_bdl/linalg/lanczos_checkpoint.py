"""A Lanczos run in one file: written atomically, read without unpickling, gone on with to the last bit."""

import os
from typing import Any

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.linalg.lanczos_run import LanczosRun

KIND = "lanczos"
SAME_OPERATOR = 1e-2
"""A product may differ from the one recorded by this much of its norm: by rounding, not by other weights or data."""
_TENSORS = ("head", "tail", "coefficients", "lost", "bounds", "generator")
_COUNTS = ("size", "pending", "latest", "settled", "num_products", "random")


def save(path: str | os.PathLike[str], run: LanczosRun, facts: dict[str, Any]) -> None:
    """Write the run so that a killed process leaves the old file or the new one.

    Args:
        path: The file; replaced if it exists.
        run: The run, between two steps.
        facts: JSON values that a run must share to go on from the file.

    Raises:
        OSError: If the file cannot be written.
    """
    known = run.projection
    tensors = dict(zip(("head", "tail"), run.basis.panels, strict=True))
    tensors |= {"coefficients": known.coefficients, "lost": known.lost, "bounds": known.bounds}
    tensors["generator"] = run.generator.get_state()
    counts = (known.size, known.pending, known.latest, known.settled, run.num_products, run.random)
    write_tensors(path, KIND, tensors, {"facts": facts, "counts": dict(zip(_COUNTS, counts, strict=True))})


def load(path: str | os.PathLike[str], run: LanczosRun, facts: dict[str, Any]) -> int:
    """Put a run into the state of a file; its basis is the one that was read, not a copy.

    Args:
        path: The file.
        run: A run as it was made.
        facts: What the file's must equal.

    Returns:
        How many products were spent on checking the operator.

    Raises:
        CheckpointError: If the file is damaged, of a run with other facts, or of another operator; one product tells.
        FileNotFoundError: If there is no such file.
    """
    name = os.fspath(path)
    run.basis.panels = []  # let go of the memory before the file's is taken
    tensors, metadata = read_tensors(name, KIND, _TENSORS)
    found, counts = metadata.get("facts"), metadata.get("counts")
    if not isinstance(found, dict) or not isinstance(counts, dict) or set(counts) != set(_COUNTS):
        raise CheckpointError(f"{name} has a damaged header: no facts and counts of a Lanczos run.")
    changes = [f"{key} was {found.get(key)!r}, now {facts.get(key)!r}" for key in facts if found.get(key) != facts[key]]
    if changes:
        raise CheckpointError(f"{name} is of another run: {'; '.join(changes)}.")
    known, basis = run.projection, run.basis
    shapes = {
        "head": (sum(facts["k"]), basis.dim),
        "tail": (basis.num_rows - sum(facts["k"]), basis.dim),
        "coefficients": tuple(known.coefficients.shape),
        "lost": tuple(known.lost.shape),
        "bounds": (2,),
    }
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(f"{name} contradicts itself: {key} is {tuple(tensors[key].shape)}; expected {shape}.")
    basis.panels = [tensors.pop(key).to(basis.device) for key in ("head", "tail")]
    known.coefficients, known.lost, known.bounds = tensors["coefficients"], tensors["lost"], tensors["bounds"]
    known.size, known.pending, known.latest, known.settled, run.num_products, run.random = (
        counts[key] for key in _COUNTS
    )
    run.generator.set_state(tensors["generator"])
    if known.size == 0:
        return 0
    deviation = run.deviation()
    if not deviation <= SAME_OPERATOR:
        raise CheckpointError(
            f"{name} is of another operator: a product differs from the one in the file by {deviation:.1e} of its norm."
        )
    return 1
