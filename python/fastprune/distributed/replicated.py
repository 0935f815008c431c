"""The same tensors on every rank: averaged where they differ, then selected from by each alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprune.distributed.arguments import Call
from fastprune.distributed.digest import digest
from fastprune.distributed.link import Link

_OP = "global_topk_mask"
_AVERAGED = 1 << 24  # elements that are averaged at once


def replicated_masks(
    link: Link, call: Call, density: float | None, k: Any, scope: str
) -> list[Tensor]:
    """The same parameters on every rank: the mean of what differs, then everyone for itself."""
    p = call.inputs
    n = len(p.values)
    parts: list[tuple[str, list[Tensor]]] = [
        ("scores", p.values),
        ("other", p.other),
        ("within", p.within),
    ]
    if p.score == "noise":  # does not read the scores
        parts[0] = ("scores", [])
    alike = link.same(
        sum(len(tensors) for _, tensors in parts),
        lambda: torch.tensor([digest(t) for _, tensors in parts for t in tensors]),
    )
    mean_of = "other" if p.other else "scores" if p.score in ("identity", "square") else None
    at = 0
    for name, tensors in parts:
        differ = [i for i in range(len(tensors)) if not alike[at + i]]
        at += len(tensors)
        if differ and name != mean_of:
            raise ValueError(
                f"{_OP}: {name}{p.labels[differ[0]]}: expected the same on every rank with ranks "
                f"'replicated' and score {p.score!r}"
                + (": only other is averaged" if p.other else "")
            )
        _average(link, tensors, differ)
    masks: list[Tensor] = []
    link.vote(lambda: masks.extend(local_masks(call, density, k, scope)))
    if not all(link.same(n, lambda: torch.tensor([digest(m) for m in masks]))):
        raise RuntimeError(f"{_OP}: the ranks came to different masks; none are returned")
    return masks


def local_masks(call: Call, density: float | None, k: Any, scope: str) -> list[Tensor]:
    from fastprune.ops.global_topk_mask import global_topk_mask

    p = call.inputs
    if not p.values:
        return []
    return global_topk_mask(
        p.values,
        density,
        k=k,
        scope=scope,  # type: ignore[arg-type]
        score=p.score,  # type: ignore[arg-type]
        other=p.other or None,
        within=p.within or None,
        **call.more,
    )


def _average(link: Link, tensors: list[Tensor], places: Sequence[int]) -> None:
    """Replaces tensors by their means over the ranks, in float32 or float64."""
    for kind in (torch.float32, torch.float64):
        mine = [i for i in places if (tensors[i].dtype == torch.float64) == (kind == torch.float64)]
        while mine:
            count, size = 0, 0
            while count < len(mine) and (count == 0 or size < _AVERAGED):
                size += tensors[mine[count]].numel()
                count += 1
            batch, mine = mine[:count], mine[count:]
            flat: list[Tensor] = []
            link.vote(partial(_flatten, tensors, batch, kind, flat))
            link.add_(flat[0])
            flat[0] /= link.size
            sizes = [tensors[i].numel() for i in batch]
            for i, mean in zip(batch, flat[0].split(sizes), strict=True):
                tensors[i] = mean.view(tensors[i].shape)


def _flatten(
    tensors: list[Tensor], places: Sequence[int], kind: torch.dtype, flat: list[Tensor]
) -> None:
    flat.append(torch.cat([tensors[i].flatten().to(kind) for i in places]))
