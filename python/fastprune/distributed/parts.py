"""The local passes of a selection: by the CPU kernels, or in plain torch on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastprune.distributed.selection import BINS, Part, bins_by_torch, bins_of
from fastprune.reference.global_topk_mask import fuse_score
from fastprune.reference.topk_shards import keys_of

KINDS = {"identity": 0, "magnitude": 1, "product": 2, "saliency": 3, "square": 4}
_OP = "global_topk_mask"
# Columns of the chunk table of csrc/ops/topk_shards.cpp.
_TENSOR, _BEGIN = 0, 1
_CLASSES = {"above": 3, "top": 4, "inside": 5, "bottom": 6}


@dataclass(frozen=True)
class Box:
    """Where a tensor's elements lie among all: row-major over ``sizes``, each with its stride."""

    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def indices(self, local: Tensor) -> Tensor:
        """Global indices of local ones."""
        result = torch.full_like(local, self.base)
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            result += local % size * stride
            local = local // size
        return result


@dataclass
class Inputs:
    """Tensors of one rank, contiguous and on one device, and the masks to write."""

    values: list[Tensor]
    other: list[Tensor]
    within: list[Tensor]
    masks: list[Tensor]
    boxes: list[Box]
    labels: list[str]
    scale: list[float]  # one per tensor, or none: 1
    score: str
    wide: bool = False

    def chosen(self, places: Sequence[int]) -> Inputs:
        """Some of the tensors."""

        def of(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[i] for i in places] if tensors else []

        return Inputs(
            of(self.values),
            of(self.other),
            of(self.within),
            of(self.masks),
            [self.boxes[i] for i in places],
            [self.labels[i] for i in places],
            [self.scale[i] for i in places] if self.scale else [],
            self.score,
            self.wide,
        )

    def part(self) -> Part:
        """The passes over them."""
        filled = [i for i, v in enumerate(self.values) if v.numel() > 0]
        if not filled:
            return EmptyPart()
        inputs = self if len(filled) == len(self.values) else self.chosen(filled)
        on_cpu = inputs.values[0].device.type == "cpu"
        return NativePart(inputs) if on_cpu else TorchPart(inputs)

    def elements(self) -> int:
        """How many there are."""
        return sum(v.numel() for v in self.values)

    def candidates(self) -> int:
        """How many of them are inside ``within``."""
        if not self.within:
            return self.elements()
        return sum(int(torch.count_nonzero(w)) for w in self.within)


def nan_error(label: str) -> ValueError:
    """What a NaN score raises on its rank."""
    return ValueError(f"{_OP}: scores{label}: a candidate's score is NaN")


class EmptyPart:
    """No tensors."""

    elements = 0

    def sample(self, wanted: int) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def filter(self, bounds: Sequence[int], capacity: int) -> list[int]:
        return [0] * 4

    def histogram(self, lo: int, hi: int) -> Tensor:
        return torch.zeros(BINS, dtype=torch.int64)

    def inside_histogram(self, lo: int, hi: int) -> Tensor:
        return torch.zeros(BINS, dtype=torch.int64)

    def tie_bins(self, members: str, key: int, lo: int, shift: int) -> Tensor:
        return torch.zeros(BINS, dtype=torch.int64)

    def count_ties(self, members: str, key: int) -> int:
        return 0

    def accept(self, key: int, ties: int) -> None:
        pass

    def settle(self, members: str, key: int, ties: int) -> None:
        pass


class NativePart:
    """CPU tensors, by the ops of csrc/ops/topk_shards.cpp."""

    def __init__(self, inputs: Inputs) -> None:
        self._labels = inputs.labels
        self._wide = inputs.wide
        self._factors = (
            inputs.values,
            inputs.other,
            inputs.within,
            inputs.scale,
            KINDS[inputs.score],
        )
        self._masks = inputs.masks
        self._boxes = inputs.boxes
        self.elements = inputs.elements()
        self._chunks = self._keys = self._positions = torch.empty(0)
        self._tied: tuple[int, Tensor] | None = None  # a key, and the indices of its elements

    def sample(self, wanted: int) -> Tensor:
        keys: Tensor = torch.ops.fastprune.topk_shard_sample(*self._factors, self._wide, wanted)
        return keys

    def filter(self, bounds: Sequence[int], capacity: int) -> list[int]:
        self._tied = None
        try:
            self._chunks, self._keys, self._positions = torch.ops.fastprune.topk_shard_filter(
                *self._factors, self._wide, self._masks, list(bounds), capacity
            )
        except RuntimeError as error:
            message = str(error).partition("\n")[0]
            if "score is NaN" not in message:
                raise
            place = int(message[message.index("values[") + 7 :].partition("]")[0])
            raise nan_error(self._labels[place]) from None
        return [int(self._chunks[:, column].sum()) for column in _CLASSES.values()]

    def histogram(self, lo: int, hi: int) -> Tensor:
        counts: Tensor = torch.ops.fastprune.topk_shard_histogram(
            *self._factors, self._wide, lo, hi
        )
        return counts

    def inside_histogram(self, lo: int, hi: int) -> Tensor:
        return bins_of(self._keys, lo, hi)

    def tie_bins(self, members: str, key: int, lo: int, shift: int) -> Tensor:
        if members == "inside":
            return index_bins(self._inside_ties(key), lo, shift)
        counts: Tensor = torch.ops.fastprune.topk_shard_tie_bins(
            *self._factors,
            self._wide,
            self._masks,
            self._chunks,
            members == "top",
            key,
            box_table(self._boxes),
            lo,
            shift,
        )
        return counts

    def count_ties(self, members: str, key: int) -> int:
        if members == "inside":
            return int((self._keys == key).sum())
        return int(self._chunks[:, _CLASSES[members]].sum())

    def accept(self, key: int, ties: int) -> None:
        torch.ops.fastprune.topk_shard_accept(
            *self._factors,
            self._wide,
            self._masks,
            self._chunks,
            self._keys,
            self._positions,
            key,
            ties,
        )

    def settle(self, members: str, key: int, ties: int) -> None:
        torch.ops.fastprune.topk_shard_settle(
            *self._factors, self._wide, self._masks, self._chunks, members == "top", key, ties
        )

    def _inside_ties(self, key: int) -> Tensor:
        """Global indices of the inside elements with this key."""
        if self._tied is None or self._tied[0] != key:
            equal = (self._keys == key).nonzero().flatten()
            counts = self._chunks[:, _CLASSES["inside"]]
            chunk = torch.searchsorted(counts.cumsum(0), equal, right=True)
            local = self._chunks[chunk, _BEGIN] + (self._positions[equal].to(torch.int64) & 0xFFFF)
            tensor = self._chunks[chunk, _TENSOR]
            indices = torch.empty_like(local)
            for i in tensor.unique().tolist():
                places = tensor == i
                indices[places] = self._boxes[i].indices(local[places])
            self._tied = (key, indices)
        return self._tied[1]


@dataclass
class TorchPart:
    """Any device, by n-sized tensors of keys: slow, obvious, and the kernels' oracle."""

    inputs: Inputs
    elements: int = 0
    _bounds: tuple[int, ...] = ()
    _keys: Tensor = field(default_factory=lambda: torch.empty(0))
    _indices: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.elements = self.inputs.elements()

    def _all_keys(self) -> Tensor:
        if self._keys.numel() == 0:
            p, parts = self.inputs, []
            for i, v in enumerate(p.values):
                scale = p.scale[i] if p.scale else 1.0
                score = fuse_score(v, p.other[i] if p.other else None, p.score, scale).flatten()
                allowed = p.within[i].flatten() if p.within else None
                nan = score.isnan() if allowed is None else score.isnan() & allowed
                if bool(nan.any()):
                    raise nan_error(p.labels[i])
                parts.append(keys_of(score, allowed, p.wide))
            self._keys = torch.cat(parts)
        return self._keys

    def sample(self, wanted: int) -> Tensor:
        n = self.elements
        places = torch.arange(wanted, device=self.inputs.values[0].device) * n // max(wanted, 1)
        lowest = torch.iinfo(torch.int64 if self.inputs.wide else torch.int32).min
        keys = self._all_keys()[places]
        return keys[keys > lowest]

    def filter(self, bounds: Sequence[int], capacity: int) -> list[int]:
        keys = self._all_keys()
        self._bounds = tuple(bounds)
        self._write(keys > bounds[1])
        over = [int((keys > b).sum()) for b in bounds]
        return [over[0], over[1] - over[0], over[2] - over[1], over[3] - over[2]]

    def histogram(self, lo: int, hi: int) -> Tensor:
        return bins_by_torch(self._all_keys(), lo, hi)

    def inside_histogram(self, lo: int, hi: int) -> Tensor:
        return bins_by_torch(self._keys, lo, hi)

    def tie_bins(self, members: str, key: int, lo: int, shift: int) -> Tensor:
        if self._indices.numel() == 0:
            p = self.inputs
            self._indices = torch.cat(
                [
                    box.indices(torch.arange(v.numel(), device=v.device))
                    for box, v in zip(p.boxes, p.values, strict=True)
                ]
            )
        return index_bins(self._indices[self._keys == key], lo, shift)

    def count_ties(self, members: str, key: int) -> int:
        return int((self._keys == key).sum())

    def accept(self, key: int, ties: int) -> None:
        inside = (self._keys > self._bounds[2]) & (self._keys <= self._bounds[1])
        kept = self._keys > key
        self._write(torch.where(inside, kept | self._first(key, ties), self._read()))

    def settle(self, members: str, key: int, ties: int) -> None:
        equal = self._keys == key
        self._write(torch.where(equal, self._first(key, ties), self._read()))

    def _first(self, key: int, ties: int) -> Tensor:
        equal = self._keys == key
        return equal & (equal.cumsum(0) <= ties)

    def _read(self) -> Tensor:
        return torch.cat([m.flatten() for m in self.inputs.masks])

    def _write(self, kept: Tensor) -> None:
        for mask, part in zip(
            self.inputs.masks, kept.split([m.numel() for m in self.inputs.masks]), strict=True
        ):
            mask.copy_(part.view(mask.shape))


def index_bins(indices: Tensor, lo: int, shift: int) -> Tensor:
    """Counts of the indices in bins of 2^shift from lo on."""
    bins = (indices - lo) >> shift
    return torch.bincount(bins[(bins >= 0) & (bins < BINS)], minlength=BINS)


def box_table(boxes: Sequence[Box]) -> Tensor:
    """One row per box: the base, then size and stride of each dimension."""
    dims = max([len(b.sizes) for b in boxes] + [1])
    rows = []
    for box in boxes:
        lead = dims - len(box.sizes)
        pairs = [(1, 0)] * lead + list(zip(box.sizes, box.strides, strict=True))
        rows.append([box.base, *(number for pair in pairs for number in pair)])
    return torch.tensor(rows, dtype=torch.int64)
