"""Text as numbers, a number a character: from Python's own documentation, drawn from a Markov chain, or from a file."""

import math
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.common import SettingsError

PIECES = 200  # a text is cut into so many; of each 20 in a row one is for validation and one for testing
ALPHABET = "abcdefghijklmnopqrst"  # of generated text


@dataclass(frozen=True)
class Text:
    """What is read and predicted.

    Attributes:
        train: Numbers of the characters, (n,).
        validation: Of those for validation, (m,).
        test: Of those for testing, (m,).
        characters: The character of each number; the last number is any other character.
        description: For titles and results.
        source_nll: Mean negative log-probability of a test character under the law the text was drawn from [nats];
            None for real text.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    characters: str
    description: str
    source_nll: float | None = None

    @property
    def num_classes(self) -> int:
        """Characters, and one more number for all that the training text does not have."""
        return len(self.characters) + 1

    @property
    def sizes(self) -> dict[str, int]:
        """Characters in each part."""
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}


def load_text(source: str, path: str | None, length: int, seed: int) -> Text:
    """Make the text that is asked for.

    Args:
        source: ``"pydoc"``, ``"markov"`` or ``"file"``.
        path: The file, in UTF-8.
        length: Characters to use (of a real text at most so many), or to draw.
        seed: Of a Markov chain, and of what is drawn from it.

    Raises:
        SettingsError: If the file cannot be read, or there is too little text.
    """
    if source == "markov":
        return markov(length, seed)
    if source == "pydoc":
        return split(documentation()[:length], f"the documentation in Python {platform.python_version()}")
    if path is None:
        raise SettingsError("--text file needs --text_path")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--text_path {path}: {error}") from None
    return split(text[:length], Path(path).name)


def documentation() -> str:
    """Return the language reference that Python carries for its ``help``, every paragraph once."""
    from pydoc_data.topics import topics

    paragraphs = (part for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    return "\n\n".join(dict.fromkeys(part.strip("\n") for part in paragraphs))


def split(text: str, description: str) -> Text:
    """Cut a text into pieces, 18 of 20 for training, and number the characters of these.

    Raises:
        SettingsError: If there are fewer than 20 characters a piece.
    """
    size = len(text) // PIECES
    if size < 20:
        raise SettingsError(f"a text must have at least {20 * PIECES:,} characters; got {len(text):,}")
    parts: dict[int, list[str]] = {0: [], 10: [], -1: []}
    for piece in range(PIECES):
        part = text[piece * size : (piece + 1) * size]
        parts[piece % 20 if piece % 20 in parts else -1].append(part)
    train, validation, test = ("".join(parts[which]) for which in (-1, 0, 10))
    characters = "".join(sorted(set(train)))
    number = {character: i for i, character in enumerate(characters)}
    numbers = [torch.tensor([number.get(c, len(number)) for c in part]) for part in (train, validation, test)]
    return Text(*numbers, characters, f"{description}, {len(text):,} characters")


def markov(length: int, seed: int) -> Text:
    """Draw a text in which each character depends on the two before, by a law that is drawn too.

    The law is known, so the least perplexity that any model can hope for is known.

    Args:
        length: Characters.
        seed: Of law and text.
    """
    rng, size = np.random.default_rng(seed), len(ALPHABET)
    law = rng.dirichlet(np.full(size, 0.1), size=(size, size)) * 0.99 + 0.01 / size  # nothing is impossible
    bounds, drawn = law.cumsum(-1), rng.random(length)
    numbers = np.zeros(length, dtype=np.int64)
    for i in range(2, length):
        found = np.searchsorted(bounds[numbers[i - 2], numbers[i - 1]], drawn[i])
        numbers[i] = min(found, size - 1)  # the last bound is 1 up to rounding
    text = split("".join(ALPHABET[i] for i in numbers), "text drawn from a Markov chain of order 2")
    own = np.array([ALPHABET.index(text.characters[i]) for i in text.test])
    nll = -np.log(law[own[:-2], own[1:-1], own[2:]]).mean()  # ten seams between pieces are not worth a correction
    return Text(text.train, text.validation, text.test, text.characters, text.description, float(nll))


@dataclass(frozen=True)
class Windows:
    """A re-iterable loader of windows: inputs ``(B, T)`` and the next characters of the last ``scored`` positions.

    Windows overlap so that what is predicted has at least T − ``scored`` characters before it.

    Attributes:
        text: Numbers of the characters, (n,).
        length: T.
        scored: Positions of a window that are predicted, from 1 to T; also the shift from one window to the next.
        batch_size: Windows in a batch.
    """

    text: Tensor
    length: int
    scored: int
    batch_size: int

    def starts(self) -> Tensor:
        """Return the first position of every window."""
        return torch.arange(0, len(self.text) - self.length, self.scored)

    def __len__(self) -> int:
        return math.ceil(len(self.starts()) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for starts in self.starts().split(self.batch_size):
            inputs, targets = cut(self.text, starts, self.length)
            yield inputs, targets[:, -self.scored :]


def cut(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return windows ``(B, T)`` and the characters that follow each position, ``(B, T)``."""
    windows = text[starts.to(text.device)[:, None] + torch.arange(length + 1, device=text.device)]
    return windows[:, :-1], windows[:, 1:]


def training_windows(text: Tensor, length: int, batch_size: int) -> Callable[[torch.Generator], Any]:
    """Return what makes an epoch's batches: windows side by side from a random first character on, in random order.

    Args:
        text: Numbers of the characters, (n,).
        length: Positions in a window, T.
        batch_size: Windows in a batch.
    """

    def epoch(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        first = int(torch.randint(length, (), generator=generator))
        starts = torch.arange(first, len(text) - length, length)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        return [cut(text, part, length) for part in starts.split(batch_size)]

    return epoch


def ngram_log_probabilities(text: Text, scored: Windows, order: int) -> tuple[Tensor, Tensor]:
    """Predict by how often characters followed those before in training, each counted once more than it did.

    Args:
        text: Its training part is counted.
        scored: What is predicted.
        order: 0 for the characters alone, 1 for those after each character.

    Returns:
        Log-probabilities ``(N, C)`` and targets ``(N,)`` of all scored positions.
    """
    size = text.num_classes
    pairs = [(inputs[:, -targets.shape[1] :].flatten(), targets.flatten()) for inputs, targets in scored]
    before, after = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if order == 0:
        counts = torch.bincount(text.train, minlength=size).expand(size, -1)
    else:
        counts = torch.bincount(text.train[:-1] * size + text.train[1:], minlength=size * size).view(size, size)
    log_probabilities = (counts.double() + 1).log()
    return (log_probabilities - log_probabilities.logsumexp(1, keepdim=True))[before], after
