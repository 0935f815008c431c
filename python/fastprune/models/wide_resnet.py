"""Wide residual networks (Zagoruyko & Komodakis 2016), the main networks of paper 001."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastprune.models._common import Shape, check_arguments, kaiming_normal_


class WideBlock(nn.Module):
    """Pre-activation block: BatchNorm and ReLU before each of two 3x3 convolutions.

    Where channels change, the skip path is a 1x1 convolution of the activated input, without
    BatchNorm; elsewhere it is the untouched input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, scale: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, ceil(H / stride), ceil(W / stride))."""
        active = self.relu1(self.bn1(x))
        branch = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        if self.scale != 1.0:
            branch = branch * self.scale
        skip = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = branch + skip
        return out


class WideResNet(nn.Module):
    """WideResNet-depth-widen: 3 groups of (depth - 4) / 6 blocks, 16, 32, 64 times widen channels.

    28-2, 28-4 and 28-8 have 1.47, 5.85 and 23.35 M parameters and 216, 848 and 3366 M
    multiply-adds on 32x32 images (paper 001, Figures 3 and 6). No dropout.

    Args:
        depth: 6n + 4 with n >= 1.
        widen: width factor, at least 1.
        num_classes: number of logits; input (N, channels, height, width), output (N, num_classes).
        in_shape: (channels, height, width); any size.
        stable: multiply each residual branch by 1 / sqrt(number of blocks) (Hayou et al. 2020;
            paper 002, Appendix D).
    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 2,
        num_classes: int = 10,
        in_shape: Shape = (3, 32, 32),
        *,
        stable: bool = False,
    ) -> None:
        channels, _, _ = check_arguments(num_classes, in_shape)
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth: expected 6n + 4 with n >= 1, got {depth}")
        if widen < 1:
            raise ValueError(f"widen: expected an integer >= 1, got {widen}")
        super().__init__()
        per_group = (depth - 4) // 6
        scale = 1.0 / math.sqrt(3 * per_group) if stable else 1.0
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        current = 16
        for group in range(3):
            width = 16 * 2**group * widen
            for position in range(per_group):
                stride = 2 if group and not position else 1
                blocks.append(WideBlock(current, width, stride, scale))
                current = width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(current)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(current, num_classes)
        kaiming_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, height, width) to (N, num_classes) logits."""
        x = self.avgpool(self.relu(self.bn(self.blocks(self.conv1(x)))))
        out: Tensor = self.fc(torch.flatten(x, 1))
        return out
