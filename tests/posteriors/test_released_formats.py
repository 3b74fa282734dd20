"""Checkpoints in the formats of swa_gaussian and drbayes: same normals, same draws as the released formulas."""

import logging
import os

import pytest
import torch
from torch import nn

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from tests.oracles import assert_close
from tests.posteriors.cases import iterates, network

K = 4


def released_moments(thetas, rank=K):
    """Mean, mean of squares and rows in float32, updated as both repositories do; the first row is zero."""
    mean, sq_mean, rows = torch.zeros_like(thetas[0]), torch.zeros_like(thetas[0]), thetas[:0]
    for n, theta in enumerate(thetas):
        mean = mean * n / (n + 1) + theta / (n + 1)
        sq_mean = sq_mean * n / (n + 1) + theta**2 / (n + 1)
        rows = torch.cat([rows, (theta - mean)[None]])[-rank:]
    return mean, sq_mean, rows


def swa_gaussian_file(path, model, thetas, rank=K, wrap=True, deviations=True):
    layout = ParameterLayout.from_module(model, trainable_only=False)
    mean, sq_mean, rows = released_moments(thetas, rank)
    state = {"n_models": torch.tensor([len(thetas)])}
    for name, where in layout.slices.items():
        shape = layout.shapes[layout.names.index(name)]
        state[f"base.{name}_mean"] = mean[where].view(shape)
        state[f"base.{name}_sq_mean"] = sq_mean[where].view(shape)
        if deviations:
            state[f"base.{name}_cov_mat_sqrt"] = rows[:, where]
    for name, buffer in model.named_buffers():
        state[f"base.{name}"] = buffer
    torch.save({"epoch": 300, "state_dict": state} if wrap else state, path)


def drbayes_file(path, model, thetas, rank=K, deviations=True):
    mean, sq_mean, rows = released_moments(thetas, rank)
    state = {f"base_model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"mean": mean, "sq_mean": sq_mean, "n_models": torch.tensor([len(thetas)])}
    if deviations:
        state |= {"subspace.rank": torch.tensor([len(rows)]), "subspace.cov_mat_sqrt": rows}
    torch.save({"epoch": 300, "state_dict": state}, path)


FORMATS = {
    "swa_gaussian": (swa_gaussian_file, GaussianPosterior.from_swa_gaussian, 1e-30),
    "drbayes": (drbayes_file, GaussianPosterior.from_drbayes, 1e-6),
}


@pytest.fixture(params=FORMATS)
def released(request):
    return FORMATS[request.param]


def normals(rows, numel):
    """The standard normals that a posterior draws from a generator: those of the low-rank part first."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(1, rows, generator=generator)[0], torch.empty(1, numel).normal_(generator=generator)[0]


@pytest.mark.parametrize("count", [3, K, 11])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_same_normals_give_the_released_draw(released, count, scale, tmp_path):
    write, read, clamp = released
    model, thetas = network(), iterates(count)
    write(tmp_path / "swag.pt", model, thetas)
    posterior = read(tmp_path / "swag.pt", model, scale=scale, negative_variance="clamp")
    mean, sq_mean, rows = released_moments(thetas)
    z_low, z_diagonal = normals(len(rows), 13)
    variance = torch.clamp(sq_mean - mean**2, clamp)
    noise = variance.sqrt() * z_diagonal + rows.t() @ z_low / (len(rows) - 1) ** 0.5
    expected = mean + scale**0.5 * noise
    draw = posterior.sample(1, torch.Generator().manual_seed(7))[0]
    torch.testing.assert_close(draw, expected, rtol=1e-6, atol=1e-7)
    wrong_divisor = mean + scale**0.5 * (variance.sqrt() * z_diagonal + rows.t() @ z_low / max(len(rows), 1) ** 0.5)
    assert not torch.allclose(draw, wrong_divisor, rtol=1e-3)  # the comparison has power


def test_covariance_is_the_files_own_law(released, tmp_path):
    write, read, _ = released
    model, thetas = network(), iterates(11)
    write(tmp_path / "swag.pt", model, thetas)
    posterior = read(tmp_path / "swag.pt", model, scale=0.8)
    mean, sq_mean, rows = released_moments(thetas)
    variance = (sq_mean - mean**2).double()
    expected = 0.8 * (torch.diag(variance) + rows.double().mT @ rows.double() / (K - 1))
    assert_close(posterior.covariance.to_dense(), expected, torch.float32)
    assert torch.equal(posterior.mean, mean)
    assert posterior.layout == ParameterLayout.from_module(model)
    facts = {"n_averaged": 11, "rank": K, "rows": K, "scale": 0.8, "correction": 0, "negative_variances": 0}
    assert facts.items() <= posterior.provenance.items()


def test_file_without_deviations_is_diagonal(released, tmp_path):
    write, read, _ = released
    model = network()
    write(tmp_path / "swag.pt", model, iterates(11), deviations=False)
    posterior = read(tmp_path / "swag.pt", model, scale=1.0)
    assert posterior.covariance.rank == 0 and posterior.sample(2).shape == (2, 13)
    assert posterior.provenance["rows"] == 0


@pytest.mark.parametrize("include,exclude", [("2", None), ("*.weight", None), (None, "0")])
def test_subset_is_the_marginal(released, include, exclude, tmp_path):
    write, read, _ = released
    model = network()
    write(tmp_path / "swag.pt", model, iterates(11))
    part = read(tmp_path / "swag.pt", model, include=include, exclude=exclude)
    marginal = read(tmp_path / "swag.pt", model).marginal(include, exclude)
    assert part.layout == marginal.layout and torch.equal(part.mean, marginal.mean)
    assert torch.equal(part.covariance.to_dense(), marginal.covariance.to_dense())


def test_frozen_parameters_are_left_out(released, tmp_path):
    write, read, _ = released
    model = network()
    write(tmp_path / "swag.pt", model, iterates(11))
    whole = read(tmp_path / "swag.pt", model)
    model[0].weight.requires_grad_(False)
    part = read(tmp_path / "swag.pt", model)
    assert part.layout.names == ("0.bias", "2.weight", "2.bias")
    assert torch.equal(part.mean, whole.mean[6:])


def test_bare_state_dict_other_prefix_and_batch_norm_buffers(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2))
    thetas = iterates(6, model)
    swa_gaussian_file(tmp_path / "swag.pt", model, thetas, wrap=False)
    posterior = GaussianPosterior.from_swa_gaussian(tmp_path / "swag.pt", model)
    assert torch.equal(posterior.mean, released_moments(thetas)[0])
    with pytest.raises(CheckpointError, match="has parameter 'base.0.bias', which the model lacks"):
        GaussianPosterior.from_swa_gaussian(tmp_path / "swag.pt", model, prefix="")
    state = torch.load(tmp_path / "swag.pt", weights_only=True)
    torch.save({key.removeprefix("base."): value for key, value in state.items()}, tmp_path / "bare.pt")
    bare = GaussianPosterior.from_swa_gaussian(tmp_path / "bare.pt", model, prefix="")
    assert torch.equal(bare.mean, posterior.mean)


# ---- negative variances ---------------------------------------------------------------------------------------------


def cancelled(write, path):
    """A file whose variances are rounding: weights near 1 that moved by 1e-4."""
    model = network()
    thetas = iterates(20, size=1e-4)
    write(path, model, thetas)
    mean, sq_mean, rows = released_moments(thetas)
    negative = sq_mean - mean**2 < 0
    assert 2 <= int(negative.sum()) < 13
    return model, negative, rows, sq_mean - mean**2


def test_negative_variances_are_an_error_with_their_number(released, tmp_path):
    write, read, _ = released
    model, negative, _, _ = cancelled(write, tmp_path / "swag.pt")
    with pytest.raises(
        CheckpointError, match=rf"{int(negative.sum())} of 13 variances are negative .*negative_variance="
    ):
        read(tmp_path / "swag.pt", model)


def test_clamped_as_the_released_code_does(released, tmp_path, caplog):
    write, read, clamp = released
    model, negative, _, variance = cancelled(write, tmp_path / "swag.pt")
    with caplog.at_level(logging.WARNING):
        posterior = read(tmp_path / "swag.pt", model, scale=1.0, negative_variance="clamp")
    assert torch.equal(posterior.covariance.diag, variance.clamp(clamp))
    assert posterior.provenance["negative_variances"] == int(negative.sum())
    assert posterior.provenance["negative_variance"] == "clamp" and posterior.provenance["var_clamp"] == clamp
    assert f"{int(negative.sum())} of 13 variances are negative; rule: clamp" in caplog.text
    other = read(tmp_path / "swag.pt", model, scale=1.0, negative_variance="clamp", var_clamp=1e-3)
    assert torch.equal(other.covariance.diag, torch.full((13,), 1e-3))


def test_replaced_by_the_variance_of_the_deviations(released, tmp_path):
    write, read, _ = released
    model, negative, rows, variance = cancelled(write, tmp_path / "swag.pt")
    posterior = read(tmp_path / "swag.pt", model, scale=1.0, negative_variance="deviations")
    expected = torch.where(negative, rows.square().sum(0) / (K - 1), variance)
    assert torch.equal(posterior.covariance.diag, expected) and (posterior.covariance.diag >= 0).all()
    assert posterior.provenance["negative_variance"] == "deviations"


def test_no_deviations_to_replace_by(released, tmp_path):
    write, read, _ = released
    model = network()
    write(tmp_path / "swag.pt", model, iterates(20, size=1e-4), deviations=False)
    with pytest.raises(CheckpointError, match='holds 0 deviations; negative_variance="deviations" needs at least 2'):
        read(tmp_path / "swag.pt", model, negative_variance="deviations")


# ---- refusals -------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickled_code_never_runs(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 1, "state_dict": {"mean": Bomb()}}, tmp_path / "swag.pt")
    with pytest.raises(CheckpointError, match="truncated or holds more than tensors"):
        released[1](tmp_path / "swag.pt", network())
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 1, 10, 0.5, 0.99])
def test_truncated_file(released, keep, tmp_path):
    write, read, _ = released
    write(tmp_path / "swag.pt", network(), iterates(5))
    content = (tmp_path / "swag.pt").read_bytes()
    (tmp_path / "swag.pt").write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError, match="truncated or holds more than tensors"):
        read(tmp_path / "swag.pt", network())


def test_file_from_before_torch_1_6(released, tmp_path):
    write, read, _ = released
    write(tmp_path / "swag.pt", network(), iterates(5))
    content = torch.load(tmp_path / "swag.pt", weights_only=True)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    new, old = (read(tmp_path / name, network()) for name in ("swag.pt", "old.pt"))
    assert torch.equal(new.covariance.to_dense(), old.covariance.to_dense())


def change(path, **changes):
    content = torch.load(path, weights_only=True)
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del content["state_dict"][key]
        else:
            content["state_dict"][key] = value
    torch.save(content, path)


@pytest.mark.parametrize(
    "name,changes,message",
    [
        ("swa_gaussian", {"base__2.bias_mean": None}, "lacks 'base.2.bias_mean' of shape"),
        ("swa_gaussian", {"base__2.bias_sq_mean": torch.ones(2)}, r"'base.2.bias_sq_mean' must have shape \(1,\); got"),
        ("swa_gaussian", {"base__2.bias_cov_mat_sqrt": torch.ones(2, 1)}, r"must have shape \(4, 1\); got \(2, 1\)"),
        ("swa_gaussian", {"base__0.bias_mean": torch.full((3,), float("nan"))}, "must be finite; got NaN"),
        ("swa_gaussian", {"base__9.bias_sq_mean": torch.ones(1)}, "has parameter 'base.9.bias', which the model lacks"),
        ("swa_gaussian", {"n_models": None}, "lacks 'n_models'"),
        ("drbayes", {"mean": torch.ones(14)}, r"'mean' must have shape \(13,\); got \(14,\)"),
        ("drbayes", {"sq_mean": None}, "lacks 'sq_mean'"),
        ("drbayes", {"subspace__cov_mat_sqrt": torch.ones(3, 12)}, r"must have shape \(3, 13\); got \(3, 12\)"),
        ("drbayes", {"subspace__cov_mat_sqrt": torch.full((2, 13), float("inf"))}, "must be finite"),
        ("drbayes", {"n_models": torch.tensor([1])}, "averages 1 models; a posterior needs at least 2"),
    ],
)
def test_damaged_file(name, changes, message, tmp_path):
    write, read, _ = FORMATS[name]
    write(tmp_path / "swag.pt", network(), iterates(5))
    change(tmp_path / "swag.pt", **changes)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "swag.pt", network())


def test_arguments(released, tmp_path):
    write, read, _ = released
    write(tmp_path / "swag.pt", network(), iterates(5))
    with pytest.raises(ValueError, match="negative_variance must be one of error, clamp, deviations; got 'drop'"):
        read(tmp_path / "swag.pt", network(), negative_variance="drop")
    with pytest.raises(ValueError, match="scale must be a positive number; got 0"):
        read(tmp_path / "swag.pt", network(), scale=0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "nowhere.pt", network())
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="must hold a state dict or {epoch, state_dict}; got list"):
        read(tmp_path / "list.pt", network())


def test_imported_posterior_is_saved_with_its_record(released, tmp_path):
    write, read, _ = released
    write(tmp_path / "swag.pt", network(), iterates(9))
    posterior = read(tmp_path / "swag.pt", network())
    posterior.save(tmp_path / "p.safetensors")
    loaded = GaussianPosterior.load(tmp_path / "p.safetensors")
    assert loaded.provenance == posterior.provenance and loaded.provenance["source"] in FORMATS
    assert torch.equal(loaded.covariance.to_dense(), posterior.covariance.to_dense())


@pytest.mark.parametrize(
    ("count", "kept", "given"), [(10, 100, 100), (3, 4, 4), (4, 4, None), (11, 4, None), (11, 4, 4)]
)
def test_the_divisor_is_that_of_the_released_code(count, kept, given, tmp_path):
    """It divides by max_num_models - 1 in every draw, however few of its rows are filled."""
    model, thetas = network(), iterates(count)
    swa_gaussian_file(tmp_path / "swag.pt", model, thetas, kept)
    posterior = GaussianPosterior.from_swa_gaussian(
        tmp_path / "swag.pt", model, negative_variance="clamp", max_num_models=given
    )
    mean, sq_mean, rows = released_moments(thetas.double(), kept)
    expected = 0.5 * (torch.diag((sq_mean - mean**2).clamp(1e-30)) + rows.t() @ rows / (kept - 1))
    torch.testing.assert_close(posterior.covariance.to_dense().double(), expected, rtol=1e-4, atol=1e-6)
    assert posterior.provenance["divisor"] == kept - 1


def test_an_unknown_window_is_said(tmp_path, caplog):
    """As many rows as models: the collector may have been made for more."""
    model = network()
    swa_gaussian_file(tmp_path / "swag.pt", model, iterates(3), 3)
    with caplog.at_level(logging.WARNING):
        GaussianPosterior.from_swa_gaussian(tmp_path / "swag.pt", model, negative_variance="clamp")
        assert "Give max_num_models= if it was another" in caplog.text
        caplog.clear()
        GaussianPosterior.from_swa_gaussian(tmp_path / "swag.pt", model, negative_variance="clamp", max_num_models=3)
        assert "max_num_models" not in caplog.text


@pytest.mark.parametrize(("count", "kept", "given"), [(6, 4, 3), (6, 4, 20)])
def test_a_window_that_cannot_be(count, kept, given, tmp_path):
    """More rows than it could have, or fewer although more models were averaged."""
    model = network()
    swa_gaussian_file(tmp_path / "swag.pt", model, iterates(count), kept)
    with pytest.raises(CheckpointError, match=f"holds 4 deviations of 6 models, which max_num_models={given}"):
        GaussianPosterior.from_swa_gaussian(tmp_path / "swag.pt", model, max_num_models=given)
