"""Fully convolutional DenseNets for semantic segmentation."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowrank_bdl.models.construction import at_least, dropout, image_side


class DenseBlock(nn.Module):
    """Layers of batch norm, ReLU, 3x3 convolution and dropout, each of which sees all maps before it.

    Args:
        inputs: Channels of the input.
        growth: Channels that each layer adds.
        layers: Number of layers.
        new_only: Whether the block returns the new maps alone, without its input.
        rate: Dropout after each convolution.

    Shape:
        ``(N, inputs, H, W)`` to ``(N, [inputs +] layers growth, H, W)``.
    """

    def __init__(self, inputs: int, growth: int, layers: int, new_only: bool, rate: float) -> None:
        super().__init__()
        self.new_only = new_only
        self.layers = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    norm=nn.BatchNorm2d(inputs + i * growth),
                    relu=nn.ReLU(inplace=True),
                    conv=nn.Conv2d(inputs + i * growth, growth, 3, padding=1),
                    drop=dropout(rate),
                )
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the new maps, after those of the input unless ``new_only``."""
        maps = [x]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps[1:] if self.new_only else maps, 1)


class TransitionUp(nn.Module):
    """Transposed 3x3 convolution of stride 2, cut to the size of the skip connection and joined to it.

    Args:
        channels: Channels of the input, which it keeps.

    Shape:
        ``(N, channels, h, w)`` and ``(N, C, H, W)`` to ``(N, channels + C, H, W)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convTrans = nn.ConvTranspose2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the joined maps."""
        out = self.convTrans(x)
        height, width = skip.shape[2:]
        top, left = (out.shape[2] - height) // 2, (out.shape[3] - width) // 2
        return torch.cat([out[:, :, top : top + height, left : left + width], skip], 1)


class FCDenseNet(nn.Module):
    """Fully convolutional DenseNet ("the one hundred layers tiramisu"), by default FCDenseNet67.

    Parameter names are those of the released swa_gaussian code, whose checkpoints therefore load.

    Args:
        num_classes: Logits a pixel.
        in_channels: Channels of the images.
        image_size: Least height and width of the images, at least 32 [pixels].
        down_blocks: Layers in the dense blocks of the downward path; the upward path has them in reverse.
        bottleneck_layers: Layers in the dense block between the paths.
        growth: Channels that each layer adds.
        stem: Channels of the first convolution.
        dropout_rate: Rate after every convolution of a dense block, and of whole channels after a transition down.
        aleatoric: Whether the network gives a second map for each class, for the loss of Kendall and Gal (2017).

    Raises:
        ShapeError: If the images are smaller than 32 x 32, or a size is not positive.
        ValueError: If the rate is outside [0, 1).

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, num_classes, H, W)``, or ``(N, 2, num_classes, H, W)`` if aleatoric; any
        H and W from 32 up.

    Source: Jégou et al., "The one hundred layers tiramisu" (2017), tables 1 and 2.

    Example:
        >>> net = FCDenseNet(11, down_blocks=(1, 1, 1, 1, 1), bottleneck_layers=1, growth=2, stem=4)
        >>> net(torch.zeros(2, 3, 32, 48)).shape
        torch.Size([2, 11, 32, 48])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        down_blocks: Sequence[int] = (5, 5, 5, 5, 5),
        bottleneck_layers: int = 5,
        growth: int = 16,
        stem: int = 48,
        dropout_rate: float = 0.2,
        aleatoric: bool = False,
    ) -> None:
        super().__init__()
        image_side("FCDenseNet", image_size, least=2 ** len(down_blocks))
        self.num_classes, self.aleatoric = at_least("num_classes", num_classes), aleatoric
        channels = at_least("stem", stem)
        self.firstconv = nn.Conv2d(at_least("in_channels", in_channels), channels, 3, padding=1)
        self.denseBlocksDown, self.transDownBlocks = nn.ModuleList(), nn.ModuleList()
        skips = []
        for layers in down_blocks:
            self.denseBlocksDown.append(DenseBlock(channels, growth, layers, new_only=False, rate=dropout_rate))
            channels += growth * layers
            skips.append(channels)
            self.transDownBlocks.append(
                nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(channels),
                        relu=nn.ReLU(inplace=True),
                        conv=nn.Conv2d(channels, channels, 1),
                        drop=dropout(dropout_rate, channels=True),
                        maxpool=nn.MaxPool2d(2),
                    )
                )
            )
        middle = DenseBlock(channels, growth, bottleneck_layers, new_only=True, rate=dropout_rate)
        self.bottleneck = nn.Sequential(OrderedDict(bottleneck=middle))
        channels = growth * bottleneck_layers
        self.transUpBlocks, self.denseBlocksUp = nn.ModuleList(), nn.ModuleList()
        for i, layers in reversed(list(enumerate(down_blocks))):
            self.transUpBlocks.append(TransitionUp(channels))
            joined = channels + skips[i]
            self.denseBlocksUp.append(DenseBlock(joined, growth, layers, new_only=i > 0, rate=dropout_rate))
            channels = growth * layers + (0 if i > 0 else joined)
        self.finalConv = nn.Conv2d(channels, self.num_classes * (2 if aleatoric else 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every pixel of images ``(N, in_channels, H, W)``."""
        x = self.firstconv(x)
        skips = []
        for block, down in zip(self.denseBlocksDown, self.transDownBlocks, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.bottleneck(x)
        for up, block in zip(self.transUpBlocks, self.denseBlocksUp, strict=True):
            x = block(up(x, skips.pop()))
        logits: Tensor = self.finalConv(x)
        return logits.unflatten(1, (2, self.num_classes)) if self.aleatoric else logits
