"""torch's pooling and normalization layers, taught to keep the batch innermost.

Same parameters, buffers, results and ``state_dict`` as torch's own; they only look at how the input
is stored (see :mod:`fastprune.ops.layout`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.ops import layout


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` in the layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, out height, out width)."""
        return super().forward(x) if self.return_indices else layout.pool(super().forward, x)


class AvgPool2d(nn.AvgPool2d):
    """``nn.AvgPool2d`` in the layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, out height, out width)."""
        return layout.pool(super().forward, x)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` in the layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, out height, out width)."""
        return layout.pool(super().forward, x)


def versions(tensors: Iterable[Tensor | None]) -> tuple[Any, ...] | None:
    """What changes when one of the tensors is replaced or changed in place; None: not known."""
    try:
        return tuple((id(t), t._version) if t is not None else None for t in tensors)
    except RuntimeError:  # inference tensors count no changes
        return None


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies by and adds in evaluation mode, per channel, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` in the layout of its input; one scale and shift where nothing is learned.

    The scale and shift are kept until a parameter or statistic is changed in place or replaced.
    """

    # Set where a ReLU that follows was fused into the layer.
    fused_relu = False
    _kept: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        if self._is_affine(x):
            return self._affine(x)
        if layout.is_batch_last(x):  # to torch, one image per channel
            n, c, h, w = x.shape
            y = super().forward(x.permute(1, 2, 3, 0).reshape(1, c, h * w * n, 1))
            y = y.view(c, h, w, n).permute(3, 0, 1, 2)
        else:
            y = super().forward(x)
        return torch.relu(y) if self.fused_relu else y

    def train(self, mode: bool = True) -> BatchNorm2d:
        """As ``nn.Module.train``; what was kept is forgotten."""
        self._kept = None
        return super().train(mode)

    def _is_affine(self, x: Tensor) -> bool:
        return (
            not self.training
            and self.running_mean is not None
            and x.dim() == 4
            and x.device.type == "cpu"
            and x.dtype == self.running_mean.dtype
            and not (torch.is_grad_enabled() and (x.requires_grad or self.affine))
            and not torch.compiler.is_compiling()
        )

    def _affine(self, x: Tensor) -> Tensor:
        now = versions((self.running_mean, self.running_var, self.weight, self.bias))
        kept = self._kept
        if kept is None or now is None or kept[0] != now:
            scale, shift = scale_and_shift(self)
            kind = torch.float64 if x.dtype == torch.float64 else torch.float32
            kept = self._kept = (now, scale.to(kind), shift.to(kind))
        y: Tensor = torch.ops.fastprune.channel_affine(x, kept[1], kept[2], self.fused_relu)
        return y


_TAUGHT = {
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d,
    nn.BatchNorm2d: BatchNorm2d,
}


def understand_batch_last_(model: nn.Module) -> None:
    """Turn the pooling and normalization layers of a model into those above, in place.

    Exact types only: a subclass may compute something else.
    """
    for module in model.modules():
        taught = _TAUGHT.get(type(module))
        if taught is not None:
            module.__class__ = taught
