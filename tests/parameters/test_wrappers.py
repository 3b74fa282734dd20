"""Wrapped networks have the names of what is inside, in layouts, files, errors and batch-norm statistics."""

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import lowrank_bdl as lb
from lowrank_bdl.parameters.wrappers import names_in, plain_names
from lowrank_bdl.surfaces.surface_model import SurfaceModel

ROOT = Path(__file__).parents[2]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.ReLU(), nn.Linear(4, 2))


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def compiled_inside(net: nn.Sequential) -> nn.Module:
    net[0] = torch.compile(net[0], backend="eager")
    return net


def checkpointed_inside(net: nn.Sequential) -> nn.Module:
    net[0] = checkpoint_wrapper(net[0])
    return net


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled in place": compiled_in_place,
    "compiled inside": compiled_inside,
    "data parallel": nn.DataParallel,
    "averaged": lambda net: AveragedModel(net, use_buffers=True).requires_grad_(True),
    "checkpointed": checkpoint_wrapper,
    "checkpointed inside": checkpointed_inside,
    "both": lambda net: torch.compile(nn.DataParallel(checkpointed_inside(net)), backend="eager"),
    "averaged, compiled": lambda net: AveragedModel(torch.compile(net, backend="eager")).requires_grad_(True),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request: pytest.FixtureRequest) -> nn.Module:
    torch._dynamo.reset()
    return WRAPPERS[request.param](network())


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, generator=generator), torch.arange(6) % 2) for _ in range(2)]


def test_the_layout_is_that_of_the_network_inside(wrapped: nn.Module) -> None:
    plain = network()
    layout = lb.ParameterLayout.from_module(wrapped)
    assert layout == lb.ParameterLayout.from_module(plain)
    theta = layout.flatten(wrapped)
    assert torch.equal(theta, layout.flatten(plain))
    layout.assign_(wrapped, 2 * theta)
    assert torch.equal(lb.ParameterLayout.from_module(plain).flatten(wrapped), 2 * theta)
    assert lb.ParameterLayout.from_module(wrapped, include="0.*", exclude="*.1.bias").names == (
        "0.0.weight",
        "0.0.bias",
        "0.1.weight",
    )


def test_what_was_collected_from_one_serves_the_other(wrapped: nn.Module, tmp_path: Path) -> None:
    plain = network()
    swags = [lb.SWAG(net, rank=2) for net in (wrapped, plain)]
    for step in range(3):
        for net, swag in zip((wrapped, plain), swags, strict=True):
            for number, parameter in enumerate(net.parameters()):
                parameter.data.fill_(0.1 * step * (1 + number) - 0.3)
            swag.update_parameters(net)
    swags[0].load_state_dict(swags[1].state_dict())
    swags[1].load_state_dict(swags[0].state_dict())
    swags[0].update_parameters(plain)
    swags[1].update_parameters(wrapped)
    for number, swag in enumerate(swags):
        swag.posterior().save(tmp_path / f"{number}.safetensors")
    assert torch.equal(swags[0].mean, swags[1].mean)
    found = []
    for number, net in ((0, plain), (1, wrapped)):
        posterior = lb.GaussianPosterior.load(tmp_path / f"{number}.safetensors")
        thetas = posterior.sample(3, generator=torch.Generator().manual_seed(0))
        found.append(lb.predict(net, thetas, data(), bn_loader=data(), progress=False, keep_samples=True).sample_means)
    torch.testing.assert_close(*found)


def test_batch_norm_statistics_by_the_names_inside(wrapped: nn.Module) -> None:
    plain = network()
    layout = lb.ParameterLayout.from_module(plain)
    thetas = layout.flatten(plain) * torch.tensor([[0.5], [1.0], [2.0]])
    expected = lb.recalibrate_batch_norm(plain, thetas, data())
    found = lb.recalibrate_batch_norm(wrapped, thetas, data())
    assert list(found) == list(expected) == ["0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"]
    f = lb.FunctionalModel(wrapped.eval())
    for row, theta in enumerate(thetas):
        own = {name: value[row] for name, value in found.items()}
        torch.testing.assert_close(own, {name: value[row] for name, value in expected.items()})
        torch.testing.assert_close(f(theta, data()[0], own), lb.FunctionalModel(plain.eval())(theta, data()[0], own))
    lb.recalibrate_batch_norm_(wrapped, data())
    lb.recalibrate_batch_norm_(plain, data())
    inside = dict(wrapped.named_buffers())
    mean = next(value for name, value in inside.items() if name.endswith("running_mean"))
    torch.testing.assert_close(mean, plain[0][1].running_mean)


def test_matrices_and_curves_of_the_network_inside(wrapped: nn.Module) -> None:
    plain, pairs = network().double(), [(x.double(), y) for x, y in data()]
    wrapped.double()
    theta = lb.ParameterLayout.from_module(plain).flatten(plain) * 1.3
    for kind in (lb.HessianLinearOperator, lb.GGNLinearOperator):
        expected = kind(plain, F.cross_entropy, pairs).at(theta).to_dense()
        torch.testing.assert_close(kind(wrapped, F.cross_entropy, pairs).at(theta).to_dense(), expected)
    curve = lb.BezierCurve.between(theta, 2 * theta)
    outputs = [SurfaceModel(net, curve).eval()(pairs[0][0]) for net in (wrapped, plain)]
    torch.testing.assert_close(*outputs)
    assert all(parameter.grad is None for parameter in wrapped.parameters())


def test_a_child_of_that_name_keeps_it() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 1)

    assert lb.ParameterLayout.from_module(Own()).names == ("module.weight", "module.bias")
    assert lb.ParameterLayout.from_module(nn.DataParallel(Own())).names == ("module.weight", "module.bias")
    clash = nn.DataParallel(nn.Linear(2, 1))
    clash.weight = nn.Parameter(torch.zeros(3))  # the same name twice without the wrapper's
    assert lb.ParameterLayout.from_module(clash).names == ("weight", "module.weight", "module.bias")
    assert lb.FunctionalModel(clash)(torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 3.0]), torch.ones(1, 2)).item() == 6


def test_names_of_plain_models_are_their_own() -> None:
    net = network()
    assert names_in(net) == {} and plain_names(net)("module._orig_mod.x") == "module._orig_mod.x"
    tied = nn.DataParallel(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    tied.module[1].weight = tied.module[0].weight
    layout = lb.ParameterLayout.from_module(tied)
    assert layout.names == ("0.weight", "0.bias", "1.bias") and layout.aliases == (("1.weight", "0.weight"),)
    layout.check(tied.module)


def test_early_files_and_states_with_wrappers_names_load() -> None:
    layout = lb.ParameterLayout.from_module(network())
    metadata = copy.deepcopy(layout.to_metadata())
    metadata["names"] = [f"_orig_mod.{name}" for name in metadata["names"]]
    assert lb.ParameterLayout.from_metadata(metadata) == layout
    swag = lb.SWAG(network(), rank=1)
    from lowrank_bdl.posteriors.swag import _digest

    for wrapper in ("module.", "_orig_mod."):
        state = swag.state_dict() | {"layout_digest": torch.tensor(_digest(layout, wrapper))}
        swag.load_state_dict(state)
    with pytest.raises(RuntimeError, match="other names or shapes"):
        swag.load_state_dict(swag.state_dict() | {"layout_digest": torch.tensor(_digest(layout, "other."))})


def test_statistics_of_a_compiled_network_compile_nothing() -> None:
    torch._dynamo.reset()
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compilations.append(graph)
        return graph.forward

    net = torch.compile(network(), backend=backend)
    thetas = torch.randn(12, lb.ParameterLayout.from_module(net).numel)
    lb.recalibrate_batch_norm(net, thetas, data())
    assert compilations == []
    lb.predict(net, thetas, data(), bn_loader=data(), progress=False)
    assert len(compilations) <= 2  # not once a sample
    before = len(compilations)
    torch.compile(nn.Linear(3, 3), backend=backend)(torch.ones(1, 3))  # others are compiled as ever
    assert len(compilations) == before + 1


SHARDED = """
import torch, torch.distributed as dist, sys
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
import lowrank_bdl as lb
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
theta = lb.ParameterLayout.from_module(plain).flatten(plain)
x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
posterior = lb.EmpiricalPosterior(torch.stack([theta, 2 * theta]), lb.ParameterLayout.from_module(plain))

def make(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    if kind == "fsdp2":
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif kind == "fsdp1":
        net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        net = parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return net

for kind in ("fsdp2", "fsdp1", "tensor parallel"):
    for forward_first in (False, True):
        net = make(kind)
        if forward_first:
            net(x)
        for number, call in enumerate([
            lambda: lb.predict(net, posterior, [(x, y)], progress=False),
            lambda: lb.predict(net, torch.stack([theta, theta]), [(x, y)], progress=False),
            lambda: lb.SWAG(net), lambda: lb.WeightSnapshots(net), lambda: lb.ParameterLayout.from_module(net),
            lambda: lb.FunctionalModel(net), lambda: posterior.layout.flatten(net),
            lambda: lb.HessianLinearOperator(net, nn.functional.cross_entropy, (x, y)),
            lambda: lb.GradientCovariance(net, nn.functional.cross_entropy),
            lambda: lb.DiagonalLaplace(net, labels="true").fit([(x, y)], progress=False),
            lambda: lb.recalibrate_batch_norm_(nn.Sequential(net, nn.BatchNorm1d(2)), [x]),
        ]):
            try:
                call()
            except lb.LowRankBDLError as error:
                assert "must hold whole weights" in str(error), (kind, number, str(error))
            else:
                raise AssertionError((kind, forward_first, number))
if rank == 0:
    print("refused everywhere")
dist.barrier()
dist.destroy_process_group()
"""

DATA_PARALLEL = """
import torch, torch.distributed as dist, sys
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import lowrank_bdl as lb
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
ddp = DistributedDataParallel(plain)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
x, y = torch.randn(6, 3), torch.arange(6) % 2
layout = lb.ParameterLayout.from_module(ddp)
assert layout.names[0] == "0.weight", layout.names
for step in range(3):
    optimizer.zero_grad()
    nn.functional.cross_entropy(ddp(x), y).backward()
    optimizer.step()
    if rank == 0:  # alone: nothing waits for the other process, and the next step does not miss a gradient
        theta = layout.flatten(ddp)
        lb.predict(ddp, torch.stack([theta, 2 * theta]), [(x, y)], bn_loader=[x], progress=False)
        H = lb.HessianLinearOperator(ddp, nn.functional.cross_entropy, (x, y))
        torch.testing.assert_close(
            H @ theta, lb.HessianLinearOperator(plain, nn.functional.cross_entropy, (x, y)) @ theta
        )
        assert ddp.require_backward_grad_sync and ddp.require_forward_param_sync
if rank == 0:
    print("alone and right")
dist.barrier()
dist.destroy_process_group()
"""


def in_two_processes(script: str, tmp_path: Path) -> str:
    """Run a script as two processes of one group; return what the first one prints."""
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(file), str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs[0]


def test_sharded_models_are_refused_everywhere(tmp_path: Path) -> None:
    assert "refused everywhere" in in_two_processes(SHARDED, tmp_path)


def test_a_data_parallel_model_is_evaluated_by_one_process_alone(tmp_path: Path) -> None:
    assert "alone and right" in in_two_processes(DATA_PARALLEL, tmp_path)


def test_what_is_no_module_is_refused_by_name() -> None:
    net = network()
    layout = lb.ParameterLayout.from_module(net)
    posterior = lb.EmpiricalPosterior(layout.flatten(net).unsqueeze(0), layout)

    def run_net(x: Tensor) -> Tensor:
        return net(x)

    for function, name in ((run_net, "function 'run_net'"), (net.forward, "method 'forward'"), ("net", "got str")):
        for call in (
            lambda f: lb.SWAG(f),
            lambda f: lb.WeightSnapshots(f),
            lambda f: lb.predict(f, posterior, data(), progress=False),
            lambda f: lb.FunctionalModel(f),
            lambda f: lb.HessianLinearOperator(f, F.cross_entropy, data()),
            lambda f: lb.GradientCovariance(f, F.cross_entropy),
            lambda f: lb.recalibrate_batch_norm_(f, data()),
        ):
            with pytest.raises(TypeError, match=rf"must be a torch\.nn\.Module.*{name}.*call_fn="):
                call(function)


def test_parameters_without_values_are_refused_by_name() -> None:
    with torch.device("meta"):
        net = network()
    layout = lb.ParameterLayout.from_module(net)  # needs no values
    thetas = torch.randn(2, layout.numel)
    for call in (
        lambda: lb.SWAG(net),
        lambda: lb.SWAG(net, device="cpu").update_parameters(net),
        lambda: lb.WeightSnapshots(net),
        lambda: layout.flatten(net),
        lambda: lb.predict(net, thetas, data(), progress=False),
        lambda: lb.HessianLinearOperator(net, F.cross_entropy, data()),
        lambda: lb.DiagonalLaplace(net, labels="true").fit(data(), progress=False),
    ):
        with pytest.raises(lb.LowRankBDLError, match=r"parameter '0\.0\.weight' is on the meta device"):
            call()
    swag = lb.SWAG(net, device="cpu", rank=1)  # made before the weights are loaded
    swag.update_parameters(network())
    assert swag.n_averaged == 1
