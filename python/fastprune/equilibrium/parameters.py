"""Effective parameters of a pruned model, and dense models of the same size.

Paper 000, Appendix D.1 and Table D2, after Frankle et al. 2021, Appendix M.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastprune.effective import rules as _rules  # noqa: F401  # registers the rules
from fastprune.effective import trace
from fastprune.effective.program import Program, Value, Weight
from fastprune.effective.rules.names import ELEMENTWISE
from fastprune.nn import MonDEQConv2d
from fastprune.ops.path_norm import path_norm_reach
from fastprune.pruners.arguments import masks_of

_BY_CHANNEL = ("batch_norm", "instance_norm", "group_norm")
_BY_PLACE = {*ELEMENTWISE} - {*_BY_CHANNEL}


def effective_parameters(model: nn.Module, masks: Mapping[str, Tensor], example_input: Any) -> int:
    """Number of parameters that take part in what a pruned model computes from its input.

    Weights count if they lie on a path from an input to an output, as in
    :func:`fastprune.effective_masks`: those of the classifier too, whose columns for units that
    nothing reaches do not. A bias, scale or shift counts if its unit lies on such a path (in an
    equilibrium layer, also if only other units reach it); g and h of
    :class:`fastprune.nn.MonDEQConv2d` if an entry of A or of B does. Shared parameters count once.
    Boolean and exact.

    Args:
        model: any module that ``torch.export`` can trace; not changed.
        masks: parameter name -> bool tensor, True where kept. Parameters without a mask are dense.
        example_input: a tensor or a tuple of them; only shapes and dtypes count.
    Returns:
        The count, between 0 and the number of parameters of the model.
    Raises:
        UnknownOperationError: an operation without a rule.
        ValueError: masks that do not fit; a parameter in a place where it cannot be said what it
            acts on; the message names it.
    Paper: 000, Appendix D.1; Frankle et al. 2021, Appendix M.
    """
    arguments = trace.arguments_of(model, example_input)
    known = masks_of(model, masks)
    parameters = dict(model.named_parameters())
    graph = trace.graph_of(model, arguments)
    uses = _Uses(graph)
    weights = [n for n in uses.program.weights() if n in parameters]
    given = [known.get(n, torch.ones_like(parameters[n], dtype=torch.bool)) for n in weights]
    numbers = sorted({v.number for found in uses.acting.values() for v, _ in found})
    counts, *maps = path_norm_reach(
        [m.cpu() for m in given],
        uses.program.labels,
        uses.program.encode({n: i for i, n in enumerate(weights)}),
        numbers,
        False,
    )
    active = dict(zip(weights, counts.tolist(), strict=True))
    on_path = {n: maps[2 * i] & maps[2 * i + 1] for i, n in enumerate(numbers)}
    total: int = sum(active.values())
    for name, places in uses.acting.items():
        if name in active:
            continue
        parts = [reduce(on_path[value.number].view(value.shape)) for value, reduce in places]
        met = torch.stack([p.expand(parameters[name].shape) for p in parts]).any(0)
        if name in known:
            met &= known[name].cpu()
        total += int(met.sum())
    return total + _scalars(model, active)


def _scalars(model: nn.Module, active: Mapping[str, int]) -> int:
    """g and h, which no traced operation reads."""
    first = {id(p): n for n, p in model.named_parameters()}
    found: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, MonDEQConv2d):
            for matrix, scalar in ((layer.A, layer.g), (layer.B, layer.h)):
                if matrix is not None and active.get(first[id(matrix)], 0):
                    found.add(id(scalar))
    return len(found)


Reduce = Callable[[Tensor], Tensor]


class _Uses:
    """A program, and which of its values each bias, scale and shift acts on."""

    def __init__(self, graph: trace.Graph) -> None:
        self.acting: dict[str, list[tuple[Value, Reduce]]] = {}
        # Where an equilibrium settles what a layer gives it, that is what the layer's bias acts on.
        self._settled: dict[int, Value] = {}
        rules = {name: self._recording(rule) for name, rule in trace.registered().items()}
        self.program: Program = trace.build(graph, rules)[0]
        self.acting = {
            name: [(self._settled.get(v.number, v), reduce) for v, reduce in places]
            for name, places in self.acting.items()
        }

    def _recording(self, rule: trace.Rule) -> trace.Rule:
        def record(built: trace.Trace, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
            result = rule(built, node, *args, **kwargs)
            out = result[0] if isinstance(result, tuple) else result
            if isinstance(out, Value):
                self._note(node, out, args, kwargs)
            return result

        return record

    def _note(
        self, node: fx.Node, out: Value, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        op = trace.name_of(node).partition("::")[2].rstrip("_")
        found: list[Weight] = []
        fx.node.map_aggregate(
            (args, dict(kwargs)), lambda a: found.append(a) if isinstance(a, Weight) else a
        )
        named = [w for w in found if w.name is not None]
        if op == "traced_equilibrium":
            self._settled[args[0].number] = out
            return
        if op.startswith(("linear", "masked_linear", "conv", "masked_conv")):
            dim = -1 if "linear" in op else len(out.shape) - _spatial(args[1]) - 1
            reduce, rest = _by_channel(dim), named[1:]
        elif op in _BY_CHANNEL:
            reduce, rest = _by_channel(1), named
        elif op in _BY_PLACE or f"{op}_" in _BY_PLACE:
            reduce, rest = _by_place, named
        elif op == "embedding" or not named:
            return
        else:
            raise ValueError(
                f"model: what the parameter {named[0].name} acts on is not known: it is an operand "
                f"of {trace.name_of(node)}"
            )
        for weight in rest:
            assert weight.name is not None
            self.acting.setdefault(weight.name, []).append((out, reduce(weight.shape)))


def _spatial(weight: Any) -> int:
    return len(weight.shape) - 2


def _by_channel(dim: int) -> Callable[[tuple[int, ...]], Reduce]:
    """Any place of each channel."""
    return lambda shape: lambda on_path: on_path.movedim(dim, 0).flatten(1).any(1)


def _by_place(shape: tuple[int, ...]) -> Reduce:
    """Any of the places that an operand of that shape is broadcast to."""

    def reduce(on_path: Tensor) -> Tensor:
        wide = (1,) * (on_path.dim() - len(shape)) + tuple(shape)
        for dim, size in enumerate(wide):
            if size == 1:
                on_path = on_path.any(dim, keepdim=True)
        return on_path.reshape(shape)

    return reduce


def equal_size_channels(make_model: Callable[[int], nn.Module], target: int) -> int:
    """The number of channels whose dense model has the number of parameters nearest to a target.

    Args:
        make_model: number of channels (or features) -> model; called on the ``meta`` device, so
            that no size costs memory. The number of parameters must grow with the channels.
        target: number of parameters, such as :func:`effective_parameters` gives.
    Returns:
        At least 1; of two that are as near, the smaller.
    Raises:
        ValueError: ``target`` is below 1, or the number of parameters does not grow.
    About 2 log2(result) models are made. Paper: 000, Table D2.
    """
    if isinstance(target, bool) or not isinstance(target, int) or target < 1:
        raise ValueError(f"target: expected a positive integer, got {target!r}")

    def size(channels: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in make_model(channels).parameters())

    low, high = 1, 2
    if size(1) >= target:
        return 1
    while size(high) < target:
        if size(2 * high) <= size(high):
            raise ValueError("make_model: the number of parameters does not grow with the channels")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < target else (low, middle)
    return low if target - size(low) <= size(high) - target else high
