"""Nested state (optimisers, schedulers, collectors, generators) as named tensors plus plain JSON, and back."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_bdl.errors import CheckpointError


def pack(tree: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split a tree of dicts, lists, tuples, numbers, strings and tensors into JSON and tensors.

    Types survive: integer keys, tuples, infinities, and the strides of a tensor whose axes are permuted in memory
    (channels last), since the last bit of later arithmetic can depend on them.

    Args:
        tree: The state.
        prefix: Begins the name of every tensor.

    Returns:
        JSON-able skeleton, and the tensors by name; those share memory with the tree.

    Raises:
        TypeError: If the tree holds anything else; names where.

    Example:
        >>> skeleton, tensors = pack({"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, float("inf"))})
        >>> list(tensors)
        ['state.0.step']
        >>> unpack(skeleton, tensors)
        {'state': {0: {'step': tensor(3.)}}, 'betas': (0.9, inf)}
    """
    packed = _Packed()
    return packed.add(tree, prefix), packed.tensors


class _Packed:
    """The tensors found so far, each memory once: files of tensors refuse shared memory (tied weights)."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()

    def add(self, tree: Any, where: str) -> Any:
        if isinstance(tree, Tensor):
            return self._add_tensor(tree.detach(), where)
        if isinstance(tree, Mapping):
            if not all(isinstance(key, (str, int)) for key in tree):
                raise TypeError(f"{where or 'the state'}: keys must be strings or integers; got {list(tree)[:3]}.")
            return {"dict": [[key, self.add(value, _join(where, key))] for key, value in tree.items()]}
        if isinstance(tree, (list, tuple)):
            kind = "tuple" if isinstance(tree, tuple) else "list"
            return {kind: [self.add(value, _join(where, index)) for index, value in enumerate(tree)]}
        if isinstance(tree, float) and not math.isfinite(tree):
            return {"float": repr(tree)}
        if tree is None or isinstance(tree, (bool, int, float, str)):
            return tree
        raise TypeError(
            f"{where or 'the state'}: state must be made of tensors, numbers, strings, lists and dicts; "
            f"got {type(tree).__name__}."
        )

    def _add_tensor(self, tensor: Tensor, where: str) -> dict[str, Any]:
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        found: dict[str, Any] = {"tensor": where}
        if not tensor.is_contiguous() and _is_dense(tensor):
            found["strides"] = list(tensor.stride())
        if tensor.numel() and view in self._names:
            return {**found, "tensor": self._names[view]}
        self._names[view] = where
        self.tensors[where] = tensor.clone() if tensor.numel() and storage in self._storages else tensor
        self._storages.add(storage)
        return found


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements fill one block of memory, in an order of its own."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def unpack(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what :func:`pack` took apart.

    Args:
        skeleton: The JSON part.
        tensors: The tensors by name; used, not copied, unless their strides must be restored.

    Returns:
        The tree.

    Raises:
        CheckpointError: If the skeleton is damaged or names a tensor that is not there.
    """
    if skeleton is None or isinstance(skeleton, (bool, int, float, str)):
        return skeleton
    try:
        return _unpack(skeleton, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint's state is damaged: {type(error).__name__} {error}.") from error


def _unpack(skeleton: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in skeleton:
        tensor = tensors[skeleton["tensor"]]
        if "strides" not in skeleton:
            return tensor
        arranged = torch.empty_strided(tensor.shape, skeleton["strides"], dtype=tensor.dtype, device=tensor.device)
        return arranged.copy_(tensor)
    if "float" in skeleton:
        return float(skeleton["float"])
    if "dict" in skeleton:
        return {key: unpack(value, tensors) for key, value in skeleton["dict"]}
    if "tuple" in skeleton:
        return tuple(unpack(value, tensors) for value in skeleton["tuple"])
    return [unpack(value, tensors) for value in skeleton["list"]]
