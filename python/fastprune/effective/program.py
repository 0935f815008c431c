"""A network as a list of instructions over maps of bits: what ``path_norm_reach`` runs.

The encoding is that of ``csrc/ops/path_norm.h``: values are maps of ``planes`` planes of ``bits``
bits, in the row-major order of the tensor's elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

INPUT, OUTPUT, JOIN, CONV, LINEAR, COPY, GROUPS = range(7)


@dataclass(frozen=True)
class Value:
    """The reach of one tensor of the network: a map, seen in the tensor's shape."""

    number: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weight:
    """A parameter of the network, or a constant (``name`` None), which carries no input."""

    name: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """A convolution's sizes, in the order of ReachGeometry; three dimensions each."""

    rows: int
    groups: int
    depth: int
    large: tuple[int, int, int]
    small: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]

    def flat(self) -> list[int]:
        """All numbers."""
        dims = (self.large, self.small, self.kernel, self.stride, self.padding, self.dilation)
        return [self.rows, self.groups, self.depth, *(d for three in dims for d in three)]


@dataclass(frozen=True)
class Instruction:
    """Opcode and arguments; ``weight`` is the parameter whose mask the instruction reads."""

    opcode: int
    before: tuple[int, ...]
    weight: str | None = None
    after: tuple[int, ...] = ()

    def encode(self, masks: dict[str, int]) -> list[int]:
        """The numbers, with the index of the weight's mask, or -1."""
        middle = [] if self.opcode not in (CONV, LINEAR) else [masks.get(self.weight or "", -1)]
        arguments = [*self.before, *middle, *self.after]
        return [self.opcode, len(arguments), *arguments]


@dataclass
class Program:
    """Values, instructions and the label tensors that they name."""

    sizes: list[tuple[int, int]] = field(default_factory=list)  # planes, bits
    instructions: list[Instruction] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    cyclic: bool = False
    encodings: dict[tuple[str, ...], Tensor] = field(default_factory=dict)  # by names of masks
    moved_labels: dict[torch.device, list[Tensor]] = field(default_factory=dict)

    def value(self, shape: Sequence[int], planes: int | None = None) -> Value:
        """A new map, for a tensor of that shape; nothing reaches it yet."""
        numel = math.prod(shape)
        planes = 1 if planes is None else planes
        self.sizes.append((planes, numel // planes if planes else 0))
        return Value(len(self.sizes) - 1, tuple(shape))

    def recut(self, value: Value, planes: int) -> Value:
        """The same elements as ``planes`` planes."""
        if self.sizes[value.number][0] == planes or value.numel == 0:
            return value
        cut = self.value(value.shape, planes)
        self.instructions.append(Instruction(COPY, (value.number, cut.number)))
        return cut

    def input(self, shape: Sequence[int]) -> Value:
        """A map that is reached everywhere."""
        value = self.value(shape, shape[1] if len(shape) > 2 else None)  # channels, most likely
        self.instructions.append(Instruction(INPUT, (value.number,)))
        return value

    def output(self, value: Value) -> None:
        """Everything in ``value`` is an output of the network."""
        self.instructions.append(Instruction(OUTPUT, (value.number,)))

    def join(self, shape: Sequence[int], values: Iterable[Value]) -> Value:
        """The elementwise union of maps of as many elements."""
        parts = list(values)
        planes = self.sizes[parts[0].number][0]
        out = self.value(shape, planes)
        parts = [self.recut(v, planes) for v in parts]
        numbers = (out.number, *(v.number for v in parts))
        self.instructions.append(Instruction(JOIN, numbers))
        return out

    def feedback(self, state: Value, result: Value) -> None:
        """What reaches ``result`` reaches ``state``, a value that was read before."""
        self.cyclic = True
        result = self.recut(result, self.sizes[state.number][0])
        self.instructions.append(Instruction(JOIN, (state.number, result.number)))

    def convolve(
        self, value: Value, weight: Weight | None, geometry: Geometry, shape: Sequence[int],
        transposed: bool = False,
    ) -> Value:  # fmt: skip
        """A convolution; without a weight, one that joins all that a window sees (pooling)."""
        planes = (geometry.depth * geometry.groups, geometry.rows)
        into, out_of = planes if not transposed else planes[::-1]
        value = self.recut(value, into)
        out = self.value(shape, out_of)
        self.instructions.append(
            Instruction(
                CONV,
                (value.number, out.number),
                weight.name if weight is not None else None,
                (int(transposed), *geometry.flat()),
            )
        )
        return out

    def linear(self, value: Value, weight: Weight, shape: Sequence[int]) -> Value:
        """A linear layer over the last dimension."""
        rows, cols = weight.shape
        tokens = math.prod(shape[:-1])
        value = self.recut(value, tokens)
        out = self.value(shape, tokens)
        self.instructions.append(
            Instruction(LINEAR, (value.number, out.number), weight.name, (rows, cols, tokens))
        )
        return out

    def group(self, value: Value, out: Value, of: Tensor, wanted: Tensor, count: int) -> None:
        """Every element of ``out`` is reached by all of ``value`` that have its label; -1: none."""
        first = len(self.labels)
        self.labels += [t.flatten().to(torch.int32).contiguous() for t in (of, wanted)]
        numbers = (value.number, out.number, first, first + 1, count)
        self.instructions.append(Instruction(GROUPS, numbers))

    def moved(self, value: Value, source: Tensor) -> Value:
        """A map whose elements are elements of ``value``: their flat indices, -1 for none."""
        out = self.value(tuple(source.shape))
        self.group(value, out, torch.arange(value.numel), source, value.numel)
        return out

    def encode(self, masks: dict[str, int]) -> Tensor:
        """The program as a tensor; ``masks``: weight name -> index."""
        code = [int(self.cyclic), len(self.sizes)]
        code += [n for size in self.sizes for n in size]
        for instruction in self.instructions:
            code += instruction.encode(masks)
        return torch.tensor(code, dtype=torch.int64)

    def labels_on(self, device: torch.device) -> list[Tensor]:
        """The labels on a device; copied once, and kept."""
        if device not in self.moved_labels:
            self.moved_labels[device] = [t.to(device) for t in self.labels]
        return self.moved_labels[device]

    def weights(self) -> list[str]:
        """Names of the weights whose masks the instructions read, without repeats."""
        return list(dict.fromkeys(i.weight for i in self.instructions if i.weight is not None))

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """The same map, seen in another shape."""
        return replace(value, shape=tuple(shape))
