"""Rule of monotone equilibrium layers, whose units feed back into themselves.

z = sigma(W z + b), W = (1 - m) I - A^T A + B - B^T: a path enters by b and goes on from unit to
unit as often as it likes, by A and back by A^T, by B, or by B^T. The diagonal leads nowhere else.
The program is cyclic, and reach what no further round adds to: Vysogorets and Kempe 2023, section
3, on the graph that the fixed point iterates over.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fastprune.effective.program import Geometry, Value, Weight
from fastprune.effective.rules.windows import one_example
from fastprune.effective.trace import Trace, register_rule, register_stand_in, shape_of
from fastprune.nn import MonDEQConv2d, MonDEQLayer

_LINEAR = -1  # in place of the width of a ring


@torch.library.custom_op("fastprune::traced_equilibrium", mutates_args=())
def traced_equilibrium(bias: Tensor, A: Tensor | None, B: Tensor | None, ring: int) -> Tensor:
    """Stands for the solve in a traced graph; ``ring``: of a convolution's maps, or -1."""
    raise NotImplementedError("traced_equilibrium: it is never run")


@traced_equilibrium.register_fake
def _fake(bias: Tensor, A: Tensor | None, B: Tensor | None, ring: int) -> Tensor:
    return torch.empty_like(bias)


@register_stand_in(MonDEQLayer)
def _stand_in(layer: MonDEQLayer, x: Tensor) -> Tensor:
    ring = layer.kernel_size // 2 if isinstance(layer, MonDEQConv2d) else _LINEAR
    return traced_equilibrium(layer.U(x), layer.A, layer.B, ring)  # type: ignore[no-any-return]


@register_rule("fastprune::traced_equilibrium")
def _equilibrium(
    trace: Trace, node: fx.Node, bias: Any, A: Weight | None, B: Weight | None, ring: int
) -> Any:
    shape = shape_of(node)
    if not isinstance(bias, Value):
        return Weight(None, shape)
    if ring == _LINEAR:
        features = shape[-1]
        # Features first, as the channels of a map whose places are the tokens.
        rows = trace.moved(bias, lambda index: index.reshape(-1, features).t())
        maps = _Maps(trace, features, (1, math.prod(shape[:-1])), 1)
        z = maps.settle(rows, A, B, 0)
        return trace.program.reshaped(trace.moved(z, lambda index: index.t()), shape)
    one_example(node, shape, 2)
    kernel = 2 * ring + 1
    maps = _Maps(trace, shape[-3], (shape[-2], shape[-1]), kernel)
    flat = trace.program.reshaped(bias, shape[-3:])
    return trace.program.reshaped(maps.settle(flat, A, B, ring), shape)


class _Maps:
    """Maps that wrap around, and convolutions of them with square kernels of odd size."""

    def __init__(self, trace: Trace, channels: int, size: tuple[int, int], kernel: int) -> None:
        self._trace, self._program = trace, trace.program
        self.channels, self.size, self._pad = channels, size, kernel // 2
        self._large = (size[0] + 2 * self._pad, size[1] + 2 * self._pad)
        self._geometry = Geometry(
            channels,
            1,
            channels,
            (1, *self._large),
            (1, *size),
            (1, kernel, kernel),
            (1, 1, 1),
            (0, 0, 0),
            (1, 1, 1),
        )

    def settle(self, bias: Value, A: Weight | None, B: Weight | None, ring: int) -> Value:
        """The equilibrium's map; nothing reaches its ring."""
        program, channels = self._program, self.channels
        shape = bias.shape
        z = program.value(shape, channels)  # read before it is written
        parts = [program.recut(bias, channels)]
        if A is not None:
            parts.append(self._back(self._forth(z, A), A))
        if B is not None:
            parts += [self._forth(z, B), self._back(z, B)]
        program.feedback(z, self._without_ring(program.join(shape, parts), ring))
        return z

    def _without_ring(self, value: Value, ring: int) -> Value:
        if ring == 0:
            return value
        rows, columns = (slice(ring, n - ring) for n in self.size)

        def cut(index: Tensor) -> Tensor:
            kept = torch.full_like(index, -1)
            kept[..., rows, columns] = index[..., rows, columns]
            return kept

        return self._trace.moved(value, cut)

    def _forth(self, z: Value, kernel: Weight) -> Value:
        wrapped = z
        if self._pad:
            wrapped = self._trace.moved(z, lambda index: self._wrap(index.view(-1, *self.size)))
        return self._program.convolve(wrapped, kernel, self._geometry, self._shape())

    def _back(self, t: Value, kernel: Weight) -> Value:
        """The adjoint: a transposed convolution, what sticks out added where it wraps to."""
        program = self._program
        large = (self.channels, *self._large)
        out = program.convolve(t, kernel, self._geometry, large, transposed=True)
        if not self._pad:
            return out
        folded = program.value(self._shape(), self.channels)
        index = torch.arange(folded.numel).view(self._shape())
        program.group(out, folded, self._wrap(index), index, folded.numel)
        return folded

    def _shape(self) -> tuple[int, ...]:
        return (self.channels, *self.size)

    def _wrap(self, index: Tensor) -> Tensor:
        """Circular padding of any width."""
        rows, columns = (torch.arange(-self._pad, n + self._pad) % n for n in self.size)
        return index[:, rows][:, :, columns]
