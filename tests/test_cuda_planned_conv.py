"""Convolutions and panels of a plan on CUDA, by emulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import emulated
import fastprune as fp
import oracle

pytestmark = emulated.needs_emulation

OPS = emulated.ops
GEOMETRIES = [
    {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]},
    {"stride": [2, 3], "padding": [0, 2], "dilation": [2, 1]},
]


@pytest.fixture(autouse=True)
def _form() -> Iterator[None]:
    emulated.configure(1)
    yield
    fp._C.set_cuda_form("auto")
    emulated.configure(0)


class Case:
    """A convolution of 2 groups, its plan, and what it should give."""

    def __init__(self, geometry: dict[str, list[int]], dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        self.geometry, self.groups = geometry, 2
        self.x = oracle.integers((3, 8, 9, 7), dtype, g)
        self.weight = oracle.integers((6, 4, 3, 3), dtype, g)
        self.mask = torch.rand(6, 4, 3, 3, generator=g) < 0.3
        self.bias = oracle.integers((6,), dtype, g)
        pattern = fp.pack(self.mask, groups=2)
        self.plan = OPS.make_plan(
            pattern.row_ptr,
            pattern.offset,
            pattern.transposed_row_ptr,
            pattern.transposed_offset,
            [6, 2, 4, 9, pattern.block_depth, pattern.transposed_block_depth],
        )

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        present = torch.where(self.mask, weight, 0).double()
        return F.conv2d(x.double(), present, self.bias.double(), groups=2, **self.geometry)

    def call(self, weight: Tensor, version: int, *rest: Any) -> Tensor:
        rest = rest or (None, False, 0)
        return OPS.planned_conv2d(
            self.x, weight, self.bias, self.plan, version, *self.geometry.values(), 2, *rest
        )


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_convolution_and_gradients(geometry: dict[str, list[int]], dtype: torch.dtype) -> None:
    case = Case(geometry, dtype)
    expected = case.reference(case.x, case.weight)
    for version in (-1, 5, 5, 6):
        y = case.call(case.weight, version)
        assert torch.equal(y.double(), expected.to(dtype).double())
    residual = torch.ones_like(y)
    fused = case.call(case.weight, 6, residual, True, 0)
    assert torch.equal(fused, torch.relu(y + residual))
    x = case.x.double().requires_grad_()
    weight = case.weight.double().requires_grad_()
    grad = oracle.integers(tuple(y.shape), dtype, torch.Generator().manual_seed(1))
    case.reference(x, weight).backward(grad.double())
    rest = (*geometry.values(), 2)
    for version in (-1, 7, 7):
        x_grad = OPS.planned_conv2d_input_grad(
            grad, case.weight, case.plan, version, case.x.shape, *rest
        )
        assert torch.equal(x_grad.double(), x.grad.to(dtype).double())
    weight_grad = OPS.planned_conv2d_weight_grad(grad, case.x, case.plan, case.weight.shape, *rest)
    assert (weight_grad[~case.mask] == 0).all()
    if dtype != torch.bfloat16:
        assert torch.equal(weight_grad.double(), weight.grad)


def test_a_changed_weight_is_read_when_the_version_says_so() -> None:
    case = Case(GEOMETRIES[0], torch.float32)
    weight = case.weight.clone()
    before = case.call(weight, 3)
    weight.mul_(2)
    assert torch.equal(case.call(weight, 3), before)  # kept
    after = case.reference(case.x, weight).float()
    assert torch.equal(case.call(weight, 4), after)
    weight.mul_(2)
    anew = case.call(weight, 4 | (1 << 62))
    assert torch.equal(anew, case.reference(case.x, weight).float())


def test_geometries_beyond_what_is_kept_are_made_for_one_call() -> None:
    case = Case(GEOMETRIES[0], torch.float32)
    held = []
    for size in range(3, 24):
        case.x = torch.ones(1, 8, size, 5)
        assert torch.equal(case.call(case.weight, 1), case.reference(case.x, case.weight).float())
        held.append(fp._C.plan_bytes(case.plan))
    assert held[-1] == held[-2] > held[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 33, 130])
def test_linear_products_by_panels(dtype: torch.dtype, batch: int) -> None:
    fp._C.set_cuda_form("panel")
    g = torch.Generator().manual_seed(2)
    weight, bias = oracle.integers((45, 70), dtype, g), oracle.integers((45,), dtype, g)
    mask = torch.rand(45, 70, generator=g) < 0.2
    pattern = fp.pack(mask)
    plan = OPS.make_plan(
        pattern.row_ptr, pattern.offset, pattern.transposed_row_ptr, pattern.transposed_offset,
        [45, 1, 70, 1, pattern.block_depth, pattern.transposed_block_depth],
    )  # fmt: skip
    x = oracle.integers((batch, 70), dtype, g)
    present = torch.where(mask, weight, 0).double()
    expected = (x.double() @ present.t() + bias.double()).to(dtype)
    residual = torch.ones_like(expected)
    for version in (-1, 2, 2):
        y = OPS.planned_linear(x, weight, bias, plan, version, None, False, 0)
        assert torch.equal(y, expected)
    y = OPS.planned_linear(x, weight, bias, plan, 2, residual, True, 0)
    assert torch.equal(y, torch.relu(expected + residual))
    grad = oracle.integers((batch, 45), dtype, g)
    x_grad = OPS.planned_linear_input_grad(grad, weight, plan, 2)
    assert torch.equal(x_grad, (grad.double() @ present).to(dtype))
