"""Two threads over one: ``python -m bench.bench_scaling [--threads N] [--json FILE]``.

The kernels and torch's dense ops on the same shapes, 90 %, both thread counts in turn. What dense
gains says what the machine gives: virtual cores may share one core's units and memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import fastprune as fp
from bench.cases import CONV, LINEAR, Conv, Linear
from bench.harness import machine
from fastprune import timing


def calls(case: Linear | Conv) -> dict[str, Callable[[], object]]:
    """Our op and torch's on one shape."""
    torch.manual_seed(0)
    if isinstance(case, Linear):
        x, w = torch.randn(case.batch, case.cols), torch.randn(case.rows, case.cols)
        pattern = fp.pack(torch.rand(w.shape) < 0.1)
        return {
            "fastprune": lambda: fp.masked_linear(x, w, pattern),
            "dense": lambda: F.linear(x, w),
        }
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    w = torch.randn(case.channels, case.channels, case.kernel, case.kernel)
    pattern, padding = fp.pack(torch.rand(w.shape) < 0.1), case.kernel // 2
    return {
        "fastprune": lambda: fp.masked_conv2d(x, w, pattern, None, case.stride, padding),
        "dense": lambda: F.conv2d(x, w, None, case.stride, padding),
    }


def with_threads(call: Callable[[], object], threads: int) -> Callable[[], object]:
    def run() -> None:
        torch.set_num_threads(threads)
        call()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_scaling", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--min-time", type=float, default=0.3)
    parser.add_argument("--json", type=Path, default=Path("out/scaling.json"))
    args = parser.parse_args()
    table, rows = Table("case", "1 thread, ms", f"{args.threads} threads, ms", "gain", "dense"), []
    for case in (*LINEAR, *CONV):
        candidates = {
            f"{name}, {n}": with_threads(call, n)
            for name, call in calls(case).items()
            for n in (1, args.threads)
        }
        with torch.inference_mode():
            times = timing.measure(candidates, min_time=args.min_time)
        one, many = times["fastprune, 1"].median, times[f"fastprune, {args.threads}"].median
        dense = times["dense, 1"].median / times[f"dense, {args.threads}"].median
        rows.append({"case": str(case), "times": {k: t.to_dict() for k, t in times.items()}})
        table.add_row(
            str(case), f"{1e3 * one:.3f}", f"{1e3 * many:.3f}", f"{one / many:.2f}", f"{dense:.2f}"
        )
    Console(width=100).print(table)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
