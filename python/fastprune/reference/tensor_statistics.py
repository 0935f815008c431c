"""Oracle for :func:`fastprune.tensor_statistics`: concatenate, sort, sum in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprune.reference.global_topk_mask import rows_of


def tensor_statistics(
    tensors: Sequence[Tensor],
    within: Sequence[Tensor] | None,
    p: Sequence[float],
    gini: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op returns, for already validated arguments.

    Row i of every result is tensor i, the last row all of them together: counts (L + 1, 2) of
    elements and of nonzeros; (L + 1, 3) sum, min and max; (3, L + 1, len(p)) sums of |w|^p, norms
    and power means; Gini indices, (L + 1) or (0).
    """
    flat = [
        t.detach()[within[i]] if within is not None else t.detach().flatten()
        for i, t in enumerate(tensors)
    ]
    rows = [t.double() for t in flat]
    rows.append(torch.cat(rows))
    like = rows[-1]
    counts = torch.stack(
        [torch.stack([x.new_tensor(x.numel()), x.count_nonzero()]).long() for x in rows]
    )
    empty = like.new_tensor([0.0, float("inf"), float("-inf")])
    moments = torch.stack(
        [torch.stack([x.sum(), x.min(), x.max()]) + 0.0 if x.numel() else empty for x in rows]
    )
    powers = like.new_zeros(3, len(rows), len(p))
    for i, x in enumerate(rows):
        for j, exponent in enumerate(p):
            powers[:, i, j] = torch.stack(_power(x.abs(), exponent))
    indices = torch.stack([_gini(x.abs()) for x in rows]) if gini else like.new_zeros(0)
    return counts, moments, powers, indices


def row_power_means(
    tensors: Sequence[Tensor], within: Sequence[Tensor] | None, p: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Of all rows (the tensors viewed as (out, -1)): counts (R,) and power means (R, len(p)).

    By way of logarithms, as :func:`_power` does it.
    """
    counts, means = [], []
    for i, t in enumerate(tensors):
        x = rows_of(t.detach()).double().abs()
        kept = torch.ones_like(x, dtype=torch.bool) if within is None else rows_of(within[i])
        x = torch.where(kept, x, 0.0)
        count = kept.sum(dim=1)
        largest = x.amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
        regular = (largest > 0) & (largest < float("inf"))
        top = torch.where(regular, largest, 1.0)
        columns = []
        for exponent in p:
            terms = (exponent * (x.log2() - top.log2()[:, None])).exp2().sum(dim=1)
            mean = ((terms / count).log2() / exponent + top.log2()).exp2()
            columns.append(torch.where(regular, mean, largest))
        counts.append(count)
        means.append(torch.stack(columns, dim=1) if p else x.new_zeros(x.shape[0], 0))
    return torch.cat(counts), torch.cat(means)


def _power(x: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of x^p, its p-th root, and that of its mean, by way of logarithms."""
    largest = x.max() if x.numel() else x.new_zeros(())
    if not 0 < largest < float("inf"):
        return largest, largest, largest
    # The largest term is 1: nothing overflows, and what underflows is nothing.
    sum_scaled = (p * (x.log2() - largest.log2())).exp2().sum()
    log_sum = sum_scaled.log2()
    norm = (log_sum / p + largest.log2()).exp2()
    mean = ((sum_scaled / x.numel()).log2() / p + largest.log2()).exp2()
    return (log_sum + p * largest.log2()).exp2(), norm, mean


def _gini(x: Tensor) -> Tensor:
    """Hurley & Rickard 2009: 1 - 2 sum_k x_(k) / sum(x) * (N - k + 1/2) / N, x ascending."""
    n = x.numel()
    largest = x.max() if n else x.new_zeros(())
    if largest == 0:
        return x.new_zeros(())
    x = (x / largest).sort().values
    weights = (2 * torch.arange(n, device=x.device, dtype=torch.float64) + 1 - n) / n
    return (weights * x).sum() / x.sum()  # of infinities: NaN
