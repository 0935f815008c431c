"""The emulation of CUDA blocks itself, on an op that is simple enough to see through."""

from __future__ import annotations

import pytest
import torch

import emulated

pytestmark = emulated.needs_emulation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 100_000])
def test_apply_mask(dtype: torch.dtype, numel: int) -> None:
    values = torch.randn(numel).to(dtype)
    values[::7] = float("nan")
    mask = torch.rand(numel) < 0.5
    mask[::7] = False
    expected = torch.where(mask, values, torch.zeros((), dtype=dtype))
    for seed in (0, 1, 2):
        emulated.configure(seed)
        assert torch.equal(emulated.ops.apply_mask(values, mask), expected)
