"""Per-layer counts of a set of masks, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSummary:
    """Counts of one mask: parameter ``name``, ``shape``, ``weights`` in all, ``kept`` of them."""

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int

    @property
    def density(self) -> float:
        """Kept fraction; 1.0 for an empty tensor."""
        return self.kept / self.weights if self.weights else 1.0

    @property
    def sparsity(self) -> float:
        """Pruned fraction; 0.0 for an empty tensor."""
        return (self.weights - self.kept) / self.weights if self.weights else 0.0

    @property
    def compression(self) -> float:
        """weights / kept; 1.0 for an empty tensor, infinity where nothing is kept."""
        return compression(self.weights, self.kept)


@dataclass(frozen=True)
class MasksSummary:
    """Counts of every mask in ``rows``, their sum in ``total``; ``str()`` gives a table."""

    rows: tuple[LayerSummary, ...]

    @property
    def total(self) -> LayerSummary:
        """The sum over all rows, named ``total``, with an empty shape."""
        return LayerSummary(
            "total", (), sum(r.weights for r in self.rows), sum(r.kept for r in self.rows)
        )

    def __str__(self) -> str:
        head = ("name", "shape", "weights", "kept", "density", "sparsity")
        return table(head, [_cells(row) for row in self.rows], _cells(self.total), left=2)


def compression(weights: int, kept: int) -> float:
    """weights / kept; 1.0 where there is nothing to prune, infinity where nothing is kept."""
    if not weights:
        return 1.0
    return weights / kept if kept else math.inf


def table(
    head: Sequence[str], body: Sequence[Sequence[str]], last: Sequence[str], left: int
) -> str:
    """Rows in columns, a rule above and below ``body``; the first ``left`` columns hold text."""
    widths = [max(len(row[i]) for row in (head, *body, last)) for i in range(len(head))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(row: Sequence[str]) -> str:
        # Text to the left, numbers to the right, so that digits stand under each other.
        pairs = enumerate(zip(row, widths, strict=True))
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in pairs]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), rule, *map(line, body), rule, line(last)])


def _cells(row: LayerSummary) -> tuple[str, ...]:
    return (
        row.name,
        "x".join(map(str, row.shape)),
        f"{row.weights:,}",
        f"{row.kept:,}",
        f"{shown(row.density, row.kept):.4f}",
        f"{shown(row.sparsity, row.weights - row.kept):.4f}",
    )


def shown(fraction: float, count: int) -> float:
    """``fraction`` rounded so that 0.0000 and 1.0000 are printed only when they are exact."""
    if fraction < 1.0 and count:
        return min(max(math.floor(fraction * 1e4 + 0.5) / 1e4, 1e-4), 1.0 - 1e-4)
    return fraction
