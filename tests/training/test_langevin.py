"""Samplers against the exact law of their own recursion on a quadratic: the whole covariance, at a stated alarm rate.

On the loss θ'Hθ / 2 one step is linear, z ← A z + N(0, Q), so the covariance after n steps from a point is known in
closed form, and its limit solves C = A C A' + Q. One parameter of shape (chains, 2) is as many independent chains.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_bdl.training import losses
from lowrank_bdl.training.langevin import SGHMC, SGLD
from lowrank_bdl.training.trainer import Trainer
from tests.statistical import assert_gaussian

H = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
EYE, ZERO = torch.eye(2).double(), torch.zeros(2, 2).double()
NUM_DATA, TEMPERATURE, DECAY, LR, BETA = 40, 1.7, 0.3, 0.2, 0.6


def recursion(name: str, lr: float = LR) -> tuple[Tensor, Tensor]:
    """A and Q of one step; of SGHMC those of (θ, v)."""
    curvature, noise = lr * (H + DECAY * EYE), 2 * lr * TEMPERATURE / NUM_DATA * EYE
    if name == "SGLD":
        return EYE - curvature, noise
    noise = (1 - BETA) * noise
    a = torch.cat([torch.cat([EYE - curvature, BETA * EYE], 1), torch.cat([-curvature, BETA * EYE], 1)])
    return a, torch.cat([torch.cat([noise, noise], 1), torch.cat([noise, noise], 1)])


def stationary(name: str, lr: float = LR) -> Tensor:
    """Solve C = A C A' + Q."""
    a, q = recursion(name, lr)
    system = torch.eye(len(a) ** 2).double() - torch.kron(a, a)
    return torch.linalg.solve(system, q.reshape(-1)).reshape(a.shape)


def make(name: str, theta: Tensor, generator: torch.Generator | None, **changes: Any) -> SGLD | SGHMC:
    options: dict[str, Any] = dict(
        lr=LR, num_data=NUM_DATA, temperature=TEMPERATURE, weight_decay=DECAY, generator=generator
    )
    if name == "SGHMC":
        options["momentum"] = BETA
    return {"SGLD": SGLD, "SGHMC": SGHMC}[name]([theta], **{**options, **changes})


def steps(optimizer: SGLD | SGHMC, theta: Tensor, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        ((theta @ H) * theta).sum().div(2).backward()
        optimizer.step()


def chains(name: str, generator: torch.Generator, count: int, **changes: Any) -> tuple[Tensor, Tensor]:
    """Draws (4000, 2) or, with velocities, (4000, 4) after some steps from the mode, and A^n to tell how far it is."""
    theta = torch.zeros(4000, 2, dtype=torch.float64, requires_grad=True)
    optimizer = make(name, theta, generator, **changes)
    steps(optimizer, theta, count)
    draws = theta.detach()
    if name == "SGHMC":
        draws = torch.cat([draws, optimizer.state[theta]["velocity"]], 1)
    return draws, torch.linalg.matrix_power(recursion(name)[0], count)


@pytest.mark.parametrize("name", ["SGLD", "SGHMC"])
def test_the_stationary_covariance_is_that_of_the_recursion(name: str, generator: torch.Generator) -> None:
    draws, left = chains(name, generator, 100)
    assert left.abs().max() < 1e-6  # the start is forgotten
    assert_gaussian(draws, torch.zeros(draws.shape[1]).double(), stationary(name))


@pytest.mark.parametrize(
    "name,wrong",
    [
        *(pytest.param(name, wrong, id=f"{name}-{next(iter(wrong))}") for name in ("SGLD", "SGHMC")
          for wrong in ({"num_data": 48}, {"temperature": 1.4}, {"weight_decay": 0.5})),
        pytest.param("SGHMC", {"lr": 0.24}, id="SGHMC-lr"),
        pytest.param("SGHMC", {"momentum": 0.9}, id="SGHMC-momentum"),
    ],
)  # fmt: skip
def test_the_test_has_power(name: str, wrong: dict[str, Any], generator: torch.Generator) -> None:
    """A noise factor (or target) off by a fifth, or another friction, is seen."""
    draws, _ = chains(name, generator, 100, **wrong)
    with pytest.raises(AssertionError, match="covariance: .* outside"):
        assert_gaussian(draws, torch.zeros(draws.shape[1]).double(), stationary(name))


@pytest.mark.parametrize("name", ["SGLD", "SGHMC"])
def test_the_target_is_the_tempered_posterior_as_the_step_goes_to_zero(name: str) -> None:
    """Of the recursion itself, which the draws were compared with: its bias is proportional to the step."""
    target = torch.linalg.inv(H + DECAY * EYE) * TEMPERATURE / NUM_DATA
    bias = [(stationary(name, lr)[:2, :2] / target - 1).abs().max().item() for lr in (1e-2, 1e-3, 1e-4)]
    assert bias[2] < 2e-4 and bias[0] < 2e-2
    assert bias[0] / bias[1] == pytest.approx(10, rel=0.1) and bias[1] / bias[2] == pytest.approx(10, rel=0.1)


def test_without_momentum_sghmc_is_sgld() -> None:
    found = []
    for name, changes in (("SGLD", {}), ("SGHMC", {"momentum": 0.0})):
        theta = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
        steps(make(name, theta, torch.Generator().manual_seed(3), **changes), theta, 7)
        found.append(theta.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["SGLD", "SGHMC"])
def test_at_temperature_zero_it_is_sgd(name: str) -> None:
    ours, theirs = (torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True) for _ in range(2))
    cold = make(name, ours, torch.Generator(), temperature=0.0)
    before = cold.generator.get_state()
    momentum = BETA if name == "SGHMC" else 0.0
    sgd = torch.optim.SGD([theirs], lr=LR, momentum=momentum, weight_decay=DECAY)
    steps(cold, ours, 9)
    steps(sgd, theirs, 9)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert torch.equal(cold.generator.get_state(), before)


def test_groups_have_their_own_values_and_gradients_stay_as_they_are() -> None:
    fast, slow, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
    sgld = SGLD([{"params": [fast], "lr": 0.5, "weight_decay": 1.0}, {"params": [slow, unused]}], 0.1, num_data=10**12)
    (fast.sum() + slow.sum()).backward()
    sgld.step()
    assert torch.equal(fast.grad, torch.ones(2)) and torch.equal(unused, torch.ones(2))
    torch.testing.assert_close(fast.detach(), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(slow.detach(), torch.full((2,), 0.9), rtol=0, atol=1e-4)


def test_a_closure_is_evaluated_and_its_loss_returned() -> None:
    theta = torch.tensor([3.0], requires_grad=True)
    sgld = SGLD([theta], 0.5, num_data=1, temperature=0.0)

    def closure() -> float:
        sgld.zero_grad()
        loss = theta.square().sum() / 2
        loss.backward()
        return loss.item()

    assert sgld.step(closure) == 4.5 and theta.item() == 1.5


def test_the_noise_comes_from_the_generator_alone_or_from_the_global_one() -> None:
    def noise(generator: torch.Generator | None) -> Tensor:
        theta = torch.zeros(5, requires_grad=True)
        steps_of = SGLD([theta], 0.1, num_data=1, generator=generator)
        theta.grad = torch.zeros(5)
        steps_of.step()
        return theta.detach()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = noise(torch.Generator().manual_seed(1))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(noise(torch.Generator().manual_seed(1)), first)
        whole = [noise(None), noise(None)]
        torch.manual_seed(0)
        assert torch.equal(noise(None), whole[0]) and not torch.equal(whole[0], whole[1])


# ---- training --------------------------------------------------------------------------------------------------------


def trainer(name: str, own_generator: bool, lr: float = 0.05) -> Trainer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(5) if own_generator else None
    kind = {"SGLD": SGLD, "SGHMC": SGHMC}[name]
    optimizer = kind(net.parameters(), lr, num_data=20, weight_decay=1e-2, generator=generator)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return Trainer(net, optimizer, losses.cross_entropy, schedule=schedule)


def batches(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    return [(x[part], (x[part, 0] > 0).long()) for part in torch.randperm(20, generator=generator).split(8)]


@pytest.mark.parametrize("own_generator", [False, True], ids=["global", "own"])
@pytest.mark.parametrize("name", ["SGLD", "SGHMC"])
def test_a_resumed_chain_is_the_whole_one(name: str, own_generator: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with torch.random.fork_rng():
        whole = trainer(name, own_generator)
        whole.fit(batches, 5, progress=False)
        half = trainer(name, own_generator)
        half.fit(batches, 3, checkpoint=path, progress=False)
        torch.manual_seed(99)
        resumed = trainer(name, own_generator)
        resumed.load(path)
        resumed.fit(batches, 5, progress=False)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    assert not torch.equal(half.model[0].weight, whole.model[0].weight) and resumed.history == whole.history


def test_a_state_without_the_generator_is_refused() -> None:
    with torch.random.fork_rng():
        own, other = trainer("SGLD", True).optimizer, trainer("SGLD", False).optimizer
    with pytest.raises(ValueError, match="the state has a generator of its own and the optimizer has not"):
        other.load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match="the optimizer has a generator of its own and the state has not"):
        own.load_state_dict(other.state_dict())


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"lr": -0.1}, "lr must be at least 0 and finite; got -0.1"),
        ({"lr": float("nan")}, "lr must be at least 0 and finite; got nan"),
        ({"num_data": 0}, "num_data must be at least 1; got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite; got -1.0"),
        ({"temperature": float("inf")}, "temperature must be at least 0 and finite; got inf"),
        ({"weight_decay": -1e-4}, "weight_decay must be at least 0 and finite; got -0.0001"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\); got 1.0"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    theta = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        make("SGHMC", theta, None, **changes)
    sghmc = make("SGHMC", theta, None)
    with pytest.raises(ValueError, match=message):
        sghmc.add_param_group({"params": [torch.zeros(1, requires_grad=True)], **changes})
    assert len(sghmc.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="SGLD needs dense gradients; got a sparse one"):
        SGLD(table.parameters(), 0.1, num_data=1).step()
