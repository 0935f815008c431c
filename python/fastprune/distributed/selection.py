"""The exact selection of k among the elements of all ranks, as rounds of integer sums.

The steps of ``csrc/ops/topk_selection.h`` with the counts of all ranks added up: a bracket guessed
from a sample, one filter pass, the rank among the elements inside the bracket, and the cut among
equal elements by their global index. Control flow depends on sums only, which all ranks share: so
all of them take the same rounds, and a work that fails on one rank meets the others in the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastprune.distributed.link import Link, Request

BINS = 2048
FEW = 16384  # elements that are ranked without a sample
_MASSED = 8  # so many equal samples: a value to count, not to collect

Rounds = Generator[Request, list[int], None]


class Part(Protocol):
    """Tensors of one rank, and the passes over them."""

    elements: int

    def sample(self, wanted: int) -> Tensor:
        """Keys of about ``wanted`` elements, without those that are no candidates."""

    def filter(self, bounds: Sequence[int], capacity: int) -> list[int]:
        """Writes the masks as if bounds[1] were the threshold; counts of the classes above, top,
        inside and bottom, see csrc/kernels/cpu/global_topk_mask.h."""

    def histogram(self, lo: int, hi: int) -> Tensor:
        """Counts of the keys in [lo, hi], by :func:`bins_of`."""

    def inside_histogram(self, lo: int, hi: int) -> Tensor:
        """The same of the keys that the last filter pass found inside."""

    def tie_bins(self, members: str, key: int, lo: int, shift: int) -> Tensor:
        """Of the members of a class (``top``, ``inside``, ``bottom``) with this key: how many have
        a global index in each bin of 2^shift from lo on."""

    def count_ties(self, members: str, key: int) -> int:
        """How many there are."""

    def accept(self, key: int, ties: int) -> None:
        """Keeps of the inside elements those above the key and the first ``ties`` equal to it."""

    def settle(self, members: str, key: int, ties: int) -> None:
        """Keeps the first ``ties`` members of the class ``top`` or ``bottom``, no others."""


@dataclass
class Problem:
    """One selection, in numbers that all ranks share but for the parts.

    Attributes:
        counted: the elements that this rank answers for.
        copies: elements that another rank answers for: only their masks are written.
        k, candidates, elements: of all ranks together.
        share: this rank's part of the elements.
        wide: keys have 64 bits.
        index_end: global indices are below.
        size: number of ranks.
        rank: set where every rank's elements follow those of the rank before it, so that ties go
            to the lower rank; None where they go by global index.
    """

    counted: Part
    copies: Part
    k: int
    candidates: int
    elements: int
    share: int
    wide: bool
    index_end: int
    size: int
    rank: int | None = None

    @property
    def lowest(self) -> int:
        """The key of what is no candidate."""
        return -(2**63) if self.wide else -(2**31)

    @property
    def highest(self) -> int:
        """The key of NaN."""
        return ~self.lowest


def shift_of(lo: int, hi: int) -> int:
    """A histogram of [lo, hi] has bins 2^shift wide, at most :data:`BINS` of them."""
    return max((hi - lo).bit_length() - 11, 0)


def bins_of(keys: Tensor, lo: int, hi: int) -> Tensor:
    """Counts of the keys in [lo, hi], in bins of 2^shift_of(lo, hi)."""
    if keys.device.type == "cpu":
        counts: Tensor = torch.ops.fastprune.topk_shard_bins(keys, lo, hi)
        return counts
    return bins_by_torch(keys, lo, hi)


def bins_by_torch(keys: Tensor, lo: int, hi: int) -> Tensor:
    """The same on any device."""
    inside = keys[(keys >= lo) & (keys <= hi)].to(torch.int64)
    shift = shift_of(lo, hi)
    offsets = (inside - lo) >> shift  # wraps where 64 bits overflow; the sign is then shifted in
    if shift > 0:
        offsets &= (1 << (64 - shift)) - 1
    return torch.bincount(offsets, minlength=BINS)


@dataclass
class Narrowing:
    """The rank-th largest key lies in [lo, hi]: ``above`` keys are larger, ``inside`` in it."""

    lo: int
    hi: int
    above: int
    inside: int

    def narrow(self, histogram: Sequence[int], rank: int) -> None:
        """Closes in on the bin that holds it."""
        shift = shift_of(self.lo, self.hi)
        b = BINS - 1
        while b > 0 and self.above + histogram[b] < rank:
            self.above += histogram[b]
            b -= 1
        self.lo += b << shift
        self.hi = min(self.hi, self.lo + (1 << shift) - 1)
        self.inside = histogram[b]


def select(p: Problem) -> Rounds:
    """Writes the masks of this rank's parts: exactly p.k of all ranks' candidates."""
    lowest, highest = p.lowest, p.highest
    bounds: tuple[int, ...]
    if p.k == 0:
        bounds, expected = (highest,) * 4, 0
    elif p.k == p.candidates:
        bounds, expected = (lowest,) * 4, 0
    elif p.elements <= FEW:
        bounds, expected = (highest - 1, highest - 1, lowest, lowest), p.candidates
    else:
        bounds, expected = yield from _guess(p)
    while True:
        above, top, inside, bottom = yield Request(4, partial(_filter, p, bounds, expected))
        if above <= p.k <= above + top + inside + bottom or p.k == above + top:
            break
        # The counts say on which side of the bracket the threshold is.
        rest = above + top + inside + bottom
        if p.k < above:
            at = Narrowing(bounds[0] + 1, highest, 0, above)
        else:
            at = Narrowing(lowest + 1, bounds[3], rest, p.candidates - rest)
        while at.lo < at.hi and at.inside > max(65536, p.elements // 64):
            hist = yield Request(BINS, partial(p.counted.histogram, at.lo, at.hi))
            at.narrow(hist, p.k)
        expected = 0 if at.lo == at.hi else at.inside  # a single key is counted, not collected
        one = at.lo == at.hi
        bounds = (at.lo, at.lo, at.lo, at.lo - 1) if one else (at.hi, at.hi, at.lo - 1, at.lo - 1)
    after_top, after_inside = above + top, above + top + inside
    if p.k == after_top:
        yield Request(0, lambda: None)
    elif p.k < after_top:
        yield from _cut(p, "top", bounds[0], p.k - above, top)
    elif p.k > after_inside:
        yield from _cut(p, "bottom", bounds[3] + 1, p.k - after_inside, bottom)
    else:
        at = Narrowing(bounds[2] + 1, bounds[1], after_top, inside)
        while at.lo < at.hi and p.k < at.above + at.inside:
            hist = yield Request(BINS, partial(p.counted.inside_histogram, at.lo, at.hi))
            at.narrow(hist, p.k)
        if p.k == at.above + at.inside:  # all from lo on: no ties are split
            yield Request(0, lambda: _for_parts(p, lambda part: part.accept(at.lo - 1, 0)))
        else:
            yield from _cut(p, "inside", at.lo, p.k - at.above, at.inside)


def _for_parts(p: Problem, act: Callable[[Part], None]) -> None:
    for part in (p.counted, p.copies):
        act(part)


def _filter(p: Problem, bounds: Sequence[int], expected: int) -> Tensor:
    """``expected``: elements inside, of all ranks; this one gets room for three times its share."""
    total = max(p.elements, 1)
    counts = p.counted.filter(bounds, 3 * expected * p.counted.elements // total + 4096)
    p.copies.filter(bounds, 3 * expected * p.copies.elements // total + 4096)
    return torch.tensor(counts)


def _guess(p: Problem) -> Generator[Request, list[int], tuple[tuple[int, ...], int]]:
    """A bracket that holds the k-th largest key with high probability, from a common sample."""
    n = float(p.candidates)
    # Larger samples cost more, but leave fewer candidates to rank. What is sent does not grow.
    size = min(max(0.7 * n ** (2 / 3), 1024.0), 65536.0 * p.size)
    wanted = min(p.elements // 8, int(size * p.elements / n)) * p.share // p.elements
    keys: list[Tensor] = []

    def first(lo: int, hi: int) -> Tensor:
        keys.append(p.counted.sample(wanted))
        return bins_of(keys[0], lo, hi)

    lo, hi = p.lowest + 1, p.highest
    hist = yield Request(BINS, lambda: first(lo, hi), small=True)
    found = sum(hist)
    share = p.k / n
    slack = 4.0 * math.sqrt(found * share * (1.0 - share)) + 3.0
    ranks = (math.floor(found * share - slack), math.ceil(found * share + slack))
    ends = [Narrowing(lo, hi, 0, found) if 1 <= r <= found else None for r in ranks]
    few = max(_MASSED, int(slack / 16))
    for end, rank in zip(ends, ranks, strict=True):
        if end is not None:
            end.narrow(hist, rank)

    def binned(open_ends: Sequence[tuple[Narrowing, int]]) -> Tensor:
        return torch.cat([bins_of(keys[0], end.lo, end.hi) for end, _ in open_ends])

    while True:
        pairs = zip(ends, ranks, strict=True)
        left = [(e, r) for e, r in pairs if e is not None and e.lo < e.hi and e.inside > few]
        if not left:
            break
        hist = yield Request(BINS * len(left), partial(binned, left), small=True)
        for i, (end, rank) in enumerate(left):
            end.narrow(hist[i * BINS : (i + 1) * BINS], rank)
    keys.clear()
    upper, lower = ends
    expected = int(slack * n / (found + 1.0))
    high, top = p.highest, False
    if upper is not None:
        high = upper.hi
        top = upper.lo == upper.hi and upper.inside >= _MASSED
    low, bottom = p.lowest + 1, False
    if lower is not None:
        low = lower.lo
        bottom = lower.lo == lower.hi and lower.inside >= _MASSED
    if low == high:
        return (low, low, low, low - 1), 0
    return (high, high - (1 if top else 0), low - (0 if bottom else 1), low - 1), expected


def _cut(p: Problem, members: str, key: int, ties: int, equal: int) -> Rounds:
    """Keeps the first ``ties`` of the ``equal`` members with this key, by global index."""
    own = [0, 0]  # of the counted part and of the copies: members before the cut
    parts = (p.counted, p.copies)
    if ties == equal:
        own = [2**62, 2**62]
    elif p.rank is not None:
        rank = p.rank

        def at_own_place() -> Tensor:
            counts = torch.zeros(p.size, dtype=torch.int64)
            counts[rank] = p.counted.count_ties(members, key)
            return counts

        counts = yield Request(p.size, at_own_place)
        own[0] = min(max(ties - sum(counts[:rank]), 0), counts[rank])
    else:
        lo, hi, before = 0, p.index_end - 1, 0
        while lo <= hi:
            bits = (hi - lo).bit_length()
            # Wide bins first: parts that lie inside one bin are not looked at.
            shift = max(bits - 11, 18 if bits > 22 else 0)
            bins: list[list[int]] = []

            def count(lo: int = lo, shift: int = shift, bins: list[list[int]] = bins) -> Tensor:
                tensors = [part.tie_bins(members, key, lo, shift) for part in parts]
                bins.extend(t.tolist() for t in tensors)
                return tensors[0]

            total = yield Request(BINS, count)
            b = 0
            while b < BINS - 1 and before + total[b] < ties:
                before += total[b]
                b += 1
            for i, counts in enumerate(bins):
                own[i] += sum(counts[:b])
            if shift == 0 or before + total[b] == ties:  # the cut is behind this bin
                for i, counts in enumerate(bins):
                    own[i] += counts[b]
                break
            lo += b << shift
            hi = min(hi, lo + (1 << shift) - 1)

    def finish() -> None:
        for part, kept in zip(parts, own, strict=True):
            if members == "inside":
                part.accept(key, kept)
            else:
                if members == "bottom":
                    part.accept(p.lowest, 0)
                part.settle(members, key, kept)

    yield Request(0, finish)


def run(link: Link, rounds: Sequence[Rounds]) -> None:
    """Drives several selections at once: one collective carries a round of each."""
    waiting = [(r, next(r)) for r in rounds]
    while waiting:
        sums = link.sums([request for _, request in waiting])
        going = []
        for (generator, _), values in zip(waiting, sums, strict=True):
            try:
                going.append((generator, generator.send(values)))
            except StopIteration:
                continue
        waiting = going
