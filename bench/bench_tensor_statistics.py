"""Statistics of 25.6M elements: ``python -m bench.bench_tensor_statistics``.

Against what one writes without fastprune: torch's and numpy's separate operations, each of which
reads the tensor once more and some of which write a temporary. The floor is one read (torch's
sum), measured in the same interleaved run. Then single exponents, other dtypes, a restriction, and
data that is not normal; then the layers of a network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastprune as fp
from bench.harness import as_times, machine, print_times
from fastprune.timing import Timing, measure

Fns = dict[str, Callable[[], object]]
TABLES: dict[str, Any] = {}  # what was measured, for the file


def report(title: str, times: dict[str, Timing], unit: str) -> None:
    print_times(title, times, unit)
    TABLES[title] = as_times(times)


def torch_gini(w: Tensor) -> Tensor:
    x = w.abs().sort().values
    n = x.numel()
    weights = torch.arange(1 - n, n, 2, dtype=torch.float64)
    return torch.dot(weights, x.double()) / (n * x.sum(dtype=torch.float64))


def numpy_gini(w: np.ndarray) -> float:
    x = np.sort(np.abs(w))
    n = x.size
    weights = np.arange(1 - n, n, 2, dtype=np.float64)
    return float(weights @ x / (n * x.sum(dtype=np.float64)))


def torch_norms(w: Tensor, p: tuple[float, ...]) -> Callable[[], object]:
    return lambda: (
        w.sum(dtype=torch.float64),
        w.min(),
        w.max(),
        w.count_nonzero(),
        *(torch.linalg.vector_norm(w, x, dtype=torch.float64) for x in p),
    )


def power_sum(w: Tensor, p: float) -> Tensor:
    """In float32, as it is mostly written, with the fastest op for each p."""
    fast = {0.5: torch.sqrt, 1.0: lambda x: x, 2.0: lambda x: x.mul_(x)}
    return fast.get(p, lambda x: x.pow_(p))(w.abs()).sum()


def torch_powers(w: Tensor, p: tuple[float, ...]) -> Callable[[], object]:
    def run() -> object:
        return w.sum(), w.min(), w.max(), w.count_nonzero(), [power_sum(w, x) for x in p]

    return run


def numpy_powers(w: np.ndarray, p: tuple[float, ...]) -> Callable[[], object]:
    fast = {0.5: np.sqrt, 1.0: lambda x: x, 2.0: np.square}

    def power(x: float) -> object:
        return fast.get(x, lambda a: a ** np.float32(x))(np.abs(w)).sum()

    return lambda: (w.sum(), w.min(), w.max(), np.count_nonzero(w), [power(x) for x in p])


def against_others(n: int, min_time: float) -> None:
    w = torch.randn(n, generator=torch.Generator().manual_seed(0))
    a = w.numpy()
    rows = w[: n // 1000 * 1000].view(-1, 1000)
    fns: Fns = {
        "floor": w.sum,
        "p = 1, q = 2": lambda: fp.pq_index(w, p=1.0, q=2.0),
        "p = 0.5, q = 1": lambda: fp.pq_index(w),
        "p = 1, q = 2, of every row of 1000": lambda: fp.pq_index_rows(rows, p=1.0, q=2.0),
        "p = 0.5, q = 1, of every row of 1000": lambda: fp.pq_index_rows(rows),
    }
    report(f"PQ index, float32, n = {n:,}", measure(fns, min_time=min_time), "floor")
    for p in ((1.0, 2.0), (0.5, 1.0), (0.7, 1.0)):

        def own(p: tuple[float, ...] = p) -> object:
            return fp.tensor_statistics([w], p=p)

        fns = {
            "floor": w.sum,
            "fastprune": own,
            "torch, float32": torch_powers(w, p),
            "torch, float64 norms": torch_norms(w, p),
            "numpy, float32": numpy_powers(a, p),
        }
        title = f"count, nonzero, sum, min, max, sum |w|^p for p = {p}, float32, n = {n:,}"
        report(title, measure(fns, min_time=min_time), "floor")
    fns = {
        "floor": w.sum,
        "fastprune": lambda: fp.gini_index([w]),
        "torch.sort": lambda: torch_gini(w),
        "numpy.sort": lambda: numpy_gini(a),
        "numpy.sort alone": lambda: np.sort(a),
    }
    report(f"Gini index, float32, n = {n:,}", measure(fns, min_time=min_time), "floor")


def cases(n: int, min_time: float) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, generator=g)
    kept = torch.rand(n, generator=g) < 0.1

    def call(x: Tensor, *p: float, **more: object) -> Callable[[], object]:
        return lambda: fp.tensor_statistics([x], p=p or (1.0, 2.0), **more)

    low = {dtype: w.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)}
    fns: Fns = {
        "p = 1, 2": call(w),
        **{f"p = {p:g}": call(w, p) for p in (0.5, 3.0, 4.0, 0.7)},
        "p = 0.1, 0.2, ..., 1": call(w, *(0.1 * i for i in range(1, 11))),
        "within a mask of 10 %": call(w, within=[kept]),
        **{str(dtype).removeprefix("torch."): call(x) for dtype, x in low.items()},
        "strided (transposed)": call(w[: n // 1000 * 1000].view(-1, 1000).t()),
    }
    report(f"n = {n:,}, public call", measure(fns, min_time=min_time), "p = 1, 2")
    index, zeros, equal = fp.gini_index, w * kept, torch.ones(n)
    uniform = torch.rand(n, generator=g) + 1
    fns = {
        "float32": lambda: index([w]),
        **{str(d).removeprefix("torch."): lambda x=x: index([x]) for d, x in low.items()},  # type: ignore[misc]
        "numpy.sort, float64": lambda: numpy_gini(low[torch.float64].numpy()),
        "90 % zeros": lambda: index([zeros]),
        "all equal": lambda: index([equal]),
        "uniform in [1, 2)": lambda: index([uniform]),
        "within a mask of 10 %": lambda: index([w], within=[kept]),
    }
    report(f"Gini index, n = {n:,}", measure(fns, min_time=min_time), "float32")


def network(name: str, min_time: float) -> None:
    model = fp.models.create(name)
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    n = sum(w.numel() for w in weights)
    flat = torch.cat([w.flatten() for w in weights])

    def separate() -> object:
        return [
            (w.sum(), w.min(), w.max(), w.count_nonzero(), w.abs().sum(), w.square().sum())
            for w in weights
        ]

    def sorts() -> object:
        return [numpy_gini(w.flatten().numpy()) for w in weights], numpy_gini(flat.numpy())

    fns: Fns = {
        "fastprune": lambda: fp.tensor_statistics(weights),
        "torch, float32, layers only": separate,
        "fastprune, Gini": lambda: fp.gini_index(weights),
        "numpy, Gini (concatenated before)": sorts,
    }
    title = f"{name}, {len(weights)} layers and all together, {n:,} weights"
    report(title, measure(fns, min_time=min_time), "fastprune")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=25_600_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min-time", type=float, default=0.5, help="seconds per candidate")
    parser.add_argument("--json", type=Path, default=Path("out/statistics.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    isa = fp.build_info()["cpu_isa"]
    print(f"torch {torch.__version__}, numpy {np.__version__}, {isa}, {args.threads} thread(s)")
    against_others(args.n, args.min_time)
    cases(args.n, args.min_time)
    network("resnet50-imagenet", args.min_time)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine(), "tables": TABLES}, indent=1))
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
