"""The tables of ``effective``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from fastprune.cli import render, tables


def header(console: Console, document: Mapping[str, Any]) -> None:
    """The machine and what runs."""
    tables.machine_lines(console, document["machine"])
    settings = document["settings"]
    seeds = settings["seeds"]
    console.print(
        f"{settings['model']}, {document['parameters']:,} parameters, untrained; input "
        f"{'x'.join(map(str, [settings['batch'], *settings['input_shape']]))}, data: "
        f"{settings['data']}; quota: {settings['quota'] or 'as the method chooses'}; seeds "
        f"{', '.join(map(str, seeds))}"
    )


def sparsity(fraction: float) -> str:
    """Five digits, so that 99.90 and 99.99 % differ; 100 % only for all."""
    text = f"{100 * fraction:.3f}"
    return "> 99.999 %" if text == "100.000" and fraction < 1 else f"{text} %"


def compression(value: float | None) -> str:
    """``97.3x``, ``1,042x``; nothing left: ``none left``."""
    if value is None or value == float("inf"):
        return "none left"
    return f"{value:.1f}x" if value < 100 else f"{value:,.0f}x"


def cases(document: Mapping[str, Any]) -> list[tuple[str, float, list[Mapping[str, Any]]]]:
    """Method, sparsity, and the results of all seeds that did not fail."""
    settings = document["settings"]
    return [
        (m, s, [r for r in document["results"] if (r["method"], r["sparsity"]) == (m, s)])
        for m in settings["methods"]
        for s in settings["sparsities"]
    ]


def summary(console: Console, document: Mapping[str, Any]) -> None:
    """A row for each method and sparsity: medians over the seeds."""
    settings = document["settings"]
    table = render.table(
        f"\n{settings['model']}: medians over {len(settings['seeds'])} seeds",
        (
            "method",
            "direct\nsparsity",
            "effective\nsparsity",
            "direct\ncompression",
            "effective\ncompression",
            "lowest to highest",
            "cut\noff",
            "prune\ns",
            "effective\nms",
        ),
        ["method"],
    )
    previous = None
    for method, wanted, results in cases(document):
        done = [r for r in results if "error" not in r]
        if previous not in (None, method):
            table.add_section()
        previous = method
        if not done:
            table.add_row(method, render.sparsity(wanted), "failed")
            continue
        effective = sorted(r["effective_compression"] for r in done)
        ends = [compression(effective[0]), compression(effective[-1])]
        cut = sum(not r["active"] for r in done)
        table.add_row(
            method,
            sparsity(_median([r["direct_sparsity"] for r in done])),
            sparsity(_median([r["effective_sparsity"] for r in done])),
            compression(_median([r["direct_compression"] for r in done])),
            compression(_median(effective)),
            " to ".join(dict.fromkeys(ends)),
            f"{cut}/{len(done)}" if cut else "",
            f"{_median([r['prune_seconds'] for r in done]):.2f}",
            render.milliseconds(_median([r["effective_seconds"] for r in done])),
        )
    console.print(table)
    _notes(console, document)


def _median(values: Sequence[float]) -> float:
    """Of an even number, the lower middle one: an infinity has no mean with a number."""
    return sorted(values)[(len(values) - 1) // 2]


def _notes(console: Console, document: Mapping[str, Any]) -> None:
    lines = [
        "effective: a weight counts if it is on a path of kept weights from an input to an output.",
        "cut off: networks without any such path. effective ms: not the first call, which traces.",
    ]
    for method, wanted, results in cases(document):
        name = f"{method} at {render.sparsity(wanted)}"
        for key, what in (("emptied", "emptied"), ("collapsed", "without an active weight")):
            seeds: dict[str, list[int]] = {}
            for result in results:
                for layer in result.get(key, ()):
                    if key == "emptied" or result["active"]:  # cut off, they all are
                        seeds.setdefault(layer, []).append(result["seed"])
            if seeds:
                named = [f"{layer.removesuffix('.weight')}" for layer in seeds]
                more = f" and {len(named) - 6} more" if len(named) > 6 else ""
                lines.append(f"{name}: layers {what}: {', '.join(named[:6])}{more}")
        errors = dict.fromkeys(r["error"] for r in results if "error" in r)
        lines += [f"{name} failed: {error}" for error in errors]
    render.notes(console, lines)


def layers(console: Console, document: Mapping[str, Any]) -> None:
    """Direct and effective compression of each layer, a table for each method and sparsity."""
    for method, wanted, results in cases(document):
        done = [r for r in results if "error" not in r]
        if not done:
            continue
        table = render.table(
            f"\n{method} at {render.sparsity(wanted)}, seed {done[0]['seed']}, by layer",
            ("layer", "weights", "kept", "active", "direct\ncompression", "effective\ncompression"),
            ["layer"],
        )
        for layer in done[0]["layers"]:
            weights, kept, active = (layer[key] for key in ("weights", "kept", "active"))
            table.add_row(
                layer["name"].removesuffix(".weight"),
                f"{weights:,}",
                f"{kept:,}",
                f"{active:,}",
                compression(weights / kept if kept else None),
                compression(weights / active if active else None),
            )
        console.print(table)
