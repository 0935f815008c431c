"""masked_conv2d: forward and both gradients against exact references, on every ISA."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from oracle import DTYPES, assert_within, columns, conv_exact, guarded, integers, wide
from test_masked_linear import pick, random_mask, strided

OPS = torch.ops.fastprune
ops_module = sys.modules["fastprune.ops.masked_conv2d"]  # the function has the module's name
CASES_PER_CALL = 250  # of each dtype and ISA; four shards make 1,000


def random_geometry(g: torch.Generator) -> dict[str, Any]:
    """Shapes off every grid: groups in {1, g, C}, one output channel, non-square, wide steps."""
    kernel = (pick([1, 1, 2, 3, 3, 3, 5], g), pick([1, 1, 2, 3, 3, 3, 5], g))
    dilation = (pick([1, 1, 1, 2], g), pick([1, 1, 1, 2, 3], g))
    padding = (pick([0, 1, 1, 2, 3], g), pick([0, 1, 1, 2, 4], g))
    stride = (pick([1, 1, 1, 2, 3], g), pick([1, 1, 1, 2, 3], g))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    size = tuple(low + pick([0, 1, 2, 3, 4, 6, 7, 9, 14, 19, 33], g) for low in least)
    groups = pick([1, 1, 1, 2, 3, 4], g)
    depth, rows = pick([1, 2, 3, 5, 9, 16], g), pick([1, 1, 2, 3, 8, 17], g)
    return {
        "kernel": kernel,
        "size": size,
        "batch": pick([0, 1, 1, 2, 3, 5, 17], g),
        "groups": groups,
        "depth": depth,
        "out": rows * groups,
        "geometry": {"stride": stride, "padding": padding, "dilation": dilation},
    }


def exact_gradients(
    x: Tensor, weight: Tensor, mask: Tensor, grad: Tensor, c: dict[str, Any]
) -> tuple[Any, Any]:
    """(value, S, n) of both gradients, from im2col and its adjoint."""
    groups, (kh, kw) = c["groups"], c["kernel"]
    out, depth = weight.shape[:2]
    batch = x.shape[0]
    w = wide(torch.where(mask, weight, 0)).reshape(groups, out // groups, depth * kh * kw)
    g_wide = wide(grad).reshape(batch, groups, out // groups, -1)
    cols = columns(x, c["kernel"], c["geometry"]).numpy().astype(np.longdouble)
    cols = cols.reshape(batch, groups, depth * kh * kw, -1)

    def fold(values: np.ndarray) -> np.ndarray:
        # The adjoint of im2col adds every column entry to the input pixel it was read from.
        pixels = torch.arange(x[0].numel(), dtype=torch.float64).view(1, *x.shape[1:]) + 1
        index = columns(pixels, c["kernel"], c["geometry"]).numpy().astype(np.int64).ravel() - 1
        flat = np.zeros((batch, x[0].numel() + 1), dtype=values.dtype)
        for b in range(batch):
            np.add.at(flat[b], index, values[b].ravel())
        return flat[:, :-1].reshape(x.shape)

    kept = mask.numpy().reshape(groups, out // groups, depth * kh * kw)
    ones = np.ones_like(g_wide)
    dx = fold(np.einsum("gok,bgop->bgkp", w, g_wide))
    dx_s = fold(np.einsum("gok,bgop->bgkp", np.abs(w), np.abs(g_wide)))
    dx_n = fold(np.einsum("gok,bgop->bgkp", kept.astype(np.longdouble), ones))
    dw = np.einsum("bgop,bgkp->gok", g_wide, cols).reshape(weight.shape) * mask.numpy()
    dw_s = np.einsum("bgop,bgkp->gok", np.abs(g_wide), np.abs(cols)).reshape(weight.shape)
    dw_n = np.full(weight.shape, batch * g_wide.shape[-1])
    return (dx, dx_s, dx_n), (dw, dw_s * mask.numpy(), dw_n)


def run(x: Tensor, weight: Tensor, grad: Tensor, pattern: fp.Pattern, c: dict[str, Any]) -> Any:
    """Both gradients from the ops."""
    geometry = [*c["geometry"].values(), c["groups"]]
    dx = OPS.masked_conv2d_input_grad(grad, weight, *pattern[:6], list(x.shape), *geometry)
    dw = OPS.masked_conv2d_weight_grad(
        grad, x, *pattern[:2], pattern.block_depth, list(weight.shape), *geometry
    )
    return dx, dw


@pytest.mark.parametrize("shard", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_cases(isa: str, dtype: torch.dtype, shard: int) -> None:
    for seed in range(shard * CASES_PER_CALL, (shard + 1) * CASES_PER_CALL):
        g = torch.Generator().manual_seed(seed)
        c = random_geometry(g)
        what = f"isa={isa} dtype={dtype} seed={seed} {c}"
        weight = torch.randn(c["out"], c["depth"], *c["kernel"], generator=g).to(dtype)
        mask = random_mask(tuple(weight.shape), g)
        weight = torch.where(mask, weight, torch.tensor(float("nan"), dtype=dtype))
        x = torch.randn(c["batch"], c["depth"] * c["groups"], *c["size"], generator=g).to(dtype)
        bias = torch.randn(c["out"], generator=g).to(dtype) if seed % 2 else None
        pattern = fp.pack(mask, groups=c["groups"])
        y = fp.masked_conv2d(
            strided(x, g), strided(weight, g), pattern, bias, groups=c["groups"], **c["geometry"]
        )
        if c["batch"] == 0:
            assert y.shape[:2] == (0, c["out"])
            continue
        exact = conv_exact(x, weight, mask, bias, c["geometry"], c["groups"])
        assert_within(y.flatten(2), *exact, f"{what} forward")
        grad = torch.randn(y.shape, generator=g).to(dtype)
        dx, dw = run(strided(x, g), weight, strided(grad, g), pattern, c)
        exact_dx, exact_dw = exact_gradients(x, weight, mask, grad, c)
        assert_within(dx, *exact_dx, f"{what} input grad")
        assert_within(dw, *exact_dw, f"{what} weight grad")


# Shapes that reach each way of packing: long rows, several strips, several images per item, tiny
# maps, pointwise, strided, dilated, depthwise, many channels, a kernel beyond the strips' limit.
LAYERS = [
    (1, 8, 8, 56, (3, 3), 1, 1, 1, 1),
    (2, 30, 40, 53, (3, 3), 1, 1, 1, 1),
    (2, 20, 300, 60, (3, 3), 1, 0, 1, 1),
    (2, 16, 24, 28, (3, 3), 1, 1, 1, 1),
    (5, 20, 16, 14, (3, 3), 1, 1, 1, 1),
    (9, 40, 33, 7, (3, 3), 1, 1, 1, 1),
    (20, 30, 16, 4, (3, 3), 1, 1, 1, 1),
    (33, 16, 16, 2, (3, 3), 1, 1, 1, 1),
    (7, 32, 16, 1, (3, 3), 1, 1, 1, 1),
    (3, 24, 24, 20, (3, 3), 2, 1, 1, 1),
    (3, 3, 16, 45, (7, 7), 2, 3, 1, 1),
    (2, 12, 12, 17, (3, 3), 1, 2, 2, 12),
    (2, 32, 8, 13, (1, 1), 1, 0, 1, 1),
    (2, 32, 8, 13, (1, 1), 2, 0, 1, 1),
    (1, 2, 2, 19, (17, 3), 1, 8, 1, 1),
    (1, 4, 4, 130, (3, 3), 1, 1, 1, 1),
    (1, 2, 3, 1100, (1, 3), 1, 0, 1, 1),
]


def layer_case(layer: tuple[Any, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    batch, cin, cout, size, kernel, stride, padding, dilation, groups = layer
    g = torch.Generator().manual_seed(seed)
    x = integers((batch, cin, min(size, 60), size), dtype, g)
    weight = integers((cout, cin // groups, *kernel), dtype, g)
    mask = torch.rand(weight.shape, generator=g) < min(0.4, 60 / weight[0].numel())
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    return x, weight, mask, geometry, groups, g


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_integers_are_exact(isa: str, dtype: torch.dtype, layer: tuple[Any, ...]) -> None:
    x, weight, mask, geometry, groups, g = layer_case(layer, dtype, 0)
    x.requires_grad_()
    weight.requires_grad_()
    y = fp.masked_conv2d(x, weight, mask, groups=groups, **geometry)
    xd = x.detach().double().requires_grad_()
    wd = torch.where(mask, weight, 0).detach().double().requires_grad_()
    expected = F.conv2d(xd, wd, groups=groups, **geometry)
    assert torch.equal(y.double(), expected)
    assert y.count_nonzero() > y.numel() // 8
    grad = integers(tuple(y.shape), dtype, g)
    got = torch.autograd.grad(y, (x, weight), grad)
    want = torch.autograd.grad(expected, (xd, wd), grad.double())
    assert torch.equal(got[0].double(), want[0])
    assert torch.equal(got[1].double(), torch.where(mask, want[1], 0))


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_reads_nothing_outside_its_buffers(isa: str, layer: tuple[Any, ...], at_end: bool) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, weight, mask, geometry, groups, g = layer_case(layer, dtype, 1)
        two = {name: (value, value) for name, value in geometry.items()}
        c = {"geometry": two, "groups": groups, "kernel": weight.shape[2:]}
        pattern = fp.pack(mask, groups=groups)
        x, weight = guarded(x, at_end), guarded(weight, at_end)
        y = fp.masked_conv2d(x, weight, pattern, groups=groups, **geometry)
        run(x, weight, guarded(integers(tuple(y.shape), dtype, g), at_end), pattern, c)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_same_bits_for_any_thread_count(isa: str, threads: None, layer: tuple[Any, ...]) -> None:
    x, weight, mask, geometry, groups, g = layer_case(layer, torch.float32, 2)
    x, weight = torch.randn(x.shape, generator=g), torch.randn(weight.shape, generator=g)
    two = {name: (value, value) for name, value in geometry.items()}
    c = {"geometry": two, "groups": groups, "kernel": weight.shape[2:]}
    pattern = fp.pack(mask, groups=groups)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        y = fp.masked_conv2d(x, weight, pattern, groups=groups, **geometry)
        results.append((y, *run(x, weight, y, pattern, c)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_infinity_in_an_activation_reaches_only_what_reads_it(isa: str) -> None:
    # Padding, neighbouring rows and lanes past a row's end multiply nothing.
    for size, batch in [(7, 3), (14, 2), (20, 1), (3, 5)]:
        x = torch.ones(batch, 2, size, size)
        x[-1, :, -1, -1] = float("inf")
        x[0, :, 0, :] = float("nan")
        weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(weight, dtype=torch.bool)
        for padding in (0, 1):
            y = fp.masked_conv2d(x, weight, mask, padding=padding)
            expected = F.conv2d(x, weight, padding=padding)
            assert torch.equal(y.isfinite(), expected.isfinite())
            grad = torch.ones_like(y)
            pattern = fp.pack(mask)
            two = {"stride": (1, 1), "padding": (padding, padding), "dilation": (1, 1)}
            _, dw = run(x, weight, grad, pattern, {"geometry": two, "groups": 1})
            dense = torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=padding)
            assert torch.equal(dw.isfinite(), dense.isfinite())


def test_gradcheck() -> None:
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(4, 2, 3, 2, generator=g) < 0.5
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fp.masked_conv2d(x, w, mask, b, stride=(2, 1), padding=(1, 2), groups=2)

    assert torch.autograd.gradcheck(conv, (x, w, b))


def test_dense_weight_gradient() -> None:
    mask = torch.rand(6, 3, 3, 3) < 0.3
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(6, 3, 3, 3, requires_grad=True)
    y = fp.masked_conv2d(x, w, mask, padding=1, weight_grad="dense")
    grad = torch.randn_like(y)
    pruned = torch.where(mask, w, 0).detach().requires_grad_()
    expected = torch.autograd.grad(F.conv2d(x, pruned, padding=1), pruned, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(y, w, grad)[0], expected)


def test_opcheck() -> None:
    pattern = fp.pack(torch.rand(6, 2, 3, 3) < 0.5, groups=2)
    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    w = torch.randn(6, 2, 3, 3, requires_grad=True)
    b = torch.randn(6, requires_grad=True)
    geometry = ([2, 1], [1, 1], [1, 1], 2)
    y = OPS.masked_conv2d(x, w, b, *pattern[:6], *geometry, False)
    for dense in (False, True):
        torch.library.opcheck(OPS.masked_conv2d.default, (x, w, b, *pattern[:6], *geometry, dense))
    x, w, grad = x.detach(), w.detach(), torch.randn_like(y)
    torch.library.opcheck(
        OPS.masked_conv2d_input_grad.default, (grad, w, *pattern[:6], list(x.shape), *geometry)
    )
    torch.library.opcheck(
        OPS.masked_conv2d_weight_grad.default,
        (grad, x, *pattern[:2], pattern[4], list(w.shape), *geometry),
    )


def test_what_runs_on_cuda_takes_the_same_arguments() -> None:
    pattern = fp.pack(torch.rand(6, 2, 3, 3) < 0.5, groups=2)
    x, w, b = torch.randn(2, 4, 7, 6), torch.randn(6, 2, 3, 3), torch.randn(6)
    geometry = ([2, 1], [1, 1], [1, 1], 2)
    y = OPS.masked_conv2d(x, w, b, *pattern[:6], *geometry, False)
    torch.testing.assert_close(ops_module.on_cuda(x, w, b, *pattern[:6], *geometry, False), y)
    dx = (y, w, *pattern[:6], list(x.shape), *geometry)
    dw = (y, x, *pattern[:2], pattern[4], list(w.shape), *geometry)
    torch.testing.assert_close(
        ops_module.input_grad_on_cuda(*dx), OPS.masked_conv2d_input_grad(*dx)
    )
    torch.testing.assert_close(
        ops_module.weight_grad_on_cuda(*dw), OPS.masked_conv2d_weight_grad(*dw)
    )


def test_unbatched_input() -> None:
    x, w, mask = torch.randn(3, 8, 8), torch.randn(4, 3, 3, 3), torch.ones(4, 3, 3, 3).bool()
    torch.testing.assert_close(fp.masked_conv2d(x, w, mask), F.conv2d(x, w))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 5, 8, 8)}, ValueError, r"x: expected shape \(batch, 4, height, wid"),
        ({"x": torch.zeros(2, 4, 8)}, ValueError, "x: expected shape"),
        ({"x": torch.zeros(2, 4, 1, 8)}, ValueError, "x: expected a padded height of at least 3"),
        ({"weight": torch.zeros(3, 4)}, ValueError, "weight: expected 4 dimensions"),
        ({"stride": 0}, ValueError, "stride: expected an int or two ints of at least 1, got 0"),
        ({"padding": (1, 2, 3)}, ValueError, "padding: expected an int or two ints"),
        ({"dilation": -1}, ValueError, "dilation: expected an int or two ints of at least 1"),
        ({"groups": 4}, ValueError, "groups: expected a positive divisor of the 6"),
        ({"mask": torch.ones(6, 2, 3, 1).bool()}, ValueError, "mask: expected the weight's shape"),
    ],
)
def test_bad_input_names_the_argument(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {
        "x": torch.zeros(2, 4, 8, 8),
        "weight": torch.zeros(6, 2, 3, 3),
        "mask": torch.ones(6, 2, 3, 3, dtype=torch.bool),
        "groups": 2,
    }
    with pytest.raises(error, match=message):
        fp.masked_conv2d(**{**good, **change})
