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


class MonLinear(NamedTuple):
    """A fully connected equilibrium layer: A and B of (features, features)."""

    features: int
    batch: int
    sparsity: float

    def __str__(self) -> str:
        return f"{self.features} features, batch {self.batch}, {100 * self.sparsity:g} % pruned"


class MonConv(NamedTuple):
    """A convolutional one, 3x3; the images' size, without the border."""

    channels: int
    size: int
    batch: int
    sparsity: float

    def __str__(self) -> str:
        return (
            f"{self.channels} ch {self.size}x{self.size}, batch {self.batch}, "
            f"{100 * self.sparsity:g} % pruned"
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


# On a GPU (bench/cuda): what is aimed for is a speedup over torch's dense op in the same run, at a
# sparsity. Other sparsities are measured too.
class Aims(NamedTuple):
    """Cases of one table: sparsity -> least speedup over dense, None where nothing is promised."""

    cases: tuple[Linear, ...]
    speedups: dict[float, float | None]


# Weights stream from memory once: bytes decide.
GPU_BATCH_1 = Aims(
    (Linear(8192, 8192, 1), Linear(28672, 8192, 1)), {0.5: 1.35, 0.8: 2.8, 0.9: 4.5, 0.95: 8.0}
)
GPU_SMALL_BATCH = Aims(
    (*(Linear(8192, 8192, batch) for batch in (16, 32, 64)), Linear(28672, 8192, 16)),
    {0.5: 1.2, 0.7: 2.0, 0.8: 2.0, 0.9: 2.0},
)
# Strict float32, the activations of a block of columns in shared memory.
GPU_FLOAT32 = Aims(
    (
        Linear(4096, 512, 1024),
        *(Linear(4096, 1024, batch) for batch in (256, 1024, 4096)),
        Linear(2048, 2048, 1024),
    ),
    {0.8: 1.5, 0.9: 3.0, 0.95: 6.0},
)
# Dense is compute bound here: sparse has to know when not to run.
GPU_LARGE_BATCH = Aims(
    tuple(Linear(4096, 4096, batch) for batch in (192, 512, 2048)),
    {0.5: 0.97, 0.8: 0.97, 0.95: 0.97, 0.98: None},
)
GPU_LEAST_OVER_CSR = 2.0

GPU_CONV = tuple(
    Conv(channels, size, batch)
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))
    for batch in (1, 32)
)
GPU_CONV_SPARSITIES = (0.8, 0.9, 0.95)

GPU_GRADIENTS = (Linear(4096, 4096, 64), Linear(4096, 1024, 1024))
GPU_GRADIENT_CONV = (Conv(128, 28, 32), Conv(512, 7, 32))
GPU_GRADIENT_SPARSITIES = (0.8, 0.95)

# Where a float32 weight gradient is better sampled at the mask: large, small, and of a short batch.
GPU_WEIGHT_GRADIENTS = (
    Linear(4096, 4096, 4096),
    Linear(1024, 1024, 4096),
    Linear(1024, 1024, 1024),
    Linear(4096, 4096, 64),
)
GPU_WEIGHT_GRADIENT_DENSITIES = (0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02)

GPU_PACK = (Linear(8192, 8192, 1), Linear(28672, 8192, 1))

# Every form of the product by itself: where they cross is the dispatch table.
GPU_FORMS = Linear(4096, 4096, 1)
GPU_FORM_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
GPU_FORM_DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)

# Scores of a selection, what they may take, and how much faster than by kthvalue.
GPU_SELECTION = 25_600_000
GPU_SELECTION_SECONDS = 150e-6
GPU_SELECTION_OVER_KTHVALUE = 100.0
GPU_LARGE_SELECTION = 1_000_000_000
# Over the time of two reads of the factors and one write of the mask.
GPU_SELECTION_OVER_FLOOR = 1.5

# Equilibria: (n, batch, sparsity), and how much faster than the loop of torch's ops at a size;
# channels, padded size and batch of the convolution.
GPU_EQUILIBRIA = ((87, 128, 0.0), (1024, 128, 0.0), (1024, 128, 0.95))
GPU_EQUILIBRIUM_OVER_LOOP = {(87, 128): 50.0}
GPU_EQUILIBRIUM_CONV = (81, 34, 16)
GPU_EQUILIBRIUM_TOL = 1e-2

# The notebook size of Winston and Kolter's programs, single samples, and a large layer; the paper's
# networks.
MON_LINEAR = (
    MonLinear(87, 128, 0.0),
    MonLinear(87, 128, 0.9),
    MonLinear(87, 1, 0.0),
    MonLinear(512, 1, 0.0),
    MonLinear(1024, 128, 0.95),
)
MON_CONV = (
    MonConv(81, 32, 16, 0.0),
    MonConv(81, 32, 16, 0.9),
    MonConv(81, 32, 16, 0.99),
)
