"""Residual networks with pre-activation."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from lowrank_bdl.errors import ShapeError
from lowrank_bdl.models.construction import at_least, dropout, image_side, initialise_convolutions_

BOTTLENECK_FROM = 44  # depth from which a block is a bottleneck of three convolutions
STEM = 16  # channels of the first convolution


class PreActivationBlock(nn.Module):
    """Convolutions that each follow batch norm and ReLU, added to the input or to a 1x1 projection of it.

    Args:
        inputs: Channels of the input.
        planes: Channels of the inner convolutions.
        stride: Of the (first) 3x3 convolution and of the projection.
        bottleneck: Three convolutions, 1x1, 3x3 and 1x1 with four times the channels, in place of two 3x3.
        rate: Dropout before every convolution, the projection included.

    Shape:
        ``(N, inputs, H, W)`` to ``(N, planes or 4 planes, H / stride, W / stride)``.

    Source: He et al., "Identity mappings in deep residual networks" (2016), figure 1b.
    """

    def __init__(self, inputs: int, planes: int, stride: int, bottleneck: bool, rate: float) -> None:
        super().__init__()
        outputs = 4 * planes if bottleneck else planes
        self.bn1 = nn.BatchNorm2d(inputs)
        if bottleneck:
            self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
            self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(planes)
            self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
            self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bottleneck = bottleneck
        self.drop = dropout(rate)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(*([dropout(rate)] if rate else []), projection)

    def forward(self, x: Tensor) -> Tensor:
        """Return block(x) + shortcut(x)."""
        out = self.conv1(self.drop(relu(self.bn1(x), inplace=True)))
        out = self.conv2(self.drop(relu(self.bn2(out), inplace=True)))
        if self.bottleneck:
            out = self.conv3(self.drop(relu(self.bn3(out), inplace=True)))
        # Not in place: under vmap over some of the weights the shortcut may be batched where the branch is not.
        summed: Tensor = out + (x if self.downsample is None else self.downsample(x))
        return summed


class PlainBlock(nn.Module):
    """Two 3x3 convolutions, each followed by batch norm and ReLU, without a shortcut.

    Args:
        inputs: Channels of the input.
        planes: Channels of the output.
        stride: Of the first convolution.

    Shape:
        ``(N, inputs, H, W)`` to ``(N, planes, H / stride, W / stride)``.
    """

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = relu(self.bn1(self.conv1(x)), inplace=True)
        return relu(self.bn2(self.conv2(out)), inplace=True)


class PreResNet(nn.Module):
    """Pre-activation residual network for small images, of basic blocks, or of bottlenecks from depth 44.

    A 3x3 convolution, three stages of which the last two halve the image, batch norm, ReLU, average pooling and one
    linear layer. Parameter names are those of the released swa_gaussian and understandingbdl code, whose checkpoints
    therefore load. That code's dropout networks are deeper than they say (its PreResNet164Drop has 245 layers); here
    dropout changes nothing but dropout.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images, at least 8 [pixels].
        depth: Layers with weights: 6 n + 2 below 44 (8, 20, 32, ...), 9 n + 2 from there (56, 83, 110, 164, ...).
        planes: Channels of the three stages (times 4 in bottlenecks).
        dropout_rate: Rate before every convolution but the first and before the linear layer (0; "Drop" has 0.01).
        skip_connections: False leaves out shortcuts and pre-activation (the published "NoSkip"; below depth 44).
        pool_grid: The last maps are averaged over a grid of this many windows a side (1; "ImageNette" has 5).

    Raises:
        ShapeError: If the images are smaller than 8 x 8 or do not fit the grid, or a size is not positive.
        ValueError: If there is no network of this depth, or the rate is outside [0, 1).

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, num_classes)``; any H and W from 8 up.

    Cost: at 32 x 32, 0.041 billion multiply-adds an image at depth 20, 0.25 at depth 164.

    Source: He et al., "Identity mappings in deep residual networks" (2016).

    Example:
        >>> import torch
        >>> PreResNet(10, depth=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        depth: int = 20,
        planes: Sequence[int] = (16, 32, 64),
        dropout_rate: float = 0.0,
        skip_connections: bool = True,
        pool_grid: int = 1,
    ) -> None:
        super().__init__()
        bottleneck = depth >= BOTTLENECK_FROM
        unit = 9 if bottleneck else 6
        if depth < unit + 2 or (depth - 2) % unit:
            raise ValueError(
                f"depth must be 6 n + 2 below {BOTTLENECK_FROM} and 9 n + 2 from there (8, 20, 56, ...); got {depth}."
            )
        if not skip_connections and (bottleneck or dropout_rate):
            raise ValueError(
                f"Without skip connections depth must be under {BOTTLENECK_FROM} and dropout_rate 0; "
                f"got depth={depth}, dropout_rate={dropout_rate}."
            )
        if len(planes) != 3:
            raise ShapeError(f"planes must name the channels of 3 stages; got {tuple(planes)}.")
        maps = -(-image_side(f"PreResNet-{depth}", image_size, least=8) // 4)  # a side; each of two strides rounds up
        if maps % at_least("pool_grid", pool_grid):
            raise ShapeError(
                f"With pool_grid={pool_grid} the network takes images whose side over 4, rounded up, is a multiple of "
                f"{pool_grid} (such as {32 * pool_grid} x {32 * pool_grid} pixels); got image_size={image_size}."
            )
        self.conv1 = nn.Conv2d(at_least("in_channels", in_channels), STEM, 3, padding=1, bias=False)
        inputs, stages = STEM, []
        for width, first_stride in zip(planes, (1, 2, 2), strict=True):
            blocks: list[nn.Module] = []
            for stride in (first_stride, *[1] * ((depth - 2) // unit - 1)):
                if skip_connections:
                    blocks.append(PreActivationBlock(inputs, width, stride, bottleneck, dropout_rate))
                else:
                    blocks.append(PlainBlock(inputs, width, stride))
                inputs = 4 * width if bottleneck else width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(inputs)
        self.pool = nn.AdaptiveAvgPool2d(pool_grid)
        self.drop = dropout(dropout_rate)
        self.fc = nn.Linear(inputs * pool_grid**2, at_least("num_classes", num_classes))
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.pool(relu(self.bn(x), inplace=True)).flatten(1)
        logits: Tensor = self.fc(self.drop(x))
        return logits
