"""Pruning to an effective sparsity: bisection along a chain of nested masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.ops.global_topk_mask import Scope, global_topk_mask, kept_count
from fastprune.pruners.base import Pruner, Scores, checked_scores
from fastprune.pruners.network import Network
from fastprune.pruners.plan import Quota, quota_shares
from fastprune.quotas.counting import apportioned

Count = int | list[int]
# A target inside the jump at which the network falls apart is out of reach, unless it is as near as
# this fraction of what it leaves.
_NEAR = 0.02


@dataclass(frozen=True)
class Reached:
    """Masks and their effective sparsity."""

    masks: list[Tensor]
    sparsity: float


class Chain:
    """How many units to keep (globally, of each layer, of each row) when ``pruned`` are gone.

    Nested: where ``pruned`` grows, no count does.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], scope: Scope, quota: Quota | None) -> None:
        if quota is not None and not (isinstance(quota, str) or callable(quota)):
            raise ValueError(
                "quota: fixed layer sparsities leave nothing to choose; with effective=True give a "
                "name or a function of the sparsity"
            )
        self._shapes, self._scope, self._quota = shapes, scope, quota
        self._sizes = [s.numel() for s in shapes.values()]
        rows = scope == "filter"
        self.units = sum(s[0] if rows else s.numel() for s in shapes.values())

    def count(self, pruned: int, least: Count, most: Count) -> Count:
        """The counts, within those of the masks on either side."""
        if self._quota is None and self._scope in ("global", "filter"):
            return self.units - pruned
        assert isinstance(least, list)
        assert isinstance(most, list)
        sparsity = pruned / self.units
        if self._quota is not None:
            shares = quota_shares(self._quota, self._shapes, sparsity)
            total = min(max(self.units - pruned, sum(least)), sum(most))
            return apportioned(shares, total, least, most)
        sizes = self._sizes
        if self._scope == "neuron":
            sizes = [s[1:].numel() for s in self._shapes.values()]
        wanted = [kept_count(1.0 - sparsity, n) for n in sizes]
        return [min(max(k, low), high) for k, low, high in zip(wanted, least, most, strict=True)]

    def pruned(self, count: Count) -> int:
        """The number of units that counts leave out, as near as the scope can tell."""
        if isinstance(count, int):
            return self.units - count
        if self._scope == "neuron":
            rows = [s[0] for s in self._shapes.values()]
            return self.units - sum(k * n for k, n in zip(count, rows, strict=True))
        return self.units - sum(count)

    def all(self) -> Count:
        """The counts of the dense network."""
        if self._quota is None and self._scope in ("global", "filter"):
            return self.units
        if self._scope == "neuron":
            return [s[1:].numel() for s in self._shapes.values()]
        return list(self._sizes)


def run_effective(
    pruner: Pruner,
    network: Network,
    plan: Sequence[Count],
    chain: Chain,
    scope: Scope,
    target: float,
    measure: Callable[[dict[str, Tensor]], float],
    progress: Callable[[int, int], Any] | None,
) -> dict[str, Tensor]:
    """Score and select along ``plan``, and stop at the effective sparsity ``target``.

    The plan leads to the direct sparsity ``target``, hence to an effective one at least as large.
    At the first step that passes the target, the number of pruned units is bisected between the
    step before and this one, by this step's scores: masks are nested, so effective sparsity grows
    with it. Returns the mask on the low side, one unit before the target is passed.
    Source: Vysogorets and Kempe 2023, section 5 and Algorithm 1.
    """
    names = network.names
    before = chain.all()
    masks: list[Tensor] | None = None
    for step, count in enumerate(plan, start=1):
        network.begin_step()
        scores = checked_scores(pruner, network)
        within = None if pruner.revive else masks

        def select(k: Count, scores: Scores = scores, within: Any = within) -> Reached:
            chosen = global_topk_mask(
                [scores.values[n] for n in names],
                k=k,
                scope=scope,
                score=scores.form,
                other=None if scores.other is None else [scores.other[n] for n in names],
                within=within,
                names=names,
            )
            return Reached(chosen, measure(dict(zip(names, chosen, strict=True))))

        reached = select(count)
        if reached.sparsity < target and step == len(plan):
            # The last count was rounded up: what is missing is found below it.
            before, count = count, [0] * len(count) if isinstance(count, list) else 0
            reached = select(count)
        if reached.sparsity >= target:
            found = _bisected(select, chain, before, count, reached, target)
            network.masks = dict(zip(names, found.masks, strict=True))
            if progress is not None:
                progress(len(plan), len(plan))
            break
        masks, before = reached.masks, count
        network.masks = dict(zip(names, masks, strict=True))
        if progress is not None:
            progress(step, len(plan))
    return dict(network.masks)


def _bisected(
    select: Callable[[Count], Reached],
    chain: Chain,
    most: Count,
    least: Count,
    high: Reached,
    target: float,
) -> Reached:
    low = select(most)
    if target >= 1.0:
        return high
    if low.sparsity >= target:
        if low.sparsity > target:
            raise ValueError(
                f"sparsity: an effective sparsity of {target:.6g} cannot be reached: weights that "
                f"are on no path make it {low.sparsity:.6g} before any is pruned"
            )
        return low
    first, last = chain.pruned(most), chain.pruned(least)
    while last - first > 1:
        middle = (first + last) // 2
        count = chain.count(middle, least, most)
        if count in (least, most):  # between the two the scope has nothing
            break
        reached = select(count)
        if reached.sparsity < target:
            low, most, first = reached, count, middle
        else:
            high, least, last = reached, count, middle
    gap = target - low.sparsity
    if high.sparsity == 1.0 and gap > max(_NEAR * (1.0 - target), 1.5 / chain.units):
        raise ValueError(
            f"sparsity: an effective sparsity of {target:.6g} cannot be reached: with one unit "
            f"more pruned the network falls apart; the nearest is {low.sparsity:.6g}"
        )
    return low


def measuring(
    model: nn.Module, names: Sequence[str], example_input: Any
) -> Callable[[dict[str, Tensor]], float]:
    """Effective sparsity of masks of the weights ``names``, on a program made once."""
    # The package builds on this one.
    from fastprune.effective.measure import run
    from fastprune.effective.trace import program_of

    program = program_of(model, example_input)
    total = sum(model.get_parameter(n).numel() for n in names)

    def sparsity(masks: dict[str, Tensor]) -> float:
        return 1.0 - sum(run(program, masks, write=False).counts) / total

    return sparsity
