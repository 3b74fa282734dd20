"""What a seed of `experiments.language` trains, and how well each set of weights predicts the next character."""

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.optim.swa_utils import AveragedModel

import lowrank_bdl as lb
from experiments.language_models import make_model
from experiments.language_text import Text, Windows, ngram_log_probabilities, training_windows
from experiments.two_runs import rate_schedule, train_two
from lowrank_bdl.parameters.functional import evaluation_mode
from lowrank_bdl.posteriors.snapshots import WeightSnapshots
from lowrank_bdl.training import averages
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.trainer import Record, Trainer

if TYPE_CHECKING:
    from experiments.language import Settings

BASELINE = "unigram"
SAMPLE = 500  # characters that SWA writes
Curves: TypeAlias = "dict[str, list[tuple[int, float]]]"  # epoch and NLL [nats] on the validation text, by method


def one_seed(settings: "Settings", text: Text, device: torch.device, seed: int) -> dict[str, Any]:
    """Train the two runs and measure every method; all randomness is a function of the seed."""
    curves: Curves = {}

    def follow(trainer: Trainer, record: Record) -> None:
        weights = weights_of(settings, trainer)
        found = log_likelihood(settings, text.validation, trainer.model, torch.stack(list(weights.values())), seed)
        assert found.sample_log_likelihood is not None
        losses = -found.sample_log_likelihood.double().flatten(1).mean(1)
        for name, loss in zip(weights, losses.tolist(), strict=True):
            curves.setdefault(name, []).append((trainer.epoch, loss))

    decayed, averaged = train_two(
        lambda average: make_trainer(settings, text, device, seed, average=average),
        training_windows(text.train.to(device), settings.seq_len, settings.batch_size),
        settings,
        f"seed {seed}",
        follow,
    )
    swag = averaged.collections["swag"].collector
    assert isinstance(swag, lb.SWAG)
    sources: dict[str, Any] = {settings.optimizer: weights_of(settings, decayed)[settings.optimizer]}
    sources |= weights_of(settings, averaged)
    sources |= {"SWAG-Diag": swag.posterior(scale=1.0, rank=0), "SWAG": swag.posterior(scale=settings.scale)}
    methods, validation = ngrams(settings, text, text.test), ngrams(settings, text, text.validation)
    if text.source_nll is not None:
        methods["source of the text"] = metrics_of(text.source_nll)
    for name, weights in sources.items():
        for part, found in ((text.validation, validation), (text.test, methods)):
            predictive = log_likelihood(settings, part, decayed.model, weights, seed)
            found[name] = measure(predictive)
    return {
        "methods": methods,
        "validation": validation,
        "curves": curves,
        "sample": write(settings, text, decayed.model, swag.mean, seed),
        "parameters": swag.layout.numel,
        "snapshots": swag.n_averaged,
        "train_loss": {"decayed": decayed.history[-1]["loss"], "constant": averaged.history[-1]["loss"]},
    }


def make_trainer(settings: "Settings", text: Text, device: torch.device, seed: int, *, average: bool) -> Trainer:
    """Make the run whose rate decays, or the one whose weights are collected; both keep their newest iterates."""
    model = new_model(settings, text, device, seed)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr_init, weight_decay=settings.wd)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=settings.lr_init, momentum=settings.momentum, weight_decay=settings.wd
        )
    times = settings.collects_per_epoch
    collections = {"lawa": Collection(WeightSnapshots(model, settings.lawa_window), per_epoch=times)}
    if average:
        swag = lb.SWAG(model, rank=settings.max_num_models)
        collections["swag"] = Collection(swag, settings.swa_start, per_epoch=times)
        ema = averages.ema(model, settings.ema_decay)
        collections["ema"] = Collection(ema, settings.swa_start, per_epoch=None)
    return Trainer(
        model,
        optimizer,
        schedule=rate_schedule(settings, optimizer, average=average),
        collections=collections,
        seed=seed,
        clip_grad_norm=settings.grad_clip,
    )


def new_model(settings: "Settings", text: Text, device: torch.device, seed: int) -> nn.Module:
    """Make the network with initial weights, and random numbers for dropout, that depend on the seed alone."""
    torch.manual_seed(seed)
    return make_model(
        settings.model, text.num_classes, hidden=settings.hidden, layers=settings.layers, heads=settings.heads,
        length=settings.seq_len, rate=settings.dropout,
    ).to(device)  # fmt: skip


def weights_of(settings: "Settings", trainer: Trainer) -> dict[str, Tensor]:
    """Return the last iterate of a run and its averages, each (D,), by name.

    LAWA is the mean of the newest iterates. Of the run that is averaged also the mean of all of them since the two
    parted (SWA), and the exponential average.
    """
    lawa = trainer.collections["lawa"].collector
    assert isinstance(lawa, WeightSnapshots)
    iterate = lawa.layout.flatten(trainer.model)
    if "swag" not in trainer.collections:
        return {settings.optimizer: iterate, "LAWA, decayed": lawa.posterior().mean}
    swag, ema = trainer.collections["swag"].collector, trainer.collections["ema"].collector
    assert isinstance(swag, lb.SWAG) and isinstance(ema, AveragedModel)
    return {
        f"{settings.optimizer} constant": iterate,
        "EMA": averages.weights(ema, swag.layout),
        "LAWA": lawa.posterior().mean,
        "SWA": swag.mean,
    }


@torch.no_grad()
def write(settings: "Settings", text: Text, model: nn.Module, weights: Tensor, seed: int) -> str:
    """Let a network with given weights (D,) go on from the first window of the test text."""
    network = lb.FunctionalModel(model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    written = text.test[: settings.seq_len].tolist()
    with evaluation_mode(model):
        for _ in range(SAMPLE):
            inputs = torch.tensor([written[-settings.seq_len :]], device=device)
            logits = network(weights, inputs)[0, : len(text.characters), -1]
            written.append(int(torch.multinomial(logits.softmax(0).cpu(), 1, generator=generator)))
    return "".join(text.characters[number] for number in written[settings.seq_len :])


# ---- predictions -----------------------------------------------------------------------------------------------------


def scored_windows(settings: "Settings", part: Tensor) -> Windows:
    """Return windows over a part of the text, of which the second half is predicted."""
    return Windows(part, settings.seq_len, settings.seq_len // 2, settings.eval_batch_size)


def log_likelihood(settings: "Settings", part: Tensor, model: nn.Module, weights: Any, seed: int) -> lb.Predictive:
    """Predict a part of the text by a posterior, or by given weights (D,) or (S, D)."""
    scored = settings.seq_len // 2
    return lb.predict(
        model,
        weights,
        scored_windows(settings, part),
        num_samples=settings.num_samples,
        call_fn=lambda net, batch: net(batch[0])[..., -scored:],
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )


def measure(predictive: lb.Predictive) -> dict[str, float]:
    """Measure what a method predicts, over all scored positions."""
    assert predictive.targets is not None
    probabilities, targets = predictive.mean.flatten(0, 1), predictive.targets.flatten()
    accuracy = 100 * lb.metrics.accuracy(probabilities, targets)
    return metrics_of(predictive.nll) | {"accuracy": accuracy, "ece": 100 * lb.metrics.ece(probabilities, targets)}


def metrics_of(nll: float) -> dict[str, float]:
    """NLL of a character [nats], its perplexity, and bits a character."""
    return {"nll": nll, "perplexity": math.exp(nll), "bits": nll / math.log(2)}


def ngrams(settings: "Settings", text: Text, part: Tensor) -> dict[str, dict[str, float]]:
    """Measure counting characters, and pairs of characters."""
    found = {}
    for order, name in enumerate((BASELINE, "bigram")):
        log_probabilities, targets = ngram_log_probabilities(text, scored_windows(settings, part), order)
        accuracy = 100 * (log_probabilities.argmax(1) == targets).double().mean().item()
        found[name] = metrics_of(nll_loss(log_probabilities, targets).item()) | {"accuracy": accuracy}
    return found
