"""Small batches and moderate sparsity: ``python -m bench.bench_masked_linear_bf16``.

masked_linear in bfloat16 (or ``--dtype``) against torch's dense product, on the weight as it is
and, where torch offers that, on the weight packed for its kernel; and against fastprune without the
processor's bfloat16 instructions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from bench.cases import SMALL_BATCH, SMALL_BATCH_SPARSITIES, Linear
from bench.harness import Row, machine, print_rows, time_all
from fastprune.peers.roofline import ceilings


def packed_linear(x: Tensor, weight: Tensor) -> Callable[[], object] | None:
    """torch's dense product on a weight in oneDNN's own order for this batch; None without it."""
    ops = torch.ops.mkldnn
    try:
        packed = ops._reorder_linear_weight(weight, x.shape[0])
        ops._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return lambda: ops._linear_pointwise(x, packed, None, "none", [], "")


def on_isa(isa: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call with the ISA capped; setting it costs well under a microsecond."""
    best = fp._C.isa()

    def run() -> None:
        fp._C.set_isa(isa)
        call()
        fp._C.set_isa(best)

    return run


def measure_case(
    case: Linear, dtype: torch.dtype, flops: float, bandwidth: float, min_time: float
) -> list[Row]:
    torch.manual_seed(0)
    x, w = torch.randn(case.batch, case.cols).to(dtype), torch.randn(case.rows, case.cols).to(dtype)
    rows = []
    for sparsity in SMALL_BATCH_SPARSITIES:
        pattern = fp.pack(torch.rand(case.rows, case.cols) < 1 - sparsity)

        def sparse(pattern: fp.Pattern = pattern) -> Tensor:
            return fp.masked_linear(x, w, pattern)

        dense: dict[str, Callable[[], object]] = {"dense": lambda: F.linear(x, w)}
        packed = packed_linear(x, w)
        if packed is not None:
            dense["dense, packed"] = packed
        others = {"fastprune": sparse}
        if fp._C.isa() == "avx512_bf16":
            others["without BF16"] = on_isa("avx512", sparse)
        times = time_all({**dense, **others}, min_time)
        # Each weight that exists once, a bit for every weight, activations in and out; products of
        # bfloat16 come two to an instruction.
        size, pairs = x.element_size(), 2 if dtype == torch.bfloat16 else 1
        moved = size * (pattern.nnz + case.batch * (case.rows + case.cols)) + w.numel() / 8
        floor = max(2 * pattern.nnz * case.batch / (pairs * flops), moved / bandwidth)
        rows.append(
            Row("masked_linear", str(case), sparsity, times, tuple(dense), floor_ms=1e3 * floor)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min-time", type=float, default=0.3, help="seconds per candidate")
    parser.add_argument("--json", type=Path, default=Path("out/bench_bf16.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured = ceilings()
    head = {**machine(), "dtype": args.dtype}
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    rows = []
    for case in SMALL_BATCH:
        rows += measure_case(
            case, getattr(torch, args.dtype), measured.flops, measured.bandwidth, args.min_time
        )
    print_rows(f"masked_linear: {args.dtype}, random mask, {args.threads} thread(s)", rows)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(
        json.dumps({"machine": head, "rows": [r.to_dict() for r in rows]}, indent=1)
    )
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
