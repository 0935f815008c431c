"""Plots of masks: which connections remain, how much of each layer, and how much of it matters.

matplotlib is needed (``pip install "fastprune[demo]"``) and imported at the first plot. Each
function returns the ``matplotlib`` figure, so that it can be changed, and writes a PNG to ``path``
if there is one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastprune import figures
from fastprune.masks import readable

Path = str | os.PathLike[str]
_MOST_COLUMNS = 6


@dataclass(frozen=True)
class LayerCount:
    """Weights of one layer: in all, kept, and active (or None where that is not known)."""

    name: str
    weights: int
    kept: int
    active: int | None = None


@dataclass(frozen=True)
class Point:
    """One pruned network: a curve's label, and its direct and effective density (kept fraction)."""

    label: str
    direct: float
    effective: float


def layer_counts(
    masks: Mapping[str, Tensor], effective: Mapping[str, Tensor] | None = None
) -> list[LayerCount]:
    """Counts of each mask; ``effective``: what :func:`fastprune.effective_masks` made of them.

    Raises:
        TypeError, ValueError: what is no mapping of names to bool tensors; ``effective`` has other
            names.
    """
    known = readable(masks)
    active = None if effective is None else readable(effective)
    if active is not None and set(active) != set(known):
        raise ValueError("effective: expected masks of the same names as masks")
    return [
        LayerCount(n, m.numel(), int(m.sum()), None if active is None else int(active[n].sum()))
        for n, m in known.items()
    ]


def heat_map(masks: Mapping[str, Tensor], *, path: Path | None = None) -> Any:
    """Where the connections are: a panel per mask, out x in, dark where many are kept.

    The entries of a convolution's kernel are averaged for each pair of channels.

    Args:
        masks: parameter name -> bool tensor; those of less than two dimensions are left out.
        path: of the PNG, if one is wanted.
    Returns:
        The figure.
    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError, ValueError: as :class:`fastprune.Masks`; no mask has two dimensions.
    Paper: 000, Figure D1.
    """
    shown = {n: m for n, m in readable(masks).items() if m.dim() > 1 and m.numel()}
    if not shown:
        raise ValueError("masks: expected at least one mask of two dimensions")
    columns = min(_MOST_COLUMNS, math.ceil(math.sqrt(len(shown))))
    rows = -(-len(shown) // columns)
    figure = figures.figure(rows, columns, 2.7, 2.6)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    image = None
    for ax, (name, mask) in zip(axes, shown.items(), strict=False):
        averages = mask.reshape(*mask.shape[:2], -1).float().mean(2).cpu()
        image = ax.imshow(
            averages.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        share = 100 * float(mask.float().mean())
        ax.set_title(f"{name}\n{'x'.join(map(str, mask.shape))}, {share:.3g} % kept", fontsize=7)
        ax.tick_params(labelsize=6)
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True, nbins=5, min_n_ticks=1)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    figure.supxlabel("in", fontsize=8)
    figure.supylabel("out", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.03, aspect=40)
    bar.set_label("kept fraction of the kernel", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return _written(figure, path)


def layer_bars(
    layers: Mapping[str, Sequence[LayerCount]], *, title: str = "", path: Path | None = None
) -> Any:
    """Compression of each layer, a bar for each label; where known, the effective one beyond it.

    The solid part of a bar ends at the direct compression (weights over kept weights), the pale
    part at the effective one (over active weights). A layer without any has a bar to the top and an
    arrow above it.

    Args:
        layers: label (a method, say) -> :func:`layer_counts`, of the same layers for all labels.
        title: above the panel.
        path: of the PNG, if one is wanted.
    Returns:
        The figure.
    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing to show, or the labels have different layers.
    Paper: 003, Figure 7.
    """
    names = [[c.name for c in counts] for counts in layers.values()]
    if not names or not names[0] or any(n != names[0] for n in names):
        raise ValueError("layers: expected counts of the same layers, at least one, for each label")
    figure = figures.figure(1, 1, max(4.3, 0.5 + 0.25 * len(names[0]) * (1 + len(names) / 3)), 3.6)
    draw_bars(figure.subplots(), layers)
    figure.axes[0].set_title(title, fontsize=10, pad=14)
    figures.legend(figure)
    return _written(figure, path)


def draw_bars(ax: Any, layers: Mapping[str, Sequence[LayerCount]]) -> None:
    """The bars of :func:`layer_bars` on an axis."""
    first = next(iter(layers.values()))
    finite = [
        c.weights / n for counts in layers.values() for c in counts for n in (c.kept, c.active) if n
    ]
    top = 10 ** math.ceil(math.log10(1.5 * max([10.0, *finite])))
    width = 0.8 / len(layers)
    for i, (label, counts) in enumerate(layers.items()):
        for place, c in enumerate(counts):
            x = place + (i - (len(layers) - 1) / 2) * width
            direct, beyond = (
                c.weights / n if n else top
                for n in (c.kept, c.kept if c.active is None else c.active)
            )
            style = {"color": figures.colour(i), "width": 0.92 * width, "bottom": 1.0}
            ax.bar(x, beyond - 1, alpha=0.35, **style)
            ax.bar(x, direct - 1, **style, label=label if place == 0 else None)
            if beyond >= top:
                ax.plot(
                    [x], [1.02], marker="^", markersize=4, color=figures.colour(i), clip_on=False,
                    transform=ax.get_xaxis_transform(),
                )  # fmt: skip
    total = sum(c.weights for c in first) or 1
    ax.set_yscale("log")
    ax.set_ylim(1, top)
    ax.set_xticks(
        range(len(first)),
        [f"{c.name.removesuffix('.weight')} ({100 * c.weights / total:.2g} %)" for c in first],
        rotation=90 if len(first) > 8 else 30,
        ha="center" if len(first) > 8 else "right",
        fontsize=7,
    )
    ax.set_ylabel("compression: direct, and effective (pale)")
    ax.margins(x=0.02)
    figures.open_frame(ax)


def compression_curves(
    points: Sequence[Point], *, title: str = "", path: Path | None = None
) -> Any:
    """Effective against direct compression, a curve for each label.

    Points of one label whose direct densities agree to one part in a thousand (seeds) are averaged,
    densities arithmetically; a band reaches from the smallest to the largest. Networks in which
    nothing is active are left out. The diagonal is where nothing kept is inactive.

    Args:
        points: any number, in any order.
        title: above the panel.
        path: of the PNG, if one is wanted.
    Returns:
        The figure.
    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no points.
    Paper: 003, Figures 2 and 3.
    """
    if not points:
        raise ValueError("points: expected at least one")
    figure = figures.figure(1, 1)
    draw_curves(figure.subplots(), points)
    figure.axes[0].set_title(title, fontsize=10)
    figures.legend(figure)
    return _written(figure, path)


def draw_curves(ax: Any, points: Sequence[Point]) -> None:
    """The curves of :func:`compression_curves` on an axis."""
    for i, label in enumerate(dict.fromkeys(p.label for p in points)):
        curve: list[tuple[float, float, float, float]] = []
        for group in _seeds([p for p in points if p.label == label and p.direct > 0]):
            if active := [p.effective for p in group if p.effective > 0]:
                mean = sum(active) / len(active)
                curve.append((1 / group[0].direct, 1 / mean, 1 / max(active), 1 / min(active)))
        if not curve:
            continue
        x, y, least, most = zip(*curve, strict=True)
        colour = figures.colour(i)
        ax.plot(x, y, color=colour, marker=figures.marker(i), markersize=5, lw=1.4, label=label)
        ax.fill_between(x, least, most, color=colour, alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    low, high = ax.get_xlim()
    ax.plot([low, high], [low, high], color=figures.GREY, linestyle="--", linewidth=1, zorder=0)
    ax.set_xlim(low, high)
    ax.set_xlabel("direct compression")
    ax.set_ylabel("effective compression")
    figures.open_frame(ax)


def _seeds(points: list[Point]) -> list[list[Point]]:
    """Points in order of density, those of nearly the same one together."""
    groups: list[list[Point]] = []
    for p in sorted(points, key=lambda p: -p.direct):
        if groups and p.direct >= groups[-1][0].direct * (1 - 1e-3):
            groups[-1].append(p)
        else:
            groups.append([p])
    return groups


def _written(figure: Any, path: Path | None) -> Any:
    if path is not None:
        figures.save(figure, path)
    return figure
