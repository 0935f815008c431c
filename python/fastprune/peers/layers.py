"""Sets of layers to time: single kernels, and the distinct layers of whole networks.

All are data. ``tests/test_peers.py`` holds the tables against the networks themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Linear:
    """y (batch, rows) = x (batch, cols) times a (rows, cols) weight, no bias."""

    rows: int
    cols: int
    batch: int = 1

    kind: ClassVar[str] = "linear"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.rows, self.cols

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the activations."""
        return self.batch, self.cols

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols}, batch {self.batch}"


@dataclass(frozen=True)
class Conv:
    """Square maps and kernels, no groups, no bias, padding = kernel // 2.

    Attributes:
        rows, cols: output and input channels.
        size: height and width of the input, in pixels.
    """

    rows: int
    cols: int
    size: int
    kernel: int = 3
    stride: int = 1
    batch: int = 1

    kind: ClassVar[str] = "conv"

    @property
    def padding(self) -> int:
        """Zeros on each side, in pixels."""
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        """Height and width of the output, in pixels."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.rows, self.cols, self.kernel, self.kernel

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the activations."""
        return self.batch, self.cols, self.size, self.size

    def __str__(self) -> str:
        channels = f"{self.cols}" if self.rows == self.cols else f"{self.cols} to {self.rows}"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return (
            f"{channels} ch {self.size}x{self.size}, {self.kernel}x{self.kernel}{stride}, "
            f"batch {self.batch}"
        )


Layer = Linear | Conv


@dataclass(frozen=True)
class LayerSet:
    """What ``--set`` names.

    Attributes:
        title: what it is, in words.
        layers: layer (its batch unset) -> how often the network has it.
        batches: batch sizes that every layer is timed at; for linear layers of a transformer, the
            tokens. None where the layers say it themselves.
        model: the network's name in ``fastprune.models``, for masks of real pruners.
    """

    title: str
    layers: Mapping[Layer, int]
    batches: tuple[int, ...] | None = (1, 16)
    model: str | None = None

    def cases(self, batches: Sequence[int] | None = None) -> list[tuple[Layer, int]]:
        """(layer, multiplicity), every layer at every batch size.

        Args:
            batches: in place of the set's own.
        """
        chosen = batches or self.batches
        if chosen is None:
            return list(self.layers.items())
        cases = {
            replace(layer, batch=batch): count
            for layer, count in self.layers.items()
            for batch in chosen
        }
        return list(cases.items())


def _convs(*rows: tuple[int, ...]) -> dict[Layer, int]:
    """From (out channels, in channels, size, kernel, stride, multiplicity)."""
    return {Conv(*row[:5]): row[5] for row in rows}


_KERNELS: dict[Layer, int] = {
    Linear(512, 512, 64): 1,
    Linear(512, 512, 1024): 1,
    Linear(2048, 2048, 64): 1,
    Linear(2048, 2048, 512): 1,
    Linear(1024, 4096, 128): 1,
    **{
        Conv(channels, channels, size, batch=batch): 1
        for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))
        for batch in (1, 16)
    },
}

_RESNET50 = {
    **_convs(
        (64, 3, 224, 7, 2, 1),
        (64, 64, 56, 1, 1, 1),
        (64, 64, 56, 3, 1, 3),
        (256, 64, 56, 1, 1, 4),
        (64, 256, 56, 1, 1, 2),
        (128, 256, 56, 1, 1, 1),
        (128, 128, 56, 3, 2, 1),
        (512, 128, 28, 1, 1, 4),
        (512, 256, 56, 1, 2, 1),
        (128, 512, 28, 1, 1, 3),
        (128, 128, 28, 3, 1, 3),
        (256, 512, 28, 1, 1, 1),
        (256, 256, 28, 3, 2, 1),
        (1024, 256, 14, 1, 1, 6),
        (1024, 512, 28, 1, 2, 1),
        (256, 1024, 14, 1, 1, 5),
        (256, 256, 14, 3, 1, 5),
        (512, 1024, 14, 1, 1, 1),
        (512, 512, 14, 3, 2, 1),
        (2048, 512, 7, 1, 1, 3),
        (2048, 1024, 14, 1, 2, 1),
        (512, 2048, 7, 1, 1, 2),
        (512, 512, 7, 3, 1, 2),
    ),
    Linear(1000, 2048): 1,
}

_VGG19 = {
    **_convs(
        (64, 3, 32, 3, 1, 1),
        (64, 64, 32, 3, 1, 1),
        (128, 64, 16, 3, 1, 1),
        (128, 128, 16, 3, 1, 1),
        (256, 128, 8, 3, 1, 1),
        (256, 256, 8, 3, 1, 3),
        (512, 256, 4, 3, 1, 1),
        (512, 512, 4, 3, 1, 3),
        (512, 512, 2, 3, 1, 4),
    ),
    Linear(10, 512): 1,
}

_WRN_28_8 = {
    **_convs(
        (16, 3, 32, 3, 1, 1),
        (128, 16, 32, 3, 1, 1),
        (128, 128, 32, 3, 1, 7),
        (128, 16, 32, 1, 1, 1),
        (256, 128, 32, 3, 2, 1),
        (256, 256, 16, 3, 1, 7),
        (256, 128, 32, 1, 2, 1),
        (512, 256, 16, 3, 2, 1),
        (512, 512, 8, 3, 1, 7),
        (512, 256, 16, 1, 2, 1),
    ),
    Linear(10, 512): 1,
}

_MOBILENETV2_1X1 = _convs(
    (16, 32, 112, 1, 1, 1),
    (96, 16, 112, 1, 1, 1),
    (24, 96, 56, 1, 1, 1),
    (144, 24, 56, 1, 1, 2),
    (24, 144, 56, 1, 1, 1),
    (32, 144, 28, 1, 1, 1),
    (192, 32, 28, 1, 1, 3),
    (32, 192, 28, 1, 1, 2),
    (64, 192, 14, 1, 1, 1),
    (384, 64, 14, 1, 1, 4),
    (64, 384, 14, 1, 1, 3),
    (96, 384, 14, 1, 1, 1),
    (576, 96, 14, 1, 1, 3),
    (96, 576, 14, 1, 1, 2),
    (160, 576, 7, 1, 1, 1),
    (960, 160, 7, 1, 1, 3),
    (160, 960, 7, 1, 1, 2),
    (320, 960, 7, 1, 1, 1),
    (1280, 320, 7, 1, 1, 1),
)

_TRANSFORMER: dict[Layer, int] = {
    Linear(rows, cols): 1
    for rows, cols in (
        (768, 768),
        (3072, 768),
        (768, 3072),
        (1024, 1024),
        (4096, 1024),
        (1024, 4096),
        (4096, 4096),
    )
}

SETS: dict[str, LayerSet] = {
    "kernels": LayerSet("five matrix products, four 3x3 convolutions", _KERNELS, None),
    "resnet50": LayerSet("ResNet-50, 224x224", _RESNET50, model="resnet50-imagenet"),
    "vgg19": LayerSet("VGG-19, 32x32", _VGG19, model="vgg-19"),
    "wrn-28-8": LayerSet("WideResNet-28-8, 32x32", _WRN_28_8, model="wide-resnet-28-8"),
    "mobilenetv2-1x1": LayerSet("1x1 convolutions of MobileNetV2, 224x224", _MOBILENETV2_1X1),
    "transformer": LayerSet("linear layers of transformers", _TRANSFORMER, (1, 8, 128)),
}
