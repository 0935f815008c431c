"""PNG plots of what ``deq`` measured: paper 000's Figures 1, 2 and D1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastprune import figures
from fastprune.cli.plots import axis, caption, position
from fastprune.equilibrium.findings import deviation, mean, of_kind

Curve = tuple[list[float], list[float], list[float]]


def folder(document: Mapping[str, Any], masks: Mapping[str, Tensor], path: Path) -> list[Path]:
    """Write all plots that the results allow; which."""
    written = [path / "figure-1.png"]
    curves(document, written[0])
    if of_kind(document, "equal size"):
        written.append(path / "figure-2.png")
        sizes(document, written[-1])
    if masks:
        written.append(path / "figure-d1.png")
        heat_maps(document, masks, written[-1])
    return written


def _points(document: Mapping[str, Any], kind: str, method: str, key: str, scale: float) -> Curve:
    """Positions, means and deviations over the seeds."""
    xs, ys, around = [], [], []
    for s in document["settings"]["sparsities"]:
        found = of_kind(document, kind, method=method, sparsity=s)
        value = mean(found, key)
        if value is not None:
            xs.append(position(s))
            ys.append(scale * value)
            around.append(scale * (deviation(found, key) or 0.0))
    return xs, ys, around


def _draw(ax: Any, points: Curve, index: int, label: str, style: str = "-") -> None:
    xs, ys, around = points
    if xs:
        ax.errorbar(
            xs,
            ys,
            yerr=around,
            color=figures.colour(index),
            marker=figures.marker(index),
            linestyle=style,
            markersize=5,
            linewidth=1.4,
            capsize=2,
            alpha=0.9,
            label=label,
        )


def _dense(ax: Any, document: Mapping[str, Any], key: str, scale: float) -> None:
    value = mean(of_kind(document, "parametrization", variant="full"), key)
    if value is not None:
        ax.axhline(scale * value, color=figures.GREY, ls="--", lw=1.2, label="dense")


def curves(document: Mapping[str, Any], path: Path) -> None:
    """Figure 1: accuracy (a) and forward iterations (b) against sparsity, by method.

    Args:
        document: what ``deq`` writes as JSON.
        path: of the PNG.
    """
    settings = document["settings"]
    made = figures.figure(1, 2)
    panels = made.subplots(1, 2)
    for ax, key, scale, label in zip(
        panels,
        ("accuracy", "iterations"),
        (100.0, 1.0),
        ("accuracy (%)", "iterations"),
        strict=True,
    ):
        axis(ax, settings["sparsities"], f"{settings['model']} on {settings['dataset']}", label)
        _dense(ax, document, key, scale)
        for index, method in enumerate(settings["methods"]):
            _draw(ax, _points(document, "pruned", method, key, scale), index, method)
    panels[1].set_ylim(bottom=0)
    _finish(made, document, path)


def sizes(document: Mapping[str, Any], path: Path) -> None:
    """Figure 2: sparse networks against dense ones of as many parameters, one panel per method."""
    settings = document["settings"]
    methods: Sequence[str] = settings["equal_size"]
    made = figures.figure(1, len(methods))
    for ax, method in zip(made.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        axis(ax, settings["sparsities"], method, "accuracy (%)")
        _draw(ax, _points(document, "pruned", method, "accuracy", 100.0), 0, "sparse")
        dense = _points(document, "equal size", method, "accuracy", 100.0)
        _draw(ax, dense, 1, "dense of equal size", "--")
    _finish(made, document, path)


def heat_maps(document: Mapping[str, Any], masks: Mapping[str, Tensor], path: Path) -> None:
    """Figure D1: which weights of U, A and B are kept; of a kernel, the share of its taps."""
    made = figures.figure(1, len(masks))
    image = None
    for ax, (name, mask) in zip(
        made.subplots(1, len(masks), squeeze=False)[0], masks.items(), strict=True
    ):
        density = mask.float().flatten(2).mean(2) if mask.dim() > 2 else mask.float()
        kept = 100.0 * float(mask.float().mean())
        image = ax.imshow(
            density.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        ax.set_title(f"{name}: {kept:.3g} % kept", fontsize=10)
    if image is not None:
        made.colorbar(image, ax=made.axes, shrink=0.8, label="kept")
    made.suptitle(caption(document["machine"]), fontsize=8)
    figures.save(made, path)


def _finish(made: Any, document: Mapping[str, Any], path: Path) -> None:
    figures.legend(made)
    made.suptitle(caption(document["machine"]), fontsize=8)
    figures.save(made, path)
