"""Nodes of graphs by a graph convolutional network: SGD, SWA and SWAG over seeds.

Cora and CiteSeer: papers that cite each other, one graph, 20 labelled papers a class, the public split. CLUSTER: many
small stochastic block models, drawn here as the benchmark of that name draws its own, in which every node is to be
assigned to one of six communities, and one node in each says which it is.

Every seed trains two runs that are one until epoch --swa_start: SGD (or Adam), whose rate then decays to 1 %, and a run
at the constant rate --swa_lr, whose weights are collected: its last iterate is "SGD constant", their mean SWA, the
Gaussian fitted to them SWAG. The baseline gives every node the frequencies of the classes among training and validation
nodes. Rates were chosen on validation nodes.

Examples:
  python -m experiments.graph --dataset Cora --data_path DATA_DIR
  python -m experiments.graph --dataset CLUSTER --seeds 3 --dir runs/cluster
  python -m experiments.graph --dataset CiteSeer --data_path DATA_DIR --seeds 100 --dir runs/citeseer

Writes to --dir: cells/seed-N.json, log.jsonl, table.txt, methods.png, reliability.png, results.json (last),
settings.json, environment.json, command.sh
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experiments import plots, seed_study
from experiments.common import (
    RunDir,
    SettingsError,
    parse_settings,
    require_at_least,
    require_fraction,
    require_positive,
    resolve_device,
    run_script,
    setting,
)
from experiments.graph_data import CITATIONS, GraphData, block_models, citations
from experiments.graph_methods import BASELINE, one_seed
from experiments.seed_study import Cell, Measure

PROG = "python -m experiments.graph"
OUTPUTS = (*seed_study.OUTPUTS, "reliability.png")
MEASURES = (
    Measure("accuracy", "test accuracy [%]"),
    Measure("nll", "NLL [nats]", 3, less_is_better=True),
    Measure("ece", "ECE [%]", less_is_better=True),
)
CITATION_RECIPE = dict(
    seeds=20, epochs=200, optimizer="Adam", batch_size=1, lr_init=0.01, wd=5e-4, swa_start=100, swa_lr=0.05, hidden=16,
    layers=2, dropout=0.5, norm="none",
)  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "Cora": CITATION_RECIPE,
    "CiteSeer": CITATION_RECIPE,
    "CLUSTER": dict(
        seeds=3, epochs=60, optimizer="SGD", batch_size=32, lr_init=0.3, wd=1e-4, swa_start=30, swa_lr=0.1, hidden=64,
        layers=4, dropout=0.0, norm="batch",
    ),
}  # fmt: skip


def _by_data(what: str, kind: type, **options: Any) -> Any:
    return setting(None, f"{what} (default: by data set)", kind=kind, **options)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the script does; None means what the data set's recipe says."""

    dir: str = setting("runs/graph", "folder to write to", free=True)
    dataset: str = setting("Cora", "data set", choices=(*CITATIONS, "CLUSTER"))
    data_path: str | None = setting(None, "folder of cora.npz and citeseer.npz", kind=str, free=True)
    seeds: int | None = _by_data("number of seeds", int, free=True)
    first_seed: int = setting(0, "the first of them", free=True)
    epochs: int | None = _by_data("of each of the two runs", int)
    optimizer: str | None = _by_data("of both runs", str, choices=("SGD", "Adam"))
    batch_size: int | None = _by_data("graphs in a training batch", int)
    lr_init: float | None = _by_data("learning rate until --swa_start", float)
    momentum: float = setting(0.9, "of SGD")
    wd: float | None = _by_data("weight decay", float)
    swa_start: int | None = _by_data("epoch after which the two runs part and weights are collected", int)
    swa_lr: float | None = _by_data("constant learning rate of the run whose weights are collected", float)
    swa_c_epochs: int = setting(1, "epochs from one collected iterate to the next")
    max_num_models: int = setting(20, "deviations that SWAG keeps")
    scale: float = setting(0.5, "multiplies SWAG's covariance; 0.5 is the published law")
    num_samples: int = setting(30, "weight samples in a model average")
    hidden: int | None = _by_data("width of the layers between", int)
    layers: int | None = _by_data("graph convolutions", int)
    dropout: float | None = _by_data("rate of dropout", float)
    norm: str | None = _by_data("normalisation", str, choices=("none", "batch", "layer"))
    train_graphs: int = setting(1000, "CLUSTER: training graphs")
    eval_graphs: int = setting(200, "CLUSTER: validation graphs, and as many test graphs")
    min_size: int = setting(5, "CLUSTER: least nodes in a community")
    max_size: int = setting(35, "CLUSTER: most nodes in a community")
    inside: float = setting(0.55, "CLUSTER: probability of an edge inside a community")
    between: float = setting(0.25, "CLUSTER: probability of an edge between two communities")
    data_seed: int = setting(0, "CLUSTER: seed of the graphs, the same for every seed of the study")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir, whose finished seeds are kept", free=True)


def check(settings: Settings) -> Settings:
    """Fill in the data set's recipe, and refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    own = {name: value for name, value in RECIPES[settings.dataset].items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **own)
    seed_study.check_seeds(settings)
    at_least = dict(
        epochs=2, batch_size=1, wd=0, swa_start=1, swa_c_epochs=1, max_num_models=0, num_samples=1, hidden=1, layers=2,
        train_graphs=1, eval_graphs=1, min_size=1, data_seed=0, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("lr_init", "swa_lr", "scale"))
    require_fraction(settings, ("momentum", "dropout"))
    for name in ("inside", "between"):
        if not 0 <= getattr(settings, name) <= 1:
            raise SettingsError(f"--{name} must be from 0 to 1; got {getattr(settings, name)}")
    assert settings.epochs is not None and settings.swa_start is not None
    if settings.epochs < settings.swa_start + 2 * settings.swa_c_epochs:
        raise SettingsError(
            f"--epochs must leave two collected iterates after --swa_start {settings.swa_start}; got {settings.epochs}"
        )
    if settings.max_size < settings.min_size:
        raise SettingsError(f"--max_size must be at least --min_size {settings.min_size}; got {settings.max_size}")
    return settings


def load(settings: Settings, device: torch.device) -> GraphData:
    """Read or draw the graphs."""
    if settings.dataset in CITATIONS:
        return citations(settings.dataset, settings.data_path, device)
    return block_models(
        settings.train_graphs, settings.eval_graphs, settings.min_size, settings.max_size, settings.inside,
        settings.between, settings.data_seed, device,
    )  # fmt: skip


def draw_reliability(run: RunDir, cells: Sequence[Cell]) -> None:
    """Calibration of every method on the test nodes: its bins, averaged over seeds."""
    curves, eces = {}, {}
    for method in (name for name in cells[0]["order"] if name in cells[0]["reliability"]):
        bins = torch.tensor([cell["reliability"][method] for cell in cells], dtype=torch.float64).mean(0)
        curves[method] = (bins[0].numpy(), bins[1].numpy())
        eces[method] = sum(cell["methods"][method]["ece"] for cell in cells) / len(cells) / 100
    plots.reliability_diagram(
        run.path / "reliability.png", curves, eces, "Reliability on the test nodes, mean of seeds"
    )


def work(settings: Settings) -> str:
    """Check everything, run the seeds that are left, and report; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    data = load(settings, device)
    run.begin()
    cells = seed_study.run_seeds(settings, run, lambda seed: one_seed(settings, data, device, seed))
    draw_reliability(run, cells)
    title = f"{settings.layers} graph convolutions on {data.description}, {settings.epochs} epochs"
    parameters, snapshots = cells[0]["parameters"], cells[0]["snapshots"]
    note = f"{parameters:,} weights; {snapshots} iterates were averaged; {data.sizes['test']:,} test nodes."
    return seed_study.finish(
        settings, run, cells, MEASURES, baseline=BASELINE, title=title, notes=(note,), parameters=parameters,
        sizes=data.sizes, data=data.description,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
