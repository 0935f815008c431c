"""Convolution with the batch in the lanes, which a batch-last tensor or the layout forces."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from conftest import runnable_isas
from layouts import (
    BATCH_LAST,
    CONTIGUOUS,
    LIKE_INPUT,
    batch_last,
    conv_products,
    is_batch_last,
    same_bits,
)
from oracle import DTYPES, assert_within, conv_exact, guarded, integers
from test_masked_conv2d import exact_gradients
from test_masked_linear import pick, random_mask

OPS = torch.ops.fastprune
MAPS = [(1, 1), (2, 2), (3, 5), (4, 4), (7, 7), (8, 8), (13, 9), (56, 1), (1, 70), (100, 3)]
KERNELS = [(1, 1), (2, 2), (3, 3), (3, 3), (5, 5), (7, 7), (1, 7), (3, 2)]
WORK = 400_000  # multiplications of a dense convolution of one random case, about
CASES = 70  # per shard and dtype, each on every ISA


@pytest.fixture(autouse=True)
def results_start_as_nan() -> Iterator[None]:
    """torch fills uninitialized tensors with NaN: an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def every_isa() -> Iterator[Any]:
    """Iterates over the ISAs inside a test, which makes its reference once for all of them."""
    before = fp._C.isa()

    def each() -> Iterator[str]:
        for name in runnable_isas():
            fp._C.set_isa(name)
            yield name

    yield each
    fp._C.set_isa(before)


class Conv:
    """A convolution's pattern, weight and geometry, and its planned products."""

    def __init__(
        self, weight: Tensor, mask: Tensor, geometry: dict[str, Any], groups: int = 1
    ) -> None:
        self.weight, self.mask, self.groups = weight, mask, groups
        self.geometry = {
            k: [v, v] if isinstance(v, int) else list(v)
            for k, v in {"stride": 1, "padding": 0, "dilation": 1, **geometry}.items()
        }
        self.pattern = fp.pack(mask, groups=groups)
        self.plan = self.pattern.plan.number(self.pattern)
        self.four = [*(self.geometry[k] for k in ("stride", "padding", "dilation")), groups]

    def forward(
        self,
        x: Tensor,
        layout: int = LIKE_INPUT,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        return OPS.planned_conv2d(
            x, self.weight, bias, self.plan, -1, *self.four, residual, relu, layout
        )

    def input_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return OPS.planned_conv2d_input_grad(
            grad, self.weight, self.plan, -1, list(x.shape), *self.four
        )

    def weight_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return OPS.planned_conv2d_weight_grad(
            grad, x, self.plan, list(self.weight.shape), *self.four
        )

    def raw(self, x: Tensor, grad: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        """The three products of the ops that take the pattern instead of its plan."""
        p, w = self.pattern, self.weight
        return [
            OPS.masked_conv2d(x, w, bias, *p[:6], *self.four, False),
            OPS.masked_conv2d_input_grad(grad, w, *p[:6], list(x.shape), *self.four),
            OPS.masked_conv2d_weight_grad(
                grad, x, *p[:2], p.block_depth, list(w.shape), *self.four
            ),
        ]

    def reference(self) -> dict[str, Any]:
        """Keyword arguments of F.conv2d."""
        return {**self.geometry, "groups": self.groups}


def random_case(seed: int, dtype: torch.dtype) -> tuple[Conv, Tensor, Tensor | None, str]:
    """Every batch from 1 to 40, maps of all forms, wide steps, more padding than is needed."""
    g = torch.Generator().manual_seed(seed)
    kernel = KERNELS[pick(list(range(len(KERNELS))), g)]
    dilation = (pick([1, 1, 2], g), pick([1, 1, 2], g))
    padding = (pick([0, 1, 2, 3], g), pick([0, 1, 1, 2, 3], g))
    stride = (pick([1, 1, 2, 3], g), pick([1, 1, 2, 3], g))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    size = [max(a, b) for a, b in zip(MAPS[pick(list(range(len(MAPS))), g)], least, strict=True)]
    batch = 1 + seed % 40
    groups = pick([1, 1, 1, 2, 3, 8], g)
    depth = 1 if groups == 8 else pick([1, 2, 3, 5, 9, 16, 40], g)
    rows = pick([1, 1, 2, 3, 8, 17, 70, 600], g)
    points = size[0] * size[1] // (stride[0] * stride[1]) + 1

    def work() -> int:
        return batch * rows * groups * depth * kernel[0] * kernel[1] * points

    while work() > WORK and depth > 1:
        depth = (depth + 1) // 2
    while work() > WORK and rows > 1:
        rows = (rows + 1) // 2
    weight = torch.randn(rows * groups, depth, *kernel, generator=g).to(dtype)
    mask = random_mask(tuple(weight.shape), g)
    weight = torch.where(mask, weight, torch.tensor(float("nan"), dtype=dtype))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    x = torch.randn(batch, depth * groups, *size, generator=g).to(dtype)
    bias = torch.randn(rows * groups, generator=g).to(dtype) if seed % 2 else None
    what = f"{dtype} seed={seed} {tuple(x.shape)} {tuple(weight.shape)} {groups=} {geometry}"
    return Conv(weight, mask, geometry, groups), x, bias, what


def check_case(seed: int, dtype: torch.dtype, each_isa: Any) -> None:
    conv, x, bias, what = random_case(seed, dtype)
    g = torch.Generator().manual_seed(seed)
    out = conv.forward(x).shape
    grad = torch.randn(out, generator=g).to(dtype)
    if dtype == torch.float64:
        pairs = {k: tuple(v) for k, v in conv.geometry.items()}
        exact, s, n = conv_exact(x, conv.weight, conv.mask, bias, pairs, conv.groups)
        of_y = tuple(a.reshape(out) for a in (exact, s, n))
        c = {"groups": conv.groups, "kernel": tuple(conv.weight.shape[2:]), "geometry": pairs}
        of_dx, of_dw = exact_gradients(x, conv.weight, conv.mask, grad, c)
    else:
        args = (x, conv.weight, conv.mask, bias, grad, conv.reference())
        of_y, of_dx, of_dw = conv_products(*args)
    x_last, grad_last = batch_last(x), batch_last(grad)
    rubbish = torch.full_like(x, float("nan"))
    for isa in each_isa():
        on = f"{isa} {what}"
        if seed % 3 == 0:  # what a call leaves behind in its memory must not reach the next one
            conv.forward(rubbish, BATCH_LAST)
            conv.input_grad(batch_last(torch.full_like(grad, float("nan"))), x)
        y = conv.forward(x_last, LIKE_INPUT, bias)
        assert_within(y, *of_y, f"{on} forward")
        assert is_batch_last(y) or y.is_contiguous()
        for source, layout in [(x, BATCH_LAST), (x_last, CONTIGUOUS), (x_last, BATCH_LAST)]:
            assert same_bits(conv.forward(source, layout, bias), y), f"{on} layout={layout}"
        assert_within(conv.forward(x, CONTIGUOUS, bias), *of_y, f"{on} forward, contiguous")
        dx = conv.input_grad(grad_last, x)
        assert_within(dx, *of_dx, f"{on} input grad")
        dw = conv.weight_grad(grad_last, x_last)
        assert_within(dw, *of_dw, f"{on} weight grad")
        if is_batch_last(grad_last):
            assert same_bits(conv.weight_grad(grad_last, x), dw), on
        if is_batch_last(x_last):
            assert same_bits(conv.weight_grad(grad, x_last), dw), on
        if seed % 5 == 0:
            for got, wanted in zip(conv.raw(x_last, grad_last, bias), (y, dx, dw), strict=True):
                assert got.is_contiguous()
                if x.shape[0] > 1:  # a batch of one goes to the lanes only where it is asked for
                    assert same_bits(got, wanted), f"{on} raw op"


@pytest.mark.parametrize("shard", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_cases(every_isa: Any, dtype: torch.dtype, shard: int) -> None:
    for seed in range(shard * CASES, (shard + 1) * CASES):
        check_case(seed, dtype, every_isa)


# (batch, channels, out, map, kernel, geometry, groups): sizes that reach each branch of the layout.
FIXED = [
    (17, 4, 600, (4, 4), (3, 3), {"padding": 1}, 1),  # rows in chunks
    (40, 4, 1, (8, 8), (3, 3), {"padding": 1}, 1),
    (33, 150, 3, (3, 5), (3, 3), {"padding": 1}, 1),  # several blocks of channels
    (16, 130, 2, (1, 70), (1, 7), {"padding": (0, 3)}, 1),  # parts of rows
    (18, 3, 5, (100, 3), (3, 3), {"padding": (1, 1)}, 1),  # several strips of an image
    (40, 2, 130, (2, 2), (2, 2), {}, 2),  # several lane groups to a register tile, two windows
    (5, 12, 12, (7, 7), (3, 3), {"stride": 2, "padding": 1}, 12),  # depthwise
    (20, 6, 12, (13, 9), (5, 5), {"stride": (3, 2), "dilation": 2, "padding": 4}, 3),
    (31, 3, 4, (9, 9), (1, 1), {"stride": 2}, 1),
    (31, 3, 4, (5, 4), (1, 1), {}, 1),  # pointwise: one long row
    (31, 3, 4, (5, 4), (1, 1), {"padding": 2}, 1),
    (16, 3, 4, (1, 1), (7, 7), {"padding": 3}, 1),
    (16, 2, 3, (3, 3), (16, 2), {"padding": (8, 1)}, 1),  # the largest kernel
]


def fixed_case(case: tuple[Any, ...], dtype: torch.dtype, density: float = 0.4) -> Any:
    batch, channels, out, size, kernel, geometry, groups = case
    g = torch.Generator().manual_seed(7)
    weight = integers((out, channels // groups, *kernel), dtype, g)
    mask = torch.rand(weight.shape, generator=g) < density
    x = integers((batch, channels, *size), dtype, g)
    return Conv(weight, mask, geometry, groups), x, g


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", FIXED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_integers_are_exact(
    every_isa: Any, dtype: torch.dtype, case: tuple[Any, ...], density: float
) -> None:
    conv, x, g = fixed_case(case, dtype, density)
    xd = x.double().requires_grad_()
    wd = torch.where(conv.mask, conv.weight, 0).double().requires_grad_()
    expected = F.conv2d(xd, wd, **conv.reference())
    grad = integers(tuple(expected.shape), dtype, g)
    dx, dw = torch.autograd.grad(expected, (xd, wd), grad.double())
    last = batch_last(x)
    for isa in every_isa():
        y = conv.forward(last)
        assert is_batch_last(y), isa
        assert torch.equal(y.double(), expected), isa
        assert torch.equal(conv.input_grad(batch_last(grad), x).double(), dx), isa
        got = conv.weight_grad(batch_last(grad), last).double()
        assert torch.equal(got, torch.where(conv.mask, dw, 0)), isa
        if density:
            assert y.count_nonzero() > y.numel() // 8


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("case", FIXED, ids=str)
def test_reads_nothing_outside_its_buffers(
    every_isa: Any, case: tuple[Any, ...], at_end: bool
) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        conv, x, g = fixed_case(case, dtype)
        conv.weight = guarded(conv.weight, at_end)
        last, x = batch_last(x, at_end), guarded(x, at_end)
        some = integers(tuple(conv.forward(x).shape), dtype, g)
        grad, grad_last = guarded(some, at_end), batch_last(some, at_end)
        bias = guarded(integers((len(conv.weight),), dtype, g), at_end)
        for _ in every_isa():
            for source, layout in itertools.product((x, last), (CONTIGUOUS, BATCH_LAST)):
                added = grad_last if layout == BATCH_LAST else grad
                conv.forward(source, layout, bias, added, relu=True)
            conv.input_grad(grad_last, x)
            for pair in [(grad, last), (grad_last, x), (grad_last, last)]:
                conv.weight_grad(*pair)


@pytest.mark.parametrize("case", FIXED, ids=str)
def test_same_bits_for_any_thread_count(
    every_isa: Any, threads: None, case: tuple[Any, ...]
) -> None:
    conv, x, g = fixed_case(case, torch.float32)
    conv.weight = torch.randn(conv.weight.shape, generator=g)
    x = batch_last(torch.randn(x.shape, generator=g))
    for isa in every_isa():
        results = []
        for count in (1, 2, 3, 7, 1):
            torch.set_num_threads(count)
            y = conv.forward(x)
            results.append([y, conv.input_grad(y, x), conv.weight_grad(y, x)])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True)), isa


def test_without_being_asked_the_same_kernel_gives_the_same_bits(every_isa: Any) -> None:
    # Whole vectors of images on small maps: contiguous tensors go to the lanes too.
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(20, 9, 3, 3, generator=g)
    conv = Conv(weight, torch.rand(weight.shape, generator=g) < 0.3, {"padding": 1})
    x, grad = torch.randn(32, 9, 4, 4, generator=g), torch.randn(32, 20, 4, 4, generator=g)
    for isa in every_isa():
        last = conv.raw(batch_last(x), batch_last(grad))
        for a, b in zip(conv.raw(x, grad), last, strict=True):
            assert same_bits(a, b), isa
        assert same_bits(conv.forward(x), last[0]), isa
        assert same_bits(conv.input_grad(grad, x), last[1]), isa
        assert same_bits(conv.weight_grad(grad, x), last[2]), isa


def test_sources_behind_other_strides(every_isa: Any) -> None:
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(7, 6, 3, 3, generator=g)
    conv = Conv(weight, torch.rand(weight.shape, generator=g) < 0.5, {"padding": 1, "stride": 2})
    wide = torch.randn(20, 9, 12, 11, generator=g)
    last = batch_last(wide)
    forms = {
        "channels_last": wide[:, :6].contiguous(memory_format=torch.channels_last),
        "offset": wide[1:, 2:8, 1:, :-2],
        "expanded batch": wide[:1, :6].expand(20, -1, -1, -1),
        "expanded map": wide[:, :6, :1, :1].expand(-1, -1, 9, 9),
        "flipped axes": wide[:, :6].transpose(2, 3),
        "batch-last, some channels": last[:, 2:8],
        "batch-last, some images": last[1:18, :6],
        "batch-last, every other image": last[::2, :6],
        "batch-last, part of the map": last[:, :6, 1:, 2:],
        "batch-last, one row": last[:, :6, 3:4],
        "batch-last, one column": last[:, :6, :, 3:4],
        "batch-last, one image": last[4:5, :6],
    }
    one = torch.randn(18, 6, 1, 9, generator=g)  # strides of a dimension of size 1 say nothing
    forms["odd stride"] = batch_last(one).as_strided(one.shape, (1, 162, 5, 18))
    for isa in every_isa():
        for name, x in forms.items():
            expected = conv.forward(x.contiguous(), BATCH_LAST)
            assert same_bits(conv.forward(x, BATCH_LAST), expected), f"{isa} {name}"
            torch.testing.assert_close(conv.forward(x), expected, rtol=1e-4, atol=1e-4)
            exact = F.conv2d(x, torch.where(conv.mask, weight, 0), **conv.reference())
            torch.testing.assert_close(expected, exact, rtol=1e-4, atol=1e-4)
            grad = batch_last(torch.randn(expected.shape, generator=g))
            wanted = conv.weight_grad(grad, x.contiguous())
            torch.testing.assert_close(conv.weight_grad(grad, x), wanted, rtol=1e-4, atol=1e-4)
            for other in (
                grad.contiguous(),
                grad.contiguous(memory_format=torch.channels_last),
            ):
                dx = conv.input_grad(other, x)
                torch.testing.assert_close(dx, conv.input_grad(grad, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [CONTIGUOUS, LIKE_INPUT, BATCH_LAST])
def test_a_batch_of_none(every_isa: Any, layout: int) -> None:
    conv, _, _ = fixed_case(FIXED[2], torch.float32)
    x = torch.zeros(0, 150, 3, 5)
    bias = torch.ones(3)
    for _ in every_isa():
        for source in (x, batch_last(x)):
            y = conv.forward(source, layout, bias, torch.zeros(0, 3, 3, 5), relu=True)
            assert y.shape == (0, 3, 3, 5)
            assert conv.input_grad(y, source).shape == x.shape
            dw = conv.weight_grad(y, source)
            assert dw.shape == conv.weight.shape
            assert not dw.any()


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("batch", [17, 16, 5])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bad_pixel_reaches_only_what_reads_it(
    every_isa: Any, value: float, batch: int, padding: int
) -> None:
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(9, 4, 3, 3, generator=g).abs() + 0.5
    mask = torch.rand(weight.shape, generator=g) < 0.4
    mask[:, 3] = False  # nobody reads the last channel
    mask[0] = False
    conv = Conv(weight, mask, {"padding": padding})
    x = torch.rand(batch, 4, 5, 6, generator=g)
    x[3, 1, 4, 5] = value
    x[3, 0, 0, 0] = value
    x[batch - 1, 2, 2, 0] = value
    x[:, 3] = value
    seen = F.conv2d((~x.isfinite()).double(), mask.double(), padding=padding) > 0
    assert seen.any(dim=(1, 2, 3)).sum() == 2
    grad = torch.rand(seen.shape, generator=g) + 0.5
    bad_grad = grad.clone()
    bad_grad[1, 4, 2, 2] = value
    bad_grad[0, 0, 0, 0] = value  # no weight meets it
    rows = torch.zeros(9, dtype=torch.bool)
    rows[4] = True
    reached = torch.nn.grad.conv2d_input(
        x.shape, mask.double(), (~bad_grad.isfinite()).double(), padding=padding
    )
    cols = F.unfold((~x.isfinite()).double(), 3, padding=padding).sum(dim=(0, 2)).view(4, 3, 3)
    spoilt = (cols > 0).expand(9, -1, -1, -1) & mask
    for isa in every_isa():
        for source in (x, batch_last(x)):
            for layout in (CONTIGUOUS, BATCH_LAST):
                y = conv.forward(source, layout)
                assert torch.equal(~y.isfinite(), seen), isa
            assert torch.equal(~conv.weight_grad(batch_last(grad), source).isfinite(), spoilt), isa
            for wrong in (bad_grad, batch_last(bad_grad)):
                dw = conv.weight_grad(wrong, batch_last(torch.ones_like(x)))
                assert torch.equal((~dw.isfinite()).flatten(1).any(1), rows), isa
        dx = conv.input_grad(batch_last(bad_grad), x)
        assert torch.equal(~dx.isfinite(), reached > 0), isa


def test_infinite_weights_stay_in_their_row_and_inside_the_batch(every_isa: Any) -> None:
    # Lanes beyond the batch multiply zeros by infinity: nobody may see them.
    weight = torch.ones(3, 2, 3, 3)
    weight[1, 0, 1, 1] = float("inf")
    conv = Conv(weight, torch.ones_like(weight, dtype=torch.bool), {})
    x = torch.ones(17, 2, 5, 5)
    for isa in every_isa():
        for layout in (CONTIGUOUS, BATCH_LAST):
            y = conv.forward(x, layout)
            assert y[:, 1].isinf().all(), isa
            assert torch.equal(y[:, [0, 2]], torch.full((17, 2, 3, 3), 18.0)), isa


def test_kernels_too_large_for_the_lanes_take_another_way(every_isa: Any) -> None:
    # No batch-last result then: a contiguous one, and right.
    g = torch.Generator().manual_seed(6)
    for kernel, geometry, channels in [
        ((17, 1), {"padding": (8, 0)}, 2),
        ((1, 17), {"padding": (0, 8), "stride": 2}, 2),
        ((3, 3), {"dilation": 40, "padding": 40}, 60),  # the panel of a block is too large
    ]:
        weight = torch.randn(4, channels, *kernel, generator=g)
        conv = Conv(weight, torch.rand(weight.shape, generator=g) < 0.5, geometry)
        x = torch.randn(18, channels, 7, 6, generator=g)
        kept = torch.where(conv.mask, weight, 0)
        for isa in every_isa():
            y = conv.forward(batch_last(x), BATCH_LAST)
            assert y.is_contiguous(), isa
            expected = F.conv2d(x, kept, **conv.reference())
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            grad = torch.randn(y.shape, generator=g)
            kept.requires_grad_()
            source = x.clone().requires_grad_()
            dx, dw = torch.autograd.grad(
                F.conv2d(source, kept, **conv.reference()), (source, kept), grad
            )
            kept = kept.detach()
            got = conv.input_grad(batch_last(grad), x)
            torch.testing.assert_close(got, dx, rtol=1e-4, atol=1e-4)
            got = conv.weight_grad(batch_last(grad), batch_last(x))
            wanted = torch.where(conv.mask, dw, 0)
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_taps_further_apart_than_a_vector(every_isa: Any, axis: int) -> None:
    # Two taps of different residues: each run of needed pixels is longer than the pixels it needs.
    for taps, far, step, padding in itertools.product((2, 3), (16, 17, 31, 50), (2, 3), (0, 1)):
        size, kernel = (100, far * (taps - 1) + 1), (3, taps)
        geometry = {"stride": (4, step), "dilation": (2, far), "padding": (padding, 0)}
        if axis == 1:
            size, kernel = size[::-1], kernel[::-1]
            geometry = {k: v[::-1] for k, v in geometry.items()}
        g = torch.Generator().manual_seed(far)
        x, weight = integers((16, 1, *size), torch.float32, g), torch.ones(2, 1, *kernel)
        conv = Conv(weight, torch.ones_like(weight, dtype=torch.bool), geometry)
        expected = F.conv2d(x, weight, **conv.reference())
        what = f"{taps=} {far=} {step=} {padding=}"
        wanted = torch.nn.grad.conv2d_weight(x, weight.shape, expected, **conv.reference())
        back = torch.nn.grad.conv2d_input(x.shape, weight, expected, **conv.reference())
        for isa in every_isa():
            for source in (x, batch_last(x)):
                assert torch.equal(conv.forward(source), expected), f"{isa} {what}"
                got = conv.weight_grad(batch_last(expected), source)
                assert torch.equal(got, wanted), f"{isa} {what}"
            assert torch.equal(conv.input_grad(batch_last(expected), x), back), f"{isa} {what}"


@pytest.mark.parametrize("batch", [16, 5])
def test_few_points_of_wide_maps(every_isa: Any, batch: int) -> None:
    # A tile then reads a few pixels of a long row.
    for size, kernel, stride, dilation, padding in [
        ((1, 315), (1, 7), (2, 7), (1, 50), (2, 0)),
        ((1, 1315), (1, 7), (1, 7), (1, 150), (2, 9)),
        ((2, 901), (1, 4), (3, 16), (3, 300), (1, 0)),
        ((9, 2600), (3, 2), (1, 16), (1, 2500), (1, 1)),
        ((4, 800), (2, 16), (2, 16), (1, 53), (0, 3)),
        ((315, 1), (7, 1), (7, 2), (50, 1), (0, 2)),
    ]:
        g = torch.Generator().manual_seed(size[1])
        geometry = {"stride": stride, "dilation": dilation, "padding": padding}
        x = integers((batch, 2, *size), torch.float32, g)
        weight = integers((3, 2, *kernel), torch.float32, g)
        conv = Conv(weight, torch.ones_like(weight, dtype=torch.bool), geometry)
        expected = F.conv2d(x, weight, **conv.reference())
        grad = integers(tuple(expected.shape), torch.float32, g)
        wanted = torch.nn.grad.conv2d_weight(x, weight.shape, grad, **conv.reference())
        back = torch.nn.grad.conv2d_input(x.shape, weight, grad, **conv.reference())
        for isa in every_isa():
            for source in (x, batch_last(x)):
                conv.forward(torch.full_like(source, float("nan")), BATCH_LAST)
                assert torch.equal(conv.forward(source, BATCH_LAST), expected), (isa, size)
                got = conv.weight_grad(batch_last(grad), source)
                assert torch.equal(got, wanted), (isa, size)
            assert torch.equal(conv.input_grad(batch_last(grad), x), back), (isa, size)


@pytest.mark.parametrize(
    ("dilation", "size", "channels"),
    [
        ((2**28, 2**28), (3, 3), 1),
        ((2**28, 5 * 2**26), (3, 3), 2),  # the bytes of a panel do not fit 64 bits
        ((2**28, 2**28 - 1), (1, 1), 1),
        ((10**5, 10**6), (4, 5), 1),
    ],
    ids=str,
)
def test_dilations_beyond_the_map_overflow_nothing(
    dilation: tuple[int, int], size: tuple[int, int], channels: int
) -> None:
    # Only the middle tap meets the image; contiguous and batch-last alike.
    g = torch.Generator().manual_seed(0)
    weight = integers((2, channels, 3, 3), torch.float32, g)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, :, 1, 1] = True
    conv = Conv(weight, mask, {"dilation": dilation, "padding": dilation})
    x = integers((16, channels, *size), torch.float32, g)
    expected = F.conv2d(x, weight[:, :, 1:2, 1:2])
    for source in (x, batch_last(x)):
        assert torch.equal(conv.forward(source), expected)
        assert torch.equal(conv.forward(source, BATCH_LAST), expected)


def test_hard_bound_is_a_bound(every_isa: Any) -> None:
    # The reference of the random cases against extended precision, once.
    conv, x, bias, _ = random_case(11, torch.float32)
    grad = torch.randn(conv.forward(x).shape)
    y, dx, dw = conv_products(x, conv.weight, conv.mask, bias, grad, conv.reference())
    pairs = {k: tuple(v) for k, v in conv.geometry.items()}
    exact = conv_exact(x, conv.weight, conv.mask, bias, pairs, conv.groups)
    c = {"groups": conv.groups, "kernel": tuple(conv.weight.shape[2:]), "geometry": pairs}
    gradients = exact_gradients(x, conv.weight, conv.mask, grad, c)
    for got, wanted in zip((y, dx, dw), (exact, *gradients), strict=True):
        for a, b in zip(got[:2], wanted[:2], strict=True):
            b = b.reshape(a.shape).astype(np.float64)
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        assert (got[2] <= wanted[2].reshape(got[2].shape)).all()
