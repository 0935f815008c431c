"""Activations stored with the batch innermost ("batch last"), and torch's own ops on them.

A 4-d tensor (N, C, H, W) is batch last when its strides are (1, H * W * N, W * N, N). Shapes and
indexing are as ever; only the order in memory differs, as with ``torch.channels_last``. The sparse
convolutions read and write this layout without conversions, and torch's elementwise ops keep it.
The functions here are for those that would not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def is_batch_last(x: Tensor) -> bool:
    """Whether a 4-d tensor is stored with the batch innermost, and not also contiguous."""
    if x.dim() != 4 or x.shape[0] < 2 or x.stride(0) != 1:
        return False
    n, _, h, w = x.shape
    return x.stride() == (1, h * w * n, w * n, n) and x.shape[1:].numel() > 1


def batch_last(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) stored with the batch innermost; itself if it is. No gradient."""
    return x if is_batch_last(x) else torch.ops.fastprune.convert_layout(x, True)


def contiguous(x: Tensor) -> Tensor:
    """``x`` stored contiguously; itself if it is. A fast way for batch-last tensors.

    Differentiable only through torch's own ``contiguous``, which runs when a gradient is wanted.
    """
    if x.is_contiguous() or x.requires_grad or not is_batch_last(x):
        return x.contiguous()
    return torch.ops.fastprune.convert_layout(x, False)  # type: ignore[no-any-return]


def pool(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A torch pooling function of (N, C, H, W), in the layout of ``x``.

    Channels pool independently of each other, and so do images: with the two exchanged, a
    batch-last tensor is a channels_last one, for which torch has fast kernels.
    """
    if not is_batch_last(x):
        return function(x, *args, **kwargs)
    return function(x.permute(1, 0, 2, 3), *args, **kwargs).permute(1, 0, 2, 3)


def max_pool2d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.nn.functional.max_pool2d`` in the layout of ``x``; no indices."""
    return pool(F.max_pool2d, x, *args, **kwargs)


def avg_pool2d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.nn.functional.avg_pool2d`` in the layout of ``x``."""
    return pool(F.avg_pool2d, x, *args, **kwargs)


def adaptive_avg_pool2d(x: Tensor, output_size: Any) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool2d`` in the layout of ``x``."""
    return pool(F.adaptive_avg_pool2d, x, output_size)


def adaptive_max_pool2d(x: Tensor, output_size: Any) -> Tensor:
    """``torch.nn.functional.adaptive_max_pool2d`` in the layout of ``x``; no indices."""
    return pool(F.adaptive_max_pool2d, x, output_size)


def pad(
    x: Tensor, padding: list[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    """``torch.nn.functional.pad`` that keeps the batch innermost (also for a strided view)."""
    if x.dim() != 4 or x.stride(0) != 1 or mode != "constant" or x.shape[0] < 2:
        return F.pad(x, padding, mode, value)
    sides = [*padding, *[0] * (8 - len(padding))]
    moved = F.pad(x.permute(1, 2, 3, 0), sides[6:] + sides[:6], mode, value)
    return moved.permute(3, 0, 1, 2)


@torch.library.register_fake("fastprune::convert_layout")
def _(x: Tensor, batch_last: bool) -> Tensor:
    if not batch_last:
        return x.new_empty(x.shape)
    n, c, h, w = x.shape
    return x.new_empty(c, h, w, n).permute(3, 0, 1, 2)


@torch.library.register_fake("fastprune::channel_affine")
def _(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    return torch.empty_like(x)
