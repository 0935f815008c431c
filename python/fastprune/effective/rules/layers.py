"""Rules of layers with weights, and of products of activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fastprune.effective.program import Geometry, Value, Weight
from fastprune.effective.rules.windows import one_example, refuse_computed, three
from fastprune.effective.trace import Trace, register_rule, shape_of


@register_rule("aten::linear")
def _linear(trace: Trace, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Any:
    refuse_computed(node, bias)
    if not isinstance(x, Value):
        return trace.elementwise(node, x)
    if isinstance(weight, Value):
        return _product(trace, node, x, weight, transposed=True)
    return trace.program.linear(x, weight, shape_of(node))


@register_rule("fastprune::masked_linear")
def _masked_linear(trace: Trace, node: fx.Node, x: Any, weight: Any, *rest: Any) -> Any:
    return _linear(trace, node, x, weight)


def _product(trace: Trace, node: fx.Node, a: Value, b: Value, transposed: bool = False) -> Value:
    """a @ b of two activations: an element meets a row of a and a column of b."""
    shape = shape_of(node)
    rows = torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1)
    batch = math.prod(shape[:-2])
    columns = torch.arange(batch * shape[-1]).view(*shape[:-2], 1, shape[-1])
    left = trace.broadcast(a, (*shape[:-2], *a.shape[-2:])) if len(a.shape) > 1 else a
    own = columns.transpose(-1, -2) if transposed else columns
    both = trace.broadcast(b, (*shape[:-2], *b.shape[-2:])) if len(b.shape) > 1 else b
    parts = [
        trace.mixed(left, rows.broadcast_to(left.shape), shape, rows.broadcast_to(shape)),
        trace.mixed(both, own.broadcast_to(both.shape), shape, columns.broadcast_to(shape)),
    ]
    return trace.program.join(shape, parts)


@register_rule("aten::matmul", "aten::bmm", "aten::mm", "aten::baddbmm", "aten::addmm")
def _matmul(trace: Trace, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    a, b = args[-2:] if "add" in str(node.target) else args[:2]
    if isinstance(a, Value) and isinstance(b, Value):
        return _product(trace, node, a, b)
    for side in (a, b):
        if isinstance(side, Weight) and side.name is not None:
            raise ValueError(
                f"model: the parameter {side.name} is a factor of {node.target}; use "
                "torch.nn.functional.linear, whose rows and columns are known"
            )
    shape = shape_of(node)
    if isinstance(a, Value):  # a dense constant: a row meets all columns
        rows = torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1)
        return trace.mixed(a, rows.broadcast_to(a.shape), shape, rows.broadcast_to(shape))
    if isinstance(b, Value):
        columns = torch.arange(math.prod(b.shape) // b.shape[-2]).view(*b.shape[:-2], 1, -1)
        return trace.mixed(b, columns.broadcast_to(b.shape), shape, columns.broadcast_to(shape))
    return Weight(None, shape)


@register_rule("aten::scaled_dot_product_attention")
def _attention(
    trace: Trace, node: fx.Node, q: Any, k: Any, v: Any, *rest: Any, **kwargs: Any
) -> Any:
    """All to all over the tokens of a head; a feature of v stays one, q and k meet all of them."""
    shape = shape_of(node)
    heads = torch.arange(math.prod(shape[:-2])).view(*shape[:-2], 1, 1)
    parts = []
    for given in (q, k, v):
        if not isinstance(given, Value):
            continue
        labels = heads
        if given is v:
            labels = heads * shape[-1] + torch.arange(shape[-1])
        own = trace.broadcast(given, (*shape[:-2], *given.shape[-2:]))
        wanted = labels.broadcast_to(shape)
        parts.append(trace.mixed(own, labels.broadcast_to(own.shape), shape, wanted))
    return trace.program.join(shape, parts) if parts else Weight(None, shape)


@register_rule("aten::embedding")
def _embedding(trace: Trace, node: fx.Node, weight: Weight, index: Any, *rest: Any) -> Any:
    """A lookup is a product with one-hot inputs, any of which may be the input."""
    shape = shape_of(node)
    tokens, (entries, features) = math.prod(shape[:-1]), weight.shape
    ones = (1, 1, 1)
    hot = trace.program.value((entries, tokens), entries)
    if isinstance(index, Value):
        hot = trace.program.recut(trace.program.input((entries, tokens)), entries)
    geometry = Geometry(
        entries, 1, features, (1, 1, tokens), (1, 1, tokens), ones, ones, (0, 0, 0), ones
    )
    found = trace.program.convolve(hot, weight, geometry, (features, tokens), transposed=True)
    return trace.program.reshaped(trace.moved(found, lambda i: i.t()), shape)


@register_rule("aten::conv1d", "aten::conv2d", "aten::conv3d")
def _conv(
    trace: Trace, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    refuse_computed(node, weight, bias)
    dims = len(weight.shape) - 2
    shape = shape_of(node)
    if not isinstance(x, Value):
        return Weight(None, shape)
    one_example(node, x.shape, dims)
    spaced = three(dilation, dims, 1)
    kernel = three(weight.shape[2:], dims, 1)
    if isinstance(padding, str):  # "same" puts the odd one of an even kernel's zeros behind
        total = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(spaced, kernel, strict=True)
        ]
        before = tuple(t // 2 for t in total)
    else:
        before = three(padding, dims, 0)
    geometry = Geometry(
        weight.shape[0],
        groups,
        weight.shape[1],
        three(x.shape[-dims:], dims, 1),
        three(shape[-dims:], dims, 1),
        kernel,
        three(stride, dims, 1),
        before,  # type: ignore[arg-type]
        spaced,
    )
    return trace.program.convolve(x, weight, geometry, shape)


@register_rule("fastprune::masked_conv2d")
def _masked_conv2d(trace: Trace, node: fx.Node, x: Any, weight: Any, *rest: Any) -> Any:
    stride, padding, dilation, groups = rest[7:11]
    return _conv(trace, node, x, weight, None, stride, padding, dilation, groups)


@register_rule("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def _conv_transpose(
    trace: Trace, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    refuse_computed(node, weight, bias)
    dims = len(weight.shape) - 2
    shape = shape_of(node)
    if not isinstance(x, Value):
        return Weight(None, shape)
    one_example(node, x.shape, dims)
    geometry = Geometry(
        weight.shape[0],
        groups,
        weight.shape[1],
        three(shape[-dims:], dims, 1),
        three(x.shape[-dims:], dims, 1),
        three(weight.shape[2:], dims, 1),
        three(stride, dims, 1),
        three(padding, dims, 0),
        three(dilation, dims, 1),
    )
    return trace.program.convolve(x, weight, geometry, shape, transposed=True)
