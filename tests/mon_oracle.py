"""Models with an equilibrium layer as plain functions of their parameters, in float64.

The equilibrium is found by damped iteration and Newton's method; its last Newton steps are part of
autograd's graph: two of them already have the exact second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp

SLOPES = {
    torch.relu: lambda y: (y > 0).to(y.dtype),
    torch.sigmoid: lambda y: torch.sigmoid(y) * (1 - torch.sigmoid(y)),
}
SIGMA = {"relu": torch.relu, "sigmoid": torch.sigmoid}


def linear_model(activation: str = "relu", seed: int = 0, **settings: object) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"tol": 1e-14, "max_iter": 3000, "on_failure": "ignore", **settings}
    mon = fp.nn.MonDEQLinear(5, 6, activation=activation, **settings)
    return _named(mon, nn.Linear(6, 3))


def conv_model(activation: str = "relu", seed: int = 0, **settings: object) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"tol": 1e-14, "max_iter": 3000, "on_failure": "ignore", **settings}
    mon = fp.nn.MonDEQConv2d(2, 3, activation=activation, **settings)
    with torch.no_grad():
        mon.g.fill_(0.8)
        mon.h.fill_(1.3)
    return _named(mon, nn.Flatten(), nn.Linear(3 * 5 * 5, 3))


def _named(mon: nn.Module, *rest: nn.Module) -> nn.Module:
    model = nn.Sequential()
    model.add_module("mon", mon)
    for i, layer in enumerate(rest):
        model.add_module("head" if i == len(rest) - 1 else f"between{i}", layer)
    return model.double()


def inputs(model: nn.Module, batch: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (5,) if isinstance(model.mon, fp.nn.MonDEQLinear) else (2, 3, 3)
    x = torch.randn(batch, *shape, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 3, (batch,), generator=g)


def logits(model: nn.Module, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the model computes, with the parameters ``p``."""
    return F.linear(equilibrium(model.mon, p, x).flatten(1), p["head.weight"], p["head.bias"])


def equilibrium(mon: nn.Module, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """z, by Newton's method."""
    sigma = SIGMA[mon.activation]
    A, B = p.get("mon.A"), p.get("mon.B")
    if isinstance(mon, fp.nn.MonDEQLinear):
        bias = F.linear(x, p["mon.U.weight"], p["mon.U.bias"])
        inside = torch.ones(bias.shape[1], dtype=bias.dtype)
        ga, gb = A.t(), B.t()  # of rows: A z is z @ A^T
        w = (1 - mon.m) * torch.eye(len(ga), dtype=x.dtype) - ga @ ga.t() + gb - gb.t()
        return _solve(w, bias, sigma, inside)
    bias = F.conv2d(x, p["mon.U.weight"], p["mon.U.bias"], padding=2)
    shape = bias.shape[1:]
    ga = _dense(A / A.norm(), shape)
    gb = _dense(B / B.norm(), shape)
    w = (1 - mon.m) * torch.eye(len(ga), dtype=x.dtype)
    w = w - p["mon.g"] * ga @ ga.t() + p["mon.h"] * (gb - gb.t())
    inside = torch.zeros(shape, dtype=x.dtype)
    inside[:, 1:-1, 1:-1] = 1
    return _solve(w, bias.flatten(1), sigma, inside.flatten()).view(bias.shape)


def _dense(kernel: Tensor, shape: torch.Size) -> Tensor:
    basis = torch.eye(math.prod(shape), dtype=kernel.dtype).view(-1, *shape)
    return F.conv2d(F.pad(basis, (1, 1, 1, 1), mode="circular"), kernel).flatten(1)


def _solve(w: Tensor, bias: Tensor, sigma: object, inside: Tensor) -> Tensor:
    """Rows z with z = inside * sigma(z w + bias)."""
    eye = torch.eye(len(w), dtype=w.dtype)

    def newton(z: Tensor) -> Tensor:
        y = z @ w + bias
        slope = inside * SLOPES[sigma](y)
        # (I - J W) step = residual, for columns; rows: step (I - w J).
        jacobian = eye - slope[:, :, None] * w.t()
        return z - torch.linalg.solve(jacobian, z - inside * sigma(y))

    with torch.no_grad():
        z = torch.zeros_like(bias)
        step = 1 / float(torch.linalg.matrix_norm(eye - w, 2)) ** 2
        for _ in range(2000):
            z = z + min(step, 1.0) * (inside * sigma(z @ w + bias) - z)
        for _ in range(4):
            z = newton(z)
        assert float((z - inside * sigma(z @ w + bias)).abs().max()) < 1e-12
    for _ in range(3):
        z = newton(z)
    return z


def parameters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Leaves, with pruned entries zero."""
    masks = masks or {}
    return {
        n: (p.detach() * masks[n] if n in masks else p.detach().clone()).requires_grad_()
        for n, p in model.named_parameters()
    }


def snip(model, names, x, y, masks=None) -> dict[str, Tensor]:
    """|w g(w . m)| with the masked w."""
    p = parameters(model, masks)
    g = torch.autograd.grad(F.cross_entropy(logits(model, p, x), y), [p[n] for n in names])
    return {n: (p[n] * d).detach().abs() for n, d in zip(names, g, strict=True)}


def force(model, names, x, y, masks=None) -> dict[str, Tensor]:
    """|w g(w . m)| with the dense w."""
    p, dense = parameters(model, masks), dict(model.named_parameters())
    g = torch.autograd.grad(F.cross_entropy(logits(model, p, x), y), [p[n] for n in names])
    return {n: (dense[n] * d).detach().abs() for n, d in zip(names, g, strict=True)}


def grasp(model, names, x, y, masks=None) -> dict[str, Tensor]:
    """w (H g), logits over 200."""
    p = parameters(model, masks)
    leaves = [p[n] for n in names]
    loss = F.cross_entropy(logits(model, p, x) / 200, y)
    g = torch.autograd.grad(loss, leaves, create_graph=True)
    product = sum((d * d.detach()).sum() for d in g)
    hg = torch.autograd.grad(product, leaves)
    return {n: (p[n] * d).detach() for n, d in zip(names, hg, strict=True)}


def synflow(model, names, x, y, masks=None) -> dict[str, Tensor]:
    """w dR/dw at absolute parameters, on ones."""
    p = {n: t.detach().abs().requires_grad_() for n, t in parameters(model, masks).items()}
    r = logits(model, p, torch.ones_like(x[:1])).sum()
    g = torch.autograd.grad(r, [p[n] for n in names])
    return {n: (p[n] * d).detach().abs() for n, d in zip(names, g, strict=True)}


def best(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k largest, the earlier of equals first."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    order = torch.sort(flat, descending=True, stable=True).indices
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[:k]] = True
    parts = kept.split([s.numel() for s in scores.values()])
    return {n: part.view(s.shape) for part, (n, s) in zip(parts, scores.items(), strict=True)}
