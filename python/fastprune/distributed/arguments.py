"""The arguments of one rank of a selection over many, checked as on one machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastprune.distributed.layout import Shard, box_of, local_of, shard_of
from fastprune.distributed.parts import KINDS, Box, Inputs

_OP = "global_topk_mask"


@dataclass
class Call:
    """What one rank was given, once it is known to be sound."""

    inputs: Inputs
    frozen: list[bool]
    more: dict[str, Any]  # arguments as they were given
    shards: list[Shard] = field(default_factory=list)  # of DTensors
    shapes: list[torch.Size] = field(default_factory=list)  # of the whole tensors
    sharded: list[Any] = field(default_factory=list)  # the DTensors

    def places(self, counted: bool, among: Sequence[int]) -> list[int]:
        """The tensors that this rank answers for, or the others."""
        return [i for i in among if (not self.shards or self.shards[i].counted) == counted]


def checked(
    scores: Any,
    scope: str,
    score: str,
    other: Any,
    within: Any,
    mesh: Any,
    replicated: bool,
    more: dict[str, Any],
) -> Call:
    """The arguments of this rank, contiguous, without masks.

    Raises:
        ValueError, TypeError: as ``global_topk_mask`` on one machine.
    """
    from fastprune.ops.topk_call import TopkCall  # beside what hands over to this module
    from fastprune.ops.topk_restricted import check_frozen

    # A rank may have no tensors: then what else it says is checked with one of size 1.
    n = len(scores) if isinstance(scores, Sequence) else 0
    nothing = not n and isinstance(scores, Sequence) and mesh is None and not replicated
    dummy = [torch.empty(1, device="meta")] * 2 + [torch.empty(1, device="meta").bool()]
    lists = (scores, other, within)
    shapes = [
        [d] if nothing and given is not None and not len(given) else _without_data(given)
        for given, d in zip(lists, dummy, strict=True)
    ]
    alone = TopkCall.check(
        shapes[0],
        scope,
        score,
        shapes[1],
        shapes[2],
        None if nothing else more["scale"],
        more["seed"],
        more["packed"],
        None if nothing else more["names"],
    )
    labels = [] if nothing else alone.labels
    shards: list[Shard] = []
    if mesh is not None:
        for name, given in (("scores", scores), ("other", other), ("within", within)):
            for i, t in enumerate(given or ()):
                like = None if name == "scores" else scores[i]
                shard = shard_of(t, mesh, f"{name}{labels[i]}", like)
                if name == "scores":
                    shards.append(shard)
    values, factors, allowed = (
        [(t.detach() if mesh is None else local_of(t)).contiguous() for t in given or ()]
        for given in lists
    )
    device = values[0].device if values else None
    for name, part in (("scores", values), ("other", factors), ("within", allowed)):
        for i, t in enumerate(part):
            if t.device != device:
                raise ValueError(
                    f"{_OP}: {name}{labels[i]}: expected the device {device} of the first tensor, "
                    f"got {t.device}"
                )
    whole = [t.shape for t in scores]
    scale = [] if nothing or more["scale"] is None else alone.scale
    inputs = Inputs(values, factors, allowed, [], boxes_of(whole, shards), labels, scale, score)
    inputs.wide = any(t.dtype == torch.float64 for t in (*values, *factors))
    if mesh is not None and scope in ("neuron", "filter"):
        for label, shard, t in zip(labels, shards, scores, strict=True):
            if not shard.rows_whole:
                raise ValueError(
                    f"{_OP}: scores{label}: expected whole rows on every rank with scope "
                    f"{scope!r}, got placements {t.placements}"
                )
    frozen = list(check_frozen(more["frozen"], n))
    return Call(inputs, frozen, more, shards, whole, list(scores) if mesh is not None else [])


def check_served(score: str, scope: str, mesh: Any, more: dict[str, Any]) -> None:
    """Refuses what only one machine can do, where elements of several ranks compete."""
    if score in ("noise", "lamp"):
        kinds = ", ".join(KINDS)
        raise ValueError(
            f"{_OP}: score: expected one of {kinds} where the elements of several ranks compete, "
            f"got {score!r}"
        )
    if more["min_per_tensor"] != 0:
        raise ValueError(
            f"{_OP}: min_per_tensor: expected 0 where the elements of several ranks compete, "
            f"got {more['min_per_tensor']!r}"
        )
    if more["packed"] and mesh is not None:
        raise ValueError(f"{_OP}: packed: expected False with DTensors, got True")
    if more["frozen"] is not None and scope not in ("global", "filter"):
        raise ValueError(f"{_OP}: frozen: expected scope 'global' or 'filter', got {scope!r}")


def _without_data(given: Any) -> Any:
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        return given
    return [
        torch.empty(t.shape, dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t
        for t in given
    ]


def boxes_of(shapes: Sequence[Sequence[int]], shards: Sequence[Shard]) -> list[Box]:
    """Where the tensors lie, one after the other; plain tensors whole."""
    boxes, base = [], 0
    for i, shape in enumerate(shapes):
        offset = shards[i].offset if shards else [0] * len(shape)
        boxes.append(box_of(base, shape, offset, shards[i].shape if shards else shape))
        base += math.prod(shape)
    return boxes
