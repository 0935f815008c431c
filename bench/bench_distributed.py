"""What a selection over many ranks sends: ``python -m bench.bench_distributed``.

No weights are allocated. The driver that runs over a real group runs here on one rank whose counts
come from the distribution of the scores in closed form, |w| of a normal w in some dtype, for as
many weights as asked for; what a rank sends does not depend on the values of other ranks. Ties that
the threshold splits are spread evenly over the indices. Bytes are those of the tensors that a rank
hands to collectives; a ring all-reduce moves about twice as many over its link.

``--check N`` runs the selection of N real weights on four ranks (threads) and prints both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import fastprune as fp
from fastprune.distributed import ThreadRank, Traffic, on_threads, record_traffic
from fastprune.distributed.link import Link, Reduction
from fastprune.distributed.parts import EmptyPart
from fastprune.distributed.selection import BINS, Problem, run, select, shift_of

WEIGHTS = {"7B": 7 * 10**9, "70B": 70 * 10**9, "1T": 10**12}
RANKS = (8, 64, 512, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class OneOfMany:
    """A rank whose part is the sum already."""

    rank = 0
    device = torch.device("cpu")

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        pass


class NormalPart(EmptyPart):
    """|w| of n normal weights, as counts alone."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.elements = n
        self.wide = dtype == torch.float64
        self.step = 2**16 if dtype == torch.bfloat16 else 1  # keys between two representable ones
        self.bounds: Sequence[int] = ()

    def above(self, key: Tensor) -> Tensor:
        """How many weights have a larger key: those beyond the midpoint to the next value."""
        last = 0x7FEFFFFFFFFFFFFF if self.wide else 0x7F7FFFFF
        kind, real = (torch.int64, torch.float64) if self.wide else (torch.int32, torch.float32)
        below = torch.div(key.clamp(0, last), self.step, rounding_mode="floor") * self.step
        upper = (below + self.step).clamp(max=last)
        ends = [t.to(kind).view(real).double() for t in (below, upper)]
        beyond = (self.elements * torch.special.erfc((ends[0] + ends[1]) / 8**0.5)).round().long()
        beyond = torch.where(key >= last, 0, beyond)
        return torch.where(key < 0, self.elements, beyond)

    def sample(self, wanted: int) -> Tensor:
        g = torch.Generator().manual_seed(0)
        if self.wide:
            return torch.randn(wanted, generator=g, dtype=torch.float64).abs().view(torch.int64)
        w = torch.randn(wanted, generator=g).abs()
        return (w.bfloat16().float() if self.step > 1 else w).view(torch.int32)

    def filter(self, bounds: Sequence[int], capacity: int) -> list[int]:
        self.bounds = bounds
        over = [0, *self.above(torch.tensor(bounds)).tolist()]
        return [over[i + 1] - over[i] for i in range(4)]

    def histogram(self, lo: int, hi: int) -> Tensor:
        shift = shift_of(lo, hi)
        edges = lo - 1 + (torch.arange(BINS + 1) << shift)
        over = self.above(edges.clamp(max=hi))
        return over[:-1] - over[1:]

    def inside_histogram(self, lo: int, hi: int) -> Tensor:
        return self.histogram(lo, hi)

    def tie_bins(self, members: str, key: int, lo: int, shift: int) -> Tensor:
        equal = self.count_ties(members, key)
        edges = lo + (torch.arange(BINS + 1) << shift)
        before = (edges.double() * (equal / self.elements)).long().clamp(max=equal)
        return before[1:] - before[:-1]

    def count_ties(self, members: str, key: int) -> int:
        over = self.above(torch.tensor([key - 1, key])).tolist()
        return int(over[0] - over[1])


def simulated(n: int, size: int, dtype: torch.dtype, distinct: bool) -> tuple[Traffic, int, int]:
    """Traffic of one rank, elements inside the bracket, and elements equal to the threshold."""
    part, k = NormalPart(n, dtype), n // 10
    p = Problem(part, EmptyPart(), k, n, n, n, part.wide, n, size, 0 if distinct else None)
    link = Link(OneOfMany(size))
    with record_traffic() as traffic:
        link.max(3, lambda: None)  # as the public function begins: arguments, then sizes
        link.sum(5, lambda: None)
        run(link, [select(p)])
    bounds = part.above(torch.tensor(part.bounds[1:3])).tolist()
    lo, hi = 0, 2**63 - 1 if part.wide else 2**31 - 1
    while lo < hi:  # the threshold, the plain way
        middle = (lo + hi) // 2
        if int(part.above(torch.tensor([middle]))) >= k:
            lo = middle + 1
        else:
            hi = middle
    return traffic, bounds[1] - bounds[0], part.count_ties("inside", lo)


def table(names: Sequence[str]) -> None:
    sizes = " / ".join(f"{r:,}" for r in RANKS)
    print(
        f"| weights | dtype | rounds | KB, shards | KB, own tensors, {sizes} ranks | candidates |"
    )
    print("|---|---|---|---|---|---|")
    for name, n in WEIGHTS.items():
        for kind in names:
            shards = [simulated(n, size, DTYPES[kind], False) for size in RANKS]
            own = [simulated(n, size, DTYPES[kind], True) for size in RANKS]
            rounds = spread([t.rounds for t, _, _ in (*shards, *own)])
            sent = spread([t.bytes / 1e3 for t, _, _ in shards])
            each = " / ".join(f"{t.bytes / 1e3:.0f}" for t, _, _ in own)
            few = " / ".join(f"{i / r:,.0f}" for (_, i, _), r in zip(shards, RANKS, strict=True))
            print(f"| {name} | {kind} | {rounds} | {sent} | {each} | {few} |")


def spread(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def check(n: int) -> None:
    x = torch.randn(4, n // 4, generator=torch.Generator().manual_seed(1))
    for kind, dtype in DTYPES.items():
        pieces = x.to(dtype)

        def work(rank: ThreadRank, pieces: Tensor = pieces) -> Traffic:
            with record_traffic() as traffic:
                fp.global_topk_mask([pieces[rank.rank]], 0.1, score="magnitude", group=rank)
            return traffic

        real = on_threads(4, work)[0]
        print(f"{kind}, n = {n:,}, 4 ranks: real {real}, simulated {simulated(n, 4, dtype, True)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of " + ", ".join(DTYPES))
    parser.add_argument("--check", type=int, default=0, metavar="N")
    args = parser.parse_args()
    if args.check:
        check(args.check)
    else:
        table(args.dtypes.split(","))


if __name__ == "__main__":
    main()
