"""The groups that tensor cores read, by emulation: their sizes, their edges, halves of words.

A group is 32 rows by 128 columns of 16 bits or 64 of float32
(csrc/kernels/cuda/masked_linear_bitmap.h).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import emulated
import fastprune as fp
from oracle import guarded, integers
from test_cuda_masked_linear_forms import Weight

pytestmark = emulated.needs_emulation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# One for each number of activation blocks that a warp holds, and one that takes two blocks.
BATCHES = (1, 8, 13, 32, 64, 65)


@pytest.fixture(autouse=True)
def _tensor_cores() -> Iterator[None]:
    fp._C.set_cuda_form("tensor_core")
    yield
    fp._C.set_cuda_form("auto")
    emulated.configure(0)


def group_cols(dtype: torch.dtype) -> int:
    return 256 // dtype.itemsize


def check(mask: Tensor, dtype: torch.dtype, batch: int, what: str) -> None:
    """Integers, so that the sums are exact: equal, forward and for the input gradient."""
    g = torch.Generator().manual_seed(batch)
    weight = torch.where(mask, integers(mask.shape, dtype, g), torch.nan)
    w, kept = Weight(weight, mask), torch.where(mask, weight, 0).double()
    x = guarded(integers((batch, mask.shape[1]), dtype, g))
    assert torch.equal(w.product(x, tf32=True), (x.double() @ kept.t()).to(dtype)), what
    grad = guarded(integers((batch, mask.shape[0]), dtype, g))
    dx = w.input_grad(grad, tf32=True)
    assert torch.equal(dx, (grad.double() @ kept).to(dtype)), f"{what} dx"


def by_groups(densities: list[list[float]], dtype: torch.dtype, cut: int = 0) -> Tensor:
    """A mask whose groups have these densities, but for ``cut`` rows and columns at its ends."""
    g = torch.Generator().manual_seed(1)
    d = torch.tensor(densities)
    d = d.repeat_interleave(32, 0).repeat_interleave(group_cols(dtype), 1)
    mask = torch.rand(d.shape, generator=g) < d
    return mask[: len(mask) - cut, : mask.shape[1] - cut].clone()


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_any_size_beside_each_other(dtype: torch.dtype) -> None:
    """Dense ones take most of a warp's ring, so that the next one waits; then many fit again."""
    densities = [
        [1, 1, 1, 0, 0.02, 1, 0.02, 0.02],
        [0, 0, 0, 0, 0, 0, 0, 1],
        [0.3, 0.4, 0.3, 0.5, 0.3, 0.4, 0.6, 0.7],
        [0.05, 0.1, 1, 1, 0.05, 0.9, 0.02, 0.6],
    ]
    for batch, seed in zip(BATCHES, itertools.cycle((0, 1, 2))):
        emulated.configure(seed, 3 + seed)
        for cut in (0, 5):
            check(by_groups(densities, dtype, cut), dtype, batch, f"{batch} {seed} {cut}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_bands_and_groups(dtype: torch.dtype) -> None:
    """A strip that is not there, a row of one, a column behind a whole group, odd columns."""
    cols = group_cols(dtype)
    for rows, more, density in itertools.product(
        (1, 15, 16, 17, 32, 33), (-cols + 1, -1, 0, 1, 7), (0.2, 1.0)
    ):
        g = torch.Generator().manual_seed(rows)
        mask = torch.rand(rows, cols + more, generator=g) < density
        mask[-1, -1] = True
        check(mask, dtype, 9, f"{rows} {more} {density}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_of_a_group(dtype: torch.dtype) -> None:
    """One weight to each row, at a column that moves on by an odd number of places."""
    cols = 2 * group_cols(dtype)
    for first in range(0, cols, 32):
        mask = torch.zeros(32, cols, dtype=torch.bool)
        mask[torch.arange(32), (first + 37 * torch.arange(32)) % cols] = True
        check(mask, dtype, 3, f"{first}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_words(dtype: torch.dtype) -> None:
    """Words of two elements where only the first, only the second, or either is kept."""
    cols = 200
    for step, first in ((2, 0), (2, 1), (4, 1), (4, 2), (3, 0)):
        mask = torch.zeros(40, cols, dtype=torch.bool)
        mask[:, first::step] = True
        check(mask, dtype, 5, f"{step} {first}")
        mask[::3] = ~mask[::3]
        check(mask, dtype, 5, f"{step} {first} and the others")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found_in_every_row_and_column(dtype: torch.dtype) -> None:
    cols = 2 * group_cols(dtype) + 16
    for batch, bad in itertools.product(BATCHES, (torch.inf, -torch.inf, torch.nan)):
        g = torch.Generator().manual_seed(batch)
        mask = torch.rand(50, cols, generator=g) < 0.3
        absent = torch.randint(cols, (batch,), generator=g)
        mask[:, absent] = False
        w = Weight(integers(mask.shape, dtype, g), mask)
        x = integers((batch, cols), dtype, g)
        clean = w.product(x, tf32=True)
        x[torch.arange(batch), absent] = bad
        assert torch.equal(w.product(x, tf32=True), clean), f"{batch} {bad}"
        last = int(mask.any(0).nonzero().max())  # present in some rows
        x[batch - 1, last] = bad
        y, kept = w.product(x, tf32=True), mask[:, last] & (w.weight[:, last] != 0)
        assert not y[-1, kept].isfinite().any(), f"{batch} {bad}"
        assert torch.equal(y[-1, ~mask[:, last]], clean[-1, ~mask[:, last]]), f"{batch} {bad}"
        assert torch.equal(y[:-1], clean[:-1]), f"{batch} {bad}"
