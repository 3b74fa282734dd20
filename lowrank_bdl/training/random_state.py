"""The state of every global random generator that a model or a data pipeline may draw from."""

import random
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, those of the device included.

    Args:
        device: Where the model lives.

    Returns:
        A tree for :func:`~lowrank_bdl.training.packing.pack`.
    """
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (others may draw from it)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().view(torch.int8),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).view(torch.int8)
    return state


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put the global generators back into a captured state, so that a resumed run draws what the whole one drew.

    Args:
        state: What :func:`capture` returned.
        device: Where the model lives now; a CUDA state is left out elsewhere.
    """
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].view(torch.uint8).to("cpu"))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].view(torch.uint8).to("cpu"), device)
