"""Which data can be read again and again in one order."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

from lowrank_bdl.curvature.data import fixed_batches
from lowrank_bdl.errors import ShapeError

X, Y = torch.arange(10.0).view(5, 2), torch.arange(5)


@pytest.mark.parametrize("data", [(X, Y), [X, Y], ({"x": X}, Y)])
def test_a_pair_is_one_batch(data):
    assert list(fixed_batches(data)) == [data]


def test_batches_stay_what_they_are():
    batches = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    assert fixed_batches(batches) is batches and fixed_batches(tuple(batches)) == tuple(batches)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    assert fixed_batches(loader) is loader


@pytest.mark.parametrize(
    "options, name",
    [
        ({"shuffle": True}, "RandomSampler"),
        ({"sampler": SubsetRandomSampler([0, 1])}, "SubsetRandomSampler"),
        ({"batch_sampler": BatchSampler(RandomSampler(Y), 2, False)}, "RandomSampler"),
    ],
)
def test_refuses_loaders_that_draw_their_order(options, name):
    loader = DataLoader(TensorDataset(X, Y), **options)
    with pytest.raises(ValueError, match=f"must read in a fixed order; got one with a {name}. Make it with shuffle"):
        fixed_batches(loader)


@pytest.mark.parametrize(
    "data, error, message",
    [
        (iter([(X, Y)]), ValueError, r"got an iterator \(list_iterator\), which can be read only once"),
        (((x, y) for x, y in [(X, Y)]), ValueError, r"got an iterator \(generator\)"),
        (X, ShapeError, r"a pair \(x, y\), a list of batches or a DataLoader; got Tensor"),
        ({"x": X}, ShapeError, "got dict"),
        (3, ShapeError, "got int"),
        ([], ShapeError, "at least one batch; got none"),
    ],
)
def test_refuses_what_can_be_read_once_or_is_no_batch(data, error, message):
    with pytest.raises(error, match=message):
        fixed_batches(data)
