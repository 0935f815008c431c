"""Which channels of a network's layers stand or fall together.

Every element of every tensor of an exported graph gets a label: the class of channels it belongs
to. Layers give the labels of their outputs, additions and the like make the labels of their
operands one class, views and permutations move labels about. Class ``PINNED`` is of all that cannot
be removed: inputs, outputs, and whatever meets an operation that is not understood here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastprune.effective.classes import Classes, MismatchError, labelled, pinned
from fastprune.effective.program import Weight
from fastprune.effective.rules.names import ELEMENTWISE, MOVES, REDUCTIONS
from fastprune.effective.trace import Graph, name_of, shape_of, walk

_NORMS = ("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm")
_POINTWISE = set(ELEMENTWISE) - {*_NORMS, "_native_batch_norm_legit_no_training", "prelu"}
_POINTWISE -= {"local_response_norm", "native_dropout"}
_ALONG = ("softmax", "_softmax", "log_softmax", "cumsum")
_CAT = ("cat", "concat", "concatenate")
_SPLITS = ("split", "split_with_sizes", "chunk", "unbind", "tensor_split")


@dataclass(frozen=True)
class Consumer:
    """A layer that mixes channels: labels of what it reads, channel by channel."""

    node: fx.Node
    weight: str
    axis: int  # of the weight, that of its inputs
    channel: int  # the dimension of its input that counts channels
    labels: Tensor


class Couplings:
    """The labels of a graph.

    Args:
        graph: of the model in evaluation mode, one example.
        classes: fresh ones, or :class:`Settled` ones to compare with.
        movable: (parameter or buffer, dimension) that may become shorter.
        pins: names of calls whose operands and results are to be pinned.
        grouped: weights of convolutions with groups, if only one is left.
    """

    def __init__(
        self,
        graph: Graph,
        classes: Classes,
        movable: set[tuple[str, int]],
        pins: Iterable[str] = (),
        grouped: Iterable[str] = (),
    ) -> None:
        self.classes = classes
        self.grouped = set(grouped)
        self.consumers: list[Consumer] = []
        self.labels: dict[fx.Node, Any] = {}
        self.moves: set[str] = set()
        self._movable = movable
        self._pins = set(pins)
        self._names = {**graph.parameters, **graph.buffers}
        for result in walk(graph, lambda node: self._start(graph, node), self._apply):
            self._pin(result)

    def _start(self, graph: Graph, node: fx.Node) -> Any:
        if not isinstance(node.meta.get("val"), Tensor):
            return None
        shape = shape_of(node)
        return pinned(shape) if node.name in graph.inputs else Weight(self._of(node), shape)

    def _of(self, node: fx.Node) -> str | None:
        return self._names.get(node.name)

    def _apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            out = self._rule(node, args, kwargs)
            if node.name in self._pins:
                self._pin((args, kwargs, out))
        except MismatchError:
            raise MismatchError(node) from None
        self.labels[node] = out
        return out

    def _rule(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        space, _, op = name_of(node).partition("::")
        operands = labelled((args, kwargs))
        if space == "aten" and isinstance(args[0] if args else None, (Tensor, list, tuple)):
            if op in _POINTWISE:
                return self._pointwise(node, operands)
            if op in MOVES:
                self.moves |= {node.name} - ({node.name} if op == "flatten" else set())
                rest = [torch.empty(a.shape) if isinstance(a, Weight) else a for a in args[1:]]
                # Labels repeat themselves by strides of 0, of which not every view can be taken.
                x = args[0].contiguous() if "view" in op else args[0]
                return node.target(x, *rest, **kwargs)  # type: ignore[operator]
            if op in _SPLITS or (op in _CAT and not any(isinstance(a, Weight) for a in operands)):
                self.moves.add(node.name)
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if op in _ALONG:
                self._alike(args[0], [args[1]])
                return args[0]
            special = self._reduction if op in REDUCTIONS else self._special(op)
            if special is not None and not kwargs:
                found = special(node, *args)
                if found is not None:
                    return found
        self._pin(operands)
        if not any(isinstance(a, Tensor) for a in operands):
            return _like(node, lambda shape: Weight(None, shape))
        return _like(node, pinned)

    def _special(self, op: str) -> Callable[..., Any] | None:
        kind = re.sub(r"[123]d$", "", op)
        if kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"):
            return self._pool
        special: dict[str, Callable[..., Any]] = {
            "linear": self._linear,
            "conv": self._conv,
            "conv_transpose": self._conv_transpose,
            "batch_norm": self._batch_norm,
            "pad": self._pad,
            "constant_pad_nd": self._pad,
        }
        return special.get(kind)

    def _pin(self, what: Any) -> None:
        for operand in labelled(what):
            if isinstance(operand, Tensor):
                self.classes.tie(operand, pinned(operand.shape))
            elif operand.name is not None:
                for dim, size in enumerate(operand.shape):
                    if (operand.name, dim) in self._movable:
                        axis = self.classes.axis(operand.name, dim, size)
                        self.classes.tie(axis, pinned(axis.shape))

    def _axis(self, weight: Weight, dim: int) -> Tensor:
        if weight.name is None or (weight.name, dim) not in self._movable:
            return pinned((weight.shape[dim],))
        return self.classes.axis(weight.name, dim, weight.shape[dim])

    def _alike(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        """Tie what lies along ``dims``; the same with those dimensions of size 1."""
        for d in dims:
            first = x.narrow(d, 0, 1)
            self.classes.tie(x, first)
            x = first
        return x

    def _channels(self, x: Tensor, dim: int) -> Tensor:
        """One label for each channel, all of which lie along ``dim``."""
        return self._alike(x, [d for d in range(x.dim()) if d != dim % x.dim()]).flatten()

    def _pointwise(self, node: fx.Node, operands: list[Any]) -> Any:
        shape = shape_of(node)
        weights = [a for a in operands if isinstance(a, Weight)]
        self._pin(weights)  # a parameter that is added, say: its length is not ours to change
        parts = [a.broadcast_to(shape) for a in operands if isinstance(a, Tensor)]
        parts += [pinned(shape) for w in weights if w.shape.count(1) < len(w.shape)]
        for part in parts[1:]:
            self.classes.tie(parts[0], part)
        return parts[0]

    def _reduction(self, node: fx.Node, x: Tensor, dim: Any = None, *rest: Any) -> Any:
        if isinstance(dim, Tensor):  # max(a, b)
            return self._pointwise(node, [x, dim])
        if name_of(node).endswith("norm"):  # (x, p, dims)
            dim = rest[0] if rest else None
        dims = [dim] if isinstance(dim, int) else dim or list(range(x.dim()))
        out = self._alike(x, dims)
        return _like(node, lambda shape: out.reshape(shape))

    def _linear(self, node: fx.Node, x: Tensor, w: Any, b: Any = None) -> Tensor | None:
        if not isinstance(w, Weight) or w.name is None:
            return None
        return self._layer(node, x, w, b, -1, transposed=False)

    def _layer(
        self, node: fx.Node, x: Tensor, w: Weight, b: Any, channel: int, *, transposed: bool,
        groups: int = 1,
    ) -> Tensor:  # fmt: skip
        rows, cols = (1, 0) if transposed else (0, 1)
        channels = self._channels(x, channel)
        assert w.name is not None
        if groups == 1 and w.name not in self.grouped:
            self.consumers.append(Consumer(node, w.name, cols, channel % x.dim(), channels))
            self.classes.tie(channels, self._axis(w, cols))
            out = self._axis(w, rows)
        else:  # whole groups only: what a group reads and what it gives are one class
            self.grouped.add(w.name)
            self._pin_axis(w, 1)
            along = self._axis(w, 0).view(groups, -1)
            leader = channels.view(groups, -1)[:, :1]
            self.classes.tie(channels.view(groups, -1), leader)
            self.classes.tie(along, leader)
            out = leader.expand(-1, w.shape[1]).flatten() if transposed else along.flatten()
        if isinstance(b, Weight):
            self.classes.tie(self._axis(b, 0), out)
        shape = shape_of(node)
        return out.view(-1, *[1] * (-channel - 1)).expand(shape)

    def _pin_axis(self, w: Weight, dim: int) -> None:
        axis = self._axis(w, dim)
        self.classes.tie(axis, pinned(axis.shape))

    def _conv(
        self, node: fx.Node, x: Tensor, w: Any, b: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor | None:  # fmt: skip
        if not isinstance(w, Weight) or w.name is None:
            return None
        return self._layer(node, x, w, b, 1 - len(w.shape), transposed=False, groups=groups)

    def _conv_transpose(
        self, node: fx.Node, x: Tensor, w: Any, b: Any = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Tensor | None:  # fmt: skip
        if not isinstance(w, Weight) or w.name is None:
            return None
        return self._layer(node, x, w, b, 1 - len(w.shape), transposed=True, groups=groups)

    def _batch_norm(
        self, node: fx.Node, x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool,
        *rest: Any,
    ) -> Tensor | None:  # fmt: skip
        if training or mean is None:
            return None
        channels = self._channels(x, 1)
        for own in (w, b, mean, var):
            if isinstance(own, Weight):
                self.classes.tie(self._axis(own, 0), channels)
        return channels.view(-1, *[1] * (x.dim() - 2)).expand(x.shape)

    def _pool(self, node: fx.Node, x: Tensor, *rest: Any) -> Any:
        dims = int(name_of(node).split("pool")[1][0])
        channels = self._channels(x, -dims - 1).view(-1, *[1] * dims)
        return _like(node, channels.expand)

    def _pad(
        self, node: fx.Node, x: Tensor, pad: Sequence[int], mode: Any = "constant", *rest: Any
    ) -> Tensor | None:
        for place in range(len(pad) // 2):
            before, after = pad[2 * place : 2 * place + 2]
            d = x.dim() - 1 - place
            sizes = [list(x.shape), list(x.shape), list(x.shape)]
            sizes[0][d], sizes[1][d], sizes[2][d] = before, x.shape[d] + before + after, after
            if before == after == 0:
                continue
            if bool((x == x.narrow(d, 0, 1)).all()):  # within a channel
                x = x.narrow(d, 0, 1).expand(sizes[1])
            elif min(before, after) < 0 or mode not in ("constant", 0):
                return None
            else:  # channels of zeros, whose number the model's code fixes
                x = torch.cat([pinned(sizes[0]), x, pinned(sizes[2])], d)
        return x


def _like(node: fx.Node, make: Callable[[tuple[int, ...]], Any]) -> Any:
    """What ``make`` makes of each shape of a node's result."""
    val = node.meta.get("val")
    if isinstance(val, (tuple, list)):
        return tuple(make(tuple(v.shape)) if isinstance(v, Tensor) else v for v in val)
    return make(tuple(val.shape)) if isinstance(val, Tensor) else val
