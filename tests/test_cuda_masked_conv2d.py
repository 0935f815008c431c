"""The CUDA convolution by emulation: products, gradients, geometries, absent weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
import fastprune as fp
from oracle import DTYPES, assert_within, conv_exact, guarded, integers
from test_masked_conv2d import LAYERS, exact_gradients, layer_case, random_geometry
from test_masked_linear import random_mask, strided

pytestmark = emulated.needs_emulation
OPS = emulated.ops


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: fp.Pattern, geometry: Any, groups: int
) -> Tensor:
    """The op itself; an int stands for both axes."""
    pairs = [v if isinstance(v, tuple) else (v, v) for v in geometry.values()]
    return OPS.masked_conv2d(x, weight, bias, *pattern[:6], *pairs, groups, False)


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, pattern: fp.Pattern, geometry: Any, groups: int
) -> tuple[Tensor, Tensor]:
    """Both gradients."""
    pairs = [v if isinstance(v, tuple) else (v, v) for v in geometry.values()]
    dx = OPS.masked_conv2d_input_grad(grad, weight, *pattern[:6], list(x.shape), *pairs, groups)
    dw = OPS.masked_conv2d_weight_grad(
        grad, x, *pattern[:2], pattern.block_depth, list(weight.shape), *pairs, groups
    )
    return dx, dw


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES), order=st.integers(0, 2))
@settings(max_examples=60)
def test_random_cases(seed: int, dtype: torch.dtype, order: int) -> None:
    emulated.configure(order, 1 + seed % 5)
    g = torch.Generator().manual_seed(seed)
    c = random_geometry(g)
    what = f"dtype={dtype} seed={seed} {c}"
    weight = torch.randn(c["out"], c["depth"], *c["kernel"], generator=g).to(dtype)
    mask = random_mask(tuple(weight.shape), g)
    weight = torch.where(mask, weight, torch.tensor(float("nan"), dtype=dtype))
    x = torch.randn(c["batch"], c["depth"] * c["groups"], *c["size"], generator=g).to(dtype)
    bias = torch.randn(c["out"], generator=g).to(dtype) if seed % 2 else None
    pattern = fp.pack(mask, groups=c["groups"])
    y = forward(strided(x, g), strided(weight, g), bias, pattern, c["geometry"], c["groups"])
    if c["batch"] == 0:
        assert y.shape[:2] == (0, c["out"])
        return
    exact = conv_exact(x, weight, mask, bias, c["geometry"], c["groups"])
    assert_within(y.flatten(2), *exact, f"{what} forward")
    grad = torch.randn(y.shape, generator=g).to(dtype)
    dx, dw = gradients(strided(x, g), weight, strided(grad, g), pattern, c["geometry"], c["groups"])
    exact_dx, _ = exact_gradients(x, weight, mask, grad, c)
    assert_within(dx, *exact_dx, f"{what} input grad")
    dense = torch.nn.grad.conv2d_weight(x, weight.shape, grad, *c["geometry"].values(), c["groups"])
    assert (dw[~mask] == 0).all(), what
    torch.testing.assert_close(dw, torch.where(mask, dense, 0))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_integers_are_exact(dtype: torch.dtype, layer: tuple[Any, ...]) -> None:
    emulated.configure(1)
    batch, cin, cout, size, *rest = layer
    layer = (min(batch, 3), cin, min(cout, 40), size, *rest)
    x, weight, mask, geometry, groups, g = layer_case(layer, dtype, 0)
    pattern = fp.pack(mask, groups=groups)
    y = forward(guarded(x), guarded(weight), None, pattern, geometry, groups)
    xd = x.double().requires_grad_()
    wd = torch.where(mask, weight, 0).double().requires_grad_()
    expected = F.conv2d(xd, wd, groups=groups, **geometry)
    assert torch.equal(y.double(), expected)
    assert y.count_nonzero() > y.numel() // 8
    grad = integers(tuple(y.shape), dtype, g)
    got = gradients(
        guarded(x, False), guarded(weight, False), guarded(grad), pattern, geometry, groups
    )
    want = torch.autograd.grad(expected, (xd, wd), grad.double())
    assert torch.equal(got[0].double(), want[0])
    assert torch.equal(got[1].double(), torch.where(mask, want[1], 0))
    assert got[0].count_nonzero() > got[0].numel() // 8


# Kernels that reach too far for a panel of all positions, and for one of a kernel row.
@pytest.mark.parametrize(
    ("kernel", "dilation", "padding"),
    [((3, 2), (150, 100), (300, 90)), ((2, 3), (1, 60_000), (1, 59_990)), ((1, 2), (1, 7), (0, 3))],
    ids=str,
)
def test_far_taps(
    kernel: tuple[int, int], dilation: tuple[int, int], padding: tuple[int, int]
) -> None:
    emulated.configure(2)
    g = torch.Generator().manual_seed(0)
    span = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [max(n + 9, 12) for n in span]
    x = integers((2, 5, *size), torch.float32, g)
    weight = integers((4, 5, *kernel), torch.float32, g)
    mask = torch.rand(weight.shape, generator=g) < 0.7
    geometry = {"stride": (1, 1), "padding": padding, "dilation": dilation}
    pattern = fp.pack(mask)
    y = forward(x, weight, None, pattern, geometry, 1)
    xd, wd = x.clone().requires_grad_(), torch.where(mask, weight, 0)
    expected = F.conv2d(xd, wd, **geometry)
    assert torch.equal(y, expected)
    dx, _ = gradients(x, weight, y, pattern, geometry, 1)
    assert torch.equal(dx, torch.autograd.grad(expected, xd, y)[0])


@pytest.mark.parametrize("stride", [1, 2, 3, 5], ids=str)
def test_absent_weights_and_what_only_they_read(stride: int) -> None:
    # An infinite weight must not meet the zeros between the gradients of a strided convolution, nor
    # an infinite activation the zeros of a mask, of padding, or of lanes past an edge.
    emulated.configure(1)
    g = torch.Generator().manual_seed(stride)
    mask = torch.rand(5, 3, 3, 3, generator=g) < 0.5
    weight = torch.randn(5, 3, 3, 3, generator=g)
    x = torch.randn(3, 3, 11, 9, generator=g)
    geometry = {"stride": (stride, stride), "padding": (1, 2), "dilation": (1, 1)}
    pattern = fp.pack(mask)
    x[1, :, 4] = float("inf")
    x[2, 1, :, 3] = float("nan")
    y = forward(x, torch.where(mask, weight, float("inf")), None, pattern, geometry, 1)
    reached = torch.zeros(y.shape, dtype=torch.bool)
    for o, i, ky, kx in mask.nonzero().tolist():
        shifted = F.pad((~x[:, i].isfinite()).float(), (2, 2, 1, 1))
        rows = shifted[:, ky : ky + stride * (y.shape[2] - 1) + 1 : stride]
        reached[:, o] |= rows[:, :, kx : kx + stride * (y.shape[3] - 1) + 1 : stride] > 0
    assert torch.equal(y.isfinite(), ~reached)
    weight[mask] = float("inf")
    grad = torch.rand(y.shape, generator=g) + 0.5
    dx, _ = gradients(x, weight, grad, pattern, geometry, 1)
    hit = torch.zeros(dx.shape, dtype=torch.bool)  # pixels that some kept weight reaches
    for _, i, ky, kx in mask.nonzero().tolist():
        hit[:, i, (ky - 1) % stride :: stride, (kx - 2) % stride :: stride] = True
    assert torch.equal(dx.isfinite(), ~hit)
    assert not dx[~hit].any()
    # Beyond the edges gradients are zeros, as dense pads them.
    inner = (slice(None), slice(None), slice(4, 7), slice(4, 6))
    assert torch.equal(dx[inner].isinf(), hit[inner])


@pytest.mark.parametrize("layer", LAYERS[3:14:2], ids=str)
def test_same_bits_whatever_the_order(layer: tuple[Any, ...]) -> None:
    x, weight, mask, geometry, groups, g = layer_case(layer, torch.float32, 2)
    x, weight = torch.randn(x.shape, generator=g)[:2], torch.randn(weight.shape, generator=g)
    pattern = fp.pack(mask, groups=groups)
    results = []
    for seed, multiprocessors in [(0, 4), (1, 1), (2, 60)]:
        emulated.configure(seed, multiprocessors)
        y = forward(x, weight, None, pattern, geometry, groups)
        results.append((y, *gradients(x, weight, y, pattern, geometry, groups)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_patterns_are_skipped_and_reported() -> None:
    emulated.configure(0)
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 4, 3, 3, generator=g) < 0.5
    pattern = fp.pack(mask)
    x, weight = torch.randn(2, 4, 6, 5, generator=g), torch.randn(mask.shape, generator=g)
    geometry = {"stride": 1, "padding": 1, "dilation": 1}
    for change in (
        {"offset": torch.full_like(pattern.offset, -7)},
        {"offset": torch.full_like(pattern.offset, 32767)},
        {"row_ptr": pattern.row_ptr.flip(0)},
        {"row_ptr": torch.full_like(pattern.row_ptr, 2**62)},
        {"row_ptr": torch.full_like(pattern.row_ptr, -1)},
    ):
        bad = pattern._replace(**{n: guarded(t) for n, t in change.items()})
        y = forward(guarded(x), guarded(weight), None, bad, geometry, 1)
        assert not y[:, 1].any()
        with pytest.raises(RuntimeError, match="an earlier call on a CUDA device met bad data"):
            forward(x, weight, None, pattern, geometry, 1)
        forward(x, weight, None, pattern, geometry, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(6, 2, 3, 3).double()}, "weight: expected dtype"),
        ({"x": torch.zeros(2, 5, 8, 8)}, "x: expected 4 channels, got 5"),
        ({"bias": torch.zeros(5)}, "bias: expected size 6"),
        ({"geometry": {"stride": 0, "padding": 0, "dilation": 1}}, "stride: expected at least 1"),
        ({"groups": 4}, "groups: expected a positive divisor"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    good = {
        "x": torch.zeros(2, 4, 8, 8),
        "weight": torch.zeros(6, 2, 3, 3),
        "bias": torch.zeros(6),
        "pattern": fp.pack(torch.ones(6, 2, 3, 3, dtype=torch.bool), groups=2),
        "geometry": {"stride": 1, "padding": 0, "dilation": 1},
        "groups": 2,
    }
    with pytest.raises(RuntimeError, match=message):
        forward(**{**good, **change})
