"""LeNet-300-100 and LeNet-5 (LeCun et al. 1998), as papers 002 and 003 use them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprune.models._common import Shape, check_arguments, kaiming_normal_


def lenet_300_100(
    num_classes: int = 10, in_shape: Shape = (1, 28, 28), *, batch_norm: bool = False
) -> nn.Sequential:
    """Perceptron with hidden layers of 300 and 100 and ReLU: 266 610 parameters on 28x28 digits.

    The input, float (N, channels, height, width) or anything that flattens to the same number of
    features, is flattened; the output is (N, num_classes) logits.

    Args:
        num_classes: number of logits.
        in_shape: (channels, height, width); any.
        batch_norm: put BatchNorm before each ReLU, as all networks of paper 003 have (Table 1).
    Raises:
        ValueError: an argument is out of range.
    Paper: 003, section 3 and Appendix A (MNIST).
    """
    channels, height, width = check_arguments(num_classes, in_shape)
    layers: list[nn.Module] = [nn.Flatten()]
    features = channels * height * width
    for hidden in (300, 100):
        layers.append(nn.Linear(features, hidden))
        if batch_norm:
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(nn.ReLU())
        features = hidden
    model = nn.Sequential(*layers, nn.Linear(features, num_classes))
    kaiming_normal_(model)
    return model


class LeNet5(nn.Module):
    """Five-layer LeNet-5: 5x5 convolutions to 6 and 16 channels, then 120, 84 and the classes.

    ReLU and max-pooling take the place of the sigmoids and trained subsampling of 1998. LeCun's
    input is 32x32, 28x28 digits being padded by 2: here the first convolution pads by 2 along a
    side shorter than 32, so both sizes reach the classifier as 16 x 5 x 5. On CIFAR-10 it has
    62 006 parameters, on MNIST 61 706.

    Args:
        num_classes: number of logits; input (N, channels, height, width), output (N, num_classes).
        in_shape: (channels, height, width); sides of at least 12.
        batch_norm: put BatchNorm before each ReLU, as all networks of paper 003 have (Table 1).
    Raises:
        ValueError: an argument is out of range.
    Paper: 003, Figure 6 (five layers) and Appendix A (CIFAR-10).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_shape: Shape = (3, 32, 32),
        *,
        batch_norm: bool = False,
    ) -> None:
        channels, height, width = check_arguments(
            num_classes, in_shape, 12, "two 5x5 convolutions, each followed by a 2x2 max-pooling"
        )
        super().__init__()
        padding = tuple(2 if side < 32 else 0 for side in (height, width))
        # Sides after: convolution 1 and pooling, then convolution 2 and pooling.
        sides = [
            ((n + 2 * p - 4) // 2 - 4) // 2 for n, p in zip((height, width), padding, strict=True)
        ]

        def activation(norm: nn.Module) -> list[nn.Module]:
            return [norm, nn.ReLU()] if batch_norm else [nn.ReLU()]

        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=(padding[0], padding[1])),
            *activation(nn.BatchNorm2d(6)),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            *activation(nn.BatchNorm2d(16)),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * sides[0] * sides[1], 120),
            *activation(nn.BatchNorm1d(120)),
            nn.Linear(120, 84),
            *activation(nn.BatchNorm1d(84)),
            nn.Linear(84, num_classes),
        )
        kaiming_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, height, width) to (N, num_classes) logits."""
        out: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return out
