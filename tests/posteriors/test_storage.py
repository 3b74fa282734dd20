"""Files of every kind of posterior: bit-exact, found by kind, and nothing but a clear error for anything else."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowrank_bdl.errors import CheckpointError
from lowrank_bdl.linalg.files import read_tensors, write_tensors
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.posteriors.blocks import BlockPosterior
from lowrank_bdl.posteriors.empirical import EmpiricalPosterior
from lowrank_bdl.posteriors.gaussian import GaussianPosterior
from lowrank_bdl.posteriors.mixture import MixturePosterior
from lowrank_bdl.posteriors.noise import relative_noise
from lowrank_bdl.posteriors.storage import StoredPosterior, load_posterior
from lowrank_bdl.posteriors.swag import SWAG
from tests.posteriors.cases import feed, iterates, network, swag_posterior

LAYOUT = ParameterLayout.from_module(network())


def narrow(blockwise=False):
    model = network()
    swag = feed(SWAG(model, 3, deviation_dtype=torch.float16, centering="final"), model, iterates(9))
    return swag.posterior(blockwise=blockwise)


def given_blocks():
    """Blocks without layouts under the layout of all, one of them fixed."""
    parts = [swag_posterior()[0].marginal("0"), swag_posterior(seed=1)[0].marginal("2.weight")]
    fixed = GaussianPosterior.diagonal(torch.ones(1).double(), torch.zeros(1).double())
    blocks = [GaussianPosterior(p.mean, p.covariance) for p in parts]
    return BlockPosterior([*blocks, fixed], LAYOUT, {"tau": 0.5})


def mixture_of_both():
    gaussian = swag_posterior()[0]
    return MixturePosterior([gaussian, given_blocks(), gaussian], [1, 2, 4], {"source": "test"})


KINDS = {
    "gaussian": lambda: swag_posterior()[0],
    "diagonal": lambda: relative_noise(iterates(1)[0], 0.1, LAYOUT),
    "blocks": given_blocks,
    "blockwise": lambda: BlockPosterior.from_joint(swag_posterior()[0]),
    "blockwise-narrow": lambda: narrow(blockwise=True),
    "blockwise-rank-1": lambda: BlockPosterior.from_joint(swag_posterior(rank=1)[0]),
    "mixture": mixture_of_both,
    "mixture-narrow": lambda: MixturePosterior([narrow(), narrow(blockwise=True)]),
    "empirical": lambda: EmpiricalPosterior(iterates(4), LAYOUT, {"source": "test"}),
    "empirical-bfloat16": lambda: EmpiricalPosterior(iterates(4).bfloat16(), LAYOUT),
}


@pytest.fixture(params=KINDS)
def posterior(request):
    return KINDS[request.param]()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "posterior.safetensors"


def test_saved_posterior_is_the_same_to_the_last_bit(posterior, path):
    posterior.save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for loaded in (load_posterior(path), load_posterior(str(path), LAYOUT), type(posterior).load(path, LAYOUT)):
        assert type(loaded) is type(posterior)
        assert loaded.layout == posterior.layout and loaded.provenance == posterior.provenance
        one, other = (p.sample(5, torch.Generator().manual_seed(0)) for p in (posterior, loaded))
        assert torch.equal(one, other)
        assert torch.equal(posterior.mean, loaded.mean) and torch.equal(posterior.stddev, loaded.stddev)
        if not isinstance(posterior, EmpiricalPosterior):
            assert torch.equal(posterior.log_prob(one), loaded.log_prob(one))
    again = path.with_name("again.safetensors")
    load_posterior(path).save(again)
    assert sorted(again.read_bytes()) == sorted(path.read_bytes())  # the order of metadata is a hash map's


def test_blockwise_swag_is_written_without_cutting_its_deviations(path):
    KINDS["blockwise"]().save(path)
    tensors, metadata = read_tensors(path, "block posterior", ["deviations"])
    assert tensors["deviations"].shape == (5, 13) and metadata["sizes"] == [6, 3, 3, 1]
    loaded = load_posterior(path)
    roots = [block.covariance.root.untyped_storage().data_ptr() for block in loaded.blocks]
    assert len(set(roots)) == 1


def test_weights_of_a_mixture_survive_to_the_last_bit(path):
    mixture = MixturePosterior([swag_posterior()[0]] * 3, [0.1, 0.2, 0.3])
    mixture.save(path)
    loaded = MixturePosterior.load(path)
    assert torch.equal(loaded.weights, mixture.weights)
    assert [loaded.component_of(s) for s in range(60)] == [mixture.component_of(s) for s in range(60)]


# ---- files that are something else ----------------------------------------------------------------------------------


def test_truncated_files(posterior, path):
    posterior.save(path)
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        for load in (load_posterior, type(posterior).load):
            with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
                load(path)


def rewrite_header(path, **changes):
    """Change entries of a file's header, leaving its tensors."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for key, value in changes.items():
        old = header["__metadata__"][key]
        header["__metadata__"][key] = value(old) if callable(value) else value
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])


def test_newer_version(posterior, path):
    posterior.save(path)
    rewrite_header(path, version="99")
    for load in (load_posterior, type(posterior).load):
        with pytest.raises(
            CheckpointError, match=r"format version 99; this library reads up to 1\. Update lowrank_bdl"
        ):
            load(path)


def test_foreign_files_and_other_kinds(posterior, path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_posterior(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is no file of lowrank_bdl; its format is None"):
        load_posterior(path)
    write_tensors(path, "training", {"a": torch.zeros(1)}, {})
    with pytest.raises(
        CheckpointError, match="holds a 'training'; expected a posterior, one of 'Bezier curve', 'block posterior', 'em"
    ):
        load_posterior(path)
    posterior.save(path)
    for other in (GaussianPosterior, BlockPosterior, MixturePosterior, EmpiricalPosterior):
        if other is not type(posterior):
            with pytest.raises(CheckpointError, match=f"holds a '{posterior.kind}'; expected a '{other.kind}'"):
                other.load(path)


def test_another_network(posterior, path):
    posterior.save(path)
    wrong = ParameterLayout.from_module(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
    with pytest.raises(CheckpointError, match=r"other parameters: parameter '2.weight': expected shape \(2, 3\), got"):
        load_posterior(path, wrong)
    half = ParameterLayout.from_module(network(torch.float16))
    assert load_posterior(path, half).layout == posterior.layout  # the same network, cast


def test_file_without_a_layout(path):
    EmpiricalPosterior(iterates(2)).save(path)
    assert load_posterior(path).layout is None
    with pytest.raises(CheckpointError, match="holds no layout to compare with"):
        load_posterior(path, LAYOUT)


def test_layout_that_does_not_fit_the_tensors(posterior, path):
    posterior.save(path)
    small = ParameterLayout.from_module(nn.Linear(3, 2)).to_metadata()
    rewrite_header(path, metadata=lambda old: json.dumps({**json.loads(old), "layout": small}))
    with pytest.raises(CheckpointError, match="posterior.safetensors contradicts itself: layout has 8 coordinates"):
        load_posterior(path)


def test_missing_and_unusable_tensors(posterior, path):
    """Each tensor in turn is left out, then holds a NaN: an error that names the file, whatever the kind."""
    posterior.save(path)
    tensors, metadata = read_tensors(path, posterior.kind, ())
    for name in tensors:
        if name.endswith("deviation_scale"):  # without one, codes of a floating dtype are plain numbers
            continue
        write_tensors(path, posterior.kind, {k: v for k, v in tensors.items() if k != name}, metadata)
        with pytest.raises(CheckpointError, match=f"posterior.safetensors .*lacks {name.split('.')[-1]}"):
            load_posterior(path)
        if tensors[name].is_floating_point() and not name.endswith("deviations"):
            damaged = tensors[name].clone()
            damaged.view(-1)[:1] = float("nan")
            write_tensors(path, posterior.kind, {**tensors, name: damaged}, metadata)
            with pytest.raises(CheckpointError, match=r"posterior.safetensors contradicts itself: .*(finite|NaN)"):
                load_posterior(path)


@pytest.mark.parametrize(
    "name,damage,message",
    [
        ("blocks", {"parts": None}, "parts must be a list of objects, got None"),
        ("blocks", {"parts": [1]}, r"parts must be a list of objects, got \[1\]"),
        ("blocks", {"parts": []}, "at least 1 block; got none"),
        ("blocks", {"parts": [{"kind": "new thing"}]}, "part of unknown kind 'new thing'; update lowrank_bdl"),
        ("blockwise", {"sizes": [6, 3]}, "sizes must be positive and sum to 13"),
        ("blockwise", {"sizes": ["6"]}, "sizes must be a list of integers"),
        ("blockwise", {"sizes": [True, 12]}, "sizes must be a list of integers"),
        ("mixture", {"parts": [{"kind": "gaussian posterior"}]}, "one for each of 1 components; got 3"),
        ("mixture", {"parts": [{"kind": "empirical posterior"}]}, r"\(its part 0\) lacks thetas"),
        ("gaussian", {"layout": {"names": ["a"]}}, "layout needs names, shapes, dtypes"),
        ("gaussian", {"layout": 3}, "layout needs names, shapes, dtypes"),
        ("gaussian", {"provenance": [1]}, "contradicts itself"),
    ],
)
def test_damaged_metadata(name, damage, message, path):
    KINDS[name]().save(path)
    rewrite_header(path, metadata=lambda old: json.dumps({**json.loads(old), **damage}))
    with pytest.raises(CheckpointError, match=message):
        load_posterior(path)


# ---- writing --------------------------------------------------------------------------------------------------------


def test_a_save_that_dies_leaves_the_old_file(posterior, path, monkeypatch):
    EmpiricalPosterior(iterates(2)).save(path)
    before = path.read_bytes()

    def die(*args, **kwargs):
        raise KeyboardInterrupt("killed")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt, match="^killed$"):
        posterior.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


class Stranger:
    """A posterior of the user's own, which has no file format."""

    layout = None
    covariance = None
    mean, stddev = torch.zeros(2), torch.ones(2)

    def sample(self, n=1, generator=None):
        return torch.zeros(n, 2)

    def log_prob(self, theta):
        return torch.zeros(theta.shape[:-1], dtype=torch.float64)

    entropy = to = sample


def test_parts_without_a_file_format_are_refused_before_anything_is_written(path):
    known = GaussianPosterior.diagonal(torch.zeros(2), torch.ones(2))
    for posterior in (MixturePosterior([known, Stranger()]), BlockPosterior([known, Stranger()])):
        assert posterior.sample(3).shape[0] == 3  # it works as long as it is not saved
        with pytest.raises(TypeError, match="part 1 of the posterior has no file format: .* got Stranger"):
            posterior.save(path)
    known.provenance["loss"] = float("nan")
    with pytest.raises(TypeError, match="metadata must be plain JSON values"):
        known.save(path)
    assert list(path.parent.iterdir()) == []


def test_a_kind_of_ones_own(path):
    """A subclass registers itself; its file is read by the same function."""

    class Point(StoredPosterior, kind="point of a test"):
        def __init__(self, theta, layout, provenance):
            self.theta, self.layout, self.provenance = theta, layout, dict(provenance)

        def to_state(self):
            return {"theta": self.theta}, {"note": 1}

        @classmethod
        def from_state(cls, tensors, metadata, layout, provenance):
            assert metadata["note"] == 1
            return cls(tensors["theta"], layout, provenance)

    Point(torch.ones(13), LAYOUT, {"a": 1}).save(path)
    found = load_posterior(path, LAYOUT)
    assert torch.equal(found.theta, torch.ones(13)) and found.provenance == {"a": 1}
