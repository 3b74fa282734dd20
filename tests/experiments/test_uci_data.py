"""Tables for regression: both forms of files, splits, normalisation, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.common import SettingsError
from experiments.uci_data import folds_of, load_table, split_of

RNG = np.random.default_rng(0)
X, Y = RNG.normal(3.0, 2.0, (30, 3)), RNG.normal(-1.0, 5.0, 30)
TRAIN = np.stack([np.arange(26), np.arange(4, 30)])
TEST = np.stack([np.arange(26, 30), np.arange(4)])


def write_npz(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    arrays = {"X": X, "y": Y, "train_idx": TRAIN, "test_idx": TEST} | changes
    np.savez(folder / f"{name}.npz", **{key: value for key, value in arrays.items() if value is not None})
    return folder


def write_text(folder: Path) -> Path:
    folder.mkdir(parents=True)
    np.savetxt(folder / "data.txt", np.column_stack([X[:, :2], Y, X[:, 2]]))
    np.savetxt(folder / "index_features.txt", [0, 1, 3])  # as floats, like the released ones
    np.savetxt(folder / "index_target.txt", [2])
    for split in range(2):
        np.savetxt(folder / f"index_train_{split}.txt", TRAIN[split])
        np.savetxt(folder / f"index_test_{split}.txt", TEST[split])
    return folder


def test_both_forms_are_the_same_table(tmp_path: Path) -> None:
    packed = load_table("tiny", write_npz(tmp_path))
    write_text(tmp_path / "text" / "tiny" / "data")
    for path in (tmp_path / "text", tmp_path / "text" / "tiny", tmp_path / "text" / "tiny" / "data"):
        text = load_table("tiny", path)
        assert text.num_splits == packed.num_splits == 2
        np.testing.assert_allclose(text.features, packed.features, rtol=1e-15)
        np.testing.assert_allclose(text.target, packed.target, rtol=1e-15)
        for own, other in zip((*text.train, *text.test), (*packed.train, *packed.test), strict=True):
            np.testing.assert_array_equal(own, other)


def test_boston_is_found_under_its_long_name(tmp_path: Path) -> None:
    assert load_table("boston", write_npz(tmp_path, "bostonHousing")).name == "boston"


def test_without_published_splits_a_tenth_is_drawn(tmp_path: Path) -> None:
    table = load_table("tiny", write_npz(tmp_path, train_idx=None, test_idx=None))
    assert table.num_splits == 20 and {len(rows) for rows in table.test} == {3}
    assert all(sorted([*own, *rest]) == list(range(30)) for own, rest in zip(table.train, table.test, strict=True))
    assert len({tuple(rows) for rows in table.test}) > 15  # of 24,360 that there are
    again = load_table("tiny", tmp_path)
    assert all((own == other).all() for own, other in zip(table.test, again.test, strict=True))


def test_training_rows_alone_normalise_unless_asked(tmp_path: Path) -> None:
    table = load_table("tiny", write_npz(tmp_path))
    split = split_of(table, 1)
    for values in (split.x_train, split.y_train):
        zeros = torch.zeros(values.shape[1], dtype=torch.float64)
        torch.testing.assert_close(values.mean(0), zeros, atol=1e-14, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), zeros + 1)
    np.testing.assert_allclose(split.y_test.squeeze(1) * split.std + split.mean, Y[TEST[1]], rtol=1e-12)
    np.testing.assert_allclose([split.mean, split.std], [Y[TRAIN[1]].mean(), Y[TRAIN[1]].std()], rtol=1e-12)
    released = split_of(table, 1, "all")
    np.testing.assert_allclose([released.mean, released.std], [Y.mean(), Y.std()], rtol=1e-12)
    assert released.std != split.std


def test_a_constant_column_stays_finite(tmp_path: Path) -> None:
    constant = np.column_stack([X, np.full(30, 0.1)])
    split = split_of(load_table("tiny", write_npz(tmp_path, X=constant)), 0)
    assert split.x_train[:, 3].abs().max() < 1e-14 and split.x_test[:, 3].abs().max() < 1e-14


def test_folds_part_the_rows() -> None:
    folds = folds_of(11, 3, torch.Generator().manual_seed(0))
    assert sorted(map(len, folds)) == [3, 4, 4] and sorted(torch.cat(folds).tolist()) == list(range(11))
    assert torch.cat(folds).tolist() != list(range(11))


BROKEN = {
    "must hold X, y": {"y": None},
    "train_idx and test_idx": {"test_idx": None},
    "features must be": {"X": X[:-1]},
    "not finite": {"y": np.where(Y > 0, np.nan, Y)},
    "split 1 has a row twice": {"test_idx": np.stack([TEST[0], TRAIN[1][:4]])},
    "split 0 needs 10 training rows": {"train_idx": np.stack([TRAIN[0] + 20, TRAIN[1]])},
}


@pytest.mark.parametrize("message", BROKEN)
def test_an_unusable_file_is_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_table("tiny", write_npz(tmp_path, **BROKEN[message]))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="neither boston.npz or bostonHousing.npz nor a folder boston"):
        load_table("boston", tmp_path)
    (tmp_path / "tiny.npz").write_bytes(b"no archive")
    with pytest.raises(SettingsError, match="cannot read .*tiny.npz"):
        load_table("tiny", tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("index_target.txt", "9", "must name columns of data.txt"),
        ("index_train_1.txt", "0.5", "must hold whole numbers"),
        ("index_test_1.txt", None, "cannot read .*index_test_1.txt"),
        ("data.txt", "1 2\n3", "cannot read .*data.txt"),
    ],
)
def test_unusable_text_files_are_refused(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    folder = write_text(tmp_path / "tiny")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_table("tiny", tmp_path)


def test_text_without_splits_is_refused(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "tiny")
    (folder / "index_train_0.txt").unlink()
    with pytest.raises(SettingsError, match="has no split"):
        load_table("tiny", tmp_path)
