"""The tables of ``deq``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from fastprune.cli import render, tables
from fastprune.equilibrium.findings import deviation, mean, of_kind

Results = Sequence[Mapping[str, Any]]


def header(console: Console, document: Mapping[str, Any]) -> None:
    """The machine and what runs."""
    tables.machine_lines(console, document["machine"])
    s = document["settings"]
    shape = "x".join(map(str, s["input_shape"]))
    console.print(
        f"{s['model']}, size {s['features']}, {document['parameters']:,} parameters; "
        f"{s['dataset']} {shape}; {s['epochs']} epochs of Adam, batch {s['batch']}, "
        f"lr {s['lr']:g}, a tenth every {s['decay_epochs']} epochs; solves to {s['tol']:g}, at "
        f"most {s['max_iter']} iterations; "
        f"seeds {', '.join(map(str, s['seeds']))}"
    )


def results(console: Console, document: Mapping[str, Any]) -> None:
    """All tables: methods, parametrizations, sizes, findings, failures."""
    _methods(console, document)
    _parametrizations(console, document)
    _sizes(console, document)
    _findings(console, document)
    failed = [r for r in document["results"] if "error" in r]
    notes = [f"failed: {r['kind']}, seed {r['seed']}, {_case(r)}: {r['error']}" for r in failed]
    notes += _unconverged(document)
    render.notes(console, notes)


def _case(result: Mapping[str, Any]) -> str:
    if "variant" in result:
        return str(result["variant"])
    return f"{result['method']} {render.sparsity(result['sparsity'])}"


def spread(found: Results, key: str, scale: float = 1.0, digits: int = 1) -> str:
    """Mean and deviation over the seeds: ``97.3 ±0.4``."""
    average, around = mean(found, key), deviation(found, key)
    if average is None:
        return "-"
    text = f"{scale * average:.{digits}f}"
    return text if around is None else f"{text} ±{scale * around:.{digits}f}"


def _methods(console: Console, document: Mapping[str, Any]) -> None:
    s = document["settings"]
    matrices = [n for n in ("U", "A", "B") if _has_matrix(document, n)]
    table = render.table(
        f"\n{s['model']} pruned at initialization and trained: mean and deviation over "
        f"{len(s['seeds'])} seeds (Figures 1 and D1, Table 1)",
        (
            "method",
            "sparsity",
            "accuracy\n%",
            "iterations",
            "solve dense\nms",
            "solve sparse\nms",
            "speedup",
            *(f"{n}\n% pruned" for n in matrices),
            "effective\nparameters",
        ),
        ["method"],
    )
    full = of_kind(document, "parametrization", variant="full")
    row = ["dense", "0 %", spread(full, "accuracy", 100), spread(full, "iterations")]
    table.add_row(*row, *[""] * (3 + len(matrices)), f"{document['parameters']:,}")
    for method in s["methods"]:
        table.add_section()
        for sparsity in s["sparsities"]:
            found = of_kind(document, "pruned", method=method, sparsity=sparsity)
            row = [method, render.sparsity(sparsity)]
            if not found:
                table.add_row(*row, "failed")
                continue
            row += [spread(found, "accuracy", 100), spread(found, "iterations")]
            row += [render.spread(_middle(found, form)) for form in ("dense", "sparse")]
            ratio = _middle(found, "dense")["median"] / _middle(found, "sparse")["median"]
            cells: list[Any] = [*row, render.speedup(ratio)]
            for n in matrices:
                tables_of = [{"x": r["matrices"][n]} for r in found]
                cells.append(spread(tables_of, "x", 100, 2))
            effective = mean(found, "effective_parameters")
            table.add_row(*cells, f"{effective:,.0f}" if effective is not None else "-")
    console.print(table)
    render.notes(
        console,
        [
            "solve: one forward pass of the trained implicit layer on a test batch, plain weights "
            "against masks, timed in turns; of the seeds the one in the middle, ± half the "
            "distance between the quartiles."
        ],
    )


def _has_matrix(document: Mapping[str, Any], name: str) -> bool:
    return any(name in r["matrices"] for r in of_kind(document, "pruned"))


def _middle(found: Results, form: str) -> Mapping[str, Any]:
    """The timing of the seed whose median is in the middle."""
    timings = sorted((r["solve"][form] for r in found), key=lambda t: t["median"])
    return timings[len(timings) // 2]  # type: ignore[no-any-return]


def _parametrizations(console: Console, document: Mapping[str, Any]) -> None:
    names = list(dict.fromkeys(r["variant"] for r in of_kind(document, "parametrization")))
    if len(names) < 2:
        return
    table = render.table(
        "\nThe parametrizations, dense (Table 2)",
        ("parametrization", "accuracy\n%", "iterations"),
        ["parametrization"],
    )
    for name in names:
        found = of_kind(document, "parametrization", variant=name)
        table.add_row(name, spread(found, "accuracy", 100, 2), spread(found, "iterations"))
    console.print(table)


def _sizes(console: Console, document: Mapping[str, Any]) -> None:
    s = document["settings"]
    if not of_kind(document, "equal size"):
        return
    table = render.table(
        "\nSparse against dense of equal size (Figure 2, Table D2)",
        (
            "method",
            "sparsity",
            "effective\nparameters",
            "dense\nsize",
            "dense\nparameters",
            "sparse\n%",
            "dense\n%",
        ),
        ["method"],
    )
    for method in s["equal_size"]:
        table.add_section()
        for sparsity in s["sparsities"]:
            wanted = {"method": method, "sparsity": sparsity}
            sparse, dense = (of_kind(document, k, **wanted) for k in ("pruned", "equal size"))
            if sparse and dense:
                table.add_row(
                    method,
                    render.sparsity(sparsity),
                    spread(sparse, "effective_parameters", digits=0),
                    spread(dense, "features"),
                    spread(dense, "parameters", digits=0),
                    spread(sparse, "accuracy", 100),
                    spread(dense, "accuracy", 100),
                )
    console.print(table)


def _findings(console: Console, document: Mapping[str, Any]) -> None:
    console.print("\nThe paper's findings, by these numbers", style="bold")
    for found in document["findings"]:
        verdict = "holds here" if found["holds"] else "does not hold here"
        console.print(f"  {found['finding']}: {verdict}", soft_wrap=True)
        console.print(f"    {found['numbers']}", style="dim", soft_wrap=True)


def _unconverged(document: Mapping[str, Any]) -> list[str]:
    cases = [r for r in document["results"] if r.get("unconverged")]
    if not cases:
        return []
    return [
        f"{len(cases)} of {len(document['results'])} networks had test batches whose solve stopped "
        "above the tolerance."
    ]
