"""Equilibrium solves against the same loops written with torch operations, on the same thread.

``python -m bench.bench_mon_splitting --json bench/results/mon-splitting-1-thread.json``

"torch loop" multiplies by A, A^T, B and B^T in turn, as Winston and Kolter's programs do;
"torch loop, W whole" by one precomputed W. Peaceman-Rachford: both read a resolvent that was made
before, as fastprune does; what making it costs is listed apart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.cases import MON_CONV, MON_LINEAR, MonConv, MonLinear
from bench.harness import machine
from fastprune import timing
from fastprune.ops.mon_conv_operator import ConvOperator
from fastprune.ops.mon_operator import LinearOperator, LinearStructure, Operator, Settings
from fastprune.reference import mon_splitting as plain

Map = Callable[[Tensor], Tensor]
TOL, MAX_ITER = 1e-2, 300


def forward_loop(multiply: Map, invert: Map | None, b: Tensor, alpha: float, ring: int) -> Tensor:
    """The textbook, in torch operations."""
    z, u, error, steps = torch.zeros_like(b), torch.zeros_like(b), 1.0, 0
    while error > TOL and steps < MAX_ITER:
        if invert is None:
            new = (1 - alpha) * z + alpha * (multiply(z) + b)
        else:
            half = 2 * z - u
            u = 2 * invert(half + alpha * b) - half
            new = u
        new = cut(torch.relu(new), ring)
        error = (new - z).norm().item() / (1e-6 + new.norm().item())
        z = new
        steps += 1
    return cut(torch.relu(multiply(z) + b), ring)


def adjoint_loop(
    multiply: Map, invert: Map | None, grad: Tensor, slope: Tensor, alpha: float
) -> Tensor:
    """The adjoint equation in the form with D = (1 - J) / J of methods that divide by J."""
    off = slope == 0
    d = torch.where(off, 0.0, (1 - slope) / slope)
    v = slope * grad
    z, u, error, steps = torch.zeros_like(grad), torch.zeros_like(grad), 1.0, 0
    while error > TOL and steps < MAX_ITER:
        if invert is None:
            new = (1 - alpha) * z + alpha * multiply(z)
        else:
            half = 2 * z - u
            u = 2 * invert(half) - half
            new = u
        new = (new + alpha * (1 + d) * v) / (1 + alpha * d)
        new[off] = v[off]
        error = (new - z).norm().item() / (1e-6 + new.norm().item())
        z = new
        steps += 1
    return slope * (grad + multiply(z))


def cut(z: Tensor, ring: int) -> Tensor:
    """Zeros in the border, written in place."""
    if ring:
        z[:, :, :ring] = 0
        z[:, :, -ring:] = 0
        z[:, :, :, :ring] = 0
        z[:, :, :, -ring:] = 0
    return z


def row(
    case: str,
    operator: Operator,
    loops: dict[str, tuple[Map, Map, Map | None, Map | None]],
    bias: Tensor,
    s: Settings,
    min_time: float,
) -> list[dict[str, Any]]:
    """Forward and adjoint: median, quartiles and ratios in one run."""
    rows = []
    solved = operator.solve(bias, s)
    slope = plain.slope(solved.out, "relu")
    grad = torch.randn(bias.shape, generator=torch.Generator().manual_seed(1))
    for direction in ("forward", "backward"):
        forward = direction == "forward"
        found = solved if forward else operator.adjoint(grad, slope, s, True)
        calls: dict[str, Callable[[], object]] = {}
        for name, (multiply, back, invert, invert_back) in loops.items():
            if forward:
                calls[name] = lambda m=multiply, i=invert: forward_loop(
                    m, i, bias, s.alpha, operator.ring
                )
            else:
                calls[name] = lambda m=back, i=invert_back: adjoint_loop(m, i, grad, slope, s.alpha)
            error = (calls[name]() - found.out).abs().max() / found.out.abs().max()
            # Another count of iterations would be another amount of work.
            assert error < 1e-3, (case, direction, name, float(error))
        if forward:
            calls["fastprune"] = lambda: operator.solve(bias, s)
        else:
            calls["fastprune"] = lambda: operator.adjoint(grad, slope, s, True)
        times = timing.measure(calls, min_time=min_time)
        rows.append(
            {
                "case": case,
                "solver": s.solver,
                "direction": direction,
                "alpha": s.alpha,
                "iterations": int(found.iterations),
                "ms": {
                    k: {"median": 1e3 * t.median, "low": 1e3 * t.low, "high": 1e3 * t.high}
                    for k, t in times.items()
                },
                "speedup": times["torch loop"].median / times["fastprune"].median,
            }
        )
    return rows


def linear(case: MonLinear, min_time: float) -> list[dict[str, Any]]:
    """A fully connected layer."""
    g = torch.Generator().manual_seed(0)
    n = case.features

    def weight() -> Tensor:  # as nn.Linear starts
        return (torch.rand(n, n, generator=g) * 2 - 1) / n**0.5

    A, B = weight(), weight()
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    if case.sparsity:
        a_mask, b_mask = (torch.rand(n, n, generator=g) >= case.sparsity for _ in range(2))
        A, B, masks = A * a_mask, B * b_mask, (a_mask, b_mask)
    bias = torch.randn(case.batch, n, generator=g)
    operator = LinearOperator(A, B, 1.0, n, bias, LinearStructure(n, True, True, *masks))
    w = operator.w
    rows = []
    for solver in ("fb", "pr"):
        alpha = 1.0 if solver == "pr" else 1.0 / (1.1 * operator.lipschitz) ** 2
        v = torch.linalg.inv((1 + alpha) * torch.eye(n) - alpha * w)
        pr: tuple[Map | None, Map | None] = (None, None)
        if solver == "pr":
            pr = (lambda z, v=v: z @ v.t()), (lambda z, v=v: z @ v)
        # With m = 1 the identity's part of W is zero.
        loops = {
            "torch loop": (
                lambda z: -((z @ A.t()) @ A) + z @ B.t() - z @ B,
                lambda z: -((z @ A.t()) @ A) - z @ B.t() + z @ B,
                *pr,
            ),
            "torch loop, W whole": ((lambda z: z @ w.t()), (lambda z: z @ w), *pr),
        }
        s = Settings("relu", solver, alpha, TOL, MAX_ITER, False)
        rows += row(str(case), operator, loops, bias, s, min_time)
    return rows


def conv(case: MonConv, min_time: float) -> list[dict[str, Any]]:
    """A single convolution."""
    g = torch.Generator().manual_seed(0)
    n, size = case.channels, case.size + 2

    def kernel() -> tuple[Tensor, Tensor | None]:
        weight = (torch.rand(n, n, 3, 3, generator=g) * 2 - 1) / (9 * n) ** 0.5
        mask = torch.rand(n, n, 3, 3, generator=g) >= case.sparsity
        weight = weight * mask
        return weight / weight.norm(), mask if case.sparsity else None

    (A, a_mask), (B, b_mask) = kernel(), kernel()
    bias = torch.randn(case.batch, n, size, size, generator=g)
    one = torch.ones(())
    operator = ConvOperator(A, B, one, one, 1.0, 1, bias, a_mask, b_mask)
    textbook = operator.plain()

    def circular(z: Tensor) -> Tensor:
        return torch.nn.functional.pad(z, (1, 1, 1, 1), mode="circular")

    def multiply(z: Tensor, sign: float) -> Tensor:
        conv2d, transposed = torch.nn.functional.conv2d, torch.nn.functional.conv_transpose2d
        down = conv2d(circular(z), A)
        skew = conv2d(circular(z), B) - transposed(circular(z), B)[:, :, 2:-2, 2:-2]
        return sign * skew - transposed(circular(down), A)[:, :, 2:-2, 2:-2]

    rows = []
    for solver in ("fb", "pr"):
        alpha = 1.0 if solver == "pr" else 1.0 / (1.1 * operator.lipschitz) ** 2
        pr: tuple[Map | None, Map | None] = (None, None)
        if solver == "pr":
            pr = textbook.resolvent(alpha), textbook.resolvent_transposed(alpha)
        loops = {"torch loop": ((lambda z: multiply(z, 1)), (lambda z: multiply(z, -1)), *pr)}
        s = Settings("relu", solver, alpha, TOL, MAX_ITER, False)
        rows += row(str(case), operator, loops, bias, s, min_time)
    return rows


def preparation() -> list[dict[str, Any]]:
    """What a change of the weights costs before the next solve, in milliseconds, once each."""
    rows = []
    for case in (*MON_LINEAR, *MON_CONV):
        g = torch.Generator().manual_seed(0)
        is_linear = isinstance(case, MonLinear)
        n = case.features if isinstance(case, MonLinear) else case.channels
        for solver in ("fb", "pr"):
            start = time.perf_counter()
            s = Settings("relu", solver, 0.1, TOL, 1, False)
            made: Operator
            if is_linear:
                weight = torch.rand(n, n, generator=g)
                mask = torch.rand(n, n, generator=g) >= case.sparsity if case.sparsity else None
                bias = torch.zeros(1, n)
                structure = LinearStructure(n, True, True, mask, mask)
                start = time.perf_counter()  # the structure changes with the masks only
                made = LinearOperator(weight, weight, 1.0, n, bias, structure)
            else:
                assert isinstance(case, MonConv)
                weight, one = torch.rand(n, n, 3, 3, generator=g), torch.ones(())
                bias = torch.zeros(1, n, case.size + 2, case.size + 2)
                start = time.perf_counter()
                made = ConvOperator(weight, weight, one, one, 1.0, 1, bias)
            made.solve(bias, s)
            rows.append(
                {"case": str(case), "solver": solver, "ms": 1e3 * (time.perf_counter() - start)}
            )
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--min-time", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head = machine()
    print(", ".join(f"{k} {v}" for k, v in head.items()))
    with torch.no_grad():
        rows = [r for case in MON_LINEAR for r in linear(case, args.min_time)]
        rows += [r for case in MON_CONV for r in conv(case, args.min_time)]
        prepared = preparation()
    table = Table(title=f"float32, tol {TOL:g}, {args.threads} thread(s)")
    for column in ("case", "solver", "direction", "iterations", "torch loop ms", "W whole ms"):
        table.add_column(column)
    for column in ("fastprune ms", "quartiles", "speedup", "over W whole"):
        table.add_column(column, justify="right")
    for r in rows:
        ms, whole = r["ms"], r["ms"].get("torch loop, W whole")
        own = ms["fastprune"]
        table.add_row(
            r["case"],
            r["solver"],
            r["direction"],
            str(r["iterations"]),
            f"{ms['torch loop']['median']:.3f}",
            f"{whole['median']:.3f}" if whole else "-",
            f"{own['median']:.3f}",
            f"{own['low']:.3f} - {own['high']:.3f}",
            f"{r['speedup']:.1f}",
            f"{whole['median'] / own['median']:.1f}" if whole else "-",
        )
    Console(width=150).print(table)
    for r in prepared:
        print(
            f"first solve after a change of weights, {r['case']}, {r['solver']}: {r['ms']:.1f} ms"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": head, "tol": TOL, "rows": rows, "preparation": prepared}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
