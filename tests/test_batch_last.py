"""Activations stored batch innermost: the ops read them, and layers pass the layout on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from layouts import BATCH_LAST, CONTIGUOUS, LIKE_INPUT, batch_last, is_batch_last, same_bits
from oracle import DTYPES, assert_within, guarded, linear_exact, wide
from test_masked_linear import SIZES, pick, random_mask

OPS = torch.ops.fastprune
CASES = 100  # of each dtype and ISA


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def number(pattern: fp.Pattern) -> int:
    return pattern.plan.number(pattern)


@pytest.fixture(autouse=True)
def results_start_as_nan() -> Any:
    """torch fills uninitialized tensors with NaN: an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Linear products.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_linear_cases(isa: str, dtype: torch.dtype) -> None:
    for seed in range(CASES):
        g = torch.Generator().manual_seed(seed)
        out, cols, batch = (pick(SIZES, g) for _ in range(3))
        what = f"isa={isa} dtype={dtype} seed={seed} out={out} in={cols} batch={batch}"
        mask = random_mask((out, cols), g)
        x = torch.randn(batch, cols, generator=g).to(dtype)
        weight = torch.randn(out, cols, generator=g).to(dtype)
        weight = torch.where(mask, weight, torch.tensor(float("nan"), dtype=dtype))
        bias = torch.randn(out, generator=g).to(dtype) if seed % 2 else None
        plan = number(pattern := fp.pack(mask))

        def forward(
            x: Tensor,
            layout: int,
            weight: Tensor = weight,
            bias: Tensor | None = bias,
            plan: int = plan,
        ) -> Tensor:
            return OPS.planned_linear(x, weight, bias, plan, -1, None, False, layout)

        y = forward(batch_last(x), LIKE_INPUT)
        assert_within(y, *linear_exact(x, weight, mask, bias), f"{what} forward")
        if batch > 1 and cols > 1 and out > 1:
            assert is_batch_last(y), what
        for source, layout in itertools.product(
            (x, batch_last(x)), (CONTIGUOUS, LIKE_INPUT, BATCH_LAST)
        ):
            assert same_bits(forward(source, layout), y), f"{what} layout={layout}"
        # The raw pattern's product: a plan may sum in another order where the batch is small.
        raw = OPS.masked_linear(batch_last(x), weight, bias, *pattern[:6], False)
        assert_within(raw, *linear_exact(x, weight, mask, bias), f"{what} raw")
        grad = torch.randn(batch, out, generator=g).to(dtype)
        dx = OPS.planned_linear_input_grad(batch_last(grad), weight, plan, -1)
        w = wide(torch.where(mask, weight, 0))
        terms = np.broadcast_to(mask.sum(0).numpy(), dx.shape)
        exact = (wide(grad) @ w, np.abs(wide(grad)) @ np.abs(w), terms)
        assert_within(dx, *exact, f"{what} input grad")
        assert same_bits(OPS.planned_linear_input_grad(grad, weight, plan, -1), dx), what
        dw = OPS.planned_linear_weight_grad(batch_last(grad), batch_last(x), plan)
        keep = mask.numpy()
        s = (np.abs(wide(grad)).T @ np.abs(wide(x))) * keep
        exact = ((wide(grad).T @ wide(x)) * keep, s, np.full(mask.shape, batch))
        assert_within(dw, *exact, f"{what} weight grad")
        for a, b in [(grad, batch_last(x)), (batch_last(grad), x), (grad, x)]:
            assert same_bits(OPS.planned_linear_weight_grad(a, b, plan), dw), what


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_reads_nothing_outside_its_buffers(
    isa: str, dtype: torch.dtype, at_end: bool
) -> None:
    for out, cols, batch in [(1, 1, 1), (17, 33, 65), (16, 64, 64), (3, 130, 5), (70, 9, 18)]:
        pattern = fp.pack(random(out, cols, seed=1) > 0)
        plan = number(pattern)
        w = guarded(random(out, cols).to(dtype), at_end)
        xs = [guarded(random(batch, cols).to(dtype), at_end)]
        grads = [guarded(random(batch, out).to(dtype), at_end)]
        xs.append(batch_last(xs[0], at_end))
        grads.append(batch_last(grads[0], at_end))
        for x, residual, layout in itertools.product(xs, grads, (CONTIGUOUS, BATCH_LAST)):
            OPS.planned_linear(x, w, None, plan, -1, residual, True, layout)
        for grad in grads:
            OPS.planned_linear_input_grad(grad, w, plan, -1)
            for x in xs:
                OPS.planned_linear_weight_grad(grad, x, plan)


def test_linear_same_bits_for_any_thread_count(isa: str, threads: None) -> None:
    w, pattern = random(130, 300), fp.pack(random(130, 300, seed=1) > 1)
    for batch in (3, 64, 200):
        x, grad = batch_last(random(batch, 300)), batch_last(random(batch, 130))
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                (
                    OPS.planned_linear(x, w, None, number(pattern), -1, None, False, LIKE_INPUT),
                    OPS.planned_linear_input_grad(grad, w, number(pattern), -1),
                    OPS.planned_linear_weight_grad(grad, x, number(pattern)),
                )
            )
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_linear_sources_behind_other_strides(isa: str) -> None:
    w, pattern = random(17, 9), fp.pack(random(17, 9, seed=1) > 0)
    stored = random(20, 40)
    forms = {
        "transposed": stored[:9].t(),
        "transposed, some columns": stored.t()[:, 3:12],
        "transposed, some rows": stored[:9, 5:22].t(),
        "transposed, every other row": stored[:9, ::2].t(),
        "transposed, one row": stored[:9, :1].t(),
        "expanded row": stored[0, :9].expand(18, 9),
        "expanded column": stored[0, :18].unsqueeze(1).expand(18, 9),
        "none": stored[:9, :0].t(),
    }
    for name, x in forms.items():
        expected = fp.masked_linear(x.contiguous(), w, pattern)
        for layout in (CONTIGUOUS, LIKE_INPUT, BATCH_LAST):
            y = OPS.planned_linear(x, w, None, number(pattern), -1, None, False, layout)
            assert same_bits(y, expected), name
        grad = random(len(x), 17)
        wanted = OPS.planned_linear_weight_grad(grad, x.contiguous(), number(pattern))
        for one in (grad, batch_last(grad)):
            assert same_bits(OPS.planned_linear_weight_grad(one, x, number(pattern)), wanted), name


@pytest.mark.parametrize("batch", [17, 64, 3])
def test_linear_bad_activations_reach_only_what_reads_them(isa: str, batch: int) -> None:
    mask = random(70, 9, seed=1) > 0
    mask[:, 4] = False
    mask[3] = False
    w, plan = random(70, 9).abs() + 0.5, number(pattern := fp.pack(mask))
    x = random(batch, 9)
    x[:, 4] = float("nan")
    x[2, 1] = float("inf")
    seen = (~x.isfinite()).double() @ mask.double().t() > 0
    grad = random(batch, 70).abs() + 0.5
    spoilt = (~x.isfinite()).any(dim=0).expand(70, 9) & mask
    for source in (x, batch_last(x)):
        y = OPS.planned_linear(source, w, None, plan, -1, None, False, BATCH_LAST)
        assert torch.equal(~y.isfinite(), seen)
        dw = OPS.planned_linear_weight_grad(batch_last(grad), source, plan)
        assert torch.equal(~dw.isfinite(), spoilt)
    assert pattern.nnz


# Layers.


def linear_layer(cols: int, rows: int, seed: int = 0) -> fp.nn.MaskedLinear:
    torch.manual_seed(seed)
    return fp.nn.MaskedLinear(nn.Linear(cols, rows), random(rows, cols, seed=seed + 1) > 0.5)


def conv_layer(cin: int, cout: int, kernel: int = 3, seed: int = 0, **kw: Any) -> Any:
    torch.manual_seed(seed)
    dense = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **kw)
    return fp.nn.MaskedConv2d(dense, random(*dense.weight.shape, seed=seed + 1) > 0.5)


LAYERS: dict[str, tuple[Any, Tensor]] = {
    "linear": (linear_layer(37, 70), random(19, 37)),
    "conv": (conv_layer(6, 10), random(17, 6, 5, 5)),
    "conv, two images": (conv_layer(6, 10), random(2, 6, 5, 5)),
    "conv, stride": (conv_layer(6, 10, stride=2), random(33, 6, 9, 8)),
    "conv, groups": (conv_layer(6, 12, groups=3), random(16, 6, 7, 7)),
    "conv, depthwise": (conv_layer(6, 6, groups=6), random(20, 6, 7, 7)),
    "conv, pointwise": (conv_layer(6, 10, 1), random(18, 6, 4, 4)),
    "conv, one row": (conv_layer(3, 4), random(18, 3, 1, 12)),
    "conv, one column": (conv_layer(3, 4), random(18, 3, 12, 1)),
    "conv, one channel": (conv_layer(1, 4), random(18, 1, 5, 4)),
    "conv, reflected": (conv_layer(6, 10, padding_mode="reflect"), random(17, 6, 5, 5)),
}


def results(layer: Any, x: Tensor, grad_like: Any) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    grad = grad_like(torch.cos(y.detach()))
    return [y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)]


@pytest.mark.parametrize("name", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_layers_pass_the_layout_on(isa: str, name: str, dtype: torch.dtype) -> None:
    layer, x = LAYERS[name]
    layer, x = layer.to(dtype), x.to(dtype)
    expected = results(layer, x, torch.Tensor.contiguous)
    last = batch_last(x)
    got = results(layer, last, batch_last)
    with torch.no_grad():
        assert same_bits(layer(last), got[0].detach())
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=20 * tolerance)
    assert got[2].is_contiguous()
    assert expected[0].is_contiguous()
    assert expected[1].is_contiguous()
    if "reflected" not in name:  # F.pad gives a contiguous result
        assert is_batch_last(got[0])
        assert is_batch_last(got[1])
    mixed = results(layer, last, torch.Tensor.contiguous)
    assert mixed[1].is_contiguous()
    for a, b in zip(mixed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=20 * tolerance)
    summed = torch.autograd.grad(layer(last.requires_grad_()).sum(), last)[
        0
    ]  # an expanded gradient
    plain = x.clone().requires_grad_()
    wanted = torch.autograd.grad(layer(plain).sum(), plain)[0]
    torch.testing.assert_close(summed, wanted, rtol=tolerance, atol=20 * tolerance)
    layer.float()


@pytest.mark.parametrize("layout", [CONTIGUOUS, LIKE_INPUT, BATCH_LAST])
@pytest.mark.parametrize("name", ["linear", "conv", "conv, stride"])
def test_a_layer_may_decide_the_layout(name: str, layout: int) -> None:
    layer, x = LAYERS[name]
    layer._layout = layout
    try:
        for source in (x, batch_last(x)):
            y = layer(source)
            wanted = layout == BATCH_LAST or (layout == LIKE_INPUT and source is not x)
            assert is_batch_last(y) == wanted
            torch.testing.assert_close(y, layer.to("cpu")(x), rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                assert same_bits(layer(source), y.detach())
        if x.dim() == 4:  # no batch dimension: nothing to keep innermost
            torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=1e-5, atol=1e-5)
        else:
            deep = layer(x.view(19, 1, 37).expand(19, 2, 37))
            assert deep.shape == (19, 2, 70)
            assert same_bits(deep[:, 1].contiguous(), layer(x))
    finally:
        del layer._layout


def test_a_chain_keeps_the_layout() -> None:
    first, second, third = conv_layer(3, 8), conv_layer(8, 8, seed=3), conv_layer(8, 5, seed=4)

    def net(x: Tensor) -> list[Tensor]:
        a = torch.relu(first(x))
        b = torch.relu(second(a) + a)
        return [a, b, third(b)]

    x = random(18, 3, 6, 5)
    expected = net(x)
    last = batch_last(x).requires_grad_()
    got = net(last)
    for a, b in zip(got, expected, strict=True):
        assert is_batch_last(a)
        assert b.is_contiguous()
        assert torch.equal(a.contiguous(), a)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    parameters = [p for m in (first, second, third) for p in m.parameters()]
    grads = torch.autograd.grad(got[2], (last, got[0], *parameters), batch_last(got[2].cos()))
    assert is_batch_last(grads[0])
    assert is_batch_last(grads[1])
    plain = x.clone().requires_grad_()
    out = net(plain)
    wanted = torch.autograd.grad(out[2], (plain, out[0], *parameters), out[2].cos())
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_linear_layers_in_a_chain() -> None:
    first, second = linear_layer(37, 70), linear_layer(70, 33, seed=3)
    x = random(40, 37)
    expected = second(torch.relu(first(x)))
    last = batch_last(x).requires_grad_()
    y = second(torch.relu(first(last)))
    assert is_batch_last(y)
    assert same_bits(y, expected)
    assert torch.equal(y.contiguous(), y)
    (dx,) = torch.autograd.grad(y, last, batch_last(y.detach().cos()))
    assert is_batch_last(dx)
    plain = x.clone().requires_grad_()
    out = second(torch.relu(first(plain)))
    assert same_bits(dx, torch.autograd.grad(out, plain, out.detach().cos())[0])


def test_batch_last_input_of_recorded_graphs() -> None:
    # Compiled graphs call the ops that take raw patterns: contiguous results, and right.
    for name in ("linear", "conv"):
        layer, x = LAYERS[name]
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        last = batch_last(x)
        y = compiled(last)
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
        y.sum().backward()
        layer.zero_grad()
        program = torch.export.export(layer, (last,))
        torch.testing.assert_close(program.module()(last), layer(x), rtol=1e-5, atol=1e-5)


def test_autocast_keeps_the_layout() -> None:
    for name in ("linear", "conv"):
        layer, x = LAYERS[name]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(batch_last(x))
            assert is_batch_last(y)
            torch.testing.assert_close(y, layer(x), rtol=0.02, atol=0.02)
