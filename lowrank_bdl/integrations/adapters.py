"""Weights of a posterior as adapters of Hugging Face's peft: the mean, or each draw, in the format its users load."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout

if TYPE_CHECKING:
    from peft import PeftModel


def save_adapter(
    model: "PeftModel",
    theta: Tensor,
    path: str | os.PathLike[str],
    *,
    layout: ParameterLayout | None = None,
    adapter_name: str = "default",
) -> None:
    """Write weights of a posterior over an adapter as that adapter: ``PeftModel.from_pretrained(base, path)`` loads it.

    peft freezes what it adapts, so that ``lb.SWAG(model)``, and every other collector, is over the adapter alone
    (and modules that are saved with it, such as a new head). The model itself is not changed.

    Args:
        model: What ``peft.get_peft_model`` gave.
        theta: Weights, shape ``(D,)``: ``swag.mean``, or a row of ``posterior.sample(n)``.
        path: A folder, which is written whole or not at all; it must be new, or empty.
        layout: What ``theta`` holds; None takes all trainable parameters of the model.
        adapter_name: Which adapter of the model.

    Raises:
        TypeError: If the model has no adapters of peft.
        ValueError: If it has none of that name, or ``theta`` holds parameters that no file of the adapter would hold.
        ShapeError: If ``theta`` does not fit the layout.
        NonFiniteError: If a weight is not finite.
        FileExistsError: If the folder is there and holds something.

    Cost: a copy of the model's state, and the adapter's file.

    Example:
        >>> import peft, tempfile
        >>> from torch import nn
        >>> def base():
        ...     torch.manual_seed(0)
        ...     return nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        >>> model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"]))
        >>> theta = torch.linspace(-1, 1, 12)  # A, (2, 3), and B, (3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, theta, f"{folder}/mean")
        ...     again = peft.PeftModel.from_pretrained(base(), f"{folder}/mean", is_trainable=True)
        >>> torch.equal(ParameterLayout.from_module(again).flatten(again), theta)
        True
    """
    configs = getattr(model, "peft_config", None)
    if configs is None or not hasattr(model, "save_pretrained"):
        raise TypeError(f"model must be a peft model, as peft.get_peft_model gives it; got {type(model).__name__}.")
    if adapter_name not in configs:
        raise ValueError(f"adapter_name must be one of {sorted(configs)}; got {adapter_name!r}.")
    layout = ParameterLayout.from_module(model) if layout is None else layout
    layout.check(model)
    if theta.shape != (layout.numel,):
        raise ShapeError(f"theta must have shape ({layout.numel},); got {tuple(theta.shape)}.")
    if not bool(theta.isfinite().all()):
        raise NonFiniteError("theta must be finite; got NaN or infinity.")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; an adapter is written to a new or an empty folder.")
    weights = {name: part.detach().clone() for name, part in layout.unflatten(theta).items()}
    _require_saved(model, weights, adapter_name)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(
            str(scratch),
            state_dict={**model.state_dict(), **weights},
            selected_adapters=[adapter_name],
            save_embedding_layers=False,
        )
        # peft puts adapters of other names than its default into a folder of that name
        written = scratch / adapter_name if (scratch / adapter_name).is_dir() else scratch
        if target.exists():
            target.rmdir()
        written.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _require_saved(model: Any, weights: dict[str, Tensor], adapter_name: str) -> None:
    """Refuse parameters that an adapter's file does not hold: loading it would silently lose them."""
    from peft import get_peft_model_state_dict

    state = {**model.state_dict(), **weights}
    kept = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False)
    saved = {tensor.data_ptr() for tensor in kept.values()}
    lost = [name for name, tensor in weights.items() if tensor.data_ptr() not in saved]
    if lost:
        raise ValueError(
            f"theta holds parameters that are no part of the adapter {adapter_name!r} and would be lost: {lost[0]}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
            + ". Collect the adapter alone, or name what to keep in the adapter's modules_to_save."
        )


def save_adapters(
    model: "PeftModel",
    posterior: Any,
    path: str | os.PathLike[str],
    num_samples: int,
    *,
    generator: "torch.Generator | None" = None,
    adapter_name: str = "default",
) -> list[Path]:
    """Write draws of a posterior as adapters, a folder each: ``draw-0``, ``draw-1``, ...

    Args:
        model: As for :func:`save_adapter`.
        posterior: Anything with ``sample(n, generator=...)`` and ``layout``, and with a ``mean`` if it has one, which
            goes to ``mean``.
        path: The folder of folders; those to be written must be new or empty.
        num_samples: n >= 0.
        generator: Source of the draws; None takes torch's default generator.
        adapter_name: Which adapter of the model.

    Returns:
        The folders: the mean's first.

    Raises:
        ValueError: If ``num_samples`` is negative; and as for :func:`save_adapter`.

    Cost: an adapter's file a draw.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples must be at least 0; got {num_samples}.")
    parts: list[tuple[str, Tensor]] = []
    if (mean := getattr(posterior, "mean", None)) is not None:
        parts.append(("mean", mean))
    if num_samples:
        draws = posterior.sample(num_samples, generator=generator)
        parts += [(f"draw-{s}", draw) for s, draw in enumerate(draws)]
    folders = [Path(path) / name for name, _ in parts]
    for folder, (_, theta) in zip(folders, parts, strict=True):
        save_adapter(model, theta, folder, layout=posterior.layout, adapter_name=adapter_name)
    return folders
