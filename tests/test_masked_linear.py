"""masked_linear: forward and both gradients against exact references, on every ISA."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from oracle import DTYPES, assert_within, guarded, integers, linear_exact, wide

OPS = torch.ops.fastprune
ops_module = sys.modules["fastprune.ops.masked_linear"]  # the function has the module's name
SIZES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 63, 64, 65, 101, 129, 150]
CASES_PER_CALL = 250  # of each dtype and ISA; four shards make 1,000


def random_mask(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Random, empty or full rows, power-law rows, one dense row among empty ones."""
    rows = shape[0]
    kind = int(torch.randint(6, (), generator=g))
    density = float(torch.rand((), generator=g))
    mask = torch.rand(shape, generator=g) < density * density
    if kind == 0:
        mask[:] = False
    elif kind == 1:
        mask[:] = True
    elif kind == 2 and rows:
        mask[:] = False
        mask[int(torch.randint(rows, (), generator=g))] = True
    elif kind == 3 and rows:
        keep = torch.rand(rows, generator=g) ** 6
        mask = torch.rand(shape, generator=g) < keep.view(-1, *[1] * (len(shape) - 1))
    return mask


def strided(t: Tensor, g: torch.Generator) -> Tensor:
    """The same values behind other strides: transposed, offset, or expanded storage."""
    kind = int(torch.randint(4, (), generator=g))
    if kind == 1 and t.dim() == 2:
        return t.t().contiguous().t()
    if kind == 2:
        wide_storage = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
        wide_storage[..., 1 : 1 + t.shape[-1]] = t
        return wide_storage[..., 1 : 1 + t.shape[-1]]
    if kind == 3 and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t


def pick(values: list[int], g: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (), generator=g))]


@pytest.mark.parametrize("shard", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_cases(isa: str, dtype: torch.dtype, shard: int) -> None:
    for seed in range(shard * CASES_PER_CALL, (shard + 1) * CASES_PER_CALL):
        g = torch.Generator().manual_seed(seed)
        out, cols, batch = (pick(SIZES, g) for _ in range(3))
        what = f"isa={isa} dtype={dtype} seed={seed} out={out} in={cols} batch={batch}"
        mask = random_mask((out, cols), g)
        x = torch.randn(batch, cols, generator=g).to(dtype)
        weight = torch.randn(out, cols, generator=g).to(dtype)
        bias = torch.randn(out, generator=g).to(dtype) if seed % 2 else None
        # What is pruned is absent, whatever it holds.
        weight = torch.where(mask, weight, torch.tensor(float("nan"), dtype=dtype))
        pattern = fp.pack(mask)
        y = fp.masked_linear(strided(x, g), strided(weight, g), pattern, bias)
        assert_within(y, *linear_exact(x, weight, mask, bias), f"{what} forward")
        grad = torch.randn(batch, out, generator=g).to(dtype)
        x_grad = OPS.masked_linear_input_grad(strided(grad, g), weight, *pattern[:6])
        w = wide(torch.where(mask, weight, 0))
        terms = np.broadcast_to(mask.sum(0).numpy(), x_grad.shape)
        assert_within(
            x_grad, wide(grad) @ w, np.abs(wide(grad)) @ np.abs(w), terms, f"{what} input grad"
        )
        w_grad = OPS.masked_linear_weight_grad(
            strided(grad, g), strided(x, g), *pattern[:2], pattern.block_depth
        )
        keep = mask.numpy()
        assert_within(
            w_grad,
            (wide(grad).T @ wide(x)) * keep,
            (np.abs(wide(grad)).T @ np.abs(wide(x))) * keep,
            np.full(mask.shape, batch),
            f"{what} weight grad",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(isa: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for out, cols, batch in [(17, 20, 65), (64, 24, 70), (5, 28, 1)]:
        mask = torch.rand(out, cols, generator=g) < 0.4
        x, weight = integers((batch, cols), dtype, g), integers((out, cols), dtype, g)
        y = fp.masked_linear(x, weight, mask)
        assert torch.equal(
            y, fp.reference.masked_linear(x.double(), weight.double(), mask).to(dtype)
        )
        assert y.count_nonzero() > y.numel() // 3


def test_same_bits_for_any_thread_count_and_run(isa: str, threads: None) -> None:
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(130, 300, generator=g) < 0.2
    for batch in (3, 64, 200):
        x, w = torch.randn(batch, 300, generator=g), torch.randn(130, 300, generator=g)
        grad, pattern = torch.randn(batch, 130, generator=g), fp.pack(mask)
        results = []
        for count in (1, 2, 3, 7, 2, 2):
            torch.set_num_threads(count)
            results.append(
                (
                    fp.masked_linear(x, w, pattern),
                    OPS.masked_linear_input_grad(grad, w, *pattern[:6]),
                    OPS.masked_linear_weight_grad(grad, x, *pattern[:2], pattern.block_depth),
                )
            )
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_nothing_outside_its_buffers(isa: str, dtype: torch.dtype, at_end: bool) -> None:
    g = torch.Generator().manual_seed(2)
    for out, cols, batch in [(1, 1, 1), (17, 33, 65), (16, 64, 64), (3, 130, 5)]:
        mask = torch.rand(out, cols, generator=g) < 0.5
        pattern = fp.pack(mask)
        x = guarded(torch.randn(batch, cols, generator=g).to(dtype), at_end)
        w = guarded(torch.randn(out, cols, generator=g).to(dtype), at_end)
        grad = guarded(torch.randn(batch, out, generator=g).to(dtype), at_end)
        tight = [guarded(t, at_end) if t.numel() else t for t in pattern[:4]]
        blocks = pattern[4:6]
        OPS.masked_linear(x, w, None, *tight, *blocks, False)
        OPS.masked_linear_input_grad(grad, w, *tight, *blocks)
        OPS.masked_linear_weight_grad(grad, x, *tight[:2], blocks[0])


def test_absent_weights_and_what_only_they_read() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, :2] = True
    weight = torch.ones(3, 4)
    weight[:, 2] = float("inf")
    x = torch.ones(2, 4)
    x[:, 3] = float("nan")
    assert torch.equal(fp.masked_linear(x, weight, mask), torch.full((2, 3), 2.0))


def test_empty_mask_gives_the_bias_and_zero_gradients() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    w = torch.randn(3, 8, requires_grad=True)
    b = torch.randn(3, requires_grad=True)
    y = fp.masked_linear(x, w, torch.zeros(3, 8, dtype=torch.bool), b)
    assert torch.equal(y, b.expand(5, 3))
    y.sum().backward()
    assert not x.grad.any()
    assert not w.grad.any()
    assert torch.equal(b.grad, torch.full((3,), 5.0))


def test_overflow_in_float16_is_infinity() -> None:
    x = torch.full((1, 4), 200.0, dtype=torch.float16)
    w = torch.full((2, 4), 200.0, dtype=torch.float16)
    y = fp.masked_linear(x, w, torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(y, F.linear(x, w))
    assert torch.isinf(y).all()


def test_gradcheck_and_dense_weight_gradient() -> None:
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: fp.masked_linear(a[0], a[1], mask, a[2]), (x, w, b))
    grad = torch.randn(4, 5, dtype=torch.float64)
    y = fp.masked_linear(x, w, mask, b, weight_grad="dense")
    dense = torch.autograd.grad(y, (x, w, b), grad)
    pruned = torch.where(mask, w, 0.0).detach().requires_grad_()
    expected = torch.autograd.grad(F.linear(x, pruned, b), (x, pruned, b), grad)
    for got, want in zip(dense, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_shapes_that_torch_accepts() -> None:
    mask, w = torch.ones(3, 4, dtype=torch.bool), torch.randn(3, 4)
    for shape in [(4,), (2, 4), (2, 5, 4), (0, 4), (2, 0, 4)]:
        x = torch.randn(shape)
        torch.testing.assert_close(fp.masked_linear(x, w, mask), F.linear(x, w))
    expanded = torch.randn(1, 4).expand(6, 4)
    torch.testing.assert_close(fp.masked_linear(expanded, w, mask), F.linear(expanded, w))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool) -> None:
    pattern = fp.pack(torch.rand(6, 10, generator=torch.Generator().manual_seed(4)) < 0.5)
    x = torch.randn(3, 10, requires_grad=True)
    w = torch.randn(6, 10, requires_grad=True)
    b = torch.randn(6, requires_grad=True) if bias else None
    for dense in (False, True):
        torch.library.opcheck(OPS.masked_linear.default, (x, w, b, *pattern[:6], dense))
    grad = torch.randn(3, 6)
    torch.library.opcheck(OPS.masked_linear_input_grad.default, (grad, w.detach(), *pattern[:6]))
    torch.library.opcheck(
        OPS.masked_linear_weight_grad.default, (grad, x.detach(), *pattern[:2], pattern[4])
    )


def test_what_runs_on_cuda_takes_the_same_arguments() -> None:
    pattern = fp.pack(torch.rand(6, 10) < 0.5)
    x, w, b, grad = torch.randn(3, 10), torch.randn(6, 10), torch.randn(6), torch.randn(3, 6)
    torch.testing.assert_close(
        ops_module.on_cuda(x, w, b, *pattern[:6], False),
        OPS.masked_linear(x, w, b, *pattern[:6], False),
    )
    torch.testing.assert_close(
        ops_module.input_grad_on_cuda(grad, w, *pattern[:6]),
        OPS.masked_linear_input_grad(grad, w, *pattern[:6]),
    )
    torch.testing.assert_close(
        ops_module.weight_grad_on_cuda(grad, x, *pattern[:2], pattern[4]),
        OPS.masked_linear_weight_grad(grad, x, *pattern[:2], pattern[4]),
    )


def test_autocast_casts_as_linear_does() -> None:
    x, w, b = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)
    mask = torch.ones(3, 8, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fp.masked_linear(x, w, mask, b).dtype == F.linear(x, w, b).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"x: expected shape \(\.\.\., 4\), got \(2, 5\)"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "x: expected float32"),
        ({"weight": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "weight: expected the dt"),
        ({"weight": torch.zeros(3, 4, 1)}, ValueError, "weight: expected 2 dimensions"),
        ({"mask": torch.zeros(3, 4)}, TypeError, "mask: expected a bool tensor"),
        ({"mask": torch.zeros(4, 3).bool()}, ValueError, "mask: expected the weight's shape"),
        ({"mask": "all"}, TypeError, "mask: expected a bool tensor or a Pattern, got str"),
        ({"mask": fp.pack(torch.ones(4, 4).bool())}, ValueError, "mask: expected a pattern of"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(3,\)"),
        ({"bias": torch.zeros(3).half()}, TypeError, "bias: expected the dtype of x"),
        ({"weight_grad": "full"}, ValueError, "weight_grad: expected 'sampled' or 'dense'"),
    ],
)
def test_bad_input_names_the_argument(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    good = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "mask": torch.ones(3, 4, dtype=torch.bool),
        "bias": torch.zeros(3),
    }
    with pytest.raises(error, match=message):
        fp.masked_linear(**{**good, **change})
