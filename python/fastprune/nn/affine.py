"""One scale and shift per channel: what a BatchNorm is in inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelAffine(nn.Module):
    """y = x * scale[c] + shift[c] for (N, C, H, W), then ReLU if asked; the layout of x is kept.

    Args:
        scale, shift: (C,), in float32 (float64 for float64 activations).
        relu: whether max(y, 0) is returned; a NaN stays.
    Inference only: no gradient.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, *, relu: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.relu = relu

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> ChannelAffine:
        """What ``norm`` computes in evaluation mode, folded in float64."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        kind = torch.float64 if norm.running_mean.dtype == torch.float64 else torch.float32
        return cls(scale.to(kind), shift.to(kind))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        y: Tensor = torch.ops.fastprune.channel_affine(x, self.scale, self.shift, self.relu)
        return y

    def extra_repr(self) -> str:
        """Channels, and whether ReLU follows."""
        return f"{self.scale.numel()}, relu={self.relu}"
