"""What a forward pass does to the weights: which ones it writes into, and whose weights it reads."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Places:
    """Which of some named tensors lie where in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._by_storage: dict[int, list[tuple[int, int, str]]] = {}
        for name, tensor in tensors.items():
            tensor = _physical(tensor)
            if tensor.numel() and (storage := _storage(tensor)):
                self._by_storage.setdefault(storage, []).append((*_extent(tensor), name))

    def names(self, tensor: Tensor) -> Iterator[str]:
        """Yield the names of those that share memory with a tensor."""
        found = self._by_storage.get(_storage(tensor), ())
        if found and tensor.numel():
            low, high = _extent(tensor)
            yield from (name for start, stop, name in found if start < high and low < stop)


def _physical(tensor: Tensor) -> Tensor:
    """The tensor in memory behind those that vmap and functional derivatives wrap around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _storage(tensor: Tensor) -> int:
    """Address of a tensor's storage; 0 where it has none (a meta tensor, a subclass that wraps others)."""
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (NotImplementedError, RuntimeError):
        return 0


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Bytes of its storage that a tensor with entries begins at and ends before."""
    start = int(tensor.storage_offset())
    last = start + sum(int((size - 1) * stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.itemsize, (last + 1) * tensor.itemsize


class WeightWitness(TorchDispatchMode):
    """Watches every operation inside a ``with`` block for what it does to some tensors.

    Operations are told by the memory of their arguments, so that writes through ``weight.data``, through a view or
    under ``no_grad`` are seen, also those that leave the values as they are.

    Args:
        given: Name to tensor: what a network should compute with.
        own: Name to tensor: what it should leave alone meanwhile.

    Attributes:
        written: Names of given tensors that an operation wrote into.
        read: Names of given tensors that an operation used.
        own_used: Names of own tensors that an operation used, the first one first.

    Cost: some microseconds an operation.

    Example:
        >>> weight, own = torch.ones(2), torch.zeros(2)
        >>> with WeightWitness({"weight": weight}, {"own": own}) as witness:
        ...     _ = weight.data.clamp_(max=2), own + 1
        >>> witness.written, witness.own_used
        ({'weight'}, ['own'])
    """

    supports_higher_order_operators = True  # they are carried out as they are

    def __init__(self, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._given, self._own = _Places(given), _Places(own)
        self.written: set[str] = set()
        self.read: set[str] = set()
        self.own_used: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: "dict[str, Any] | None" = None
    ) -> Any:
        """Note what the operation's arguments are, and carry it out."""
        kwargs = kwargs or {}
        if getattr(func, "is_view", False):  # only what is then done to the view counts
            return func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        declared = () if schema is None else schema.arguments
        for number, value in enumerate(args):
            self._note(value, number < len(declared) and _is_written(declared[number]))
        if kwargs:
            by_name = {argument.name: argument for argument in declared}
            for name, value in kwargs.items():
                self._note(value, name in by_name and _is_written(by_name[name]))
        return func(*args, **kwargs)

    def _note(self, value: Any, written: bool) -> None:
        if isinstance(value, Tensor):
            names = set(self._given.names(value))
            self.read |= names
            if written:
                self.written |= names
            self.own_used.extend(self._own.names(value))
        elif isinstance(value, (tuple, list)):
            for entry in value:
                self._note(entry, written)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
