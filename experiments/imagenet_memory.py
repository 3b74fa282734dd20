"""The memory that a collector and its posterior need: as `lb.estimate_memory` predicts it, and as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import nn

import lowrank_bdl as lb
from experiments import plots
from experiments.common import format_table, peak_memory

GIB = 2.0**30


@dataclass(frozen=True)
class MemoryRow:
    """One operation at its worst moment, what it needs as input included.

    Attributes:
        operation: A name that `lb.estimate_memory` knows.
        predicted: In bytes.
        measured: Tensors that were there, and the most that were made beside them at once [bytes].
    """

    operation: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


def measure_memory(model: nn.Module, rank: int, deviation_dtype: torch.dtype, place: torch.device) -> list[MemoryRow]:
    """Make a collector, show it the network twice, and draw from its posterior once; the network is not changed.

    Args:
        model: The network.
        rank: Deviations kept.
        deviation_dtype: How they are stored.
        place: Device of the collector.

    Returns:
        A row for each of: making the collector, showing it the network, making the posterior, drawing from it.
    """
    rows = []

    def compare(operation: str, held: int, extra: int) -> None:
        estimate = lb.estimate_memory(model, rank, operation, deviation_dtype=deviation_dtype, device=place)
        rows.append(MemoryRow(operation, estimate.peak, held + extra))

    swag, made = peak_memory(lambda: lb.SWAG(model, rank=rank, deviation_dtype=deviation_dtype, device=place), place)
    weights = sum(p.nbytes for p in swag.layout.parameters_of(model))
    compare("state", weights, made)
    state = sum(buffer.nbytes for buffer in swag.own_tensors().values())
    swag.update_parameters(model)
    _, made = peak_memory(lambda: swag.update_parameters(model), place)
    compare("collect", weights + state, made)
    posterior, made = peak_memory(swag.posterior, place)
    compare("posterior", state, made)
    generator = torch.Generator(place).manual_seed(0)
    # the posterior's own mean and variance, and the collector's deviations, which it shares
    deviations = swag.storage.nbytes + (0 if swag.storage_scale is None else swag.storage_scale.nbytes)
    held = deviations + 2 * posterior.mean.nbytes
    _, made = peak_memory(lambda: posterior.sample(1, generator=generator), place)
    compare("sample", held, made)
    return rows


def table(rows: Sequence[MemoryRow]) -> str:
    """Lay out predictions and measurements in GiB."""
    header = ["memory at the worst moment [GiB]", "predicted", "measured", "measured / predicted"]
    return format_table(
        header,
        [[r.operation, f"{r.predicted / GIB:.4f}", f"{r.measured / GIB:.4f}", f"{r.ratio:.4f}"] for r in rows],
    )


def draw(path: Path, rows: Sequence[MemoryRow], title: str) -> None:
    """Two bars an operation: predicted and measured.

    Args:
        path: File to write.
        rows: What was measured.
        title: Of the figure.
    """
    with plt.rc_context(plots.STYLE):
        figure, axes = plots._axes(7.5, 3.4)
        for shift, name, color in ((-0.2, "predicted", "#999999"), (0.2, "measured", "#D55E00")):
            place = [i + shift for i in range(len(rows))]
            axes.barh(place, [getattr(row, name) / GIB for row in rows], 0.38, color=color, label=name)
        for i, row in enumerate(rows):
            axes.annotate(f" {row.ratio - 1:+.2%}", (row.measured / GIB, i + 0.2), va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [row.operation for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(False, axis="y")
        axes.set_xlabel("memory at the worst moment [GiB]")
        axes.set_title(title, fontsize=11)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        plots._save(figure, path)
