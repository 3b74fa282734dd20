"""A collector inside a training module: what wrappers do to buffers must not happen to it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lowrank_bdl as lb
from tests.parameters.test_wrappers import in_two_processes

NAMES = ("shift", "offset", "sum_sq", "count", "prior_count", "storage", "num_pushed", "layout_digest")


class Training(nn.Module):
    """A network and its collector in one module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.swag = lb.SWAG(self.net, rank=2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in self.net.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.swag.update_parameters(self.net)


def state(swag: lb.SWAG) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in swag.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert (
            torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
            if tensor.ndim
            else (found[name].item() == tensor.item())
        )


DTYPES = [None, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_under_the_names_that_buffers_would_have_and_in_no_list_of_buffers(dtype: "torch.dtype | None") -> None:
    training = Training(deviation_dtype=dtype)
    training.step(0), training.step(1), training.step(2)
    names = {*NAMES, "storage_scale"} if dtype in DTYPES[2:] else set(NAMES)
    assert {name for name in training.state_dict() if name.startswith("swag.")} == {f"swag.{name}" for name in names}
    assert not [name for name, _ in training.named_buffers() if name.startswith("swag")]
    assert not [name for name, _ in training.named_parameters() if name.startswith("swag")]
    other = Training(deviation_dtype=dtype)
    other.load_state_dict(copy.deepcopy(training.state_dict()))
    assert_same(other.swag.state_dict(), training.swag.state_dict())
    copies = [copy.deepcopy(training), other]
    if dtype != torch.float8_e4m3fn:  # which torch cannot pickle
        copies.append(pickle.loads(pickle.dumps(training)))
    for collector in copies:
        expected = copy.deepcopy(training)
        for twin in (collector, expected):
            twin.step(3), twin.step(4)
        assert_same(collector.swag.state_dict(), expected.swag.state_dict())  # resumed to the bit
        assert collector.swag.n_averaged == 5 and training.swag.n_averaged == 3


@pytest.mark.parametrize("use_buffers", [True, False])
def test_torchs_averaged_model_leaves_it_alone(use_buffers: bool) -> None:
    training = Training()
    averaged = AveragedModel(training, use_buffers=use_buffers)
    for number in range(4):
        training.step(number)
        averaged.update_parameters(training)
    expected = Training()
    for number in range(4):
        expected.step(number)
    assert_same(training.swag.state_dict(), expected.swag.state_dict())
    torch.testing.assert_close(averaged.module.net[0].weight.flatten(), training.swag.mean[:12])


@pytest.mark.filterwarnings("ignore")
def test_lightnings_weight_averaging_keeps_it_and_its_count(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.training_part = Training(deviation_dtype=torch.float8_e4m3fn)
            self.seen: list[Tensor] = []

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            return nn.functional.cross_entropy(self.training_part(batch[0]), batch[1])

        def on_train_epoch_end(self) -> None:
            self.training_part.swag.update_parameters(self.training_part.net)
            self.seen.append(self.training_part.swag.layout.flatten(self.training_part.net))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.training_part.net.parameters(), lr=0.1)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    loader = torch.utils.data.DataLoader(data, batch_size=6)

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[callbacks.WeightAveraging(use_buffers=True)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    module = Module()
    first = trainer(3)
    first.fit(module, loader)
    swag = module.training_part.swag
    assert swag.n_averaged == 3
    torch.testing.assert_close(swag.mean, torch.stack(module.seen).mean(0))
    assert swag.storage.dtype == torch.float8_e4m3fn
    path = tmp_path / "last.ckpt"
    first.save_checkpoint(path)
    resumed = Module()
    trainer(5).fit(resumed, loader, ckpt_path=path, weights_only=False)
    assert resumed.training_part.swag.n_averaged == 5


def test_it_follows_moves_and_keeps_its_dtypes() -> None:
    training = Training(deviation_dtype=torch.bfloat16)
    training.step(0), training.step(1)
    before = state(training.swag)
    training.half()
    training.bfloat16()
    training.float()
    assert_same(training.swag.state_dict(), before)
    training.to("meta")
    assert training.swag.storage.device.type == training.swag.shift.device.type == "meta"
    assert training.swag.storage.dtype == torch.bfloat16
    assigned = Training(deviation_dtype=torch.bfloat16).to("meta")
    assigned.swag.load_state_dict(before, assign=True)
    assert_same(assigned.swag.state_dict(), before)
    posterior = lb.SWAG.posterior(assigned.swag)
    expected = Training(deviation_dtype=torch.bfloat16)
    expected.swag.load_state_dict(before)
    assert torch.equal(posterior.mean, expected.swag.posterior().mean)


def test_a_state_of_buffers_loads_and_one_that_does_not_fit_changes_nothing() -> None:
    training = Training()
    training.step(0), training.step(1)
    before = state(training.swag)
    holder = nn.Module()  # as the collector kept its tensors at first
    for name, tensor in training.swag.state_dict().items():
        holder.register_buffer(name, tensor.clone())
    other = Training()
    other.swag.load_state_dict(holder.state_dict())
    assert_same(other.swag.state_dict(), before)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*swag\.shift"):
        training.load_state_dict({k: v for k, v in training.state_dict().items() if not k.startswith("swag.")})
    partial = {name: tensor + 1 if name == "shift" else tensor for name, tensor in before.items() if name != "count"}
    with pytest.raises(RuntimeError, match="missing count; the collector is unchanged"):
        training.swag.load_state_dict(partial)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*more"):
        training.swag.load_state_dict(before | {"more": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"shift: expected \(34,\) torch.float32, got \(33,\)"):
        training.swag.load_state_dict({**before, "shift": before["shift"][1:]})
    assert_same(training.swag.state_dict(), before)
    training.load_state_dict({"net.0.weight": torch.zeros(4, 3)}, strict=False)
    assert_same(training.swag.state_dict(), before)


def test_loading_makes_a_shared_posterior_stale() -> None:
    training = Training()
    training.step(0), training.step(1), training.step(2)
    posterior = training.swag.posterior()
    training.swag.load_state_dict(state(training.swag))
    with pytest.raises(lb.StaleError, match="the deviations behind this covariance were changed"):
        posterior.sample(1)


DATA_PARALLEL = """
import torch, torch.distributed as dist, sys
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tests.posteriors.test_collector_inside import Training
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
for dtype in (None, torch.float8_e4m3fn, torch.int8):
    training = Training(deviation_dtype=dtype)
    if rank == 1:
        training.swag.update_parameters(training.net)  # its own count: nothing may overwrite it
    wrapped = DistributedDataParallel(training, broadcast_buffers=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    for step in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        training.swag.update_parameters(wrapped.module.net)
    assert training.swag.n_averaged == 4 + rank, training.swag.n_averaged
    assert not any(name.startswith("swag") for name, _ in wrapped.module.named_buffers())
    training.swag.posterior().sample(2)
    again = Training(deviation_dtype=dtype)
    again.load_state_dict({k.removeprefix("module."): v for k, v in wrapped.state_dict().items()})
    assert again.swag.n_averaged == 4 + rank
if rank == 0:
    print("left alone")
dist.barrier()
dist.destroy_process_group()
"""


def test_distributed_data_parallel_leaves_it_alone(tmp_path: Path) -> None:
    assert "left alone" in in_two_processes(DATA_PARALLEL, tmp_path)


def test_accelerate_prepares_a_module_with_a_collector() -> None:
    accelerate = pytest.importorskip("accelerate")
    training = Training()
    training.step(0)
    before = state(training.swag)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(training)
    prepared(torch.randn(4, 3)).sum()
    assert_same(accelerator.unwrap_model(prepared).swag.state_dict(), before)
    accelerator.unwrap_model(prepared).step(1)
    assert training.swag.n_averaged == 2
