"""masked_conv2d against dense convolution (contiguous and channels_last) and weight x mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from bench.cases import CONV, SPARSITIES, Conv
from bench.harness import CHANGED, Row, time_all


def run(
    flops: float, bandwidth: float, min_time: float, sparsities: tuple[float, ...] = SPARSITIES
) -> dict[str, list[Row]]:
    """Forward, input gradient and sampled weight gradient, float32, random masks."""
    tables: dict[str, list[Row]] = {"forward": [], "input grad": [], "weight grad": []}
    for case in CONV:
        for sparsity in sparsities:
            for name, row in _case(case, sparsity, flops, bandwidth, min_time).items():
                tables[name].append(row)
    return tables


def _case(
    case: Conv, sparsity: float, flops: float, bandwidth: float, min_time: float
) -> dict[str, Row]:
    torch.manual_seed(0)
    padding, stride = case.kernel // 2, case.stride
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    w = torch.randn(case.channels, case.channels, case.kernel, case.kernel)
    mask = torch.rand(w.shape) < 1 - sparsity
    pattern, pruned = fp.pack(mask), torch.where(mask, w, 0)
    y = F.conv2d(x, pruned, None, stride, padding)
    grad = torch.randn_like(y)
    last = torch.channels_last
    geometry = ([stride] * 2, [padding] * 2, [1, 1], 1)
    ops, plan = torch.ops.fastprune, pattern.plan.number(pattern)

    def backward(grad: Tensor, x: Tensor, w: Tensor, wanted: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, w, None, *geometry[:3], False, [0, 0], 1, wanted
        )

    x_last, w_last, g_last = (t.contiguous(memory_format=last) for t in (x, pruned, grad))
    forward = time_all(
        {
            "contiguous": lambda: F.conv2d(x, pruned, None, stride, padding),
            "channels_last": lambda: F.conv2d(x_last, w_last, None, stride, padding),
            "fastprune": lambda: fp.masked_conv2d(x, w, pattern, None, stride, padding),
            "weight x mask": lambda: F.conv2d(x, w * mask, None, stride, padding),
        },
        min_time,
    )
    input_grad = time_all(
        {
            "contiguous": backward(grad, x, pruned, [True, False, False]),
            "channels_last": backward(g_last, x_last, w_last, [True, False, False]),
            "fastprune": lambda: ops.planned_conv2d_input_grad(
                grad, w, plan, CHANGED, list(x.shape), *geometry
            ),
        },
        min_time,
    )
    weight_grad = time_all(
        {
            "contiguous": backward(grad, x, pruned, [False, True, False]),
            "channels_last": backward(g_last, x_last, w_last, [False, True, False]),
            "fastprune": lambda: ops.planned_conv2d_weight_grad(
                grad, x, plan, list(w.shape), *geometry
            ),
        },
        min_time,
    )
    pack = time_all({"pack": lambda: fp.pack(mask)}, min_time / 3)["pack"]["median"]
    moved = 4 * (x.numel() + y.numel()) + 6 * pattern.nnz
    points = y.numel() // case.channels
    floor = max(2 * pattern.nnz * points / flops, moved / bandwidth)
    dense = ("contiguous", "channels_last")
    return {
        name: Row("masked_conv2d", str(case), sparsity, times, dense, 1e3 * floor, 1e3 * pack)
        for name, times in (
            ("forward", forward),
            ("input grad", input_grad),
            ("weight grad", weight_grad),
        )
    }
