"""What an operation will need in memory, in closed form, before anything is allocated."""

from dataclasses import dataclass

import torch
from torch import nn

from lowrank_bdl.linalg.block_scaling import needs_scale, num_blocks
from lowrank_bdl.linalg.factors import LowRankFactors

OPERATIONS = (
    "state",
    "collect",
    "posterior",
    "sample",
    "log_prob",
    "log_prob_backward",
    "logdet",
    "entropy",
    "kl",
    "solve",
    "scaled_solve",
    "sum_solve",
    "indexed_solve",
    "diagonal",
    "principal_components",
    "marginal",
    "save",
    "load",
    "predict",
)
"""What `estimate_memory` knows."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that an operation needs.

    Attributes:
        inputs: What must be there before: the collector's state, or the posterior and the vectors it is applied to.
        result: What is there after, beyond the inputs.
        temporaries: What is there only during the operation, at the worst moment.
    """

    inputs: int
    result: int
    temporaries: int

    @property
    def peak(self) -> int:
        """All of it at the worst moment."""
        return self.inputs + self.result + self.temporaries

    def __str__(self) -> str:
        parts = {"inputs": self.inputs, "result": self.result, "temporaries": self.temporaries}
        listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
        return f"{self.peak / 2**30:.2f} GiB ({listed})"


def estimate_memory(
    model_or_numel: nn.Module | int,
    rank: int,
    operation: str = "state",
    dtype: torch.dtype = torch.float32,
    samples: int = 1,
    *,
    deviation_dtype: torch.dtype | None = None,
    fraction: float = 0.5,
    device: torch.device | str = "cpu",
) -> MemoryEstimate:
    r"""Return the memory that an operation on a rank-K posterior over D weights needs.

    ================================  ==========================================  ======================================
    operation                         inputs                                      result and temporaries (no chunks)
    ================================  ==========================================  ======================================
    ``state``                         weights                                     (K + 3) D
    ``collect``                       weights, (K + 3) D                          D
    ``posterior``                     (K + 3) D                                   2 D
    ``sample``                        (K + 2) D                                   S D
    ``log_prob``                      (K + 2 + S) D                               a number
    ``logdet``, ``entropy``           (K + 1) D                                   a number
    ``kl``                            (K + 4) D, deviations shared                a number
    ``solve``, ``scaled_solve``       (K + 1 + S) D                               S D; D more for the scaled diagonal
    ``sum_solve``                     (K + 1 + S) D, K the sum of both ranks      (K + 1) D, S D
    ``indexed_solve``, ``marginal``   (K + 2) D                                   a share of (K + 2) D, and the index
    ``log_prob_backward``             (K + 3) D                                   (K + 1) D, 2 D
    ``diagonal``                      (K + 1) D                                   D
    ``principal_components``          (K + 1) D                                   S D for S components
    ``save``, ``load``                (K + 2) D                                   none, and (K + 2) D
    ``predict``                       (K + 2) D                                   S D draws (networks' outputs excluded)
    ================================  ==========================================  ======================================

    To these come a few chunks of 16,384 columns (a twentieth of the weights on a GPU) in the dtype of the work.

    Args:
        model_or_numel: A network, of which the parameters that require a gradient are counted, or their number D.
        rank: K, the number of deviations.
        operation: One of `OPERATIONS`.
        dtype: Of mean and variance [parameter].
        samples: S: draws, values, right-hand sides or components.
        deviation_dtype: Storage of the deviations; None for ``dtype``.
        fraction: Share of the coordinates that ``marginal`` and ``indexed_solve`` keep, scattered.
        device: Where it will run: decides the size of chunks.

    Raises:
        ValueError: If the operation is unknown or a number is negative.

    Cost: none.

    Example:
        >>> estimate_memory(36_500_000, 20, "state").result / 2**30  # GiB
        3.127...
        >>> print(estimate_memory(36_500_000, 20, "sample", samples=30))
        7.07 GiB (inputs 2.99, result 4.08, temporaries 0.00)
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}; got {operation!r}.")
    if isinstance(model_or_numel, nn.Module):
        numel = sum(p.numel() for p in model_or_numel.parameters() if p.requires_grad)
    else:
        numel = model_or_numel
    for name, number in (("the number of weights", numel), ("rank", rank), ("samples", samples)):
        if number < 0:
            raise ValueError(f"{name} must be >= 0; got {number}.")
    stored = dtype if deviation_dtype is None else deviation_dtype
    vector = numel * dtype.itemsize
    rows = rank * (numel * stored.itemsize + (4 * num_blocks(numel) if needs_scale(stored) else 0))
    width = _chunk_width(numel, rank, torch.device(device))
    chunk = width * max(rank, 1) * dtype.itemsize  # one chunk of deviations in the dtype of the work
    double = width * max(rank, 1) * 8
    decoded = 0 if stored == dtype else chunk
    kept = round(fraction * numel)
    kept_rows = round(fraction * rows) if not needs_scale(stored) else rank * kept * dtype.itemsize
    index = kept * 8  # int64; checking it for repeats takes several of its size, before the rows are gathered
    kept_vector = kept * dtype.itemsize
    solved = samples * kept_vector
    gather = kept_rows + kept_vector + round(2.5 * index) + decoded + chunk
    inputs, result, temporaries = {
        "state": (vector, rows + 3 * vector, 0),
        "collect": (rows + 4 * vector, 0, vector + 2 * width * dtype.itemsize),
        "posterior": (rows + 3 * vector, 2 * vector, 0),
        "sample": (rows + 2 * vector, samples * vector, decoded),
        "log_prob": (rows + (2 + samples) * vector, 8 * samples, decoded + chunk),
        "log_prob_backward": (rows + 3 * vector, rows + vector, vector * samples + vector + decoded + 3 * chunk),
        "logdet": (rows + vector, 8, decoded + chunk),
        "entropy": (rows + vector, 8, decoded + chunk),
        "kl": (rows + 4 * vector, 8, 6 * double),
        "solve": (rows + (1 + samples) * vector, samples * vector, decoded + chunk),
        "scaled_solve": (rows + (1 + samples) * vector, samples * vector, vector + decoded + chunk),
        "sum_solve": (rows + (1 + samples) * vector, samples * vector, rows + vector + decoded + chunk),
        "indexed_solve": (
            rows + (1 + samples) * vector + index,
            solved,
            max(gather, 5 * index - solved),
        ),
        "diagonal": (rows + vector, vector, decoded + chunk),
        "principal_components": (rows + vector, samples * vector, decoded + double),
        "marginal": (
            rows + 2 * vector,
            kept_rows + 2 * kept_vector,
            max(index, 4 * index - kept_rows - 2 * kept_vector),
        ),
        "save": (rows + 2 * vector, 0, 0),
        "load": (0, rows + 2 * vector, 0),
        "predict": (rows + 2 * vector, samples * vector, decoded),
    }[operation]
    return MemoryEstimate(inputs, result, temporaries)


def _chunk_width(numel: int, rank: int, device: torch.device) -> int:
    """Return how many coordinates the kernels take at a time; the tensors here have no memory behind them."""
    place = torch.device("cpu") if device.type == "cpu" else torch.device("meta")
    nothing = torch.empty(1, device=place)
    factors = LowRankFactors(nothing.expand(numel, rank), nothing.expand(numel), nothing)
    return max((part.stop - part.start for part in factors.chunks()), default=0)
