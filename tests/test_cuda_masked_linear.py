"""The CUDA-core linear product by emulation: forward, gradients, malformed patterns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
import fastprune as fp
from oracle import DTYPES, assert_within, guarded, integers, linear_exact, wide
from test_masked_linear import SIZES, pick, random_mask, strided

pytestmark = emulated.needs_emulation
OPS = emulated.ops
FINE = "an earlier call on a CUDA device met bad data"


def packed(mask: Tensor, blocks: tuple[int, int]) -> fp.Pattern:
    """The pattern with given block depths: panels cut blocks that are deeper."""
    tensors = OPS.pack_pattern(mask, 1, 1, *blocks)
    return fp.Pattern(*tensors, *blocks, tuple(mask.shape), 1, len(tensors[1]))


@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    order=st.integers(0, 2),
    blocks=st.tuples(st.sampled_from([1, 6, 33, 192, 9000]), st.sampled_from([5, 192, 32767])),
)
@settings(max_examples=60)
def test_random_cases(seed: int, dtype: torch.dtype, order: int, blocks: tuple[int, int]) -> None:
    emulated.configure(order, 1 + seed % 5)
    g = torch.Generator().manual_seed(seed)
    out, cols, batch = (pick([*SIZES, 300], g) for _ in range(3))
    what = f"dtype={dtype} seed={seed} out={out} in={cols} batch={batch} blocks={blocks}"
    mask = random_mask((out, cols), g)
    x = torch.randn(batch, cols, generator=g).to(dtype)
    weight = torch.randn(out, cols, generator=g).to(dtype)
    bias = torch.randn(out, generator=g).to(dtype) if seed % 2 else None
    # What is pruned is absent, whatever it holds.
    weight = torch.where(mask, weight, torch.tensor(float("nan"), dtype=dtype))
    pattern = packed(mask, blocks)
    y = OPS.masked_linear(strided(x, g), strided(weight, g), bias, *pattern[:6], False)
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
    assert (w_grad[~mask] == 0).all(), what
    kept, batches = mask.numpy(), np.broadcast_to(batch, w_grad.shape)
    exact, size = wide(grad).T @ wide(x), np.abs(wide(grad)).T @ np.abs(wide(x))
    assert_within(w_grad, exact * kept, size * kept, batches, f"{what} weight grad")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact_and_nothing_else_is_read(dtype: torch.dtype) -> None:
    emulated.configure(1)
    g = torch.Generator().manual_seed(0)
    cases = [(1, 1, 1), (17, 20, 65), (64, 24, 70), (5, 28, 1), (130, 230, 129), (33, 301, 31)]
    for at_end, (out, cols, batch) in [(e, c) for e in (True, False) for c in cases]:
        mask = torch.rand(out, cols, generator=g) < 0.4
        pattern = fp.pack(mask)
        tight = [guarded(t, at_end) if t.numel() else t for t in pattern[:4]]
        x = guarded(integers((batch, cols), dtype, g), at_end)
        weight = guarded(integers((out, cols), dtype, g), at_end)
        grad = guarded(integers((batch, out), dtype, g), at_end)
        y = OPS.masked_linear(x, weight, None, *tight, *pattern[4:6], False)
        dx = OPS.masked_linear_input_grad(grad, weight, *tight, *pattern[4:6])
        xd, wd, gd = x.double(), torch.where(mask, weight.double(), 0), grad.double()
        assert torch.equal(y, (xd @ wd.t()).to(dtype))
        assert torch.equal(dx, (gd @ wd).to(dtype))
        assert out < 2 or y.count_nonzero() > y.numel() // 3


def test_bias_rows_in_any_order_and_one_dense_row() -> None:
    emulated.configure(2)
    g = torch.Generator().manual_seed(1)
    mask = torch.zeros(70, 400, dtype=torch.bool)
    mask[37] = True
    mask[:, 5] = torch.rand(70, generator=g) < 0.5
    x, weight = integers((150, 400), torch.float32, g), integers((70, 400), torch.float32, g)
    bias = torch.arange(70.0)
    y = OPS.masked_linear(x, weight, bias, *fp.pack(mask)[:6], False)
    assert torch.equal(y, x @ torch.where(mask, weight, 0).t() + bias)


def test_same_bits_whatever_the_order() -> None:
    g = torch.Generator().manual_seed(2)
    mask = torch.rand(200, 300, generator=g) < 0.2
    pattern = fp.pack(mask)
    for batch in (3, 64, 200):
        x, w = torch.randn(batch, 300, generator=g), torch.randn(200, 300, generator=g)
        grad = torch.randn(batch, 200, generator=g)
        results = []
        for seed, multiprocessors in [(0, 4), (1, 1), (2, 60), (3, 132)]:
            emulated.configure(seed, multiprocessors)
            y = OPS.masked_linear(x, w, None, *pattern[:6], False)
            results.append((y, OPS.masked_linear_input_grad(grad, w, *pattern[:6])))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_infinities_and_absent_weights() -> None:
    emulated.configure(1)
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[:, :2] = True
    weight = torch.ones(3, 40)
    weight[:, 2:] = float("inf")
    x = torch.ones(70, 40)
    x[:, 3:] = float("nan")
    x[69, 0] = float("inf")
    y = OPS.masked_linear(x, weight, None, *fp.pack(mask)[:6], False)
    assert torch.equal(y[:69], torch.full((69, 3), 2.0))
    assert y[69].isinf().all()
    grad = torch.full((70, 3), float("nan"))
    dw = OPS.masked_linear_weight_grad(grad, x, *fp.pack(mask)[:2], 40)
    assert torch.equal(dw.isnan(), mask)


def test_overflow_in_float16_is_infinity() -> None:
    emulated.configure(0)
    x = torch.full((1, 4), 200.0, dtype=torch.float16)
    w = torch.full((2, 4), 200.0, dtype=torch.float16)
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert torch.isinf(OPS.masked_linear(x, w, None, *fp.pack(mask)[:6], False)).all()


def refused_next_time(call: object, good: object) -> None:
    call()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=FINE):
        good()  # type: ignore[operator]
    good()  # type: ignore[operator]


@pytest.mark.parametrize("seed", [0, 1])
def test_bad_patterns_are_skipped_and_reported(seed: int) -> None:
    emulated.configure(seed)
    g = torch.Generator().manual_seed(3)
    pattern = fp.pack(torch.rand(30, 40, generator=g) < 0.5)
    other = fp.pack(torch.rand(30, 40, generator=torch.Generator().manual_seed(4)) < 0.5)
    x, w = guarded(torch.ones(2, 40)), guarded(torch.ones(30, 40))
    grad = guarded(torch.ones(2, 30))

    def call(**change: Tensor) -> Tensor:
        tensors = [guarded(t) for t in pattern._replace(**change)[:4]]
        return OPS.masked_linear(x, w, None, *tensors, *pattern[4:6], False)

    def grads(**change: Tensor) -> Tensor:
        tensors = [guarded(t) for t in pattern._replace(**change)[:4]]
        OPS.masked_linear_weight_grad(grad, x, *tensors[:2], pattern.block_depth)
        return OPS.masked_linear_input_grad(grad, w, *tensors, *pattern[4:6])

    def at(t: Tensor, index: int, value: int) -> Tensor:
        t = t.clone()
        t[index] = value
        return t

    row_ptr, offset = pattern.row_ptr, pattern.offset
    for change in (
        {"row_ptr": at(row_ptr, 0, 1)},
        {"row_ptr": at(row_ptr, -1, pattern.nnz + 1)},
        {"row_ptr": at(row_ptr, -1, pattern.nnz - 1)},
        {"row_ptr": at(row_ptr, 3, int(row_ptr[4]) + 1)},
        {"row_ptr": at(row_ptr, 3, -1)},
        {"row_ptr": at(row_ptr, 3, 2**62)},
        {"row_ptr": at(row_ptr, 0, -(2**63))},
        {"offset": at(offset, 5, 40)},
        {"offset": at(offset, 5, -1)},
        {"offset": torch.full_like(offset, 32767)},
    ):
        refused_next_time(lambda change=change: call(**change), call)
        with pytest.raises(RuntimeError, match=FINE):  # of the weight gradient
            grads(**change)
        call()
    t = pattern.transposed_offset
    for change in (
        {"transposed_offset": torch.roll(t, 1)},
        {"transposed_offset": at(t, 1, int(t[0]))},
        {"transposed_offset": at(t, 5, 31)},
        {"transposed_row_ptr": at(pattern.transposed_row_ptr, 3, 2**40)},
    ):
        refused_next_time(lambda change=change: grads(**change), call)
    if other.nnz != pattern.nnz:
        with pytest.raises(RuntimeError, match="transposed_offset: expected the"):
            grads(transposed_row_ptr=other.transposed_row_ptr, transposed_offset=other[3])


def test_random_bytes_never_crash() -> None:
    g = torch.Generator().manual_seed(5)
    good = fp.pack(torch.ones(1, 1, dtype=torch.bool))
    one, x, weight = torch.ones(1, 1), torch.ones(2, 40), guarded(torch.ones(30, 40))
    refused = 0
    for seed in range(150):
        emulated.configure(seed % 3)
        row_ptr = torch.randint(-3, 60, (31,), generator=g)
        offset = torch.randint(-(2**15), 2**15, (int(row_ptr[-1].clamp(0)),), generator=g).short()
        tensors = guarded(row_ptr), guarded(offset), guarded(row_ptr), guarded(offset)
        OPS.masked_linear(x, weight, None, *tensors, 40, 40, False)
        try:
            OPS.masked_linear(one, one, None, *good[:6], False)
        except RuntimeError:
            refused += 1
    assert refused == 150


def test_wrong_tensors_are_refused_at_once() -> None:
    emulated.configure(0)
    pattern = fp.pack(torch.rand(30, 40, generator=torch.Generator().manual_seed(6)) < 0.5)
    row_ptr, offset = pattern.row_ptr, pattern.offset
    for change, message in [
        ({"row_ptr": row_ptr[:-1]}, "row_ptr: expected size 31"),
        ({"row_ptr": row_ptr.int()}, "row_ptr: expected dtype Long"),
        ({"row_ptr": torch.stack([row_ptr, row_ptr], 1)[:, 0]}, "row_ptr: expected contiguous"),
        ({"offset": offset.long()}, "offset: expected dtype Short"),
        ({"block_depth": 0}, "block_depth: expected at least 1"),
        ({"block_depth": 40000}, "block_depth: expected at least 1"),
    ]:
        bad = pattern._replace(**change)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=f"masked_linear: {message}"):
            OPS.masked_linear(torch.ones(2, 40), torch.ones(30, 40), None, *bad[:6], False)
    with pytest.raises(RuntimeError, match="masked_linear: bias: expected size 30"):
        OPS.masked_linear(torch.ones(2, 40), torch.ones(30, 40), torch.ones(3), *pattern[:6], False)
