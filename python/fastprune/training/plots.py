"""The curves of a run: small multiples against the epoch."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprune import figures
from fastprune.files import write_atomically
from fastprune.training.settings import Settings

_Entry = Mapping[str, Any]


def curves(entries: Sequence[_Entry], settings: Settings, path: Path) -> bool:
    """Accuracy, loss, sparsity, mask flips, PQ and Gini index against the epoch, as a PNG.

    Args:
        entries: the log; may be empty.
        path: of the PNG, written atomically.
    Returns:
        Whether it was drawn: not without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    figure = figures.figure(2, 3, height=2.6)
    axes = figure.subplots(2, 3, sharex=True).flatten()
    panels = (
        ("accuracy, %", [("test", "test_accuracy", 100.0), ("training", "train_accuracy", 100.0)]),
        ("cross entropy in training", [("", "loss", 1.0)]),
        ("sparsity, %", [("", "sparsity", 100.0)]),
        ("mask entries flipped per epoch", [("", "flips", 1.0)]),
        ("PQ index of the kept weights", [("", "pq_index", 1.0)]),
        ("Gini index of the kept weights", [("", "gini_index", 1.0)]),
    )
    epochs = [e["epoch"] for e in entries]
    begins = _phases(entries)
    for ax, (title, lines) in zip(axes, panels, strict=True):
        ax.set_title(title, fontsize=10)
        for number, (label, key, factor) in enumerate(lines):
            values = [float("nan") if e[key] is None else factor * e[key] for e in entries]
            ax.plot(
                epochs,
                values,
                color=figures.colour(number),
                linewidth=1.4,
                marker="o" if len(epochs) < 40 else None,
                markersize=3,
                label=label or None,
            )
        if len(lines) > 1 and entries:
            ax.legend(frameon=False, fontsize=8, loc="best")
        for epoch, _ in begins[1:]:
            ax.axvline(epoch - 0.5, color=figures.GREY, linestyle=":", linewidth=1)
        ax.margins(x=0.03, y=0.12)
        figures.open_frame(ax)
        # Whole epochs, and no offsets such as +9.5e1.
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.ticklabel_format(axis="y", useOffset=False, style="plain")
    _name_phases(axes[3], begins)  # flips are few by then
    for ax in axes[3:]:
        ax.set_xlabel("epoch")
    axes[3].set_ylim(bottom=0)
    figure.suptitle(_caption(settings), fontsize=10)
    content = io.BytesIO()
    figures.save(figure, content)
    write_atomically(path, content.getvalue())
    return True


def _phases(entries: Sequence[_Entry]) -> list[tuple[int, str]]:
    """The first epoch and the name of each phase."""
    found: list[tuple[int, str]] = []
    for e in entries:
        if not found or found[-1][1] != e["phase"]:
            found.append((e["epoch"], e["phase"]))
    return found


def _name_phases(ax: Any, begins: Sequence[tuple[int, str]]) -> None:
    if 1 < len(begins) <= 3:  # more would not fit
        for epoch, name in begins[1:]:
            ax.annotate(
                f" {name}",
                (epoch - 0.5, 0.97),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=8,
                color=figures.GREY,
            )


def _caption(s: Settings) -> str:
    target = "" if s.sparsity is None else f" to {100 * s.sparsity:.6g} %"
    return f"{s.model} on {s.dataset}, {s.method}{target}, batch {s.batch}, seed {s.seed}"
