"""Which channels of a pruned network are dead or constant, and what the constants add up to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fastprune.effective.classes import PINNED, Classes
from fastprune.effective.couplings import Consumer, Couplings
from fastprune.effective.program import Value
from fastprune.effective.rules.dependence import DEPENDENCE
from fastprune.effective.shrinking import owners_of
from fastprune.effective.trace import Graph, build, name_of
from fastprune.ops.path_norm import path_norm_reach
from fastprune.pruners.state import evaluating


class Life:
    """What reaches the channels that layers read, what they reach, and constants among them."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        masks: dict[str, Tensor],
        arguments: tuple[Any, ...],
    ) -> None:
        self._model = model
        self._owners = owners_of(model)
        self._graph = graph
        self._program, self._given = build(graph, DEPENDENCE)
        for node, given in self._given.items():
            _refuse_computed_parameters(node, given)
        self._masks = masks
        self._arguments = arguments
        self._reach: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self._inputs: dict[str, Tensor] = {}
        consumers = Couplings(graph, Classes(), set()).consumers
        self._follow(consumers)
        self._record(consumers)

    def _follow(self, consumers: list[Consumer]) -> None:
        read = {c.node: self._given[c.node][0] for c in consumers}
        values = {node: v for node, v in read.items() if isinstance(v, Value)}
        code = self._program.encode({name: i for i, name in enumerate(self._masks)})
        maps = path_norm_reach(
            list(self._masks.values()),
            self._program.labels,
            code,
            [v.number for v in values.values()],
            False,
        )[1:]
        for i, (node, v) in enumerate(values.items()):
            self._reach[node] = maps[2 * i].view(v.shape), maps[2 * i + 1].view(v.shape)

    def _record(self, consumers: list[Consumer]) -> None:
        """What each layer that runs once reads, of one example."""
        weights = [c.weight for c in consumers]
        hooks: list[Any] = []
        seen: dict[str, list[Any]] = {}
        for name in weights:
            layer = self._layer(name)
            if layer is not None and weights.count(name) == 1:
                seen[name] = []

                def note(_: Any, args: tuple[Any, ...], calls: list[Any] = seen[name]) -> None:
                    calls.append(args[0].detach() if args else None)

                hooks.append(layer.register_forward_pre_hook(note))
        try:
            with evaluating(self._model), torch.no_grad():
                self._model(*self._arguments)
        finally:
            for hook in hooks:
                hook.remove()
        self._inputs = {n: calls[0] for n, calls in seen.items() if len(calls) == 1}

    def _layer(self, weight: str) -> nn.Module | None:
        """The layer of a weight, if weight and bias are its own alone."""
        owner, _, own = weight.rpartition(".")
        layer = self._model.get_submodule(owner)
        tensors = [layer._parameters.get("weight"), layer._parameters.get("bias")]
        shared = any(len(self._owners[id(t)]) > 1 for t in tensors if t is not None)
        return None if own != "weight" or shared or "bias" not in layer._parameters else layer

    def removable(self, couplings: Couplings) -> Tensor:
        """Which classes go: bool, by class.

        In rounds: what nothing reads but what went in the round before can go too.
        """
        classes, axes = couplings.classes, couplings.classes.axes()
        count = 1 + max((int(c.max()) for c in axes.values() if c.numel()), default=0)
        removed = torch.zeros(count, dtype=torch.bool)
        needed = []
        for consumer in couplings.consumers:
            dead, still = self._channels(consumer)
            rows = axes.get((consumer.weight, 1 - consumer.axis))
            needs = ~(dead | still & self._foldable(consumer))
            needed.append((classes.of(consumer.labels), needs, self._reads(consumer), rows))
        while True:
            more = torch.zeros_like(removed)
            for c in axes.values():
                more[c] = True
            more[PINNED] = False
            for own, needs, reads, rows in needed:
                if rows is not None:
                    needs = needs & reads[~removed[rows]].any(0)
                more[own[needs]] = False
            for c in axes.values():  # a layer without channels would not run
                if len(c) and bool(more[c].all()):
                    more[c[~removed[c]][0]] = False
            if torch.equal(more, removed):
                return removed
            removed = more

    def _reads(self, consumer: Consumer) -> Tensor:
        """Which of its channels each output of a layer reads."""
        mask = self._masks.get(consumer.weight)
        if mask is None:
            mask = torch.ones_like(self._model.get_parameter(consumer.weight), dtype=torch.bool)
        by_row = mask.movedim(consumer.axis, 1)
        return by_row.reshape(*by_row.shape[:2], -1).any(2).cpu()

    def _channels(self, consumer: Consumer) -> tuple[Tensor, Tensor]:
        """Channels that reach no output, and channels that no input reaches."""
        if consumer.node not in self._reach:
            nothing = torch.zeros(len(consumer.labels), dtype=torch.bool)
            return nothing, nothing
        reached, reaching = self._reach[consumer.node]
        by_channel = [_rows(m, consumer.channel).any(1) for m in (reaching, reached)]
        return ~by_channel[0], ~by_channel[1]

    def _foldable(self, consumer: Consumer) -> Tensor:
        """Channels whose values, if they are constants, have the same effect at all positions."""
        x = self._inputs.get(consumer.weight)
        reach = self._reach.get(consumer.node)
        if x is None or reach is None or x.shape != reach[0].shape:
            return torch.zeros(len(consumer.labels), dtype=torch.bool)
        values = _rows(x, consumer.channel)
        first = values[:, :1]
        same = ((values == first) & first.isfinite()).all(1)
        if not self._even(consumer):
            same &= first.flatten() == 0
        return same.cpu()

    def _even(self, consumer: Consumer) -> bool:
        node = consumer.node
        if name_of(node) == "aten::linear":
            return True
        positions = node.meta["val"].movedim(consumer.channel, 0)[0].numel()
        if positions == 1:
            return True
        padding: Any = node.args[4] if len(node.args) > 4 else 0
        if "transpose" in name_of(node) or padding == "same":
            return False
        return padding == "valid" or not any([padding] if isinstance(padding, int) else padding)

    def biases(self, couplings: Couplings, removed: Tensor) -> dict[str, Tensor]:
        """What constants that are removed add to the outputs of the layers that read them."""
        found = {}
        for consumer in couplings.consumers:
            dead, still = self._channels(consumer)
            gone = removed[couplings.classes.of(consumer.labels)] & still & ~dead
            gone &= self._foldable(consumer)
            if not bool(gone.any()):
                continue
            x = self._inputs[consumer.weight].double().movedim(consumer.channel, -1)
            x = torch.where(gone.to(x.device), x, 0.0).movedim(-1, consumer.channel)
            weight = self._model.get_parameter(consumer.weight).detach().double()
            out = consumer.node.target(x, weight, None, *consumer.node.args[3:])  # type: ignore[operator]
            shift = out.movedim(consumer.channel, 0).flatten(1)[:, 0]
            if bool(shift.any()):
                found[consumer.weight] = shift
        return found


def _refuse_computed_parameters(node: fx.Node, given: tuple[Any, ...]) -> None:
    """Reach does not follow biases, nor the weights of normalization."""
    op = name_of(node).removeprefix("aten::")
    first = 1 if op.endswith("norm") else 2 if op.startswith(("linear", "conv")) else len(given)
    if any(isinstance(a, Value) for a in given[first:]):
        raise ValueError(
            f"model: {node.name} ({op}) has a parameter that is computed from the input: what it "
            "depends on is not followed, and so nothing can be said to be dead"
        )


def _rows(x: Tensor, channel: int) -> Tensor:
    """Channels x all else."""
    return x.movedim(channel, 0).flatten(1) if x.dim() > 1 else x[:, None]
