"""The final weights of a training run in one small file, read without the state that training goes on from."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.common import SettingsError
from lowrank_bdl.linalg.files import read_tensors, write_tensors

WEIGHTS = "weights.safetensors"
KIND = "final weights"


@dataclass(frozen=True)
class FinalWeights:
    """What a training run ends with.

    Attributes:
        thetas: Weight vectors (D,) by source, named as in results.json: the last iterate first ("SGD", "Adam",
            "SGLD", ...; "mean" of a --vi run), then "SWA", "EMA", "Polyak" where they were collected. Where only some
            parameters were collected, the others are those of the last iterate.
        layout: What a vector holds: every trainable parameter.
        buffers: The network's buffers after the last epoch: the last iterate's own batch-norm statistics.
    """

    thetas: Mapping[str, Tensor]
    layout: lb.ParameterLayout
    buffers: Mapping[str, Tensor]

    @property
    def last(self) -> Tensor:
        """The last iterate, (D,)."""
        return next(iter(self.thetas.values()))

    @property
    def start(self) -> Tensor:
        """What another run starts from: the SWA mean if there is one, else the last iterate, (D,)."""
        return self.thetas.get("SWA", self.last)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that name `start` and the buffers by their content."""
        found = hashlib.blake2b(digest_size=8)
        for tensor in (self.start, *self.buffers.values()):
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def check(self, model: nn.Module) -> None:
        """Refuse another network.

        Raises:
            CheckpointError: Names the first parameter or buffer that differs.
        """
        difference = lb.ParameterLayout.from_module(model).difference(self.layout)
        own, found = ({n: tuple(b.shape) for n, b in buffers.items()} for buffers in (buffers_of(model), self.buffers))
        for name in dict.fromkeys([*own, *found]):
            if difference is None and own.get(name) != found.get(name):
                expected, got = (shapes.get(name, "no such buffer") for shapes in (own, found))
                difference = f"buffer {name!r}: expected {expected}, got {got}"
        if difference is not None:
            raise lb.CheckpointError(f"the weights are of another network: {difference}.")

    @torch.no_grad()
    def load_into_(self, model: nn.Module, theta: Tensor | None = None) -> None:
        """Write weights and buffers into a network.

        Args:
            model: The network.
            theta: A vector (D,); the last iterate if None.

        Raises:
            CheckpointError: If it is another network; nothing is written then.
        """
        self.check(model)
        self.layout.assign_(model, self.last if theta is None else theta)
        for name, buffer in buffers_of(model).items():
            buffer.copy_(self.buffers[name])


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a network's state has, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def final_weights(
    model: nn.Module, sources: Mapping[str, Tensor], layouts: Mapping[str, lb.ParameterLayout | None]
) -> FinalWeights:
    """Gather the weight vectors of a run.

    Args:
        model: The trained network, at its last iterate.
        sources: Weight vectors by name, the last iterate first.
        layouts: What those hold that are of some parameters only.
    """
    layout = lb.ParameterLayout.from_module(model)
    thetas = {}
    for name, vector in sources.items():
        whole = layout.flatten(model)
        parts = layouts.get(name) or layout
        for parameter, where in parts.slices.items():
            whole[layout.slices[parameter]] = vector[where].to(whole)
        thetas[name] = whole
    return FinalWeights(thetas, layout, buffers_of(model))


def write_weights(path: str | os.PathLike[str], weights: FinalWeights) -> None:
    """Write final weights: the old file or the new one, never a part.

    Format: safetensors, `theta/SOURCE` (D,) and `buffer/NAME`; metadata `layout` (names, shapes, dtypes), `sources` and
    `buffers` (names in order).
    """
    tensors = {f"theta/{name}": theta for name, theta in weights.thetas.items()}
    tensors |= {f"buffer/{name}": buffer.clone() for name, buffer in weights.buffers.items()}  # each memory of its own
    metadata = {
        "layout": weights.layout.to_metadata(),
        "sources": list(weights.thetas),
        "buffers": list(weights.buffers),
    }
    write_tensors(path, KIND, tensors, metadata)


def read_weights(path: str | os.PathLike[str]) -> FinalWeights:
    """Read what `write_weights` wrote, on the CPU.

    Raises:
        CheckpointError: If the file is truncated, foreign or contradicts itself.
        FileNotFoundError: If there is no such file.
    """
    tensors, metadata = read_tensors(path, KIND, ())
    name = os.fspath(path)
    sources, buffers = metadata.get("sources"), metadata.get("buffers")
    if not (isinstance(sources, list) and sources and isinstance(buffers, list)):
        raise lb.CheckpointError(f"{name} has a damaged header: no sources or buffers.")
    expected = [f"theta/{source}" for source in sources] + [f"buffer/{buffer}" for buffer in buffers]
    if set(expected) != set(tensors):
        raise lb.CheckpointError(f"{name} contradicts itself: it lists {sorted(expected)} and holds {sorted(tensors)}.")
    layout = lb.ParameterLayout.from_metadata(metadata.get("layout") or {})
    thetas = {source: tensors[f"theta/{source}"] for source in sources}
    for source, theta in thetas.items():
        if theta.shape != (layout.numel,) or not bool(theta.isfinite().all()):
            raise lb.CheckpointError(
                f"{name} contradicts itself: {source} must hold {layout.numel} finite numbers; "
                f"got shape {tuple(theta.shape)}, {int(theta.isfinite().logical_not().sum())} not finite."
            )
    return FinalWeights(thetas, layout, {buffer: tensors[f"buffer/{buffer}"] for buffer in buffers})


def read_start(folder: str, model: nn.Module) -> FinalWeights:
    """Read the weights that --init_from names, and see that they fit; the network stays as it is.

    Raises:
        SettingsError: If there is no finished run, its file is damaged, or it is of another network.
    """
    path = Path(folder) / WEIGHTS
    try:
        found = read_weights(path)
        found.check(model)
    except FileNotFoundError:
        what = f"there is no {WEIGHTS}; is the run finished?" if Path(folder).is_dir() else "there is no such folder"
        raise SettingsError(f"--init_from {folder}: {what}") from None
    except (lb.CheckpointError, OSError) as error:
        raise SettingsError(f"--init_from {folder}: {' '.join(str(error).split())}") from None
    return found
