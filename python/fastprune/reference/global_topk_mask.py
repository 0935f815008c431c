"""Oracle for :func:`fastprune.global_topk_mask`: a stable descending sort, nothing clever."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fuse_score(values: Tensor, other: Tensor | None, score: str) -> Tensor:
    """The score of every weight, in float32 (float64 where a factor is float64).

    ``identity``: values; ``magnitude``: |values|; ``product``: values * other; ``saliency``:
    |values * other|; ``square``: values^2.
    """
    doubles = values.dtype == torch.float64 or (other is not None and other.dtype == torch.float64)
    wide = torch.float64 if doubles else torch.float32
    a = values.detach().to(wide)
    b = None if other is None else other.detach().to(wide)
    if score == "identity":
        return a
    if score == "magnitude":
        return a.abs()
    if score == "square":
        return a * a
    assert b is not None, score
    return (a * b).abs() if score == "saliency" else a * b


def rows_of(t: Tensor) -> Tensor:
    """The tensor viewed as (size of dimension 0, everything else)."""
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def _keep(scores: Tensor, candidates: Tensor | None, k: int) -> Tensor:
    """Bool vector with exactly k True: the best candidates of a 1-D score, earlier index first."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    if candidates is None:
        order = torch.sort(scores + 0.0, descending=True, stable=True).indices
    else:
        places = candidates.nonzero().flatten()
        order = places[torch.sort(scores[places] + 0.0, descending=True, stable=True).indices]
    keep[order[:k]] = True
    return keep


def global_topk_mask(
    values: Sequence[Tensor],
    counts: Sequence[int],
    scope: str,
    score: str,
    other: Sequence[Tensor] | None,
    within: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Masks for already validated arguments.

    ``counts`` holds one kept count for scope ``global`` and ``filter``, one per tensor for
    ``layer``, and one per row, tensor after tensor, for ``neuron``.
    """
    scores = [
        fuse_score(v, None if other is None else other[i], score) for i, v in enumerate(values)
    ]
    if scope == "layer":
        return [
            _keep(s.flatten(), None if within is None else within[i].flatten(), counts[i]).view(
                s.shape
            )
            for i, s in enumerate(scores)
        ]
    if scope == "neuron":
        masks, row = [], 0
        for i, s in enumerate(scores):
            rows = rows_of(s)
            allowed = None if within is None else within[i].reshape(rows.shape)
            kept = [
                _keep(r, None if allowed is None else allowed[j], counts[row + j])
                for j, r in enumerate(rows)
            ]
            row += rows.shape[0]
            masks.append(torch.stack(kept).view(s.shape) if kept else s.new_zeros(s.shape).bool())
        return masks
    if scope == "filter":
        norms = torch.cat([filter_norms(s) for s in scores])
        alive = None if within is None else torch.cat([rows_of(w).any(dim=1) for w in within])
        keep = _keep(norms, alive, counts[0]).split([s.shape[0] for s in scores])
        return [
            m.view(-1, *[1] * (s.dim() - 1)).expand(s.shape).clone()
            for m, s in zip(keep, scores, strict=True)
        ]
    wide = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    flat = torch.cat([s.flatten().to(wide) for s in scores])
    allowed = None if within is None else torch.cat([w.flatten() for w in within])
    keep = _keep(flat, allowed, counts[0]).split([s.numel() for s in scores])
    return [m.view(s.shape) for m, s in zip(keep, scores, strict=True)]


def filter_norms(scores: Tensor) -> Tensor:
    """l2 norm of the scores of every filter (row of the tensor viewed as (out, -1)), in float64.

    The order of the additions is part of the contract, so that every implementation ranks filters
    alike: partial sum j takes the elements j, j + 16, j + 32, ... of the row in order; then the
    upper half of the 16 sums is added to the lower, 8, 4, 2 and 1 at a time.
    """
    squares = rows_of(scores).double().square()
    squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % 16))
    sums = squares.new_zeros(squares.shape[0], 16)
    for step in squares.split(16, dim=1) if squares.shape[1] > 0 else ():
        sums = sums + step
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0].sqrt()
