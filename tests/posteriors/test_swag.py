"""The collector: its law against the definition in float64, its state, and what it refuses."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from lowrank_bdl.errors import MemoryLimitError, NonFiniteError, ShapeError, StaleError
from lowrank_bdl.linalg import memory
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.swag import SWAG
from tests.oracles import assert_close
from tests.parameters.cases import MODELS, build
from tests.posteriors.cases import dense_swag, feed, iterates, network

K = 5


def collected(count=12, rank=K, dtype=torch.float32, **options):
    model = network(dtype)
    thetas = iterates(count, dtype=dtype)
    return feed(SWAG(model, rank, **options), model, thetas), thetas


def states_equal(a, b):
    first, second = a.state_dict(), b.state_dict()
    same = [torch.equal(first[k].reshape(-1).view(torch.uint8), second[k].reshape(-1).view(torch.uint8)) for k in first]
    return first.keys() == second.keys() and all(same)


# ---- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("rank", [0, 1, 2, K, 20])
@pytest.mark.parametrize("count", [2, 3, K, K + 1, K + 2, 13])
def test_posterior_is_the_definition(count, rank, centering, dtype):
    """Before, at and after the point where the window is full, and where the unstored first iterate leaves it."""
    swag, thetas = collected(count, rank, dtype, centering=centering)
    posterior = swag.posterior()
    mean, covariance = dense_swag(thetas, rank, centering=centering)
    assert_close(posterior.mean, mean, dtype)
    assert_close(posterior.covariance.to_dense(), covariance, dtype)
    assert posterior.covariance.dtype == dtype and posterior.provenance["rows"] == min(count, rank)


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("rank", range(K + 1))
@pytest.mark.parametrize("count", [3, K, K + 1, 8, 9, 11])
def test_smaller_rank_keeps_the_newest_rows(count, rank, centering):
    """Every position of the ring's seam, and no K x D copy."""
    swag, thetas = collected(count, K, torch.float64, centering=centering)
    posterior = swag.posterior(scale=1.3, rank=rank)
    expected = dense_swag(thetas, rank, 1.3, centering)[1]
    assert_close(posterior.covariance.to_dense(), expected)
    assert posterior.covariance.root.untyped_storage().data_ptr() == swag.storage.untyped_storage().data_ptr()


def test_published_special_cases():
    swag, thetas = collected(9)
    assert_close(swag.mean, thetas.double().mean(0), torch.float32)
    assert_close(swag.variance, thetas.double().var(0), torch.float32)
    diagonal = swag.posterior(scale=1.0, rank=0).covariance
    assert diagonal.rank == 0
    assert_close(diagonal.to_dense(), torch.diag(thetas.double().var(0)), torch.float32)
    population, _ = collected(9, correction=0)
    assert_close(population.variance, thetas.double().var(0, correction=0), torch.float32)
    assert_close(
        population.posterior(0.7).covariance.to_dense(), dense_swag(thetas, K, 0.7, correction=0)[1], torch.float32
    )


def test_deviations_are_from_the_running_mean_oldest_first():
    swag, thetas = collected(9)
    means = thetas.double().cumsum(0) / torch.arange(1, 10)[:, None]
    assert swag.deviations.shape == (K, 13)
    assert_close(swag.deviations, (thetas.double() - means)[-K:], torch.float32)


def test_first_deviation_is_zero_and_not_stored():
    swag, _ = collected(1)
    assert swag.deviations.shape == (0, 13) and swag.n_averaged == 1
    swag, _ = collected(3)
    assert swag.deviations.shape == (2, 13) and swag.posterior().provenance["rows"] == 3


def test_tiny_variances_of_large_weights():
    """Weights near 1 with standard deviation 1e-4, 40 iterates: the case that E[x²] − E[x]² loses."""
    model = nn.Linear(100, 30, bias=False)
    generator = torch.Generator().manual_seed(0)
    thetas = (1 + 1e-4 * torch.randn(40, 3000, generator=generator, dtype=torch.float64)).float()
    swag = feed(SWAG(model, 20), model, thetas)
    expected = thetas.double().var(0)
    assert ((swag.variance.double() - expected).abs() / expected).max() < 1e-5


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_narrow_deviations(stored):
    swag, thetas = collected(11, deviation_dtype=stored)
    wide, _ = collected(11)
    assert swag.storage.dtype == stored and swag.deviations.dtype != torch.int8
    assert torch.equal(swag.variance, wide.variance)  # the moments do not depend on it
    covariance = swag.posterior().covariance
    dense = swag.deviations.double()
    expected = 0.5 * (torch.diag(thetas.double().var(0)) + dense.mT @ dense / (K - 1))
    assert_close(covariance.to_dense(), expected, torch.float32)
    error = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float8_e4m3fn: 2**-4, torch.int8: 1 / 127}[stored]
    assert ((dense - wide.deviations).abs() <= error * wide.deviations.abs().amax(1, keepdim=True)).all()


def test_narrow_deviations_of_part_of_the_window_and_final_centering():
    swag, thetas = collected(12, deviation_dtype=torch.float16, centering="final")
    for rank in range(1, K + 1):
        actual = swag.posterior(rank=rank).covariance.to_dense()
        expected = dense_swag(thetas, rank, centering="final")[1]
        assert (actual - expected).abs().max() <= 2**-9 * expected.abs().max()


# ---- any module, and nothing of it changed --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_module(name):
    model, x = build(name)
    thetas = iterates(4, model)
    swag = feed(SWAG(model, 3), model, thetas)
    assert_close(swag.mean, thetas.double().mean(0), torch.float32)
    averaged = swag.to_averaged_model(model)
    torch.testing.assert_close(swag.layout.flatten(averaged.module), swag.mean, rtol=0, atol=0)
    out = averaged.module(x)
    assert out.isfinite().all()


def test_model_is_untouched():
    model, x = build("conv")
    before = copy.deepcopy(model.state_dict())
    swag = SWAG(model, 2)
    for _ in range(3):
        swag.update_parameters(model)
    swag.posterior().sample(2)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert list(swag.parameters()) == []


def test_include_and_exclude():
    model = network()
    swag = SWAG(model, 2, include="2", exclude="*.bias")
    assert swag.layout.names == ("2.weight",)
    for i in range(3):
        with torch.no_grad():
            model[2].weight.fill_(float(i))
        swag.update_parameters(model)
    assert torch.equal(swag.mean, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(dtype):
    model = network(dtype)
    thetas = iterates(8, dtype=dtype)
    swag = feed(SWAG(model, K), model, thetas)
    assert swag.mean.dtype == torch.float32
    assert_close(swag.posterior().covariance.to_dense(), dense_swag(thetas, K)[1], torch.float32)


# ---- sharing --------------------------------------------------------------------------------------------------------

USES = {
    "sample": lambda p: p.sample(2),
    "rsample": lambda p: p.rsample(2),
    "log_prob": lambda p: p.log_prob(torch.zeros(13)),
    "entropy": lambda p: p.entropy(),
    "mean": lambda p: p.mean,
    "stddev": lambda p: p.stddev,
    "covariance": lambda p: p.covariance,
    "distribution": lambda p: p.distribution,
    "marginal": lambda p: p.marginal("0"),
    "to": lambda p: p.to(torch.float64),
    "save": lambda p: p.save("never-written.safetensors"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("collector_rank,rank", [(K, None), (K, 2), (K, 0), (0, None)])
def test_shared_posterior_is_stale_after_an_update(use, collector_rank, rank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network()
    swag = feed(SWAG(model, collector_rank), model, iterates(8))
    posterior = swag.posterior(rank=rank)
    USES[use](posterior)
    (tmp_path / "never-written.safetensors").unlink(missing_ok=True)
    swag.update_parameters(model)
    with pytest.raises(StaleError, match=r"collector was updated.*copy=True"):
        USES[use](posterior)
    assert list(tmp_path.iterdir()) == []


def test_distribution_and_marginal_made_earlier_are_stale_too():
    model = network()
    swag = feed(SWAG(model, K), model, iterates(8))
    posterior = swag.posterior()
    distribution, marginal = posterior.distribution, posterior.marginal("0")
    swag.update_parameters(model)
    with pytest.raises(StaleError, match="collector was updated"):
        distribution.sample()
    with pytest.raises(StaleError, match="collector was updated"):
        marginal.sample()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [3, 9])
def test_copied_posterior_stays_as_it_was(stored, count):
    model = network()
    swag = feed(SWAG(model, K, deviation_dtype=stored), model, iterates(count))
    shared = swag.posterior().covariance.to_dense()
    posterior = swag.posterior(copy=True)
    swag.update_parameters(model)
    assert torch.equal(posterior.covariance.to_dense(), shared)
    assert posterior.covariance.root.shape[-1] == min(count - 1, K)


def test_refused_update_leaves_a_shared_posterior_valid():
    model = network()
    swag = feed(SWAG(model, K), model, iterates(8))
    posterior = swag.posterior()
    with torch.no_grad():
        model[0].bias[1] = float("nan")
    with pytest.raises(NonFiniteError, match="0.bias"):
        swag.update_parameters(model)
    assert posterior.sample(1).shape == (1, 13)


def test_collecting_in_inference_mode():
    model = network()
    with torch.inference_mode():
        swag = feed(SWAG(model, K), model, iterates(8))
        posterior = swag.posterior()
        swag.update_parameters(model)
        with pytest.raises(StaleError, match="collector was updated"):
            posterior.sample(1)


# ---- state ----------------------------------------------------------------------------------------------------------


class Trainer(nn.Module):
    """A training module that owns a network and its collector."""

    def __init__(self, rank=K, **options):
        super().__init__()
        self.network = network()
        self.collector = SWAG(self.network, rank, **options)


def run(trainer, thetas):
    feed(trainer.collector, trainer.network, thetas)
    return trainer


@pytest.mark.parametrize("through", ["memory", "torch.save", "safetensors", "assign"])
@pytest.mark.parametrize("stop", [0, 1, 3, 8])
@pytest.mark.parametrize("stored", [None, torch.float16, torch.bfloat16], ids=str)
def test_resuming_inside_a_parent_module_is_bit_exact(through, stop, stored, tmp_path):
    thetas = iterates(11)
    whole = run(Trainer(deviation_dtype=stored), thetas)
    state = run(Trainer(deviation_dtype=stored), thetas[:stop]).state_dict()
    if through == "torch.save":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    elif through == "safetensors":
        save_file(state, tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors")
    resumed = Trainer(deviation_dtype=stored)
    resumed.load_state_dict(state, assign=through == "assign")
    assert resumed.collector.n_averaged == stop
    run(resumed, thetas[stop:])
    assert states_equal(whole.collector, resumed.collector)
    one, other = (t.collector.posterior().sample(3, torch.Generator().manual_seed(1)) for t in (whole, resumed))
    assert torch.equal(one, other)


def test_loading_makes_a_shared_posterior_stale():
    model = network()
    swag = feed(SWAG(model, K), model, iterates(8))
    state, posterior = copy.deepcopy(swag.state_dict()), swag.posterior()
    swag.load_state_dict(state)
    with pytest.raises(StaleError, match="collector was updated"):
        posterior.sample(1)


@pytest.mark.parametrize(
    "other,message",
    [
        (lambda: SWAG(network(), 3), r"storage: expected \(5, 13\) torch.float32, got \(3, 13\)"),
        (lambda: SWAG(network(), K, deviation_dtype=torch.bfloat16), "got .* torch.bfloat16; the collector is unch"),
        (lambda: SWAG(nn.Linear(12, 1), K), "other names or shapes"),
        (lambda: SWAG(network(torch.float64), K), "shift: expected .* torch.float32, got .* torch.float64"),
    ],
)
def test_foreign_state_is_refused_whole(other, message):
    swag, _ = collected()
    before = copy.deepcopy(swag)
    with pytest.raises(RuntimeError, match=message):
        swag.load_state_dict(other().state_dict())
    assert states_equal(swag, before)


def test_incomplete_state_is_refused_whole():
    swag, _ = collected()
    before = copy.deepcopy(swag)
    state = SWAG(network(), K).state_dict()
    del state["sum_sq"]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="missing sum_sq; the collector is unchanged"):
            swag.load_state_dict(state, strict=strict)
    assert states_equal(swag, before)
    assert swag.load_state_dict({}, strict=False).missing_keys == list(swag.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        swag.load_state_dict({})


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
def test_casting_a_parent_leaves_the_collector(cast, stored):
    trainer = run(Trainer(deviation_dtype=stored), iterates(8))
    before = copy.deepcopy(trainer.collector)
    posterior = trainer.collector.posterior()
    getattr(trainer, cast)()
    assert next(trainer.network.parameters()).dtype == getattr(torch, {"half": "float16"}.get(cast, cast))
    assert states_equal(trainer.collector, before)
    assert posterior.sample(1).isfinite().all()
    run(trainer, iterates(2).to(torch.float32))
    assert trainer.collector.n_averaged == 10


def test_device_moves_are_followed_and_their_dtype_is_not():
    swag, _ = collected(8, deviation_dtype=torch.bfloat16)
    swag.to("meta", torch.float16)
    assert swag.shift.device.type == swag.storage.device.type == "meta"
    assert swag.shift.dtype == torch.float32 and swag.storage.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_moving_to_cuda_keeps_collecting():
    model = network()
    thetas = iterates(9)
    swag = feed(SWAG(model, K), model, thetas[:4]).to("cuda", torch.float16)
    swag = feed(swag, model.to("cuda"), thetas[4:].to("cuda"))
    assert_close(swag.posterior().covariance.to_dense().to("cpu"), dense_swag(thetas, K)[1], torch.float32)


def test_deepcopy_is_independent():
    swag, thetas = collected(4)
    twin = copy.deepcopy(swag)
    feed(twin, network(), thetas[:1])
    assert (swag.n_averaged, twin.n_averaged) == (4, 5)


# ---- AveragedModel --------------------------------------------------------------------------------------------------


def test_same_mean_as_averaged_model():
    model = network()
    swag, averaged = SWAG(model, K), AveragedModel(model)
    for theta in iterates(10):
        swag.layout.assign_(model, theta)
        swag.update_parameters(model)
        averaged.update_parameters(model)
    torch.testing.assert_close(swag.layout.flatten(averaged.module), swag.mean, rtol=1e-6, atol=0)


def test_exported_average_continues():
    model = network()
    thetas = iterates(9)
    swag = feed(SWAG(model, K), model, thetas[:6])
    averaged = swag.to_averaged_model(model)
    assert int(averaged.n_averaged) == 6 and type(averaged) is AveragedModel
    for theta in thetas[6:]:
        swag.layout.assign_(model, theta)
        averaged.update_parameters(model)
    torch.testing.assert_close(swag.layout.flatten(averaged.module), thetas.mean(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("seen", [2, K, 9])
def test_started_from_an_averaged_model(seen, centering):
    """The mean counts the earlier averages; variance, rows and deviations only what the collector saw."""
    model = network(torch.float64)
    thetas = iterates(4 + seen, dtype=torch.float64)
    averaged = AveragedModel(model)
    layout = ParameterLayout.from_module(model)
    for theta in thetas[:4]:
        layout.assign_(model, theta)
        averaged.update_parameters(model)
    swag = SWAG.from_averaged_model(averaged, rank=K, centering=centering)
    assert swag.n_averaged == 4
    torch.testing.assert_close(swag.mean, thetas[:4].mean(0), rtol=1e-14, atol=0)
    feed(swag, model, thetas[4:])
    rows = min(seen, K)
    means = thetas.cumsum(0) / torch.arange(1, 5 + seen)[:, None]
    deviations = (thetas - (means if centering == "running" else means[-1]))[-rows:]
    expected = 0.5 * (torch.diag(thetas[4:].var(0)) + deviations.mT @ deviations / (rows - 1))
    posterior = swag.posterior()
    assert swag.n_averaged == 4 + seen and posterior.provenance["n_seen"] == seen
    assert_close(posterior.mean, means[-1])
    assert_close(posterior.covariance.to_dense(), expected)


def test_started_from_an_averaged_model_without_averages():
    model = network()
    swag = SWAG.from_averaged_model(AveragedModel(model), rank=K, include="0", deviation_dtype=torch.bfloat16)
    assert swag.n_averaged == 0 and swag.layout.names == ("0.weight", "0.bias")
    feed(swag, model, iterates(3)[:, :9])
    assert swag.n_averaged == 3 and swag.storage.dtype == torch.bfloat16


def test_averaged_model_that_diverged_is_refused():
    averaged = AveragedModel(network())
    averaged.n_averaged.fill_(3)
    with torch.no_grad():
        averaged.module[0].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="'0.weight' has inf"):
        SWAG.from_averaged_model(averaged)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("count", [0, 1, 8])
def test_unusable_iterate_is_named_and_changes_nothing(bad, count):
    model = network()
    swag = feed(SWAG(model, K), model, iterates(8)[:count])
    before = copy.deepcopy(swag)
    with torch.no_grad():
        model[2].weight[0, 1] = bad
    with pytest.raises(NonFiniteError, match=r"parameter '2.weight' has .* at flat index 1. The collector is unchang"):
        swag.update_parameters(model)
    assert states_equal(swag, before)


def test_model_of_another_layout_is_refused():
    swag, _ = collected(3)
    before = copy.deepcopy(swag)
    wrong = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ShapeError, match=r"first at parameter '2.weight': expected shape \(1, 3\), got \(2, 3\)"):
        swag.update_parameters(wrong)
    with pytest.raises(ShapeError, match="pass the wrapped network, model.module"):
        swag.update_parameters(nn.ModuleDict({"module": network()}))
    with pytest.raises(ShapeError, match="'2.weight'"):
        swag.to_averaged_model(wrong)
    assert states_equal(swag, before)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_must_be_positive(scale):
    swag, _ = collected(4)
    with pytest.raises(ValueError, match=r"scale must be a positive number; got .*use swag.mean"):
        swag.posterior(scale=scale)


def test_error_messages():
    with pytest.raises(ValueError, match="rank must be >= 0; got -1"):
        SWAG(network(), -1)
    with pytest.raises(ValueError, match="centering must be one of running, final; got 'mean'"):
        SWAG(network(), centering="mean")
    with pytest.raises(ValueError, match="correction must be 0 or 1; got 2"):
        SWAG(network(), correction=2)
    with pytest.raises(ValueError, match="storage dtype must be .*; got torch.int16"):
        SWAG(network(), deviation_dtype=torch.int16)
    swag = SWAG(network(), 3)
    with pytest.raises(ValueError, match="mean needs at least 1 snapshot; got 0"):
        _ = swag.mean
    with pytest.raises(ValueError, match="at least 1 snapshot"):
        swag.to_averaged_model(network())
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"a posterior needs at least 2 snapshots; got {count}"):
            swag.posterior()
        swag.update_parameters(network())
    with pytest.raises(ValueError, match="rank must be >= 0; got -2"):
        swag.posterior(rank=-2)
    with pytest.raises(ValueError, match="rank must be at most 3, the deviations that this collector keeps; got 4"):
        swag.posterior(rank=4)


def test_one_snapshot_of_an_averaged_model_is_not_enough():
    averaged = AveragedModel(network())
    averaged.update_parameters(network())
    swag = SWAG.from_averaged_model(averaged)
    swag.update_parameters(network())
    with pytest.raises(ValueError, match="a posterior needs at least 2 snapshots; got 1"):
        swag.posterior()


def test_too_large_a_collector_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**30)
    model = nn.Linear(1000, 1000)
    with pytest.raises(MemoryLimitError, match=r"SWAG of rank 1000 over 1,001,000 parameters needs 3\.74 GiB on cpu"):
        SWAG(model, 1000)
    assert SWAG(model, 100).rank == 100


def test_repr_says_what_was_collected():
    swag, _ = collected(4)
    assert "numel=13, rank=5, n_averaged=4, centering='running'" in repr(swag)


@pytest.mark.parametrize(
    "options",
    [
        {"avg_fn": get_ema_avg_fn(0.9)},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.999)},
        {"avg_fn": get_ema_avg_fn(0.5)},  # its second weight is that of an equal average
        {"avg_fn": lambda average, value, number: value},
    ],
)
def test_no_average_but_an_equal_one_is_continued(options):
    """The weight of the next iterate tells: exponential averages and homemade functions are refused by it."""
    averaged = AveragedModel(network(), **options)
    averaged.update_parameters(network())
    with pytest.raises(ValueError, match="must be an equal average, which gives iterate"):
        SWAG.from_averaged_model(averaged)


@pytest.mark.parametrize(
    "options",
    [
        {"avg_fn": get_swa_avg_fn()},
        {"multi_avg_fn": get_swa_multi_avg_fn()},
        {"avg_fn": lambda average, value, number: (average * number + value) / (number + 1)},
    ],
)
def test_an_equal_average_by_another_name(options):
    """Functions that do what the default does are continued."""
    averaged = AveragedModel(network(), **options)
    for _ in range(2):
        averaged.update_parameters(network())
    assert SWAG.from_averaged_model(averaged).n_averaged == 2
