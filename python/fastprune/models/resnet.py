"""Residual networks (He et al. 2016): the thin CIFAR ones, the wide CIFAR ones, the ImageNet ones.

State-dict keys are those of torchvision's ResNet (conv1, bn1, layerI.J.convK, downsample, fc), so
the ImageNet networks load its weights with ``strict=True``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprune.models._common import Shape, check_arguments, kaiming_normal_


class PadShortcut(nn.Module):
    """He et al.'s option A: every ``stride``-th pixel, new channels filled with zeros. No weights.

    The new channels are split evenly before and after the old ones, an odd one after. Maps
    (N, in, H, W) to (N, out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        extra = out_channels - in_channels
        if extra < 0:
            raise ValueError(f"out_channels: expected >= {in_channels}, got {out_channels}")
        self.stride = stride
        self.padding = [0, 0, 0, 0, extra // 2, extra - extra // 2]

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad the channels."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def _downsample(in_channels: int, out_channels: int, stride: int, shortcut: str) -> nn.Module:
    """The skip path of a block: the identity where shapes allow it."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if shortcut == "pad":
        return PadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """relu(skip(x) + scale * bn(conv3x3(relu(bn(conv3x3(x)))))), the first with the stride."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, shortcut: str, scale: float
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(in_channels, width, stride, shortcut)
        self.relu2 = nn.ReLU()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, width, ceil(H / stride), ceil(W / stride))."""
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.scale != 1.0:
            branch = branch * self.scale
        out: Tensor = self.relu2(branch + self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """As ``BasicBlock`` with 1x1, 3x3 (with the stride), 1x1 convolutions; ends 4 times as wide."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, shortcut: str, scale: float
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride, shortcut)
        self.relu3 = nn.ReLU()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 4 * width, ceil(H / stride), ceil(W / stride))."""
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.relu2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        if self.scale != 1.0:
            branch = branch * self.scale
        out: Tensor = self.relu3(branch + self.downsample(x))
        return out


class ResNet(nn.Module):
    """Stem, groups of residual blocks, linear classifier; groups after the first halve the map.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: number of blocks of each group.
        widths: inner channels of each group's blocks; same length as ``depths``.
        num_classes: number of logits; input (N, channels, height, width), output (N, num_classes).
        in_shape: (channels, height, width); any size.
        stem: ``"cifar"``, a 3x3 convolution, or ``"imagenet"``, 7x7 of stride 2 and a max-pooling.
        shortcut: where shapes differ, ``"projection"`` (1x1 convolution and BatchNorm, He et al.'s
            option B) or ``"pad"`` (``PadShortcut``, option A).
        stable: Stable ResNet (Hayou et al. 2020; paper 002, Appendix D): every residual branch is
            multiplied by 1 / sqrt(number of blocks of the network).
    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        in_shape: Shape = (3, 32, 32),
        *,
        stem: str = "cifar",
        shortcut: str = "projection",
        stable: bool = False,
    ) -> None:
        channels, _, _ = check_arguments(num_classes, in_shape)
        if not depths or len(depths) != len(widths) or min(*depths, *widths) < 1:
            raise ValueError(
                "depths, widths: expected two lists of one length with entries >= 1, "
                f"got {depths!r} and {widths!r}"
            )
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem: expected 'cifar' or 'imagenet', got {stem!r}")
        if shortcut not in ("projection", "pad"):
            raise ValueError(f"shortcut: expected 'projection' or 'pad', got {shortcut!r}")
        super().__init__()
        scale = 1.0 / math.sqrt(sum(depths)) if stable else 1.0
        current = widths[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, current, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, current, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(current)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.group_names = [f"layer{i + 1}" for i in range(len(depths))]
        for index, (name, depth, width) in enumerate(
            zip(self.group_names, depths, widths, strict=True)
        ):
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if index and not position else 1
                blocks.append(block(current, width, stride, shortcut, scale))
                current = width * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(current, num_classes)
        kaiming_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, height, width) to (N, num_classes) logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.group_names:
            x = getattr(self, name)(x)
        out: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return out


def resnet_thin(
    depth: int,
    num_classes: int = 10,
    in_shape: Shape = (3, 32, 32),
    *,
    shortcut: str = "pad",
    stable: bool = False,
) -> ResNet:
    """He et al.'s CIFAR ResNet of 6n + 2 layers and 16, 32, 64 channels: ResNet-20, -32, -56.

    The shortcut is option A, as in He et al.'s CIFAR experiments; ``shortcut="projection"`` asks
    for option B. 0.27 M, 0.46 M and 0.85 M parameters. Paper: 001, section 5.1 and Table 4.

    Raises:
        ValueError: ``depth`` is not 6n + 2 with n >= 1, or another argument is out of range.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth: expected 6n + 2 with n >= 1, got {depth}")
    depths = ((depth - 2) // 6,) * 3
    return ResNet(
        BasicBlock, depths, (16, 32, 64), num_classes, in_shape, shortcut=shortcut, stable=stable
    )


_WIDE: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


def resnet_wide(
    depth: int,
    num_classes: int = 10,
    in_shape: Shape = (3, 32, 32),
    *,
    stem: str = "cifar",
    stable: bool = False,
) -> ResNet:
    """ResNet-18 or ResNet-50 with 64, 128, 256, 512 inner channels and projection shortcuts.

    ``stem="cifar"``: the networks of paper 002, Table 3 (ResNet-50: 23 520 842 parameters for 10
    classes) and paper 004, Table 3 (ResNet-18: 11.2 M). ``stem="imagenet"``: the usual ImageNet
    networks, 25 557 032 parameters in ResNet-50 for 1000 classes, stride on the 3x3 convolution.

    Raises:
        ValueError: ``depth`` is neither 18 nor 50, or another argument is out of range.
    """
    if depth not in _WIDE:
        raise ValueError(f"depth: expected 18 or 50, got {depth}")
    block, depths = _WIDE[depth]
    return ResNet(
        block, depths, (64, 128, 256, 512), num_classes, in_shape, stem=stem, stable=stable
    )
