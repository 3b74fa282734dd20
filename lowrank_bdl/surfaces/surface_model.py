"""A network whose weights are drawn from a surface at every forward pass, so that training moves the surface."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.linalg.precision import callers_precision, exact_methods
from lowrank_bdl.parameters.functional import FunctionalModel
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.substitution import Substitution
from lowrank_bdl.surfaces.surface import Surface


@exact_methods
class SurfaceModel(nn.Module):
    r"""A network on a curve or simplex of weights: :math:`\theta` is drawn from the surface at every forward pass.

    In training mode every forward pass draws one θ, for the whole batch, and calls the network with it in place of its
    own weights, so that gradients reach the trained points of the surface; no layer is written anew. In evaluation mode
    θ is the middle of the surface. Inside ``with net.at(theta)`` it is the given one in either mode; the loss
    :class:`~lowrank_bdl.training.losses.SurfaceLoss` uses that to see and to penalise the same draw.

    The network's own weights are not used where the layout covers them: they get no gradient and stay as they are.
    Parameters that the layout leaves out are trained as they are unless frozen. Batch norm normalises by the batch in
    training; its running statistics are of no one point of the surface, so recompute them for the weights that are to
    be evaluated (``lb.predict(net.model, surface, ..., bn_loader=...)``).

    Args:
        model: The network.
        surface: Where its weights come from, such as a :class:`~lowrank_bdl.surfaces.curves.BezierCurve`.
        generator: Source of the draws; its state is the caller's to keep. None takes torch's default generator, whose
            state a :class:`~lowrank_bdl.training.trainer.Trainer` keeps in its checkpoints.

    Attributes:
        model: The network.
        surface: The surface; an optimizer takes its parameters.
        layout: What θ holds: the surface's layout, or every trainable parameter.

    Raises:
        ShapeError: If the network and the surface do not fit together.

    Cost: a forward pass, the draw, and a vector of D for the gradient of θ.

    Source: Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (2018), section 3.2.

    Example:
        >>> from lowrank_bdl.surfaces.curves import BezierCurve
        >>> curve = BezierCurve.between(torch.zeros(3), torch.tensor([2.0, 2.0, 0.0]))
        >>> net = SurfaceModel(nn.Linear(2, 1), curve)
        >>> x = torch.ones(1, 2)
        >>> with net.at(curve(0.25)):
        ...     net(x).item()
        1.0
        >>> net.eval()(x).item()  # at the middle of the curve
        2.0
        >>> net.train()(x).sum().backward()
        >>> curve.point_1.grad.shape, net.model.weight.grad
        (torch.Size([3]), None)
    """

    def __init__(self, model: nn.Module, surface: Surface, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self._network = FunctionalModel(model, surface.layout)
        self._substitution = Substitution(model, protect=False)
        self.model = model
        self.surface = surface
        self.generator = generator
        self._fixed: Tensor | None = None
        shape = surface.center_theta().shape
        if shape != (self.layout.numel,):
            raise ShapeError(f"The surface's points must have shape ({self.layout.numel},); got {tuple(shape)}.")

    @property
    def layout(self) -> ParameterLayout:
        """What θ holds."""
        return self._network.layout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network: at a new draw in training mode, in the middle in evaluation mode, or where :meth:`at` says.

        Args:
            *args: As the network takes them.
            **kwargs: As the network takes them.

        Returns:
            What the network returns.
        """
        if self._fixed is not None:
            theta = self._fixed
        elif self.training:
            theta = self.draw()
        else:
            theta = self.surface.center_theta()
        device = next(self.model.parameters()).device  # a surface may keep its points elsewhere, such as on the host
        weights = self._network.named(theta.to(device))
        with callers_precision():
            return self._substitution(weights, lambda: self.model(*args, **kwargs))

    def draw(self) -> Tensor:
        """Draw θ once, shape ``(D,)``, differentiably in the surface's trained points."""
        return self.surface.draw_theta(self.generator)

    @contextmanager
    def at(self, theta: Tensor) -> Iterator[None]:
        """Evaluate the network at given weights for the length of a ``with`` block.

        Args:
            theta: Shape ``(D,)``; gradients reach what it was made from.

        Raises:
            ShapeError: If a forward pass finds another shape.
        """
        before, self._fixed = self._fixed, theta
        try:
            yield
        finally:
            self._fixed = before
