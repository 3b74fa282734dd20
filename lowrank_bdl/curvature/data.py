"""Data that every product reads again: the same batches each time, or an error that says why they are not."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lowrank_bdl.errors import ShapeError

Data: TypeAlias = tuple[Any, Tensor] | Iterable[Any]

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def fixed_batches(data: Data) -> Iterable[Any]:
    """Return data as batches that can be read again and again in one order.

    Args:
        data: A pair ``(x, y)``, y a tensor, which is one batch; or a list of such pairs, a DataLoader that does not
            shuffle, or anything else that gives the same batches whenever it is iterated.

    Returns:
        The batches.

    Raises:
        ValueError: If the data are an iterator, which can be read only once, or a DataLoader that draws its order.
        ShapeError: If the data are no batches at all.

    Example:
        >>> import torch
        >>> x, y = torch.randn(5, 3), torch.arange(5)
        >>> [len(batch[1]) for batch in fixed_batches((x, y))]
        [5]
        >>> [len(batch[1]) for batch in fixed_batches(list(zip(x.split(2), y.split(2))))]
        [2, 2, 1]
    """
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        return [data]
    if isinstance(data, Iterator):
        raise ValueError(
            "every product reads the data again: they must be a pair (x, y), a list of batches or a DataLoader; "
            f"got an iterator ({type(data).__name__}), which can be read only once. Pass list(data)."
        )
    if isinstance(data, (Tensor, dict)) or not isinstance(data, Iterable):
        raise ShapeError(f"data must be a pair (x, y), a list of batches or a DataLoader; got {type(data).__name__}.")
    if isinstance(data, (tuple, list)) and not data:
        raise ShapeError("data must hold at least one batch; got none.")
    if isinstance(data, DataLoader):
        for sampler in (data.sampler, getattr(data.batch_sampler, "sampler", None)):
            if isinstance(sampler, _RANDOM_SAMPLERS):
                raise ValueError(
                    "a product must see the same batches as the last one: the DataLoader must read in a fixed order; "
                    f"got one with a {type(sampler).__name__}. Make it with shuffle=False."
                )
    return data
