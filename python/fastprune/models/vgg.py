"""VGG networks with BatchNorm for small images, one linear classifier at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprune.models._common import Shape, check_arguments, kaiming_normal_

STAGES: dict[str, tuple[tuple[int, ...], ...]] = {
    "small": ((64, 64), (128, 128), (256, 256)),
    "16": ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    "19": ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}
"""Output channels of each 3x3 convolution, by stage; a 2x2 max-pooling lies between stages."""


class VGG(nn.Module):
    """Stages of 3x3 convolution, BatchNorm, ReLU, a max-pooling between stages, then a classifier.

    Convolutions carry no bias. After the last stage the map is averaged to 1x1, which on 32x32 and
    64x64 images is the 2x2 and 4x4 average pooling of the network that paper 002 names (footnote 3
    of its Appendix A), and a single linear layer gives the logits. VGG-19 for 10 classes has
    20 035 018 parameters, 99.92 % of them in convolutions (paper 002, Table 3).

    Args:
        stages: output channels of the convolutions of each stage; see ``STAGES``.
        num_classes: number of logits; input (N, channels, height, width), output (N, num_classes).
        in_shape: (channels, height, width); sides of at least 2 ** (number of stages - 1).
    Raises:
        ValueError: an argument is out of range.
    Papers: 002, Appendix A; 003, Appendix A; 001, Appendix A.3.1 (VGG16-D).
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        num_classes: int = 10,
        in_shape: Shape = (3, 32, 32),
    ) -> None:
        if not stages or any(not stage or min(stage) < 1 for stage in stages):
            raise ValueError(f"stages: expected non-empty lists of channel counts, got {stages!r}")
        poolings = len(stages) - 1
        channels, _, _ = check_arguments(
            num_classes, in_shape, 2**poolings, f"{poolings} max-poolings halve it"
        )
        super().__init__()
        layers: list[nn.Module] = []
        for index, stage in enumerate(stages):
            if index:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
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


def vgg_small(num_classes: int = 10, in_shape: Shape = (1, 8, 8)) -> VGG:
    """Six convolutions (64, 64, 128, 128, 256, 256), two max-poolings; made for 8x8 digits.

    Not from a paper: the smallest network of the VGG kind that trains in seconds on one core.
    Sides of at least 4; 1 147 722 parameters for (1, 8, 8) and 10 classes.
    """
    return VGG(STAGES["small"], num_classes, in_shape)


def vgg16(num_classes: int = 10, in_shape: Shape = (3, 32, 32)) -> VGG:
    """VGG-16 for small images: 13 convolutions and one linear layer; sides of at least 16."""
    return VGG(STAGES["16"], num_classes, in_shape)


def vgg19(num_classes: int = 10, in_shape: Shape = (3, 32, 32)) -> VGG:
    """VGG-19 for small images: 16 convolutions and one linear layer; sides of at least 16."""
    return VGG(STAGES["19"], num_classes, in_shape)
