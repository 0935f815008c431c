"""The report of ``gpu-check``: the same tables as Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from fastprune.cli import render
from fastprune.cli.gpu_check_analysis import Row, kind, losses, troubles

TITLES = {
    "roofline": "Ceilings, measured in this run",
    "batch_1": "One sample",
    "small_batch": "Small batches",
    "selection": "Selection, the best 10 %",
    "float32": "Strict float32",
    "large_batch": "Large batches, where dense is compute bound",
    "convolutions": "3 x 3 convolutions",
    "gradients": "Gradients, through autograd",
    "weight_gradients": "Weight gradients at the mask, strict float32, by form",
    "equilibria": "Equilibria of monotone operator networks, Peaceman-Rachford",
    "packing": "Packing, once per mask (wall clock)",
}


@dataclass
class Table:
    """A heading, columns, rows of text, remarks below."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += [
                "| " + " | ".join(self.columns) + " |",
                "|" + "---|" * len(self.columns),
                *("| " + " | ".join(row) + " |" for row in self.rows),
                "",
            ]
        return "\n".join([*lines, *(f"* {note}" for note in self.notes)]).rstrip() + "\n"

    def show(self, console: Console) -> None:
        """The table on the terminal."""
        if self.rows:
            table = render.table(f"\n{self.title}", self.columns, self.columns[:1])
            for row in self.rows:
                table.add_row(*row)
            console.print(table)
        else:
            console.print(f"\n{self.title}")
        render.notes(console, self.notes)


def us(seconds: float) -> str:
    """Microseconds with three digits."""
    value = seconds * 1e6
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def tables(document: Mapping[str, Any]) -> list[Table]:
    """All tables, what failed first."""
    rows: list[Row] = document["stages"].get("bench", {}).get("rows", [])
    made = [_stages(document)]
    if failed := troubles(document):
        made.append(Table("What failed", (), notes=failed))
    if aims := _aims(rows):
        made.append(aims)
    for section, title in TITLES.items():
        chosen = [row for row in rows if row["section"] == section]
        if chosen:
            made.append(_section(title, chosen))
    made += _forms([row for row in rows if row["section"] == "forms"])
    if measured := document.get("rules"):
        lines = [
            f"{{Kind::{r['kind']}, {r['batch'] or 'kAnyBatch'}, {r['density']:g}, "
            f"CudaForm::{r['form']}}},"
            for r in measured
        ]
        made.append(Table("The winners as a dispatch table", (), notes=lines))
    if thresholds := document.get("sampled"):
        lines = [f"{t['case']}: density {t['density']:g}" for t in thresholds]
        title = "Float32 weight gradients are better sampled up to (kSampledDensity)"
        made.append(Table(title, (), notes=lines))
    if rows and not document["dry_run"]:
        lost = losses(rows)
        made.append(Table(f"Slower than the best dense form: {len(lost)} rows", (), notes=lost))
    return made


def head(document: Mapping[str, Any]) -> list[str]:
    """What was checked, where and when."""
    m = document["machine"]
    lines = [
        f"{document['date']}, commit {document['commit']}",
        f"{m.get('gpu', 'no GPU')}, driver {m.get('driver')}, CUDA {m.get('cuda')}, cuDNN "
        f"{m.get('cudnn')}, {m['cpu']}, {m['cores']} cores",
        f"fastprune {m['fastprune']} for {', '.join(m['targets'])}, torch {m['torch']}, Python "
        f"{m['python']}, {m['os']}",
        "Times are medians (quartiles) of device time, candidates in turn, caches cold; each "
        "candidate in a CUDA graph over copies of its operands, or (*) launched singly.",
    ]
    if document["dry_run"]:
        lines.append("DRY RUN: tiny shapes on the CPU. The figures mean nothing.")
    return lines


def _stages(document: Mapping[str, Any]) -> Table:
    table = Table("Stages", ("stage", "outcome", "seconds", "details"))
    for name, stage in document["stages"].items():
        details = []
        if isinstance(stage.get("runs"), dict):
            for run_name, run in stage["runs"].items():
                counted = ", ".join(f"{n} {word}" for word, n in run.get("counts", {}).items())
                said = counted or "; ".join(run.get("summary", [])) or run["status"]
                details.append(f"{run_name}: {said}")
        if "targets" in stage:
            details.append(", ".join(stage["targets"]))
        if stage.get("rows"):
            details.append(f"{len(stage['rows'])} rows")
        seconds = f"{stage['seconds']:.0f}" if "seconds" in stage else "-"
        table.rows.append([name, stage["status"], seconds, "; ".join(details)])
    return table


def _aims(rows: Sequence[Row]) -> Table | None:
    table = Table("Aims", ("case", "sparsity", "dtype", "aim", "reached", "met"))
    counted = {True: 0, False: 0, None: 0}
    for row in rows:
        for aim in row.get("aims", []):
            counted[aim["met"]] += 1
            reached = aim.get("reached")
            value = "-" if reached is None else f"{reached:.2f}x"
            if reached is not None and "at_most_seconds" in aim:
                value = f"{us(reached)} us"
            met = {True: "yes", False: "NO", None: "not measured"}[aim["met"]]
            table.rows.append([row["case"], _sparsity(row), kind(row), aim["text"], value, met])
    table.notes = [f"{counted[True]} met, {counted[False]} missed, {counted[None]} not measured"]
    return table if table.rows else None


def _sparsity(row: Row) -> str:
    return render.sparsity(row["sparsity"]) if "sparsity" in row else "-"


def _timing(timing: Mapping[str, Any]) -> str:
    star = "*" if timing["how"] == "launched" else ""
    return f"{us(timing['median'])} ({us(timing['low'])}-{us(timing['high'])}){star}"


def _section(title: str, rows: Sequence[Row]) -> Table:
    """Our time, then every other candidate's with the speedup over it."""
    timed = [row for row in rows if row.get("times")]
    own = next((row["ours"] for row in timed), "fastprune")
    others = list(dict.fromkeys(n for row in timed for n in row["times"] if n != row["ours"]))
    columns = ["case", "sparsity", "dtype", f"{own} us", *(f"{n} us (over it)" for n in others)]
    table = Table(title, [*columns, "GB/s", "TFLOP/s", "of roofline", "aims"])
    if own == "copy":
        table.columns = ("case", "us", "GB/s", "TFLOP/s")
    for row in rows:
        times = row.get("times", {})
        if row.get("ours") not in times:
            why = (
                row.get("skipped") or row.get("error") or row.get("failed", {}).get(row.get("ours"))
            )
            table.notes.append(f"{row['case']}, {_sparsity(row)}, {kind(row)}: {why}")
            continue
        rates = [
            f"{row[key]:,.{digits}f}" if key in row else "-"
            for key, digits in (("gbytes_per_second", 0), ("tflops", 1))
        ]
        if own == "copy":
            table.rows.append([row["case"], _timing(times[row["ours"]]), *rates])
            continue
        cells = [row["case"], _sparsity(row), kind(row), _timing(times[row["ours"]])]
        for name in others:
            if name in times:
                cells.append(f"{us(times[name]['median'])} ({row['speedup'][name]:.2f}x)")
            else:
                cells.append("-")
        met = {True: "met", False: "MISSED", None: "?"}
        aims = ", ".join(f"{aim['text']}: {met[aim['met']]}" for aim in row.get("aims", []))
        part = f"{100 * row['roofline']:.0f} %" if "roofline" in row else "-"
        table.rows.append([*cells, *rates, part, aims or "-"])
    reasons = dict.fromkeys(f"{n}: {r}" for row in rows for n, r in row.get("failed", {}).items())
    table.notes += list(reasons)[:5]
    if "2:4 us (over it)" in table.columns:
        table.notes.append(
            "2:4 is another mask, a half of the weights at any sparsity: its time alone compares."
        )
    return table


def _forms(rows: Sequence[Row]) -> list[Table]:
    """Per dtype: the fastest form at every density (rows) and batch (columns)."""
    made = []
    for name in dict.fromkeys(kind(row) for row in rows):
        chosen = [row for row in rows if kind(row) == name and row.get("times")]
        batches = sorted({row["batch"] for row in chosen})
        if not batches:
            continue
        table = Table(
            f"Fastest form, {chosen[0]['case'].split(',')[0]}, {name}: over F.linear, and what the "
            "dispatch loses to it",
            ["density", *(f"batch {batch}" for batch in batches)],
        )
        for density in sorted({row["density"] for row in chosen}, reverse=True):
            cells = [f"{density:g}"]
            for batch in batches:
                row = next(
                    (r for r in chosen if r["density"] == density and r["batch"] == batch), None
                )
                cells.append("-" if row is None else _winner(row))
            table.rows.append(cells)
        made.append(table)
    return made


def _winner(row: Row) -> str:
    times = {name: timing["median"] for name, timing in row["times"].items()}
    won = row.get("winner", "auto")
    if won not in times:
        return "-"
    text = f"{won} {times['F.linear'] / times[won]:.2f}x" if "F.linear" in times else won
    lost = times["auto"] / times[won] - 1 if "auto" in times else 0.0
    return text if lost < 0.03 else f"{text} (auto +{100 * lost:.0f} %)"
