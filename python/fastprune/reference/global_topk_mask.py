"""Oracle for :func:`fastprune.global_topk_mask`: a stable descending sort, nothing clever."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fuse_score(
    values: Tensor,
    other: Tensor | None,
    score: str,
    scale: float = 1.0,
    *,
    within: Tensor | None = None,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """The score of every weight, in float32 (float64 where a factor is float64).

    ``identity``: values; ``magnitude``: |values|; ``product``: values * other; ``saliency``:
    |values * other|; ``square``: values^2; ``noise`` and ``lamp``, both in float64, as
    :func:`uniform_noise` and :func:`lamp_scores` say. Then times ``scale``, in the same dtype.
    """
    if score == "noise":
        return uniform_noise(values.shape, seed, first, values.device) * scale
    if score == "lamp":
        return lamp_scores(values, within)
    doubles = values.dtype == torch.float64 or (other is not None and other.dtype == torch.float64)
    wide = torch.float64 if doubles else torch.float32
    a = values.detach().to(wide)
    b = None if other is None else other.detach().to(wide)
    if score == "magnitude":
        a = a.abs()
    elif score == "square":
        a = a * a
    elif score != "identity":
        assert b is not None, score
        a = (a * b).abs() if score == "saliency" else a * b
    return a if scale == 1 else a * scale


def uniform_noise(
    shape: Sequence[int], seed: int, first: int = 0, device: torch.device | None = None
) -> Tensor:
    """Uniform in [0, 1), float64: outputs ``first``, ``first + 1``, ... of SplitMix64.

    The upper 52 bits of each output, over 2^52; the generator starts with ``seed``.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """

    def signed(constant: int) -> int:  # int64 arithmetic wraps, which is what is wanted
        return constant - 2**64 if constant >= 2**63 else constant

    def shifted(z: Tensor, bits: int) -> Tensor:  # logical: >> copies the sign
        moved: Tensor = (z >> bits) & (2 ** (64 - bits) - 1)
        return moved

    index = torch.arange(first + 1, first + 1 + math.prod(shape), device=device)
    z = index * signed(0x9E3779B97F4A7C15) + signed(seed % 2**64)
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    z = z ^ shifted(z, 31)
    return (shifted(z, 12).double() / 2**52).view(tuple(shape))


def lamp_scores(values: Tensor, within: Tensor | None = None) -> Tensor:
    """LAMP's score of every weight of a layer, in float64.

    w_i^2 over the sum of w_j^2 of all j with |w_j| >= |w_i|, i among them; 0 for a zero weight.
    ``within`` (bool) restricts the j; what is outside scores 0.
    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", 2021, Equation 3.
    """
    squares = values.detach().double().square().flatten()
    if within is not None:
        squares = torch.where(within.flatten(), squares, 0.0)
    order = torch.sort(squares, descending=True, stable=True)
    # Equal weights share the sum up to the last of them.
    _, inverse, counts = torch.unique_consecutive(
        order.values, return_inverse=True, return_counts=True
    )
    totals = order.values.cumsum(0)[counts.cumsum(0) - 1][inverse] if len(squares) else squares
    scores = torch.where(order.values == 0, 0.0, order.values / totals)
    return torch.zeros_like(squares).scatter_(0, order.indices, scores).view(values.shape)


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as flat uint8, eight elements to a byte, the first in the lowest bit."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor that :func:`pack_bits` packed."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits[:, None] >> places) & 1).bool().flatten()
    return flat[: math.prod(shape)].view(tuple(shape))


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
    scale: Sequence[float] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Masks for already validated arguments.

    ``counts`` holds one kept count for scope ``global`` and ``filter``, one per tensor for
    ``layer``, and one per row, tensor after tensor, for ``neuron``.
    """
    first = list(itertools.accumulate((v.numel() for v in values), initial=0))
    scores = [
        fuse_score(
            v,
            None if other is None else other[i],
            score,
            1.0 if scale is None else scale[i],
            within=None if within is None else within[i],
            seed=seed,
            first=first[i],
        )
        for i, v in enumerate(values)
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
