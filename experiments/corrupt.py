"""Corrupt the test images of a data set in the style of CIFAR-10-C: 17 corruptions at five severities, from a seed.

Noise, blur, weather, colour and digital corruptions with the published parameters, each image with draws of its own.
A file holds one corruption at one severity and nothing else, and depends on the seed, the corruption, the severity and
the images alone: whichever are made, and in whatever order, they are the same. What is there already is kept with
--resume. The test images alone are corrupted, and nothing is ever trained on them.

Examples:
  python -m experiments.corrupt --dataset CIFAR10 --data_path DATA_DIR --dir runs/cifar10-c
  python -m experiments.corrupt --dataset MNIST --data_path DATA_DIR --corruptions fog,motion_blur --limit 2000
      --dir runs/mnist-c
  python -m experiments.corrupt --dataset digits --dir runs/digits-c

Writes to --dir: NAME_SEVERITY.npz (data: uint8 (N, H, W, C); labels: uint8 (N,)), log.jsonl, examples.png, damage.png,
results.json (last), settings.json, environment.json, command.sh
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments import corruption_plots
from experiments.common import (
    RunDir,
    SettingsError,
    format_table,
    parse_settings,
    require_at_least,
    run_script,
    setting,
)
from experiments.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
    file_name,
    generator_for,
    names_for,
    read_images,
    write_images,
)
from experiments.datasets.loading import find_source, read_test_images
from experiments.datasets.sources import InMemory, resize

PROG = "python -m experiments.corrupt"
OUTPUTS = ("results.json", "log.jsonl", "*_[1-5].npz", "examples.png", "damage.png")
Key = tuple[str, int]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is made."""

    dir: str = setting(dataclasses.MISSING, "folder to write to", free=True, kind=str)
    dataset: str = setting("CIFAR10", "data set, such as CIFAR10, CIFAR100, SVHN, STL10, MNIST, FashionMNIST, digits")
    data_path: str | None = setting(None, "folder with the data set's files (none for digits)", kind=str, free=True)
    corruptions: str = setting(
        "all", "which, separated by commas; all: those that change images of so many channels", free=True
    )
    severities: str = setting("1,2,3,4,5", "which, separated by commas", free=True)
    limit: int | None = setting(None, "so many test images only, of a fixed random order (default: all)", kind=int)
    seed: int = setting(0, "seed of all draws")
    example: int = setting(0, "number of the image that examples.png shows", free=True)
    threads: int = setting(0, "CPU threads, 0 for torch's choice", free=True)
    resume: bool = setting(False, "keep the files that are there, and make the others", free=True)


def check(settings: Settings) -> Settings:
    """Refuse what cannot run."""
    require_at_least(settings, dict(seed=0, example=0, threads=0))
    severities(settings)
    return settings


def severities(settings: Settings) -> list[int]:
    """Return the severities that are asked for."""
    wanted = [text.strip() for text in settings.severities.split(",")]
    if not set(wanted) <= set(map(str, SEVERITIES)) or len(set(wanted)) < len(wanted):
        raise SettingsError(f"--severities must be some of 1 to 5, each once; got {settings.severities!r}")
    return sorted(map(int, wanted))


def wanted_files(settings: Settings, channels: int) -> list[Key]:
    """Return corruption and severity of every file that is asked for."""
    names = [text.strip() for text in settings.corruptions.split(",")]
    if settings.corruptions == "all":
        names = list(names_for(channels))
    for name in names:
        if name not in CORRUPTIONS:
            raise SettingsError(f"--corruptions: unknown corruption {name!r}; known are {', '.join(CORRUPTIONS)}")
        if name not in names_for(channels):
            raise SettingsError(f"--corruptions: {name} needs colours; images of {settings.dataset} are grey")
    if len(set(names)) < len(names):
        raise SettingsError(f"--corruptions must name each once; got {settings.corruptions!r}")
    return [(name, severity) for name in names for severity in severities(settings)]


def load_images(settings: Settings) -> tuple[Tensor, Tensor]:
    """Return test images (N, H, W, C), uint8, at the size at which networks are given them, and labels (N,)."""
    pool = read_test_images(settings.dataset, settings.data_path, settings.limit)
    if not isinstance(pool, InMemory):
        raise SettingsError(f"--dataset {settings.dataset}: images that are not held in memory cannot be corrupted")
    pixels = pool.images if pool.images.dtype == torch.uint8 else pool.images.mul(255).round().to(torch.uint8)
    images = resize(pixels, find_source(settings.dataset).image_size).permute(0, 2, 3, 1).contiguous()
    if settings.example >= len(images):
        raise SettingsError(f"--example must be less than {len(images)}, the number of images; got {settings.example}")
    return images, pool.targets


def finished_file(run: RunDir, key: Key, images: Tensor, labels: Tensor) -> dict[str, Any] | None:
    """Return the facts of a file that an earlier part of this run made, if it did.

    Raises:
        SettingsError: If the file is damaged, or not of these images.
    """
    if not (run.path / file_name(*key)).exists():
        return None
    pool = read_images(run.path, *key)
    found = pool.images.permute(0, 2, 3, 1)
    if found.shape != images.shape or not torch.equal(pool.targets, labels):
        raise SettingsError(
            f"--resume: {run.path / file_name(*key)} is not of these images; delete it to make it again"
        )
    return facts(key, found, images)


def facts(key: Key, found: Tensor, images: Tensor) -> dict[str, Any]:
    """Return what results.json says about a file; changes are in steps of 1/255."""
    change = torch.zeros((), dtype=torch.float64)
    for part, own in zip(found.split(1000), images.split(1000), strict=True):
        change += (part.short() - own.short()).abs().sum(dtype=torch.float64)
    return {"corruption": key[0], "severity": key[1], "images": len(found), "change": change.item() / images.numel()}


def check_space(run: RunDir, num_bytes: int) -> None:
    """Refuse to begin what does not fit on the disk."""
    folder = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise SettingsError(f"--dir {run.path}: {num_bytes / 1e9:.3g} GB are needed, and {free / 1e9:.3g} GB are free")


def make_files(
    settings: Settings, run: RunDir, images: Tensor, labels: Tensor, made: dict[Key, dict[str, Any]], todo: list[Key]
) -> None:
    """Write the files that are missing, and add their facts to `made`."""
    with tqdm(todo, desc="corrupt", unit="file") as bar:
        for key in bar:
            bar.set_postfix_str(f"{key[0]}, severity {key[1]}", refresh=False)
            began = time.perf_counter()
            found = corrupt(images, *key, generator_for(settings.seed, *key))
            try:
                write_images(run.path / file_name(*key), found, labels)
            except OSError as error:
                raise SettingsError(f"--dir {run.path}: {error.strerror}") from None
            made[key] = facts(key, found, images)
            run.log(**made[key], seconds=time.perf_counter() - began)


def report(settings: Settings, run: RunDir, images: Tensor, labels: Tensor, files: dict[Key, dict[str, Any]]) -> str:
    """Draw the figures, write results.json last, and return the table."""
    names = list(dict.fromkeys(name for name, _ in files))
    examples = {}
    for key in files:
        examples[key] = read_images(run.path, *key).images[settings.example].permute(1, 2, 0)
    corruption_plots.examples(run.path / "examples.png", images[settings.example], names, examples)
    by_group: dict[str, dict[str, dict[int, float]]] = {}
    for (name, severity), found in files.items():
        by_group.setdefault(CORRUPTIONS[name].group, {}).setdefault(name, {})[severity] = found["change"]
    corruption_plots.damage(run.path / "damage.png", by_group)
    run.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(settings),
            "images": len(images),
            "shape": list(images.shape[1:]),
            "files": [found for _, found in sorted(files.items())],
        },
    )
    levels = severities(settings)
    rows = [[name, *(f"{files[name, level]['change']:.2f}" for level in levels)] for name in names]
    title = (
        f"{len(images):,} test images of {settings.dataset}; mean absolute change of a pixel at each severity, of 255"
    )
    return f"{title}\n\n{format_table(['corruption', *map(str, levels)], rows)}"


def work(settings: Settings) -> str:
    """Check everything, then make what is missing; return what to print."""
    run = RunDir(settings, OUTPUTS, torch.device("cpu"))
    images, labels = load_images(settings)
    wanted = wanted_files(settings, images.shape[-1])
    made = {}
    for key in wanted if settings.resume else ():
        if (found := finished_file(run, key, images, labels)) is not None:
            made[key] = found
    todo = [key for key in wanted if key not in made]
    check_space(run, len(todo) * (images.numel() + len(labels)))
    run.begin()
    make_files(settings, run, images, labels, made, todo)
    return f"{report(settings, run, images, labels, {key: made[key] for key in wanted})}\n\nwritten to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the files; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
