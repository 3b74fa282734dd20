"""The next character of a text by an LSTM or a small GPT: SWA, LAWA, EMA and SWAG over seeds.

The text is the language reference that Python carries for its help() (English and code, every paragraph once), or
drawn from a Markov chain, whose law is known and with it the least perplexity that is possible, or a file.

Every seed trains two runs that are one until epoch --swa_start: AdamW (or SGD), whose rate then decays to 1 %, and a
run at the constant rate --swa_lr, whose weights are averaged: its last iterate is "AdamW constant"; LAWA is the mean of
its newest --lawa_window iterates, SWA of all since the runs parted, EMA the exponential average of every step, and SWAG
the Gaussian fitted to SWA's iterates. All are compared in perplexity on characters that have at least half a window
before them. The baseline counts characters.

Examples:
  python -m experiments.language --model GPT
  python -m experiments.language --model LSTM --lr_init 5e-3 --swa_lr 5e-3 --dir runs/lstm
  python -m experiments.language --text markov --length 200000 --epochs 8 --dir runs/markov
  python -m experiments.language --text file --text_path BOOK.txt --hidden 256 --layers 6 --seq_len 256 --dir runs/book

Writes to --dir: cells/seed-N.json, log.jsonl, table.txt, methods.png, perplexity.png (validation text, by epoch),
sample.txt (what SWA of the first seed writes), results.json (last), settings.json, environment.json, command.sh
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import pyplot as plt

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
    write_atomically,
)
from experiments.language_methods import BASELINE, one_seed
from experiments.language_models import MODELS
from experiments.language_text import Text, load_text
from experiments.seed_study import Cell, Measure

PROG = "python -m experiments.language"
OUTPUTS = (*seed_study.OUTPUTS, "perplexity.png", "sample.txt")
MEASURES = (
    Measure("perplexity", "perplexity of a character", 3, less_is_better=True),
    Measure("bits", "bits a character", 3, less_is_better=True),
    Measure("accuracy", "accuracy [%]"),
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the script does."""

    dir: str = setting("runs/language", "folder to write to", free=True)
    text: str = setting("pydoc", "what is read", choices=("pydoc", "markov", "file"))
    text_path: str | None = setting(None, "the file, in UTF-8", kind=str)
    length: int = setting(1_000_000, "characters to use at most, or to draw from the Markov chain")
    text_seed: int = setting(0, "of the Markov chain and its text, the same for every seed of the study")
    model: str = setting("GPT", "network", choices=MODELS)
    hidden: int = setting(128, "width")
    layers: int = setting(2, "recurrent layers, or blocks of the GPT")
    heads: int = setting(4, "of attention")
    dropout: float = setting(0.1, "rate of dropout")
    seq_len: int = setting(64, "characters in a window, even")
    seeds: int = setting(3, "number of seeds", free=True)
    first_seed: int = setting(0, "the first of them", free=True)
    epochs: int = setting(20, "of each of the two runs")
    optimizer: str = setting("AdamW", "of both runs", choices=("AdamW", "SGD"))
    batch_size: int = setting(32, "windows in a training batch")
    eval_batch_size: int = setting(32, "windows in a batch of what is predicted", free=True)
    lr_init: float = setting(2e-3, "learning rate until --swa_start")
    momentum: float = setting(0.9, "of SGD")
    wd: float = setting(0.01, "weight decay")
    grad_clip: float = setting(1.0, "largest norm of the gradient")
    swa_start: int = setting(10, "epoch after which the two runs part and SWA begins")
    swa_lr: float = setting(2e-3, "constant learning rate of the run whose weights are averaged")
    collects_per_epoch: int = setting(2, "iterates of an epoch that enter SWA and LAWA")
    lawa_window: int = setting(6, "newest iterates that LAWA averages")
    ema_decay: float = setting(0.999, "of the exponential average")
    max_num_models: int = setting(20, "deviations that SWAG keeps")
    scale: float = setting(0.5, "multiplies SWAG's covariance; 0.5 is the published law")
    num_samples: int = setting(20, "weight samples in a model average")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "go on with the run in --dir, whose finished seeds are kept", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    seed_study.check_seeds(settings)
    at_least = dict(
        length=1, text_seed=0, hidden=1, layers=1, heads=1, seq_len=2, epochs=2, batch_size=1, eval_batch_size=1, wd=0,
        swa_start=1, collects_per_epoch=1, lawa_window=1, max_num_models=0, num_samples=1, threads=0,
    )  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("lr_init", "swa_lr", "scale", "grad_clip"))
    require_fraction(settings, ("momentum", "dropout", "ema_decay"))
    if settings.seq_len % 2:
        raise SettingsError(f"--seq_len must be even: half a window is predicted; got {settings.seq_len}")
    if settings.model == "GPT" and settings.hidden % settings.heads:
        raise SettingsError(f"--heads must divide --hidden {settings.hidden}; got {settings.heads}")
    if (settings.epochs - settings.swa_start) * settings.collects_per_epoch < 2:
        raise SettingsError(
            f"--epochs must leave two collected iterates after --swa_start {settings.swa_start}; got {settings.epochs}"
        )
    return settings


def load(settings: Settings) -> Text:
    """Make the text, and refuse one that is too short for a window."""
    text = load_text(settings.text, settings.text_path, settings.length, settings.text_seed)
    shortest = min(text.sizes.values())
    if shortest <= settings.seq_len:
        raise SettingsError(
            f"--seq_len must be less than the {shortest:,} characters that test; got {settings.seq_len}"
        )
    return text


def draw_curves(run: RunDir, cells: Sequence[Cell], settings: Settings) -> None:
    """Perplexity on the validation text after each epoch: mean over seeds, and where they lie."""
    names = (settings.optimizer, "LAWA, decayed", f"{settings.optimizer} constant", "EMA", "LAWA", "SWA")
    colors = dict(zip(names, ("#000000", "#56B4E9", "#999999", "#CC79A7", "#0072B2", "#009E73"), strict=True))
    with plt.rc_context(plots.STYLE):
        figure, axes = plots._axes()
        lowest, middle = math.inf, []
        for name in names:
            values = np.array([cell["curves"][name] for cell in cells])  # (seeds, epochs, 2)
            epochs, perplexity = values[0, :, 0], np.exp(values[..., 1])
            axes.plot(epochs, perplexity.mean(0), color=colors[name], label=name)
            axes.fill_between(epochs, perplexity.min(0), perplexity.max(0), color=colors[name], alpha=0.15, linewidth=0)
            lowest = min(lowest, perplexity.min())
            middle.append(perplexity.mean(0)[len(epochs) // 3])
        axes.set_ylim(lowest * 0.99, max(middle) * 1.02)  # the first epochs would flatten all others
        axes.axvline(settings.swa_start, color="#777777", linestyle=":", linewidth=1.2)
        axes.set_xlabel("epoch (dotted: the two runs part)")
        axes.set_ylabel("perplexity of a validation character")
        axes.set_title(f"{settings.model}: {'mean and range of seeds' if len(cells) > 1 else 'one seed'}")
        axes.legend()
        plots._save(figure, run.path / "perplexity.png")


def work(settings: Settings) -> str:
    """Check everything, run the seeds that are left, and report; return what to print."""
    device = resolve_device(settings.device)
    run = RunDir(settings, OUTPUTS, device)
    text = load(settings)
    run.begin()
    cells = seed_study.run_seeds(settings, run, lambda seed: one_seed(settings, text, device, seed))
    draw_curves(run, cells, settings)
    write_atomically(run.path / "sample.txt", cells[0]["sample"] + "\n")
    parameters, snapshots = cells[0]["parameters"], cells[0]["snapshots"]
    title = f"{settings.model} on {text.description}, {settings.epochs} epochs"
    note = (
        f"{parameters:,} weights; {snapshots} iterates were averaged; {text.sizes['test']:,} test characters "
        f"of {len(text.characters)} kinds."
    )
    return seed_study.finish(
        settings, run, cells, MEASURES, baseline=BASELINE, title=title, notes=(note,), parameters=parameters,
        sizes=text.sizes, text=text.description, characters=text.characters,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
