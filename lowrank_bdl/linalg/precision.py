"""The precision of structured algebra: that of its tensors, whatever autocast and TF32 are set to.

Autocast takes matrix products in bfloat16 or float16, and TF32 rounds the factors of float32 products to 11 bits. A
network is trained to bear that; a log-density of 10^6 terms, a Lanczos recurrence or an orthonormal basis is not, and
error bounds that count on the rounding of float32 would be wrong.
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

EXACT = frozenset({"ieee", "none"})
"""Settings of float32 products, as torch names them, under which their factors are not rounded."""


class own_precision:
    """Compute a block, or a function, with autocast and TF32 switched off: in the precision of its tensors.

    Works as ``with own_precision():`` and as ``@own_precision()``, like ``torch.no_grad``, also on generators, whose
    consumer keeps its own settings. Blocks may be nested and may overlap in several threads; an exception restores
    everything too. Inside a function that torch.compile traces it is autocast alone that is switched off, on CPUs and
    CUDA devices: TF32 belongs to whoever runs the compiled code.

    Autocast is a setting of the thread. Torch keeps that of float32 products (``torch.backends.cuda.matmul`` and
    ``.mkldnn.matmul``, ``torch.set_float32_matmul_precision``) for the whole process: the first block sets it to
    exact, the last one gives back what was found, unless it was changed meanwhile. While a block is open the products
    of other threads are exact too, so they can be slower and more exact than asked for, never less exact.

    Cost: some 3 microseconds where nothing is switched on, 20 otherwise.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     with own_precision():
        ...         (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """

    __slots__ = ("counted", "devices", "traced")

    devices: tuple[str, ...]

    def __enter__(self) -> None:
        """Switch autocast and TF32 off where they are on."""
        if torch.compiler.is_compiling():
            self.traced = _traceable()
            self.traced.__enter__()
            return
        self.counted = _float32_products.enter()
        self.devices = ()
        if torch._C._is_any_autocast_enabled():
            supported = torch._C._autocast_supported_devices()
            self.devices = tuple(device for device in supported if torch.is_autocast_enabled(device))
            for device in self.devices:
                torch.set_autocast_enabled(device, False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give back what :meth:`__enter__` found."""
        if torch.compiler.is_compiling():
            self.traced.__exit__(kind, error, traceback)
            return
        for device in self.devices:
            torch.set_autocast_enabled(device, True)
        if self.counted:
            _float32_products.leave()

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return the function with every call of it, or every step of the generator it returns, in such a block."""
        if inspect.isgeneratorfunction(function):
            return cast("Callable[P, T]", _wrapped_generator(function))

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            with own_precision():
                return function(*args, **kwargs)

        return wrapped


@contextmanager
def _traceable() -> Iterator[None]:
    """Switch autocast off in a form that torch.compile traces without a break."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _wrapped_generator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a generator function whose steps run in :class:`own_precision`, and its consumer's code does not."""

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


class _Float32Products:
    """The process's setting of float32 products, switched off while blocks are open."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a finaliser that runs while it is held may come back
        self.open = 0
        self.saved: tuple[str | None, str, str] | None = None

    def enter(self) -> bool:
        """Open a block where one has to be counted, and return whether it was."""
        with self.lock:
            rounds = _setting("cuda", "matmul") not in EXACT or _setting("mkldnn", "matmul") not in EXACT
            if rounds:  # for the first block, and where somebody switched it on again while blocks were open
                self.saved = (_overall(), _setting("cuda", "matmul"), _setting("mkldnn", "matmul"))
                self._set(None if self.saved[0] is None else "highest", "ieee", "ieee")
            counted = rounds or self.open > 0
            self.open += counted
            return counted

    def leave(self) -> None:
        """Close a block that was counted; after the last one give back what was found, if nobody changed it since."""
        with self.lock:
            self.open -= 1
            if self.open == 0 and self.saved is not None:
                if _setting("cuda", "matmul") == _setting("mkldnn", "matmul") == "ieee":
                    self._set(*self.saved)
                self.saved = None

    @staticmethod
    def _set(overall: str | None, *settings: str) -> None:
        """Set products overall, unless None, and those of each backend, which inherit what can be inherited."""
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for backend, value in zip(("cuda", "mkldnn"), settings, strict=True):
            torch._C._set_fp32_precision_setter(backend, "matmul", "none")
            if _setting(backend, "matmul") != value:
                torch._C._set_fp32_precision_setter(backend, "matmul", value)


_setting: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
"""``torch.backends.<backend>.<operation>.fp32_precision``, in an eighth of its time."""


def _overall() -> str | None:
    """Return the setting for all backends at once, or None where they were set one by one: torch raises then."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_float32_products = _Float32Products()
if hasattr(os, "register_at_fork"):  # a forked child has not got the thread that may hold the lock
    os.register_at_fork(after_in_child=lambda: setattr(_float32_products, "lock", threading.RLock()))
