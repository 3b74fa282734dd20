"""One network under many weight vectors: one after another, or several at once where that is faster."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowrank_bdl.errors import LowRankBDLError
from lowrank_bdl.parameters.functional import FunctionalModel, is_plain_perceptron

# Measured on one thread of a CPU by benchmarks/predict_vectorized.py. Below this many products a network and batch,
# starting the operations costs more than they do, which is all that evaluating networks together saves; above it, and
# for convolutions of any size, batched products are as slow as single ones, or slower.
_MOST_PRODUCTS = 3_000_000
_CACHE_BYTES = 2 << 20  # networks whose largest layer fits in here together are evaluated at once on a CPU
_DEVICE_BYTES = 256 << 20  # likewise elsewhere, where launches are what is saved; not measured


class Masks(Protocol):
    """What keeps a network random in evaluation: dropout masks that depend on the sample and the batch."""

    def drawn(self, *, sample: int, batch: int) -> AbstractContextManager[None]:
        """Return a context in which the network's masks are those of a sample and a batch."""


class _Work:
    """Bytes in and out of a network's largest layer, and products of its linear layers, in one evaluation."""

    def __init__(self) -> None:
        self.products = 0
        self.largest_bytes = 1

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        tensors = [t for t in pytree.tree_leaves((args, output)) if isinstance(t, Tensor)]
        self.largest_bytes = max(self.largest_bytes, sum(t.nbytes for t in tensors))
        if isinstance(module, nn.Linear):
            self.products += output.numel() * module.in_features

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        handles = [module.register_forward_hook(self._record) for module in model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class SampledNetwork:
    """Evaluates a network under S weight vectors on one batch after another.

    Args:
        network: The network.
        weights: S vectors ``(D,)``, the same ones in every iteration.
        masks: Keeps dropout on; None leaves everything as the module's modes say.
        vectorize: ``True`` evaluates several weight vectors at once by ``torch.vmap``; ``"auto"`` does so for what it
            was measured to be faster for: on a CPU, small networks of linear layers without forward hooks.
        chunk_size: How many at once; None takes as many as the size of their largest layer allows, at least two.
        plain: The network is called as ``model(x)``; ``"auto"`` evaluates nothing else at once, because a function of
            the user's may keep what it sees.

    Raises:
        ValueError: If ``vectorize`` or ``chunk_size`` is wrong, or dropout is on and ``vectorize`` is True.
    """

    def __init__(
        self,
        network: FunctionalModel,
        weights: Collection[Tensor],
        *,
        masks: Masks | None = None,
        vectorize: "bool | str" = False,
        chunk_size: int | None = None,
        plain: bool = True,
    ) -> None:
        if vectorize != "auto" and not isinstance(vectorize, bool):
            raise ValueError(f"vectorize must be True, False or 'auto'; got {vectorize!r}.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
        if vectorize is True and masks is not None:
            raise ValueError("vectorize=True cannot be combined with dropout, whose masks are drawn sample by sample.")
        self._network = network
        self._weights = weights
        self._buffers: Mapping[str, Tensor] = {}
        self._masks = masks
        self._insists = vectorize is True
        self._chunk_size = chunk_size
        model, device = network.stateless.model, network.stateless.device
        self._at_once = self._insists or (
            vectorize == "auto"
            and plain
            and masks is None
            and len(weights) > 1
            and device is not None
            and device.type == "cpu"
            and is_plain_perceptron(model)
        )
        self._is_planned = self._insists and chunk_size is not None

    def set_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Give each sample buffers of its own, recalibrated batch-norm statistics for example.

        Args:
            buffers: Name to values ``(S, *shape)``.
        """
        self._buffers = buffers

    def outputs(self, number: int, batch: Any) -> Iterator[Any]:
        """Evaluate one batch.

        Args:
            number: The batch's number.
            batch: The batch.

        Yields:
            What the network returns under each weight vector in turn.

        Raises:
            LowRankBDLError: If ``vectorize`` is True and the network cannot be evaluated several times at once.

        Cost: S forward passes; at once, the memory of ``chunk_size`` of them and a copy of as many weight vectors. The
        first batch costs one forward pass more where the chunk size has to be found.
        """
        samples = iter(enumerate(self._weights))
        if self._at_once and not self._is_planned:
            self._plan(batch)
        while chunk := list(islice(samples, self._chunk_size if self._at_once else 1)):
            stacked = self._together(chunk, batch) if self._at_once else None
            for i, (s, theta) in enumerate(chunk):
                if stacked is None:
                    yield self._alone(number, s, theta, batch)
                else:
                    yield pytree.tree_map(lambda values, i=i: values[i], stacked)

    def _plan(self, batch: Any) -> None:
        """Find out, from one evaluation, how many fit together and whether the work is little enough to gain by it."""
        self._is_planned = True
        work, model = _Work(), self._network.stateless.model
        with work.recorded(model):
            self._alone(0, 0, next(iter(self._weights)), batch)
        if not self._insists and work.products > _MOST_PRODUCTS:
            self._at_once = False
        if self._chunk_size is None:
            device = self._network.stateless.device
            limit = _CACHE_BYTES if device is None or device.type == "cpu" else _DEVICE_BYTES
            self._chunk_size = min(max(limit // work.largest_bytes, 2), len(self._weights))

    def _alone(self, number: int, s: int, theta: Tensor, batch: Any) -> Any:
        with nullcontext() if self._masks is None else self._masks.drawn(sample=s, batch=number):
            return self._network(theta, batch, {name: value[s] for name, value in self._buffers.items()})

    def _together(self, chunk: list[tuple[int, Tensor]], batch: Any) -> Any:
        """Outputs with a leading axis of samples; None where the network cannot do that, from then on."""
        first, last = chunk[0][0], chunk[-1][0]
        buffers = {name: value[first : last + 1] for name, value in self._buffers.items()}
        try:
            return torch.vmap(lambda theta, own: self._network(theta, batch, own))(
                torch.stack([theta for _, theta in chunk]), buffers
            )
        except Exception as error:  # a network may fail under vmap in any way
            if self._insists:
                self._alone(0, *chunk[0], batch)  # an error of its own is raised as it is
                raise LowRankBDLError(
                    f"The network cannot be evaluated under several weight vectors at once ({error}); "
                    "pass vectorize=False."
                ) from error
            self._at_once = False
            return None
