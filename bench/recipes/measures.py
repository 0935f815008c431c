"""What a report can show of a run, from the lines of its log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entry = Mapping[str, Any]
Entries = Sequence[Entry]


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes:
        label: with its unit.
        of: the number, from a phase's log lines, oldest first; None: was not logged.
        larger_is_better: None where neither is.
    """

    label: str
    of: Callable[[Entries], float | None]
    larger_is_better: bool | None = None


def _last(key: str, factor: float = 1.0) -> Callable[[Entries], float | None]:
    def read(entries: Entries) -> float | None:
        value = entries[-1].get(key)
        return None if value is None else factor * float(value)

    return read


def _first(key: str, factor: float = 1.0) -> Callable[[Entries], float | None]:
    """The value of the phase's beginning."""

    def read(entries: Entries) -> float | None:
        value = entries[0].get(key)
        return None if value is None else factor * float(value)

    return read


def _latest(key: str) -> Callable[[Entries], float | None]:
    """The newest value that is not null: masks need not be refreshed in every epoch."""

    def read(entries: Entries) -> float | None:
        found = [e[key] for e in entries if e.get(key) is not None]
        return float(found[-1]) if found else None

    return read


def _left(entries: Entries) -> float | None:
    return 100 * (1 - float(entries[-1]["sparsity"]))


def _late_flips(entries: Entries) -> float | None:
    """Flips in the last quarter of training, in % of the weights.

    At least the share of mask elements that still change then: one that changes twice counts twice.
    """
    last = entries[-1]
    if last.get("flips") is None or last["sparsity"] >= 1:
        return None
    weights = last["kept"] / (1 - last["sparsity"])
    late = entries[round(0.75 * len(entries)) :]
    return 100 * sum(e["flips"] for e in late) / weights if weights else None


def _overhead(entries: Entries) -> float | None:
    seconds = sum(e["seconds"] for e in entries)
    return 100 * sum(e["update_seconds"] for e in entries) / seconds if seconds else None


MEASURES: dict[str, Measure] = {
    "test_accuracy": Measure("top-1 test accuracy, %", _last("test_accuracy", 100.0), True),
    "pruned_test_accuracy": Measure(
        "top-1 test accuracy right after pruning, %", _first("pruned_test_accuracy", 100.0), True
    ),
    "pruned_pq_index": Measure("PQ index right after pruning", _first("pruned_pq_index")),
    "train_accuracy": Measure("training accuracy, %", _last("train_accuracy", 100.0), True),
    "left": Measure("weights left, %", _left, False),
    "macs": Measure("MACs, millions", _last("macs", 1e-6), False),
    "pq_index": Measure("PQ index, p = 0.5, q = 1", _last("pq_index")),
    "gini_index": Measure("Gini index", _last("gini_index")),
    "late_flips": Measure("mask flips in the last quarter, % of weights", _late_flips),
    "iou": Measure("IoU of the last two masks", _latest("iou")),
    "pruning_error": Measure("pruning error delta", _latest("pruning_error"), False),
    "overhead": Measure("time in mask updates, % of training", _overhead, False),
    "seconds": Measure(
        "training time, seconds", lambda entries: sum(e["seconds"] for e in entries), False
    ),
}
