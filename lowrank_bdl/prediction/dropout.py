"""Dropout at prediction time: masks that are a function of a seed, the sample and the batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lowrank_bdl.prediction.draws import base_seed, generator_of

_MOST_SAMPLES = 1 << 16  # masks of sample s in batch b come from stream b * 2^16 + s, whatever S is


class DropoutMasks:
    """Keeps a network's dropout layers random, their masks reproducible, while everything else is in evaluation mode.

    Dropout layers are torch's (``Dropout``, ``Dropout1d`` to ``Dropout3d``, ``AlphaDropout``, ``FeatureAlphaDropout``
    and what is derived from them) with a rate above 0. They draw from torch's global generators, which are seeded for
    the length of a forward pass and put back afterwards. Torch's fused kernels for Transformer layers in evaluation
    mode never call the dropout layers inside, and are off meanwhile; the rate of attention weights is no layer, and
    stays off.

    Args:
        model: The network.
        device: Where it runs; None is the CPU.
        generator: Gives the seed; None takes it from torch's global generator.

    Raises:
        ValueError: If the model has no such layer: every sample would be the same.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval()
        >>> masks, x = DropoutMasks(net, None, torch.Generator().manual_seed(0)), torch.ones(1, 3)
        >>> with masks.switched_on():
        ...     with masks.drawn(sample=0, batch=0):
        ...         first = net(x)
        ...     with masks.drawn(sample=0, batch=0):
        ...         again = net(x)
        >>> torch.equal(first, again), net[1].training
        (True, False)
    """

    def __init__(self, model: nn.Module, device: torch.device | None, generator: torch.Generator | None = None) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.p > 0]
        if not self._layers:
            raise ValueError("dropout=True needs a model with dropout layers of a rate above 0; this one has none.")
        self._device = torch.device("cpu") if device is None else device
        self._seed = base_seed(generator)

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Put the dropout layers, and no other, into training mode for the length of a ``with`` block.

        Yields:
            None.
        """
        modes = [(layer, layer.training) for layer in self._layers]
        fused = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # else Transformer layers skip their dropout without a word
            for layer in self._layers:
                layer.training = True
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for layer, training in modes:
                layer.training = training

    @contextmanager
    def drawn(self, *, sample: int, batch: int) -> Iterator[None]:
        """Seed torch's generators for one forward pass; they go on as if it had not been.

        Args:
            sample: Number of the weight sample, below 65,536.
            batch: Number of the batch.

        Yields:
            None.
        """
        stream = batch * _MOST_SAMPLES + sample
        on_cpu = self._device.type == "cpu"
        with torch.random.fork_rng(
            devices=[] if on_cpu else [self._device], device_type="cuda" if on_cpu else self._device.type
        ):
            # set by state: manual_seed would seed every device there is, also those that are not put back
            torch.set_rng_state(generator_of(torch.device("cpu"), self._seed, stream).get_state())
            if not on_cpu:
                state = generator_of(self._device, self._seed, stream).get_state()
                torch.get_device_module(self._device).set_rng_state(state, self._device)
            yield
