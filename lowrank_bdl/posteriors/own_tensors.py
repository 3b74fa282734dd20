"""Modules that keep tensors to themselves: saved and moved with a training module, and left alone by its wrappers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self


class OwnTensors(nn.Module):
    """A module whose tensors are no buffers, although they are saved, loaded and moved like such.

    Inside a training module, wrappers do to every buffer what suits batch-norm statistics: DistributedDataParallel
    sends them to all processes in every forward pass, AveragedModel and Lightning's WeightAveraging average or
    overwrite them. Counts and deviations of a collector would be lost by that. These tensors are part of
    ``state_dict()`` under the same names as buffers would be, follow ``to()``, and are in no one's list of buffers.

    Their dtypes stay what they are under ``half()`` and the like.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own: tuple[str, ...] = ()

    def keep(self, name: str, tensor: "Tensor | None") -> None:
        """Make a tensor an attribute of that name, to be saved and moved; None is kept, and not saved."""
        setattr(self, name, tensor)
        self._own += (name,)

    def own_tensors(self) -> dict[str, Tensor]:
        """Return all of them by name."""
        return {name: tensor for name in self._own if (tensor := getattr(self, name)) is not None}

    def refuse_state(self, found: dict[str, Tensor], prefix: str) -> str | None:
        """Return what is wrong with a state that has the right names, shapes and dtypes; None if nothing is."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self.own_tensors().items():
            if tensor.dtype is torch.int64:  # counters stay on the CPU: nobody waits for a device to read them
                moved = fn(tensor)
                setattr(self, name, moved if moved.device.type in ("cpu", "meta") else moved.to("cpu"))
                continue
            probe = fn(tensor.new_empty(0))  # asks what fn does without converting K x D numbers
            with torch.no_grad():
                setattr(self, name, fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.own_tensors().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load all or nothing: a state that does not fit leaves everything as it was."""
        own = self.own_tensors()
        found = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        unexpected_keys.extend(
            key for key in state_dict if strict and key.startswith(prefix) and key.removeprefix(prefix) not in own
        )
        if not found:
            missing_keys.extend(prefix + name for name in own if strict)
            return
        for name, tensor in found.items():
            expected = own[name]
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                error_msgs.append(
                    f"{prefix}{name}: expected {tuple(expected.shape)} {expected.dtype}, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}; the collector is unchanged."
                )
                return
        if (reason := self.refuse_state(found, prefix)) is not None:
            error_msgs.append(reason)
            return
        if len(found) < len(own):
            missing = ", ".join(prefix + name for name in own if name not in found)
            error_msgs.append(f"missing {missing}; the collector is unchanged.")
            return
        with torch.no_grad():
            for name, tensor in found.items():
                if local_metadata.get("assign_to_params_buffers", False):
                    setattr(self, name, tensor)
                else:
                    own[name].copy_(tensor)
