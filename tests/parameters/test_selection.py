import re

import pytest
import torch

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.parameters.selection import select

NAMES = ["body.0.weight", "body.0.bias", "body.10.weight", "head.weight", "head.bias", "header.weight"]
GROUPS = {name: (name,) for name in NAMES}
TENSORS = {name: torch.empty(2, 2) if name.endswith("weight") else torch.empty(2) for name in NAMES}


@pytest.mark.parametrize(
    "include,exclude,expected",
    [
        (None, None, NAMES),
        ("*.bias", None, ["body.0.bias", "head.bias"]),
        ("head", None, ["head.weight", "head.bias"]),  # a module, not every name that starts so
        ("head*", None, ["head.weight", "head.bias", "header.weight"]),
        ("body.?.weight", None, ["body.0.weight"]),
        ("re:^body\\.\\d\\d", None, ["body.10.weight"]),
        (re.compile(r"\.0\."), None, ["body.0.weight", "body.0.bias"]),
        (["head", re.compile("10")], "*.bias", ["body.10.weight", "head.weight"]),
        (("header", "head.bias"), None, ["head.bias", "header.weight"]),  # the model's order, not the list's
        (None, ["body", "absent"], ["head.weight", "head.bias", "header.weight"]),
        (lambda name, p: p.ndim == 1, None, ["body.0.bias", "head.bias"]),
        (None, lambda name, p: name.startswith("h"), ["body.0.weight", "body.0.bias", "body.10.weight"]),
        ("head", "head", []),
    ],
)
def test_selection_by_pattern_and_predicate(include, exclude, expected):
    assert select(GROUPS, TENSORS, include, exclude) == expected


def test_a_tied_parameter_is_chosen_by_any_of_its_names():
    groups = {"encoder.weight": ("encoder.weight", "decoder.weight"), "bias": ("bias",)}
    tensors = {name: torch.empty(1) for name in groups}
    assert select(groups, tensors, "decoder", None) == ["encoder.weight"]
    assert select(groups, tensors, None, "decoder") == ["bias"]
    assert select(groups, tensors, lambda name, p: name.startswith("dec"), None) == ["encoder.weight"]


def test_a_misspelt_include_is_refused():
    with pytest.raises(ShapeError, match=r"'haed' matches none of the 6 parameters \(body.0.weight, .*, \.\.\.\)"):
        select(GROUPS, TENSORS, ["head", "haed"], None)
    with pytest.raises(ShapeError, match="'h.aed' matches none"):
        select(GROUPS, TENSORS, re.compile("h.aed"), None)


def test_a_selector_of_another_type_is_refused():
    with pytest.raises(TypeError, match="include must be a pattern, .* entry of type int"):
        select(GROUPS, TENSORS, [3], None)
    with pytest.raises(TypeError, match="exclude must be a pattern"):
        select(GROUPS, TENSORS, None, [None])
