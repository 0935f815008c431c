"""Masked layers, what their plans must give, and calls of the ops that take plans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastprune as fp
from layouts import same_bits

OPS = torch.ops.fastprune


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """A masked layer whose rows differ in length, and an input."""
    torch.manual_seed(seed)
    layer = nn.Linear(37, 70) if kind == "linear" else nn.Conv2d(6, 10, 3, padding=1)
    g = torch.Generator().manual_seed(seed)
    density = torch.rand(layer.weight.shape[0], generator=g).view(
        -1, *[1] * (layer.weight.dim() - 1)
    )
    mask = torch.rand(layer.weight.shape, generator=g) < density
    masked = (fp.nn.MaskedLinear if kind == "linear" else fp.nn.MaskedConv2d)(layer, mask)
    x = random(19, 37) if kind == "linear" else random(17, 6, 5, 5)
    return masked.to(dtype), x.to(dtype)


def number(pattern: fp.Pattern) -> int:
    return pattern.plan.number(pattern)


def product(
    x: Tensor, weight: Tensor, mask: Tensor | fp.Pattern, bias: Tensor | None = None, **kw: Any
) -> Tensor:
    if weight.dim() == 2:
        return fp.masked_linear(x, weight, mask, bias, **kw)
    return fp.masked_conv2d(x, weight, mask, bias, padding=1, **kw)


def fresh(layer: Any, x: Tensor) -> list[Tensor]:
    """y and all gradients from a mask that is packed for this call: nothing is kept anywhere."""
    x = x.detach().clone().requires_grad_()
    w = layer.weight.detach().clone().requires_grad_()
    b = layer.bias.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = product(x, w, layer.weight_mask, b)
        return [y.detach(), *torch.autograd.grad(y, (x, w, b), torch.cos(y.detach()))]


def used(layer: Any, x: Tensor) -> list[Tensor]:
    """The same by the layer, in inference and in training."""
    with torch.no_grad():
        y = layer(x)
    x = x.detach().clone().requires_grad_()
    recorded = layer(x)
    assert same_bits(y, recorded.detach())
    wanted = (x, layer.weight, layer.bias)
    return [y, *torch.autograd.grad(recorded, wanted, torch.cos(y))]


def check(layer: Any, x: Tensor, what: str = "") -> None:
    for name, got, wanted in zip(
        ("y", "dx", "dw", "db"), used(layer, x), fresh(layer, x), strict=True
    ):
        assert same_bits(got, wanted), f"{what} {name}"


def linear_op(plan: int, **change: Any) -> Tensor:
    a = {
        "x": random(5, 37),
        "weight": random(70, 37),
        "bias": None,
        "plan": plan,
        "version": -1,
        "residual": None,
        "relu": False,
        "layout": 0,
        **change,
    }
    return OPS.planned_linear(*a.values())


def conv_op(plan: int, **change: Any) -> Tensor:
    a = {
        "x": random(5, 6, 5, 5),
        "weight": random(10, 6, 3, 3),
        "bias": None,
        "plan": plan,
        "version": -1,
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "residual": None,
        "relu": False,
        "layout": 0,
        **change,
    }
    return OPS.planned_conv2d(*a.values())
