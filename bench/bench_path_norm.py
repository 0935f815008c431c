"""Effective sparsity against one read of the masks, and against the papers' all-ones pass.

``taskset -c 0 python -m bench.bench_path_norm --json bench/results/path-norm-1-thread.json``
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import fastprune as fp
from bench.harness import machine
from fastprune import timing
from fastprune.reference import path_norm as reference


def _read(masks: dict[str, torch.Tensor]) -> int:
    """Every byte of the masks once, as words."""
    return sum(
        int(m.view(torch.uint8).flatten()[: m.numel() // 8 * 8].view(torch.int64).sum())
        for m in masks.values()
    )


def _all_ones(plain: torch.nn.Module, names: list[str], ones: torch.Tensor) -> None:
    weights = [p for n, p in plain.named_parameters() if n in names]
    torch.autograd.grad(plain(ones).sum(), weights)


def measure(name: str, size: int, sparsity: float, min_time: float) -> dict[str, Any]:
    """One network at one sparsity: medians in milliseconds."""
    model = fp.models.create(name).eval()
    x = torch.zeros(1, 3, size, size)
    masks = dict(fp.prune(model, "random", sparsity))
    plain = reference.linearized(model, masks)
    ones = torch.ones(1, 3, size, size, dtype=torch.float64)
    names = list(masks)
    found = fp.effective_sparsity(model, masks, example_input=x)
    warm = timing.measure(
        {
            "one read of the masks": lambda: _read(masks),
            "effective_sparsity": lambda: fp.effective_sparsity(model, masks, example_input=x),
        },
        min_time=min_time,
    )
    times = timing.measure(
        {
            "one read of the masks": lambda: _read(masks),
            "effective_sparsity": lambda: fp.effective_sparsity(model, masks, example_input=x),
            "effective_masks": lambda: fp.effective_masks(model, masks, example_input=x),
            "all-ones pass, float64": lambda: _all_ones(plain, names, ones),
        },
        min_time=min_time,
    )
    return {
        "network": name,
        "weights": sum(m.numel() for m in masks.values()),
        "sparsity": sparsity,
        "effective_sparsity": found,
        "ms": as_milliseconds(times),
        "warm_ms": as_milliseconds(warm),  # without the all-ones pass, which empties the caches
    }


def as_milliseconds(times: dict[str, timing.Timing]) -> dict[str, dict[str, float]]:
    """Median and quartiles."""
    return {
        k: {"median": 1e3 * t.median, "low": 1e3 * t.low, "high": 1e3 * t.high}
        for k, t in times.items()
    }


def search(name: str, size: int, target: float) -> dict[str, Any]:
    """Pruning to an effective sparsity: scores, and every step of the bisection."""
    model = fp.models.create(name).eval()
    x = torch.zeros(1, 3, size, size)
    masks = fp.prune(model, "magnitude", target, effective=True, example_input=x)  # traces
    times = timing.measure(
        {
            "to the direct sparsity": lambda: fp.prune(model, "magnitude", target),
            "to the effective sparsity": lambda: fp.prune(
                model, "magnitude", target, effective=True, example_input=x
            ),
        },
        min_time=2.0,
        min_rounds=3,
    )
    return {
        "network": name,
        "target": target,
        "effective_sparsity": fp.effective_sparsity(model, masks, example_input=x),
        "ms": as_milliseconds(times),
    }


def compressions(seeds: int) -> list[dict[str, Any]]:
    """LeNet-300-100 at 99 %: what random pruning and SynFlow leave (paper 003, section 1)."""
    model, x = fp.models.create("lenet-300-100"), torch.zeros(1, 1, 28, 28)
    rows = []
    for method in ("random", "synflow"):
        found = []
        for seed in range(seeds if method == "random" else 1):
            options = {"generator": torch.Generator().manual_seed(seed)}
            if method == "synflow":
                options = {"example_input": x}
            masks = fp.prune(model, method, 0.99, **options)
            found.append(fp.effective_compression(model, masks, example_input=x))
        rows.append({"method": method, "effective_compression": found})
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--min-time", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure("resnet50-imagenet", 224, s, options.min_time) for s in (0.9, 0.99)]
    for row in rows:
        medians = {k: t["median"] for k, t in row["ms"].items()}
        read, own = medians["one read of the masks"], medians["effective_sparsity"]
        print(
            f"{row['network']} at {100 * row['sparsity']:g} %: effective sparsity "
            f"{100 * row['effective_sparsity']:.3f} % in {own:.2f} ms, {own / read:.1f} times one "
            f"read of the masks ({read:.2f} ms); masks in {medians['effective_masks']:.2f} ms; "
            f"all-ones pass in float64 {medians['all-ones pass, float64']:.0f} ms, "
            f"{medians['all-ones pass, float64'] / own:.0f} times as long; by themselves, in warm "
            f"caches: {row['warm_ms']['effective_sparsity']['median']:.2f} and "
            f"{row['warm_ms']['one read of the masks']['median']:.2f} ms"
        )
    found = search("resnet50-imagenet", 224, 0.95)
    both = [found["ms"][f"to the {kind} sparsity"]["median"] for kind in ("effective", "direct")]
    print(
        f"{found['network']}, magnitude to an effective sparsity of {100 * found['target']:g} %: "
        f"{both[0]:.0f} ms (to a direct one: {both[1]:.0f} ms)"
    )
    lenet = compressions(20)
    for row in lenet:
        numbers = row["effective_compression"]
        print(
            f"lenet-300-100 at 99 %, {row['method']}: effective compression "
            f"{statistics.median(numbers):.0f} (median of {len(numbers)}, {min(numbers):.0f} to "
            f"{max(numbers):.0f})"
        )
    if options.json:
        tables = {"machine": machine(), "rows": rows, "search": found, "lenet-300-100": lenet}
        options.json.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
