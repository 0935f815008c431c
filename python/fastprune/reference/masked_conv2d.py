"""Oracle for masked_conv2d: mask the weight, then torch's own dense convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor

from fastprune.reference.masked_linear import present


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolution of x with W * M, plus the bias."""
    return F.conv2d(
        x, present(weight, mask), bias, tuple(stride), tuple(padding), tuple(dilation), groups
    )


def masked_conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    x_sizes: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of x."""
    x_grad: Tensor = torch.nn.grad.conv2d_input(
        tuple(x_sizes),
        present(weight, mask),
        grad,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )
    return x_grad


def masked_conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of W sampled at the mask."""
    full = torch.nn.grad.conv2d_weight(
        x, tuple(mask.shape), grad, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    return present(full, mask)
