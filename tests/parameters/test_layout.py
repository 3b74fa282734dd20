import copy
import json
import pickle

import pytest
import torch
from torch import nn

from lowrank_bdl.errors import CheckpointError, ShapeError
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.allocations import allocations
from tests.parameters.cases import MODELS, ClassToken, Tied, build


@pytest.mark.parametrize("name", MODELS)
def test_flat_vector_is_the_named_parameters_in_order(name):
    model, _ = build(name)
    layout = ParameterLayout.from_module(model)
    expected = dict(model.named_parameters())  # torch's own list counts tied parameters once
    assert layout.names == tuple(expected)
    assert layout.numel == sum(p.numel() for p in model.parameters())
    theta = layout.flatten(model)
    assert torch.equal(theta, nn.utils.parameters_to_vector(model.parameters()).detach())
    assert not theta.requires_grad
    parts = layout.unflatten(theta)
    assert list(parts) == list(expected)
    for key, part in parts.items():
        assert torch.equal(part, expected[key])
        assert part.untyped_storage().data_ptr() == theta.untyped_storage().data_ptr()
        assert torch.equal(theta[layout.slices[key]], expected[key].detach().flatten())


@pytest.mark.parametrize("name", MODELS)
def test_assign_moves_a_network_into_another(name):
    source, x = build(name, seed=0)
    target, _ = build(name, seed=1)
    layout = ParameterLayout.from_module(source)
    assert not torch.equal(target(x), source(x))
    assert layout.assign_(target, layout.flatten(source)) is None
    assert torch.equal(target(x), source(x))
    assert all(p.requires_grad for p in target.parameters())


def test_leading_sample_axes_are_kept(generator):
    layout = ParameterLayout.from_module(ClassToken())
    theta = torch.randn(2, 3, layout.numel, generator=generator)
    parts = layout.unflatten(theta)
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        assert parts[name].shape == (2, 3, *shape)
        assert torch.equal(parts[name][1, 2].flatten(), theta[1, 2, layout.slices[name]])
    assert parts["temperature"].shape == (2, 3)
    parts["token"].zero_()
    assert theta[..., layout.slices["token"]].abs().max() == 0  # a view, also under sample axes
    assert torch.equal(layout.flatten(parts), theta)
    assert layout.unflatten(theta[:0, 0])["token"].shape == (0, 1, 1, 4)
    strided = torch.randn(layout.numel, 2, generator=generator).mT
    assert torch.equal(layout.flatten(layout.unflatten(strided)), strided)


def test_unflatten_is_differentiable():
    layout = ParameterLayout.from_module(nn.Linear(3, 2))
    theta = torch.ones(8, requires_grad=True)
    layout.unflatten(theta)["bias"].sum().backward()
    assert theta.grad.tolist() == [0.0] * 6 + [1.0] * 2


def test_the_gradient_of_unflatten_costs_one_pass_whatever_the_number_of_parameters():
    layout = ParameterLayout.from_module(nn.Sequential(*(nn.Linear(3, 2) for _ in range(40))))
    theta = torch.ones(layout.numel, requires_grad=True)
    parts = layout.unflatten(theta)
    sizes, _ = allocations(lambda: sum(part.sum() for part in parts.values()).backward())
    assert sum(size for size in sizes if size > 0) < 4 * 4 * layout.numel  # 80 vectors of D otherwise
    assert bool((theta.grad == 1).all())


@pytest.mark.parametrize(
    "dtypes,expected",
    [
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_mixed_dtypes_are_promoted_and_cast_back(dtypes, expected):
    model = nn.Sequential(nn.Linear(3, 2).to(dtypes[0]), nn.Linear(2, 1).to(dtypes[1]))
    layout = ParameterLayout.from_module(model)
    theta = layout.flatten(model)
    assert layout.dtype == theta.dtype == expected
    assert layout.flatten(model, dtype=torch.float64).dtype == torch.float64
    for (name, part), dtype in zip(layout.unflatten(theta).items(), layout.dtypes, strict=True):
        parameter = model.get_parameter(name)
        assert part.dtype == dtype == parameter.dtype
        assert torch.equal(part, parameter)
    before = copy.deepcopy(model.state_dict())
    layout.assign_(model, theta)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_flatten_writes_into_out_without_another_copy():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.randn(3, 4).mT)  # not contiguous
    layout = ParameterLayout.from_module(model)
    storage = torch.full((3, layout.numel), torch.nan)
    assert layout.flatten(model, out=storage[1]).data_ptr() == storage[1].data_ptr()
    assert torch.equal(storage[1], torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert storage[0].isnan().all() and storage[2].isnan().all()
    low = torch.empty(layout.numel, dtype=torch.bfloat16)
    assert torch.equal(layout.flatten(model, out=low), storage[1].bfloat16())
    with pytest.raises(ShapeError, match=r"out must have shape \(26,\); got shape \(25,\)"):
        layout.flatten(model, out=torch.empty(25))
    with pytest.raises(ShapeError, match=r"shape \(26,\) and dtype torch.float64; got .* dtype torch.float32"):
        layout.flatten(model, out=torch.empty(26), dtype=torch.float64)


def test_only_trainable_parameters_unless_asked():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert ParameterLayout.from_module(model).names == ("1.weight", "1.bias")
    assert ParameterLayout.from_module(model, "*.weight").names == ("1.weight",)
    assert ParameterLayout.from_module(model, "*.weight", trainable_only=False).names == ("0.weight", "1.weight")
    with pytest.raises(ShapeError, match=r"No parameter .* \(Sequential\) has 4, .* keep 2, all frozen"):
        ParameterLayout.from_module(model, "0")
    with pytest.raises(ShapeError, match="has 4 and the filters keep none"):
        ParameterLayout.from_module(model, "1", exclude="1.*")
    with pytest.raises(ShapeError, match=r"\(ReLU\) has 0 and the filters keep none"):
        ParameterLayout.from_module(nn.ReLU())


def test_freezing_after_the_layout_was_made_changes_nothing():
    model = nn.Linear(3, 2)
    layout = ParameterLayout.from_module(model)
    model.requires_grad_(False)
    assert torch.equal(layout.flatten(model)[6:], model.bias)


def test_tied_weights_count_once():
    model = Tied()
    layout = ParameterLayout.from_module(model)
    assert layout.names == ("encoder.weight", "middle.weight", "middle.bias", "decoder.bias")
    assert layout.aliases == (("decoder.weight", "encoder.weight"),)
    assert layout.numel == 9 + 9 + 3 + 3
    layout.assign_(model, torch.arange(24.0))
    assert torch.equal(model.decoder.weight, torch.arange(9.0).view(3, 3))
    assert model.decoder.weight is model.encoder.weight
    assert ParameterLayout.from_module(model, "decoder").names == ("encoder.weight", "decoder.bias")


def test_a_change_of_ties_is_a_mismatch():
    tied, untied = Tied(), Tied()
    untied.decoder.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ShapeError, match="at parameter 'decoder.weight': expected it tied to 'encoder.weight', got a"):
        ParameterLayout.from_module(tied).check(untied)
    with pytest.raises(ShapeError, match="'decoder.weight': expected a parameter of its own, got one tied to 'encoder"):
        ParameterLayout.from_module(untied).check(tied)
    del untied.decoder
    with pytest.raises(ShapeError, match="'decoder.bias': expected shape"):
        ParameterLayout.from_module(tied).check(untied)
    layout = ParameterLayout.from_module(tied, "encoder")
    with pytest.raises(ShapeError, match="'decoder.weight': expected it tied .*, got no such parameter"):
        layout.check(untied)


def test_a_mismatch_names_the_first_parameter_that_differs():
    layout = ParameterLayout.from_module(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    message = r"differ first at parameter '1.weight': expected shape \(2, 4\), got \(5, 4\)\."
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    before = copy.deepcopy(other.state_dict())
    for use in (
        layout.check,
        layout.flatten,
        layout.parameters_of,
        lambda model: layout.assign_(model, torch.zeros(layout.numel)),
    ):
        with pytest.raises(ShapeError, match=message):
            use(other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())  # nothing half-written
    with pytest.raises(ShapeError, match=r"'1.weight': expected shape \(2, 4\), got no such parameter in Sequential"):
        layout.check(nn.Sequential(nn.Linear(3, 4)))
    layout.check(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)))  # a layout may be of a part
    layout.check(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half())


def test_a_wrapped_network_is_recognised_in_the_message():
    model = nn.Linear(3, 2)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    wrapped = Wrapper()
    with pytest.raises(ShapeError, match=r"It has 'module.weight': pass the wrapped network, model.module\."):
        ParameterLayout.from_module(model).check(wrapped)
    with pytest.raises(ShapeError, match="It has 'weight': the layout was made from a wrapped network"):
        ParameterLayout.from_module(wrapped).check(model)


def test_wrong_vectors_are_refused():
    model = nn.Linear(3, 2)
    layout = ParameterLayout.from_module(model)
    with pytest.raises(ShapeError, match=r"theta must have shape \(\*S, 8\); got \(2, 7\)"):
        layout.unflatten(torch.zeros(2, 7))
    with pytest.raises(ShapeError, match=r"theta must have shape \(\*S, 8\); got \(\)"):
        layout.unflatten(torch.tensor(1.0))
    with pytest.raises(ShapeError, match=r"theta must have shape \(8,\); got \(1, 8\)"):
        layout.assign_(model, torch.zeros(1, 8))
    with pytest.raises(ShapeError, match=r"'bias' of shape \(2,\) is missing from the mapping"):
        layout.flatten({"weight": torch.zeros(2, 3)})
    with pytest.raises(ShapeError, match=r"'bias' must have shape \(5, 2\); got \(4, 2\)"):
        layout.flatten({"weight": torch.zeros(5, 2, 3), "bias": torch.zeros(4, 2)})


def test_lazy_and_unsuitable_parameters_are_refused():
    with pytest.raises(ShapeError, match=r"'weight' has no shape yet \(lazy module\)"):
        ParameterLayout.from_module(nn.LazyLinear(3))
    with pytest.raises(ShapeError, match=r"'weight': expected shape \(3, 2\), got an uninitialised"):
        ParameterLayout.from_module(nn.Linear(2, 3)).check(nn.LazyLinear(3))
    with pytest.raises(ShapeError, match="'weight' must have a real floating-point dtype; got torch.complex64"):
        ParameterLayout.from_module(nn.Linear(2, 3, dtype=torch.complex64))
    quantised = nn.Linear(2, 3)
    quantised.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert "codes" not in ParameterLayout.from_module(quantised).names
    with pytest.raises(ShapeError, match="'codes' must have a real .* got torch.uint8. Exclude it"):
        ParameterLayout.from_module(quantised, trainable_only=False)


def test_subset_gives_the_coordinates_of_the_marginal(generator):
    model = Tied()
    layout = ParameterLayout.from_module(model)
    theta = torch.randn(2, layout.numel, generator=generator)
    cases = [("middle", None, slice), (None, "middle", torch.Tensor), ("decoder", None, torch.Tensor)]
    for include, exclude, kind in cases:
        small, coordinates = layout.subset(include, exclude)
        assert isinstance(coordinates, kind)
        assert small == ParameterLayout.from_module(model, include, exclude)
        marginal, whole = small.unflatten(theta[:, coordinates]), layout.unflatten(theta)
        assert all(torch.equal(marginal[name], whole[name]) for name in small.names)
    small, coordinates = layout.subset(lambda name, p: p.ndim == 2)
    assert small.names == ("encoder.weight", "middle.weight")
    assert coordinates == slice(0, 18)
    with pytest.raises(ShapeError, match="the layout has 4 and the filters keep none"):
        layout.subset("middle", exclude="middle")


def test_coordinates_belong_to_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    layout = ParameterLayout.from_module(model)
    for name, where in layout.slices.items():
        assert {layout.name_of(i) for i in range(where.start, where.stop)} == {name}
    with pytest.raises(IndexError, match=r"coordinate must be in \[0, 11\); got 11"):
        layout.name_of(11)
    with pytest.raises(IndexError, match="got -1"):
        layout.name_of(-1)


@pytest.mark.parametrize("name", MODELS)
def test_metadata_round_trip(name):
    layout = ParameterLayout.from_module(build(name)[0])
    again = ParameterLayout.from_metadata(json.loads(json.dumps(layout.to_metadata())))
    assert again == layout and hash(again) == hash(layout)
    assert layout.difference(again) is None
    assert pickle.loads(pickle.dumps(layout)) == layout


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("names", ["weight"], "contradicts itself: .* got 1 names, 2 shapes and 2 dtypes"),
        ("names", ["weight", "weight"], "distinct names; got 'weight' more than once"),
        ("names", ["weight", 3], "names must be strings"),
        ("names", [], "at least one parameter"),
        ("shapes", "12", "must be lists"),
        ("shapes", [[2, 3], [-2]], r"integers >= 0; got \[-2\]"),
        ("shapes", [[2, 3], 2], "integers >= 0; got 2"),
        ("dtypes", ["float32", "Tensor"], "name of a torch dtype; got 'Tensor'"),
        ("dtypes", ["float32", 32], "name of a torch dtype; got 32"),
        ("dtypes", ["float32", "int64"], "'bias' must have a real floating-point dtype"),
        ("aliases", [["x"]], r"pair of names; got \['x'\]"),
        ("aliases", [["x", "y"]], "Alias 'x' must point to a name of the layout; got 'y'"),
        ("aliases", [["bias", "weight"]], "got 'bias' more than once"),
        ("dtypes", None, "must be lists"),
    ],
)
def test_malformed_metadata_is_refused(field, value, message):
    metadata = {**ParameterLayout.from_module(nn.Linear(3, 2)).to_metadata(), field: value}
    with pytest.raises(CheckpointError, match=message):
        ParameterLayout.from_metadata(metadata)
    del metadata[field]
    with pytest.raises(CheckpointError, match=f"missing: '{field}'"):
        ParameterLayout.from_metadata(metadata)


def test_difference_names_the_first_parameter():
    def layout(*sizes, dtype=torch.float32):
        return ParameterLayout.from_module(nn.Sequential(*(nn.Linear(a, b, dtype=dtype) for a, b in sizes)))

    base = layout((3, 4), (4, 2))
    assert base.difference(layout((3, 4))) == "parameter '1.weight': expected shape (2, 4), got no such parameter"
    assert layout((3, 4)).difference(base) == "parameter '1.weight': not expected"
    assert base.difference(layout((3, 4), (4, 3))) == "parameter '1.weight': expected shape (2, 4), got (3, 4)"
    assert "dtype torch.float32, got torch.float64" in base.difference(layout((3, 4), (4, 2), dtype=torch.float64))
    renamed = ParameterLayout(("x", *base.names[1:]), base.shapes, base.dtypes)
    assert base.difference(renamed) == "parameter number 0: expected '0.weight', got 'x'"
    tied = ParameterLayout(base.names, base.shapes, base.dtypes, (("y", "0.weight"),))
    assert base.difference(tied) == "tied names: expected {}, got {'y': '0.weight'}"
    assert base != tied and base != renamed
