"""Selection of the best 10 % of 25.6M scores: ``python -m bench.bench_global_topk_mask``.

Every candidate starts from the factors and ends in a bool mask. The floor is one read of the
factors (torch's sum and dot) and one write of the mask, measured in the same interleaved run. A
second table holds what tends to hurt selections: massed zeros, all-equal scores, other dtypes, a
restriction, the other scopes, and a small network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

import fastprune as fp
from fastprune.timing import Timing, measure

DENSITY = 0.1


def floor(w: Tensor, g: Tensor | None, mask: Tensor) -> Callable[[], object]:
    """Reads the factors and writes the mask, nothing else."""
    if g is None:
        return lambda: (w.sum(), mask.fill_(True))
    return lambda: (torch.dot(w, g), mask.fill_(True))


def pipelines(w: Tensor, g: Tensor | None, k: int) -> dict[str, Callable[[], object]]:
    """What one writes without fastprune. All but topk keep more than k where scores tie."""

    def scores() -> Tensor:
        return w.abs() if g is None else (w * g).abs()

    def topk() -> Tensor:
        s = scores()
        return torch.zeros_like(s, dtype=torch.bool).scatter_(0, s.topk(k, sorted=False)[1], True)

    def kthvalue() -> Tensor:
        s = scores()
        return s >= s.kthvalue(s.numel() - k + 1).values

    def partition() -> np.ndarray:
        s = np.abs(w.numpy() if g is None else w.numpy() * g.numpy())
        return s >= np.partition(s, s.size - k)[s.size - k]

    return {"torch.topk": topk, "torch.kthvalue": kthvalue, "numpy.partition": partition}


def print_table(title: str, times: Mapping[str, Timing], unit: str) -> None:
    print(f"\n{title}")
    print(f"{'':34}{'ms':>10}{'quartiles':>22}{'/ ' + unit:>14}{'/ fastprune':>14}")
    for name, t in times.items():
        spread = f"{t.low * 1e3:.2f} - {t.high * 1e3:.2f}"
        own = times["fastprune"].median if "fastprune" in times else times[unit].median
        print(
            f"{name:34}{t.median * 1e3:10.2f}{spread:>22}{t.median / times[unit].median:14.2f}"
            f"{t.median / own:14.2f}"
        )


def against_others(n: int, min_time: float) -> None:
    g = torch.Generator().manual_seed(0)
    w, u = torch.randn(n, generator=g), torch.randn(n, generator=g)
    k, mask = int(n * DENSITY), torch.empty(n, dtype=torch.bool)
    for title, other in (("|w|", None), ("|w g|", u)):
        score = "magnitude" if other is None else "saliency"
        others = None if other is None else [other]

        def own(score: str = score, others: list[Tensor] | None = others) -> list[Tensor]:
            return fp.global_topk_mask([w], k=k, score=score, other=others)

        fns = {"floor": floor(w, other, mask), "fastprune": own, **pipelines(w, other, k)}
        times = measure(fns, min_time=min_time)
        print_table(f"{title}, float32, n = {n:,}, k = {k:,}", times, "floor")


def hard_cases(n: int, min_time: float) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, generator=g)
    kept = torch.rand(n, generator=g) < DENSITY
    nnz, k = int(kept.sum()), int(n * DENSITY)
    zeros, equal = w * kept, torch.ones(n)
    rows = w[: n // 1000 * 1000].view(-1, 1000)
    lenet = [torch.randn(s, generator=g) for s in ((300, 784), (100, 300), (10, 100))]
    select = fp.global_topk_mask

    def call(x: Tensor, **more: object) -> Callable[[], object]:
        return lambda: select([x], score="magnitude", **more)

    low = {dtype: w.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)}
    fns = {
        "plain |w|": call(w, k=k),
        "90 % zeros, half the rest": call(zeros, k=nnz // 2),
        "90 % zeros, exactly the rest": call(zeros, k=nnz),
        "90 % zeros, k among the zeros": call(zeros, k=n // 2),
        "all equal": call(equal, k=k),
        "within a mask of 10 %": call(w, k=nnz // 2, within=[kept]),
        **{str(dtype).removeprefix("torch."): call(x, k=k) for dtype, x in low.items()},
        "neuron, rows of 1,000": call(rows, k=[100], scope="neuron"),
        "filter, rows of 1,000": call(rows, k=rows.shape[0] // 10, scope="filter"),
        "strided (transposed)": call(rows.t(), k=k),
        "LeNet-300-100, |w g|": lambda: select(lenet, DENSITY, score="saliency", other=lenet),
    }
    print_table(f"n = {n:,}, public call", measure(fns, min_time=min_time), "plain |w|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=25_600_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min-time", type=float, default=0.5, help="seconds per candidate")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {fp.build_info()['cpu_isa']}, {args.threads} thread(s)")
    against_others(args.n, args.min_time)
    hard_cases(args.n, args.min_time)


if __name__ == "__main__":
    main()
