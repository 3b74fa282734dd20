"""Wide residual networks."""

from torch import Tensor, nn
from torch.nn.functional import relu

from lowrank_bdl.models.construction import at_least, dropout, image_side

STEM = 16  # channels of the first convolution


class WideBlock(nn.Module):
    """Two 3x3 convolutions that follow batch norm and ReLU, with dropout between them, added to a shortcut.

    Args:
        inputs: Channels of the input.
        planes: Channels of the output.
        stride: Of the second convolution and of the shortcut.
        rate: Dropout after the first convolution.

    Shape:
        ``(N, inputs, H, W)`` to ``(N, planes, H / stride, W / stride)``.

    Source: Zagoruyko and Komodakis (2016), figure 1d.
    """

    def __init__(self, inputs: int, planes: int, stride: int, rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, planes, 3, padding=1)
        self.dropout = dropout(rate)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1)
        project = stride != 1 or inputs != planes
        self.shortcut = nn.Sequential(*([nn.Conv2d(inputs, planes, 1, stride=stride)] if project else []))

    def forward(self, x: Tensor) -> Tensor:
        """Return block(x) + shortcut(x)."""
        out = self.dropout(self.conv1(relu(self.bn1(x), inplace=True)))
        # Not in place: under vmap over some of the weights the shortcut may be batched where the branch is not.
        summed: Tensor = self.conv2(relu(self.bn2(out), inplace=True)) + self.shortcut(x)
        return summed


class WideResNet(nn.Module):
    """Wide residual network for small images, by default WRN-28-10.

    Parameter names, biases in the convolutions, torch's default initial weights and the last batch norm's momentum of
    0.9 are those of the released swa_gaussian code, whose checkpoints therefore load.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images, at least 8 [pixels].
        depth: 6 n + 4: n blocks in each of three stages.
        widen_factor: The stages have 16, 32 and 64 times this many channels.
        block_dropout: Rate inside every block (0; the published "Drop" has 0.05).
        classifier_dropout: Rate before the linear layer (0; "Drop" has 0.05).

    Raises:
        ShapeError: If the images are smaller than 8 x 8, or a size is not positive.
        ValueError: If there is no network of this depth, or a rate is outside [0, 1).

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, num_classes)``; any H and W from 8 up.

    Cost: 6.0 billion multiply-adds an image of 32 x 32 pixels for WRN-28-10.

    Source: Zagoruyko and Komodakis, "Wide residual networks" (2016), table 1.

    Example:
        >>> import torch
        >>> WideResNet(10, depth=10, widen_factor=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        depth: int = 28,
        widen_factor: int = 10,
        block_dropout: float = 0.0,
        classifier_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, ...); got {depth}.")
        image_side(f"WideResNet-{depth}", image_size, least=8)
        self.conv1 = nn.Conv2d(at_least("in_channels", in_channels), STEM, 3, padding=1)
        inputs, stages = STEM, []
        for multiple, first_stride in ((1, 1), (2, 2), (4, 2)):
            planes = STEM * multiple * at_least("widen_factor", widen_factor)
            blocks = []
            for stride in (first_stride, *[1] * ((depth - 4) // 6 - 1)):
                blocks.append(WideBlock(inputs, planes, stride, block_dropout))
                inputs = planes
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn1 = nn.BatchNorm2d(inputs, momentum=0.9)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = dropout(classifier_dropout)
        self.linear = nn.Linear(inputs, at_least("num_classes", num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.pool(relu(self.bn1(x), inplace=True)).flatten(1)
        logits: Tensor = self.linear(self.drop(x))
        return logits
