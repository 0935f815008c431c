"""The tables of ``demo`` and ``bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from fastprune.cli import machine, measuring, render

MODE_TITLES = {"inference": "forward pass", "training": "training step"}


def machine_lines(console: Console, description: dict[str, Any]) -> None:
    """The machine and the versions, above everything else."""
    for line in machine.lines(description):
        console.print(line)


def demo_header(
    console: Console,
    document: Mapping[str, Any],
    all_methods: Sequence[str],
    all_sparsities: Sequence[float],
) -> None:
    """What runs, on what, and what ``--quick`` leaves out."""
    settings = document["settings"]
    machine_lines(console, document["machine"])
    epochs = ", ".join(f"{name} {count} epochs" for name, count in settings["epochs"].items())
    steps = ", ".join(f"{method} {count}" for method, count in settings["steps"].items())
    console.print(
        f"digits (1297 to train, 500 to test), batch {settings['batch']}, seed {settings['seed']}; "
        f"{epochs}"
    )
    console.print(f"pruning steps at initialization: {steps}")
    if settings["quick"]:
        methods = [m for m in all_methods if m not in settings["methods"]]
        sparsities = [render.sparsity(s) for s in all_sparsities if s not in settings["sparsities"]]
        console.print(
            "quick: fewer epochs and pruning steps and shorter timings, so lower accuracy and more "
            f"noise; left out: {', '.join([*methods, *sparsities]) or 'nothing else'}",
            style="yellow",
        )


def demo_network(console: Console, network: Mapping[str, Any]) -> None:
    """One network's table: the dense row first, then every method."""
    columns = ["method", "sparsity", "accuracy"]
    for unit in ("step", "batch"):
        columns += [f"ms/{unit}\ndense", f"ms/{unit}\nsparse", f"{unit}\nspeedup"]
    table = render.table(
        f"\n{network['model']}, {network['parameters']:,} parameters", columns, ["method"], gap=0
    )
    dense = network["dense"]
    row: list[Any] = ["dense", render.sparsity(0), render.percent(dense["accuracy"])]
    for mode in measuring.MODES:
        row += [render.milliseconds(dense[mode]["median"]), "", ""]
    table.add_row(*row, end_section=True)
    results = network["results"]
    for index, result in enumerate(results):
        first = index == 0 or results[index - 1]["method"] != result["method"]
        last = index + 1 == len(results) or results[index + 1]["method"] != result["method"]
        row = [
            result["method"] if first else "",
            render.sparsity(result["sparsity"]),
            render.percent(result["accuracy"]),
        ]
        for mode in measuring.MODES:
            timed = result[mode]
            row += [
                render.milliseconds(timed["dense"]["median"]),
                render.milliseconds(timed["sparse"]["median"]),
                render.speedup(timed["speedup"], timed["disturbed"]),
            ]
        table.add_row(*row, end_section=last)
    console.print(table)
    lines = []
    for mode in measuring.MODES:
        lines += render.verdict([r[mode] for r in results], MODE_TITLES[mode])
    lines += [f"dense {MODE_TITLES[m]}: {dense[m]['form']}" for m in measuring.MODES]
    lines += [
        f"{r['method']} at {render.sparsity(r['sparsity'])}: {warning}"
        for r in results
        for warning in r["warnings"]
    ]
    render.notes(console, lines)


def demo_notes(console: Console, document: Mapping[str, Any]) -> None:
    """What the columns are."""
    batch = document["settings"]["batch"]
    console.print()
    render.notes(
        console,
        [
            "accuracy: on the 500 test digits, after the same training for every row.",
            f"step: one training step on {batch} digits: forward, loss, backward, SGD update.",
            f"batch: one inference pass over {batch} digits, BatchNorm folded.",
            "dense: the unpruned network in the fastest of its forms (contiguous or channels_last;",
            "for inference also with BatchNorm folded), timed in turn with the sparse network of",
            "the same row. Medians; quartiles are in the JSON file.",
            "sparse: fastprune.accelerate: each layer on the kernel that was faster here.",
        ],
    )


def bench_mode(console: Console, document: Mapping[str, Any], mode: measuring.Mode) -> None:
    """One mode's table: dense against weight x mask against fastprune."""
    settings = document["settings"]
    dense = document["dense"][mode]
    table = render.table(
        f"\n{settings['model']}, {MODE_TITLES[mode]}, batch {settings['batch']}: milliseconds",
        ("method", "sparsity", "dense", "weight x mask", "fastprune", "speedup", "sparse\nlayers"),
        ["method"],
    )
    for result in document["results"]:
        head = [result["method"], render.sparsity(result["sparsity"])]
        if "error" in result:
            table.add_row(*head, "failed")
            continue
        timed = result[mode]
        table.add_row(
            *head,
            *[render.spread(timed[key]) for key in ("dense", "masked", "sparse")],
            render.speedup(timed["speedup"], timed["disturbed"]),
            f"{timed['sparse_layers']}/{timed['layers']}",
        )
    console.print(table)
    cases = [r[mode] for r in document["results"] if mode in r]
    tried = ", ".join(
        f"{form} ({render.milliseconds(t['median'])})" for form, t in dense["tried"].items()
    )
    lines = [f"dense: {dense['form']}; tried, in ms: {tried}"]
    render.notes(console, [*lines, *render.verdict(cases, "fastprune")] if cases else lines)


def bench_layers(console: Console, result: Mapping[str, Any], mode: measuring.Mode) -> None:
    """The layers of one case: what each kernel took, and which was chosen."""
    table = render.table(
        f"\n{result['method']} at {render.sparsity(result['sparsity'])}, {MODE_TITLES[mode]}, "
        "by layer: milliseconds, median",
        ("layer", "kind", "weight", "kept", "dense", "sparse", "speedup", "chosen", "why"),
        ("layer", "why"),
    )
    for layer in result[mode]["report"]["layers"]:
        dense, sparse = layer["dense_ms"], layer["sparse_ms"]
        timed = dense is not None and sparse is not None
        table.add_row(
            layer["name"].removesuffix(".weight"),
            layer["kind"],
            "x".join(map(str, layer["shape"])),
            render.percent(layer["density"]),
            render.milliseconds(dense / 1e3) if timed else "-",
            render.milliseconds(sparse / 1e3) if timed else "-",
            render.speedup(dense / sparse) if timed else "-",
            layer["chosen"],
            layer["reason"],
        )
    console.print(table)


def bench_notes(console: Console, document: Mapping[str, Any]) -> None:
    """What the columns are; warnings and failures of single cases."""
    folds = any("folded" in t for d in document["dense"].values() for t in d["tried"])
    lines = [
        "dense: the unpruned network; weight x mask: the product computed in every forward pass,",
        "in the memory format that is fastest for dense; fastprune: fastprune.accelerate.",
        "All three timed in turn: median ± half the interquartile range. speedup: dense over",
        "fastprune. sparse layers: those on sparse kernels; the others were faster dense.",
    ]
    if folds:
        lines.append("forward pass: evaluation mode; fastprune folds BatchNorm, and so may dense.")
    if "training" in document["settings"]["modes"]:
        lines.append("training step: forward, cross entropy, backward, SGD with momentum.")
    for result in document["results"]:
        name = f"{result['method']} at {render.sparsity(result['sparsity'])}"
        lines += [f"{name}: {warning}" for warning in result.get("warnings", ())]
        if "error" in result:
            lines.append(f"{name} failed: {result['error']}")
    console.print()
    render.notes(console, lines)
