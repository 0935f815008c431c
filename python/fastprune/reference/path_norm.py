"""Oracle for effective sparsity: the all-ones pass of the papers, in float64.

Source: Vysogorets and Kempe 2023, section 3, after Tanaka et al. 2020: with weights of 0 and 1, no
biases, activations and normalization left out, and average pooling, a weight is active where the
gradient of the summed output on an input of ones is positive. Sums of paths overflow and underflow
in depth: for networks of a few layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_PASSED = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Dropout,
)


def linearized(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A float64 copy that adds up its paths: every weight 1, or its mask, and no bias."""
    plain = copy.deepcopy(model).double().eval()
    for module in list(plain.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, _PASSED):
                setattr(module, name, nn.Identity())
            elif isinstance(child, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
                average = getattr(nn, type(child).__name__.replace("Max", "Avg"))
                pool = average(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, name, pool)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in masks:
                parameter.copy_(masks[name])
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return plain


def active(
    model: nn.Module, masks: Mapping[str, Tensor], example_input: Tensor
) -> dict[str, Tensor]:
    """Which kept weights lie on a path from the input to the output; names as in ``masks``."""
    plain = linearized(model, masks)
    weights = {n: p for n, p in plain.named_parameters() if n in masks}
    ones = torch.ones_like(example_input[:1], dtype=torch.float64)
    total = plain(ones).sum()
    if not total.requires_grad:
        return {n: torch.zeros_like(masks[n]) for n in masks}
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return {
        n: torch.zeros_like(masks[n]) if g is None else (g > 0) & masks[n]
        for n, g in zip(weights, gradients, strict=True)
    }
