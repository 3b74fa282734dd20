"""A module run with other tensors in place of its own, so that neither it nor their owner is changed."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from lowrank_bdl.errors import LowRankBDLError
from lowrank_bdl.parameters.checkpointing import checkpoints_rerun
from lowrank_bdl.parameters.differentiable_operations import DifferentiableOperations, needs_other_operations
from lowrank_bdl.parameters.witness import WeightWitness
from lowrank_bdl.parameters.wrappers import data_parallel_parts, named_parameters, names_in, uncompiled, unsynchronized


class _Runner(nn.Module):
    """Has a module as its child and runs a function, so that functional_call swaps the tensors around that."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class Substitution:
    """Runs a function while a module has other tensors in place of its own.

    - What the function writes into a given tensor (``Embedding(max_norm=...)``, ``weight.data.clamp_``) is dropped:
      every run starts from the tensors as they were given. The first run gets copies and is watched; later ones get
      copies of what that one wrote into, and the tensors themselves otherwise.
    - The first run is also watched for use of the module's own tensors, which would mean that a wrapper or a hook has
      put them back.
    - Where torch would give sparse gradients, which do not pass through views of one vector, or wrong second ones, the
      network is computed by other operations; see `DifferentiableOperations`.
    - Checkpointed parts of the network are computed again with the same tensors.

    Args:
        module: Any module.
        protect: Also drop what is written into parameters of the module for which nothing is given. A training step
            moves these, and does not ask for it.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> run = Substitution(net)
        >>> given = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        >>> run(given, lambda: net.weight.data.clamp_(max=0.5).item()), given["weight"].item()
        (0.5, 1.0)
    """

    def __init__(self, module: nn.Module, *, protect: bool = True) -> None:
        self.module = module
        self._protect = protect
        self._runner = _Runner(module)
        self._names = names_in(module)
        self._data_parallel = data_parallel_parts(module)
        self._by_others = needs_other_operations(module)
        self._written: dict[tuple[bool, bool], frozenset[str]] = {}

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        function: Callable[[], Any],
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Run the function with tensors in place.

        Args:
            parameters: Name to tensor, for any of the module's parameters; names are those of a layout, without the
                names of wrappers.
            function: Calls the module.
            buffers: Name to tensor, for any of its buffers; the function may write into them.

        Returns:
            What the function returns.

        Raises:
            LowRankBDLError: If the module computes with parameters of its own in place of given ones, uses none of
                these, or has a checkpoint through which gradients do not reach them.

        Cost: what the function costs, and microseconds a tensor; the first run also a copy of the parameters.
        """
        if torch.compiler.is_compiling():  # the compiler carries checkpoints and writes along by itself
            return self._run(dict(parameters), buffers or {}, function)
        if parametrize._cache_enabled:
            raise LowRankBDLError(
                "the network must compute with the weights that it is given; inside torch's parametrize.cached() a "
                "parametrized layer keeps those of its last call. Leave that block first."
            )
        # another mode, or another part of the network to be differentiated, may take another way through it
        state = self.module.training, torch.is_grad_enabled()
        written = self._written.get(state)
        if written is None:
            return self._first(state, parameters, function, buffers or {})
        tensors = dict(parameters)
        if written:
            own = self._others(parameters) if self._protect else {}
            tensors.update({name: (tensors | own)[name].clone() for name in written if name in tensors or name in own})
        return self._run(tensors, buffers or {}, function)

    def _first(
        self,
        state: tuple[bool, bool],
        parameters: Mapping[str, Tensor],
        function: Callable[[], Any],
        buffers: Mapping[str, Tensor],
    ) -> Any:
        present = named_parameters(self.module, remove_duplicate=False)
        replaced = {name: present[name].detach() for name in parameters if name in present}
        given = {**parameters, **(self._others(parameters) if self._protect else {})}
        copies = {name: tensor.clone() for name, tensor in given.items()}
        witness = WeightWitness(copies, replaced)

        def watched() -> Any:
            with uncompiled(), witness:  # which does not see into compiled code
                return function()

        output = self._run(copies, buffers, watched)
        if witness.own_used:
            raise LowRankBDLError(
                "the network must compute with the weights that it is given; it used its own "
                f"{witness.own_used[0]!r} in their place. A wrapper or a hook that puts weights back does that: pass "
                "the network inside it."
            )
        differentiated = state[1] and any(
            tensor.requires_grad for tensor in parameters.values()
        )  # which says it itself
        if not witness.read and not differentiated and any(tensor.numel() for tensor in parameters.values()):
            raise LowRankBDLError(
                "the network must compute with the weights that it is given; it used none of them. A copy of its own "
                "that it keeps, or a layout of parameters that it does not use, does that."
            )
        self._written[state] = frozenset(witness.written)
        return output

    def _others(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters for which nothing is given, not even by another name of the same one."""
        present = named_parameters(self.module, remove_duplicate=False)
        covered = {id(present[name]) for name in parameters if name in present}
        return {name: own for name, own in named_parameters(self.module).items() if id(own) not in covered}

    def _run(self, tensors: dict[str, Tensor], buffers: Mapping[str, Tensor], function: Callable[[], Any]) -> Any:
        every = (*tensors.items(), *buffers.items())
        inside = {f"model.{self._names.get(name, name)}": tensor for name, tensor in every}
        if torch.compiler.is_compiling():
            return functional_call(self._runner, inside, (function,))

        def run(body: Callable[[], Any]) -> Any:
            other = DifferentiableOperations() if self._by_others and torch.is_grad_enabled() else nullcontext()
            with checkpoints_rerun(run, lambda: list(inside.values())), other:
                return functional_call(self._runner, inside, (body,))

        if not self._data_parallel:
            return run(function)
        with unsynchronized(self._data_parallel):
            return run(function)
