"""Interleaved timing: the one stopwatch behind every figure that fastprune reports."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the quartiles around it, and how many runs they come from."""

    median: float
    low: float
    high: float
    runs: int

    def to_dict(self) -> dict[str, float]:
        """The same as a plain dictionary, in seconds."""
        return asdict(self)


def quartiles(samples: list[float]) -> Timing:
    """The statistics of some runs, seconds each."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        median=statistics.median(ordered),
        low=ordered[math.floor(0.25 * last)],
        high=ordered[math.ceil(0.75 * last)],
        runs=len(ordered),
    )


def measure(
    fns: Mapping[str, Callable[[], object]],
    *,
    min_time: float = 0.3,
    min_rounds: int = 5,
    max_rounds: int = 1000,
    warmup: int = 2,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time several functions against each other, one call of each per round.

    Interleaving makes the quotient of two medians hold when the machine's speed drifts.

    Args:
        fns: name -> function of no arguments. Each is called once per round, in turn; calls
            shorter than about 20 us are repeated within a round, so that the clock does not count.
        min_time: seconds to spend on each function, at least ``min_rounds`` rounds.
        min_rounds, max_rounds: bounds on the number of rounds.
        warmup: untimed calls of each function first.
        synchronize: called before the clock is read (``torch.cuda.synchronize`` on a GPU).
    Returns:
        name -> :class:`Timing`, seconds per call.
    Raises:
        ValueError: ``fns`` is empty.
    """
    if not fns:
        raise ValueError("fns: expected at least one function, got none")
    sync = synchronize or (lambda: None)

    def seconds(fn: Callable[[], object], repeat: int) -> float:
        sync()
        start = time.perf_counter()
        for _ in range(repeat):
            fn()
        sync()
        return (time.perf_counter() - start) / repeat

    repeats = {}
    for name, fn in fns.items():
        for _ in range(warmup):
            fn()
        once = seconds(fn, 1)
        repeats[name] = max(1, min(1000, math.ceil(2e-5 / max(once, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in fns}
    spent = 0.0
    while True:
        rounds = len(next(iter(samples.values())))
        if rounds >= max_rounds or (rounds >= min_rounds and spent >= min_time * len(fns)):
            return {name: quartiles(s) for name, s in samples.items()}
        for name, fn in fns.items():
            samples[name].append(seconds(fn, repeats[name]))
            spent += samples[name][-1] * repeats[name]
