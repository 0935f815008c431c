"""What ``train`` says: progress on stderr, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from fastprune.cli import render
from fastprune.training.run import Outcome
from fastprune.training.settings import Settings

_REFRESH = 0.2  # seconds: drawing at every step would slow small networks down


class Lines:
    """Progress of one rank; the others are silent."""

    def __init__(self, visible: bool) -> None:
        self._visible = visible
        self._steps: render.Steps | None = None
        self._drawn = 0.0

    @contextmanager
    def epochs(self, total: int) -> Iterator[None]:
        """A bar of ``total`` epochs inside the block."""
        if not self._visible:
            yield
            return
        with render.Steps(total) as self._steps:
            yield

    def start(self, done: int) -> None:
        """So many epochs were done before."""
        if self._steps is not None:
            self._steps.skip(done)

    def now(self, what: str) -> None:
        """What is being worked on."""
        if self._steps is not None and time.monotonic() - self._drawn > _REFRESH:
            self._steps.now(what)
            self._drawn = time.monotonic()

    def done(self, line: str) -> None:
        """One epoch's outcome."""
        if self._steps is not None:
            self._steps.done(line)

    def say(self, line: str) -> None:
        """A remark."""
        if self._steps is not None:
            self._steps.say(line)


def summary(console: Console, settings: Settings, outcome: Outcome) -> None:
    """The table at the end, and the files."""
    entries = outcome.entries
    last = entries[-1]
    seconds = sum(e["seconds"] for e in entries)
    updates = sum(e["update_seconds"] for e in entries)
    columns = ["phase", "epochs", "test", "train", "sparsity", "kept", "MACs", "s/epoch", "updates"]
    table = render.table(
        f"{settings.model} on {settings.dataset}: {settings.method}", columns, ["phase"]
    )
    for phase in dict.fromkeys(e["phase"] for e in entries):
        own = [e for e in entries if e["phase"] == phase]
        spent = sum(e["seconds"] for e in own)
        table.add_row(
            phase,
            f"{len(own)}",
            f"{100 * own[-1]['test_accuracy']:.2f} %",
            "" if (a := own[-1]["train_accuracy"]) is None else f"{100 * a:.2f} %",
            render.sparsity(own[-1]["sparsity"]),
            f"{own[-1]['kept']:,}",
            f"{own[-1]['macs']:,}",
            f"{spent / len(own):.2f}",
            render.percent(sum(e["update_seconds"] for e in own) / max(spent, 1e-9)),
        )
    console.print(table)
    dense = [e for e in entries if e["sparsity"] == 0]
    before = ""
    if dense and last["sparsity"] > 0:
        before = f"; before any pruning {100 * dense[-1]['test_accuracy']:.2f} %"
    best = max(entries, key=lambda e: float(e["test_accuracy"]))
    render.notes(
        console,
        [
            "test, train: accuracy at the end of the phase; updates: share of the time that "
            "refreshing the masks took.",
            f"best test accuracy {100 * best['test_accuracy']:.2f} % in epoch {best['epoch']}"
            f"{before}; "
            f"{last['step']:,} steps in {seconds:.1f} s, {updates:.1f} s of it mask updates.",
        ],
    )
    console.print("\nwrote " + ", ".join(str(path) for path in outcome.files))
