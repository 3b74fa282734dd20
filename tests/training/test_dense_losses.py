"""Losses of labelled positions: against torch's own, by hand, and where there is no label at all."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.noisy_logits import noisy_log_probs
from lowrank_bdl.training.dense_losses import AleatoricCrossEntropy, DenseCrossEntropy, labelled_accuracy

VOID = 11


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Outputs (N, 2, C, H, W) of which the first are logits, and targets some of which are void."""
    outputs = torch.randn(2, 2, 4, 3, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (2, 3, 5), generator=generator)
    targets[:, 0] = VOID
    return outputs, targets


@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_torch_where_there_are_labels(batch: tuple[Tensor, Tensor], weighted: bool) -> None:
    logits, targets = batch[0][:, 0], batch[1]
    weight = torch.tensor([0.5, 1.0, 2.0, 8.0]) if weighted else None
    loss, output = DenseCrossEntropy(VOID, weight)(nn.Identity(), logits, targets)
    expected = functional.cross_entropy(logits, targets, None if weight is None else weight.double(), ignore_index=VOID)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert output is logits
    half = DenseCrossEntropy(VOID)(nn.Identity(), logits.bfloat16(), targets)[0]
    assert half.dtype == torch.float32


@pytest.mark.parametrize("loss", [DenseCrossEntropy(VOID), AleatoricCrossEntropy(3, VOID)])
def test_no_label_no_loss_and_no_gradient(loss: DenseCrossEntropy | AleatoricCrossEntropy) -> None:
    shape = (1, 2, 4, 3, 3) if isinstance(loss, AleatoricCrossEntropy) else (1, 4, 3, 3)
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value, _ = loss(nn.Identity(), outputs, torch.full((1, 3, 3), VOID))
    value.backward()
    assert value.item() == 0 and outputs.grad is not None and not outputs.grad.any()


def test_the_aleatoric_loss_is_minus_the_logarithm_of_the_average_probability(batch: tuple[Tensor, Tensor]) -> None:
    outputs, targets = batch
    weight = torch.tensor([0.5, 1.0, 2.0, 8.0], dtype=torch.float64)
    loss = AleatoricCrossEntropy(6, VOID, weight, torch.Generator().manual_seed(4))
    value, output = loss(nn.Identity(), outputs, targets)
    noise = torch.randn(6, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    average = (outputs[:, 0] + functional.softplus(outputs[:, 1]) * noise).softmax(2).mean(0)
    total = weights = 0.0
    for n in range(2):
        for i in range(1, 3):  # the first row has no labels
            for j in range(5):
                c = int(targets[n, i, j])
                total += weight[c].item() * -math.log(average[n, c, i, j].item())
                weights += weight[c].item()
    assert value.item() == pytest.approx(total / weights, rel=1e-12)
    torch.testing.assert_close(output, noisy_log_probs(outputs, 6, torch.Generator().manual_seed(4)))


def test_noise_is_learnt_where_the_network_is_wrong_and_unlearnt_where_it_is_right() -> None:
    """The sign that the released code had wrong: its loss falls with the noise on right answers."""
    outputs = torch.tensor([[[4.0, 0.0], [0.0, 0.0]]] * 2, dtype=torch.float64, requires_grad=True)
    loss = AleatoricCrossEntropy(20_000, generator=torch.Generator().manual_seed(0))
    loss(nn.Identity(), outputs, torch.tensor([0, 1]))[0].backward()
    assert outputs.grad is not None
    right, wrong = outputs.grad[:, 1]
    assert (right > 0).all() and (wrong < 0).all()  # gradient descent lowers the first noise and raises the second


def test_accuracy_is_of_labelled_positions(batch: tuple[Tensor, Tensor]) -> None:
    logits, targets = batch[0][:, 0], batch[1]
    labelled = targets != VOID
    expected = (logits.argmax(1)[labelled] == targets[labelled]).double().mean()
    assert labelled_accuracy(VOID)(logits, targets).item() == pytest.approx(expected.item(), rel=1e-12)
    assert labelled_accuracy(VOID)(logits, torch.full_like(targets, VOID)).item() == 0


def test_refuses() -> None:
    with pytest.raises(ValueError, match="weight must be one positive number a class; got tensor"):
        DenseCrossEntropy(VOID, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="weight must be one positive number a class"):
        AleatoricCrossEntropy(weight=torch.tensor([1.0, math.inf]))
    with pytest.raises(ValueError, match="num_draws must be at least 1; got 0"):
        AleatoricCrossEntropy(0)
    with pytest.raises(ShapeError, match=r"shape \(N, 2, C, \*positions\)"):
        AleatoricCrossEntropy(1)(nn.Identity(), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
