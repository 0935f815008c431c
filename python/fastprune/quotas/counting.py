"""From layer sparsities to whole numbers of weights, with an exact total."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from fastprune.checks import fraction, whole
from fastprune.quotas.formulas import OnInvalid, check_on_invalid


def counts(
    sizes: Sequence[int],
    sparsities: Sequence[float],
    *,
    total: int | None = None,
    on_invalid: OnInvalid | None = None,
    names: Sequence[str] | None = None,
) -> list[int]:
    r"""Kept weights of every layer, by largest remainder.

    With the exact shares x_l = (1 - s_l) n_l, in float64, each layer gets floor(x_l); what the
    total lacks goes, one weight each, to the layers with the largest x_l - floor(x_l). Equal
    remainders: the earlier layer wins.

    Args:
        sizes: weights of the L layers, whole numbers.
        sparsities: L numbers in [0, 1], as the quotas return them.
        total: weights to keep in all; None: floor(sum of x_l + 0.5). What is asked of
            :func:`fastprune.prune` is floor((1 - sparsity) N + 0.5).
        on_invalid: when a layer that has weights would be left with none while others keep some.
            None: let it. ``redistribute``: it keeps one, taken from the layers that are furthest
            above their share. ``error``: an error.
        names: one per layer, for messages.
    Returns:
        L whole numbers, 0 <= k_l <= n_l, that add up to ``total``.
    Raises:
        ValueError: lengths differ, a number is out of range; ``total`` is further from the sum
            of the shares than rounding each layer explains (half a weight per layer, and one);
            an emptied layer with ``error``, or fewer weights to keep than layers with
            ``redistribute``.
    """
    sizes = [whole(n, f"sizes[{i}]", 0, None) for i, n in enumerate(sizes)]
    if len(sparsities) != len(sizes):
        raise ValueError(
            f"sparsities: expected {len(sizes)} numbers, one per layer, got {len(sparsities)}"
        )
    label = [f"[{i}]" for i in range(len(sizes))] if names is None else [f"[{n!r}]" for n in names]
    shares = [
        (1.0 - fraction(s, f"sparsities{label[i]}")) * n
        for i, (s, n) in enumerate(zip(sparsities, sizes, strict=True))
    ]
    asked = math.fsum(shares)
    if total is None:
        total = min(math.floor(asked + 0.5), sum(sizes))
    total = whole(total, "total", 0, sum(sizes))
    if abs(asked - total) > len(sizes) / 2 + 1:
        raise ValueError(
            f"sparsities: they keep {asked:.6g} weights of {sum(sizes)}, but the whole is to keep "
            f"{total}"
        )
    if on_invalid is not None:
        check_on_invalid(on_invalid)
    least = [0] * len(sizes)
    if on_invalid == "redistribute" and total:
        least = [min(n, 1) for n in sizes]
        if total < sum(least):
            raise ValueError(
                f"on_invalid: {total} weights cannot be shared out so that each of {sum(least)} "
                "layers keeps one"
            )
    kept = apportioned(shares, total, least, sizes)
    if on_invalid == "error" and total:
        empty = [label[i] for i, (n, k) in enumerate(zip(sizes, kept, strict=True)) if n and not k]
        if empty:
            raise ValueError(
                f"sparsities: no weight is left of layer {', '.join(empty)} when {total} of "
                f"{sum(sizes)} are kept; on_invalid='redistribute' leaves each layer one"
            )
    return kept


def apportioned(
    shares: Sequence[float], total: int, least: Sequence[int], most: Sequence[int]
) -> list[int]:
    """Whole numbers near ``shares`` that add up to ``total``, by largest remainder.

    Each lies within its bounds; sum(least) <= total <= sum(most). Where the bounds (or shares that
    do not add up) leave more than remainders to hand out or take back, it goes on in the same
    order: to the layer furthest below its share, from the one furthest above; ties to the earlier.
    """
    kept = [
        min(max(math.floor(x), low), high) for x, low, high in zip(shares, least, most, strict=True)
    ]
    gap = total - sum(kept)
    step = 1 if gap > 0 else -1
    bound = most if gap > 0 else least
    # The first to change is the one with the largest lack (or, taking back, the smallest); of
    # equals the earlier gets, and the later gives.
    queue = [
        (-step * (x - k), step * i)
        for i, (x, k) in enumerate(zip(shares, kept, strict=True))
        if k != bound[i]
    ]
    heapq.heapify(queue)
    for _ in range(abs(gap)):
        _, place = heapq.heappop(queue)
        i = step * place
        kept[i] += step
        if kept[i] != bound[i]:
            heapq.heappush(queue, (-step * (shares[i] - kept[i]), place))
    return kept
