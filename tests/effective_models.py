"""Small networks for the tests of effective sparsity, each with an input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, Tensor]


class Residual(nn.Module):
    """A basic block with a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm(self.conv1(x)))
        return torch.relu(self.conv2(inner) + self.shortcut(x))


class PlainResidual(Residual):
    """The same without activations and normalization, which the all-ones oracle leaves out."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + self.shortcut(x)


def mlp() -> Case:
    layers = [nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 5)]
    return nn.Sequential(nn.Flatten(), *layers), torch.randn(2, 1, 4, 5)


def convolutions() -> Case:
    layers = [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ]
    return nn.Sequential(*layers), torch.randn(2, 3, 8, 8)


def residuals() -> Case:
    layers = [
        PlainResidual(2, 4),
        PlainResidual(4, 6, 2),
        PlainResidual(6, 6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ]
    return nn.Sequential(*layers), torch.randn(1, 2, 9, 7)


def geometries() -> Case:
    layers = [
        nn.Conv2d(4, 8, 5, stride=3, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(90, 7),
    ]
    return nn.Sequential(*layers), torch.randn(1, 4, 17, 13)


def one_dimension() -> Case:
    layers = [
        nn.Conv1d(2, 5, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.ConvTranspose1d(5, 3, 4, 2),
        nn.AdaptiveAvgPool1d(7),
        nn.Flatten(),
        nn.Linear(21, 4),
    ]
    return nn.Sequential(*layers), torch.randn(1, 2, 11)


def three_dimensions() -> Case:
    layers = [
        nn.Conv3d(2, 4, 3, padding=1, stride=(1, 2, 1)),
        nn.ReLU(),
        nn.AvgPool3d(2, 1),
        nn.Conv3d(4, 3, (1, 2, 3)),
        nn.Flatten(),
        nn.Linear(54, 4),
    ]
    return nn.Sequential(*layers), torch.randn(1, 2, 4, 7, 6)


class Branches(nn.Module):
    """Concatenation, slices, permutation, padding and views between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 3, 3, padding=1)
        self.right = nn.Conv2d(2, 3, 1)
        self.mix = nn.Conv2d(5, 4, 3)
        self.rows = nn.Linear(6, 5)
        self.out = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], dim=1)[:, :5]
        mixed = self.mix(nn.functional.pad(both, (1, 1, 0, 2)))
        a, b = mixed.split(2, dim=1)
        turned = torch.cat([b, a], dim=1).permute(0, 2, 1, 3).contiguous()
        tokens = self.rows(turned.transpose(1, 2))  # one linear layer over many tokens
        return self.out(tokens.mean(dim=2).reshape(1, -1))


def branches() -> Case:
    return Branches(), torch.randn(1, 2, 6, 6)


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(self.first(x)))


def twice() -> Case:
    return Twice(), torch.randn(3, 6)


CASES: list[Callable[[], Case]] = [
    mlp,
    convolutions,
    residuals,
    geometries,
    one_dimension,
    three_dimensions,
    branches,
    twice,
]


def random_masks(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    """Masks of all weights of two or more dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in model.named_parameters()
        if p.dim() > 1
    }
