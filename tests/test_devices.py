"""The library on an accelerator, emulated: results stay there, equal the CPU's, and the host hardly ever waits."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import lowrank_bdl as lb
from lowrank_bdl.errors import LowRankBDLError, NonFiniteError, ShapeError
from lowrank_bdl.linalg import moments
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.trainer import Trainer
from tests import public_operations
from tests.fake_device import FakeDevice, on_cpu
from tests.public_operations import (
    OPERATIONS,
    D,
    Operation,
    batches,
    collector,
    covariance,
    generator,
    log_joint,
    move_,
    network,
    normal,
)

ELSEWHERE = {"map_in_subspace"}
"""Operations whose result may lie elsewhere than the model: small draws."""


def assert_same(found: Any, expected: Any) -> None:
    """Assert that two structures of tensors and numbers agree to the rounding of float32."""
    mine, theirs = pytree.tree_leaves(on_cpu(found)), pytree.tree_leaves(on_cpu(expected))
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        scale = other.abs().max().item() if other.numel() and other.dtype.is_floating_point else 0.0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


@cache
def on_the_cpu(operation: Operation) -> Any:
    return operation.make(torch.device("cpu"))()


def devices_of(result: Any) -> set[str]:
    return {str(leaf.device) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
@pytest.mark.parametrize("name", ["cuda:0", "cuda:1"])  # the second while the first is current
def test_operation_on_an_accelerator(operation: Operation, name: str) -> None:
    expected = on_the_cpu(operation)
    with FakeDevice("cuda:0") as gpu:
        call = operation.make(torch.device(name))
        with gpu.section() as part:
            found = call()
        if operation.name not in ELSEWHERE:
            assert devices_of(found) <= {name}
    assert_same(found, expected)
    if operation.syncs is not None:
        assert part.num_syncs <= operation.syncs, part.where()


def on_two_devices() -> nn.Module:
    """A network whose first layer lies on one device and the second on another."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 10).to("cuda:0"), nn.Linear(10, 3).to("cuda:1")

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.to("cuda:0")).tanh().to("cuda:1"))

    return Split()


def test_a_model_over_two_devices_trains_and_is_collected() -> None:
    with FakeDevice("cuda"):
        model = on_two_devices()
        swag = lb.SWAG(model, rank=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss(network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            output = network(x)
            return nn.functional.cross_entropy(output, y.to(output.device)), output

        trainer = Trainer(model, optimizer, loss, collections={"swag": Collection(swag)})
        trainer.fit(batches(torch.device("cpu")), 4, progress=False)
        assert swag.n_averaged == 4 and swag.posterior().sample(2).device == torch.device("cuda:0")
        with torch.no_grad():
            model.second.weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="training diverged"):
            trainer.fit(batches(torch.device("cpu")), 5, progress=False)


def test_a_trainers_step_waits_for_nothing() -> None:
    with FakeDevice("cuda") as gpu:
        model, data = network(torch.device("cuda")), batches(torch.device("cuda"))
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        waits = []
        for repeats in (1, 5):
            with gpu.section() as part:
                trainer.train_epoch(data * repeats, progress=False)
            waits.append(part.num_syncs)
    assert waits[0] == waits[1] <= 2, part.where()  # the epoch's mean and the check of the weights


def test_basis_device_without_an_index_is_the_current_device() -> None:
    with FakeDevice("cuda") as gpu:
        operator, start = covariance(torch.device("cuda:0")), torch.ones(D, device="cuda:0")
        found = []
        for basis_device in (None, "cuda", "cuda:0"):
            with gpu.section() as part:
                pairs = lb.lanczos(operator, 2, start=start, basis_device=basis_device)
            found.append((part.launches, part.largest, pairs.eigenvectors.untyped_storage().nbytes()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dim", [1000, 300_000])
def test_no_loop_over_chunks_waits(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "column_chunks", small_chunks)
    with FakeDevice("cuda") as gpu:
        device = torch.device("cuda")
        model = nn.ParameterList([torch.zeros(dim, device=device)])
        swag = lb.SWAG(model, rank=3)
        for seed in range(5):
            move_(model, seed)
            with gpu.section() as update:
                swag.update_parameters(model)
        with gpu.section() as made:
            posterior = swag.posterior()
        with gpu.section() as drawn:
            posterior.sample(2, generator(device))
        posterior.log_prob(posterior.mean)
        with gpu.section() as density:
            posterior.log_prob(posterior.mean)
    assert [part.num_syncs for part in (update, made, drawn, density)] == [1, 1, 0, 1]


def small_chunks(numel: int, device: torch.device, block: int = 1) -> Iterator[slice]:
    width = max(50_000 // block, 1) * block
    return (slice(start, min(start + width, numel)) for start in range(0, numel, width))


def test_slq_waits_once_a_step() -> None:
    with FakeDevice("cuda") as gpu:
        device, waits = torch.device("cuda"), []
        operator = covariance(device)
        for steps in (4, 8):
            with gpu.section() as part:
                lb.spectral_density(operator, 3, steps, generator=generator(device))
            waits.append(part.num_syncs)
    assert waits[1] - waits[0] <= 4, part.where()


def test_lanczos_waits_once_a_product() -> None:
    with FakeDevice("cuda") as gpu:
        values, start = torch.linspace(-1, 3, D).to("cuda"), normal(torch.device("cuda"), D)
        with gpu.section() as part:
            pairs = lb.lanczos(lambda v: values * v, (2, 1), which="BE", start=start)
    assert part.num_syncs <= pairs.num_matvecs + 12, part.where()  # and a few when it begins and ends


def test_counters_stay_on_the_host_and_travel_with_the_state() -> None:
    with FakeDevice("cuda") as gpu:
        model, swag = collector(torch.device("cuda"))
        copied, moved = copy.deepcopy(swag), copy.deepcopy(swag).to("cuda:1")
        other = lb.SWAG(network(torch.device("cuda")), rank=4)
        other.load_state_dict(swag.state_dict())
        with gpu.section() as part:
            numbers = [one.n_averaged for one in (swag, copied, moved, other)]
        assert numbers == [6] * 4 and part.num_syncs == 0
        assert moved.storage.device == torch.device("cuda:1")
        move_(model, 9)
        for one in (swag, copied, other):
            one.update_parameters(model)
        assert_same(other.posterior().to_state()[0], swag.posterior().to_state()[0])
        assert_same(copied.posterior().to_state()[0], swag.posterior().to_state()[0])
        state = {name: tensor.to("cuda") for name, tensor in swag.state_dict().items()}  # as files of before have it
        other.load_state_dict(state)
        assert other.n_averaged == 7


def test_targets_out_of_range_are_refused_on_a_device_too() -> None:
    with FakeDevice("cuda"):
        device = torch.device("cuda")
        target = log_joint(device)
        x, y = batches(device)[0]
        wrong = lb.LogJoint(target.subspace, network(device), "categorical", [(x, y), (x, y + 1)])
        for _ in range(2):
            with pytest.raises(ShapeError, match=r"Class indices must be in \[0, number of classes\)"):
                wrong(torch.zeros(2, device=device))
        assert torch.isfinite(target(torch.zeros(2, device=device))).item()


DRAWS = (
    "low_rank_plus_diag_sample", "batch_sample", "inverse_sample", "kronecker_sample", "block_lanczos",
    "stochastic_estimates", "spectral_density", "draws", "block_posterior", "mixture", "empirical", "noise_posteriors",
    "kfac_laplace", "subspaces", "elliptical_slice", "coordinate_slice", "sgld", "sghmc", "variational",
    "low_rank_gaussian", "surfaces", "surface_training", "predict", "noisy_optimisers", "noisy_logits",
)  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_a_generator_of_the_cpu_seeds_draws_on_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def of_the_cpu(device: torch.device) -> torch.Generator:
        made.append(torch.Generator().manual_seed(4))
        return made[-1]

    monkeypatch.setattr(public_operations, "generator", of_the_cpu)
    with FakeDevice("cuda"):
        found = [OPERATIONS[name].make(torch.device("cuda"))() for _ in range(2)]
    assert made
    assert_same(found[0], found[1])


CHUNKED = {
    "matmul": lambda op, x: op @ x,
    "diagonal": lambda op, x: op.diagonal(),
    "solve": lambda op, x: op.solve(x),
    "inv_quad_logdet": lambda op, x: op.inv_quad_logdet(x, logdet=True),
    "inverse_diagonal": lambda op, x: op.inverse().diagonal(),
    "inverse_sample": lambda op, x: op.inverse().sample(2),
    "principal_components": lambda op, x: op.principal_components(2),
    "kl": lambda op, x: lb.kl_divergence(*(lb.GaussianPosterior(mean, op) for mean in x.mT)),
    "simplex_volume": lambda op, x: lb.log_simplex_volume(torch.stack([*x.mT, op.diag])),
    "projection": lambda op, x: lb.Subspace(None, x[:, 0], x).project(x.mT),
    "curve_subspace": lambda op, x: lb.curve_subspace(torch.stack([*x.mT, op.diag])),
    "diagonal_posterior": lambda op, x: lb.GaussianPosterior.diagonal(x[:, 0], op.diag),
    "bfloat16_root": lambda op, x: lb.LowRankPlusDiagLinearOperator(op.root.bfloat16(), op.diag).logdet(),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_waits_do_not_grow_with_the_number_of_chunks(name: str) -> None:
    with FakeDevice("cuda") as gpu:
        device, waits = torch.device("cuda"), []
        for dim in (1000, 200_000):
            operator, x = covariance(device, rank=2, dim=dim), normal(device, dim, 2, seed=3)
            with gpu.section() as part:
                CHUNKED[name](operator, x)
            waits.append(part.num_syncs)
    assert waits[0] == waits[1], part.where()


REFUSED_ON_MPS = {
    "A Fisher matrix of blocks": {"diagonal_laplace", "kfac_laplace"},
    "A frequent-directions sketch": {"frequent_directions"},
    "A KL divergence": {"kl_divergence"},
    "A stochastic estimate": {"stochastic_estimates", "spectral_density"},
    "A Kronecker-factored operator": {name for name in OPERATIONS if name.startswith("kronecker")},
    "The derivative of a density": {"derivatives_of_a_density"},
    "The subspace of a curve": {"subspaces"},
    "The volume of a simplex": {"log_simplex_volume", "surfaces"},
}
"""What needs more float64 than small sums; all else works on Apple's devices."""
OTHER_STREAM = {
    *("mixture", "elliptical_slice", "coordinate_slice", "sgld", "sghmc", "variational", "low_rank_gaussian"),
    "surface_training",
}
"""Draws that are made on the CPU in float64 there, from a seed that the device's generator gives."""


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
def test_operation_on_a_device_without_float64(operation: Operation) -> None:
    expected = on_the_cpu(operation)
    refused = [message for message, names in REFUSED_ON_MPS.items() if operation.name in names]
    with FakeDevice("mps"):
        if refused:
            with pytest.raises(
                LowRankBDLError, match=f"{refused[0]} sums in float64, which mps(:0)? does not have; move"
            ):
                operation.make(torch.device("mps"))()
            return
        found = operation.make(torch.device("mps"))()
    for leaf in pytree.tree_leaves(found):
        if isinstance(leaf, Tensor) and leaf.device.type != "mps" and operation.name not in OTHER_STREAM | ELSEWHERE:
            assert leaf.dtype is not torch.float32, "only float64 results and counts are on the CPU"
    if operation.name not in OTHER_STREAM:
        assert_same(found, expected)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize(("rank", "dim"), [(0, 9), (12, 5), (3, 900)])
@pytest.mark.parametrize("name", ["matmul", "diagonal", "solve", "inv_quad_logdet", "inverse_diagonal"])
def test_any_rank_on_a_device(name: str, rank: int, dim: int, kind: str) -> None:
    results = []
    for device in (torch.device("cpu"), torch.device(kind)):
        with FakeDevice(kind):
            operator, x = covariance(device, rank=rank, dim=dim), normal(device, dim, 2, seed=3)
            results.append(CHUNKED[name](operator, x))
    assert_same(results[1], results[0])


@contextmanager
def reduced_precision() -> Iterator[None]:
    """What people train in: autocast to bfloat16, and TF32 for the rest."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS.values() if operation.name not in public_operations.RUN_NETWORKS],
    ids=lambda operation: operation.name,
)
def test_autocast_and_tf32_of_a_gpu_change_no_operation(operation: Operation) -> None:
    with FakeDevice("cuda"):
        call = operation.make(torch.device("cuda"))
        with reduced_precision():
            found = call()
    assert_same(found, on_the_cpu(operation))
