"""One reading of batches, whatever loaders give: pairs, mappings, Hugging Face encodings, or anything with a function.

Everything of this library that takes data reads them here, so that what one function takes, all do.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lowrank_bdl.errors import ShapeError

Data: TypeAlias = tuple[Any, Tensor] | Iterable[Any]
CallFn: TypeAlias = Callable[[nn.Module, Any], Any]
TargetFn: TypeAlias = Callable[[Any], Tensor | None]

TARGET_KEYS = ("labels", "label", "targets", "target")
"""Entries of a mapping that hold the targets; they are not handed to the network."""

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


# ---- data -----------------------------------------------------------------------------------------------------------


def batches_of(data: Data) -> Iterable[Any]:
    """Return data as batches: a tuple ``(x, y)`` with a tensor y, or a mapping, is one batch.

    Args:
        data: One batch, or what gives batches.

    Returns:
        A list of the one batch, or the data themselves.

    Example:
        >>> x, y = torch.zeros(3, 2), torch.arange(3)
        >>> [len(list(batches_of(data))) for data in ((x, y), [(x, y)], {"x": x, "labels": y}, [x, x])]
        [1, 1, 1, 2]
    """
    pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)
    return [data] if pair or isinstance(data, Mapping) else data


def fixed_batches(data: Data) -> Iterable[Any]:
    """Return data as batches that can be read again and again in one order.

    Args:
        data: A pair ``(x, y)``, y a tensor, or a mapping, which is one batch; or a list of such, a DataLoader that does
            not shuffle, or anything else that gives the same batches whenever it is iterated.

    Returns:
        The batches.

    Raises:
        ValueError: If the data are an iterator, which can be read only once, or a DataLoader that draws its order.
        ShapeError: If the data are no batches at all.

    Example:
        >>> x, y = torch.randn(5, 3), torch.arange(5)
        >>> [len(batch[1]) for batch in fixed_batches((x, y))]
        [5]
        >>> [len(batch[1]) for batch in fixed_batches(list(zip(x.split(2), y.split(2))))]
        [2, 2, 1]
    """
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor)
    if pair or isinstance(data, Mapping):
        return [data]
    if isinstance(data, Iterator):
        raise ValueError(
            "every product reads the data again: they must be a pair (x, y), a list of batches or a DataLoader; "
            f"got an iterator ({type(data).__name__}), which can be read only once. Pass list(data)."
        )
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise ShapeError(f"data must be a pair (x, y), a list of batches or a DataLoader; got {type(data).__name__}.")
    if isinstance(data, (tuple, list)) and not data:
        raise ShapeError("data must hold at least one batch; got none.")
    if isinstance(data, DataLoader):
        for sampler in (data.sampler, getattr(data.batch_sampler, "sampler", None)):
            if isinstance(sampler, _RANDOM_SAMPLERS):
                raise ValueError(
                    "a product must see the same batches as the last one: the DataLoader must read in a fixed order; "
                    f"got one with a {type(sampler).__name__}. Make it with shuffle=False."
                )
    return data


# ---- one batch ------------------------------------------------------------------------------------------------------


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch (tuples, lists, mappings, nested) to a device; the batch itself is left as it is.

    Args:
        batch: A tensor, a tuple, list or mapping of such, or anything else, which is passed through. An object with a
            ``to`` method of its own (a graph batch, a tokenizer's encoding) is moved by that.
        device: Where to.

    Returns:
        The batch with the same structure.
    """
    if callable(move := getattr(batch, "to", None)):
        if isinstance(batch, Mapping):  # Hugging Face's encodings are moved in place
            return copy.copy(batch).to(device)  # type: ignore[attr-defined]
        return move(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [to_device(value, device) for value in batch]
        if isinstance(batch, list):
            return moved
        return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)  # a named tuple takes its fields
    return batch


def targets_of(batch: Any) -> Tensor | None:
    """Find the targets in a batch as data loaders give it.

    Args:
        batch: ``(x, y)``; a mapping with an entry ``labels``, ``label``, ``targets`` or ``target``; or anything else.

    Returns:
        The targets, or None if there are none to be found.

    Example:
        >>> targets_of({"input_ids": torch.zeros(1), "labels": torch.ones(1)})
        tensor([1.])
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        found = batch[1]
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    else:
        found = None
    return found if isinstance(found, Tensor) else None


class Whole(NamedTuple):
    """A batch that is handed to the network as it is, its targets being somewhere in it."""

    batch: Any


def joined(inputs: Any, targets: Any = None) -> Any:
    """Return the batch that :func:`split_batch` took apart, for the network.

    Args:
        inputs: From :func:`split_batch`.
        targets: Likewise; None leaves them out of a pair.
    """
    if isinstance(inputs, Whole):
        return inputs.batch
    return (inputs,) if targets is None else (inputs, targets)


def split_batch(batch: Any, device: torch.device | None, target_fn: TargetFn | None = None) -> tuple[Any, Tensor, int]:
    """Return the inputs and targets of a batch on a device, and its number of examples, the length of the targets.

    Args:
        batch: As a loader gives it.
        device: Where to; None leaves everything where it is.
        target_fn: Takes the targets out of a batch; None is :func:`targets_of`.

    Returns:
        Inputs, which :func:`joined` makes a batch for the network, targets, and N.

    Raises:
        ShapeError: If there are no targets, or they are no tensor with at least one example.
    """
    if device is not None:
        batch = to_device(batch, device)
    is_pair = target_fn is None and isinstance(batch, (tuple, list)) and len(batch) == 2
    targets = batch[1] if is_pair else (targets_of if target_fn is None else target_fn)(batch)
    if targets is None:
        raise ShapeError(
            "A batch must be (x, y), or a mapping with its targets as 'labels', 'label', 'targets' or 'target', unless "
            f"target_fn is given: targets are needed; got {form_of(batch)}."
        )
    if not isinstance(targets, Tensor) or targets.ndim == 0 or len(targets) == 0:
        form = str(tuple(targets.shape)) if isinstance(targets, Tensor) else type(targets).__name__
        raise ShapeError(f"Targets must be a tensor with at least one example on the first axis; got {form}.")
    if device is not None:
        targets = targets.to(device)
    inputs = batch[0] if is_pair else Whole(batch)
    if isinstance(inputs, Tensor) and inputs.is_inference():  # autograd cannot save it
        inputs = inputs.clone()
    return inputs, targets.clone() if targets.is_inference() else targets, len(targets)


def form_of(batch: Any) -> str:
    """Say what a batch is, for messages."""
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} with entries {sorted(map(str, batch))}"
    return type(batch).__name__ + (f" of {len(batch)} entries" if isinstance(batch, (tuple, list)) else "")


# ---- the network on a batch -----------------------------------------------------------------------------------------


def call_on_inputs(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch as data loaders give it: ``x``, ``(x,)``, ``(x, y)``, or a mapping.

    A mapping's entries, without its targets, are keyword arguments, as Hugging Face's models take them. What they
    return is an object with ``logits``: these are the output, and where they have three axes ``(N, T, C)``, one vector
    for each token, the classes go to the second, as in torch's ``cross_entropy``: ``(N, C, T)``.

    Args:
        model: The network.
        batch: A tensor, a tuple or list of one or two entries, of which the first is the input, or a mapping.

    Returns:
        ``model(x)`` or its logits.

    Raises:
        ShapeError: If the batch has another form, or the model predicts the next token, for which ``labels`` are
            shifted inside of it.
    """
    if isinstance(batch, Tensor):
        return logits_of(model(batch))
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        inputs = batch[0]
        if isinstance(inputs, Mapping) and not isinstance(inputs, dict):  # an encoding beside its targets
            return logits_of(model(**inputs))
        return logits_of(model(inputs))
    if isinstance(batch, Mapping):
        if targets_of(batch) is not None and _predicts_next_token(model):
            raise ShapeError(
                f"{type(model).__name__} shifts labels by one token inside, so that they are not those of its logits. "
                "Pass call_fn=lambda model, batch: model(batch['input_ids']).logits[:, :-1].mT and "
                "target_fn=lambda batch: batch['labels'][:, 1:]."
            )
        return logits_of(_call_by_name(model, {k: v for k, v in batch.items() if k not in TARGET_KEYS}))
    raise ShapeError(
        f"A batch must be a tensor x, (x,), (x, y) or a mapping unless call_fn is given; got {form_of(batch)}. "
        "Pass call_fn=lambda model, batch: ..."
    )


def _call_by_name(model: nn.Module, entries: Mapping[Any, Any]) -> Any:
    try:
        return model(**entries)
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(**entries)
        except TypeError:
            raise ShapeError(
                "A mapping's entries without its targets are the network's keyword arguments unless call_fn is given; "
                f"{type(model).__name__} does not take {sorted(map(str, entries))}. "
                "Pass call_fn=lambda model, batch: ..."
            ) from error
        raise


def _predicts_next_token(model: nn.Module) -> bool:
    return getattr(model, "loss_type", None) == "ForCausalLM" or "LMHead" in type(model).__name__


def logits_of(output: Any) -> Any:
    """Return the ``logits`` of what a Hugging Face model returns, classes on the second axis; else the output itself.

    Args:
        output: What a model returns.
    """
    logits = getattr(output, "logits", None)
    if isinstance(output, Tensor) or not isinstance(logits, Tensor):
        return output
    return logits.movedim(-1, 1) if logits.ndim == 3 else logits
