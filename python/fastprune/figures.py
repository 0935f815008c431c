"""What all plots share: figures, colours, legends. matplotlib is imported when one is made."""

from __future__ import annotations

import importlib
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers too; grey is for dense.
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B",
)  # fmt: skip
_MARKERS = "osD^vP*X"
GREY = "#777777"


COLOURS = len(_COLOURS)


def colour(index: int) -> str:
    """One of eight, by number."""
    return _COLOURS[index % len(_COLOURS)]


def marker(index: int) -> str:
    """One of eight, by number."""
    return _MARKERS[index % len(_MARKERS)]


def figure(rows: int, columns: int, width: float = 4.3, height: float = 3.3) -> Any:
    """A figure on the Agg canvas: no display, and no change to the caller's pyplot backend.

    Args:
        rows, columns: of panels; ``width`` and ``height``: inches of each.
    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says what to do.
    """
    try:
        kind = importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plots need matplotlib: pip install "fastprune[demo]"', name=error.name
        ) from error
    made = kind(figsize=(width * columns + 0.4, height * rows + 0.9), layout="constrained")
    made.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(made)
    return made


def open_frame(ax: Any) -> None:
    """A faint grid, and no lines above and on the right."""
    ax.grid(alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def legend(figure: Any) -> None:
    """One legend for all panels, below them."""
    found: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=min(len(found), 5 * max(1, len(figure.axes) // 2)),
        frameon=False,
        fontsize=9,
    )


def save(figure: Any, path: Any) -> None:
    """Write a PNG."""
    figure.savefig(path, dpi=130, format="png")
