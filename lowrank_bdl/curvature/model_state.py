"""What the gradients of a network depend on, and whether it has changed."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_bdl.curvature.loss_gradients import BatchNormMode


def model_state(model: nn.Module, bn_mode: BatchNormMode) -> dict[str, Tensor]:
    """Return every tensor of a network that its gradients depend on, by name; they share the network's memory.

    Args:
        model: The network.
        bn_mode: With ``"train"`` the buffers of batch-norm layers are left out.
    """
    ignored = set[str]()
    if bn_mode == "train":
        for prefix, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                ignored.update(f"{prefix}.{name}" if prefix else name for name, _ in module.named_buffers())
    found: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.named_parameters()}
    found.update((name, buffer) for name, buffer in model.named_buffers() if name not in ignored)
    return found


def differences(reference: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
    """Return which tensors differ in value, shape, dtype or device, in the order of ``reference``; no host sync.

    Args:
        reference: Name to tensor, at least one. Entries that are NaN here are not compared.
        present: Name to tensor.

    Returns:
        Bool, shape ``(len(reference),)``, on the device of the first tensor.
    """
    place, flags = next(iter(reference.values())).device, []
    for name, tensor in reference.items():
        other = present.get(name)
        if other is None or (other.shape, other.dtype, other.device) != (tensor.shape, tensor.dtype, tensor.device):
            flags.append(torch.ones((), dtype=torch.bool, device=place))
        else:
            flags.append(((tensor != other) & (tensor == tensor)).any().to(place))
    return torch.stack(flags)
