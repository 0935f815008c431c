"""Read finished jobs: one point for each phase, several seeds as mean and deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.recipes.jobs import Cell
from bench.recipes.measures import MEASURES
from bench.recipes.train import ITERATIVE

# A network at most this much better than guessing has not learnt: the papers' star.
CHANCE = 1.5

Status = Callable[[str], Mapping[str, Any]]
Log = Callable[[str], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Point:
    """One training at the end of one phase.

    Attributes:
        entries: the log lines of the phase; epochs: of the whole run until then.
        round: of iterative methods: prunings so far.
    """

    entries: Sequence[Mapping[str, Any]]
    epochs: int
    round: int

    @property
    def sparsity(self) -> float:
        """As reached."""
        return float(self.entries[-1]["sparsity"])

    def value(self, measure: str) -> float | None:
        """A measure; None if it was not logged."""
        return MEASURES[measure].of(self.entries)


@dataclass
class Summary:
    """A measure of a cell over its seeds.

    Attributes:
        values: of the seeds that finished; ``states``: how many jobs are how ("done", "diverged",
            "failed", "unsupported", "missing").
        collapsed: how many of the values are of networks that guess.
        sparsity, epochs: reached, mean over the seeds.
    """

    values: list[float] = field(default_factory=list)
    states: dict[str, int] = field(default_factory=dict)
    collapsed: int = 0
    sparsity: float | None = None
    epochs: float | None = None

    @property
    def mean(self) -> float | None:
        """None without a value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the sample; None for fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def starred(self) -> int:
        """Trainings that diverged, or whose network guesses."""
        return self.collapsed + self.states.get("diverged", 0)

    @property
    def converged(self) -> bool | None:
        """False if no training did; None if none ended."""
        if not self.values and not self.starred:
            return None
        return self.starred < len(self.values) + self.states.get("diverged", 0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mean": self.mean,
            "deviation": self.deviation,
            "values": self.values,
            "states": self.states,
            "collapsed": self.collapsed,
            "sparsity": self.sparsity,
            "epochs": self.epochs,
        }


def points(log: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The phases of a training, in order."""
    phases: list[list[Mapping[str, Any]]] = []
    for entry in log:
        if not phases or phases[-1][-1]["phase"] != entry["phase"]:
            phases.append([])
        phases[-1].append(entry)
    return [Point(p, int(p[-1]["epoch"]), number) for number, p in enumerate(phases)]


def choose(cell: Cell, found: Sequence[Point], at: float | int | None) -> Point | None:
    """The point of a training that a table's cell shows.

    Args:
        at: for iterative methods, the sparsity (float) that the round should be nearest to, or the
            number of the round (int); None: the last.
    """
    if cell.phase is not None:
        return next((p for p in found if p.entries[0]["phase"] == cell.phase), None)
    if not found:
        return None
    if cell.job.settings["method"] in ITERATIVE and at is not None:
        if isinstance(at, int):
            return next((p for p in found if p.round == at), None)
        return min(found, key=lambda p: abs(p.sparsity - at))
    return found[-1]


class Results:
    """Finished jobs, each read once.

    Args:
        status: of a job, as ``running.status`` returns it; ``log``: its log lines.
        classes: number of classes of a data set.
    """

    def __init__(self, status: Status, log: Log, classes: Callable[[str], int]) -> None:
        self._status, self._log, self._classes = status, log, classes
        self._points: dict[str, list[Point]] = {}
        self._states: dict[str, Mapping[str, Any]] = {}

    def status(self, job: str) -> Mapping[str, Any]:
        """How a job is."""
        if job not in self._states:
            self._states[job] = self._status(job)
        return self._states[job]

    def points(self, job: str) -> list[Point]:
        """Empty unless the job is done."""
        if job not in self._points:
            done = self.status(job)["state"] == "done"
            self._points[job] = points(self._log(job)) if done else []
        return self._points[job]

    def rounds(self, cells: Iterable[Cell]) -> int:
        """The largest number of prunings of any of the trainings."""
        return max((len(self.points(c.job.name)) - 1 for c in cells), default=0)

    def summary(self, cells: Sequence[Cell], measure: str, at: float | int | None) -> Summary:
        """A measure over the seeds: ``cells`` differ in nothing else."""
        out = Summary()
        reached, epochs = [], []
        for cell in cells:
            state = self.status(cell.job.name)["state"]
            out.states[state] = out.states.get(state, 0) + 1
            point = choose(cell, self.points(cell.job.name), at)
            value = None if point is None else point.value(measure)
            if point is None or value is None or not math.isfinite(value):
                continue
            out.values.append(value)
            reached.append(point.sparsity)
            epochs.append(point.epochs)
            guess = 1.0 / self._classes(cell.job.settings["dataset"])
            out.collapsed += point.entries[-1]["test_accuracy"] <= CHANCE * guess
        if reached:
            out.sparsity, out.epochs = statistics.fmean(reached), statistics.fmean(epochs)
        return out
