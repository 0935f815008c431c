"""Run the op benchmarks: ``python -m bench [--quick] [--ops ...] [--threads N] [--json FILE]``.

Tables go to the terminal, everything measured to the JSON file. The exit status is 1 when a case
that the project promises at least 2x at 90 % (bench/cases.py) falls short, on one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench import bench_masked_conv2d, bench_masked_linear
from bench.cases import PROMISED, PROMISED_SPEEDUP, SPARSITIES
from bench.harness import Row, machine, print_rows
from fastprune.peers.roofline import ceilings

OPS = {"masked_linear": bench_masked_linear.run, "masked_conv2d": bench_masked_conv2d.run}


def shortfalls(rows: list[Row]) -> list[Row]:
    promised = {str(case) for case in PROMISED}
    return [
        row
        for row in rows
        if row.case in promised and row.sparsity == 0.9 and row.speedup() < PROMISED_SPEEDUP
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="90 %% only, short measurements")
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), default=sorted(OPS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min-time", type=float, help="seconds per candidate")
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    min_time = args.min_time or (0.1 if args.quick else 0.3)
    measured = ceilings()
    flops, bandwidth = measured.flops, measured.bandwidth
    head = {**machine(), "ceiling_gflops": flops / 1e9, "copy_gbytes": bandwidth / 1e9}
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    results, short = [], []
    for op in args.ops:
        tables = OPS[op](flops, bandwidth, min_time, (0.9,) if args.quick else SPARSITIES)
        for name, rows in tables.items():
            print_rows(f"{op}, {name}: float32, random mask, {args.threads} thread(s)", rows)
            results.append({"op": op, "direction": name, "rows": [r.to_dict() for r in rows]})
        short += shortfalls(tables["forward"])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": head, "tables": results}, indent=1))
    print(f"written to {args.json}")
    for row in short if args.threads == 1 else []:
        print(f"SHORT of {PROMISED_SPEEDUP}x: {row.op} {row.case}: {row.speedup():.2f}x")
    return 1 if short and args.threads == 1 else 0


if __name__ == "__main__":
    sys.exit(main())
