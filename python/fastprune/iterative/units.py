"""The units in which weights compete, and the selection of the smallest weights of each unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastprune.ops.global_topk_mask import global_topk_mask
from fastprune.ops.topk_call import row_topk_mask
from fastprune.reference.global_topk_mask import rows_of

UnitScope = Literal["global", "layer", "neuron"]


def check_scope(scope: object, op: str) -> UnitScope:
    """``scope``, if it is one of the three."""
    known = get_args(UnitScope)
    if scope not in known:
        raise ValueError(f"{op}: scope: expected one of {', '.join(known)}, got {scope!r}")
    return scope  # type: ignore[return-value]


def unit_sizes(masks: Mapping[str, Tensor], scope: UnitScope) -> list[int]:
    """Kept weights of each unit: of all layers, of each, or of each row of each, in order."""
    if scope == "global":
        return [sum(int(m.sum()) for m in masks.values())]
    if scope == "layer":
        return [int(m.sum()) for m in masks.values()]
    return [n for m in masks.values() for n in rows_of(m).sum(dim=1).tolist()]


def keep_largest(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    counts: Sequence[int],
    scope: UnitScope,
) -> dict[str, Tensor]:
    """New masks inside ``masks``: the counts[u] largest magnitudes of each unit u stay.

    Equal magnitudes: the earlier flat index stays, tensors in the order of ``masks``.
    """
    names = list(masks)
    values, within = [weights[n] for n in names], [masks[n] for n in names]
    with torch.no_grad():
        if scope == "neuron":
            kept = row_topk_mask(values, list(counts), within, names)
        else:
            k = counts[0] if scope == "global" else list(counts)
            kept = global_topk_mask(
                values, k=k, scope=scope, score="magnitude", within=within, names=names
            )
    return dict(zip(names, kept, strict=True))
