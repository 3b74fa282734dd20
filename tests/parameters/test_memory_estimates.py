"""The closed forms agree with the sizes of real tensors, and count weights as a layout does."""

import pytest
import torch
from torch import nn

from lowrank_bdl.linalg.ring_buffer import DeviationBuffer
from lowrank_bdl.parameters.memory_estimates import OPERATIONS, MemoryEstimate, estimate_memory


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("deviation_dtype", [None, torch.bfloat16, torch.float16, torch.int8])
def test_state_is_what_the_buffers_hold(rank: int, deviation_dtype: torch.dtype | None) -> None:
    numel = 10_000
    buffer = DeviationBuffer(rank, numel, dtype=deviation_dtype or torch.float32)
    stored = buffer.storage.nbytes + (0 if buffer.scale is None else buffer.scale.nbytes)
    estimate = estimate_memory(numel, rank, "state", deviation_dtype=deviation_dtype)
    assert estimate.result == stored + 3 * numel * 4


def test_results_are_what_operations_return() -> None:
    numel, size = 1000, 8
    assert estimate_memory(numel, 5, "sample", torch.float64, samples=30).result == 30 * numel * size
    assert estimate_memory(numel, 5, "principal_components", torch.float64, samples=3).result == 3 * numel * size
    assert estimate_memory(numel, 5, "solve", torch.float64).result == numel * size
    assert estimate_memory(numel, 5, "marginal", torch.float64, fraction=0.25).result == (5 + 2) * 250 * size
    assert estimate_memory(numel, 5, "load", torch.float64).result == (5 + 2) * numel * size


def test_weights_of_a_network_are_counted_once_and_only_where_they_train() -> None:
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.BatchNorm1d(10))
    net[1].weight = net[0].weight  # tied
    net[1].bias.requires_grad_(False)  # frozen
    assert estimate_memory(net, 4, "state") == estimate_memory(100 + 10 + 20, 4, "state")


def test_peak_is_the_sum_and_is_printed_in_gib() -> None:
    estimate = MemoryEstimate(inputs=2**30, result=2**29, temporaries=2**28)
    assert estimate.peak == 2**30 + 2**29 + 2**28
    assert str(estimate) == "1.75 GiB (inputs 1.00, result 0.50, temporaries 0.25)"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_grows_with_size_and_takes_rank_zero(operation: str) -> None:
    small, large = (estimate_memory(numel, 10, operation, samples=2).peak for numel in (10**6, 10**7))
    assert small < large
    nothing = estimate_memory(10**6, 0, operation)
    assert min(nothing.inputs, nothing.result, nothing.temporaries) >= 0


def test_chunks_of_a_gpu_are_a_share_of_the_weights() -> None:
    cpu, gpu = (estimate_memory(10**8, 20, "logdet", device=device).temporaries for device in ("cpu", "cuda"))
    assert cpu < 2 * 2**20 < 10**8 * 20 * 4 // 100 < gpu < 10**8 * 20 * 4 // 5


@pytest.mark.parametrize(
    ("numel", "rank", "operation", "samples", "match"),
    [
        (10, 1, "sampel", 1, "operation must be one of state, .*; got 'sampel'"),
        (-1, 1, "sample", 1, "the number of weights must be >= 0; got -1"),
        (10, -2, "sample", 1, "rank must be >= 0; got -2"),
        (10, 1, "sample", -3, "samples must be >= 0; got -3"),
    ],
)
def test_bad_input_is_named(numel: int, rank: int, operation: str, samples: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        estimate_memory(numel, rank, operation, samples=samples)
