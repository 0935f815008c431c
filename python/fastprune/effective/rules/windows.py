"""Rules of pooling, and what windows are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastprune.effective.program import Geometry, Value
from fastprune.effective.trace import Trace, register_rule, shape_of


def three(values: Any, dims: int, default: int) -> tuple[int, int, int]:
    """Sizes of the last ``dims`` dimensions, with ``default`` for those before."""
    given = [values] if isinstance(values, int) else list(values)
    given = given * dims if len(given) == 1 else given
    return tuple([default] * (3 - dims) + [int(v) for v in given])  # type: ignore[return-value]


def one_example(node: fx.Node, shape: tuple[int, ...], dims: int) -> None:
    """Refuse a batch: reach is that of one example."""
    if len(shape) > dims + 1 and shape[0] != 1:
        raise ValueError(
            f"example_input: expected one example, or a batch in dimension 0 of every tensor; "
            f"{node.name} got a batch of {shape[0]}"
        )


def refuse_computed(node: fx.Node, *operands: Any) -> None:
    """Refuse a layer whose own parameters depend on the input: reach follows its input only."""
    for operand in operands:
        if isinstance(operand, Value):
            raise ValueError(
                f"model: {node.name} ({node.target}) has a weight or bias that is computed from "
                "the input, which reach does not follow"
            )


def window(
    trace: Trace, node: fx.Node, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any,
    dims: int, shape: tuple[int, ...],
) -> Value:  # fmt: skip
    """Pooling: every channel by itself, all that a window sees."""
    one_example(node, x.shape, dims)
    channels = x.shape[-dims - 1]
    geometry = Geometry(
        channels,
        channels,
        1,
        three(x.shape[-dims:], dims, 1),
        three(shape[-dims:], dims, 1),
        three(kernel, dims, 1),
        three(stride, dims, 1),
        three(padding, dims, 0),
        three(dilation, dims, 1),
    )
    return trace.program.convolve(x, None, geometry, shape)


@register_rule("aten::max_pool1d", "aten::max_pool2d", "aten::max_pool3d",
               "aten::max_pool2d_with_indices")  # fmt: skip
def _max_pool(
    trace: Trace, node: fx.Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> Any:  # fmt: skip
    dims = int(str(node.target).split("pool")[1][0])
    val = node.meta["val"]
    shape = tuple(int(n) for n in (val[0] if isinstance(val, tuple) else val).shape)
    out = window(trace, node, x, kernel, stride or kernel, padding, dilation, dims, shape)
    return (out, None) if isinstance(val, tuple) else out


@register_rule("aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d")
def _avg_pool(
    trace: Trace, node: fx.Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0,
    *rest: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    dims = int(str(node.target).split("pool")[1][0])
    return window(trace, node, x, kernel, stride or kernel, padding, 1, dims, shape_of(node))


@register_rule(*(f"aten::adaptive_{kind}_pool{d}d" for kind in ("avg", "max") for d in (1, 2, 3)))
def _adaptive(trace: Trace, node: fx.Node, x: Any, size: Any) -> Any:
    dims = int(str(node.target).split("pool")[1][0])
    val = node.meta["val"]
    shape = tuple(int(n) for n in (val[0] if isinstance(val, tuple) else val).shape)
    inside, outside = x.shape[-dims:], shape[-dims:]
    if all(i % o == 0 for i, o in zip(inside, outside, strict=True)):
        kernel = [i // o for i, o in zip(inside, outside, strict=True)]
        out = window(trace, node, x, kernel, kernel, 0, 1, dims, shape)
    else:
        out = _uneven(trace, x, shape, dims)
    return (out, None) if isinstance(val, tuple) else out


def _uneven(trace: Trace, x: Value, shape: tuple[int, ...], dims: int) -> Value:
    """Adaptive windows of several lengths: number i of o over n is [i n/o, ceil((i + 1) n/o))."""
    index = torch.arange(x.numel).view(x.shape)
    parts = [index]
    for d in range(dims):
        axis, n, o = d - dims, x.shape[d - dims], shape[d - dims]
        starts = [i * n // o for i in range(o)]
        ends = [-((-(i + 1) * n) // o) for i in range(o)]
        widest = max(e - s for s, e in zip(starts, ends, strict=True))
        # An offset past a window's end repeats its last element.
        picks = [
            torch.tensor([min(s + k, e - 1) for s, e in zip(starts, ends, strict=True)])
            for k in range(widest)
        ]
        parts = [part.index_select(axis, pick) for part in parts for pick in picks]
    out = trace.program.value(shape)
    for part in parts:
        trace.program.group(x, out, torch.arange(x.numel), part, x.numel)
    return out
