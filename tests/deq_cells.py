"""Cells for the tests of equilibrium layers, and what they are compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fastprune as fp

# Solves to the last digits: a small lambda, as the default one slows Anderson down near the end.
EXACT: dict[str, Any] = {
    "tol": 1e-13,
    "max_iter": 400,
    "regularization": 1e-13,
    "on_failure": "error",
}
SOLVERS = ("anderson", "broyden", "iteration")


class Tanh(nn.Module):
    """tanh(W z + x + b), a contraction of factor 0.6 at most."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n)
        with torch.no_grad():
            self.linear.weight.mul_(0.6 / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Convolutions(nn.Module):
    """Two small convolutions with GroupNorm between, smooth."""

    def __init__(self, channels: int = 4, inner: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x + self.conv2(self.norm(torch.tanh(self.conv1(z) + 1.0))))


class Affine(nn.Module):
    """M z + x, whose equilibrium is a linear system's solution."""

    def __init__(self, n: int, radius: float = 0.7) -> None:
        super().__init__()
        m = torch.randn(n, n)
        self.m = nn.Parameter(m * (radius / torch.linalg.matrix_norm(m, 2)))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.m.T + x

    def solution(self, x: Tensor) -> Tensor:
        eye = torch.eye(len(self.m), dtype=self.m.dtype)
        return torch.linalg.solve(eye - self.m, x.T).T


class Unrolled(nn.Module):
    """The same equilibrium by many plain iterations, differentiated through all of them."""

    def __init__(self, cell: nn.Module, steps: int) -> None:
        super().__init__()
        self.cell, self.steps = cell, steps

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(self.steps):
            z = self.cell(z, x, *args)
        return z


def unrolled(model: nn.Module, steps: int) -> nn.Module:
    """A copy, with the same names, of a model whose equilibrium layers are unrolled."""
    model = copy.deepcopy(model)
    if isinstance(model, fp.nn.DEQ):
        return Unrolled(model.cell, steps)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, fp.nn.DEQ):
                setattr(module, name, Unrolled(child.cell, steps))
    return model
