"""A convolutional network small enough to train in seconds."""

from torch import nn


class SmallConvNet(nn.Sequential):
    """Four batch-normalised 3x3 convolutions, global average pooling and one linear layer.

    Takes images of any size from 8 x 8; from 16 x 16 the first convolution has stride 2, which makes it as cheap.

    Args:
        channels: Number of channels of the images.
        image_size: Height (= width) of the images [pixels].
        num_classes: Number of logits.
        width: Channels of the first convolution; the last has four times as many.

    Shape:
        ``(N, channels, image_size, image_size)`` to ``(N, num_classes)``.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int, width: int = 8) -> None:
        def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *block(channels, width, stride=2 if image_size >= 16 else 1),
            *block(width, 2 * width),
            nn.MaxPool2d(2),
            *block(2 * width, 4 * width),
            *block(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )
