"""What paper 000 found, held against the numbers of a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# "Comparable results": one point of accuracy. "Costs nothing": half a point, the order of the
# differences that the paper's Table 2 calls slight.
COMPARABLE = 0.01
NOTHING = 0.005
_EARLY = 0.7


def mean(results: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Over the seeds of a case; None where none finished."""
    values = [float(r[key]) for r in results if r.get(key) is not None]
    return statistics.fmean(values) if values else None


def deviation(results: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Standard deviation over the seeds of a case; None for fewer than two."""
    values = [float(r[key]) for r in results if r.get(key) is not None]
    return statistics.stdev(values) if len(values) > 1 else None


def of_kind(document: Mapping[str, Any], kind: str, **wanted: Any) -> list[Mapping[str, Any]]:
    """The finished results of a kind that have these values."""
    return [
        r
        for r in document["results"]
        if r["kind"] == kind
        and "error" not in r
        and all(r.get(name) == value for name, value in wanted.items())
    ]


def findings(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paper's findings: what is claimed, whether it holds here, and the numbers.

    ``holds`` is None where the run has not what it takes to say.
    """
    made = (_iterations, _accuracy, _without_a, _a_is_pruned, _against_dense)
    return [found for make in made if (found := make(document)) is not None]


def _curve(document: Mapping[str, Any], method: str, key: str) -> dict[float, float]:
    """Sparsity -> mean, the dense network at 0."""
    points = {0.0: mean(of_kind(document, "parametrization", variant="full"), key)}
    for s in document["settings"]["sparsities"]:
        points[s] = mean(of_kind(document, "pruned", method=method, sparsity=s), key)
    return {s: value for s, value in points.items() if value is not None}


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(b < a for b in values) + sum(b == a for b in values) / 2 for a in values]


def _falls(curve: Mapping[float, float]) -> bool:
    """Spearman's correlation below -1/2, and fewer at the highest sparsity than dense."""
    if len(curve) < 3:
        return len(curve) == 2 and curve[max(curve)] < curve[0.0]
    values = [curve[s] for s in sorted(curve)]
    if len(set(values)) == 1:
        return False
    return statistics.correlation(range(len(values)), _ranks(values)) < -0.5 and (
        values[-1] < values[0]
    )


def _iterations(document: Mapping[str, Any]) -> dict[str, Any] | None:
    methods = document["settings"]["methods"]
    curves = {m: _curve(document, m, "iterations") for m in methods}
    curves = {m: c for m, c in curves.items() if len(c) > 1 and 0.0 in c}
    if not curves:
        return None
    falls = [m for m, c in curves.items() if _falls(c)]
    numbers = ", ".join(f"{m} {c[0.0]:.1f} -> {c[max(c)]:.1f}" for m, c in curves.items())
    return _found(
        "iterations fall as sparsity grows (Figure 1b)",
        len(falls) == len(curves),
        f"for {len(falls)} of {len(curves)} methods; dense -> sparsest: {numbers}",
    )


def _accuracy(document: Mapping[str, Any]) -> dict[str, Any] | None:
    losses = {}
    for m in document["settings"]["methods"]:
        curve = _curve(document, m, "accuracy")
        early = [s for s in curve if 0.0 < s < _EARLY]
        if early and 0.0 in curve:
            losses[m] = max(curve[0.0] - curve[s] for s in early)
    if not losses:
        return None
    numbers = ", ".join(f"{m} {100 * loss:+.1f}" for m, loss in losses.items())
    return _found(
        f"below {100 * _EARLY:.0f} % little is lost (Figure 1a; here: at most "
        f"{100 * COMPARABLE:g} point)",
        max(losses.values()) <= COMPARABLE,
        f"largest loss in points: {numbers}",
    )


def _without_a(document: Mapping[str, Any]) -> dict[str, Any] | None:
    values = {
        v: mean(of_kind(document, "parametrization", variant=v), "accuracy")
        for v in ("full", "without A", "without B", "without A and B")
    }
    full, without = values["full"], values["without A"]
    if full is None or without is None:
        return None
    numbers = ", ".join(f"{v} {100 * x:.2f} %" for v, x in values.items() if x is not None)
    return _found(
        f"removing A costs nothing (Table 2; here: at most {100 * NOTHING:g} point)",
        full - without <= NOTHING,
        numbers,
    )


def _a_is_pruned(document: Mapping[str, Any]) -> dict[str, Any] | None:
    wanted = [s for s in document["settings"]["sparsities"] if s >= 0.9]
    found = of_kind(document, "pruned", method="snip", sparsity=min(wanted, default=None))
    tables = [r["matrices"] for r in found if r.get("matrices", {}).get("A") is not None]
    if not tables:
        return None
    average = {n: statistics.fmean(t[n] for t in tables) for n in ("U", "A", "B") if n in tables[0]}
    numbers = ", ".join(f"{n} {100 * x:.2f} %" for n, x in average.items())
    return _found(
        f"SNIP prunes A most (Table 1, at {100 * min(wanted):g} %)",
        average["A"] == max(average.values()),
        f"sparsity of {numbers}",
    )


def _against_dense(document: Mapping[str, Any]) -> dict[str, Any] | None:
    pairs = []
    for method in document["settings"]["equal_size"]:
        for s in document["settings"]["sparsities"]:
            sparse = mean(of_kind(document, "pruned", method=method, sparsity=s), "accuracy")
            dense = mean(of_kind(document, "equal size", method=method, sparsity=s), "accuracy")
            if sparse is not None and dense is not None and s <= 0.9:
                pairs.append((method, s, sparse - dense))
    if not pairs:
        return None
    better = sum(gain > 0 for *_, gain in pairs)
    numbers = ", ".join(f"{m} {100 * s:g} %: {100 * gain:+.1f}" for m, s, gain in pairs)
    return _found(
        "up to 90 % a sparse network beats the dense one of its size (Figure 2)",
        better == len(pairs),
        f"in {better} of {len(pairs)} cases; points: {numbers}",
    )


def _found(claim: str, holds: bool, numbers: str) -> dict[str, Any]:
    return {"finding": claim, "holds": holds, "numbers": numbers}
