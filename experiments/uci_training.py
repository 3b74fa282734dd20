"""Many small regression networks trained side by side: every candidate of a search, on every fold, in one loop.

A step of a network of 50 hidden units costs more to start than to compute, so that fifty of them together cost little
more than two; each sees its own rows, has its own rate and weight decay, and nothing of the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from lowrank_bdl.training.schedules import SWAGLR

TOO_LARGE = 1e6  # a weight beyond is of a network that diverged
MOST_WEIGHTS = 4_000_000  # in all networks that train side by side; memory is that of as many, 23 times


@dataclass(frozen=True)
class Candidate:
    """What is chosen for the networks.

    Attributes:
        lr: Learning rate to begin with.
        wd: Weight decay.
        swag_lr: Rate of the epochs whose weights are collected.
    """

    lr: float
    wd: float
    swag_lr: float


@dataclass(frozen=True)
class Recipe:
    """What all networks of a stack share.

    Attributes:
        epochs: Passes over the rows.
        batch_size: Rows in a batch of the largest set; smaller sets have as many batches.
        momentum: Of SGD.
        swag_start: Epochs before the first snapshot; one is taken after each epoch from there on.
        max_num_models: Deviations kept.
        clip: Largest norm of a network's gradient.
        double_bias_lr: Twice the rate for biases.
    """

    epochs: int
    batch_size: int
    momentum: float
    swag_start: int
    max_num_models: int
    clip: float
    double_bias_lr: bool


class Stack(nn.Module):
    """The weights of M networks of one architecture, and their outputs for M batches.

    Args:
        net: A ``RegNet``.
        thetas: Weights of each, shape (M, D).
    """

    def __init__(self, net: nn.Module, thetas: Tensor) -> None:
        super().__init__()
        self.thetas = nn.Parameter(thetas)
        self._layout = lb.ParameterLayout.from_module(net)
        self._linear = [name for name, module in net.named_children() if isinstance(module, nn.Linear)]
        self._per_input = net.get_submodule("var_split").per_input

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and variances (M, B) of inputs (M, B, p)."""
        parts = self._layout.unflatten(self.thetas)
        hidden = inputs
        for number, name in enumerate(self._linear):
            hidden = hidden.relu() if number else hidden
            hidden = torch.baddbmm(parts[f"{name}.bias"].unsqueeze(1), hidden, parts[f"{name}.weight"].mT)
        variance = nn.functional.softplus(parts["var_split.var"])
        if self._per_input:
            variance = variance + nn.functional.softplus(hidden[..., 1])
        return hidden[..., 0], variance.expand_as(hidden[..., 0])


@dataclass(frozen=True)
class Network:
    """One trained network; ``swag`` is None if it diverged.

    Attributes:
        last: Last iterate, (D,).
        swag: Its snapshots.
    """

    last: Tensor
    swag: "lb.SWAG | None"


def batches_of(row_sets: Sequence[Tensor], batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Part each set of rows at random into the same number of batches.

    Returns:
        Rows and weights, both (batches, sets, B): the weights of a batch sum to 1, rows that pad it have none.
    """
    number = -(-max(map(len, row_sets)) // batch_size)
    width = -(-max(map(len, row_sets)) // number)
    rows = torch.zeros(number, len(row_sets), width, dtype=torch.int64)
    weights = torch.zeros(number, len(row_sets), width)
    for place, own in enumerate(row_sets):
        for batch, part in enumerate(own[torch.randperm(len(own), generator=generator)].tensor_split(number)):
            rows[batch, place, : len(part)] = part
            weights[batch, place, : len(part)] = 1 / max(1, len(part))
    return rows, weights


def initial_weights(net: nn.Module, count: int, seed: int) -> Tensor:
    """Return what fresh networks start from, (count, D); the given one is set anew."""
    layout, found = lb.ParameterLayout.from_module(net), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(count):
            for module in net.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
            found.append(layout.flatten(net))
    return torch.stack(found)


def train(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    row_sets: Sequence[Tensor],
    candidates: Sequence[Candidate],
    recipe: Recipe,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> list[list[Network]]:
    """Train one network for every candidate on every set of rows.

    Networks on the same rows start from the same weights and see the same batches, whatever the candidate.

    Args:
        net: A ``RegNet`` on the CPU; its weights are drawn anew.
        x: Features, (n, p), float32.
        y: Targets, (n, 1).
        row_sets: Rows that each network of a candidate trains on.
        candidates: Rates and weight decays.
        recipe: What they share.
        seed: Of initial weights and batches.
        progress: Called after each epoch of each group of candidates; see `num_groups`.

    Returns:
        For each candidate its networks, in the order of ``row_sets``.
    """
    size = _group_size(net, len(row_sets))
    found = []
    for start in range(0, len(candidates), size):
        found += _train_group(net, x, y, row_sets, candidates[start : start + size], recipe, seed, progress)
    return found


def num_groups(net: nn.Module, num_sets: int, num_candidates: int) -> int:
    """Return how many loops over the epochs `train` needs."""
    return -(-num_candidates // _group_size(net, num_sets))


def _group_size(net: nn.Module, num_sets: int) -> int:
    return max(1, MOST_WEIGHTS // (num_sets * sum(p.numel() for p in net.parameters())))


def _train_group(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    row_sets: Sequence[Tensor],
    candidates: Sequence[Candidate],
    recipe: Recipe,
    seed: int,
    progress: Callable[[], object],
) -> list[list[Network]]:
    layout, sets = lb.ParameterLayout.from_module(net), len(row_sets)
    stack = Stack(net, initial_weights(net, sets, seed).repeat(len(candidates), 1))
    thetas = stack.thetas
    lr, wd, swag_lr = (
        torch.tensor([getattr(c, name) for c in candidates]).repeat_interleave(sets).unsqueeze(1)
        for name in ("lr", "wd", "swag_lr")
    )
    faster = 2.0 if recipe.double_bias_lr else 1.0
    multiples = torch.ones(layout.numel)
    for name, part in layout.slices.items():
        multiples[part] = faster if name.endswith("bias") else 1.0
    schedule = SWAGLR(_unit_rate(), swa_lr=0.0, horizon=recipe.swag_start)
    swag, velocity = lb.SWAG(stack, recipe.max_num_models), torch.zeros_like(thetas)
    diverged = torch.zeros(len(thetas), 1, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(recipe.epochs):
        rate = torch.lerp(swag_lr, lr, schedule.rate(epoch, 1.0)) * multiples
        for rows, weights in zip(*batches_of(row_sets, recipe.batch_size, generator), strict=True):
            inputs, targets, shares = (
                part.repeat(len(candidates), *[1] * (part.ndim - 1)) for part in (x[rows], y[rows, 0], weights)
            )
            mean, variance = stack(inputs)
            loss = 0.5 * ((variance.log() + (targets - mean).square() / variance) * shares).sum()
            (gradient,) = torch.autograd.grad(loss, thetas)
            with torch.no_grad():
                gradient *= (recipe.clip / gradient.norm(dim=1, keepdim=True)).clamp(max=1.0)
                velocity.mul_(recipe.momentum).add_(gradient).addcmul_(wd, thetas)
                thetas.addcmul_(rate, velocity, value=-1)
        with torch.no_grad():
            lost = ~(thetas.abs().amax(1, keepdim=True) < TOO_LARGE)  # true of NaN too
            diverged |= lost
            thetas.masked_fill_(lost, 0.0)
            velocity.masked_fill_(lost, 0.0)
        if epoch >= recipe.swag_start:
            swag.update_parameters(stack)
        progress()
    collectors = [None if lost else _own(swag, net, row, len(thetas)) for row, lost in enumerate(diverged.flatten())]
    found = [Network(theta, collector) for theta, collector in zip(thetas.detach(), collectors, strict=True)]
    return [found[start : start + sets] for start in range(0, len(found), sets)]


def _unit_rate() -> torch.optim.Optimizer:
    """A schedule needs an optimizer; the networks' rates are multiples of this one's."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def _own(swag: lb.SWAG, net: nn.Module, row: int, count: int) -> lb.SWAG:
    """Return the collector of one network: its part of every tensor of the stack's."""
    own = lb.SWAG(net, swag.rank)
    state, size = own.state_dict(), own.layout.numel
    for name, value in swag.state_dict().items():
        if name != "layout_digest":
            parted = value.ndim and value.shape[-1] == count * size
            state[name] = value[..., row * size : (row + 1) * size] if parted else value
    own.load_state_dict(state)
    return own
