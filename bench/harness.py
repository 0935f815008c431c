"""What every benchmark shares: the machine, the ceiling, the row of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastprune.timing import Timing, measure

# The version of a weight that changed since the last call: in training every step changes it, and
# the input gradient brings its values into both orders anew.
CHANGED = -1


@dataclass
class Row:
    """One case at one sparsity.

    ``times`` holds seconds: name of the candidate -> median, quartiles, runs. ``best_dense`` is
    the best of torch's dense candidates (memory formats). ``floor_ms`` is what the flops and
    bytes of the sparse product imply at the ceilings measured in the same run.
    """

    op: str
    case: str
    sparsity: float
    times: dict[str, dict[str, float]]
    dense_names: tuple[str, ...]
    floor_ms: float | None = None
    pack_ms: float | None = None
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def best_dense(self) -> float:
        return min(self.times[name]["median"] for name in self.dense_names)

    def speedup(self, name: str = "fastprune") -> float:
        return self.best_dense / self.times[name]["median"]

    def to_dict(self) -> dict[str, Any]:
        out = asdict(self)
        out["speedup"] = {name: self.speedup(name) for name in self.times}
        return out


def as_times(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: t.to_dict() for name, t in timings.items()}


def time_all(fns: dict[str, Callable[[], object]], min_time: float) -> dict[str, dict[str, float]]:
    with torch.inference_mode():
        return as_times(measure(fns, min_time=min_time))


def machine() -> dict[str, Any]:
    """Machine, threads, ISA and versions, for the head of a table."""
    from fastprune.cli.machine import describe

    return dict(describe(torch.device("cpu"), torch.float32))


def print_times(title: str, times: Mapping[str, Timing], unit: str | None = None) -> None:
    """Medians and quartiles, over the candidate ``unit`` (the first), and over fastprune's own."""
    unit = unit or next(iter(times))
    own = times.get("fastprune", times[unit]).median
    table = Table("", "ms", "quartiles", f"over {unit}", "over fastprune", title=title)
    for name, t in times.items():
        table.add_row(
            name,
            f"{t.median * 1e3:.3f}",
            f"{t.low * 1e3:.3f} - {t.high * 1e3:.3f}",
            f"{t.median / times[unit].median:.2f}",
            f"{t.median / own:.2f}",
        )
    Console(width=110).print(table)


def print_rows(title: str, rows: list[Row]) -> None:
    names = [n for n in rows[0].times if n not in rows[0].dense_names]
    table = Table(title=title)
    table.add_column("case")
    table.add_column("sparsity", justify="right")
    table.add_column("dense ms", justify="right")
    for name in names:
        table.add_column(f"{name} ms", justify="right")
        table.add_column("speedup", justify="right")
    table.add_column("quartiles", justify="right")
    table.add_column("over floor", justify="right")
    table.add_column("pack ms", justify="right")
    table.add_column("pays after", justify="right")
    for row in rows:
        cells = [row.case, f"{100 * row.sparsity:g} %", f"{1e3 * row.best_dense:.3f}"]
        for name in names:
            speedup = row.speedup(name)
            style = "" if speedup >= 1 else "[red]"
            cells += [f"{1e3 * row.times[name]['median']:.3f}", f"{style}{speedup:.2f}"]
        ours = row.times["fastprune"]
        cells.append(f"{1e3 * ours['low']:.3f}-{1e3 * ours['high']:.3f}")
        cells.append("-" if row.floor_ms is None else f"{1e3 * ours['median'] / row.floor_ms:.1f}")
        gain = row.best_dense - ours["median"]
        cells.append("-" if row.pack_ms is None else f"{row.pack_ms:.2f}")
        pays = row.pack_ms is not None and gain > 0
        cells.append(f"{row.pack_ms / (1e3 * gain):.0f} calls" if pays else "never")  # type: ignore[operator]
        table.add_row(*cells)
    Console(width=160).print(table)
