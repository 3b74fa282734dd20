"""Patches: against a loop over them; void pixels, borders, refusals."""

import math

import pytest
import torch

from lowrank_bdl.errors import LowRankBDLError, ShapeError
from lowrank_bdl.prediction.patch_uncertainty import PatchUncertainty

VOID = 7


@pytest.mark.parametrize("size", [1, 3, 4])
def test_agrees_with_a_loop_over_patches(size: int, generator: torch.Generator) -> None:
    """7 x 10 pixels: no patch size divides both, so that patches are cut off at the borders."""
    probs = (2 * torch.randn(3, 7, 10, 5, generator=generator)).softmax(-1)
    targets = torch.randint(5, (3, 7, 10), generator=generator)
    targets = torch.where(torch.rand(3, 7, 10, generator=generator) < 0.6, probs.argmax(-1), targets)
    targets[torch.rand(3, 7, 10, generator=generator) < 0.2] = VOID
    targets[1, :4, :4] = VOID
    found = PatchUncertainty(5, patch_size=size, num_thresholds=11, ignore_index=VOID)
    found.update(probs[:1], targets[:1])
    found.update(probs[1:], targets[1:])
    entropy = -(probs.double() * probs.double().log()).sum(-1) / math.log(5)
    patches = []
    for image in range(3):
        for top in range(0, 7, size):
            for left in range(0, 10, size):
                part = (image, slice(top, top + size), slice(left, left + size))
                used = targets[part] != VOID
                if used.any():
                    right = (probs.argmax(-1)[part] == targets[part])[used].double().mean().item()
                    patches.append((right > 0.5, entropy[part][used].mean().item()))
    assert found.num_patches == len(patches)
    curve = found.curve
    for i, threshold in enumerate(torch.linspace(0, 1, 11, dtype=torch.float64).tolist()):
        certain = [accurate for accurate, doubt in patches if doubt <= threshold]
        wrong = [doubt > threshold for accurate, doubt in patches if not accurate]
        agree = [accurate == (doubt <= threshold) for accurate, doubt in patches]
        assert curve.thresholds[i] == threshold
        assert curve.pavpu[i].item() == pytest.approx(sum(agree) / len(agree), rel=1e-12)
        assert curve.uncertain_if_inaccurate[i].item() == pytest.approx(sum(wrong) / len(wrong), rel=1e-12)
        expected = sum(certain) / len(certain) if certain else math.nan
        assert curve.accurate_if_certain[i].item() == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_half_of_the_pixels_is_not_enough_and_full_doubt_is_no_more_than_one() -> None:
    probs = torch.full((1, 1, 2, 3), 1 / 3)
    probs[0, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    found = PatchUncertainty(3, patch_size=2, num_thresholds=2)
    found.update(probs, torch.tensor([[[0, 1]]]))
    assert found.curve.pavpu.tolist() == [1.0, 0.0]  # inaccurate; uncertain at 0, certain at 1
    full = PatchUncertainty(3, patch_size=1, num_thresholds=2)
    full.update(probs[:, :, 1:], torch.tensor([[[1]]]))
    assert full.curve.uncertain_if_inaccurate.tolist() == [1.0, 0.0]


def test_refuses(generator: torch.Generator) -> None:
    probs = torch.rand(2, 4, 4, 3, generator=generator).softmax(-1)
    found = PatchUncertainty(3, ignore_index=VOID)
    found.update(probs, torch.full((2, 4, 4), VOID))
    with pytest.raises(LowRankBDLError, match="no patch with a target yet"):
        _ = found.curve
    with pytest.raises(ShapeError, match=r"shape \(N, H, W, C\); got \(2, 4, 4\)"):
        found.update(probs[..., 0], torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"targets must be in \[0, 3\); got values from 3 to 3"):
        found.update(probs, torch.full((2, 4, 4), 3))
    with pytest.raises(ValueError, match="patch_size must be at least 1; got 0"):
        PatchUncertainty(3, patch_size=0)
