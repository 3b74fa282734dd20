"""Every public operation under autocast and TF32: the answers are those outside, and the switches are off within."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_bdl as lb
from lowrank_bdl.linalg.precision import callers_precision, exact, own_precision
from tests.public_operations import OPERATIONS, RUN_NETWORKS, Operation

CPU = torch.device("cpu")
MATRIX_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "addmv", "addmv_", "mv", "dot", "baddbmm", "baddbmm_", "addbmm"}
CALLERS_OWN_BACKWARD = {"surface_training"}
"""Operations that end in a backward pass of the caller's, which is as precise as the caller asks."""


def leaves(result: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor | int | float)]


@pytest.fixture
def exact_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that switch autocast off by themselves: what is left of its effect is the library's own."""
    forward = nn.Sequential.forward

    def without_autocast(self: nn.Sequential, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(self, x)

    monkeypatch.setattr(nn.Sequential, "forward", without_autocast)


@pytest.mark.usefixtures("exact_networks")
@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS.values() if operation.name not in CALLERS_OWN_BACKWARD],
    ids=lambda operation: operation.name,
)
def test_operation_inside_autocast(operation: Operation) -> None:
    expected = operation.make(CPU)()
    call = operation.make(CPU)
    with torch.autocast("cpu", torch.bfloat16):
        found = call()
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        assert one.dtype == other.dtype
        scale = other.abs().max().item() if other.numel() and other.is_floating_point() else 0.0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * scale)


@pytest.fixture(params=["high", "medium"])
def coarse_products(request: pytest.FixtureRequest) -> Iterator[str]:
    """Let float32 matrices be multiplied coarsely, as on a GPU for speed; put back afterwards."""
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


class Recorder(TorchDispatchMode):
    """Notes the switches at every product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in MATRIX_PRODUCTS:
            self.seen.append(switches())
        return func(*args, **(kwargs or {}))


def switches() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS.values() if operation.name not in RUN_NETWORKS],
    ids=lambda operation: operation.name,
)
def test_no_coarse_product_in_an_operation(operation: Operation) -> None:
    call = operation.make(CPU)
    torch.set_float32_matmul_precision("high")
    try:
        before = switches()
        with Recorder() as recorder:
            call()
        assert switches() == before == ("tf32", "tf32")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(recorder.seen) <= {("ieee", "ieee")}


def test_the_callers_network_keeps_its_precision(coarse_products: str) -> None:
    seen = []

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            seen.append((output.dtype, torch.get_float32_matmul_precision()))
            return output

    net, data = Net(3, 2), [(torch.randn(5, 3), torch.randint(2, (5,)))]
    thetas = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mean = lb.predict(net, thetas, data, vectorize=False, progress=False).mean
        subspace = lb.Subspace(lb.ParameterLayout.from_module(net), thetas[0], torch.eye(8)[:, :3])
        value = lb.LogJoint(subspace, net, "categorical", data)(torch.zeros(3))
        draws = lb.elliptical_slice(
            lb.LogJoint(subspace, net, "categorical", data), 2, num_chains=1, burn_in=1, progress=False
        )
    assert seen and set(seen) == {(torch.bfloat16, coarse_products)}
    assert mean.dtype is torch.float32 and value.dtype is torch.float64 and draws.draws.dtype is not torch.bfloat16


def test_curvature_switches_autocast_off_for_the_network_too() -> None:
    net, (x, y) = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        (torch.randn(6, 3), torch.randint(2, (6,))),
    )
    hessian = lb.HessianLinearOperator(net, nn.functional.cross_entropy, (x, y))
    expected = hessian.to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hessian.to_dense(), expected)


def test_switches_come_back_after_exceptions_and_nesting(coarse_products: str) -> None:
    before = switches()
    with pytest.raises(ZeroDivisionError, match="division"), torch.autocast("cpu", torch.bfloat16), own_precision():
        with own_precision(), callers_precision():
            assert switches() == before and torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") is torch.bfloat16
            with own_precision():
                assert switches() == ("ieee", "ieee") and not torch.is_autocast_enabled("cpu")
            assert switches() == before and torch.is_autocast_enabled("cpu")
        assert switches() == ("ieee", "ieee") and not torch.is_autocast_enabled("cpu")
        _ = 1 / 0
    assert switches() == before and torch.get_float32_matmul_precision() == coarse_products
    with own_precision(network=True), callers_precision():
        assert switches() == ("ieee", "ieee")
    assert switches() == before


def test_a_switch_that_is_set_meanwhile_stays(coarse_products: str) -> None:
    with own_precision():
        torch.set_float32_matmul_precision("highest")
        torch.set_float32_matmul_precision("high")
    assert torch.get_float32_matmul_precision() == "high"


def test_threads_share_the_switches_but_not_autocast(coarse_products: str) -> None:
    before, inside, go_on = switches(), threading.Event(), threading.Event()
    states = []

    def other() -> None:
        with own_precision():
            states.append(torch.is_autocast_enabled("cpu"))
            inside.set()
            go_on.wait(10)

    with torch.autocast("cpu", torch.bfloat16):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        assert torch.is_autocast_enabled("cpu") and switches() == ("ieee", "ieee")
        with own_precision():
            pass
        assert switches() == ("ieee", "ieee")  # the other thread still needs it
        go_on.set()
        thread.join()
    assert states == [False] and switches() == before


def test_steps_of_a_generator_function() -> None:
    seen = []

    @exact
    def steps() -> Iterator[int]:
        for number in range(2):
            seen.append(torch.is_autocast_enabled("cpu"))
            yield number

    with torch.autocast("cpu", torch.bfloat16):
        for _ in steps():
            assert torch.is_autocast_enabled("cpu")
    assert seen == [False, False]


def test_an_operator_made_inside_autocast_is_that_of_outside() -> None:
    root, diag, columns = torch.randn(300, 4), torch.rand(300) + 0.1, torch.randn(300, 2)
    expected = (lb.LowRankPlusDiagLinearOperator(root, diag) * 2.0).solve(columns)
    with torch.autocast("cpu", torch.bfloat16):
        operator = lb.LowRankPlusDiagLinearOperator(root, diag) * 2.0
        inverse = operator.inverse()
    assert torch.equal(operator.solve(columns), expected)
    assert torch.equal(inverse @ columns, expected)


def test_a_gradient_taken_inside_autocast_is_that_of_outside() -> None:
    root, diag, x = torch.randn(300, 4), torch.rand(300) + 0.1, torch.randn(300)
    grads = []
    for enabled in (False, True):
        leaves_ = [t.clone().requires_grad_() for t in (root, diag, x)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            posterior = lb.GaussianPosterior(torch.zeros(300), lb.LowRankPlusDiagLinearOperator(*leaves_[:2]))
            grads.append(torch.autograd.grad(posterior.log_prob(leaves_[2]), leaves_))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
