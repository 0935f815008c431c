"""Activations with the batch innermost, exact convolutions in float64, and exact comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oracle import guarded

# What csrc/ops/product.h calls a result's layout.
CONTIGUOUS, LIKE_INPUT, BATCH_LAST = 0, 1, 2
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def batch_last(t: Tensor, guard: bool | None = None) -> Tensor:
    """The same values stored batch innermost; guard: at an unreadable page (True: at its end)."""
    order = (*range(1, t.dim()), 0)
    stored = t.permute(order)
    stored = stored.contiguous() if guard is None else guarded(stored, guard)
    return stored.permute(t.dim() - 1, *range(t.dim() - 1))


def is_batch_last(t: Tensor) -> bool:
    """Stored batch innermost without gaps, and not also contiguous."""
    return not t.is_contiguous() and t.permute(*range(1, t.dim()), 0).is_contiguous()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit: signed zeros and NaN payloads count."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


Bound = tuple[np.ndarray, np.ndarray, np.ndarray]


def conv_products(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    geometry: dict[str, Any],
) -> tuple[Bound, Bound, Bound]:
    """(value, S, n) of y, of the gradient of x and of that of the weight at the mask, in float64.

    For dtypes narrower than float64: the error of this reference is 2^-29 of their bound.
    """
    kept = torch.where(mask, weight, 0).double()

    def all_three(x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
        x, w = x.requires_grad_(), w.requires_grad_()
        y = F.conv2d(x, w, None, **geometry)
        return [y.detach(), *torch.autograd.grad(y, (x, w), g)]

    x, grad = x.double(), grad.double()
    value = all_three(x.clone(), kept.clone(), grad)
    s = all_three(x.abs(), kept.abs(), grad.abs())
    n = all_three(torch.ones_like(x), mask.double(), torch.ones_like(grad))
    if bias is not None:
        b = bias.double().view(1, -1, 1, 1)
        value[0], s[0], n[0] = value[0] + b, s[0] + b.abs(), n[0] + 1
    value[2], s[2] = value[2] * mask, s[2] * mask
    y, dx, dw = ((v.numpy(), a.numpy(), k.numpy()) for v, a, k in zip(value, s, n, strict=True))
    return y, dx, dw
