"""Who is the fastest, by how much, and the means over a set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastprune.peers.candidates import Case, Peer
from fastprune.peers.compare import OWN
from fastprune.peers.roofline import Ceilings, floor

Result = dict[str, Any]


def summarize(
    case: Case,
    candidates: dict[str, dict[str, Any]],
    peers: Sequence[Peer],
    ceilings: Ceilings,
) -> Result:
    """What :func:`fastprune.peers.compare.compare` found, with the comparisons drawn.

    Returns:
        ``dense``: the fastest dense float32 form of torch, the baseline; each timed candidate
        gets ``speedup``, the baseline's median over its own. ``best_peer``: the fastest float32
        candidate other than fastprune, the baseline's forms included; ``speedup_over_best_peer``:
        its median over fastprune's. ``roofline``: the floor over fastprune's median.
        ``pays_after``: calls after which the packing is paid for, against the baseline; None if
        never. All None where a candidate that they need was not timed.
    """
    by_name = {peer.name: peer for peer in peers}
    medians = {n: float(c["median"]) for n, c in candidates.items() if c["status"] == "timed"}
    single = {n: t for n, t in medians.items() if by_name[n].dtype == "float32" and n != OWN}
    dense = _fastest({n: t for n, t in single.items() if by_name[n].dense_torch})
    best = _fastest(single)
    own = medians.get(OWN)
    for name, candidate in candidates.items():
        candidate["dtype"] = by_name[name].dtype
        if name in medians:
            candidate["speedup"] = medians[dense] / medians[name] if dense else None
    bound = floor(case.layer, case.mask)
    seconds = bound.seconds(ceilings)
    gain = medians[dense] - own if dense and own else 0.0
    return {
        "nnz": int(case.mask.count_nonzero()),
        "density": float(case.mask.double().mean()),
        "candidates": candidates,
        "dense": dense,
        "best_peer": best,
        "speedup": candidates[OWN]["speedup"] if own else None,
        "speedup_over_best_peer": medians[best] / own if best and own else None,
        "floor": {"flops": bound.flops, "bytes": bound.bytes, "seconds": seconds},
        "roofline": seconds / own if own else None,
        "pays_after": candidates[OWN]["prepare_seconds"] / gain if gain > 0 else None,
    }


def _fastest(medians: Mapping[str, float]) -> str | None:
    return min(medians, key=lambda name: medians[name]) if medians else None


def spread(result: Mapping[str, Any]) -> float | None:
    """The largest relative spread (half the distance of the quartiles over the median) of three.

    The three that the comparison rests on: the baseline, the best peer and fastprune.
    """
    candidates = result["candidates"]
    timed = [
        candidates[name]
        for name in (result["dense"], result["best_peer"], OWN)
        if name is not None and candidates[name]["status"] == "timed"
    ]
    return max(((t["high"] - t["low"]) / 2 / t["median"] for t in timed), default=None)


def _geometric(pairs: Iterable[tuple[float | None, int]]) -> float | None:
    """The geometric mean of (value, multiplicity); None if a value is missing."""
    logs, total = 0.0, 0
    for value, count in pairs:
        if value is None:
            return None
        logs, total = logs + count * math.log(value), total + count
    return math.exp(logs / total) if total else None


def groups(results: Sequence[Result], by_batch: bool) -> dict[tuple[Any, ...], list[Result]]:
    """(mask, sparsity, batch or None, kind or "all") -> results, in the order of the results.

    Linear layers and convolutions get groups of their own where there are several of both.
    """
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        batch = result["batch"] if by_batch else None
        found.setdefault((result["mask"], result["sparsity"], batch, "all"), []).append(result)
    split: dict[tuple[Any, ...], list[Result]] = {}
    for (mask, sparsity, batch, _), members in found.items():
        kinds = {kind: [r for r in members if r["kind"] == kind] for kind in ("linear", "conv")}
        split[mask, sparsity, batch, "all"] = members
        if min(map(len, kinds.values())) > 1:
            split |= {(mask, sparsity, batch, kind): part for kind, part in kinds.items()}
    return split


def means(results: Sequence[Result], by_batch: bool) -> list[dict[str, Any]]:
    """Geometric means over the layers of each group of :func:`groups`.

    A shape counts as often as the network has it. A candidate that was not timed in every case of
    a group has no mean there.

    Returns:
        For each group ``mask``, ``sparsity``, ``batch``, ``kind``, ``cases``; ``speedup``: {name:
        geometric mean over the baseline}; ``speedup_over_best_peer``; ``slower_than_dense`` and
        ``slower_than_best_peer``: in how many cases fastprune is; ``seconds``: sums of the medians
        of ``dense``, ``best_peer`` (of each case) and ``fastprune``, None if one is missing.
    """
    found = []
    for (mask, sparsity, batch, kind), members in groups(results, by_batch).items():
        names = dict.fromkeys(name for r in members for name in r["candidates"])
        speedups = {
            name: _geometric(
                (r["candidates"].get(name, {}).get("speedup"), r["count"]) for r in members
            )
            for name in names
        }
        found.append(
            {
                "mask": mask,
                "sparsity": sparsity,
                "batch": batch,
                "kind": kind,
                "cases": len(members),
                "speedup": {name: value for name, value in speedups.items() if value is not None},
                "speedup_over_best_peer": _geometric(
                    (r["speedup_over_best_peer"], r["count"]) for r in members
                ),
                "slower_than_dense": slower(members, "speedup"),
                "slower_than_best_peer": slower(members, "speedup_over_best_peer"),
                "seconds": {
                    "dense": _sum(members, "dense"),
                    "best_peer": _sum(members, "best_peer"),
                    OWN: _sum(members, None),
                },
            }
        )
    return found


def slower(results: Sequence[Mapping[str, Any]], key: str) -> int:
    """In how many cases fastprune is slower by this comparison."""
    return sum(r[key] is not None and r[key] < 1 for r in results)


def _sum(results: Sequence[Result], key: str | None) -> float | None:
    """Seconds of one pass through all the layers by the candidate that ``key`` names."""
    total = 0.0
    for result in results:
        name = OWN if key is None else result[key]
        timed = result["candidates"].get(name, {})
        if "median" not in timed:
            return None
        total += result["count"] * timed["median"]
    return total
