"""VGG networks for small images."""

from torch import Tensor, nn

from lowrank_bdl.models.construction import at_least, dropout, image_side, initialise_convolutions_

# Convolutions in each of the five stages; a stage's channels are these multiples of the width.
STAGES = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
MULTIPLES = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """VGG-16 or VGG-19 with three narrow linear layers in place of the original's two of 4096.

    Five stages of 3x3 convolutions, each closed by max pooling of stride 2, then linear layers of 8 ``width`` units.
    Parameter names are those of the released swa_gaussian and understandingbdl code, whose checkpoints therefore load.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images, at least 32 [pixels].
        depth: 16 or 19 layers with weights.
        batch_norm: Whether every convolution is batch-normalised.
        width: Channels of the first stage (64; the published "Half" has 32, "Quarter" 16).
        feature_dropout: Rate before every convolution, the first one included (0; the published "Drop" has 0.01).
        classifier_dropout: Rate before the first two linear layers (0.5; "Drop" has 0.01, "NoDrop" 0).

    Raises:
        ShapeError: If the images are smaller than 32 x 32, or a size is not positive.
        ValueError: If the depth is unknown or a rate is outside [0, 1).

    Shape:
        ``(N, in_channels, image_size, image_size)`` to ``(N, num_classes)``.

    Cost: 0.31 (VGG-16) or 0.40 (VGG-19) billion multiply-adds an image of 32 x 32 pixels.

    Source: Simonyan and Zisserman, "Very deep convolutional networks" (2015), table 1, columns D and E.

    Example:
        >>> import torch
        >>> VGG(10, width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        depth: int = 16,
        batch_norm: bool = False,
        width: int = 64,
        feature_dropout: float = 0.0,
        classifier_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth must be one of {', '.join(map(str, STAGES))}; got {depth}.")
        num_classes, inputs = at_least("num_classes", num_classes), at_least("in_channels", in_channels)
        side = image_side(f"VGG-{depth}", image_size, least=32)
        features: list[nn.Module] = []
        for repeats, multiple in zip(STAGES[depth], MULTIPLES, strict=True):
            outputs = multiple * at_least("width", width)
            for _ in range(repeats):
                features += [dropout(feature_dropout)] if feature_dropout else []
                features.append(nn.Conv2d(inputs, outputs, 3, padding=1))
                features += [nn.BatchNorm2d(outputs)] if batch_norm else []
                features.append(nn.ReLU(inplace=True))
                inputs = outputs
            features.append(nn.MaxPool2d(2))
            side //= 2
        hidden = inputs
        classifier: list[nn.Module] = []
        for size in (hidden * side * side, hidden):
            classifier += [dropout(classifier_dropout)] if classifier_dropout else []
            classifier += [nn.Linear(size, hidden), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(*classifier, nn.Linear(hidden, num_classes))
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, in_channels, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits
