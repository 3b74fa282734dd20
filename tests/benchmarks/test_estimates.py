"""`estimate_memory` against peaks measured in processes of their own, well above the 16 MiB it may be off by."""

import pytest
import torch

from benchmarks import peers
from benchmarks.measure import REGISTRY, measure_memory
from benchmarks.memory import in_own_process
from benchmarks.problems import Size, model_numel
from benchmarks.suite import _estimate

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "size"),
    [
        ("sample_30", Size(2_000_000, 4)),
        ("principal_components", Size(3_000_000, 6)),
        ("log_prob_backward", Size(1_500_000, 20)),
        ("sum_solve", Size(1_500_000, 20)),
        ("indexed_solve", Size(2_000_000, 20)),
        ("marginal", Size(2_000_000, 20)),
        ("load", Size(2_000_000, 10)),
        ("logdet", Size(2_000_000, 20)),
        ("state", Size(model_numel("330-tensors"), 20, model="330-tensors")),
    ],
)
def test_estimate_is_within_five_percent_and_16_mib(operation: str, size: Size) -> None:
    case = {"operation": operation, "contender": peers.OURS, "size": size}
    measured = in_own_process(measure_memory, case, device=CPU, timeout_s=120)
    assert measured["status"] == "ok", measured["reason"]
    options = REGISTRY[operation].estimate
    assert options is not None
    estimate = _estimate(options(size), size, measured["above_inputs"])
    assert estimate["within"], f"{estimate['above_inputs']:,} estimated, {measured['above_inputs']:,} measured"


def test_an_estimate_that_is_off_is_found_out() -> None:
    size = Size(2_000_000, 20)
    exact = _estimate({"operation": "sample", "samples": 30}, size, None)["above_inputs"]
    for factor, within in ((1.0, True), (1.1, True), (1.2, False), (0.8, False)):  # 5 % + 7 % (16 MiB of 240 MB)
        assert _estimate({"operation": "sample", "samples": 30}, size, int(factor * exact))["within"] is within
