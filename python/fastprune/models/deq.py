"""The residual equilibrium network of paper 000, Appendix C (Kolter, Duvenaud and Johnson 2020)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.checks import whole
from fastprune.models._common import Shape, check_arguments, kaiming_normal_
from fastprune.nn.deq import DEQ


class ResNetDEQCell(nn.Module):
    """norm3(relu(z + norm2(x + conv2(norm1(relu(conv1(z))))))): a residual block that reads x.

    3x3 convolutions without biases, to ``inner_channels`` and back, drawn from N(0, 0.01^2);
    GroupNorm of 8 groups, which keeps the state bounded.

    Args:
        channels, inner_channels: multiples of 8.
    """

    def __init__(self, channels: int, inner_channels: int) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("inner_channels", inner_channels)):
            if whole(value, name, 8, None) % 8:
                raise ValueError(f"{name}: expected a multiple of 8, got {value}")
        self.conv1 = nn.Conv2d(channels, inner_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner_channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, inner_channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.norm3 = nn.GroupNorm(8, channels)
        self.reset_convolutions()

    def reset_convolutions(self) -> None:
        """Draw both convolutions anew."""
        nn.init.normal_(self.conv1.weight, 0.0, 0.01)
        nn.init.normal_(self.conv2.weight, 0.0, 0.01)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(N, channels, H, W) twice -> the same."""
        y = self.norm1(F.relu(self.conv1(z)))
        out: Tensor = self.norm3(F.relu(z + self.norm2(x + self.conv2(y))))
        return out


class ResNetDEQ(nn.Module):
    """3x3 convolution, BatchNorm, equilibrium of ``ResNetDEQCell``, BatchNorm, pooling, classifier.

    Pooling averages over quarters of the sides: ``AvgPool2d(8)`` on CIFAR's 32x32. Paper 000 prunes
    the implicit layer only: ``include="deq.cell"``, its two convolutions.

    Args:
        num_classes: number of logits; input (N, channels, height, width), output (N, num_classes).
        in_shape: (channels, height, width); any size.
        channels, inner_channels: of the state and within the cell, multiples of 8.
        deq: arguments of :class:`fastprune.nn.DEQ`; its defaults are those of the paper (Anderson,
            m = 5, lambda = 1e-4, tol 1e-2, 25 iterations).
    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_shape: Shape = (3, 32, 32),
        *,
        channels: int = 48,
        inner_channels: int = 64,
        **deq: Any,
    ) -> None:
        in_channels, height, width = check_arguments(num_classes, in_shape)
        super().__init__()
        cell = ResNetDEQCell(channels, inner_channels)
        pool = max(1, height // 4), max(1, width // 4)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.deq = DEQ(cell, **deq)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(pool)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels * (height // pool[0]) * (width // pool[1]), num_classes)
        kaiming_normal_(self)
        cell.reset_convolutions()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, height, width) to (N, num_classes) logits."""
        z = self.bn2(self.deq(self.bn1(self.conv1(x))))
        out: Tensor = self.fc(self.flatten(self.avgpool(z)))
        return out
