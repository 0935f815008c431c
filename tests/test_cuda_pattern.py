"""Packing on the GPU, by emulation: the same tensors as the CPU's packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emulated
import fastprune as fp
from fastprune.ops.pattern import cuda_block_depth
from oracle import guarded
from test_masked_linear import random_mask

pytestmark = emulated.needs_emulation


@given(
    groups=st.sampled_from([1, 2, 3]),
    rows=st.integers(0, 40),
    depth=st.integers(0, 150),
    taps=st.sampled_from([1, 9, 10]),
    blocks=st.tuples(st.integers(1, 200), st.integers(1, 60)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80)
def test_equal_to_the_packing_on_the_cpu(
    groups: int, rows: int, depth: int, taps: int, blocks: tuple[int, int], seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = random_mask((rows * groups, depth * taps), g)
    expected = torch.ops.fastprune.pack_pattern(mask, groups, taps, *blocks)
    for form in (guarded(mask), mask.t().contiguous().t()):
        emulated.configure(seed % 3, 1 + seed % 4)
        got = emulated.ops.pack_pattern(form, groups, taps, *blocks)
        for name, a, b in zip(fp.Pattern._fields, got, expected, strict=False):
            assert torch.equal(a, b), name


def test_many_bounds_are_summed_in_chunks() -> None:
    mask = torch.rand(3000, 24, generator=torch.Generator().manual_seed(0)) < 0.3
    emulated.configure(1)
    got = emulated.ops.pack_pattern(mask, 1, 1, 3, 7)
    for a, b in zip(got, torch.ops.fastprune.pack_pattern(mask, 1, 1, 3, 7), strict=True):
        assert torch.equal(a, b)
    assert len(got[0]) > 3 * 2048


def test_block_depths() -> None:
    for depth in (0, 1, 5, 191, 193, 5000):
        for taps in (1, 9, 300, 32767):
            block = cuda_block_depth(depth, taps)
            assert 1 <= block <= max(depth, 1)
            assert block == 1 or block * taps <= 288


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 4), 1, 1, 1, 1), "mask: expected dtype Bool"),
        ((torch.ones(4).bool(), 1, 1, 1, 1), "mask: expected 2 dimensions"),
        ((torch.ones(4, 4).bool(), 3, 1, 1, 1), "groups: expected a positive divisor of the 4"),
        ((torch.ones(4, 4).bool(), 1, 3, 1, 1), "taps: expected a positive divisor of the 4"),
        ((torch.ones(4, 4).bool(), 1, 1, 0, 1), "block_depth: expected at least 1"),
        ((torch.ones(4, 4).bool(), 1, 1, 1, 40000), "block_depth: expected at least 1"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"pack_pattern: {message}"):
        emulated.ops.pack_pattern(*arguments)
