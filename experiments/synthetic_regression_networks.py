"""Several networks of one architecture at once, and training them: SGD, SWAG's snapshots, a curve between two."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.synthetic_regression_settings import Settings
from experiments.uci_training import initial_weights
from lowrank_bdl.models.mlp import MLP

FILE, SWAG_FILE = "networks.safetensors", "swag.safetensors"


def make_net(hidden: tuple[int, ...]) -> MLP:
    return MLP(1, in_features=2, hidden=hidden)


def evaluate(layout: lb.ParameterLayout, thetas: Tensor, inputs: Tensor) -> Tensor:
    """Return the outputs of perceptrons at inputs, without the cost of calling a module for each.

    Args:
        layout: Of an `MLP` with one output.
        thetas: Shape (S, D).
        inputs: Shape (N, p), or (S, N, p).

    Returns:
        Shape (S, N), differentiable in the weights.
    """
    parts = list(layout.unflatten(thetas).values())
    hidden = inputs if inputs.ndim == 3 else inputs.expand(len(thetas), *inputs.shape)
    for number, (weight, bias) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        hidden = torch.baddbmm(bias.unsqueeze(1), hidden.relu() if number else hidden, weight.mT)
    return hidden[..., 0]


@dataclass(frozen=True)
class Networks:
    """What the methods of the first part start from.

    Attributes:
        layout: Of the network's D weights.
        solutions: Last iterates of two runs of SGD, (2, D).
        bend: Middle point of the Bezier curve between them, (D,).
        swag: Gaussian of the first run's snapshots.
    """

    layout: lb.ParameterLayout
    solutions: Tensor
    bend: Tensor
    swag: lb.GaussianPosterior

    def save(self, folder: Path, digest: str) -> None:
        thetas = torch.cat([self.solutions, self.bend.unsqueeze(0)])
        self.swag.save(folder / SWAG_FILE)
        lb.EmpiricalPosterior(thetas, self.layout, {"recipe": digest}).save(folder / FILE)

    @classmethod
    def load(cls, folder: Path, layout: lb.ParameterLayout, digest: str) -> "Networks | None":
        """Return what an earlier part of a run trained; None if it did not come so far, or by another recipe.

        Raises:
            CheckpointError: If a file is damaged.
        """
        if not (folder / FILE).exists() or not (folder / SWAG_FILE).exists():
            return None
        kept = lb.EmpiricalPosterior.load(folder / FILE, layout)
        if kept.provenance.get("recipe") != digest:
            return None
        thetas = kept.members()
        return cls(layout, thetas[:2], thetas[2], lb.GaussianPosterior.load(folder / SWAG_FILE, layout))


def num_epochs(settings: Settings) -> int:
    return settings.epochs + settings.curve_epochs


def train(
    settings: Settings, net: nn.Module, inputs: Tensor, targets: Tensor, progress: Callable[[], object] = lambda: None
) -> Networks:
    """Train two networks by SGD side by side, take SWAG's snapshots of the first, then bend a curve between them.

    Args:
        settings: Of the run.
        net: The architecture.
        inputs: Shape (N, p).
        targets: Shape (N,), in the inputs' dtype.
        progress: Called after each epoch.

    Raises:
        NonFiniteError: If a network diverges.
    """
    layout = lb.ParameterLayout.from_module(net)
    thetas = nn.Parameter(initial_weights(net, 2, settings.seed))
    optimizer = torch.optim.SGD([thetas], settings.lr_init, settings.momentum, weight_decay=settings.wd)
    swag = lb.SWAG(net, settings.max_num_models)
    generator = torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        orders = torch.stack([torch.randperm(len(inputs), generator=generator) for _ in range(2)])
        for rows in orders.split(settings.batch_size, dim=1):
            outputs = evaluate(layout, thetas, inputs[rows])
            optimizer.zero_grad()
            (outputs - targets[rows]).square().mean(1).sum().backward()  # a sum: neither feels the other
            optimizer.step()
        if epoch >= settings.swag_start:
            layout.assign_(net, thetas[0].detach())
            swag.update_parameters(net)
        progress()
    solutions = thetas.detach()
    if not bool(solutions.isfinite().all()):
        raise lb.NonFiniteError(f"SGD diverged; expected finite weights after {settings.epochs} epochs: a smaller lr?")
    bend = train_curve(settings, layout, solutions, inputs, targets, generator, progress)
    return Networks(layout, solutions, bend, swag.posterior(scale=settings.scale))


def train_curve(
    settings: Settings,
    layout: lb.ParameterLayout,
    ends: Tensor,
    inputs: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    r"""Return the middle control point of a quadratic Bezier curve of low loss between two solutions.

    It minimises the loss at :math:`(1-t)^2 w_0 + 2 t (1-t) w_1 + t^2 w_2` for t uniform in [0, 1], one t a batch;
    Garipov et al. (2018).
    """
    bend = nn.Parameter(ends.mean(0))
    optimizer = torch.optim.Adam([bend], settings.curve_lr)
    for _ in range(settings.curve_epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for rows in order.split(settings.batch_size):
            t = torch.rand((), generator=generator)
            theta = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t**2 * ends[1]
            optimizer.zero_grad()
            (evaluate(layout, theta.unsqueeze(0), inputs[rows])[0] - targets[rows]).square().mean().backward()
            optimizer.step()
        progress()
    if not bool(bend.isfinite().all()):
        raise lb.NonFiniteError("the curve's middle point diverged; expected finite weights: a smaller curve_lr?")
    return bend.detach()


def curve_losses(networks: Networks, inputs: Tensor, targets: Tensor, points: int = 11) -> dict[str, list[float]]:
    """Return the training loss along the curve, and along the straight line between its ends."""
    t = torch.linspace(0, 1, points).unsqueeze(1)
    first, last = networks.solutions
    straight = (1 - t) * first + t * last
    curve = (1 - t) ** 2 * first + 2 * t * (1 - t) * networks.bend + t**2 * last
    found = {}
    for name, thetas in {"curve": curve, "line": straight}.items():
        losses = (evaluate(networks.layout, thetas, inputs) - targets).square().mean(1)
        found[name] = losses.tolist()
    return found


def prior_stddevs(net: nn.Module, prior_std: float) -> Tensor:
    """Return the prior's standard deviation of every weight, (D,), float64: biases' s, and s / sqrt(inputs)."""
    scales = [
        torch.full((p.numel(),), prior_std / (p.shape[1] ** 0.5 if p.ndim == 2 else 1.0), dtype=torch.float64)
        for p in net.parameters()
    ]
    return torch.cat(scales)
