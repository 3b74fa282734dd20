"""The precision of structured algebra: that of its tensors, whatever autocast and TF32 are set to.

Autocast takes matrix products in bfloat16 or float16, and TF32 rounds the factors of float32 products to 11 bits. A
network is trained to bear that; a log-density of 10^6 terms, a Lanczos recurrence or an orthonormal basis is not, and
error bounds that count on the rounding of float32 would be wrong. So everything here but the user's own network runs
in :class:`own_precision`, and the network runs in :func:`callers_precision`, which puts back what the caller chose.
"""

import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=type)

EXACT = frozenset({"ieee", "none"})
"""Settings of float32 products, as torch names them, under which their factors are not rounded."""

_LEFT_ALONE = ("__init__", "__init_subclass__", "__reduce__", "__repr__", "__len__", "_size", "setup_context")
"""Methods without arithmetic, some of which linear_operator calls many times for one product."""


class own_precision:
    """Compute a block with autocast and TF32 switched off: in the precision of its tensors.

    Blocks may be nested and may overlap in several threads; an exception restores everything too. Where torch.compile
    traces, autocast alone is switched off, on CPUs and CUDA devices: TF32 belongs to whoever runs the compiled code.
    For whole functions there is :func:`exact`.

    Autocast is a setting of the thread. Torch keeps that of float32 products (``torch.backends.cuda.matmul`` and
    ``.mkldnn.matmul``, ``torch.set_float32_matmul_precision``) for the whole process: the first block sets it to
    exact, the last one gives back what was found, unless it was changed meanwhile. While a block is open the products
    of other threads are exact too, so they can be slower and more exact than asked for, never less exact.

    Args:
        network: Whether the user's network is to run so too: `callers_precision` then does nothing inside.

    Cost: some 3 microseconds where nothing is switched on, 20 otherwise.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     with own_precision():
        ...         (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """

    __slots__ = ("counted", "devices", "listed", "network", "traced")

    def __init__(self, network: bool = False) -> None:
        self.network = network
        self.devices: tuple[str, ...] = ()

    def __enter__(self) -> None:
        """Switch autocast and TF32 off where they are on."""
        if torch.compiler.is_compiling():
            self.traced = _traceable()
            self.traced.__enter__()
            return
        self.counted = _float32_products.enter()
        if torch._C._is_any_autocast_enabled():
            supported = torch._C._autocast_supported_devices()
            self.devices = tuple(device for device in supported if torch.is_autocast_enabled(device))
            for device in self.devices:
                torch.set_autocast_enabled(device, False)
        self.listed = self.network or self.counted or bool(self.devices)
        if self.listed:
            _open_blocks().append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give back what :meth:`__enter__` found."""
        if torch.compiler.is_compiling():
            self.traced.__exit__(kind, error, traceback)
            return
        if self.listed:
            _open_blocks().pop()
        for device in self.devices:
            torch.set_autocast_enabled(device, True)
        if self.counted:
            _float32_products.leave()


@contextmanager
def callers_precision() -> Iterator[None]:
    """Put autocast and TF32 back, inside `own_precision`, to what the caller had: for the user's own network.

    Outside `own_precision`, where `own_precision(network=True)` is open, and where torch.compile traces, this does
    nothing.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), own_precision():
        ...     with callers_precision():
        ...         print(torch.is_autocast_enabled("cpu"))
        True
    """
    blocks = [] if torch.compiler.is_compiling() else _open_blocks()
    if not blocks or any(block.network for block in blocks):
        yield
        return
    outer = list(blocks)
    blocks.clear()
    devices = [device for block in outer for device in block.devices]
    counted = sum(block.counted for block in outer)
    for _ in range(counted):
        _float32_products.leave()
    for device in devices:
        torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, False)
        for _ in range(counted):
            _float32_products.enter(count=True)
        blocks.extend(outer)


def exact(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function in `own_precision`, or each step of a generator, whose consumer keeps its own settings.

    Cost: a microsecond a call where nothing is switched on.

    Example:
        >>> @exact
        ... def square(a):
        ...     return a @ a
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     print(square(torch.eye(2)).dtype)
        torch.float32
    """
    if inspect.isgeneratorfunction(function):
        return cast("Callable[P, T]", _exact_steps(function))

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling() and _float32_products.idle() and not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with own_precision():
            return function(*args, **kwargs)

    return wrapped


def exact_methods(cls: C) -> C:
    """Run every method that a class itself defines in `own_precision`.

    Properties and class methods are left alone: they only look things up, or call methods that are covered.
    """
    for name, member in list(vars(cls).items()):
        if name in _LEFT_ALONE:
            continue
        if inspect.isfunction(member):
            setattr(cls, name, exact(member))
        elif isinstance(member, staticmethod) and inspect.isfunction(member.__func__):
            setattr(cls, name, staticmethod(exact(member.__func__)))
    return cls


def _exact_steps(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a generator function whose steps run in `own_precision`, and its consumer's code does not."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        steps = function(*args, **kwargs)
        try:
            while True:
                with own_precision():
                    try:
                        item = next(steps)
                    except StopIteration as end:
                        return end.value
                yield item
        finally:
            steps.close()

    return wrapped


@contextmanager
def _traceable() -> Iterator[None]:
    """Switch autocast off in a form that torch.compile traces without a break."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


_thread = threading.local()


def _open_blocks() -> list[own_precision]:
    """Return the blocks of this thread that have switched something off, or keep the network exact; innermost last."""
    blocks: list[own_precision] = _thread.__dict__.setdefault("blocks", [])
    return blocks


class _Float32Products:
    """The process's setting of float32 products, switched off while blocks are open."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a finaliser that runs while it is held may come back
        self.open = self.entered = 0
        self.saved: tuple[str | None, str, str] | None = None

    def idle(self) -> bool:
        """Return whether products are exact and no block is open, without waiting for the lock.

        A block counts itself before it sets anything, and until it has set everything back: exact products that
        another thread's block has brought about show in one of the two counts.
        """
        entered = self.entered
        return self.open == 0 and _all_exact() and self.entered == entered

    def enter(self, count: bool = False) -> bool:
        """Open a block where one has to be counted, or ``count`` says so, and return whether it was."""
        with self.lock:
            rounds = not _all_exact()
            counted = count or rounds or self.open > 0
            self.open += counted
            self.entered += counted
            if rounds:  # for the first block, and where somebody switched it on again while blocks were open
                self.saved = (_overall(), _setting("cuda", "matmul"), _setting("mkldnn", "matmul"))
                self._set(None if self.saved[0] is None else "highest", "ieee", "ieee")
            return counted

    def leave(self) -> None:
        """Close a block that was counted; after the last one give back what was found, if nobody changed it since."""
        with self.lock:
            if self.open == 1 and self.saved is not None:
                if _setting("cuda", "matmul") == _setting("mkldnn", "matmul") == "ieee":
                    self._set(*self.saved)
                self.saved = None
            self.open -= 1

    @staticmethod
    def _set(overall: str | None, *settings: str) -> None:
        """Set products overall, unless None, and those of each backend, which inherit what can be inherited."""
        if overall is not None:  # torch raises where the two kinds of setting contradict each other
            torch.set_float32_matmul_precision(overall)
        for backend, value in zip(("cuda", "mkldnn"), settings, strict=True):
            torch._C._set_fp32_precision_setter(backend, "matmul", "none")
            if _setting(backend, "matmul") != value:
                torch._C._set_fp32_precision_setter(backend, "matmul", value)


_setting: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
"""``torch.backends.<backend>.<operation>.fp32_precision``, in an eighth of its time."""


def _all_exact() -> bool:
    """Return whether no backend rounds the factors of float32 products."""
    return _setting("cuda", "matmul") in EXACT and _setting("mkldnn", "matmul") in EXACT


def _overall() -> str | None:
    """Return the setting for all backends at once, or None where they were set one by one: torch raises then."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_float32_products = _Float32Products()
if hasattr(os, "register_at_fork"):  # a forked child has not got the thread that may hold the lock
    os.register_at_fork(after_in_child=lambda: setattr(_float32_products, "lock", threading.RLock()))
