"""``global_topk_mask`` over many ranks: arguments, layouts and scopes; the rounds are next door."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastprune.distributed.digest import digest, digest_of_all, digest_of_text
from fastprune.distributed.layout import (
    Shard,
    box_of,
    is_sharded,
    local_of,
    mesh_of,
    mesh_ranks,
    shard_of,
)
from fastprune.distributed.link import Link, ProcessGroups, Ranks
from fastprune.distributed.parts import KINDS, Box, Inputs
from fastprune.distributed.selection import Problem, Rounds, run, select
from fastprune.reference.global_topk_mask import filter_norms, fuse_score, pack_bits, rows_of

Layout = Literal["distinct", "replicated"]
_OP = "global_topk_mask"
_AVERAGED = 1 << 24  # elements that are averaged at once


@dataclass
class _Call:
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
    calls: list[_Call] = []

    def check() -> Tensor:
        if ranks not in ("distinct", "replicated"):
            raise ValueError(f"{_OP}: ranks: expected distinct or replicated, got {ranks!r}")
        if mesh is not None and (group is not None or ranks != "distinct"):
            raise ValueError(
                f"{_OP}: group, ranks: DTensors say themselves how they are spread over which "
                "ranks: leave both out"
            )
        local = ranks == "replicated" or (mesh is None and scope in ("layer", "neuron"))
        call = _checked(scores, scope, score, other, within, mesh, ranks == "replicated", more)
        if not local:
            _check_served(score, scope, mesh, more)
        _check_counts(density, k, scope)
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
            return _replicated(link, call, density, k, scope)
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


def _check_served(score: str, scope: str, mesh: Any, more: dict[str, Any]) -> None:
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


def _checked(
    scores: Any,
    scope: str,
    score: str,
    other: Any,
    within: Any,
    mesh: Any,
    replicated: bool,
    more: dict[str, Any],
) -> _Call:
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
    inputs = Inputs(values, factors, allowed, [], _boxes(whole, shards), labels, scale, score)
    inputs.wide = any(t.dtype == torch.float64 for t in (*values, *factors))
    if mesh is not None and scope in ("neuron", "filter"):
        for label, shard, t in zip(labels, shards, scores, strict=True):
            if not shard.rows_whole:
                raise ValueError(
                    f"{_OP}: scores{label}: expected whole rows on every rank with scope "
                    f"{scope!r}, got placements {t.placements}"
                )
    frozen = list(check_frozen(more["frozen"], n))
    return _Call(inputs, frozen, more, shards, whole, list(scores) if mesh is not None else [])


def _without_data(given: Any) -> Any:
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        return given
    return [
        torch.empty(t.shape, dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t
        for t in given
    ]


def _boxes(shapes: Sequence[Sequence[int]], shards: Sequence[Shard]) -> list[Box]:
    """Where the tensors lie, one after the other; plain tensors whole."""
    boxes, base = [], 0
    for i, shape in enumerate(shapes):
        offset = shards[i].offset if shards else [0] * len(shape)
        boxes.append(box_of(base, shape, offset, shards[i].shape if shards else shape))
        base += math.prod(shape)
    return boxes


def _check_counts(density: Any, k: Any, scope: str) -> None:
    """The types of ``density`` and ``k``; their ranges need the sizes of all ranks."""
    if (density is None) == (k is None):
        raise ValueError(
            f"{_OP}: density, k: expected exactly one of them, got "
            + ("neither" if k is None else "both")
        )
    if density is not None:
        if isinstance(density, bool) or not isinstance(density, Real):
            raise TypeError(f"{_OP}: density: expected a number, got {type(density).__name__}")
        if not 0 <= float(density) <= 1:
            raise ValueError(f"{_OP}: density: expected a fraction in [0, 1], got {density}")
    elif scope in ("global", "filter"):
        if isinstance(k, bool) or not isinstance(k, Integral):
            raise TypeError(
                f"{_OP}: k: expected an int with scope {scope!r}, got {type(k).__name__}"
            )
    elif isinstance(k, str) or not isinstance(k, Sequence):
        raise TypeError(
            f"{_OP}: k: expected a sequence of one int per tensor with scope {scope!r}, "
            f"got {type(k).__name__}"
        )


def _kept(density: float | None, k: Any, units: Sequence[int], scope: str) -> list[int]:
    """Kept counts, one for each number of units."""
    from fastprune.ops.global_topk_mask import kept_count

    if density is not None:
        return [kept_count(float(density), n) for n in units]
    single = scope in ("global", "filter")
    given = [k] if single else list(k)
    if len(given) != len(units):
        raise ValueError(f"{_OP}: k: expected {len(units)} counts, got {len(given)}")
    for i, (count, n) in enumerate(zip(given, units, strict=True)):
        name = "k" if single else f"k[{i}]"
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(
                f"{_OP}: {name}: expected an int with scope {scope!r}, got {type(count).__name__}"
            )
        if not 0 <= int(count) <= n:
            raise ValueError(f"{_OP}: {name}: expected 0 to {n}, got {count}")
    return [int(count) for count in given]


def _selected(
    link: Link,
    call: _Call,
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
    counts = _kept(density, k, [n + frozen_elements for n in elements], scope)
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


def _elements(link: Link, call: _Call, density: float | None, k: Any, scope: str) -> list[Tensor]:
    n = len(call.inputs.values)
    labels = call.inputs.labels
    units = [list(range(n))] if scope == "global" else [[i] for i in range(n)]
    where = ["all scores"] if scope == "global" else [f"scores{label}" for label in labels]
    return _selected(link, call, call.inputs, density, k, scope, units, where)


def _filters(link: Link, call: _Call, density: float | None, k: Any) -> list[Tensor]:
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
        norms.boxes = _boxes([s[:1] for s in call.shapes], rows_shards)

    link.vote(rank_rows)
    units = [list(range(len(norms.values)))]
    kept = _selected(link, call, norms, density, k, "filter", units, ["all filters"])

    def spread() -> None:
        for i, (rows, v) in enumerate(zip(kept, whole.values, strict=True)):
            mask = rows.view(-1, *[1] * (v.dim() - 1)).expand(v.shape)
            masks.append(mask & whole.within[i] if whole.within else mask.contiguous())

    link.vote(spread)
    return masks


def _apart(link: Link, call: _Call, density: float | None, k: Any, scope: str) -> list[Tensor]:
    """Scopes whose units lie whole on a rank: nothing to add up."""
    masks: list[Tensor] = []
    link.vote(lambda: masks.extend(_local(call, density, k, scope)))
    return _wrapped(call, masks)


def _local(call: _Call, density: float | None, k: Any, scope: str) -> list[Tensor]:
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


def _replicated(link: Link, call: _Call, density: float | None, k: Any, scope: str) -> list[Tensor]:
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
    link.vote(lambda: masks.extend(_local(call, density, k, scope)))
    if not all(link.same(n, lambda: torch.tensor([digest(m) for m in masks]))):
        raise RuntimeError(f"{_OP}: the ranks came to different masks; none are returned")
    return masks


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


def _compare_copies(link: Link, call: _Call, masks: list[Tensor], mesh: Any) -> None:
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


def _wrapped(call: _Call, masks: list[Tensor]) -> list[Tensor]:
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
