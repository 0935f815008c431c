"""The order of methods here and in the paper, and the pairs on which the two disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from bench.recipes.measures import MEASURES
from bench.recipes.results import Summary


@dataclass(frozen=True)
class Number:
    """A mean and a deviation, ``larger is better``; -inf: did not converge."""

    mean: float
    deviation: float = 0.0

    def ahead_of(self, other: Number) -> int:
        """1, 0 (within the deviations) or -1."""
        if self.mean == other.mean:
            return 0
        difference = self.mean - other.mean
        if abs(difference) <= math.hypot(self.deviation, other.deviation):
            return 0
        return 1 if difference > 0 else -1


def of_paper(value: Any, sign: float = 1.0) -> Number | None:
    """A number of a recipe: [mean, deviation], mean, or "*"; None for "-" and what is absent."""
    if value is None or value == "-":
        return None
    if value == "*":
        return Number(-math.inf)
    mean, deviation = value if isinstance(value, list) else (value, 0.0)
    return Number(sign * mean, deviation)


def of_summary(summary: Summary, sign: float = 1.0) -> Number | None:
    """What was measured; None if nothing was."""
    if summary.converged is None:
        return None
    if not summary.converged and sign > 0:
        return Number(-math.inf)
    if summary.mean is None:
        return None
    return Number(sign * summary.mean, summary.deviation or 0.0)


def sign_of(measure: str) -> float:
    """-1 where smaller is better, or comes first in a table."""
    return -1.0 if MEASURES[measure].larger_is_better is False else 1.0


def ranked(numbers: Mapping[str, Number]) -> list[str]:
    """Methods, best first; equal ones in the given order."""
    return sorted(numbers, key=lambda m: -numbers[m].mean)


def orders(here: Mapping[str, Number], paper: Mapping[str, Number]) -> dict[str, Any]:
    """Both orders over the methods that both have, and how the pairs compare.

    A pair counts as the paper's only if it differs there by more than the deviations.
    """
    both = [m for m in here if m in paper]
    agree, within, disagree = 0, [], []
    for a, b in combinations(both, 2):
        said = paper[a].ahead_of(paper[b])
        if said == 0:
            continue
        better, worse = (a, b) if said > 0 else (b, a)
        verdict = here[better].ahead_of(here[worse])
        if verdict > 0:
            agree += 1
        else:
            (within if verdict == 0 else disagree).append([better, worse])
    return {
        "here": ranked({m: here[m] for m in both}),
        "paper": ranked({m: paper[m] for m in both}),
        "agree": agree,
        "within": within,
        "disagree": disagree,
    }


def claim(order: Sequence[str], here: Mapping[str, Number]) -> dict[str, Any]:
    """How a claimed order, best first, fares: neighbours of it that were measured.

    Returns:
        ``verdict``: "agrees", "within the deviations", "disagrees" or "not measured"; the pairs.
    """
    known = [m for m in order if m in here]
    pairs = [(a, b, here[a].ahead_of(here[b])) for a, b in pairwise(known)]
    if len(known) < len(order) and not pairs:
        verdict = "not measured"
    elif any(v < 0 for _, _, v in pairs):
        verdict = "disagrees"
    else:
        verdict = "agrees" if all(v > 0 for _, _, v in pairs) else "within the deviations"
    if pairs and len(known) < len(order):
        missing = ", ".join(m for m in order if m not in here)
        verdict += f" (without {missing})"
    return {
        "verdict": verdict,
        "here": ranked({m: here[m] for m in known}),
        "against": [[a, b] for a, b, v in pairs if v < 0],
        "within": [[a, b] for a, b, v in pairs if v == 0],
    }
