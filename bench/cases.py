"""The only table of shapes that benchmarks use."""

from __future__ import annotations

from typing import NamedTuple

SPARSITIES = (0.8, 0.9, 0.95, 0.98)


class Linear(NamedTuple):
    """y (batch, rows) = x (batch, cols) times a (rows, cols) weight."""

    rows: int
    cols: int
    batch: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols}, batch {self.batch}"


class Conv(NamedTuple):
    """Square maps, as many channels out as in, padded to keep the size at stride 1."""

    channels: int
    size: int
    batch: int
    kernel: int = 3
    stride: int = 1

    def __str__(self) -> str:
        return (
            f"{self.channels} ch {self.size}x{self.size}, {self.kernel}x{self.kernel}"
            f"{f', stride {self.stride}' if self.stride > 1 else ''}, batch {self.batch}"
        )


LINEAR = (
    Linear(512, 512, 64),
    Linear(512, 512, 1024),
    Linear(2048, 2048, 64),
    Linear(2048, 2048, 512),
    Linear(1024, 4096, 128),
    Linear(2048, 2048, 1),
)

# Where loading the weight is what dense costs, or most of it.
SMALL_BATCH = tuple(Linear(4096, 4096, batch) for batch in (1, 4, 8, 16, 32))
SMALL_BATCH_SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)

CONV = (
    Conv(64, 56, 1),
    Conv(64, 56, 16),
    Conv(128, 28, 1),
    Conv(128, 28, 16),
    Conv(256, 14, 1),
    Conv(256, 14, 16),
    Conv(512, 7, 1),
    Conv(512, 7, 16),
    Conv(128, 4, 64),
    Conv(256, 2, 64),
    Conv(256, 14, 16, kernel=1),
    Conv(128, 28, 16, stride=2),
)

# What the project promises of the first kernels: at least this speedup over dense at 90 %.
PROMISED_SPEEDUP = 2.0
PROMISED = (
    LINEAR[1],
    LINEAR[3],
    *(c for c in CONV if c.size >= 14 and c.kernel == 3 and c.stride == 1),
)


class Network(NamedTuple):
    """A network of fastprune.models on inputs of one shape."""

    name: str
    batch: int
    shape: tuple[int, int, int] = (3, 32, 32)

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}"


INFERENCE = (
    Network("resnet50-imagenet", 1, (3, 224, 224)),
    Network("resnet50-imagenet", 16, (3, 224, 224)),
    Network("vgg-19", 64),
    Network("wrn-28-8", 64),
    Network("resnet-20", 128),
)
TRAINING = (Network("wrn-28-2", 128), Network("vgg-19", 128))
