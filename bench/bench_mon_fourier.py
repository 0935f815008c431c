"""The convolutional monotone solve: ``python -m bench.bench_mon_fourier``.

Peaceman-Rachford with ReLU, ``--iterations`` steps and the last application, against the same loop
of torch ops with the same blocks per frequency: rfft2, batched complex products, irfft2.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import Row, machine, time_all
from fastprune.ops.mon_fourier import pack_blocks, solve_maps
from fastprune.peers.roofline import ceilings
from fastprune.reference import mon_splitting as plain


class Case(NamedTuple):
    """Channels, height and width of the padded map, images."""

    channels: int
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.channels} channels, {self.size} x {self.size}, batch {self.batch}"


CASES = [Case(81, 34, n) for n in (1, 4, 8, 16, 32)] + [Case(54, 30, 128), Case(81, 34, 128)]


def blocks_of(case: Case) -> tuple[Tensor, Tensor]:
    """W and its resolvent at step 1, complex64 (frequencies, n, n)."""
    torch.manual_seed(0)
    n, size = case.channels, (case.size, case.size)
    a, b = torch.randn(n, n, 3, 3), torch.randn(n, n, 3, 3)
    one = torch.tensor(1.0)
    w = plain.conv_blocks(a / a.norm(), b / b.norm(), 1.0, one, one, size)
    return w, torch.linalg.inv(2 * torch.eye(n) - w)


def torch_loop(bias: Tensor, w: Tensor, v: Tensor, iterations: int) -> Tensor:
    """The textbook loop on blocks per frequency."""
    size = (bias.shape[2], bias.shape[3])

    def multiply(blocks: Tensor, z: Tensor) -> Tensor:
        f = torch.fft.rfft2(z).flatten(2).permute(2, 1, 0)
        y = torch.bmm(blocks, f).permute(2, 1, 0)
        return torch.fft.irfft2(y.reshape(*z.shape[:3], -1), s=size)

    inside = plain.without_ring(torch.ones_like(bias[:1]), 1)
    z = torch.zeros_like(bias)
    u = z
    for _ in range(iterations):
        half = 2 * z - u
        u = 2 * multiply(v, half + bias) - half
        new = torch.relu(u) * inside
        residual = (new - z).norm() / (1e-6 + new.norm())
        z = new
        if residual.item() <= 0:
            break
    return torch.relu(multiply(w, z) + bias) * inside


def floor(case: Case, iterations: int, flops: float, bandwidth: float) -> float:
    """Seconds: three real products for a complex one and radix-2 transforms, or the bytes.

    Bytes of a step: the blocks; the spectrum read and written twice; bias and u read, u written.
    """
    n, points, maps = case.channels, case.size**2, case.channels * case.batch
    frequencies = points / 2
    work = 6 * frequencies * n * n * case.batch + 2 * maps * 2.5 * points * math.log2(points)
    moved = 8 * frequencies * n * n + 4 * maps * points * (4 + 3)
    return (iterations + 1) * max(work / flops, moved / bandwidth)


def measure_case(
    case: Case, iterations: int, flops: float, bandwidth: float, min_time: float
) -> Row:
    w, v = blocks_of(case)
    bias = torch.randn(case.batch, case.channels, case.size, case.size)
    size = (case.size, case.size)
    packed = pack_blocks(w, size), pack_blocks(v, size)
    times = time_all(
        {
            "torch": lambda: torch_loop(bias, w, v, iterations),
            "fastprune": lambda: solve_maps(
                bias, *packed, ring=1, alpha=1.0, tol=0.0, max_iter=iterations
            ),
        },
        min_time,
    )
    least = 1e3 * floor(case, iterations, flops, bandwidth)
    return Row("mon_fourier", str(case), 0.0, times, ("torch",), floor_ms=least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min-time", type=float, default=1.0, help="seconds per candidate")
    parser.add_argument("--json", type=Path, default=Path("out/bench_mon_fourier.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured = ceilings()
    head = {
        **machine(),
        "iterations": args.iterations,
        "ceiling_gflops": measured.flops / 1e9,
        "copy_gbytes": measured.bandwidth / 1e9,
    }
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    rows = []
    for case in CASES:
        row = measure_case(case, args.iterations, measured.flops, measured.bandwidth, args.min_time)
        rows.append(row)
        ms, least = 1e3 * row.times["fastprune"]["median"], row.floor_ms or math.nan
        print(
            f"{case}: torch {1e3 * row.best_dense:.1f} ms, fastprune {ms:.1f} ms, "
            f"{row.speedup():.1f}x, {ms / least:.1f} x floor"
        )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(
        json.dumps({"machine": head, "rows": [r.to_dict() for r in rows]}, indent=1)
    )
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
