"""``global_topk_mask`` over many ranks: who takes part, and what each scope adds up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastprune.distributed.arguments import (
    Call,
    boxes_of,
    check_served,
    checked,
)
from fastprune.distributed.digest import digest_of_all, digest_of_text
from fastprune.distributed.layout import Shard, is_sharded, mesh_of, mesh_ranks
from fastprune.distributed.link import Link, ProcessGroups, Ranks
from fastprune.distributed.parts import KINDS, Inputs
from fastprune.distributed.replicated import local_masks, replicated_masks
from fastprune.distributed.selection import Problem, Rounds, run, select
from fastprune.ops.topk_checks import check_counts, kept_counts
from fastprune.reference.global_topk_mask import filter_norms, fuse_score, pack_bits, rows_of

Layout = Literal["distinct", "replicated"]
_OP = "global_topk_mask"


def over_ranks(
    scores: Sequence[Tensor],
    density: float | None,
    k: int | Sequence[int] | None,
    scope: str,
    score: str,
    other: Sequence[Tensor] | None,
    within: Sequence[Tensor] | None,
    group: Any,
    ranks: Layout,
    more: dict[str, Any],
) -> list[Tensor]:
    """What :func:`fastprune.global_topk_mask` does with ``group`` or with DTensors.

    ``more``: its arguments ``scale``, ``seed``, ``frozen``, ``min_per_tensor``, ``packed`` and
    ``names``.
    """
    link, mesh = _link(scores, group)
    calls: list[Call] = []

    def check() -> Tensor:
        if ranks not in ("distinct", "replicated"):
            raise ValueError(f"{_OP}: ranks: expected distinct or replicated, got {ranks!r}")
        if mesh is not None and (group is not None or ranks != "distinct"):
            raise ValueError(
                f"{_OP}: group, ranks: DTensors say themselves how they are spread over which "
                "ranks: leave both out"
            )
        local = ranks == "replicated" or (mesh is None and scope in ("layer", "neuron"))
        call = checked(scores, scope, score, other, within, mesh, ranks == "replicated", more)
        if not local:
            check_served(score, scope, mesh, more)
        check_counts(density, k, scope)
        calls.append(call)
        own = {"names", "scale", "frozen"}  # each rank may have others for its own tensors
        alike: list[Any] = [density, k, scope, score, other is None, within is None, ranks]
        if local and ranks == "distinct":
            alike[1] = None  # counts too
        if mesh is not None or ranks == "replicated":
            alike += [call.shapes, [v.dtype for v in (*call.inputs.values, *call.inputs.other)]]
            own = {"names"}
        alike += [(name, value) for name, value in more.items() if name not in own]
        seal = digest_of_text(alike)
        return torch.tensor([int(call.inputs.wide), seal, ~seal])

    with torch.no_grad():
        wide, most, least = link.max(3, check)
        if most != ~least:
            raise ValueError(
                f"{_OP}: the ranks of the group differ in density, k, scope, score, ranks, in "
                "whether other and within are given, or in the tensors' shapes or dtypes"
            )
        (call,) = calls
        call.inputs.wide = bool(wide)
        if ranks == "replicated":
            return replicated_masks(link, call, density, k, scope)
        if scope == "neuron" or (scope == "layer" and mesh is None):
            return _apart(link, call, density, k, scope)
        if scope == "filter":
            masks = _filters(link, call, density, k)
        else:
            masks = _elements(link, call, density, k, scope)
        if more["packed"]:
            link.vote(lambda: masks.__setitem__(slice(None), [pack_bits(m) for m in masks]))
        _compare_copies(link, call, masks, mesh)
    return _wrapped(call, masks)


def _link(scores: Any, group: Any) -> tuple[Link, Any]:
    """The ranks that take part, and the mesh if the tensors are DTensors."""
    if is_sharded(scores):
        mesh = mesh_of(scores)
        return Link(mesh_ranks(mesh)), mesh
    if group is None:
        raise ValueError(f"{_OP}: ranks: it needs a group, got None")
    return link_of(group), None


def link_of(group: Any) -> Link:
    """The ranks of a process group, or of what does as it does (:class:`Ranks`).

    Raises:
        TypeError: it is neither.
        ValueError: this rank is not in it.
    """
    if isinstance(group, dist.ProcessGroup):
        return Link(ProcessGroups.of(group))
    if group is getattr(dist.GroupMember, "NON_GROUP_MEMBER", object()):
        raise ValueError(f"{_OP}: group: this rank is not in it")
    if not callable(getattr(group, "all_reduce", None)):
        raise TypeError(
            f"{_OP}: group: expected a torch.distributed process group, got {type(group).__name__}"
        )
    ranks: Ranks = group
    return Link(ranks)


def _selected(
    link: Link,
    call: Call,
    inputs: Inputs,
    density: float | None,
    k: Any,
    scope: str,
    units: Sequence[Sequence[int]],
    where: Sequence[str],
) -> list[Tensor]:
    """Masks of the inputs, one selection for each list of tensors in ``units``."""

    whole = [i for i, frozen in enumerate(call.frozen) if frozen]
    units = [[i for i in unit if not call.frozen[i]] for unit in units]

    def sizes() -> Tensor:
        # Pages of masks are not touched before the filter pass.
        inputs.masks = [torch.empty_like(v, dtype=torch.bool) for v in inputs.values]
        for i in whole:
            inputs.masks[i].copy_(inputs.within[i] if inputs.within else torch.tensor(True))
        counted = [inputs.chosen(call.places(True, unit)) for unit in (*units, whole)]
        numbers = [n for c in counted for n in (c.elements(), c.candidates())]
        return torch.tensor([*numbers, len(inputs.values)])

    *totals, frozen_elements, frozen, tensors = link.sum(2 * len(units) + 3, sizes)
    elements, candidates = totals[::2], totals[1::2]
    if tensors == 0:
        raise ValueError(f"{_OP}: scores: expected at least one tensor, got none on any rank")
    # Only scopes with a single selection have frozen tensors.
    counts = kept_counts(density, k, [n + frozen_elements for n in elements], scope)
    for i, (count, most, name) in enumerate(zip(counts, candidates, where, strict=True)):
        if count > most + frozen:
            raise ValueError(
                f"{_OP}: k: expected at most the {most + frozen} candidates of {name}, got {count}"
            )
        if count < frozen:
            raise ValueError(
                f"{_OP}: k: expected at least the {frozen} units of frozen tensors, got {count}"
            )
        counts[i] -= frozen
    rounds: list[Rounds] = []
    for i, unit in enumerate(units):
        parts = [inputs.chosen(call.places(counted, unit)) for counted in (True, False)]
        problem = Problem(
            parts[0].part(),
            parts[1].part(),
            counts[i],
            candidates[i],
            elements[i],
            parts[0].elements(),
            inputs.wide,
            index_end=sum(math.prod(shape) for shape in call.shapes),
            rank=None if call.shards else link.rank,
            size=link.size,
        )
        rounds.append(select(problem))
    run(link, rounds)
    return inputs.masks


def _elements(link: Link, call: Call, density: float | None, k: Any, scope: str) -> list[Tensor]:
    n = len(call.inputs.values)
    labels = call.inputs.labels
    units = [list(range(n))] if scope == "global" else [[i] for i in range(n)]
    where = ["all scores"] if scope == "global" else [f"scores{label}" for label in labels]
    return _selected(link, call, call.inputs, density, k, scope, units, where)


def _filters(link: Link, call: Call, density: float | None, k: Any) -> list[Tensor]:
    """The filters' norms are a selection problem of their own: one float64 score per filter."""
    whole = call.inputs
    norms = Inputs([], [], [], [], [], whole.labels, [], "identity", wide=True)
    masks: list[Tensor] = []

    def rank_rows() -> None:
        for i, v in enumerate(whole.values):
            rows = v.shape[0] if v.dim() else 1
            factors = whole.other[i : i + 1]
            if v.device.type == "cpu":
                kind, scale = KINDS[whole.score], whole.scale[i : i + 1]
                norm = torch.ops.fastprune.topk_shard_norms(v, factors, scale, kind, rows)
            else:
                factor = whole.scale[i] if whole.scale else 1.0
                fused = fuse_score(v, factors[0] if factors else None, whole.score, factor)
                norm = filter_norms(fused)
            norms.values.append(norm)
            if whole.within:
                norms.within.append(rows_of(whole.within[i]).any(dim=1))
        rows_shards = [Shard(s.offset[:1], s.shape[:1], s.counted, (), True) for s in call.shards]
        norms.boxes = boxes_of([s[:1] for s in call.shapes], rows_shards)

    link.vote(rank_rows)
    units = [list(range(len(norms.values)))]
    kept = _selected(link, call, norms, density, k, "filter", units, ["all filters"])

    def spread() -> None:
        for i, (rows, v) in enumerate(zip(kept, whole.values, strict=True)):
            mask = rows.view(-1, *[1] * (v.dim() - 1)).expand(v.shape)
            masks.append(mask & whole.within[i] if whole.within else mask.contiguous())

    link.vote(spread)
    return masks


def _apart(link: Link, call: Call, density: float | None, k: Any, scope: str) -> list[Tensor]:
    """Scopes whose units lie whole on a rank: nothing to add up."""
    masks: list[Tensor] = []
    link.vote(lambda: masks.extend(local_masks(call, density, k, scope)))
    return _wrapped(call, masks)


def _compare_copies(link: Link, call: Call, masks: list[Tensor], mesh: Any) -> None:
    """Ranks that hold the same shards must have come to the same masks of them."""
    dims = sorted({d for shard in call.shards for d in shard.copied})
    if not dims:
        return
    alike = True
    for d in dims:
        ranks = ProcessGroups([mesh.get_group(d)], mesh.get_local_rank(d), mesh.size(d))
        copies = [m for m, s in zip(masks, call.shards, strict=True) if d in s.copied]
        alike &= Link(ranks).same(1, partial(_seal, copies))[0]

    def check() -> None:
        if not alike:
            raise RuntimeError(
                f"{_OP}: ranks that hold copies of the same shards came to different masks: their "
                "scores differ; no masks are returned"
            )

    link.vote(check)


def _seal(masks: list[Tensor]) -> Tensor:
    return torch.tensor([digest_of_all(masks)])


def _wrapped(call: Call, masks: list[Tensor]) -> list[Tensor]:
    """Masks placed like the scores."""
    if not call.sharded:
        return masks
    from torch.distributed.tensor import DTensor

    wrapped: list[Tensor] = []
    for mask, t in zip(masks, call.sharded, strict=True):
        strides = torch.empty(t.shape, device="meta").stride()
        wrapped.append(
            DTensor.from_local(
                mask,
                t.device_mesh,
                t.placements,
                run_check=False,
                shape=t.shape,
                stride=strides,
            )
        )
    return wrapped
