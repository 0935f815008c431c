"""Path norms: the derivative of the linearized network, at any depth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastprune as fp
from effective_models import CASES, Case, random_masks
from fastprune.reference import path_norm as reference


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_is_the_derivative_of_the_linearized_network(
    case: Callable[[], Case], density: float
) -> None:
    model, x = case()
    masks = random_masks(model, density, 3)
    plain = reference.linearized(model, masks)
    weights = {n: p for n, p in plain.named_parameters() if n in masks}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in masks:
                weights[n].copy_(p.double().abs() * masks[n])
    total = plain(torch.ones_like(x[:1], dtype=torch.float64)).sum()
    expected = torch.autograd.grad(total, list(weights.values()))
    found = fp.path_norms(model, masks, example_input=x)
    assert found.exponent == 0
    for n, e in zip(weights, expected, strict=True):
        torch.testing.assert_close(found[n], e * masks[n], rtol=1e-10, atol=0)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_finite_at_depth_1000(size: float) -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(1000)])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(size)
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    masks["0.weight"][0] = False
    found = fp.path_norms(model, masks, example_input=torch.zeros(1, 3))
    first, last = found["0.weight"], found["999.weight"]
    assert all(torch.isfinite(t).all() for t in found.values())
    assert (first[0] == 0).all()
    assert (first[1:] > 0).all()
    # By symmetry: 2/3 of all paths through every entry of the last layer's 9; those of the first.
    assert torch.equal(first[1:], first[1, 0].expand(2, 3))
    torch.testing.assert_close(float(last.sum()), float(first.sum()), rtol=1e-9, atol=0)
    # One path is size**999 long, 3 to the 998th of them pass through a weight of the first layer.
    log2 = torch.log2(first[1, 0]).item() + found.exponent
    expected = 999 * torch.log2(torch.tensor(size, dtype=torch.float64)).item()
    assert log2 == pytest.approx(expected + 999 * 1.584962500721156, rel=1e-9)


def test_a_weak_branch_beside_a_strong_one_stays_finite() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strong = nn.Linear(2, 2)
            self.weak = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.strong(x) + self.weak(x)

    model = Net().double()
    with torch.no_grad():
        model.strong.weight.fill_(1e100)
        model.weak.weight.fill_(1e-100)
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    found = fp.path_norms(model, masks, example_input=torch.zeros(1, 2))
    assert torch.equal(found["strong.weight"], torch.ones(2, 2).double())
    assert torch.equal(found["weak.weight"], torch.ones(2, 2).double())


def test_attention_gives_every_weight_a_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    masks = {n: torch.ones_like(p).bool() for n, p in layer.named_parameters() if p.dim() > 1}
    found = fp.path_norms(layer, masks, example_input=torch.zeros(1, 5, 8))
    assert all((t > 0).all() for t in found.values())


def test_an_operation_without_a_linearized_form_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i1e(x)

    with pytest.raises(fp.effective.UnknownOperationError, match="aten::special_i1e"):
        fp.path_norms(Odd(), {}, example_input=torch.zeros(1, 4))
