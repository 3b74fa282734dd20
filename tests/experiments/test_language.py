"""Character models end to end at a tiny size; texts, windows, networks and refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

import lowrank_bdl as lb
from experiments import language
from experiments.common import SettingsError
from experiments.language_methods import make_trainer, weights_of
from experiments.language_models import make_model
from experiments.language_text import (
    Windows,
    documentation,
    load_text,
    markov,
    ngram_log_probabilities,
    split,
    training_windows,
)  # fmt: skip

TINY = (
    "--text markov --length 12000 --hidden 16 --layers 1 --heads 2 --seq_len 16 --batch_size 16 --epochs 5 --dropout 0 "
    "--swa_start 2 --lr_init 0.02 --swa_lr 0.01 --seeds 2 --num_samples 2 --lawa_window 3 --ema_decay 0.98 --threads 1 "
    "--device cpu --eval_batch_size 64"
).split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("language") / "run"
    assert language.main(["--dir", str(path), *TINY, "--model", "GPT"]) == 0
    return path


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


def test_learns_but_not_more_than_there_is(finished: Path) -> None:
    """Between the perplexity of the law itself, which no model beats, and that of single characters."""
    found = results(finished)
    assert found["order"] == [
        "unigram", "bigram", "source of the text", "AdamW", "AdamW constant", "EMA", "LAWA", "SWA", "SWAG-Diag", "SWAG",
    ]  # fmt: skip
    perplexity = {method: entry["perplexity"]["mean"] for method, entry in found["summary"].items()}
    assert perplexity["source of the text"] < perplexity["bigram"] < perplexity["unigram"] < 20
    for method in found["order"][3:]:
        assert perplexity["source of the text"] < perplexity[method] < perplexity["unigram"] - 2
        bits = found["summary"][method]["bits"]["values"]
        assert [2**b for b in bits] == pytest.approx(found["summary"][method]["perplexity"]["values"])
    cell = found["cells"][0]
    assert cell["snapshots"] == 6  # three epochs, two an epoch
    assert [epoch for epoch, _ in cell["curves"]["AdamW"]] == [1, 2, 3, 4, 5]
    assert [epoch for epoch, _ in cell["curves"]["SWA"]] == [3, 4, 5]
    assert cell["curves"]["SWA"][-1][1] == pytest.approx(cell["validation"]["SWA"]["nll"], rel=1e-5)
    assert cell["methods"]["AdamW"] != found["cells"][1]["methods"]["AdamW"]
    sample = (finished / "sample.txt").read_text().removesuffix("\n")
    assert len(sample) == 500 and len(set(sample)) > 5 and set(sample) <= set(found["characters"])
    assert "unigram (baseline)" in (finished / "table.txt").read_text()
    for name in ("methods.png", "perplexity.png"):
        assert imread(finished / name)[..., :3].std() > 0.01


def test_lstm_and_going_on(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    flags = ["--dir", str(path), *TINY, "--model", "LSTM", "--seeds", "1", "--lr_init", "0.05"]
    assert language.main(flags) == 0
    perplexity = {method: entry["perplexity"]["mean"] for method, entry in results(path)["summary"].items()}
    assert perplexity["SWA"] < perplexity["unigram"] - 1 and perplexity["SWAG"] != perplexity["SWA"]
    before = results(finished)["cells"]
    assert language.main(["--dir", str(finished), *TINY, "--model", "GPT", "--resume", "--seeds", "1"]) == 0
    assert results(finished)["cells"] == before[:1]
    capsys.readouterr()
    assert language.main(["--dir", str(finished), *TINY, "--model", "LSTM", "--resume"]) == 2
    assert "model was 'GPT', now 'LSTM'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["LSTM", "GPT"])
def test_the_future_is_not_seen_and_modes_agree(name: str) -> None:
    torch.manual_seed(0)
    model = make_model(name, 9, hidden=8, layers=2, heads=2, length=12, rate=0.5).eval()
    for parameter in model.parameters():  # what training makes of small initial weights
        torch.nn.init.normal_(parameter, std=0.4)
    inputs = torch.randint(9, (3, 12), generator=torch.Generator().manual_seed(0))
    changed = inputs.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 9
    plain, other = model(inputs), model(changed)
    assert plain.shape == (3, 9, 12)
    torch.testing.assert_close(plain[..., :7], other[..., :7])
    assert (plain[..., 7] - other[..., 7]).abs().max() > 1e-3
    with torch.no_grad():  # torch has another code path for a transformer without gradients
        torch.testing.assert_close(model(inputs), plain.detach())
    assert not torch.equal(model.train()(inputs), plain)
    names = [key for key, _ in model.named_parameters()]
    assert "head.weight" not in names and "embedding.weight" in names  # tied: counted once


@pytest.mark.parametrize("name", ["LSTM", "GPT"])
def test_a_weight_vector_is_what_the_network_computes_with(name: str) -> None:
    """Tied and recurrent weights too: predictions at given weights are those of a network that has them."""
    torch.manual_seed(0)
    models = [make_model(name, 9, hidden=8, layers=1, heads=2, length=12, rate=0.1) for _ in range(2)]
    layout = lb.ParameterLayout.from_module(models[0])
    inputs = torch.randint(9, (4, 12), generator=torch.Generator().manual_seed(0))
    loader = [(inputs, inputs)]
    found = lb.predict(models[0], layout.flatten(models[1]).detach(), loader, progress=False).mean
    torch.testing.assert_close(found, models[1].eval()(inputs).softmax(1).mT.detach())


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_averages_are_of_the_iterates_they_say(optimizer: str) -> None:
    """Trained by hand beside the script's own run: LAWA of the newest three, SWA of all since the runs parted."""
    settings = language.check(
        language.Settings(text="markov", length=8000, hidden=8, layers=1, heads=1, seq_len=16, epochs=4, swa_start=2,
                          lawa_window=3, collects_per_epoch=1, optimizer=optimizer)
    )  # fmt: skip
    text = language.load(settings)
    trainer = make_trainer(settings, text, CPU, 0, average=True)
    layout, seen = lb.ParameterLayout.from_module(trainer.model), []
    for _ in range(4):
        trainer.train_epoch(training_windows(text.train, 16, 32))
        seen.append(layout.flatten(trainer.model).double())
    found = weights_of(settings, trainer)
    torch.testing.assert_close(found["LAWA"].double(), torch.stack(seen[1:]).mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["SWA"].double(), torch.stack(seen[2:]).mean(0), rtol=1e-5, atol=1e-7)
    assert type(trainer.optimizer).__name__ == optimizer and torch.equal(
        found[f"{optimizer} constant"].double(), seen[-1]
    )


def test_windows_score_every_character_once() -> None:
    text = torch.arange(40)
    windows = Windows(text, 8, 4, 3)
    batches = list(windows)
    assert len(batches) == len(windows) == 3
    for inputs, targets in batches:
        assert torch.equal(targets[:, -1], inputs[:, -1] + 1) and targets.shape[1] == 4
    assert torch.equal(torch.cat([targets.flatten() for _, targets in batches]), torch.arange(5, 37))
    first = training_windows(text, 8, 2)(torch.Generator().manual_seed(0))
    again = training_windows(text, 8, 2)(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    inputs = torch.cat([inputs for inputs, _ in first])
    assert len(inputs.unique()) == inputs.numel() and torch.equal(first[0][1], first[0][0] + 1)


def test_counts() -> None:
    text = split("ab" * 3000 + "b" * 3000, "letters")
    scored = Windows(text.test, 10, 5, 50)
    single, targets = ngram_log_probabilities(text, scored, 0)
    counts = text.train.bincount(minlength=3)
    torch.testing.assert_close(single[0].exp(), (counts + 1).double() / (counts + 1).sum())
    pairs, _ = ngram_log_probabilities(text, scored, 1)
    torch.testing.assert_close(pairs.exp().sum(1), torch.ones(len(targets), dtype=torch.float64))
    after_a = pairs[(pairs.argmax(1) == 1).logical_and(pairs[:, 0] < pairs[:, 2] + 1e-9)]
    assert len(after_a) and after_a[0, 1].exp() > 0.99  # b always follows a


def test_texts() -> None:
    text = load_text("pydoc", None, 100_000, 0)
    assert sum(text.sizes.values()) == 100_000 and text.sizes["test"] == text.sizes["validation"] == 5_000
    assert text.train.max() == len(text.characters) - 1 and text.num_classes == len(text.characters) + 1
    whole = documentation()
    assert len(whole) > 200_000 and "assert" in whole
    paragraphs = [part for part in whole.split("\n\n") if part]
    assert len(set(paragraphs)) == len(paragraphs)
    unknown = split("ab" * 9000 + "z" * 90 + "ab" * 955, "letters")
    assert unknown.test.max() <= 2 and unknown.characters in ("ab", "abz")


def test_a_markov_chain_has_the_law_it_says() -> None:
    """Its own NLL is that of the text: a second, longer text of the same law has the same within 3 %."""
    short, long = markov(20_000, 1), markov(100_000, 1)
    assert short.source_nll is not None and long.source_nll is not None
    assert short.source_nll == pytest.approx(long.source_nll, rel=0.1)
    assert long.source_nll < 0.7 * math.log(20) and long.num_classes == 21
    assert torch.equal(markov(20_000, 1).train, short.train) and not torch.equal(markov(20_000, 2).train, short.train)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Es war einmal, für alle. " * 400, encoding="utf-8")
    text = load_text("file", str(tmp_path / "book.txt"), 10**6, 0)
    assert "ü" in text.characters and "book.txt" in text.description
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa" * 9000)
    with pytest.raises(SettingsError, match=r"--text_path .*bytes\.txt: 'utf-8' codec"):
        load_text("file", str(tmp_path / "bytes.txt"), 10**6, 0)
    with pytest.raises(SettingsError, match="a text must have at least 4,000 characters; got 100"):
        load_text("file", str(tmp_path / "book.txt"), 100, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--text file", "--text file needs --text_path"),
        ("--text file --text_path nowhere.txt", "--text_path nowhere.txt:"),
        ("--seq_len 15", "--seq_len must be even: half a window is predicted; got 15"),
        ("--heads 3", "--heads must divide --hidden 16; got 3"),
        ("--swa_start 5", "--epochs must leave two collected iterates after --swa_start 5; got 5"),
        ("--seq_len 2000", "--seq_len must be less than the 600 characters that test; got 2000"),
        ("--ema_decay 1", "--ema_decay must be at least 0 and less than 1; got 1.0"),
        ("--grad_clip 0", "--grad_clip must be positive; got 0.0"),
        ("--lawa_window 0", "--lawa_window must be at least 1; got 0"),
    ],
)
def test_refuses_what_cannot_run(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = language.main(["--dir", str(tmp_path / "run"), *TINY, *flags.split()])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
