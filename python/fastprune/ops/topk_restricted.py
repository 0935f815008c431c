"""Selections in which some tensors are kept whole, or keep a minimum of their own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import Tensor

from fastprune.ops.topk_call import TopkCall
from fastprune.ops.topk_checks import OP
from fastprune.reference.global_topk_mask import rows_of, uniform_noise, unpack_bits


def restricted(call: TopkCall, counts: list[int], frozen: Any, min_per_tensor: Any) -> list[Tensor]:
    """The masks of one selection; see :func:`fastprune.global_topk_mask`.

    Tensors that fall short of the minimum in the best selection of all get exactly their minimum,
    and the rest is chosen anew among the others. That only raises the threshold, so whoever fell
    short still does, and the loop ends after at most one round per tensor with the masks of the
    definition: everybody's best few, then the best of all others.
    """
    if call.scope not in ("global", "filter"):
        name = "frozen" if frozen is not None else "min_per_tensor"
        raise ValueError(f"{OP}: {name}: expected scope 'global' or 'filter', got {call.scope!r}")
    if isinstance(min_per_tensor, bool) or not isinstance(min_per_tensor, Integral):
        kind = type(min_per_tensor).__name__
        raise TypeError(f"{OP}: min_per_tensor: expected an int, got {kind}")
    if min_per_tensor < 0:
        raise ValueError(f"{OP}: min_per_tensor: expected at least 0, got {min_per_tensor}")
    n = len(call.values)
    if call.score == "noise":  # drawn by the index among all tensors, of which some leave
        first = itertools.accumulate((v.numel() for v in call.values), initial=0)
        pairs = zip(call.values, first, strict=False)
        noise = [uniform_noise(v.shape, call.seed, at, v.device) for v, at in pairs]
        call = replace(call, values=noise, score="identity", seed=0)
    whole = check_frozen(frozen, n)
    free = [i for i in range(n) if not whole[i]]
    candidates = {i: call.candidates(i) for i in range(n)}
    masks: dict[int, Tensor] = {i: call.all_of(i) for i in range(n) if whole[i]}
    k = counts[0] - sum(candidates[i] for i in masks)
    least = {i: min(int(min_per_tensor), candidates[i]) for i in free}
    needed = sum(least.values())
    if k < needed:
        raise ValueError(
            f"{OP}: k: expected at least {counts[0] - k + needed}: {counts[0] - k} units of frozen "
            f"tensors and minima of {needed}, got {counts[0]}"
        )
    while free:
        chosen = call.subset(free).run([k])[0]
        short = [i for i, m in zip(free, chosen, strict=True) if _units(call, i, m) < least[i]]
        if not short:
            masks.update(zip(free, chosen, strict=True))
            break
        for i in short:
            masks[i] = call.subset([i]).run([least[i]])[0][0]
            k -= least[i]
        free = [i for i in free if i not in short]
    return [masks[i] for i in range(n)]


def _units(call: TopkCall, i: int, mask: Tensor) -> int:
    """Kept elements, or filters, of a tensor."""
    if call.packed:
        mask = unpack_bits(mask, call.values[i].shape)
    return int((rows_of(mask).any(dim=1) if call.scope == "filter" else mask).sum())


def check_frozen(frozen: Any, n: int) -> Sequence[bool]:
    """One bool for each of n tensors; None: nothing is frozen."""
    if frozen is None:
        return [False] * n
    if isinstance(frozen, (str, Tensor)) or not isinstance(frozen, Sequence):
        kind = type(frozen).__name__
        raise TypeError(f"{OP}: frozen: expected a sequence of bools, got {kind}")
    if len(frozen) != n:
        raise ValueError(f"{OP}: frozen: expected {n} bools, one per tensor, got {len(frozen)}")
    for i, f in enumerate(frozen):
        if not isinstance(f, bool):
            raise TypeError(f"{OP}: frozen[{i}]: expected a bool, got {type(f).__name__}")
    return frozen
