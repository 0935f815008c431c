"""Packing: round trips, sizes, and malformed patterns that must be refused at every call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp

OPS = torch.ops.fastprune


@given(
    groups=st.sampled_from([1, 2, 3]),
    rows=st.integers(0, 40),
    depth=st.integers(0, 150),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_pattern_and_its_transpose_hold_the_mask(
    groups: int, rows: int, depth: int, kernel: tuple[int, int], density: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows * groups, depth, *kernel, generator=g) < density
    p = fp.pack(mask, groups=groups)
    assert p.nnz == int(mask.sum()) == len(p.offset) == len(p.transposed_offset)
    unpack, transpose = fp.reference.unpack, fp.reference.transpose
    assert torch.equal(unpack(p.row_ptr, p.offset, mask.shape, p.block_depth), mask)
    transposed = transpose(mask, groups)
    got = unpack(
        p.transposed_row_ptr, p.transposed_offset, transposed.shape, p.transposed_block_depth
    )
    assert torch.equal(got, transposed)


def test_every_isa_packs_the_same(isa: str) -> None:
    mask = torch.rand(70, 33, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.2
    got = fp.pack(mask)
    assert torch.equal(
        fp.reference.unpack(got.row_ptr, got.offset, mask.shape, got.block_depth), mask
    )


def test_memory_is_less_than_dense_from_70_percent_sparsity() -> None:
    for shape in [(1024, 1024), (256, 256, 3, 3)]:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
        assert fp.pack(mask).nbytes() < mask.numel() * 4 * 0.4


def test_apply_mask(isa: str) -> None:
    g = torch.Generator().manual_seed(4)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for shape in [(0,), (1,), (5, 37), (3, 4, 5, 6), (70, 20, 3, 3)]:
            t = torch.randn(shape, generator=g).to(dtype)
            mask = torch.rand(shape, generator=g) < 0.5
            poisoned = torch.where(mask, t, torch.tensor(float("nan"), dtype=dtype))
            expected = torch.where(mask, t, 0)
            for form in (torch.contiguous_format, torch.channels_last):
                if form == torch.channels_last and len(shape) != 4:
                    continue
                a = poisoned.contiguous(memory_format=form)
                for m in (mask, mask.contiguous(memory_format=form)):
                    assert torch.equal(OPS.apply_mask(a, m), expected)
            assert torch.equal(
                OPS.apply_mask(
                    poisoned.t() if t.dim() == 2 else poisoned, mask.t() if t.dim() == 2 else mask
                ),
                expected.t() if t.dim() == 2 else expected,
            )
    torch.library.opcheck(OPS.apply_mask.default, (torch.randn(3, 4), torch.rand(3, 4) < 0.5))
    with pytest.raises(RuntimeError, match="apply_mask: mask: expected size 4"):
        OPS.apply_mask(torch.zeros(3, 4), torch.ones(3, 5, dtype=torch.bool))


def linear_call(pattern: fp.Pattern, **change: object) -> Tensor:
    fields = {**pattern._asdict(), **change}
    six = [fields[name] for name in fp.Pattern._fields[:6]]
    return OPS.masked_linear(torch.ones(2, 40), torch.ones(30, 40), None, *six, False)


def grads(pattern: fp.Pattern, **change: object) -> Tensor:
    fields = {**pattern._asdict(), **change}
    six = [fields[name] for name in fp.Pattern._fields[:6]]
    return OPS.masked_linear_input_grad(torch.ones(2, 30), torch.ones(30, 40), *six)


@pytest.fixture
def pattern() -> fp.Pattern:
    mask = torch.rand(30, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    return fp.pack(mask)


def replaced(t: Tensor, index: int, value: int) -> Tensor:
    t = t.clone()
    t[index] = value
    return t


def test_malformed_patterns_are_refused(pattern: fp.Pattern, isa: str) -> None:
    rp, off = pattern.row_ptr, pattern.offset
    bad = [
        {"row_ptr": replaced(rp, 0, 1)},
        {"row_ptr": replaced(rp, -1, pattern.nnz + 1)},
        {"row_ptr": replaced(rp, 3, int(rp[4]) + 1)},
        {"row_ptr": replaced(rp, 3, -1)},
        {"row_ptr": replaced(rp, 3, 2**62)},
        {"row_ptr": rp[:-1]},
        {"row_ptr": rp.int()},
        {"row_ptr": torch.stack([rp, rp], 1)[:, 0]},
        {"offset": replaced(off, 5, 40)},
        {"offset": replaced(off, 5, -1)},
        {"offset": off[:-1]},
        {"offset": off.long()},
        {"block_depth": 0},
        {"block_depth": 40000},
        {"block_depth": -3},
    ]
    for change in bad:
        with pytest.raises(RuntimeError, match="masked_linear: "):
            linear_call(pattern, **change)
    linear_call(pattern)


def test_a_transpose_of_another_mask_is_refused(pattern: fp.Pattern, isa: str) -> None:
    other = fp.pack(torch.rand(30, 40, generator=torch.Generator().manual_seed(2)) < 0.5)
    rolled = torch.roll(pattern.transposed_offset, 1)
    for change in (
        {
            "transposed_row_ptr": other.transposed_row_ptr,
            "transposed_offset": other.transposed_offset,
        },
        {"transposed_offset": rolled},
        {"transposed_offset": pattern.transposed_offset[:-1]},
    ):
        with pytest.raises(RuntimeError, match="transposed"):
            grads(pattern, **change)
    grads(pattern)


def test_a_transpose_that_agrees_but_for_its_bounds_is_refused(isa: str) -> None:
    forward = fp.pack(torch.tensor([[True, False], [True, False]]))
    other = fp.pack(torch.tensor([[True, False], [False, True]]))
    fields = [*forward[:2], *other[2:4], *forward[4:6]]
    with pytest.raises(RuntimeError, match="expected the transpose of the pattern"):
        OPS.masked_linear_input_grad(torch.ones(1, 2), torch.ones(2, 2), *fields)


def test_random_bytes_never_crash(isa: str) -> None:
    g = torch.Generator().manual_seed(3)
    refused = 0
    for _ in range(300):
        row_ptr = torch.randint(-3, 60, (31,), generator=g)
        offset = torch.randint(-(2**15), 2**15, (int(row_ptr[-1].clamp(0)),), generator=g)
        try:
            OPS.masked_linear(
                torch.ones(2, 40),
                torch.ones(30, 40),
                None,
                row_ptr,
                offset.short(),
                row_ptr,
                offset.short(),
                40,
                40,
                False,
            )
        except RuntimeError:
            refused += 1
    assert refused > 290


@pytest.mark.parametrize(
    ("mask", "groups", "error", "message"),
    [
        (torch.ones(3, 4), 1, TypeError, "mask: expected a bool tensor, got torch.float32"),
        ([True], 1, TypeError, "mask: expected a bool tensor, got list"),
        (torch.ones(3).bool(), 1, ValueError, "mask: expected 2 or 4 dimensions"),
        (torch.ones(3, 4).bool(), 2, ValueError, "groups: expected a positive divisor of the 3"),
        (torch.ones(4, 4).bool(), 2, ValueError, "groups: expected 1 for a linear weight"),
        (torch.ones(4, 4, 3, 3).bool(), 0, ValueError, "groups: expected a positive divisor"),
        (torch.ones(1, 1, 200, 200).bool(), 1, ValueError, "1 to 32767 kernel positions"),
    ],
)
def test_bad_masks(mask: object, groups: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.pack(mask, groups=groups)


def test_a_mask_whose_size_overflows_32_bits_packs() -> None:
    # 46341 * 46341 does not fit int32; one stored row stands for all.
    row = torch.zeros(1, 46341, dtype=torch.bool)
    row[0, -1] = True
    packed = OPS.pack_pattern(row.expand(46341, -1)[:50], 1, 1, 1024, 1024)
    assert len(packed[1]) == 50
