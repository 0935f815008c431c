"""Exactly k best scores over many tensors at once: the selection that every pruner ends in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastprune.distributed.call import over_ranks
from fastprune.distributed.layout import is_sharded
from fastprune.ops.topk_call import Scope, Score, TopkCall, lamp_of
from fastprune.ops.topk_checks import OP, counts_of, kept_count
from fastprune.ops.topk_restricted import restricted
from fastprune.reference.global_topk_mask import fuse_score, unpack_bits

__all__ = [
    "KeptScores",
    "Scope",
    "Score",
    "global_topk_mask",
    "global_topk_sweep",
    "kept_count",
    "kept_scores",
]


@torch.library.register_fake("fastprune::global_topk_mask")
def _fake(
    values: list[Tensor],
    other: list[Tensor],
    within: list[Tensor],
    counts: list[int],
    scope: str,
    score: str,
    scale: Sequence[float] = (),
    seed: int = 0,
    packed: bool = False,
) -> list[Tensor]:
    selections = len(counts) if scope in ("global", "filter") else 1  # layer, neuron, row
    if packed:
        return [
            v.new_empty([(v.numel() + 7) // 8], dtype=torch.uint8)
            for _ in range(selections)
            for v in values
        ]
    return [v.new_empty(v.shape, dtype=torch.bool) for _ in range(selections) for v in values]


@torch.library.register_fake("fastprune::global_topk_mask_status")
def _fake_status(
    values: list[Tensor],
    other: list[Tensor],
    within: list[Tensor],
    counts: list[int],
    scope: str,
    score: str,
    scale: Sequence[float] = (),
    seed: int = 0,
    packed: bool = False,
) -> list[Tensor]:
    masks = _fake(values, other, within, counts, scope, score, scale, seed, packed)
    return [*masks, values[0].new_empty([2], dtype=torch.int64)]


@torch.library.register_fake("fastprune::topk_kept")
def _fake_kept(
    values: list[Tensor],
    other: list[Tensor],
    masks: list[Tensor],
    score: str,
    scale: Sequence[float] = (),
    seed: int = 0,
) -> Tensor:
    return values[0].new_empty([len(values), 3], dtype=torch.float64)


class KeptScores(NamedTuple):
    """What a selection kept, tensor by tensor.

    Attributes:
        kept: int64, (L,): kept elements.
        threshold: float64, (L,): least kept score, infinity where nothing is kept. Its minimum is
            the threshold of a selection with scope ``global``: the k-th best score.
        total: float64, (L,): sum of the kept scores, in float64.
    """

    kept: Tensor
    threshold: Tensor
    total: Tensor


def global_topk_mask(
    scores: Sequence[Tensor],
    density: float | None = None,
    *,
    k: int | Sequence[int] | None = None,
    scope: Scope = "global",
    score: Score = "identity",
    other: Sequence[Tensor] | None = None,
    within: Sequence[Tensor] | None = None,
    scale: Sequence[float] | None = None,
    seed: int | None = None,
    frozen: Sequence[bool] | None = None,
    min_per_tensor: int = 0,
    packed: bool = False,
    names: Sequence[str] | None = None,
    group: Any = None,
    ranks: Literal["distinct", "replicated"] = "distinct",
) -> list[Tensor]:
    r"""Mark the best-scoring weights of a whole network, exactly as many as asked for.

    Equal scores: the earlier flat index wins, tensors in the order given, elements in row-major
    order whatever the strides. -0 equals +0, infinities are ordered. A NaN score is an error that
    names its tensor; NaN outside ``within`` is ignored.

    Args:
        scores: L tensors of any shapes on one device; float32, float64, bfloat16 or float16,
            mixed at will. Not necessarily the scores themselves: see ``score``. Higher is kept.
        density: kept fraction, in [0, 1]: of N units, floor(density * N + 0.5) are kept
            (:func:`kept_count`). All units count towards N, also those outside ``within``.
        k: kept number, instead of ``density``; at most the number of candidates. An int for the
            scopes ``global`` and ``filter``; one int per tensor for ``layer`` (a quota), and for
            ``neuron``, where it is the number kept in each row.
        scope: where units compete. ``global``: all elements of all tensors. ``layer``: the
            elements of each tensor apart. ``neuron``: the elements of each row apart, the tensor
            seen as (size of dimension 0, everything else). ``filter``: whole rows, those of all
            tensors together, ranked by the l2 norm of their scores (computed in float64, added up
            in the order that :func:`fastprune.reference.global_topk_mask.filter_norms` defines);
            a kept row is True throughout (within ``within``).
        score: what is computed on the fly from v in ``scores`` and u in ``other``: ``identity`` v,
            ``magnitude`` abs(v), ``product`` v * u, ``saliency`` abs(v * u), ``square`` v^2. In
            float32, or in float64 where a factor is float64; scores of different dtypes are
            compared without rounding. ``noise``: uniform in [0, 1) from ``seed`` and the flat
            index among all elements, in float64, whatever the tensors hold. ``lamp``: v^2 over
            the sum of the squares that are not smaller, of the same tensor (within ``within``), in
            float64; infinite weights count as NaN; with the scopes ``neuron`` and ``filter``
            made by the plain torch reference, which sorts every tensor.
        other: second factors for ``product`` and ``saliency``, shaped and placed like ``scores``.
        within: bool tensors shaped and placed like ``scores``: only True elements are candidates,
            so masks only lose entries. With scope ``filter`` the candidates are the rows with any
            True element; a row is ranked by all its scores, and keeps its True elements.
        scale: one finite factor per tensor that multiplies its scores, in their dtype.
        seed: of the noise; taken modulo 2^64.
        frozen: one bool per tensor: a frozen tensor keeps all its candidates, and they count
            towards N and k. With scope ``global`` or ``filter``.
        min_per_tensor: units that every tensor which is not frozen keeps at least (all its
            candidates, if it has fewer): its best ones. The rest of k goes to the best of all
            others. With scope ``global`` or ``filter``.
        packed: masks of bits: flat uint8 tensors of ceil(n / 8) elements, the first element of
            eight in the lowest bit, as ``numpy.packbits(bitorder="little")`` packs.
        names: one name per tensor, for error messages.
        group: a ``torch.distributed`` process group whose ranks select together, each of them in
            this call with the same arguments but for the tensors. DTensors need none: their mesh
            and placements (Shard and Replicate, uneven or empty shards too) say what is where, the
            masks are DTensors placed alike, and ties go by the index in the whole tensors. A rank
            whose part fails raises its error, all others a RuntimeError that names it; a rank that
            dies or stays away is a RuntimeError after the group's timeout. No rank then has masks.
        ranks: what the ranks of ``group`` hold. ``distinct``: each its own tensors, as many as it
            likes; the masks are those of all lists one after the other, rank 0's first (scopes
            ``layer`` and ``neuron`` concern the rank's own tensors). ``replicated``: all the same
            tensors, as under DDP: ``other``, or ``scores`` where there is one factor, is averaged
            if it differs, and all ranks return the same masks. With ``magnitude`` nothing is
            averaged: weights that differ are an error.
            Over ranks whose elements compete, ``noise``, ``lamp`` and ``min_per_tensor`` are
            refused, ``packed`` too for DTensors, and rows must lie whole on a rank for the scopes
            ``neuron`` and ``filter``.
    Returns:
        L contiguous bool tensors, shaped and placed like ``scores``; uint8 if ``packed``.
    Raises:
        ValueError: a NaN score, no tensors, shapes, devices or lengths that differ, not exactly
            one of ``density`` and ``k``, one of them out of range, more to keep than candidates,
            fewer than the frozen ones and minima need, an unknown scope or score, ``other`` or
            ``seed`` missing or unused, a 0-dimensional tensor with scope ``neuron`` or ``filter``.
        TypeError: dtypes or argument types other than described.
        RuntimeError: with ``group`` or DTensors: another rank failed, died or stayed away, or
            copies of the same shards came to different masks.

    About one read of the factors and one write of the masks; a second read where a massed value
    (the zeros of an earlier mask) is split by the threshold, and for ``lamp``; with
    ``min_per_tensor`` further passes while tensors fall short. Extra memory: a few per cent of the
    scores, never a copy of them, contiguous or not; a contiguous copy of a non-contiguous
    ``within``. The result does not depend on the number of threads. Not differentiable: inputs
    that require a gradient are read as constants.

    On CUDA: the same masks to the bit; two reads of the factors, further ones where more than a
    fiftieth of them shares the leading bits of the threshold (massed values), and one more read
    for each further count of a sweep; contiguous copies of non-contiguous tensors. It waits for
    the GPU once, to learn of NaN scores, but not while a CUDA graph is captured: then the next
    call on a CUDA device after the graph's replay raises a RuntimeError. ``lamp`` scores are made
    by the plain torch reference, which no graph captures, as is everything in a build without
    CUDA kernels.

    Papers: de Jorge et al. 2021, Algorithm 1, line 8; the scopes global, layer and neuron as in
    Diao et al. 2023, Section 4; filters ranked across layers as in Lin et al. 2020; LAMP as in Lee
    et al. 2021, Equation 3.
    """
    if group is not None or ranks != "distinct" or is_sharded(scores):
        more: dict[str, Any] = {"scale": scale, "seed": seed, "frozen": frozen}
        more |= {"min_per_tensor": min_per_tensor, "packed": packed, "names": names}
        return over_ranks(scores, density, k, scope, score, other, within, group, ranks, more)
    call = TopkCall.check(scores, scope, score, other, within, scale, seed, packed, names)
    counts = counts_of(call.units(), scope, density, k)
    if frozen is None and isinstance(min_per_tensor, int) and min_per_tensor == 0:
        return call.run(counts)[0]
    return restricted(call, counts, frozen, min_per_tensor)


def global_topk_sweep(
    scores: Sequence[Tensor],
    densities: Sequence[float] | None = None,
    *,
    k: Sequence[int] | Sequence[Sequence[int]] | None = None,
    scope: Scope = "global",
    score: Score = "identity",
    other: Sequence[Tensor] | None = None,
    within: Sequence[Tensor] | None = None,
    scale: Sequence[float] | None = None,
    seed: int | None = None,
    packed: bool = False,
    names: Sequence[str] | None = None,
) -> list[list[Tensor]]:
    r"""The masks of :func:`global_topk_mask` for several densities or counts at once.

    A sweep over sparsities, or all kept counts of a schedule, on the same scores.

    Args:
        densities: T kept fractions.
        k: T times what :func:`global_topk_mask` takes as ``k``, instead of ``densities``.
        scores, scope, score, other, within, scale, seed, packed, names: as there.
    Returns:
        T lists of L masks, in the order given.
    Raises:
        As :func:`global_topk_mask`, and ValueError for an empty sweep.

    With scope ``global`` the factors are read once for all masks; with ``filter`` the norms are
    computed once; otherwise one selection after another.
    """
    call = TopkCall.check(scores, scope, score, other, within, scale, seed, packed, names)
    given: Any = densities if k is None else k
    if (densities is None) == (k is None):
        raise ValueError(
            f"{OP}: densities, k: expected exactly one of them, got "
            + ("neither" if k is None else "both")
        )
    if isinstance(given, (str, Tensor)) or not isinstance(given, Sequence):
        name = "densities" if k is None else "k"
        raise TypeError(f"{OP}: {name}: expected a sequence, got {type(given).__name__}")
    if len(given) == 0:
        raise ValueError(f"{OP}: {'densities' if k is None else 'k'}: expected at least one")
    units = call.units()
    if k is None:
        counts = [counts_of(units, scope, density, None) for density in given]
    else:
        counts = [counts_of(units, scope, None, one) for one in given]
    if scope in ("global", "filter"):
        return call.run([single for (single,) in counts])
    return [call.run(c)[0] for c in counts]


def kept_scores(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    score: Score = "identity",
    other: Sequence[Tensor] | None = None,
    within: Sequence[Tensor] | None = None,
    scale: Sequence[float] | None = None,
    seed: int | None = None,
    names: Sequence[str] | None = None,
) -> KeptScores:
    """Counts, thresholds and sums of the scores that masks keep; one read of factors and masks.

    Args:
        masks: what :func:`global_topk_mask` returned for the same arguments (bool, or packed).
        scores, score, other, scale, seed, names: as there; ``within`` matters to ``lamp`` only.
    Returns:
        :class:`KeptScores`. Scores are those of the elements, also for masks of whole filters.
        Sums are taken in float64, in an order that does not depend on the threads; a kept NaN
        makes them NaN.
    Raises:
        ValueError, TypeError: as :func:`global_topk_mask`; a mask of another shape or dtype.

    ``lamp`` scores are made by the plain torch reference, which sorts every tensor.
    """
    given: Any = masks
    if isinstance(given, (str, Tensor)) or not isinstance(given, Sequence):
        raise TypeError(f"{OP}: masks: expected a sequence of tensors, got {type(given).__name__}")
    bits = bool(masks) and isinstance(masks[0], Tensor) and masks[0].dtype == torch.uint8
    call = TopkCall.check(scores, "global", score, other, within, scale, seed, bits, names)
    if len(masks) != len(call.values):
        raise ValueError(f"{OP}: masks: expected {len(call.values)} tensors, one per tensor")
    for i, (v, m) in enumerate(zip(call.values, masks, strict=True)):
        shape = ((v.numel() + 7) // 8,) if bits else tuple(v.shape)
        expected = torch.uint8 if bits else torch.bool
        if m.dtype != expected or tuple(m.shape) != shape or m.device != v.device:
            raise ValueError(
                f"{OP}: masks{call.labels[i]}: expected {expected} of shape {shape} on {v.device}, "
                f"got {m.dtype} of shape {tuple(m.shape)} on {m.device}"
            )
    if score == "lamp":
        return kept_scores(lamp_of(call.values, call.within), masks, names=names)
    with torch.no_grad():
        if call.values[0].device.type not in ("cpu", "meta"):
            return _kept_by_reference(call, list(masks))
        kept = torch.ops.fastprune.topk_kept(
            call.values,
            call.other,
            [m.contiguous() for m in masks],
            call.score,
            call.scale,
            call.seed,
        )
    return KeptScores(kept[:, 0].long(), kept[:, 1].clone(), kept[:, 2].clone())


def _kept_by_reference(call: TopkCall, masks: list[Tensor]) -> KeptScores:
    rows, first = [], 0
    for i, v in enumerate(call.values):
        other = call.other[i] if call.other else None
        scale = call.scale[i] if call.scale else 1.0
        fused = fuse_score(v, other, call.score, scale, seed=call.seed, first=first).double()
        mask = masks[i] if masks[i].dtype == torch.bool else unpack_bits(masks[i], v.shape)
        kept = fused[mask]
        least = kept.min() if kept.numel() else kept.new_tensor(math.inf)
        rows.append(torch.stack([kept.new_tensor(kept.numel()), least, kept.sum()]))
        first += v.numel()
    table = torch.stack(rows)
    return KeptScores(table[:, 0].long(), table[:, 1].clone(), table[:, 2].clone())
