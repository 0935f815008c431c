"""Normalization as it depends on its input, which is more than the paths that it hands on.

With the paper, a normalization layer scales a path and opens none. But statistics taken from the
input itself let every element depend on all that they are taken from: whoever removes what is dead
has to know. These rules are not registered; :mod:`fastprune.effective.trim` puts them first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fastprune.effective.program import Value
from fastprune.effective.trace import Rule, Trace, shape_of


def _meeting(trace: Trace, node: fx.Node, x: Any, labels: Tensor) -> Any:
    """All elements of x with one label meet; ``labels`` is broadcast to the shape of x."""
    if not isinstance(x, Value):
        return trace.elementwise(node, x)
    val = node.meta["val"]
    wanted = labels.broadcast_to(x.shape)
    out = trace.mixed(x, wanted, x.shape, wanted)
    return (out, *[None] * (len(val) - 1)) if isinstance(val, (tuple, list)) else out


def _last_dimensions(trace: Trace, node: fx.Node, x: Any, shape: Any, *rest: Any, **kw: Any) -> Any:
    outer = tuple(x.shape)[: len(x.shape) - len(shape)]
    labels = torch.arange(math.prod(outer)).view(*outer, *[1] * len(shape))
    return _meeting(trace, node, x, labels)


def _by_channel(
    trace: Trace, node: fx.Node, x: Any, w: Any = None, b: Any = None, mean: Any = None,
    var: Any = None, own_statistics: bool = True, *rest: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    if not own_statistics and mean is not None:
        return trace.elementwise(node, x)
    channels = x.shape[1]
    return _meeting(trace, node, x, torch.arange(channels).view(-1, *[1] * (len(x.shape) - 2)))


def _by_group(trace: Trace, node: fx.Node, x: Any, groups: int, *rest: Any, **kwargs: Any) -> Any:
    of = torch.arange(x.shape[1]) // (x.shape[1] // groups)
    return _meeting(trace, node, x, of.view(-1, *[1] * (len(x.shape) - 2)))


def _everything(trace: Trace, node: fx.Node, x: Any, *rest: Any, **kwargs: Any) -> Any:
    return _meeting(trace, node, x, torch.zeros(1, dtype=torch.int64))


def _any_element(trace: Trace, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Which elements an index picks may depend on the input: on all of everything."""
    shape = shape_of(node)
    operands = [a for part in args for a in (part if isinstance(part, (list, tuple)) else [part])]
    zero = torch.zeros(1, dtype=torch.int64)
    wanted = zero.broadcast_to(shape)
    parts = [
        trace.mixed(v, zero.broadcast_to(v.shape), shape, wanted)
        for v in operands
        if isinstance(v, Value)
    ]
    return trace.program.join(shape, parts) if parts else trace.elementwise(node, *operands)


DEPENDENCE: dict[str, Rule] = {
    "aten::layer_norm": _last_dimensions,
    "aten::rms_norm": _last_dimensions,
    "aten::batch_norm": _by_channel,
    "aten::instance_norm": _by_channel,
    "aten::group_norm": _by_group,
    "aten::local_response_norm": _everything,
    "aten::index": _any_element,
    "aten::index_select": _any_element,
    "aten::gather": _any_element,
    "aten::embedding_bag": _any_element,
}
