"""The float32 weight gradient sampled at the mask, by emulation of its CUDA kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
import fastprune as fp
from fastprune.ops.plan import READ_ANEW
from layouts import same_bits
from oracle import assert_within, guarded, integers, wide
from test_cuda_plan import make_plan
from test_masked_linear import strided

pytestmark = emulated.needs_emulation
OPS = emulated.ops
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _sampled() -> Iterator[None]:
    if emulated.built:
        fp._C.set_cuda_form("sampled")
    yield
    fp._C.set_cuda_form("auto")


def pack(mask: Tensor, depth: int = 192) -> fp.Pattern:
    """With blocks that panels of columns do not follow."""
    tensors = OPS.pack_pattern(mask, 1, 1, depth, 192)
    return fp.Pattern(*tensors, depth, 192, tuple(mask.shape), 1, len(tensors[1]))


def raw(mask: Tensor, grad: Tensor, x: Tensor, tf32: bool = False, depth: int = 192) -> Tensor:
    """The op that takes a raw pattern."""
    return OPS.masked_linear_weight_grad(grad, x, *pack(mask, depth)[:2], depth, tf32)


def planned(mask: Tensor, grad: Tensor, x: Tensor, tf32: bool = False) -> Tensor:
    """The op that takes a plan."""
    plan = make_plan(pack(mask))
    try:
        return OPS.planned_linear_weight_grad(grad, x, plan, tf32)
    finally:
        fp._C.release_plan(plan)


def check(dw: Tensor, mask: Tensor, grad: Tensor, x: Tensor, what: str) -> None:
    """Within the bound at the mask, exact zeros elsewhere."""
    assert dw.is_contiguous(), what
    exact, s = wide(grad).T @ wide(x), np.abs(wide(grad)).T @ np.abs(wide(x))
    kept = mask.numpy()
    exact, s = np.where(kept, exact, 0), np.where(kept, s, 0)
    assert_within(dw, exact, s, np.broadcast_to(len(x), s.shape), what)


def spoiled(mask: Tensor, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What no kept entry reads is not finite."""
    grad = torch.where(mask.any(1), grad, torch.tensor(NAN))
    return grad, torch.where(mask.any(0), x, torch.tensor(INF))


@settings(max_examples=40)
@given(
    rows=st.sampled_from([1, 2, 7, 31, 33, 64, 100]),
    cols=st.sampled_from([1, 3, 32, 33, 65, 190, 449, 700]),
    batch=st.sampled_from([1, 2, 31, 63, 64, 65, 128, 190]),
    density=st.sampled_from([0.0, 0.01, 0.05, 0.17, 0.5, 1.0]),
    order=st.integers(0, 2),
    multiprocessors=st.sampled_from([1, 3, 132]),
    seed=st.integers(0, 2**31),
)
def test_within_the_bound(
    rows: int, cols: int, batch: int, density: float, order: int, multiprocessors: int, seed: int
) -> None:
    emulated.configure(order, multiprocessors)
    g = torch.Generator().manual_seed(seed)
    what = f"{rows} {cols} {batch} {density} {order} {multiprocessors} {seed}"
    mask = torch.rand(rows, cols, generator=g) < density * 2 * torch.rand(rows, 1, generator=g)
    if seed % 3 == 0:
        mask[:, cols // 2] = False
        mask[rows // 2] = seed % 2 == 0
    x, grad = torch.randn(batch, cols, generator=g), torch.randn(batch, rows, generator=g)
    clean = (torch.where(mask.any(1), grad, 0), torch.where(mask.any(0), x, 0))
    grad, x = spoiled(mask, grad, x)
    dw = raw(mask, strided(grad, g), strided(x, g))
    check(dw, mask, *clean, what)
    assert same_bits(planned(mask, grad, x), dw), what


@pytest.mark.parametrize("at_end", [True, False])
def test_integers_are_exact_and_nothing_else_is_read(at_end: bool) -> None:
    emulated.configure(1, 1)
    g = torch.Generator().manual_seed(0)
    for rows, cols, batch in [(1, 1, 1), (17, 20, 65), (64, 24, 70), (5, 450, 1), (33, 901, 129)]:
        mask = torch.rand(rows, cols, generator=g) < 0.4
        pattern = pack(mask)
        x = guarded(integers((batch, cols), torch.float32, g), at_end)
        grad = guarded(integers((batch, rows), torch.float32, g), at_end)
        row_ptr, offset = (
            guarded(t, at_end) if t.numel() else t for t in (pattern.row_ptr, pattern.offset)
        )
        dw = OPS.masked_linear_weight_grad(grad, x, row_ptr, offset, pattern.block_depth)
        assert torch.equal(dw, torch.where(mask, grad.t() @ x, 0))


def test_many_units_and_panels() -> None:
    """Groups with all the units they can have, and blocks and panels that end early."""
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(130, 1000, generator=g) < 0.3
    mask[40:80] = False
    mask[90] = True
    x, grad = torch.randn(130, 1000, generator=g), torch.randn(130, 130, generator=g)
    for seed, multiprocessors in [(0, 1), (1, 2), (2, 5)]:
        emulated.configure(seed, multiprocessors)
        check(planned(mask, grad, x), mask, grad, x, f"{seed} {multiprocessors}")


def test_rows_for_many_warps() -> None:
    """Places of units come from sums over warps and panels."""
    g = torch.Generator().manual_seed(11)
    mask = torch.rand(2100, 200, generator=g) < 0.1
    x, grad = integers((3, 200), torch.float32, g), integers((3, 2100), torch.float32, g)
    wanted = torch.where(mask, grad.t() @ x, 0)
    for seed in range(5):
        emulated.configure(seed, 132)
        assert torch.equal(planned(mask, grad, x), wanted), seed


def test_batches_of_several_chunks() -> None:
    emulated.configure(1, 1)
    g = torch.Generator().manual_seed(2)
    mask = torch.rand(9, 40, generator=g) < 0.4
    for batch in (4096, 4097, 8250):
        x, grad = torch.randn(batch, 40, generator=g), torch.randn(batch, 9, generator=g)
        check(planned(mask, grad, x), mask, grad, x, f"batch {batch}")
        x, grad = (integers((batch, n), torch.float32, g) for n in (40, 9))
        assert torch.equal(planned(mask, grad, x), torch.where(mask, grad.t() @ x, 0))


def test_same_bits_in_any_order_on_any_gpu_and_from_any_pattern() -> None:
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(90, 600, generator=g) < 0.2
    for batch in (3, 130, 4100):
        rows, cols = (90, 600) if batch < 1000 else (9, 70)
        kept = mask[:rows, :cols]
        x, grad = torch.randn(batch, cols, generator=g), torch.randn(batch, rows, generator=g)
        results = []
        for seed, multiprocessors in [(0, 4), (1, 1), (2, 60), (3, 132)]:
            emulated.configure(seed, multiprocessors)
            results.append(planned(kept, grad, x))
            results.append(raw(kept, grad, x, depth=(33, 192, 600, 5)[seed]))
        assert all(same_bits(results[0], other) for other in results[1:]), batch


def test_an_entry_does_not_depend_on_its_neighbours() -> None:
    """A sum is made in the same order wherever the entry stands in its unit."""
    emulated.configure(1)
    g = torch.Generator().manual_seed(4)
    mask = torch.rand(12, 130, generator=g) < 0.3
    x, grad = torch.randn(100, 130, generator=g), torch.randn(100, 12, generator=g)
    whole = planned(torch.ones_like(mask), grad, x)
    assert same_bits(planned(mask, grad, x), torch.where(mask, whole, 0))


def test_strides() -> None:
    emulated.configure(2)
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(20, 70, generator=g) < 0.3
    x, grad = torch.randn(66, 70, generator=g), torch.randn(66, 20, generator=g)
    wanted = planned(mask, grad, x)
    wide_x = torch.full((66, 75), NAN)
    wide_x[:, 3:73] = x
    for a, b in ((grad, wide_x[:, 3:73]), (grad.t().contiguous().t(), x.t().contiguous().t())):
        assert same_bits(planned(mask, a, b), wanted)
    for expanded in (torch.ones(1, 1), torch.randn(1, 20, generator=g)):
        a = expanded.expand(66, 20)
        assert same_bits(planned(mask, a, x), planned(mask, a.contiguous(), x))


def test_what_is_not_finite_arrives_where_it_is_kept_alone() -> None:
    emulated.configure(1)
    g = torch.Generator().manual_seed(6)
    mask = torch.rand(20, 100, generator=g) < 0.5
    mask[:, 7], mask[3] = False, False
    x, grad = torch.randn(70, 100, generator=g), torch.randn(70, 20, generator=g)
    x[5, 7], x[69, 8], grad[1, 3], grad[64, 4] = NAN, INF, INF, NAN
    spots = torch.zeros_like(mask)
    spots[:, 8], spots[4] = True, True
    for op in (raw, planned):
        dw = op(mask, grad, x)
        assert torch.equal(dw.isfinite(), ~(mask & spots))
        assert (dw[~mask] == 0).all()


def test_sizes_of_zero_and_patterns_without_entries() -> None:
    emulated.configure(0)
    for rows, cols, batch in [(0, 5, 3), (5, 0, 3), (5, 4, 0), (0, 0, 2), (0, 0, 0), (70, 500, 66)]:
        mask = torch.zeros(rows, cols, dtype=torch.bool)
        grad, x = torch.full((batch, rows), NAN), torch.full((batch, cols), INF)
        for op, kept in itertools.product((raw, planned), (mask, torch.ones_like(mask))):
            if kept.any() and batch:
                continue
            dw = op(kept, grad, x)
            assert dw.shape == (rows, cols)
            assert not dw.any()


def test_one_dense_row_among_empty_ones() -> None:
    g = torch.Generator().manual_seed(7)
    mask = torch.zeros(500, 900, dtype=torch.bool)
    mask[333] = True
    mask[499, 899] = True
    x, grad = integers((70, 900), torch.float32, g), integers((70, 500), torch.float32, g)
    for seed in (0, 1, 2):
        emulated.configure(seed, 1 + 50 * seed)
        assert torch.equal(planned(mask, grad, x), torch.where(mask, grad.t() @ x, 0))


def test_a_plan_keeps_the_index() -> None:
    emulated.configure(0)
    g = torch.Generator().manual_seed(8)
    mask = torch.rand(40, 100, generator=g) < 0.2
    x, grad, weight = (torch.randn(s, generator=g) for s in ((9, 100), (9, 40), (40, 100)))
    plan = make_plan(pack(mask))
    bare = fp._C.plan_bytes(plan)
    first = OPS.planned_linear_weight_grad(grad, x, plan)
    held = fp._C.plan_bytes(plan)
    assert held > bare + 2 * int(mask.sum())
    assert same_bits(OPS.planned_linear_weight_grad(grad, x, plan), first)
    assert fp._C.plan_bytes(plan) == held
    OPS.planned_linear(x, weight, None, plan, 5 | READ_ANEW, None, False, 0)  # of training
    assert same_bits(OPS.planned_linear_weight_grad(grad, x, plan), first)
    fp._C.release_plan(plan)


def test_bad_patterns_are_reported_and_nothing_is_read_outside() -> None:
    g = torch.Generator().manual_seed(9)
    pattern = fp.pack(torch.rand(30, 40, generator=g) < 0.5)
    x, grad = guarded(torch.ones(2, 40)), guarded(torch.ones(2, 30))

    def call(row_ptr: Tensor = pattern.row_ptr, offset: Tensor = pattern.offset) -> Tensor:
        return OPS.masked_linear_weight_grad(grad, x, guarded(row_ptr), guarded(offset), 40)

    def at(t: Tensor, index: int, value: int) -> Tensor:
        t = t.clone()
        t[index] = value
        return t

    row_ptr, offset = pattern.row_ptr, pattern.offset
    again = torch.zeros_like(row_ptr)  # every other row has all entries: more than there are
    again[1::2] = pattern.nnz
    for seed, (change, message) in enumerate(
        [
            ({"row_ptr": at(row_ptr, 0, 1)}, "row_ptr: expected increasing"),
            ({"row_ptr": again}, "row_ptr: expected increasing"),
            ({"row_ptr": at(row_ptr, -1, pattern.nnz + 1)}, "row_ptr: expected increasing"),
            ({"row_ptr": at(row_ptr, 3, 2**62)}, "row_ptr: expected increasing"),
            ({"row_ptr": at(row_ptr, 3, -1)}, "row_ptr: expected increasing"),
            ({"offset": at(offset, 5, 40)}, "offset: expected positions"),
            ({"offset": torch.full_like(offset, -1)}, "offset: expected positions"),
        ]
    ):
        emulated.configure(seed % 3)
        call(**change)
        with pytest.raises(RuntimeError, match=f"earlier call.*{message}"):
            call()
        call()


# Of 2^30 terms when dense, few of them kept: the least that the rule samples.
LARGE = (512, 512, 4096)


def large(density: float) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(10)
    rows, cols, batch = LARGE
    mask = torch.rand(rows, cols, generator=g) < density
    return mask, torch.randn(batch, rows, generator=g), torch.randn(batch, cols, generator=g)


def test_the_rule() -> None:
    """Strict float32, large and sparse is sampled; what a plan holds then says so."""
    emulated.configure(0)
    fp._C.set_cuda_form("auto")
    mask, grad, x = large(0.001)
    half = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < 0.2

    def samples(
        mask: Tensor, grad: Tensor, x: Tensor, tf32: bool = False, form: str = "auto"
    ) -> bool:
        fp._C.set_cuda_form(form)
        plan = make_plan(pack(mask))
        bare = fp._C.plan_bytes(plan)
        dw = OPS.planned_linear_weight_grad(grad, x, plan, tf32)
        assert torch.equal(dw != 0, mask)
        held = fp._C.plan_bytes(plan) > bare
        fp._C.release_plan(plan)
        fp._C.set_cuda_form("auto")
        return bool(held)

    assert samples(mask, grad, x)
    assert samples(mask, grad, x, form="deltas")  # a form of other products
    assert not samples(mask, grad, x, tf32=True)
    assert not samples(mask, grad, x, form="dense")
    assert not samples(mask, grad[:-1], x[:-1])
    for batch in (63, 64):
        thin = torch.zeros(4200, 4100, dtype=torch.bool)
        thin[::1000, ::1000] = True
        operands = torch.ones(batch, 4200), torch.ones(batch, 4100)
        assert samples(thin, *operands) == (batch == 64)
    assert not samples(half, grad, x)
    assert samples(mask, grad[:5], x[:5], tf32=True, form="sampled")
    assert not samples(mask, grad[:5].double(), x[:5].double(), form="sampled")


def test_the_raw_op_follows_the_same_rule() -> None:
    emulated.configure(0)
    mask, grad, x = large(0.001)
    sampled = raw(mask, grad, x)
    fp._C.set_cuda_form("auto")
    assert same_bits(raw(mask, grad, x), sampled)
    dense = raw(mask, grad, x, tf32=True)
    assert not same_bits(dense, sampled)
    assert torch.equal(dense != 0, mask)
    torch.testing.assert_close(dense, sampled, atol=1e-3, rtol=1e-4)
