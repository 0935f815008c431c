"""Both layouts of a dense equilibrium: ``python -m bench.bench_mon_forms``.

Samples in the lanes (``by_feature``) or features (``by_sample``): milliseconds of a forward solve
in each, and which one the op takes. The constants in csrc/kernels/cpu/mon_samples.cpp stand on it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastprune as fp
from bench.harness import machine
from fastprune import timing
from fastprune.ops.mon_operator import LinearOperator, LinearStructure, Settings
from fastprune.reference.mon_splitting import Solution

FEATURES = (16, 32, 64, 87, 128, 200, 512, 1024)
BATCHES = (1, 4, 8, 16, 128)
METHODS = (("relu", "fb"), ("tanh", "fb"), ("relu", "pr"))
FORMS = ("by_feature", "by_sample")


def measure(n: int, batch: int, activation: str, solver: str, min_time: float) -> dict[str, Any]:
    """One case, interleaved with products of torch, so that caches are nobody's."""
    g = torch.Generator().manual_seed(0)

    def weight() -> Tensor:  # as nn.Linear starts
        return (torch.rand(n, n, generator=g) * 2 - 1) / n**0.5

    bias = torch.randn(batch, n, generator=g)
    operator = LinearOperator(
        weight(), weight(), 1.0, n, bias, LinearStructure(n, True, True, None, None)
    )
    alpha = 1.0 if solver == "pr" else 1.0 / (1.1 * operator.lipschitz) ** 2
    s = Settings(activation, solver, alpha, 1e-2, 300, False)

    def solve(form: str) -> Solution:
        fp._C.set_mon_form(form)
        try:
            return operator.solve(bias, s)
        finally:
            fp._C.set_mon_form("auto")

    calls: dict[str, Callable[[], object]] = {}
    for form in FORMS:
        calls[f"before {form}"] = lambda: [bias @ operator.w for _ in range(20)]
        calls[form] = lambda form=form: solve(form)
    times = timing.measure(calls, min_time=min_time)
    solved = solve("auto")
    taken = fp._C.last_mon_form()
    return {
        "features": n,
        "batch": batch,
        "activation": activation,
        "solver": solver,
        "iterations": int(solved.iterations),
        "ms": {form: 1e3 * times[form].median for form in FORMS},
        "taken": taken,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--min-time", type=float, default=0.2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = machine()
    print(", ".join(f"{k} {v}" for k, v in head.items()))
    table = Table(title="float32, tol 1e-2, one thread, ms per forward solve")
    for column in ("n", "batch", "method", "iterations", *FORMS, "ratio", "taken"):
        table.add_column(column, justify="right")
    rows = []
    for activation, solver in METHODS:
        for n in FEATURES:
            for batch in BATCHES:
                r = measure(n, batch, activation, solver, args.min_time)
                rows.append(r)
                feature, sample = (r["ms"][form] for form in FORMS)
                table.add_row(
                    *(str(n), str(batch), f"{activation}, {solver}", str(r["iterations"])),
                    *(f"{feature:.3f}", f"{sample:.3f}", f"{feature / sample:.2f}", r["taken"]),
                )
    Console(width=110).print(table)
    lost = [max(r["ms"][r["taken"]] / min(r["ms"].values()), 1.0) for r in rows]
    print(f"the layout taken over the better one: {max(lost):.2f} at most, of {len(rows)} cases")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": head, "rows": rows}, indent=1) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
