"""The tables of ``bench --peers``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from fastprune.cli import render, tables
from fastprune.peers import summary
from fastprune.peers.compare import OWN

_KINDS = {"linear": "matrix products", "conv": "convolutions", "all": "all layers"}


def header(console: Console, document: Mapping[str, Any], title: str) -> None:
    """The machine, every peer and its version, the ceilings, what runs."""
    tables.machine_lines(console, document["machine"])
    peers, settings = document["peers"], document["settings"]
    versions = {
        package: version for peer in peers.values() for package, version in peer["versions"].items()
    }
    console.print("peers: " + ", ".join(f"{p} {v}" for p, v in versions.items()), soft_wrap=True)
    for name, peer in peers.items():
        if peer["reason"] is not None:
            console.print(f"without {name}: {peer['reason']}", style="yellow", soft_wrap=True)
    ceilings = document["ceilings"]
    console.print(
        f"ceilings measured now: {ceilings['flops'] / 1e9:.0f} GFLOP/s of multiply-adds from the "
        f"L1 cache, {ceilings['bandwidth'] / 1e9:.1f} GB/s of a large copy"
    )
    console.print(
        f"{title}; masks {', '.join(settings['masks'])}, seed {settings['seed']}"
        + ("; quick: few layers, short timings, more noise" if settings["quick"] else "")
    )


def outcome(result: Mapping[str, Any]) -> str:
    """One result in a line of the log."""
    if result["speedup"] is None or result["speedup_over_best_peer"] is None:
        return "not compared"
    return (
        f"{result['speedup']:.2f}x over dense, {result['speedup_over_best_peer']:.2f}x over "
        f"{result['best_peer']}"
    )


def _cell(candidate: Mapping[str, Any] | None, own: bool) -> Text:
    """Milliseconds, and the speedup over the baseline below them."""
    if candidate is None or candidate["status"] == "not available":
        return Text("-")
    if candidate["status"] != "timed":
        return Text(candidate["status"], style="bold red")
    cell = Text(render.milliseconds(candidate["median"]))
    if candidate["speedup"] is not None:
        speedup = render.speedup(candidate["speedup"])
        cell.append("\n").append_text(speedup if own else Text(speedup.plain))
    return cell


def _calls(number: float | None) -> str:
    """After how many calls the packing is paid for."""
    if number is None:
        return "never"
    return f"{math.ceil(number)} call{'s' if number > 1 else ''}"


def _heading(name: str) -> str:
    """A candidate's name on as many lines as it has words, as columns are narrow."""
    return name.replace(" x ", " x\n").replace(" ", "\n", 1) if name != OWN else name


def cases(console: Console, document: Mapping[str, Any]) -> None:
    """A table per kind of layer, mask and sparsity, a row per layer."""
    settings = document["settings"]
    for kind in ("linear", "conv"):
        for mask in settings["masks"]:
            for sparsity in settings["sparsities"]:
                chosen = [
                    r
                    for r in document["results"]
                    if (r["kind"], r["mask"], r["sparsity"]) == (kind, mask, sparsity)
                ]
                if chosen:
                    what = f"{_KINDS[kind]}, {mask} masks, {render.sparsity(sparsity)}"
                    _cases(console, f"\n{settings['set']}: {what}", chosen)


def _cases(console: Console, title: str, results: Sequence[Mapping[str, Any]]) -> None:
    names = [
        name
        for name in results[0]["candidates"]
        if any(r["candidates"][name]["status"] != "not available" for r in results)
    ]
    peers = [name for name in names if name != OWN]
    table = render.table(
        f"{title}: milliseconds, and speedup over the best dense float32 of torch",
        (
            "layer",
            *[_heading(name) for name in peers],
            OWN,
            "over best\npeer",
            "floor\nreached",
            "spread",
            "packing ms,\npays after",
        ),
        ("layer",),
    )
    for result in results:
        own = result["candidates"][OWN]
        over, reached = result["speedup_over_best_peer"], result["roofline"]
        spread, pays = summary.spread(result), result["pays_after"]
        packing = own.get("prepare_seconds")
        table.add_row(
            result["case"] + (f"\n{result['count']} of these" if result["count"] > 1 else ""),
            *[_cell(result["candidates"][name], own=False) for name in peers],
            _cell(own, own=True),
            "-" if over is None else render.speedup(over).append(f"\n{result['best_peer']}"),
            "-" if reached is None else f"{100 * reached:.0f} %",
            "-" if spread is None else f"±{100 * spread:.1f}%",
            "-" if packing is None else f"{render.milliseconds(packing)}\n{_calls(pays)}",
        )
    console.print(table)


def means(console: Console, document: Mapping[str, Any]) -> None:
    """Geometric means: a table per kind and batch, a row per mask and sparsity."""
    split: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for group in document["means"]:
        split.setdefault((group["kind"], group["batch"]), []).append(group)
    for (kind, batch), groups in split.items():
        what = _KINDS[kind] + ("" if batch is None else f", batch {batch}")
        _means(console, f"\n{document['settings']['set']}: {what}", groups)


def _means(console: Console, title: str, groups: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(n for g in groups for n in g["speedup"] if n != OWN))
    table = render.table(
        f"{title}: geometric means of the speedup over the best dense float32 of torch",
        (
            "masks",
            "sparsity",
            *[_heading(name) for name in names],
            OWN,
            "over best\npeer",
            "slower than\ndense, peer",
            "sum, ms\nbest dense",
            f"\n{OWN}",
        ),
        ("masks",),
    )
    for group in groups:
        speedup, over, seconds = (
            group["speedup"],
            group["speedup_over_best_peer"],
            group["seconds"],
        )
        table.add_row(
            group["mask"],
            render.sparsity(group["sparsity"]),
            *[f"{speedup[name]:.2f}x" if name in speedup else "-" for name in names],
            render.speedup(speedup[OWN]) if OWN in speedup else "-",
            "-" if over is None else render.speedup(over),
            f"{group['slower_than_dense']}, {group['slower_than_best_peer']} of {group['cases']}",
            *[
                "-" if seconds[key] is None else render.milliseconds(seconds[key])
                for key in ("dense", OWN)
            ],
        )
    console.print(table)


def troubles(document: Mapping[str, Any]) -> list[str]:
    """Candidates that were wrong or failed, and where."""
    return [
        f"{r['case']}, {r['mask']} {render.sparsity(r['sparsity'])}: {name} {c['status']}: "
        f"{c['reason']}"
        for r in document["results"]
        for name, c in r["candidates"].items()
        if c["status"] in ("wrong", "failed")
    ]


def _losses(results: Sequence[Mapping[str, Any]], key: str, what: str) -> str:
    compared = [r for r in results if r[key] is not None]
    lost = [r for r in compared if r[key] < 1]
    if not lost:
        return f"{OWN}: faster than {what} in all of {len(compared)} cases."
    worst = min(lost, key=lambda r: r[key])
    return (
        f"{OWN}: slower than {what} in {len(lost)} of {len(compared)} cases, the worst "
        f"{worst[key]:.2f}x: {worst['case']}, {worst['mask']} {render.sparsity(worst['sparsity'])}."
    )


def notes(console: Console, document: Mapping[str, Any]) -> None:
    """Losses, troubles, and what the columns are."""
    results = document["results"]
    lines = [
        _losses(results, "speedup", "the best dense float32 of torch"),
        _losses(results, "speedup_over_best_peer", "the best peer"),
        *troubles(document),
        "All candidates of a row timed in turn: medians; quartiles are in the JSON file. In turn",
        "also means that a call finds little of its data in the inner caches, as in a network.",
        "Every result was checked against float64 first. Each candidate has operands in the layout",
        "that suits it; packing and loading are not timed, unfolding for a CSR convolution is.",
        "best peer: the fastest float32 candidate but fastprune; bfloat16 is another dtype.",
        "floor reached: the time that flops and bytes of the sparse product take at the ceilings",
        "over fastprune's time. spread: the largest ± of the baseline, the best peer, fastprune.",
        "packing: once, before the first call; paid for against the best dense float32 of torch.",
        "Means count a layer as often as the network has it, and so do sums.",
    ]
    console.print()
    render.notes(console, lines)
