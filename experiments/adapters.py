"""SWAG over an adapter: a transformer trained on one set of digits, adapted to another by LoRA with few labels.

A small vision transformer (of the transformers library, initialised at random: nothing is downloaded) is trained on
MNIST. Then its weights are frozen, and low-rank adapters of its attention, with the classifier's layer, are trained on
a few of scikit-learn's digits, which another scanner made. SWA and SWAG are over what is trained: some thousand
weights. The mean and draws are written as adapters that peft's users load, and loaded again to see that they predict
the same.

Methods: the class that most labels have; the transformer as it was; fine-tuning of the adapter with a decaying rate;
and SWA and SWAG of a run at a constant rate, with which the former shares its first half.

Example:
  python -m experiments.adapters --data_path DATA_DIR --seeds 3 --dir runs/adapters

Writes to --dir: pretrained.safetensors, adapters/SEED/{mean,draw-0,...}/, cells/seed-N.json, log.jsonl, table.txt,
methods.png, results.json (last), settings.json, environment.json, command.sh
"""

import copy
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import lowrank_bdl as lb
from experiments import seed_study
from experiments.common import (
    RunDir,
    SettingsError,
    parse_settings,
    require_at_least,
    require_positive,
    resolve_device,
    run_script,
    setting,
)
from experiments.datasets import DATASETS, Datasets, LabelledImages, Split, load_dataset
from experiments.evaluation import metrics_of, predict_splits
from experiments.seed_study import Measure
from experiments.two_runs import rate_schedule, train_two
from lowrank_bdl.integrations.adapters import save_adapters
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.parameters.functional import evaluation_mode
from lowrank_bdl.training import schedules
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.trainer import Trainer

PROG = "python -m experiments.adapters"
OUTPUTS = (*seed_study.OUTPUTS, "pretrained.safetensors")
KIND = "pretrained network"
MEASURES = (
    Measure("error", "test error [%]", less_is_better=True),
    Measure("nll", "NLL [nats]", 3, less_is_better=True),
    Measure("ece", "ECE [%]", less_is_better=True),
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the script does."""

    dir: str = setting("runs/adapters", "folder to write to", free=True)
    data_path: str | None = setting(None, "folder with the files of --pretrain_dataset", kind=str, free=True)
    pretrain_dataset: str = setting("MNIST", "what the transformer is trained on", choices=tuple(DATASETS))
    pretrain_limit: int | None = setting(20_000, "its training images", kind=int)
    pretrain_epochs: int = setting(8, "epochs of that")
    pretrain_lr: float = setting(1e-3, "highest learning rate of that (AdamW, cosine)")
    hidden_size: int = setting(64, "width of the transformer, a multiple of 4")
    layers: int = setting(4, "its layers")
    seeds: int = setting(3, "number of seeds: labels, adapters' initial weights, order, draws", free=True)
    first_seed: int = setting(1, "first of them", free=True)
    labels: int = setting(100, "training images of the new set")
    rank: int = setting(4, "of the adapters")
    epochs: int = setting(60, "of each run of the adapter")
    batch_size: int = setting(20, "images in a training batch")
    lr_init: float = setting(0.05, "learning rate of the first half of the epochs (SGD with momentum 0.9)")
    swa_lr: float = setting(0.02, "constant learning rate of the run that is averaged")
    max_num_models: int = setting(20, "deviations that SWAG keeps")
    scale: float = setting(0.5, "multiplies SWAG's covariance")
    num_samples: int = setting(30, "draws in SWAG's model average")
    exported: int = setting(3, "draws written as adapters")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir, whose finished seeds are kept", free=True)

    @property
    def swa_start(self) -> int:
        """The epoch after which the two runs part."""
        return self.epochs // 2


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    seed_study.check_seeds(settings)
    at_least = dict(
        pretrain_limit=1, pretrain_epochs=1, layers=1, labels=2, rank=1, epochs=5, batch_size=1, max_num_models=0,
        num_samples=1, exported=0, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("pretrain_lr", "lr_init", "swa_lr", "scale"))
    if settings.hidden_size < 4 or settings.hidden_size % 4:
        raise SettingsError(f"--hidden_size must be a multiple of 4, the heads; got {settings.hidden_size}")
    return settings


def require_applications() -> None:
    """Refuse to run without the libraries.

    Raises:
        SettingsError: Names the extra to install.
    """
    try:
        import peft
        import transformers
    except ModuleNotFoundError as error:
        raise SettingsError(f"{error}; pip install 'lowrank-bdl[applications]'") from None
    del peft, transformers


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """Networks of transformers give an object that holds their logits."""
    logits: Tensor = model(batch[0]).logits
    return logits


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy [nats], and the logits."""
    logits = logits_of(model, (inputs, targets))
    return cross_entropy(logits, targets), logits


def make_transformer(settings: Settings, data: Datasets) -> nn.Module:
    """Make a vision transformer for the images of a set; weights from torch's global generator."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=data.image_size,
        patch_size=next(size for size in (7, 8, 4, 2, 1) if data.image_size % size == 0),
        num_channels=data.channels,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_labels=data.num_classes,
    )
    network: nn.Module = ViTForImageClassification(config)
    return network


def shuffled(images: LabelledImages, batch_size: int) -> Any:
    return lambda generator: images.shuffled(batch_size, generator)


def pretrained(settings: Settings, run: RunDir, data: Datasets) -> nn.Module:
    """Train the transformer, or read the one that an earlier start of this run has trained."""
    torch.manual_seed(0)
    network = make_transformer(settings, data).to(run.device)
    path = run.path / "pretrained.safetensors"
    layout = lb.ParameterLayout.from_module(network)
    if settings.resume and path.exists():
        tensors, _ = read_tensors(str(path), KIND, ("weights",), run.device)
        layout.assign_(network, tensors["weights"])
        return network
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.pretrain_lr, weight_decay=0.01)
    schedule = schedules.CosineLR(optimizer, horizon=settings.pretrain_epochs, final_lr=0.0)
    trainer = Trainer(network, optimizer, loss, schedule=schedule)
    trainer.fit(shuffled(data.train, 64), settings.pretrain_epochs, description="pretraining")
    write_tensors(str(path), KIND, {"weights": layout.flatten(network)}, {})
    return network


def adapted(settings: Settings, network: nn.Module, seed: int) -> nn.Module:
    """Return a copy with adapters of its attention, and with a classifier's layer of its own; the rest is frozen."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=settings.rank, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model: nn.Module = peft.get_peft_model(copy.deepcopy(network), config)
    return model


def make_trainer(settings: Settings, network: nn.Module, seed: int, *, average: bool) -> Trainer:
    """Make the run whose rate decays to 1 %, or the one at a constant rate that is collected."""
    model = adapted(settings, network, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=settings.lr_init, momentum=0.9)
    collections = {}
    if average:
        first = settings.swa_start + (settings.epochs - settings.swa_start) // 5
        collections["swag"] = Collection(lb.SWAG(model, rank=settings.max_num_models), start=first)
    schedule = rate_schedule(settings, optimizer, average=average)
    return Trainer(model, optimizer, loss, schedule=schedule, collections=collections, seed=seed)


def one_seed(
    settings: Settings, run: RunDir, network: nn.Module, labelled: Split, test: Split, seed: int
) -> dict[str, Any]:
    """Adapt, average, measure and export with one seed."""
    train = few(labelled, settings.labels, seed)
    decayed, averaged = train_two(
        lambda average: make_trainer(settings, network, seed, average=average),
        shuffled(train, settings.batch_size), settings, f"seed {seed}",
    )  # fmt: skip
    swag = averaged.collections["swag"].collector
    assert isinstance(swag, lb.SWAG)
    posterior = swag.posterior(scale=settings.scale)
    layout = lb.ParameterLayout.from_module(decayed.model)

    def measure(model: nn.Module, weights: Any) -> dict[str, float]:
        found = predict_splits(
            model, weights, {"test": test}, train, num_samples=settings.num_samples, seed=seed, call_fn=logits_of,
            progress=False,
        )  # fmt: skip
        metrics = metrics_of(found["test"], seed=seed)
        return {"error": 100 * (1 - metrics["accuracy"]), "nll": metrics["nll"], "ece": 100 * metrics["ece"]}

    methods = {
        "majority class": {"error": 100 * (test.targets != train.targets.mode().values).double().mean().item()},
        "as trained before": measure(network, lb.ParameterLayout.from_module(network).flatten(network)),
        "adapter, SGD": measure(decayed.model, layout.flatten(decayed.model)),
        "adapter, SWA": measure(decayed.model, swag.mean),
        "adapter, SWAG": measure(decayed.model, posterior),
    }
    difference = export(settings, run, network, averaged.model, posterior, test, seed)
    return {"methods": methods, "weights": layout.numel, "snapshots": int(swag.n_averaged), "difference": difference}


def few(images: Split, count: int, seed: int) -> Split:
    """Return some images at random, the same number of each class as far as that goes."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    classes = one_hot(images.targets.cpu()[order])
    place = (classes.cumsum(0) * classes).sum(-1)  # among the images of its class
    chosen = order[place.argsort(stable=True)[:count]].to(images.targets.device)
    return Split(images.inputs[chosen], images.targets[chosen])


@torch.no_grad()
def export(
    settings: Settings, run: RunDir, network: nn.Module, model: nn.Module, posterior: Any, test: Split, seed: int
) -> float:
    """Write mean and draws as adapters; return the largest difference of a probability after loading them."""
    import peft

    folder = run.path / "adapters" / str(seed)
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
    device = posterior.mean.device
    folders = save_adapters(
        model, posterior, folder, settings.exported, generator=torch.Generator(device).manual_seed(seed)
    )
    draws = posterior.sample(settings.exported, generator=torch.Generator(device).manual_seed(seed))
    function = lb.FunctionalModel(model, posterior.layout, logits_of)
    batch = test.inputs[:100], test.targets[:100]
    differences = []
    for place, theta in zip(folders, [posterior.mean, *draws], strict=True):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(network), str(place)).to(device).eval()
        with evaluation_mode(model):
            expected = function(theta, batch).softmax(-1)
        differences.append((logits_of(loaded, batch).softmax(-1) - expected).abs().max().item())
    return max(differences)


def work(settings: Settings) -> str:
    """Check everything, run the seeds that are left, and report; return what to print."""
    require_applications()
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    old = load_dataset(
        settings.pretrain_dataset, settings.data_path, use_test=True, train_limit=settings.pretrain_limit, device=device
    )
    new = load_dataset("digits", use_test=True, image_size=old.image_size, mean=old.mean, std=old.std, device=device)
    if old.channels != new.channels or old.num_classes != new.num_classes:
        raise SettingsError(f"--pretrain_dataset must have grey images of ten classes; got {settings.pretrain_dataset}")
    assert isinstance(new.train, Split) and isinstance(new.test, Split)
    if settings.labels > len(new.train):
        raise SettingsError(f"--labels must be at most {len(new.train)}; got {settings.labels}")
    labelled, test = new.train, new.test
    run.begin()
    network = pretrained(settings, run, old)
    cells = seed_study.run_seeds(settings, run, lambda seed: one_seed(settings, run, network, labelled, test, seed))
    own, frozen = cells[0]["weights"], sum(parameter.numel() for parameter in network.parameters())
    difference = max(cell["difference"] for cell in cells)
    return seed_study.finish(
        settings, run, cells, MEASURES, baseline="majority class",
        title=f"A transformer of {settings.pretrain_dataset} adapted to {settings.labels} of scikit-learn's digits",
        notes=(
            f"{own:,} weights are trained, {frozen:,} were trained before.",
            f"Written as adapters and loaded by peft, no probability differs by more than {difference:.1g}.",
        ),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
