"""Tables and progress on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

# A pipe or a file has no width: rich would cut tables to 80 columns.
_NO_TERMINAL_WIDTH = 160


def stdout() -> Console:
    """A console for results."""
    width = None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH
    return Console(width=width, highlight=False, markup=False)


class Steps:
    """Progress on stderr: a bar that vanishes on a terminal, a line per finished step elsewhere.

    Use as a context manager; leaving it, however that happens, puts the terminal back.
    """

    def __init__(self, total: int) -> None:
        console = Console(stderr=True, highlight=False, markup=False)
        self._console = console
        self._total = total
        self._done = 0
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            # A thread that redraws ten times a second would disturb what is being timed.
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def skip(self, steps: int) -> None:
        """Count steps that an earlier process did."""
        self._done += steps
        self._bar.update(self._task, completed=self._done, refresh=True)

    def say(self, line: str) -> None:
        """A remark, above the bar."""
        self._bar.console.print(line, soft_wrap=True)

    def now(self, what: str) -> None:
        """Say what is being worked on."""
        self._bar.update(self._task, description=what, refresh=True)

    def done(self, line: str) -> None:
        """Count one step; ``line`` is its outcome, for a log."""
        self._done += 1
        self._bar.update(self._task, completed=self._done, refresh=True)
        if not self._console.is_terminal:
            width = len(str(self._total))
            self._console.print(f"[{self._done:{width}}/{self._total}] {line}", soft_wrap=True)


def percent(fraction: float) -> str:
    """0.905 -> ``90.5 %``."""
    return f"{100 * fraction:.1f} %"


def sparsity(fraction: float) -> str:
    """0.9 -> ``90 %``, 0.975 -> ``97.5 %``."""
    return f"{100 * fraction:.6g} %"


def milliseconds(seconds: float) -> str:
    """Three significant digits, never an exponent."""
    ms = seconds * 1e3
    if ms >= 100:
        return f"{ms:.0f}"
    return f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def speedup(value: float, disturbed: bool = False) -> Text:
    """``1.84x``; green above 1, red below: a slowdown must catch the eye. ``1.84x?``: disturbed."""
    style = "green" if value >= 1.005 else "bold red" if value < 0.995 else ""
    if disturbed:
        return Text(f"{value:.2f}x?", style="yellow")
    return Text(f"{value:.2f}x", style=style)


def spread(timing: Mapping[str, Any]) -> str:
    """Median, and half the distance between the quartiles relative to it: ``12.3 ±2.0%``."""
    half = (timing["high"] - timing["low"]) / 2 / timing["median"]
    return f"{milliseconds(timing['median'])} ±{100 * half:.1f}%"


def table(title: str, columns: Sequence[str], text: Sequence[str], gap: int = 1) -> Table:
    """An empty table; columns named in ``text`` are aligned left, numbers right.

    On a narrow terminal only text folds. The demo's table fits 80 columns with ``gap=0``.
    """
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, gap, 0, 0),
        pad_edge=False,
    )
    for heading in columns:
        if heading in text:
            result.add_column(heading, overflow="fold")
        else:
            result.add_column(heading, justify="right", no_wrap=True)
    return result


def notes(console: Console, lines: Iterable[str]) -> None:
    """Remarks under a table."""
    for line in lines:
        console.print(f"  {line}", style="dim", soft_wrap=True)


def verdict(cases: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    """How many of the cases are slower than dense, and how many cannot be relied upon."""
    speedups = [case["speedup"] for case in cases]
    slower = sum(value < 0.995 for value in speedups)
    count = f"{slower} of {len(cases)} cases" if slower else "no case"
    worst = f" (the worst {min(speedups):.2f}x)" if slower else ""
    lines = [f"{what}: {count} slower than the best dense form{worst}."]
    if doubtful := sum(case["disturbed"] for case in cases):
        lines.append(
            f"{what}: {doubtful} marked ?: other work kept the machine busy; run again when idle."
        )
    return lines
