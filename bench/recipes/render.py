"""A report's document as text, Markdown and PNG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Document = Mapping[str, Any]
Cell = Mapping[str, Any]

_OTHER = ("failed", "unsupported", "missing")


def measured(cell: Cell) -> str:
    """What was measured: mean, deviation, and what did not end well; "*": did not converge."""
    seeds = sum(cell["states"].values())
    bad = cell["collapsed"] + cell["states"].get("diverged", 0)
    if cell["converged"] is False:
        text = "*"
    elif cell["mean"] is None:
        text = next((s for s in _OTHER if s in cell["states"]), "-")
        return text if seeds == cell["states"].get(text, seeds) else f"{text} and others"
    else:
        text = _number([cell["mean"], cell["deviation"]])
        if bad:
            text += f" ({bad} of {seeds} *)"
    ended = cell["states"].get("done", 0) + cell["states"].get("diverged", 0)
    return text if ended == seeds else f"{text} ({ended} of {seeds} runs)"


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    mean, deviation = value if isinstance(value, list) else (value, None)
    digits = 2 if abs(mean) >= 1 else 4
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def full(cell: Cell) -> str:
    """Measured, the paper's in brackets, and the difference."""
    text = measured(cell)
    if cell["paper"] is None:
        return text
    text += f" [{_number(cell['paper'])}]"
    return text if cell["difference"] is None else f"{text} {cell['difference']:+.2f}"


def grid(document: Document, table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: methods against sparsities, or numbers of prunings against methods."""
    names, rows = document["methods"], table["rows"]
    methods = [m for m in names if any(m in r["cells"] for r in rows)]
    if table["by"] == "round":
        head = ["prunings", *(names[m] for m in methods)]
        return head, [[str(r["round"]), *(full(r["cells"][m]) for m in methods)] for r in rows]
    head = ["", "epochs", *(f"{100 * r['sparsity']:g} %" for r in rows)]
    lines = []
    for method in methods:
        cells = [r["cells"].get(method) for r in rows]
        shown = []
        for row, cell in zip(rows, cells, strict=True):
            text = "" if cell is None else full(cell)
            reached = None if cell is None else cell["sparsity"]
            if reached is not None and reached and abs(reached - row["sparsity"]) > 2e-3:
                text += f" at {100 * reached:.2f} %"
            shown.append(text)
        lines.append([names[method], _epochs(cells), *shown])
    return head, lines


def _epochs(cells: list[Cell | None]) -> str:
    found = list(dict.fromkeys(f"{c['epochs']:g}" for c in cells if c and c["epochs"] is not None))
    return " / ".join(found) or "-"


def _caption(document: Document, table: Mapping[str, Any]) -> str:
    parts = [table["label"], table["figure"], table["unit"]]
    text = ": ".join(p for p in parts if p)
    return text + (f" (trained: {table['trained']})" if document["reduced"] else "")


def _head(document: Document) -> Iterator[str]:
    source = ", ".join(document["covers"])
    yield document["title"] + (f" (paper {document['paper']}, {source})" if source else "")
    if document["reduced"]:
        yield "Reduced: a small network on digits, few epochs. Only orders compare with the paper."
    yield "Mean ± deviation over seeds [the paper's] difference; * did not converge."
    cells = [c for t in document["tables"] for r in t["rows"] for c in r["cells"].values()]
    if any(c["values"] for c in cells) and all(len(c["values"]) < 2 for c in cells):
        yield "One seed: no deviations, and small differences mean nothing."


def _tail(document: Document) -> Iterator[str]:
    for machine in document["machines"]:
        yield "Trained on: " + ", ".join(f"{key} {value}" for key, value in machine.items())
    names = document["methods"]

    def chain(methods: list[str], by: str = " > ") -> str:
        return by.join(names[m] for m in methods)

    for table in document["tables"]:
        for row in table["rows"]:
            order = row["order"]
            if order is None or len(order["here"]) < 2:
                continue
            place = row.get("sparsity", row.get("round"))
            at = f"at {100 * place:g} %" if table["by"] == "sparsity" else f"after {place} prunings"
            yield f"{table['label']} {at}, {table['unit']}: here {chain(order['here'])}"
            yield f"  in the paper {chain(order['paper'])}: {order['agree']} pairs agree" + (
                f", {len(order['within'])} within the deviations" if order["within"] else ""
            )
            for better, worse in order["disagree"]:
                yield f"  DISAGREE: the paper has {names[better]} ahead of {names[worse]}"
    for claim in document["claims"]:
        at = "" if claim.get("sparsity") is None else f" at {100 * claim['sparsity']:g} %"
        yield f"Claim: {claim['text']}{at}{_case(claim)}: {claim['verdict'].upper()}"
        if len(claim.get("here", [])) > 1:
            yield f"  claimed {chain(claim['order'])}; here {chain(claim['here'])}"
    for text in document["findings"]:
        yield f"The paper finds: {text}"
    for text in document["notes"]:
        yield f"Note: {text}"
    yield from problems(document)


def _case(claim: Mapping[str, Any]) -> str:
    return f" ({claim['case']})" if claim.get("case") else ""


def problems(document: Document) -> Iterator[str]:
    """Jobs that are not done, those with the same reason in one line."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, job in document["jobs"].items():
        if job["state"] != "done":
            last = (job["message"].splitlines() or [""])[-1]
            found.setdefault((job["state"], last), []).append(name)
    for (state, reason), names in found.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        yield f"{state}: {', '.join(names[:2])}{more}" + (f": {reason}" if reason else "")


def text(document: Document, console: Console) -> None:
    """Print a report."""
    for line in _head(document):
        console.print(line, markup=False, highlight=False)
    for table in document["tables"]:
        head, rows = grid(document, table)
        made = Table(*head, title=_caption(document, table), title_justify="left")
        for row in rows:
            made.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(made)
    for line in _tail(document):
        console.print(line, markup=False, highlight=False)


def markdown(document: Document) -> str:
    """The tables and verdicts, for a README."""
    lines = list(_head(document))
    for table in document["tables"]:
        head, rows = grid(document, table)
        lines += ["", _caption(document, table), "", "| " + " | ".join(head) + " |"]
        lines.append("|" + "---|" * len(head))
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(f"* {line.strip()}" for line in _tail(document)), ""]
    return "\n".join(lines)


def png(document: Document, path: Path) -> bool:
    """Each table as a panel: measured solid, the paper's dashed; False if there is nothing."""
    from fastprune import figures

    tables = [t for t in document["tables"] if len(t["rows"]) > 1]
    if not tables:
        return False
    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    figure = figures.figure(rows, columns)
    for number, table in enumerate(tables):
        ax = figure.add_subplot(rows, columns, number + 1)
        _panel(ax, document, table)
    figures.legend(figure)
    figures.save(figure, path)
    return True


def _panel(ax: Any, document: Document, table: Mapping[str, Any]) -> None:
    from fastprune import figures

    ax.set_title(f"{table['label']} {table['figure']}".strip(), fontsize=10)
    by_sparsity = table["by"] == "sparsity"
    for number, (method, label) in enumerate(document["methods"].items()):
        here, paper = [], []
        for row in table["rows"]:
            cell = row["cells"].get(method)
            if cell is None:
                continue
            at = 100 * row["sparsity"] if by_sparsity else row["round"]
            if cell["mean"] is not None:
                here.append((at, cell["mean"], cell["deviation"] or 0.0))
            said = cell["paper"][0] if isinstance(cell["paper"], list) else cell["paper"]
            if isinstance(said, (int, float)):
                paper.append((at, said))
        style = {"color": figures.colour(number), "marker": figures.marker(number)}
        again = "-" if number < figures.COLOURS else "-."  # the second time round
        if here:
            x, y, error = zip(*here, strict=True)
            ax.errorbar(x, y, error, label=label, linewidth=1.4, markersize=4, ls=again, **style)
        if paper:
            x, y = zip(*paper, strict=True)
            name = f"{label}, paper"
            ax.plot(x, y, "--", label=name, linewidth=1, markersize=3, alpha=0.6, **style)
    ax.set_xlabel("sparsity, %" if by_sparsity else "prunings")
    ax.set_ylabel(table["unit"], fontsize=8)
    figures.open_frame(ax)
