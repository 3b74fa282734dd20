import copy

import pytest
import torch
from torch import nn

from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm, recalibrate_batch_norm_
from lowrank_bdl.parameters.functional import FunctionalModel
from lowrank_bdl.parameters.layout import ParameterLayout

RTOL = {torch.float64: 1e-12, torch.float32: 1e-5}


def shifted_batches(shape=(3,), sizes=(8, 8, 8, 8, 3), dtype=torch.float64):
    """Batches with means 0, 2, 4, ... and a ragged last one: most of the variance lies between them."""
    rand = torch.Generator().manual_seed(0)
    return [
        torch.randn(size, *shape, generator=rand, dtype=torch.float64).add(2 * i).to(dtype)
        for i, size in enumerate(sizes)
    ]


class TwoNorms(nn.Module):
    """conv or linear, batch norm, ReLU, linear, batch norm, with what enters each norm computed by hand beside it."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.first, self.norm1 = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.second, self.norm2 = nn.Linear(4, 2), nn.BatchNorm1d(2, momentum=None)
        self.to(dtype)

    def forward(self, x):
        return self.norm2(self.second(self.dropout(self.norm1(self.first(x)).relu())))


def inputs_by_hand(parts, batches):
    """Inputs of both norms in float64, each batch normalised by its own biased variance."""
    parts = {name: tensor.double() for name, tensor in parts.items()}
    inputs = {"norm1": [], "norm2": []}
    for x in batches:
        h = x.double() @ parts["first.weight"].T + parts["first.bias"]
        inputs["norm1"].append(h)
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * parts["norm1.weight"] + parts["norm1.bias"]
        inputs["norm2"].append(h.relu() @ parts["second.weight"].T + parts["second.bias"])
    return inputs


def problem(num_samples=3, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoNorms(dtype)
    layout = ParameterLayout.from_module(model)
    thetas = torch.randn(num_samples, layout.numel, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, layout, thetas.to(dtype)


@pytest.mark.parametrize("dtype", RTOL)
def test_statistics_are_those_of_all_elements_pooled(dtype):
    model, layout, thetas = problem(dtype=dtype)
    batches = shifted_batches(dtype=dtype)
    buffers = recalibrate_batch_norm(model, thetas, batches)
    assert sorted(buffers) == sorted(name for name, _ in model.named_buffers())
    for s, theta in enumerate(thetas):
        for layer, inputs in inputs_by_hand(layout.unflatten(theta), batches).items():
            pooled = torch.cat(inputs)
            for key, expected in {"mean": pooled.mean(0), "var": pooled.var(0, correction=1)}.items():
                actual = buffers[f"{layer}.running_{key}"][s]
                assert actual.dtype == dtype
                torch.testing.assert_close(
                    actual.double(), expected, rtol=RTOL[dtype], atol=RTOL[dtype] * expected.abs().max().item()
                )
            assert buffers[f"{layer}.num_batches_tracked"].tolist() == [5, 5, 5]


def test_shortcuts_of_other_libraries_give_something_else():
    model, layout, thetas = problem(1)
    batches = shifted_batches()
    inputs = inputs_by_hand(layout.unflatten(thetas[0]), batches)["norm1"]
    ours = recalibrate_batch_norm(model, thetas, batches)
    sizes = torch.tensor([float(len(x)) for x in inputs], dtype=torch.float64)
    within = torch.stack([x.var(0, correction=1) for x in inputs])
    size_weighted = (within * sizes[:, None]).sum(0) / sizes.sum()  # swa_gaussian: no variance between batches
    assert (ours["norm1.running_var"][0] / size_weighted).min() > 2
    equal_mean = torch.stack([x.mean(0) for x in inputs]).mean(0)  # torch.optim.swa_utils.update_bn
    gap = (ours["norm1.running_mean"][0] - equal_mean).abs() / ours["norm1.running_var"][0].sqrt()
    assert gap.max() > 0.1
    layout.assign_(model, thetas[0])
    torch.optim.swa_utils.update_bn([(x,) for x in batches], model)
    torch.testing.assert_close(model.norm1.running_mean, equal_mean)  # the stand-in above is what torch does
    torch.testing.assert_close(model.norm1.running_var, within.mean(0))


def test_how_the_data_are_cut_changes_the_first_layer_by_rounding_only():
    model, _, thetas = problem()
    whole = torch.cat(shifted_batches())
    cuts = [whole.split(35), whole.split(6), whole.split([2, 20, 13])]
    results = [recalibrate_batch_norm(model, thetas, cut) for cut in cuts]
    for other in results[1:]:
        for key in ("norm1.running_mean", "norm1.running_var"):
            torch.testing.assert_close(other[key], results[0][key], rtol=1e-12, atol=1e-12)


class CountedLoader:
    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def test_all_samples_in_one_pass_equal_one_sample_each():
    model, _, thetas = problem(4)
    loader = CountedLoader([(x, torch.zeros(len(x))) for x in shifted_batches()])
    together = recalibrate_batch_norm(model, thetas, loader)
    assert loader.passes == 1
    for s in range(4):
        alone = recalibrate_batch_norm(model, thetas[s : s + 1], loader)
        assert all(torch.equal(together[key][s], alone[key][0]) for key in together)
    as_list = recalibrate_batch_norm(model, list(thetas), iter(loader.batches))  # an iterator is enough
    assert all(torch.equal(together[key], as_list[key]) for key in together)


@pytest.mark.parametrize(
    "norm,shape",
    [
        (nn.BatchNorm1d(3), (3,)),
        (nn.BatchNorm1d(3), (3, 5)),
        (nn.BatchNorm2d(3, affine=False), (3, 4, 2)),
        (nn.BatchNorm3d(3), (3, 2, 2, 2)),
        (nn.SyncBatchNorm(3), (3, 4, 2)),
    ],
    ids=["1d", "1d-sequence", "2d-not-affine", "3d", "sync"],
)
def test_every_batch_norm(norm, shape):
    norm.double()
    batches = shifted_batches(shape)
    recalibrate_batch_norm_(norm, batches)
    pooled = torch.cat([x.transpose(0, 1).flatten(1) for x in batches], 1)
    torch.testing.assert_close(norm.running_mean, pooled.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm.running_var, pooled.var(1, correction=1), rtol=1e-12, atol=0)


class Odd(nn.Module):
    """One norm called twice, one by keyword, one never, one that tracks nothing, one registered under two names."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.twice, self.never = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.untracked = nn.BatchNorm1d(3, track_running_stats=False)
        self.also_twice = self.twice
        self.never.running_mean.fill_(7.0)
        self.never.num_batches_tracked.fill_(9)
        self.double()

    def forward(self, x):
        return self.untracked(self.twice(self.also_twice(x * self.scale) + 5))


def test_layers_called_twice_never_or_without_statistics():
    model, batches = Odd(), shifted_batches()
    layout = ParameterLayout.from_module(model, "scale")
    buffers = recalibrate_batch_norm(model, torch.ones(2, 3, dtype=torch.float64), batches, layout=layout)
    assert sorted({key.split(".")[0] for key in buffers}) == ["never", "twice"]
    assert torch.equal(buffers["never.running_mean"], torch.full((2, 3), 7.0, dtype=torch.float64))
    assert buffers["never.num_batches_tracked"].tolist() == [9, 9]
    assert buffers["twice.num_batches_tracked"].tolist() == [10, 10]
    normalised = [(x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() + 5 for x in batches]
    pooled = torch.cat([*batches, *normalised])
    torch.testing.assert_close(buffers["twice.running_mean"][1], pooled.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(buffers["twice.running_var"][1], pooled.var(0), rtol=1e-12, atol=0)


def state(model):
    return {
        "tensors": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "momentum": [getattr(module, "momentum", "none") for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_same_state(model, before, written=()):
    after = state(model)
    assert {key: after[key] for key in ("modes", "momentum", "hooks")} == {
        key: before[key] for key in ("modes", "momentum", "hooks")
    }
    changed = {key for key, value in after["tensors"].items() if not torch.equal(value, before["tensors"][key])}
    assert changed == set(written)


def test_the_model_is_not_changed():
    model, _, thetas = problem()
    model.train()
    model.norm1.eval()  # a mixture of modes
    before = state(model)
    recalibrate_batch_norm(model, thetas, shifted_batches())
    assert_same_state(model, before)


def test_dropout_is_off_and_no_random_number_is_drawn():
    model, _, thetas = problem()
    model.train()
    rng = torch.get_rng_state()
    recalibrate_batch_norm(model, thetas, shifted_batches())
    assert torch.equal(torch.get_rng_state(), rng)


def test_in_place_writes_the_statistics_and_nothing_else():
    model, layout, _ = problem()
    model.train()
    model.norm2.eval()
    expected = recalibrate_batch_norm(model, layout.flatten(model)[None], shifted_batches())
    before = state(model)
    recalibrate_batch_norm_(model, [(x, None) for x in shifted_batches()])
    assert_same_state(model, before, written=expected)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name][0])


def test_in_place_on_a_frozen_model():
    norm = nn.Sequential(nn.BatchNorm1d(3).double().requires_grad_(False))
    recalibrate_batch_norm_(norm, shifted_batches())
    torch.testing.assert_close(norm[0].running_mean, torch.cat(shifted_batches()).mean(0))


def test_predictions_with_recalibrated_statistics_match_a_network_that_holds_them():
    model, layout, thetas = problem()
    batches = shifted_batches()
    buffers = recalibrate_batch_norm(model, thetas, batches)
    other = copy.deepcopy(model)
    layout.assign_(other, thetas[1])
    recalibrate_batch_norm_(other, batches)
    f, x = FunctionalModel(model.eval()), batches[0]
    actual = f(thetas[1], x, {name: value[1] for name, value in buffers.items()})
    assert torch.equal(actual, other.eval()(x))


def test_half_precision_inputs_are_pooled_in_at_least_single():
    norm = nn.Sequential(nn.BatchNorm1d(3)).bfloat16()
    batches = shifted_batches(sizes=(100,) * 30, dtype=torch.bfloat16)
    recalibrate_batch_norm_(norm, batches)
    pooled = torch.cat(batches).double()
    assert torch.equal(norm[0].running_mean, pooled.mean(0).bfloat16())
    assert torch.equal(norm[0].running_var, pooled.var(0).bfloat16())


def test_models_without_batch_norm_do_not_read_the_loader():
    class Forbidden:
        def __iter__(self):
            raise AssertionError("the loader was read")

    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    assert recalibrate_batch_norm(model, torch.zeros(2, 14), Forbidden()) == {}
    assert recalibrate_batch_norm_(model, Forbidden()) is None


def test_dictionaries_through_call_fn():
    model, _, thetas = problem()
    batches = [{"x": x} for x in shifted_batches()]
    actual = recalibrate_batch_norm(model, thetas, batches, call_fn=lambda m, b: m(b["x"]))
    expected = recalibrate_batch_norm(model, thetas, shifted_batches())
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "batches,error,message",
    [
        ([], ShapeError, "loader must give at least one batch; got none"),
        (shifted_batches(sizes=(4, 1)), ShapeError, r"layer 'norm1' needs at least 2 values .* shape \(1, 4\)"),
        (shifted_batches(sizes=(4, 0)), ShapeError, r"layer 'norm1' needs at least 2 values .* shape \(0, 4\)"),
        ([torch.full((4, 3), torch.inf).double()], NonFiniteError, "layer 'norm1' .* running_mean for sample 0"),
        ([{"y": 1}], ShapeError, r"unless call_fn is given; .* does not take \['y'\]"),
    ],
    ids=["empty", "one-row", "no-row", "infinite", "dictionary"],
)
def test_bad_data_is_refused_and_nothing_written(batches, error, message):
    model, _, thetas = problem()
    before = state(model)
    with pytest.raises(error, match=message):
        recalibrate_batch_norm(model, thetas, batches)
    assert_same_state(model, before)
    with pytest.raises(error, match=message):
        recalibrate_batch_norm_(model, batches)
    assert_same_state(model, before)


def test_wild_weights_are_named_by_sample():
    model, _, thetas = problem()
    thetas[1] = torch.inf
    with pytest.raises(NonFiniteError, match="running_mean for sample 1"):
        recalibrate_batch_norm(model, thetas, shifted_batches())


def test_wrong_weights_are_refused():
    model, layout, _ = problem()
    with pytest.raises(ShapeError, match=rf"thetas must have shape \(S, {layout.numel}\); got \({layout.numel},\)"):
        recalibrate_batch_norm(model, torch.zeros(layout.numel), shifted_batches())
    with pytest.raises(ShapeError, match="at least one set of weights; got none"):
        recalibrate_batch_norm(model, torch.zeros(0, layout.numel), shifted_batches())


def test_lazy_layers_are_refused():
    with pytest.raises(ShapeError, match="layer '0' has no shape yet"):
        recalibrate_batch_norm_(nn.Sequential(nn.LazyBatchNorm1d(affine=False)), shifted_batches())


def test_data_are_moved_to_the_model(device):
    model, _, thetas = problem()
    expected = recalibrate_batch_norm(model, thetas, shifted_batches())
    actual = recalibrate_batch_norm(model.to(device), thetas, [(x, None) for x in shifted_batches()])
    for key, value in actual.items():
        assert value.device.type == device.type
        torch.testing.assert_close(value, expected[key].to(device), rtol=1e-10, atol=1e-12)


def test_progress_bar_only_when_asked(terminal):
    model, _, thetas = problem()
    recalibrate_batch_norm(model, thetas, shifted_batches())
    assert terminal.readouterr().err == ""
    recalibrate_batch_norm(model, thetas, shifted_batches(), progress=True)
    shown = terminal.readouterr().err
    assert "batch-norm statistics:   0%" in shown and "0/5" in shown
    assert shown.endswith("\r") and "\n" not in shown  # nothing is left on the screen
    recalibrate_batch_norm(model, thetas, shifted_batches(), fraction=0.4, progress=True)
    assert "0/2" in terminal.readouterr().err


class CountedBatches(CountedLoader):
    """Knows its length, and counts the batches it hands out."""

    handed_out = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch


@pytest.mark.parametrize("fraction,used", [(1e-6, 1), (0.2, 1), (0.21, 2), (0.6, 3), (1.0, 5)])
def test_a_fraction_is_the_first_batches_and_no_more(fraction, used):
    model, _, thetas = problem()
    loader = CountedBatches(shifted_batches())
    found = recalibrate_batch_norm(model, thetas, loader, fraction=fraction)
    assert (loader.passes, loader.handed_out) == (1, used)
    expected = recalibrate_batch_norm(model, thetas, shifted_batches()[:used])
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    other = copy.deepcopy(model)
    recalibrate_batch_norm_(model, loader, fraction=fraction)
    recalibrate_batch_norm_(other, shifted_batches()[:used])
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_a_fraction_of_whole_batches_is_not_rounded_up():
    norm = nn.Sequential(nn.BatchNorm1d(3)).double()
    recalibrate_batch_norm_(norm, [torch.randn(2, 3).double()] * 100, fraction=0.07)  # 0.07 * 100 > 7 in floats
    assert norm[0].num_batches_tracked.item() == 7


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_bad_fractions_are_refused_before_anything_is_read(fraction):
    model, _, thetas = problem()
    loader = CountedBatches(shifted_batches())
    with pytest.raises(ValueError, match=r"fraction of batches must be in \(0, 1\]; got"):
        recalibrate_batch_norm(model, thetas, loader, fraction=fraction)
    with pytest.raises(ValueError, match=r"fraction of batches must be in \(0, 1\]; got"):
        recalibrate_batch_norm_(nn.Linear(2, 2), loader, fraction=fraction)  # no batch norm, and still an error
    assert loader.passes == 0


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(6, 3).double())


def test_a_fraction_needs_a_length():
    model, _, thetas = problem()
    for loader in (iter(shifted_batches()), torch.utils.data.DataLoader(Stream(), batch_size=2)):
        with pytest.raises(TypeError, match="needs a loader that knows its length; got .* without one"):
            recalibrate_batch_norm(model, thetas, loader, fraction=0.5)
