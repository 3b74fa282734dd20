"""Structured algebra's own precision: what the context switches off, for whom, and what it gives back."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowrank_bdl.linalg.precision import _float32_products, callers_precision, exact, exact_methods, own_precision

MATMUL = {"cuda": torch.backends.cuda.matmul, "mkldnn": torch.backends.mkldnn.matmul}  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Every test starts from torch's defaults, leaves no block open, and the process as it was."""
    yield
    still_open = _float32_products.open
    torch.set_float32_matmul_precision("highest")
    for backend in MATMUL.values():
        backend.fp32_precision = "none"
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    assert still_open == 0


def settings() -> tuple[str, ...]:
    """Return what the process has now: products overall (or "mixed"), on CUDA, on oneDNN, and autocast on CPUs."""
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = "mixed"
    return (overall, *(backend.fp32_precision for backend in MATMUL.values()), str(torch.is_autocast_enabled("cpu")))


def is_exact() -> bool:
    """Return whether products are exact and autocast is off, here and now."""
    return settings()[1] in ("ieee", "none") and settings()[2] in ("ieee", "none") and settings()[3] == "False"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_both_are_off_inside_and_back_after(precision: str) -> None:
    """Products are float32 and exact inside; afterwards the same products are bfloat16 again, and TF32 is on."""
    a = torch.randn(3, 3)
    torch.set_float32_matmul_precision(precision)
    with torch.autocast("cpu", torch.bfloat16):
        before = settings()
        with own_precision():
            assert is_exact() and not torch.backends.cuda.matmul.allow_tf32
            assert (a @ a).dtype is torch.float32
        assert settings() == before
        assert (a @ a).dtype is torch.bfloat16


@pytest.mark.parametrize("switch", ["cuda", "mkldnn", "all", "legacy"])
def test_every_way_to_ask_for_tf32_is_seen_and_given_back(switch: str) -> None:
    """Torch's newer attributes, per backend and for all of them, and the older flag."""
    if switch == "all":
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    elif switch == "legacy":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        MATMUL[switch].fp32_precision = "tf32"
    before = settings()
    with own_precision():
        assert is_exact() and settings()[0] == "highest"
    assert settings() == before and "tf32" in before
    if switch == "all":  # what was inherited still is
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        assert is_exact()


def test_nothing_changes_where_nothing_is_on() -> None:
    """The plain case sets no flag, so that a later choice for all backends still reaches every one of them."""
    before = settings()
    with own_precision():
        assert settings() == before
        with own_precision():
            assert settings() == before
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    assert settings()[1:3] == ("tf32", "tf32")


def test_exceptions_restore_both() -> None:
    """An error inside nested blocks, and inside a decorated function."""

    @exact
    def fails() -> None:
        with own_precision():
            raise ValueError("inside")

    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        before = settings()
        with pytest.raises(ValueError, match="inside"):
            fails()
        assert settings() == before


def test_a_choice_made_while_a_block_is_open_is_kept() -> None:
    """What a user sets in the meantime is not replaced by what was found, and the next block switches it off again."""
    torch.set_float32_matmul_precision("high")
    with own_precision():
        torch.set_float32_matmul_precision("medium")
        with own_precision():
            assert is_exact()
    assert torch.get_float32_matmul_precision() == "medium"


def test_blocks_that_overlap_in_threads() -> None:
    """The first to open switches off, the last to close gives back; autocast of the other thread is its own."""
    torch.set_float32_matmul_precision("high")
    opened, close, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with torch.autocast("cpu", torch.bfloat16), own_precision():
            opened.set()
            close.wait(10)
            seen.append(is_exact())

    thread = threading.Thread(target=other)
    with torch.autocast("cpu", torch.bfloat16):
        with own_precision():
            thread.start()
            assert opened.wait(10)
        assert torch.is_autocast_enabled("cpu") and not torch.backends.cuda.matmul.allow_tf32
        close.set()
        thread.join()
    assert seen == [True] and torch.get_float32_matmul_precision() == "high"


def test_many_threads_leave_it_as_it_was() -> None:
    """No order of opening and closing loses the setting or shows it inside a block."""
    torch.set_float32_matmul_precision("high")
    wrong: list[tuple[str, ...]] = []

    def work() -> None:
        for _ in range(300):
            with own_precision():
                if not is_exact():
                    wrong.append(settings())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.get_float32_matmul_precision() == "high"


def test_a_generator_keeps_its_precision_and_its_consumer_another() -> None:
    """Each step runs exactly; between the steps autocast is on again. Its value is returned, and it can be closed."""
    done: list[str] = []

    @exact
    def steps(a: Tensor) -> Iterator[torch.dtype]:
        try:
            for _ in range(2):
                yield (a @ a).dtype
        finally:
            done.append("closed")

    with torch.autocast("cpu", torch.bfloat16):
        for dtype in steps(torch.ones(2, 2)):
            assert dtype is torch.float32 and torch.is_autocast_enabled("cpu")
        walk = steps(torch.ones(2, 2))
        next(walk)
        walk.close()
    assert done == ["closed", "closed"]


@pytest.mark.parametrize("kind", ["block", "function"])
def test_compiled_code_switches_autocast_off_without_a_break(kind: str) -> None:
    """Traced by torch.compile with fullgraph, and inside vmap and grad."""

    def block(x: Tensor) -> Tensor:
        with own_precision():
            return x @ x

    function = block if kind == "block" else exact(lambda x: x @ x)
    a = torch.randn(3, 3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(a), function(a))
        assert compiled(a).dtype is torch.float32 and torch.is_autocast_enabled("cpu")
        assert torch.func.vmap(function)(torch.stack([a, a])).dtype is torch.float32
        assert torch.func.grad(lambda x: function(x).sum())(a).shape == (3, 3)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_users_network_keeps_what_the_caller_chose(depth: int) -> None:
    """Inside any number of blocks it has autocast, its dtype and TF32 again, and inside it blocks work once more."""
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.float16):
        before = settings()

        def nested(level: int) -> None:
            with own_precision():
                if level > 1:
                    return nested(level - 1)
                with callers_precision():
                    assert settings() == before and torch.get_autocast_dtype("cpu") is torch.float16
                    with own_precision():
                        assert is_exact()
                    with callers_precision():
                        assert settings() == before
                assert is_exact()
                with pytest.raises(ValueError, match="in the network"), callers_precision():
                    raise ValueError("in the network")
                assert is_exact()

        nested(depth)
        assert settings() == before
        with callers_precision():
            assert settings() == before


def test_a_network_that_is_to_be_exact_stays_so() -> None:
    """`network=True` holds for every block inside it, and no longer than itself."""
    with torch.autocast("cpu", torch.bfloat16):
        with own_precision(network=True), own_precision(), callers_precision():
            assert is_exact()
        with own_precision(), callers_precision():
            assert not is_exact()


def test_methods_of_a_class() -> None:
    """Methods and static methods run exactly; properties, class methods and what is inherited are left alone."""

    class Base:
        def inherited(self) -> bool:
            return is_exact()

    @exact_methods
    class Inside(Base):
        def method(self) -> bool:
            return is_exact()

        @staticmethod
        def static() -> bool:
            return is_exact()

        @classmethod
        def of_class(cls) -> bool:
            return is_exact()

        @property
        def value(self) -> bool:
            return is_exact()

    inside = Inside()
    with torch.autocast("cpu", torch.bfloat16):
        assert inside.method() and inside.static()
        assert not (inside.inherited() or inside.of_class() or inside.value)
