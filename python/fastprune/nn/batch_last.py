"""torch's pooling and normalization layers, taught to keep the batch innermost.

Same parameters, buffers, results and ``state_dict`` as torch's own; they only look at how the input
is stored (see :mod:`fastprune.ops.layout`).
"""

from __future__ import annotations

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


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` in the layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same. To torch, a batch-last tensor is one image per channel."""
        if not layout.is_batch_last(x):
            return super().forward(x)
        n, c, h, w = x.shape
        y = super().forward(x.permute(1, 2, 3, 0).reshape(1, c, h * w * n, 1))
        return y.view(c, h, w, n).permute(3, 0, 1, 2)


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
        module.__class__ = _TAUGHT.get(type(module), type(module))  # type: ignore[assignment, call-overload]
