"""Measured peaks of resident memory: no step makes a second D x K tensor."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.storage import load_posterior
from lowrank_bdl.posteriors.swag import SWAG

D, K = 4_000_000, 8
VECTOR = 4 * D  # 16 MB
SLACK = 6 * 2**20  # chunks and the allocator's own


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    pytest.skip(f"the system does not report {field}")


def peak(step):
    """Bytes of resident memory that a step needed at once, beyond what was there."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    except OSError:
        pytest.skip("the system does not let a process restart its memory high-water mark")
    before = resident("VmRSS")
    result = step()
    return resident("VmHWM") - before, result


def collector(width, stored):
    model = nn.Linear(width, 1000, bias=False)
    swag = SWAG(model, K, deviation_dtype=stored)
    for i in range(K + 2):
        with torch.no_grad():
            model.weight.fill_(float(i))
        swag.update_parameters(model)
    return model, swag


def measure(width, stored, path):
    """Peaks of every step of a posterior's life for ``1000 * width`` weights."""
    model, swag = collector(width, stored)
    peaks = {"update": peak(lambda: swag.update_parameters(model))[0]}
    peaks["posterior"], posterior = peak(swag.posterior)
    peaks["sample"], draw = peak(lambda: posterior.sample(1))
    del draw
    peaks["save"], _ = peak(lambda: posterior.save(path))
    peaks["load"], loaded = peak(lambda: GaussianPosterior.load(path))
    assert loaded.provenance == posterior.provenance
    return peaks


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_no_second_copy_of_the_deviations(stored, tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("peaks are read from /proc")
    measure(1, stored, tmp_path / "p.safetensors")  # loads libraries and thread pools
    peaks = measure(D // 1000, stored, tmp_path / "p.safetensors")
    storage = K * D * stored.itemsize
    allowed = {"update": VECTOR, "posterior": 2 * VECTOR, "sample": VECTOR, "save": 0, "load": storage + 2 * VECTOR}
    for step, most in allowed.items():
        assert peaks[step] <= most + SLACK, (
            f"{step}: {peaks[step] / 2**20:.1f} MiB, at most {most / 2**20:.1f} expected"
        )
    assert storage > VECTOR + SLACK  # hence none of these limits would hide a second copy


def test_blockwise_posterior_copies_no_deviations(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("peaks are read from /proc")
    limits = {"posterior": 2 * VECTOR, "sample": 2 * VECTOR, "save": 0, "load": K * VECTOR + 2 * VECTOR}

    def measure_blocks(width):
        model = nn.Sequential(*(nn.Linear(width, 500, bias=False) for _ in range(4)))
        swag = SWAG(model, K)
        for i in range(K + 2):
            with torch.no_grad():
                for layer in model:
                    layer.weight.fill_(float(i))
            swag.update_parameters(model)
        peaks = {}
        peaks["posterior"], posterior = peak(lambda: swag.posterior(blockwise=True))
        peaks["sample"], draw = peak(lambda: posterior.sample(1))
        del draw
        peaks["save"], _ = peak(lambda: posterior.save(tmp_path / "p.safetensors"))
        peaks["load"], loaded = peak(lambda: load_posterior(tmp_path / "p.safetensors"))
        assert len(loaded.blocks) == 4 and loaded.mean.numel() == 2000 * width
        return peaks

    measure_blocks(1)
    peaks = measure_blocks(D // 2000)
    for step, most in limits.items():
        assert peaks[step] <= most + SLACK, (
            f"{step}: {peaks[step] / 2**20:.1f} MiB, at most {most / 2**20:.1f} expected"
        )
