"""What the machine can do at best: ceilings, measured, and the floors they imply for a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune import timing
from fastprune.ops import masked_linear, pack
from fastprune.peers.layers import Layer, Linear

# A float32 value and a 16-bit index.
_BYTES_PER_KEPT_WEIGHT = 6


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this machine with the present number of threads.

    Attributes:
        flops: per second, of multiply-adds whose operand is in the L1 cache.
        bandwidth: bytes per second, read plus written, of a large copy.
    """

    flops: float
    bandwidth: float


def ceilings(min_time: float = 0.2) -> Ceilings:
    """Measure both rates, ``min_time`` seconds each.

    The first is fastprune's product kernel itself on a full mask with one block of columns: no
    short rows, nothing but its inner loop.
    """
    rows, cols, batch = 512, 128, 2048
    x, w = torch.randn(batch, cols), torch.randn(rows, cols)
    pattern = pack(torch.ones(rows, cols, dtype=torch.bool))
    source = torch.empty(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    with torch.inference_mode():
        times = timing.measure(
            {
                "product": lambda: masked_linear(x, w, pattern),
                "copy": lambda: target.copy_(source),
            },
            min_time=min_time,
        )
    return Ceilings(
        2.0 * rows * cols * batch / times["product"].median,
        2.0 * source.numel() / times["copy"].median,
    )


@dataclass(frozen=True)
class Floor:
    """The least that one sparse product of a layer takes.

    Attributes:
        flops: 2 per kept weight and output that it contributes to; in a convolution the outputs
            where the weight would only meet padding do not count.
        bytes: activations in and out and the kept weights (a float32 value and a 16-bit index),
            each moved once. What stays in a cache between calls moves faster than a large copy,
            so a small layer can be quicker than this floor.
    """

    flops: int
    bytes: int

    def seconds(self, ceilings: Ceilings) -> float:
        """The larger of the two times at the ceilings."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bandwidth)


def floor(layer: Layer, mask: Tensor) -> Floor:
    """The floor of a layer with this mask, float32."""
    nnz = int(mask.count_nonzero())
    inputs = int(torch.Size(layer.input_shape).numel())
    if isinstance(layer, Linear):
        products, outputs = nnz * layer.batch, layer.rows * layer.batch
    else:
        # Outputs along one axis whose input pixel for kernel position k lies inside the map.
        starts = torch.arange(layer.out_size) * layer.stride - layer.padding
        inside = torch.stack(
            [((starts + k >= 0) & (starts + k < layer.size)).sum() for k in range(layer.kernel)]
        )
        kept = mask.sum(dim=(0, 1))
        products = layer.batch * int((kept * inside[:, None] * inside[None, :]).sum())
        outputs = layer.batch * layer.rows * layer.out_size**2
    return Floor(2 * products, 4 * (inputs + outputs) + _BYTES_PER_KEPT_WEIGHT * nnz)
