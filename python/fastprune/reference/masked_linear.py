"""Oracle for masked_linear: mask the weight, then torch's own dense operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def present(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with exact zeros where the mask says absent (a stored NaN does not survive)."""
    return torch.where(mask, weight, torch.zeros_like(weight))


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (W * M)^T + b."""
    return F.linear(x, present(weight, mask), bias)


def masked_linear_input_grad(grad: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Gradient of x: grad (W * M)."""
    return grad @ present(weight, mask)


def masked_linear_weight_grad(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Gradient of W sampled at the mask: (grad^T x) * M."""
    return present(grad.t() @ x, mask)
