"""Small convolutional networks without batch norm."""

from torch import Tensor, nn

from lowrank_bdl.models.construction import at_least, dropout, image_side, initialise_convolutions_


class LeNet5(nn.Module):
    """The LeNet-5 of the published MNIST experiments: 20 and 50 channels, 500 hidden units, ReLU.

    Two 5x5 convolutions without padding, each followed by ReLU and max pooling. Parameter names are those of the
    released swa_gaussian code.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images, at least 16 [pixels]; 28 gives the published network.
        dropout_rate: Probability that a hidden unit is dropped, in [0, 1); parameters keep their names.

    Raises:
        ShapeError: If the images are smaller than 16 x 16, or a size is not positive.
        ValueError: If the dropout rate is outside [0, 1).

    Shape:
        ``(N, in_channels, image_size, image_size)`` to ``(N, num_classes)``.

    Cost: 2.3 million multiply-adds an image of 28 x 28 pixels.

    Source: LeCun et al., "Gradient-based learning applied to document recognition" (1998), in the shape Caffe gave it;
    "Drop" loses half the hidden units, as in Gal and Ghahramani, "Dropout as a Bayesian approximation" (2016).

    Example:
        >>> import torch
        >>> LeNet5(10, in_channels=1, image_size=28)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, *, in_channels: int = 3, image_size: int = 32, dropout_rate: float = 0.0
    ) -> None:
        super().__init__()
        side = image_side("LeNet5", image_size, least=16)
        drop = dropout(dropout_rate)
        side = ((side - 4) // 2 - 4) // 2
        self.conv_part = nn.Sequential(
            nn.Conv2d(at_least("in_channels", in_channels), 20, 5),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.fc_part = nn.Sequential(
            nn.Linear(50 * side * side, 500),
            nn.Sequential(nn.ReLU(inplace=True), drop) if dropout_rate else nn.ReLU(inplace=True),
            nn.Linear(500, at_least("num_classes", num_classes)),
        )
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, in_channels, image_size, image_size)``."""
        logits: Tensor = self.fc_part(self.conv_part(x).flatten(1))
        return logits


class ConvFC(nn.Module):
    """Three 5x5 convolutions and two hidden layers of 1000 units, from the mode-connectivity experiments.

    Parameter names are those of the released dnn-mode-connectivity code.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images, at least 15 [pixels].

    Raises:
        ShapeError: If the images are smaller than 15 x 15, or a size is not positive.

    Shape:
        ``(N, in_channels, image_size, image_size)`` to ``(N, num_classes)``.

    Cost: 26 million multiply-adds an image of 32 x 32 pixels.

    Source: Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs" (2018).

    Example:
        >>> import torch
        >>> ConvFC(10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        side = image_side("ConvFC", image_size, least=15)
        inputs = at_least("in_channels", in_channels)
        layers: list[nn.Module] = []
        for outputs in (32, 64, 128):
            layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)]
            inputs, side = outputs, (side - 3) // 2 + 1
        self.conv_part = nn.Sequential(*layers)
        self.fc_part = nn.Sequential(
            nn.Linear(inputs * side * side, 1000),
            nn.ReLU(inplace=True),
            nn.Linear(1000, 1000),
            nn.ReLU(inplace=True),
            nn.Linear(1000, at_least("num_classes", num_classes)),
        )
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, in_channels, image_size, image_size)``."""
        logits: Tensor = self.fc_part(self.conv_part(x).flatten(1))
        return logits
