"""Cost of one call from Python, in pytest-benchmark: ``pytest bench/bench_calls.py``.

Small shapes, where the call is what costs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastprune as fp

SHAPES = [(1, 64, 64), (32, 300, 100)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["inference", "grad"])
@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_linear_call(benchmark: Any, shape: tuple[int, int, int], mode: str, kernel: str) -> None:
    torch.set_num_threads(1)
    batch, cols, rows = shape
    layer = torch.nn.Linear(cols, rows)
    masked = fp.nn.MaskedLinear(layer, torch.rand(rows, cols) < 0.05)
    call = masked if kernel == "sparse" else layer
    x = torch.randn(batch, cols)
    with torch.inference_mode(mode == "inference"):
        benchmark(call, x)
