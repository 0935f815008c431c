"""From timings to statements: speedups, fractions of the roofline, aims met and missed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def ceilings(rows: Iterable[Row]) -> dict[str, float]:
    """Rates that this run measured: "copy" in bytes per second, dtypes in flops per second."""
    found = {}
    for row in rows:
        if row["section"] == "roofline" and row.get("ours") in row.get("times", {}):
            seconds = row["times"][row["ours"]]["median"]
            amount = row["bytes"] if "bytes" in row else row["flops"]
            found[row.get("rate", "copy")] = amount / seconds
    return found


def best(times: Mapping[str, Any], name: str) -> float | None:
    """The median of a candidate; of "dense", the best of its forms."""
    medians = [
        t["median"] for n, t in times.items() if n == name or (name == "dense" and "dense" in n)
    ]
    return min(medians, default=None)


def judge(aim: Row, times: Mapping[str, Any], own: float, copied: float | None) -> Row:
    """An aim with ``reached``, ``met`` (None: not measured) and ``text``."""
    reached: float | None
    if "at_most_seconds" in aim:
        wanted, reached = aim["at_most_seconds"], own
        text = f"at most {wanted * 1e6:.0f} us"
        met: bool | None = reached <= wanted
    elif "at_most_floor" in aim:
        wanted = aim["at_most_floor"]
        reached = None if copied is None else own / copied
        text = f"at most {wanted:g}x the reads and writes"
        met = None if reached is None else reached <= wanted
    else:
        other = best(times, aim["over"])
        wanted, reached = aim["at_least"], None if other is None else other / own
        text = f"{wanted:g}x over {aim['over']}"
        met = None if reached is None else reached >= wanted
    return {**aim, "text": text, "reached": reached, "met": met}


def analyse(rows: Sequence[Row], claims: bool) -> list[Row]:
    """The rows with what follows from their timings.

    Args:
        rows: as ``bench.cuda`` emits them: "times", "ours", and where they mean something "bytes",
            "flops", "rate" (of the ceiling), "aims".
        claims: whether aims and rooflines are judged; not in a dry run.
    Returns:
        Copies with "speedup" (name -> over it), "gbytes_per_second", "tflops", "roofline"
        (fraction of the ceiling that binds), "over_dense" and judged "aims".
    """
    rates = ceilings(rows) if claims else {}
    result = []
    for row in rows:
        done = dict(row)
        result.append(done)
        times = row.get("times", {})
        if row.get("ours") not in times:
            done["aims"] = [{**a, "met": None, "text": "not measured"} for a in row.get("aims", [])]
            continue
        own = times[row["ours"]]["median"]
        done["speedup"] = {n: t["median"] / own for n, t in times.items() if n != row["ours"]}
        dense = best(times, "dense") if row["section"] not in ("roofline", "forms") else None
        if dense is not None:
            done["over_dense"] = dense / own
        copied = None
        if "bytes" in row:
            done["gbytes_per_second"] = row["bytes"] / own / 1e9
            copied = row["bytes"] / rates["copy"] if "copy" in rates else None
        if "flops" in row:
            done["tflops"] = row["flops"] / own / 1e12
        computed = row["flops"] / rates[row["rate"]] if row.get("rate") in rates else None
        floors = [floor for floor in (copied, computed) if floor is not None]
        if floors and row["section"] != "roofline":
            done["roofline"] = max(floors) / own
        aims = row.get("aims", []) if claims else []
        done["aims"] = [judge(aim, times, own, copied) for aim in aims]
    return result


def dispatch(rows: Iterable[Row]) -> list[Row]:
    """One row per form, batch, density and dtype, "winner" in each: where the forms cross."""
    flat = []
    for row in rows:
        if row["section"] != "forms" or not row.get("times"):
            continue
        for form, timing in row["times"].items():
            key = {name: row[name] for name in ("batch", "density", "dtype", "tf32")}
            us = timing["median"] * 1e6
            flat.append({"form": form, **key, "us": us, "winner": row.get("winner")})
    return flat


_KINDS = {("bfloat16", False): "half", ("float32", True): "tf32", ("float32", False): "strict"}


def rules(rows: Iterable[Row]) -> list[Row]:
    """The measured winners as the dispatch has them (csrc/ops/masked_linear_choice_cuda.cpp).

    The first rule that holds decides: same "kind", batch at most "batch" (None: any), density at
    most "density". Between two measured densities the bound is their geometric mean.
    """
    won: dict[str, dict[int, dict[float, str]]] = {}
    for row in rows:
        if row["section"] == "forms" and "winner" in row:
            by_batch = won.setdefault(_KINDS[row["dtype"], row["tf32"]], {})
            by_batch.setdefault(row["batch"], {})[row["density"]] = row["winner"]
    table = []
    for kind_name, by_batch in won.items():
        steps: list[tuple[int, list[tuple[float, str]]]] = []
        for batch in sorted(by_batch):
            here = _segments(by_batch[batch])
            if steps and steps[-1][1] == here:
                steps.pop()
            steps.append((batch, here))
        for at, (batch, segments) in enumerate(steps):
            bound = None if at == len(steps) - 1 else batch
            table += [
                {"kind": kind_name, "batch": bound, "density": density, "form": form}
                for density, form in segments
            ]
    return table


def sampled(rows: Iterable[Row]) -> list[Row]:
    """Per case, up to which density a float32 weight gradient is better sampled at the mask.

    The largest measured density below which sampling always won, moved half way (by geometric
    mean) to the next one; 0.0 where it lost at the least, 1.0 where it never lost.
    """
    won: dict[str, dict[float, bool]] = {}
    for row in rows:
        if row["section"] == "weight_gradients" and "winner" in row:
            won.setdefault(row["case"], {})[row["density"]] = row["winner"] == "sampled"
    table = []
    for case, by_density in won.items():
        bound = 1.0
        below = 0.0
        for density in sorted(by_density):
            if not by_density[density]:
                bound = round(math.sqrt(below * density), 3)
                break
            below = density
        table.append({"case": case, "density": bound})
    return table


def _segments(winners: Mapping[float, str]) -> list[tuple[float, str]]:
    """Ascending bounds of density and the form up to each; the last one holds to 1."""
    densities = sorted(winners)
    segments = []
    for low, high in zip(densities, [*densities[1:], None], strict=True):
        if high is None:
            segments.append((1.0, winners[low]))
        elif winners[low] != winners[high]:
            segments.append((round(math.sqrt(low * high), 3), winners[low]))
    return segments


def troubles(document: Mapping[str, Any]) -> list[str]:
    """Everything that failed, a line each."""
    lines = []
    stages = document["stages"]
    for name, stage in stages.items():
        if stage["status"] not in ("ok", "left out"):
            why = stage.get("why", "")
            lines.append(f"stage {name}: {stage['status']}{': ' if why else ''}{why}")
        for run_name, run in (stage["runs"] if isinstance(stage.get("runs"), dict) else {}).items():
            if run["status"] != "ok":
                said = [
                    *run.get("summary", []),
                    *run.get("found", [])[:3],
                    *run.get("tail", [])[-2:],
                ]
                lines.append(f"{name}, {run_name}: {run['status']} {'; '.join(said)}".rstrip())
            lines += run.get("failures", [])
    bench = stages.get("bench", {})
    for name, section in bench.get("sections", {}).items():
        if section.get("error"):
            lines.append(f"bench, {name}: {section['error']}")
    for row in bench.get("rows", []):
        where = f"{row['section']}, {row['case']}"
        where += f", {100 * row['sparsity']:g} %" if "sparsity" in row else ""
        where += f", {row['dtype']}" if "dtype" in row else ""
        for key in ("wrong", "error"):
            if key in row:
                lines.append(f"bench, {where}: {key}: {row[key]}")
    return lines


def losses(rows: Iterable[Row]) -> list[str]:
    """Rows that are slower than the best dense form, worst first."""
    lost = [row for row in rows if row.get("over_dense", 1.0) < 1.0]
    lost.sort(key=lambda row: row["over_dense"])
    return [
        f"{row['over_dense']:.2f}x: {row['section']}, {row['case']}, {100 * row['sparsity']:g} %, "
        f"{kind(row)}"
        for row in lost
    ]


def kind(row: Row) -> str:
    """The dtype, and for float32 whether TF32 was allowed."""
    if "dtype" not in row:
        return str(row.get("rate", ""))
    if row["dtype"] != "float32" or "tf32" not in row:
        return str(row["dtype"])
    return "float32, TF32 on" if row["tf32"] else "float32, TF32 off"
