"""Vectors through a retained graph: blocks of products that share one forward pass.

A product with the Hessian is a backward pass through the graph of the gradient (Pearlmutter, "Fast exact multiplication
by the Hessian", 1994); one with the Jacobian is a backward pass through the graph of its transposed product, which is
linear in the vector that it multiplies. The former takes some half of the time of forward-mode differentiation of a
gradient.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowrank_bdl.linalg.memory import available_memory
from lowrank_bdl.parameters.differentiable_operations import DifferentiableOperations
from lowrank_bdl.parameters.wrappers import uncompiled

_CACHE_BYTES = 2 << 20
"""On a CPU, vectors go through together while what they make fits in a cache: measured, small networks gain up to two
times, large ones lose a little."""
_GRAPH_FACTOR = 3
"""Bytes of a vector's way back over bytes that a forward pass saves: forward, backward and what is in between."""


class Backward:
    """Backward passes with several vectors at once by ``vmap``, or one by one where an operation cannot do that.

    Attributes:
        vectorize: Whether several go at once; False from the first failure on.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> Backward()([x**2], [x], [torch.eye(2)])
        [tensor([[2., 0.],
                [0., 4.]])]
    """

    def __init__(self) -> None:
        self.vectorize = True

    def __call__(
        self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], vectors: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return the transposed Jacobian of the outputs times each vector; the graph stays.

        Args:
            outputs: Of any shapes; None, or without a graph, where nothing depends on the inputs.
            inputs: What to differentiate by.
            vectors: For each output ``(c, *shape)``, c vectors; None for zeros.

        Returns:
            For each input ``(c, *shape)``, or None for zeros.
        """
        pairs = [
            (output, vector)
            for output, vector in zip(outputs, vectors, strict=True)
            if output is not None and vector is not None and output.requires_grad
        ]
        if not pairs:
            return [None] * len(inputs)
        heads, blocks = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

        def grad(tails: Sequence[Tensor], batched: bool = False) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                heads, inputs, tails, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        count = len(blocks[0])
        if count > 1 and self.vectorize:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")  # a loop inside vmap is no news
                    return list(grad(blocks, batched=True))
            except RuntimeError as error:  # an operation without a batching rule, or too little memory
                if is_missing_derivative(error):
                    raise
                self.vectorize = False
        each = [grad([block[i] for block in blocks]) for i in range(count)]
        return [_stack_or_none(parts) for parts in zip(*each, strict=True)]


def _stack_or_none(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack the gradients of one input; it is either used for every vector or for none."""
    found = [part for part in parts if part is not None]
    return torch.stack(found) if found else None


def is_missing_derivative(error: RuntimeError) -> bool:
    """Whether torch says that a kernel has no second derivative, or none in evaluation mode."""
    message = str(error)
    missing = "derivative for" in message and "not implemented" in message
    others = ("cudnn RNN backward", "for sparse tensors")
    return missing or any(text in message for text in others)


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Let torch compute by kernels that can be differentiated twice: no fused attention, recurrent layers or bags,
    and nothing compiled.
    """
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    with ExitStack() as stack:
        stack.callback(setattr, torch.backends.cudnn, "enabled", enabled)
        stack.enter_context(uncompiled())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(DifferentiableOperations())
        yield


def vectors_at_once(forward: Callable[[], object], vector_bytes: int, device: torch.device) -> int:
    """Return how many vectors should go through a graph together, from what one forward pass saves.

    Args:
        forward: Runs the forward pass.
        vector_bytes: Size of a vector and of its product.
        device: Where all this is.

    Returns:
        At least 1.

    Cost: a forward pass.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:  # detached, since the tensor itself would keep the graph alive
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # kept, so that no other is put at its address
        return tensor.detach()

    # what is unpacked is used where the forward pass takes derivatives itself
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
    except RuntimeError as error:  # torch.func inside the forward pass takes no hooks: nothing is known
        if "saved tensor hooks" not in str(error):
            raise
        return 1
    own = _GRAPH_FACTOR * sum(storage.nbytes() for storage in saved.values()) + vector_bytes
    limit = _CACHE_BYTES if device.type == "cpu" else (available_memory(device) or _CACHE_BYTES) // 4
    return max(1, limit // max(1, own))
