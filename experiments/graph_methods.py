"""What a seed of `experiments.graph` trains, and what each set of weights predicts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.evaluation import classification_metrics, has_batch_norm
from experiments.graph_data import GraphData
from experiments.plots import COLORS
from experiments.two_runs import rate_schedule, train_two
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.trainer import Trainer

if TYPE_CHECKING:
    from experiments.graph import Settings

BASELINE = "class frequencies"
EVAL_GRAPHS = 50  # in a batch of what is predicted, or of what batch norm is recalibrated on


def one_seed(settings: "Settings", data: GraphData, device: torch.device, seed: int) -> dict[str, Any]:
    """Train the two runs and measure every method; all randomness is a function of the seed."""
    decayed, averaged = train_two(
        lambda average: make_trainer(settings, data, device, seed, average=average),
        data.train.shuffled(settings.batch_size or 1),
        settings,
        f"seed {seed}",
    )
    swag = averaged.collections["swag"].collector
    assert isinstance(swag, lb.SWAG)
    layout = lb.ParameterLayout.from_module(decayed.model)
    sources = {
        settings.optimizer: layout.flatten(decayed.model),
        f"{settings.optimizer} constant": layout.flatten(averaged.model),
        "SWA": swag.mean,
        "SWAG-Diag": swag.posterior(scale=1.0, rank=0),
        "SWAG": swag.posterior(scale=settings.scale),
    }
    methods, validation, reliability = {BASELINE: frequencies(data)}, {}, {}
    for name, weights in sources.items():
        found = predict(settings, data, decayed.model, weights, seed)
        validation[name] = found.metrics("validation", seed)
        methods[name] = found.metrics("test", seed)
        if name in COLORS:
            reliability[name] = found.reliability()
    losses_at_end = {
        name: trainer.history[-1]["loss"] for name, trainer in (("decayed", decayed), ("constant", averaged))
    }
    return {
        "methods": methods,
        "validation": validation,
        "reliability": reliability,
        "train_loss": losses_at_end,
        "parameters": layout.numel,
        "snapshots": swag.n_averaged,
    }


def make_trainer(settings: "Settings", data: GraphData, device: torch.device, seed: int, *, average: bool) -> Trainer:
    """Make the run whose rate decays, or the one whose weights are collected."""
    model = new_model(settings, data, device, seed)
    common: dict[str, Any] = dict(lr=settings.lr_init, weight_decay=settings.wd)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "Adam":
        optimizer = torch.optim.Adam(model.parameters(), **common)
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=settings.momentum, **common)
    collections = {}
    if average:
        swag = lb.SWAG(model, rank=settings.max_num_models)
        collections["swag"] = Collection(swag, settings.swa_start or 0, settings.swa_c_epochs)
    schedule = rate_schedule(settings, optimizer, average=average)
    return Trainer(model, optimizer, schedule=schedule, collections=collections, seed=seed)


def new_model(settings: "Settings", data: GraphData, device: torch.device, seed: int) -> nn.Module:
    """Make the network with initial weights, and random numbers for dropout, that depend on the seed alone."""
    from experiments.graph_network import NodeClassifier

    torch.manual_seed(seed)
    options = (settings.hidden, settings.layers, settings.dropout, settings.norm)
    return NodeClassifier(data.num_features, data.num_classes, *options).to(device)


@dataclass(frozen=True)
class NodePredictions:
    """What a method says about validation and test nodes.

    Attributes:
        probabilities: Of validation nodes, then test nodes, (N, C).
        log_likelihood: Of their classes, (N,) [nats].
        targets: Their classes, (N,).
        num_validation: How many are for validation.
    """

    probabilities: Tensor
    log_likelihood: Tensor
    targets: Tensor
    num_validation: int

    def _part(self, split: str) -> slice:
        return slice(self.num_validation) if split == "validation" else slice(self.num_validation, None)

    def metrics(self, split: str, seed: int = 0) -> dict[str, float]:
        """Accuracy and ECE [%], NLL [nats] and Brier score."""
        part = self._part(split)
        found = classification_metrics(
            self.probabilities[part], self.targets[part], self.log_likelihood[part], resamples=2, seed=seed
        )
        percent = {name: 100 * found[name] for name in ("accuracy", "ece")}
        return percent | {name: found[name] for name in ("nll", "brier")}

    def reliability(self) -> list[list[float]]:
        """Mean confidence and accuracy of the test nodes in ten bins of equal mass."""
        part = self._part("test")
        curve = lb.metrics.reliability_curve(self.probabilities[part], self.targets[part], 10, "mass")
        return [curve.confidence.tolist(), curve.accuracy.tolist()]


def predict(settings: "Settings", data: GraphData, model: nn.Module, weights: Any, seed: int) -> NodePredictions:
    """Average over a posterior, or take one weight vector (D,); batch norm is recalibrated on the training graphs."""
    found = lb.predict(
        model,
        weights,
        data.held_out.batches(EVAL_GRAPHS),
        num_samples=settings.num_samples,
        bn_loader=data.train.batches(EVAL_GRAPHS) if has_batch_norm(model) else None,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    assert found.targets is not None
    return NodePredictions(found.mean, found.log_likelihood, found.targets, data.num_validation)


def frequencies(data: GraphData) -> dict[str, float]:
    """Give every test node the frequencies of the classes elsewhere: the training nodes alone may be balanced."""
    targets = data.held_out.labels
    known = torch.cat([data.train.labels, targets[: data.num_validation]])
    counts = torch.bincount(known, minlength=data.num_classes).double()
    probabilities = ((counts + 1) / (counts + 1).sum()).expand(len(targets), -1)
    return NodePredictions(probabilities, probabilities[0].log()[targets], targets, data.num_validation).metrics("test")
