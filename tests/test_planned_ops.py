"""The ops that take a plan: what they refuse, and what they fuse."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from layouts import BATCH_LAST, CONTIGUOUS, LIKE_INPUT, batch_last, same_bits
from oracle import DTYPES
from plan_cases import OPS, conv_op, linear_op, make, number, random

plan_bytes = fp._C.plan_bytes
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)


@pytest.mark.parametrize("bad", [0, -1, -(2**63), 2**63 - 1, 10**12])
def test_an_unknown_plan_is_an_error(bad: int) -> None:
    grad, w, x = random(5, 70), random(70, 37), random(5, 37)
    images, kernel = random(5, 6, 5, 5), random(10, 6, 3, 3)
    out = random(5, 10, 5, 5)
    for call in (
        lambda: linear_op(bad),
        lambda: OPS.planned_linear_input_grad(grad, w, bad, 0),
        lambda: OPS.planned_linear_weight_grad(grad, x, bad),
        lambda: conv_op(bad),
        lambda: OPS.planned_conv2d_input_grad(out, kernel, bad, 0, [5, 6, 5, 5], *GEOMETRY),
        lambda: OPS.planned_conv2d_weight_grad(out, images, bad, [10, 6, 3, 3], *GEOMETRY),
    ):
        with pytest.raises(
            RuntimeError, match=f"plan: expected the number of a live plan, got {bad}"
        ):
            call()
    assert plan_bytes(bad) == -1
    assert not fp._C.release_plan(bad)


def test_a_released_plan_is_an_error() -> None:
    pattern = fp.pack(random(70, 37) > 0)
    plan = number(pattern)
    linear_op(plan)
    assert fp._C.release_plan(plan)
    with pytest.raises(RuntimeError, match="expected the number of a live plan"):
        fp.masked_linear(random(5, 37), random(70, 37), pattern)


def test_a_plan_of_another_shape_is_an_error() -> None:
    linear, conv = make("linear")[0].pattern, make("conv")[0].pattern
    with pytest.raises(RuntimeError, match="plan: expected one for 70 rows of 37 x 1 in 1 groups"):
        linear_op(number(conv))
    with pytest.raises(RuntimeError, match="plan: expected one for 10 rows of 6 x 9 in 1 groups"):
        conv_op(number(linear))
    with pytest.raises(RuntimeError, match="plan: expected one for 10 rows of 6 x 6"):
        conv_op(number(conv), weight=random(10, 6, 3, 2), padding=[1, 1])
    with pytest.raises(RuntimeError, match="plan: expected one for 10 rows of 3 x 9 in 2 groups"):
        conv_op(number(conv), weight=random(10, 3, 3, 3), groups=2)
    with pytest.raises(RuntimeError, match="plan: expected one for 70 rows of 36 x 1"):
        OPS.planned_linear_weight_grad(random(5, 70), random(5, 36), number(linear))
    with pytest.raises(RuntimeError, match="plan: expected one for 70 rows of 36 x 1"):
        OPS.planned_linear_input_grad(random(5, 70), random(70, 36), number(linear), 0)
    wide = (random(5, 10, 5, 5), random(5, 7, 5, 5), number(conv), [10, 7, 3, 3], *GEOMETRY)
    with pytest.raises(RuntimeError, match="plan: expected one for 10 rows of 7 x 9"):
        OPS.planned_conv2d_weight_grad(*wide)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": 3}, "layout: expected 0, 1 or 2, got 3"),
        ({"layout": -1}, "layout: expected 0, 1 or 2, got -1"),
        ({"residual": random(5, 69)}, "residual: expected size 70 in dimension 1, got 69"),
        ({"residual": random(4, 70)}, "residual: expected size 5 in dimension 0, got 4"),
        ({"residual": random(70)}, "residual: expected 2 dimensions, got 1"),
        ({"residual": random(5, 70).double()}, "residual: expected dtype Float, got Double"),
        ({"x": random(5, 36)}, "x: expected size 37 in dimension 1"),
        ({"x": random(37)}, "x: expected 2 dimensions, got 1"),
        ({"x": random(5, 37).double()}, "weight: expected dtype Double, got Float"),
        ({"bias": random(69)}, "bias: expected size 70"),
        ({"bias": random(70).half()}, "bias: expected dtype Float, got Half"),
        ({"weight": random(70, 37, 1)}, "weight: expected 2 dimensions, got 3"),
    ],
)
def test_bad_arguments_of_the_linear_op(change: dict[str, Any], message: str) -> None:
    pattern = fp.pack(random(70, 37) > 0)
    with pytest.raises(RuntimeError, match=f"planned_linear: {message}"):
        linear_op(number(pattern), **change)
    assert linear_op(number(pattern)).shape == (5, 70)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": 3}, "layout: expected 0, 1 or 2, got 3"),
        ({"residual": random(5, 10, 5, 4)}, "residual: expected size 5 in dimension 3, got 4"),
        ({"residual": random(10, 5, 5)}, "residual: expected 4 dimensions, got 3"),
        ({"residual": random(5, 10, 5, 5).half()}, "residual: expected dtype Float, got Half"),
        ({"x": random(5, 7, 5, 5)}, "x: expected 6 channels, got 7"),
        ({"x": random(6, 5, 5)}, "x: expected 4 dimensions, got 3"),
        ({"x": random(5, 6, 5, 5).half()}, "weight: expected dtype Half, got Float"),
        ({"weight": random(10, 6)}, "weight: expected 4 dimensions, got 2"),
        ({"bias": random(9)}, "bias: expected size 10"),
        ({"stride": [0, 1]}, "stride: expected at least 1, got 0"),
        ({"padding": [-1, 0]}, "padding: expected at least 0, got -1"),
        ({"dilation": [1]}, "stride, padding, dilation: expected two values each"),
        ({"groups": 3}, "groups: expected a positive divisor of the 10"),
        ({"groups": 0}, "groups: expected a positive divisor of the 10"),
        ({"x": random(5, 6, 5, 1), "padding": [1, 0]}, "x: expected a padded input no smaller"),
    ],
)
def test_bad_arguments_of_the_convolution(change: dict[str, Any], message: str) -> None:
    pattern = fp.pack(random(10, 6, 3, 3) > 0)
    with pytest.raises(RuntimeError, match=f"planned_conv2d: {message}"):
        conv_op(number(pattern), **change)
    assert conv_op(number(pattern)).shape == (5, 10, 5, 5)


def test_bad_gradients_are_errors() -> None:
    patterns = fp.pack(random(70, 37) > 0), fp.pack(random(10, 6, 3, 3) > 0)
    linear, conv = map(number, patterns)
    w, k, x, images = random(70, 37), random(10, 6, 3, 3), random(5, 37), random(5, 6, 5, 5)
    cases: list[tuple[Any, tuple[Any, ...], str]] = [
        (OPS.planned_linear_input_grad, (random(5, 69), w, linear, 0), "grad: expected size 70"),
        (OPS.planned_linear_weight_grad, (random(4, 70), x, linear), "grad: expected size 5"),
        (OPS.planned_linear_weight_grad, (random(70), x, linear), "grad: expected 2 dimensions"),
        (OPS.planned_linear_weight_grad, (random(5, 70).half(), x, linear), "grad: expected dtype"),
    ]
    for shape, message in [
        ((5, 10, 5, 4), "grad: expected size 5 in dimension 3, got 4"),
        ((4, 10, 5, 5), "grad: expected size 5 in dimension 0, got 4"),
        ((5, 9, 5, 5), "grad: expected size 10 in dimension 1, got 9"),
        ((10, 5, 5), "grad: expected 4 dimensions, got 3"),
    ]:
        g = random(*shape)
        sizes = ([5, 6, 5, 5], [10, 6, 3, 3])
        cases.append((OPS.planned_conv2d_input_grad, (g, k, conv, 0, sizes[0], *GEOMETRY), message))
        cases.append(
            (OPS.planned_conv2d_weight_grad, (g, images, conv, sizes[1], *GEOMETRY), message)
        )
    grad = random(5, 10, 5, 5)
    for sizes in ([5, 6, 5], [-5, 6, 5, 5], [5, 6, 2**62, 5], [5, 7, 5, 5]):
        cases.append(
            (OPS.planned_conv2d_input_grad, (grad, k, conv, 0, sizes, *GEOMETRY), "expected")
        )
    for op, args, message in cases:
        with pytest.raises(RuntimeError, match=message):
            op(*args)


def test_make_plan_checks_what_it_is_given() -> None:
    p = fp.pack(random(30, 40) > 0)
    good: list[Any] = [*p[:4], [30, 1, 40, 1, p.block_depth, p.transposed_block_depth]]

    def call(i: int, value: Any) -> int:
        return OPS.make_plan(*good[:i], value, *good[i + 1 :])

    shape = good[4]
    bad = [
        (0, p.row_ptr[:-1]),
        (0, p.row_ptr.int()),
        (0, p.row_ptr.flip(0)),
        (1, p.offset[:-1]),
        (1, p.offset + 40),
        (1, p.offset - 1),
        (1, p.offset.long()),
        (4, shape[:5]),
        (4, [31, *shape[1:]]),
        (4, [30, 0, *shape[2:]]),
        (4, [30, 7, *shape[2:]]),
        (4, [-30, *shape[1:]]),
        (4, [30, 1, -40, *shape[3:]]),
        (4, [30, 1, 40, 0, *shape[4:]]),
        (4, [*shape[:4], 0, 1]),
        (4, [*shape[:4], 2**40, 1]),
        (4, [2**62, 1, 2**62, *shape[3:]]),
    ]
    for i, value in bad:
        with pytest.raises(RuntimeError, match=r"make_plan: |fit 64 bits"):
            call(i, value)
    plan = call(0, p.row_ptr)
    assert plan_bytes(plan) > 0
    assert fp._C.release_plan(plan)


def fused_cases(dtype: torch.dtype) -> list[tuple[str, Callable[..., Tensor], Tensor]]:
    """(name, product of (x, bias, residual, relu, layout), x) over each way of packing."""
    cases: list[tuple[str, Callable[..., Tensor], Tensor]] = []
    for batch, cols, rows in [(1, 9, 5), (19, 37, 70), (130, 20, 33)]:
        w, pattern = random(rows, cols).to(dtype), fp.pack(random(rows, cols, seed=1) > 0.5)

        def linear(
            x: Tensor, b: Any, r: Any, relu: bool, layout: int, w: Any = w, p: Any = pattern
        ) -> Tensor:
            return OPS.planned_linear(x, w, b, number(p), -1, r, relu, layout)

        cases.append((f"linear {batch} {cols} {rows}", linear, random(batch, cols).to(dtype)))
    for batch, size, kernel, stride in [
        (1, (9, 9), 3, 1),  # strips
        (2, (20, 21), 3, 2),
        (3, (2, 2), 3, 1),  # points
        (2, (9, 8), 1, 1),
        (17, (4, 4), 3, 1),  # lanes
        (16, (7, 5), 3, 2),
        (40, (1, 1), 1, 1),
        (3, (30, 5), 17, 1),  # never lanes
    ]:
        pad = kernel // 2
        w = random(7, 4, kernel, kernel).to(dtype)
        p = fp.pack(random(*w.shape, seed=1) > 0.5)

        def conv(
            x: Tensor,
            b: Any,
            r: Any,
            relu: bool,
            layout: int,
            w: Any = w,
            p: Any = p,
            geometry: Any = ([stride] * 2, [pad] * 2, [1, 1], 1),
        ) -> Tensor:
            return OPS.planned_conv2d(x, w, b, number(p), -1, *geometry, r, relu, layout)

        name = f"conv {batch} {size} {kernel} {stride}"
        cases.append((name, conv, random(batch, 4, *size).to(dtype)))
    return cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_is_what_the_layers_give_one_by_one(isa: str, dtype: torch.dtype) -> None:
    for name, call, x in fused_cases(dtype):
        x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
        for source, layout in itertools.product(
            (x, batch_last(x)), (CONTIGUOUS, LIKE_INPUT, BATCH_LAST)
        ):
            what = f"{isa} {name} layout={layout}"
            plain = call(source, None, None, False, layout)
            bias = random(plain.shape[1], seed=8).to(dtype)
            y = call(source, bias, None, False, layout)
            assert y.isnan().any(), what
            assert y.stride() == plain.stride()
            added = (3 * random(*y.shape, seed=9)).to(dtype)
            added.view(-1)[-3:] = torch.tensor([float("nan"), float("inf"), -float("inf")])
            added.view(-1)[4:8] = -y.reshape(-1)[4:8]  # exact cancellation
            for residual in (added, batch_last(added), added.expand(1, *added.shape)[0], None):
                for relu in (False, True):
                    wanted = y if residual is None else y + residual
                    wanted = torch.relu(wanted) if relu else wanted
                    got = call(source, bias, residual, relu, layout)
                    assert got.stride() == y.stride(), what
                    equal = (got == wanted) | (got.isnan() & wanted.isnan())
                    assert equal.all(), f"{what} {relu=} {residual is None=}"
            assert torch.equal(call(source, bias, added, True, layout).isnan(), (y + added).isnan())


def test_the_convolution_with_a_residual_in_training_adds_it_after() -> None:
    apply = sys.modules["fastprune.ops.masked_conv2d"].apply_conv2d
    layer, x = make("conv")
    residual = random(17, 10, 5, 5)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    args = (layer.bias, layer.pattern, *geometry, False)
    y = apply(x, layer.weight, *args, residual=residual, relu=True)
    with torch.no_grad():
        fused = apply(x, layer.weight, *args, residual=residual, relu=True)
    assert same_bits(y.detach(), fused)
    expected = torch.relu(F.conv2d(x, layer.present_weight(), layer.bias, padding=1) + residual)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.weight.grad is not None
