"""PNG plots of what ``demo``, ``bench`` and ``effective`` measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprune import figures
from fastprune.effective.plots import LayerCount, Point, draw_bars, draw_curves

_MOST_PANELS = 9


def position(sparsity: float) -> float:
    """Where a sparsity goes: logarithmic in density, so that 90, 99 and 99.9 % are equidistant."""
    return -math.log10(1 - sparsity)


def axis(ax: Any, sparsities: Sequence[float], title: str, label: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("sparsity")
    ax.set_ylabel(label)
    values = sorted(set(sparsities))
    ax.set_xticks([position(s) for s in values], [f"{100 * s:.6g} %" for s in values])
    ax.margins(x=0.06)
    figures.open_frame(ax)


def _lines(
    ax: Any,
    results: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    value: Callable[[Mapping[str, Any]], float | None],
    style: str = "-",
    suffix: str = "",
) -> None:
    """One line per method through its results in order of sparsity."""
    for index, method in enumerate(methods):
        points = []
        for result in results:
            if result["method"] == method and (y := value(result)) is not None:
                points.append((position(result["sparsity"]), y))
        if points:
            points.sort()
            ax.plot(
                *zip(*points, strict=True),
                style,
                color=figures.colour(index),
                marker=figures.marker(index),
                markersize=5,
                markerfacecolor=figures.colour(index) if style == "-" else "white",
                linewidth=1.4,
                alpha=0.9,
                label=method + suffix,
            )


def _level(ax: Any, height: float) -> None:
    ax.axhline(height, color=figures.GREY, linestyle="--", linewidth=1.2, label="dense")


def _speedups_from_zero(ax: Any) -> None:
    """The axis begins at 0, so that heights compare as the speedups do."""
    _level(ax, 1.0)
    ax.set_ylim(0, 1.08 * max(1.1, ax.dataLim.y1))


def caption(machine: Mapping[str, Any]) -> str:
    device, threads = machine.get("gpu", machine["cpu"]), machine["threads"]
    return (
        f"{device}, {threads} thread{'s' if threads > 1 else ''}, {machine['isa']}, "
        f"{machine['dtype']}, fastprune {machine['fastprune']}, torch {machine['torch']}"
    )


def _in_mode(mode: str, key: str) -> Callable[[Mapping[str, Any]], float | None]:
    def value(result: Mapping[str, Any]) -> float | None:
        timed = result.get(mode)
        return None if timed is None else timed.get(key)

    return value


def demo(document: Mapping[str, Any], path: Path) -> None:
    """Accuracy and both speedups against sparsity, one row of panels per network.

    Args:
        document: what ``demo`` writes as JSON.
        path: of the PNG.
    """
    methods = document["settings"]["methods"]
    networks = document["models"]
    figure = figures.figure(len(networks), 3)
    axes = figure.subplots(len(networks), 3, squeeze=False)
    for row, network in zip(axes, networks, strict=True):
        results = network["results"]
        name, sparsities = network["model"], [r["sparsity"] for r in results]
        axis(row[0], sparsities, f"{name}: accuracy", "test accuracy, %")
        _lines(row[0], results, methods, lambda r: 100 * float(r["accuracy"]))
        _level(row[0], 100 * network["dense"]["accuracy"])
        for ax, mode, title in (
            (row[1], "training", "training step"),
            (row[2], "inference", "inference batch"),
        ):
            axis(ax, sparsities, f"{name}: {title}", "speedup over best dense")
            _lines(ax, results, methods, _in_mode(mode, "speedup"))
            _speedups_from_zero(ax)
    figure.suptitle(caption(document["machine"]), fontsize=9)
    figures.legend(figure)
    figures.save(figure, path)


def bench(document: Mapping[str, Any], path: Path) -> None:
    """Speedup over best dense against sparsity, one panel per mode; weight x mask dotted.

    Args:
        document: what ``bench`` writes as JSON.
        path: of the PNG.
    """
    settings, results = document["settings"], document["results"]
    figure = figures.figure(1, len(settings["modes"]))
    axes = figure.subplots(1, len(settings["modes"]), squeeze=False)[0]

    def masked(mode: str) -> Callable[[Mapping[str, Any]], float | None]:
        def value(result: Mapping[str, Any]) -> float | None:
            timed = result.get(mode)
            return timed and timed["dense"]["median"] / timed["masked"]["median"]

        return value

    for ax, mode in zip(axes, settings["modes"], strict=True):
        title = {"inference": "forward", "training": "training step"}[mode]
        axis(ax, settings["sparsities"], f"{settings['model']}: {title}", "speedup over best dense")
        _lines(ax, results, settings["methods"], _in_mode(mode, "speedup"))
        _lines(ax, results, settings["methods"], masked(mode), ":", ", weight x mask")
        _speedups_from_zero(ax)
    figure.suptitle(f"{caption(document['machine'])}, batch {settings['batch']}", fontsize=8)
    figures.legend(figure)
    figures.save(figure, path)


def peers(document: Mapping[str, Any], path: Path) -> None:
    """Speedup over best dense against sparsity, a line per candidate.

    One panel per layer and kind of mask; geometric means over the set where those are too many.

    Args:
        document: what ``bench --peers`` writes as JSON.
        path: of the PNG.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    cases = {(r["case"], r["mask"]) for r in document["results"]}
    if len(cases) <= _MOST_PANELS:
        for result in document["results"]:
            timed = {n: c.get("speedup") for n, c in result["candidates"].items()}
            panels.setdefault(f"{result['case']}, {result['mask']} masks", []).append(
                {"sparsity": result["sparsity"], "speedup": timed}
            )
    else:
        for mean in document["means"]:
            batch = "" if mean["batch"] is None else f", batch {mean['batch']}"
            title = f"{document['settings']['set']}, {mean['kind']}{batch}, {mean['mask']} masks"
            panels.setdefault(f"{title}: geometric mean", []).append(mean)
    columns = min(3, len(panels))
    figure = figures.figure(-(-len(panels) // columns), columns)
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    own = "fastprune"
    shown = [n for n, peer in document["peers"].items() if not peer["dense_torch"] and n != own]
    shown.insert(0, own)
    for ax, (title, points) in zip(axes, panels.items(), strict=False):
        axis(ax, [p["sparsity"] for p in points], title, "speedup over best dense float32")
        for_lines = [
            {"method": name, "sparsity": p["sparsity"], "speedup": p["speedup"].get(name)}
            for p in points
            for name in shown
        ]
        _lines(ax, for_lines, shown, lambda result: result["speedup"])
        _speedups_from_zero(ax)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle(caption(document["machine"]), fontsize=8)
    figures.legend(figure)
    figures.save(figure, path)


def effective(document: Mapping[str, Any], path: Path) -> None:
    """Effective against direct compression, and each layer's at the highest sparsity.

    Args:
        document: what ``effective`` writes as JSON.
        path: of the PNG.
    """
    settings = document["settings"]
    results = [r for r in document["results"] if "error" not in r]
    points = [
        Point(r["method"], r["kept"] / r["prunable"], r["active"] / r["prunable"]) for r in results
    ]
    top = _best_shown(results)
    bars = {
        method: [LayerCount(**c) for c in r["layers"]]
        for method in settings["methods"]
        for r in results
        if (r["method"], r["sparsity"]) == (method, top) and r["seed"] == settings["seeds"][0]
    }
    width = 0.25 * len(results[0]["layers"]) * (1 + len(bars) / 3)
    figure = figures.figure(1, 1, 4.6 + max(4.6, width), 3.8)
    left, right = figure.subplots(1, 2, width_ratios=[4.6, max(4.6, width)])
    draw_curves(left, points)
    draw_bars(right, bars)
    seeds = len(settings["seeds"])
    left.set_title(f"{settings['model']}: mean and range of {seeds} seeds", fontsize=10)
    right.set_title(f"layers at {100 * top:.6g} % sparsity", fontsize=10, pad=14)
    quota = f", quota {settings['quota']}" if settings["quota"] else ""
    figure.suptitle(f"fastprune {document['machine']['fastprune']}{quota}", fontsize=8)
    figures.legend(figure)
    figures.save(figure, path)


def _best_shown(results: Sequence[Mapping[str, Any]]) -> float:
    """The highest sparsity at which most of the networks still have a path, or the lowest."""
    sparsities = sorted({r["sparsity"] for r in results}, reverse=True)
    for sparsity in sparsities:
        alive = [r["active"] > 0 for r in results if r["sparsity"] == sparsity]
        if 2 * sum(alive) >= len(alive):
            return float(sparsity)
    return float(sparsities[-1])
