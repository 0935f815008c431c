"""The Linear, MLP and CNN backbones of paper 004 (Diao et al. 2023), Tables 1 to 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprune.models._common import Shape, check_arguments, kaiming_normal_


def linear(num_classes: int = 10, in_shape: Shape = (1, 28, 28)) -> nn.Sequential:
    """One linear layer on the flattened image: 7.9 K parameters on 28x28x1, 30.7 K on 32x32x3.

    Input (N, channels, height, width), output (N, num_classes). Any ``in_shape``.

    Raises:
        ValueError: an argument is out of range.
    Paper: 004, Table 3.
    """
    channels, height, width = check_arguments(num_classes, in_shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))
    kaiming_normal_(model)
    return model


def mlp(num_classes: int = 10, in_shape: Shape = (1, 28, 28)) -> nn.Sequential:
    """Hidden layers of 128 and 256 with ReLU: 136.1 K parameters on 28x28x1, 428.9 K on 32x32x3.

    Input (N, channels, height, width), output (N, num_classes). Any ``in_shape``.

    Raises:
        ValueError: an argument is out of range.
    Paper: 004, Tables 1 and 3.
    """
    channels, height, width = check_arguments(num_classes, in_shape)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 128),
        nn.ReLU(),
        nn.Linear(128, 256),
        nn.ReLU(),
        nn.Linear(256, num_classes),
    )
    kaiming_normal_(model)
    return model


class CNN(nn.Module):
    """Four 3x3 convolutions (64, 128, 256, 512), each with BatchNorm, ReLU and 2x2 max-pooling.

    A global average and one linear layer follow: 1.6 M parameters. The convolutions keep their
    bias: Table 2 writes Conv2d(in, out, kernel, stride, padding) and no more, and 1.6 M does not
    tell the two apart.

    Args:
        num_classes: number of logits; input (N, channels, height, width), output (N, num_classes).
        in_shape: (channels, height, width); sides of at least 16.
    Raises:
        ValueError: an argument is out of range.
    Paper: 004, Tables 2 and 3.
    """

    def __init__(self, num_classes: int = 10, in_shape: Shape = (3, 32, 32)) -> None:
        channels, _, _ = check_arguments(num_classes, in_shape, 16, "4 max-poolings halve it")
        super().__init__()
        layers: list[nn.Module] = []
        for width in (64, 128, 256, 512):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        kaiming_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, height, width) to (N, num_classes) logits."""
        out: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return out
