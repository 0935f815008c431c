"""Rules of operations on elements: one by one, moved about, or summed up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastprune.effective.program import Value, Weight
from fastprune.effective.rules.names import ELEMENTWISE, MOVES, REDUCTIONS
from fastprune.effective.rules.windows import refuse_computed
from fastprune.effective.trace import Trace, register_rule, shape_of


@register_rule(*(f"aten::{name}" for name in ELEMENTWISE))
def _elementwise(trace: Trace, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    named = str(node.target).split(".")[1]
    if "norm" in named:  # its own parameters are no operands of a path
        refuse_computed(node, *args[1:], *kwargs.values())
        args, kwargs = args[:1], {}
    val = node.meta["val"]
    if isinstance(val, (tuple, list)):  # with their statistics
        value = next(a for a in args if isinstance(a, Value))
        return (trace.program.reshaped(value, tuple(val[0].shape)), *[None] * 4)
    return trace.elementwise(node, *args, *kwargs.values())


@register_rule(*(f"aten::{name}" for name in MOVES))
def _move(trace: Trace, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Value):
        return trace.elementwise(node, x)
    rest = [_indices(a) for a in args]
    return trace.moved(x, lambda index: node.target(index, *rest, **kwargs))  # type: ignore[operator]


def _indices(argument: Any) -> Any:
    """view_as and the like look at a tensor's shape only."""
    return torch.empty(argument.shape) if isinstance(argument, (Value, Weight)) else argument


@register_rule("aten::index_select", "aten::index", "aten::gather", "aten::embedding_bag")
def _by_index(trace: Trace, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    values: list[Value] = []
    fx.node.map_aggregate((args, kwargs), lambda a: values.append(a) if isinstance(a, Value) else a)
    shape = shape_of(node)
    if not values:
        return Weight(None, shape)
    # Which elements is not known: any.
    ones = [
        trace.mixed(v, torch.zeros(v.numel).long(), shape, torch.zeros(math.prod(shape)).long())
        for v in values
    ]
    return ones[0] if len(ones) == 1 else trace.program.join(shape, ones)


@register_rule(
    "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::tensor_split"
)
def _parts(trace: Trace, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    shapes = [tuple(int(n) for n in part.shape) for part in node.meta["val"]]
    if not isinstance(x, Value):
        return tuple(Weight(None, shape) for shape in shapes)
    return tuple(
        trace.moved(x, lambda index, i=i: node.target(index, *args, **kwargs)[i])  # type: ignore[misc, operator]
        for i in range(len(shapes))
    )


@register_rule("aten::cat", "aten::concat", "aten::concatenate", "aten::stack")
def _cat(trace: Trace, node: fx.Node, parts: Sequence[Any], dim: int = 0) -> Any:
    if not any(isinstance(p, Value) for p in parts):
        return Weight(None, shape_of(node))
    indices, first = [], 0
    for part in parts:
        numel = math.prod(part.shape)
        index = torch.arange(first, first + numel, dtype=torch.float64).view(part.shape)
        indices.append(index)
        first += numel
    source = node.target(indices, dim).long()  # type: ignore[operator]
    out = trace.program.value(tuple(source.shape))
    for part, index in zip(parts, indices, strict=True):
        if isinstance(part, Value):
            trace.program.group(part, out, index.long(), source, first)
    return out


@register_rule(
    "aten::pad",
    "aten::constant_pad_nd",
    "aten::reflection_pad1d",
    "aten::reflection_pad2d",
    "aten::replication_pad1d",
    "aten::replication_pad2d",
)
def _pad(trace: Trace, node: fx.Node, x: Any, pad: Sequence[int], *rest: Any) -> Any:
    mode = rest[0] if rest and isinstance(rest[0], str) else "constant"
    named = str(node.target)
    mode = "reflect" if "reflection" in named else "replicate" if "replication" in named else mode

    def padded(index: Tensor) -> Tensor:
        if mode == "constant":
            return F.pad(index, list(pad), value=-1)
        return F.pad(index, list(pad), mode=mode)

    return trace.moved(x, padded)


@register_rule(*(f"aten::{name}" for name in REDUCTIONS))
def _reduce(trace: Trace, node: fx.Node, x: Any, dim: Any = None, *rest: Any, **kwargs: Any) -> Any:
    if isinstance(dim, Value):  # max(a, b), min(a, b)
        return trace.elementwise(node, x, dim)
    named = str(node.target).split(".")[1]
    if named in ("norm", "linalg_vector_norm"):  # (x, p, dims)
        dim = rest[0] if rest else None
    dims = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    reduced = {d % len(x.shape) for d in dims} or set(range(len(x.shape)))
    val = node.meta["val"]
    shape = tuple(int(n) for n in (val[0] if isinstance(val, (tuple, list)) else val).shape)
    if not isinstance(x, Value):
        return Weight(None, shape)
    small = [1 if d in reduced else n for d, n in enumerate(x.shape)]
    labels = torch.arange(math.prod(small)).view(small)
    out = trace.mixed(x, labels.broadcast_to(x.shape), shape, labels)
    return (out, out) if isinstance(val, (tuple, list)) else out


@register_rule("aten::softmax", "aten::log_softmax", "aten::cumsum", "aten::_softmax", "aten::glu")
def _along(trace: Trace, node: fx.Node, x: Any, dim: int = -1, *rest: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Value):
        return trace.elementwise(node, x)
    if "glu" in str(node.target):
        halves = [
            trace.moved(x, lambda index, i=i: index.chunk(2, dim)[i])  # type: ignore[misc]
            for i in (0, 1)
        ]
        return trace.elementwise(node, *halves)
    small = list(x.shape)
    small[dim] = 1
    labels = torch.arange(math.prod(small)).view(small).broadcast_to(x.shape)
    return trace.mixed(x, labels, x.shape, labels)
