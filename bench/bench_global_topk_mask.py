"""Exact selection: ``python -m bench.bench_global_topk_mask [--n N] [--threads N] [--json FILE]``.

The best 10 % of 25.6M scores, from the factors to a bool mask. The floor is one read of the
factors (torch's sum and dot) and one write of the mask, measured in the same interleaved run.
Further tables: several thresholds at once; what tends to hurt selections (massed zeros, equal
scores, other dtypes, strides, scopes), a small network; two threads against one; and, with
``--large``, a billion bfloat16 weights. Peak memory is that of the process, before and after.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastprune as fp
from bench.harness import machine, print_times
from fastprune.reference.global_topk_mask import lamp_scores
from fastprune.timing import measure

DENSITY = 0.1
SWEEP = (0.5, 0.2, 0.1, 0.05, 0.02)
Calls = dict[str, Callable[[], object]]


def floor(w: Tensor, g: Tensor | None, mask: Tensor) -> Callable[[], object]:
    """Reads the factors and writes the mask, nothing else."""
    if g is None:
        return lambda: (w.sum(), mask.fill_(True))
    return lambda: (torch.dot(w, g), mask.fill_(True))


def histogram_floor(w: Tensor) -> Callable[[], object]:
    """One pass that only counts: numpy's bincount of the upper bits, without the masks."""
    return lambda: np.bincount(w.numpy().view(np.uint32) >> np.uint32(20), minlength=4096)


def pipelines(w: Tensor, g: Tensor | None, k: int) -> Calls:
    """What one writes without fastprune. kthvalue and partition keep all that tie."""

    def scores() -> Tensor:
        return w.abs() if g is None else (w * g).abs()

    def topk() -> Tensor:
        s = scores()
        return torch.zeros_like(s, dtype=torch.bool).scatter_(0, s.topk(k, sorted=False)[1], True)

    def sort() -> Tensor:
        s = scores()
        order = torch.sort(s, descending=True, stable=True).indices[:k]
        return torch.zeros_like(s, dtype=torch.bool).scatter_(0, order, True)

    def kthvalue() -> Tensor:
        s = scores()
        return s >= s.kthvalue(s.numel() - k + 1).values

    def partition() -> np.ndarray:
        s = np.abs(w.numpy() if g is None else w.numpy() * g.numpy())
        return s >= np.partition(s, s.size - k)[s.size - k]

    return {
        "torch.topk": topk,
        "torch.kthvalue": kthvalue,
        "torch.sort": sort,
        "numpy.partition": partition,
    }


def against_others(n: int) -> dict[str, Calls]:
    g = torch.Generator().manual_seed(0)
    w, u = torch.randn(n, generator=g), torch.randn(n, generator=g)
    k, mask = int(n * DENSITY), torch.empty(n, dtype=torch.bool)
    tables: dict[str, Calls] = {}
    for title, other in (("|w|", None), ("|w g|", u)):
        score: Any = "magnitude" if other is None else "saliency"
        others = None if other is None else [other]

        def own(score: Any = score, others: list[Tensor] | None = others) -> list[Tensor]:
            return fp.global_topk_mask([w], k=k, score=score, other=others)

        fns = {"floor": floor(w, other, mask), "fastprune": own, **pipelines(w, other, k)}
        if other is None:
            fns["bincount (numpy)"] = histogram_floor(w)
        tables[f"{title}, float32, n = {n:,}, k = {k:,}"] = fns
    return tables


def sweeps(n: int) -> dict[str, Calls]:
    """Several thresholds on the same scores; masks of bits leave mostly the reading."""
    w = torch.randn(n, generator=torch.Generator().manual_seed(0))
    mask, ks = torch.empty(n, dtype=torch.bool), [int(n * d) for d in SWEEP]
    fns: Calls = {"floor": floor(w, None, mask)}
    for packed in (False, True):
        for t in (1, 2, len(ks)):
            name = f"{t} threshold(s), {'bits' if packed else 'bools'}"
            fns[name] = (
                lambda t=t, packed=packed: fp.global_topk_sweep(  # type: ignore[misc]
                    [w], k=ks[:t], score="magnitude", packed=packed
                )
            )
    return {f"sweep, |w|, n = {n:,}": fns}


def hard_cases(n: int) -> dict[str, Calls]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, generator=g)
    kept = torch.rand(n, generator=g) < DENSITY
    nnz, k = int(kept.sum()), int(n * DENSITY)
    zeros, equal = w * kept, torch.ones(n)
    rows = w[: n // 1000 * 1000].view(-1, 1000)
    lenet = [torch.randn(s, generator=g) for s in ((300, 784), (100, 300), (10, 100))]
    layers = list(w.split(n // 20))
    select = fp.global_topk_mask

    def call(x: Tensor, **more: Any) -> Callable[[], object]:
        return lambda: select([x], **{"score": "magnitude", **more})

    low = {dtype: w.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)}
    fns = {
        "plain |w|": call(w, k=k),
        "90 % zeros, half the rest": call(zeros, k=nnz // 2),
        "90 % zeros, exactly the rest": call(zeros, k=nnz),
        "90 % zeros, k among the zeros": call(zeros, k=n // 2),
        "all equal": call(equal, k=k),
        "within a mask of 10 %": call(w, k=nnz // 2, within=[kept]),
        **{str(dtype).removeprefix("torch."): call(x, k=k) for dtype, x in low.items()},
        "scaled": call(w, k=k, scale=[2.5]),
        "noise": call(w, k=k, score="noise", seed=1),
        "LAMP, 20 layers": lambda: select(layers, k=k, score="lamp"),
        "minimum of 1,000, 20 layers": lambda: select(
            layers, k=k, score="magnitude", min_per_tensor=1000
        ),
        "neuron, rows of 1,000": call(rows, k=[100], scope="neuron"),
        "filter, rows of 1,000": call(rows, k=rows.shape[0] // 10, scope="filter"),
        "strided (transposed)": call(rows.t(), k=k),
        "kept scores": lambda: fp.kept_scores([w], [kept], score="magnitude"),
    }
    lamp = {"fastprune": lambda: select(layers, k=k, score="lamp"), "sort": lambda: by_sort(layers)}
    small = {
        "fastprune": lambda: select(lenet, DENSITY, score="saliency", other=lenet),
        "torch.topk": lambda: topk_of(lenet),
    }
    return {
        f"n = {n:,}, public call": fns,
        f"LAMP, 20 layers, n = {n:,}": lamp,
        "LeNet-300-100 (266,200 weights), |w g|": small,
    }


def by_sort(layers: list[Tensor]) -> object:
    scores = torch.cat([lamp_scores(t).flatten() for t in layers])
    return scores >= scores.topk(int(scores.numel() * DENSITY), sorted=False).values.min()


def topk_of(tensors: list[Tensor]) -> object:
    s = torch.cat([(t * t).abs().flatten() for t in tensors])
    return s >= s.topk(int(s.numel() * DENSITY), sorted=False).values.min()


def threads(n: int, many: int) -> dict[str, Calls]:
    g = torch.Generator().manual_seed(0)
    w, u = torch.randn(n, generator=g), torch.randn(n, generator=g)
    calls: dict[str, Callable[[], object]] = {
        "|w|": lambda: fp.global_topk_mask([w], DENSITY, score="magnitude"),
        "|w g|": lambda: fp.global_topk_mask([w], DENSITY, score="saliency", other=[u]),
    }

    def run(call: Callable[[], object], count: int) -> Callable[[], object]:
        def timed() -> None:
            torch.set_num_threads(count)
            call()

        return timed

    fns = {f"{name}, {c} thread(s)": run(f, c) for name, f in calls.items() for c in (1, many)}
    return {f"threads, n = {n:,}": fns}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(n: int) -> dict[str, float]:
    """Growth of the process's peak over one selection, less the masks that it returns."""
    w = torch.randn(n)
    before = peak()
    masks = fp.global_topk_mask([w], DENSITY, score="magnitude")
    extra = max(0, peak() - before - masks[0].numel())
    print(f"extra memory at n = {n:,}: {extra / 1e6:.1f} MB, {extra / (4 * n):.2%} of the scores")
    return {"n": n, "extra_bytes": extra, "score_bytes": 4 * n}


def large() -> dict[str, Any]:
    """A billion bfloat16 weights."""
    w = torch.empty(1_000_000_000, dtype=torch.bfloat16).normal_()
    before = peak()
    times = measure(
        {"fastprune": lambda: fp.global_topk_mask([w], DENSITY, score="magnitude")},
        min_time=1.0,
        min_rounds=3,
    )
    print_times("|w|, bfloat16, n = 1,000,000,000", times)
    extra = max(0, peak() - before - w.numel())
    print(f"extra memory: {extra / 1e6:.1f} MB, {extra / (2 * w.numel()):.2%} of the scores")
    return {"times": {k: t.to_dict() for k, t in times.items()}, "extra_bytes": extra}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_global_topk_mask", description=__doc__
    )
    parser.add_argument("--n", type=int, default=25_600_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min-time", type=float, default=0.5, help="seconds per candidate")
    parser.add_argument("--scaling", type=int, default=0, help="also this many threads against one")
    parser.add_argument("--large", action="store_true", help="also a billion bfloat16 weights")
    parser.add_argument("--json", type=Path, default=Path("out/topk.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head = machine()
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    out: dict[str, Any] = {"machine": head, "memory": memory(args.n), "tables": {}}
    parts = [against_others, sweeps, hard_cases]
    if args.scaling:
        parts.append(lambda n: threads(n, args.scaling))
    for part in parts:
        for title, fns in part(args.n).items():
            times = measure(fns, min_time=args.min_time)
            print_times(title, times)
            out["tables"][title] = {name: t.to_dict() for name, t in times.items()}
    if args.large:
        torch.set_num_threads(args.threads)
        out["large"] = large()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(out, indent=1))
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
