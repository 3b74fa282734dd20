"""Maximising an objective in a few coordinates, step by step."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_bdl.errors import NonFiniteError
from lowrank_bdl.progress import progress_bar
from lowrank_bdl.subspaces.chains import require_counts


def ascend(
    objective: Callable[[], tuple[Tensor, Tensor]],
    parameters: Sequence[Tensor],
    *,
    num_steps: int,
    lr: float,
    name: str,
    progress: bool,
) -> Tensor:
    """Maximise by Adam, with a learning rate that falls to 0 along half a cosine.

    Args:
        objective: Gives a scalar whose gradient is followed, and the value to report.
        parameters: Leaves; changed in place.
        num_steps: Steps.
        lr: Learning rate of the first step.
        name: Of the progress bar.
        progress: Show it.

    Returns:
        The values reported, shape ``(num_steps,)``, float64.

    Raises:
        ValueError: If there is no step, or the learning rate is not positive.
        NonFiniteError: If the objective is not finite; names the step.
    """
    require_counts(num_steps=(num_steps, 1))
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite; got {lr}.")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    trace = []
    with progress_bar(description=name, total=num_steps, unit="step", show=progress) as bar, torch.enable_grad():
        for step in range(num_steps):
            optimizer.zero_grad()
            value, reported = objective()
            trace.append(reported.detach().double())
            if not bool(value.isfinite()):
                raise NonFiniteError(f"the objective must be finite; got {value.item()} at step {step} of {name}.")
            (-value).backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"{trace[-1].item():.4g}", refresh=False)
            bar.update()
    return torch.stack(trace)
