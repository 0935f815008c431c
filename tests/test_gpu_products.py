"""masked_linear and masked_conv2d on a GPU, forward and both gradients, against hard bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastprune as fp
import gpu
from gpu import assert_all_within, form, linear_products, on, strict_products, uneven_mask  # noqa: F401
from layouts import conv_products
from oracle import assert_within, linear_exact

pytestmark = gpu.needs_device
OPS = torch.ops.fastprune

# (out, in): primes, edges of tiles of 8 to 128, one larger than any tile.
SHAPES = [(1, 1), (7, 13), (16, 64), (17, 130), (64, 63), (129, 257), (300, 1031)]
BATCHES = [0, 1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 127, 190, 257]
DENSITIES = [0.0, 0.03, 0.2, 0.5, 1.0]


def gradients(y: Tensor, grad: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return (y, *torch.autograd.grad(y, of, grad))


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for the order of sums, which may depend on alignment where a library is called."""
    tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", gpu.DTYPES[:3], ids=str)
def test_linear(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for i, batch in enumerate(BATCHES):
        density = DENSITIES[(i + shape[0]) % len(DENSITIES)]
        linear_case(dtype, shape, batch, density, seed=i)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", gpu.DTYPES[:3], ids=str)
def test_linear_in_every_form(form: str, dtype: torch.dtype, density: float) -> None:  # noqa: F811
    for seed, (shape, batch) in enumerate(
        [((129, 257), 1), ((64, 200), 5), ((70, 130), 16), ((33, 300), 40), ((130, 96), 200)]
    ):
        try:
            linear_case(dtype, shape, batch, density, seed)
        except (RuntimeError, ValueError) as error:
            # A form may refuse a dtype or batch, saying so; on its way it must not go wrong.
            if form == "auto" or form not in str(error):
                raise


def linear_case(
    dtype: torch.dtype, shape: tuple[int, int], batch: int, density: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = uneven_mask(shape, density, g)
    x = torch.randn(batch, shape[1], generator=g).to(dtype)
    weight = torch.randn(shape, generator=g).to(dtype)
    weight = torch.where(mask, weight, torch.tensor(math.nan, dtype=dtype))  # absent
    bias = torch.randn(shape[0], generator=g).to(dtype) if seed % 2 else None
    grad = torch.randn(batch, shape[0], generator=g).to(dtype)
    bounds = linear_products(x, weight, mask, bias, grad)
    dx, dweight, dmask, dgrad = on(x, weight, mask, grad)
    dx.requires_grad_(), dweight.requires_grad_()
    dbias = None if bias is None else bias.to(gpu.DEVICE)
    what = f"{dtype} {shape} batch {batch} density {density} seed {seed}"
    for packed in (dmask, fp.pack(dmask)):
        y = fp.masked_linear(dx, dweight, packed, dbias)
        assert y.device == dx.device
        assert_all_within(gradients(y, dgrad, dx, dweight), bounds, what)


@pytest.mark.parametrize("batch", [1, 9, 70])
def test_linear_in_float64(batch: int) -> None:
    g = torch.Generator().manual_seed(batch)
    mask = uneven_mask((33, 77), 0.3, g)
    x, weight = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((batch, 77), (33, 77)))
    y = fp.masked_linear(*on(x, weight, mask))
    assert_within(y.cpu(), *linear_exact(x, weight, mask, None), f"batch {batch}")


GEOMETRIES: list[dict[str, Any]] = [
    {"padding": 1},
    {"padding": (2, 1), "stride": (1, 2)},
    {"padding": 1, "dilation": 2, "stride": 2},
    {"groups": 2, "padding": 1},
]
# batch, in, out, height, width, kernel
MAPS = [(1, 4, 6, 9, 7, 3), (3, 8, 10, 14, 14, 3), (9, 6, 34, 7, 7, 3), (2, 64, 66, 8, 8, 1),
        (2, 6, 8, 11, 13, (1, 5)), (33, 10, 12, 5, 5, 3)]  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", gpu.DTYPES[:3], ids=str)
def test_conv2d(dtype: torch.dtype, geometry: dict[str, Any]) -> None:
    for seed, (batch, inputs, outputs, height, width, kernel) in enumerate(MAPS):
        g = torch.Generator().manual_seed(seed)
        taps = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        shape = (outputs, inputs // geometry.get("groups", 1), *taps)
        mask = uneven_mask(shape, DENSITIES[1 + seed % 4], g)
        x = torch.randn(batch, inputs, height, width, generator=g).to(dtype)
        weight = torch.randn(shape, generator=g).to(dtype)
        weight = torch.where(mask, weight, torch.tensor(math.nan, dtype=dtype))
        bias = torch.randn(outputs, generator=g).to(dtype) if seed % 2 else None
        dx, dweight, dmask = on(x, weight, mask)
        dx.requires_grad_(), dweight.requires_grad_()
        pattern = fp.pack(dmask, groups=geometry.get("groups", 1))
        dbias = None if bias is None else bias.to(gpu.DEVICE)
        y = fp.masked_conv2d(dx, dweight, pattern, dbias, **geometry)
        grad = torch.randn(y.shape, generator=g).to(dtype)
        bounds = conv_products(x, weight, mask, bias, grad, geometry)
        what = f"{dtype} map {seed} {geometry}"
        assert_all_within(gradients(y, grad.to(gpu.DEVICE), dx, dweight), bounds, what)


@pytest.mark.parametrize("batch", [1, 4, 12, 40, 200])
@pytest.mark.parametrize("dtype", gpu.DTYPES[:3], ids=str)
def test_absent_weights_read_nothing(form: str, dtype: torch.dtype, batch: int) -> None:  # noqa: F811
    """NaN and infinity where only absent weights would read: nothing of them in the result."""
    g = torch.Generator().manual_seed(batch)
    for density in (0.1, 0.6):
        mask = torch.rand(70, 128, generator=g) < density
        mask[:, ::3] = False
        x, weight = torch.randn(batch, 128, generator=g), torch.randn(70, 128, generator=g)
        x[:, ::3], weight[:, ::3] = math.inf, math.nan
        x[0, 0] = math.nan
        clean = torch.where(torch.arange(128) % 3 == 0, 0.0, x).to(dtype)
        try:
            y = fp.masked_linear(*on(x.to(dtype), weight.to(dtype), mask))
            again = fp.masked_linear(*on(clean, weight.to(dtype), mask))
        except (RuntimeError, ValueError) as error:
            if form == "auto" or form not in str(error):
                raise
            continue
        assert bool(y.isfinite().all()), density
        close(y, again)


def test_absent_weights_read_nothing_in_a_convolution() -> None:
    g = torch.Generator().manual_seed(0)
    for density, batch in ((0.1, 2), (0.7, 20)):
        mask = torch.rand(8, 6, 3, 3, generator=g) < density
        mask[:, ::2] = False
        x, weight = torch.randn(batch, 6, 9, 9, generator=g), torch.randn(8, 6, 3, 3, generator=g)
        x[:, ::2], weight[:, ::2] = math.nan, math.inf
        y = fp.masked_conv2d(*on(x, weight, mask), padding=1)
        assert bool(y.isfinite().all())


def test_infinite_activations_of_kept_weights_arrive() -> None:
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[0, 5] = mask[1, 6] = mask[2, 5:7] = True
    x = torch.ones(9, 40)
    x[:, 5], x[:, 6] = math.inf, -math.inf
    y = fp.masked_linear(*on(x, torch.ones(3, 40), mask)).cpu()
    assert y[:, 0].eq(math.inf).all()
    assert y[:, 1].eq(-math.inf).all()
    assert y[:, 2].isnan().all()


@pytest.mark.parametrize("batch", [1, 8, 33, 256])
def test_strides_and_misaligned_views(batch: int) -> None:
    g = torch.Generator().manual_seed(batch)
    mask = torch.rand(65, 97, generator=g) < 0.3
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(batch, 97, generator=g).to(dtype).to(gpu.DEVICE)
        weight = torch.randn(65, 97, generator=g).to(dtype).to(gpu.DEVICE)
        there = mask.to(gpu.DEVICE)
        y = fp.masked_linear(x, weight, there)

        def moved(t: Tensor) -> list[Tensor]:
            """The same values one element off every alignment, and transposed."""
            odd = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape)
            wide = torch.full((t.shape[0], t.shape[1] + 3), math.nan, dtype=t.dtype).to(t.device)
            wide[:, 1:-2] = t
            return [odd.copy_(t), wide[:, 1:-2], t.t().contiguous().t()]

        for other, w in zip(moved(x), moved(weight), strict=True):
            close(fp.masked_linear(other, w, there), y)
        expanded = x[:1].expand(batch, 97)
        close(
            fp.masked_linear(expanded, weight, there),
            fp.masked_linear(expanded.contiguous(), weight, there),
        )


@pytest.mark.parametrize("batch", [1, 16, 300])
def test_tf32_is_used_only_where_it_is_allowed(batch: int) -> None:
    """With TF32 operands may lose bits below 2^-11 of their size, and no more."""
    g = torch.Generator().manual_seed(batch)
    mask = torch.rand(128, 512, generator=g) < 0.5
    x, weight = torch.randn(batch, 512, generator=g), torch.randn(128, 512, generator=g)
    torch.backends.cuda.matmul.allow_tf32 = True
    y = fp.masked_linear(*on(x, weight, mask)).cpu()
    value, s, n = linear_exact(x, weight, mask, None)
    assert (abs(y.double().numpy() - value) <= s * 2.0**-9 + n * s * 2.0**-24).all()
    torch.backends.cuda.matmul.allow_tf32 = False
    strict = fp.masked_linear(*on(x, weight, mask)).cpu()
    assert_within(strict, value, s, n, "TF32 off")


def test_weight_gradient_of_a_dense_weight() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 40, generator=g), torch.randn(30, 40, generator=g)
    mask = torch.rand(30, 40, generator=g) < 0.3
    dx, dweight, dmask = on(x, weight, mask)
    dweight.requires_grad_()
    fp.masked_linear(dx, dweight, dmask, weight_grad="dense").sum().backward()
    assert dweight.grad is not None
    torch.testing.assert_close(dweight.grad.cpu(), torch.ones(30, 20) @ x)


@pytest.fixture
def sampled() -> Iterator[None]:
    """Weight gradients in float32 at the mask alone."""
    if gpu.chooses_forms():
        fp._C.set_cuda_form("sampled")
    yield
    fp._C.set_cuda_form("auto")


@pytest.mark.parametrize("shape", [(1, 1), (33, 450), (300, 1031), (1024, 2000)], ids=str)
def test_sampled_weight_gradient(sampled: None, shape: tuple[int, int]) -> None:
    """Over one panel, slice and chunk of the batch, and several of each."""
    for seed, (batch, density) in enumerate(
        itertools.product((1, 64, 190, 4100), (0.01, 0.1, 0.6))
    ):
        g = torch.Generator().manual_seed(seed)
        mask = uneven_mask(shape, density, g)
        grad, x = (torch.randn(batch, size, generator=g) for size in shape)
        bound = weight_gradient(grad, x, mask)
        # What no kept weight reads may hold anything.
        grad = torch.where(mask.any(1), grad, math.nan)
        x = torch.where(mask.any(0), x, math.inf)
        there, dgrad, dx = on(mask, grad, x)
        pattern = fp.pack(there)
        assert pattern.plan is not None
        dw = OPS.planned_linear_weight_grad(dgrad, dx, pattern.plan.number(pattern))
        raw = OPS.masked_linear_weight_grad(dgrad, dx, *pattern[:2], pattern.block_depth)
        strided = dgrad.t().contiguous().t()
        again = OPS.planned_linear_weight_grad(strided, dx, pattern.plan.number(pattern))
        assert_within(dw.cpu(), *bound, f"{shape} batch {batch} density {density}")
        assert torch.equal(dw, raw)
        assert torch.equal(dw, again)


def weight_gradient(
    grad: Tensor, x: Tensor, mask: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradient at the mask, S and n; in float64, which is enough for float32."""
    g, a, kept = grad.double().numpy(), x.double().numpy(), mask.numpy()
    exact, s = np.where(kept, g.T @ a, 0), np.where(kept, np.abs(g).T @ np.abs(a), 0)
    return exact, s, np.broadcast_to(len(x), s.shape)


@gpu.needs_cuda
@pytest.mark.parametrize("warm", [True, False])
def test_sampled_weight_gradient_in_a_graph(sampled: None, warm: bool) -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(200, 900, generator=g) < 0.1
    grad, x = torch.randn(130, 200, generator=g), torch.randn(130, 900, generator=g)
    there, dgrad, dx = on(mask, grad, x)
    pattern = fp.pack(there)
    assert pattern.plan is not None
    plan = pattern.plan.number(pattern)
    if warm:
        OPS.planned_linear_weight_grad(dgrad, dx, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dw = OPS.planned_linear_weight_grad(dgrad, dx, plan)
    for factor in (1, -3):
        dgrad.copy_(factor * grad.to(gpu.DEVICE))
        graph.replay()
        assert_within(dw.cpu(), *weight_gradient(factor * grad, x, mask), f"factor {factor}")
    assert torch.equal(dw, OPS.planned_linear_weight_grad(dgrad, dx, plan))


@pytest.mark.parametrize("batch", [8, 200])
def test_nothing_kept_and_empty_sizes(batch: int) -> None:
    empty = torch.zeros(5, 12, dtype=torch.bool)
    x, weight, bias = torch.randn(batch, 12), torch.randn(5, 12), torch.randn(5)
    y = fp.masked_linear(*on(x, weight, empty, bias))
    assert torch.equal(y.cpu(), bias.expand(batch, 5))
    for rows, cols in ((0, 12), (5, 0)):
        mask = torch.zeros(rows, cols, dtype=torch.bool)
        there = on(torch.randn(batch, cols), torch.randn(rows, cols), mask)
        y = fp.masked_linear(*there)
        assert y.shape == (batch, rows)
        assert not y.any()


def test_messages_name_the_argument() -> None:
    x, weight, mask = on(torch.zeros(2, 4), torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x: expected shape"):
        fp.masked_linear(x[:, :3], weight, mask)
    with pytest.raises(TypeError, match="weight: expected the dtype of x"):
        fp.masked_linear(x, weight.double(), mask)
    if gpu.ON_CUDA:
        with pytest.raises(ValueError, match="weight: expected the device of x"):
            fp.masked_linear(x, weight.cpu(), mask)
        with pytest.raises(ValueError, match="mask: expected device"):
            fp.masked_linear(x, weight, mask.cpu())
