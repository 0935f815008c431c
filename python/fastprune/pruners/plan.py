"""How many weights each step of a pruning run keeps, and of which layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastprune.checks import fraction
from fastprune.ops.global_topk_mask import Scope, kept_count
from fastprune.pruners.registry import folded
from fastprune.quotas.counting import apportioned, counts
from fastprune.quotas.formulas import (
    OnInvalid,
    QuotaFunction,
    check_on_invalid,
    erk,
    igq,
    smart_ratio,
    uniform,
    uniform_plus,
)
from fastprune.schedules import Schedule, kept_counts

SCOPES = ("global", "layer", "neuron", "filter")
QUOTAS: dict[str, QuotaFunction] = {
    "uniform": uniform,
    "uniform-plus": uniform_plus,
    "erk": erk,
    "smart-ratio": smart_ratio,
    "igq": igq,
}
Quota: TypeAlias = str | QuotaFunction | Sequence[float] | Mapping[str, float]


def plan_counts(
    shapes: Mapping[str, torch.Size],
    sparsity: float | None,
    scope: Scope,
    quota: Quota | None,
    on_invalid: OnInvalid | None,
    schedule: Schedule | Sequence[Sequence[int]],
    steps: int | None,
    monotone: bool,
) -> list[int | list[int]]:
    """Kept counts of every step, as ``global_topk_mask`` takes them for ``scope``.

    The final count is floor(density n + 0.5) for each n: all weights together (``global``), each
    layer (``layer``), each row of each layer (``neuron``), all filters together (``filter``). With
    a quota the counts are those of scope ``layer``.

    Args:
        shapes: parameter name -> the weight's shape.
        monotone: no count may increase.
    """
    if quota is None and on_invalid is not None:
        raise ValueError("on_invalid: it says what to do about a quota, and there is none")
    if quota is not None:
        if scope != "global":
            raise ValueError(
                f"scope: a quota makes the weights of each layer compete; leave out {scope!r}"
            )
        return [*_quota_counts(shapes, sparsity, quota, on_invalid, schedule, steps, monotone)]
    density = None if sparsity is None else 1.0 - sparsity
    sizes = units(shapes.values(), scope)
    single = scope in ("global", "filter")
    columns: list[Any] = [schedule] * len(sizes)
    if not single and not isinstance(schedule, str):
        columns = _transposed(schedule, len(sizes), scope)
    plans = [
        kept_counts(
            column,
            n,
            None if density is None else kept_count(density, n),
            steps,
            density=density,
            monotone=monotone,
        )
        for column, n in zip(columns, sizes, strict=True)
    ]
    if single:
        return list(plans[0])
    return [list(counts) for counts in zip(*plans, strict=True)]


def units(shapes: Iterable[torch.Size], scope: Scope) -> list[int]:
    """Numbers of units that compete: of the whole, or of each layer (of a row of each layer)."""
    if scope == "global":
        return [sum(s.numel() for s in shapes)]
    if scope == "filter":
        return [sum(s[0] for s in shapes)]
    if scope == "layer":
        return [s.numel() for s in shapes]
    return [s[1:].numel() for s in shapes]


def _transposed(schedule: Any, layers: int, scope: str) -> list[list[int]]:
    rows = list(schedule) if isinstance(schedule, Sequence) else []
    if not rows or not all(isinstance(r, Sequence) and len(r) == layers for r in rows):
        raise ValueError(
            f"schedule: with scope={scope!r}, expected one sequence of {layers} kept counts (one "
            "per layer) for each step"
        )
    return [[row[i] for row in rows] for i in range(layers)]


def _quota_counts(
    shapes: Mapping[str, torch.Size],
    sparsity: float | None,
    quota: Quota,
    on_invalid: OnInvalid | None,
    schedule: Schedule | Sequence[Sequence[int]],
    steps: int | None,
    monotone: bool,
) -> list[list[int]]:
    """Kept counts of every layer at every step, for scope ``layer``, where a quota shares them out.

    A quota that is a function is asked at every step, at the sparsity that the schedule has then;
    the step's total is exactly the schedule's. One that is fixed gives each layer its last count,
    and the layer follows the schedule by itself.

    Args:
        shapes: parameter name -> the weight's shape.
        sparsity: that of all weights; None: as the schedule or the fixed quota says.
        quota, on_invalid: as in ``prune``.
        monotone: no layer's count may increase.
    """
    if on_invalid is not None:
        check_on_invalid(on_invalid)
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    if isinstance(quota, str) or callable(quota):
        return _asked(quota, shapes, sizes, sparsity, on_invalid, schedule, steps, monotone)
    if not isinstance(schedule, str):
        raise ValueError(
            "schedule: kept counts of all weights together need a quota that is a name or a "
            "function of the sparsity; fixed layer sparsities go with a named schedule"
        )
    total = None if sparsity is None else kept_count(1.0 - sparsity, sum(sizes.values()))
    fixed = _fixed(quota, list(sizes))
    last = _whole_counts(sizes, fixed, total, on_invalid)
    columns = [
        kept_counts(schedule, n, k, steps, density=1.0 - s, monotone=monotone)
        for n, k, s in zip(sizes.values(), last, fixed, strict=True)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _asked(
    quota: str | QuotaFunction,
    shapes: Mapping[str, torch.Size],
    sizes: Mapping[str, int],
    sparsity: float | None,
    on_invalid: OnInvalid | None,
    schedule: Any,
    steps: int | None,
    monotone: bool,
) -> list[list[int]]:
    n = sum(sizes.values())
    density = None if sparsity is None else 1.0 - sparsity
    k = None if density is None else kept_count(density, n)
    totals = kept_counts(schedule, n, k, steps, density=density, monotone=monotone)
    plan: list[list[int]] = []
    later: list[float] = []
    # From the last step, which is that of a run of one step, back to the first: largest remainders
    # by themselves may take a weight from a layer when the total grows.
    for step in range(len(totals) - 1, -1, -1):
        at = 1.0 - totals[step] / n if n else 0.0
        if plan:  # an early step leads to the last one, which alone has to be valid
            on_invalid = None if on_invalid is None else "redistribute"
        elif sparsity is not None:
            at = sparsity
        sparsities = _answer(quota, shapes, at, on_invalid)
        row = _whole_counts(sizes, sparsities, totals[step], on_invalid)
        shares = [(1.0 - s) * size for s, size in zip(sparsities, sizes.values(), strict=True)]
        if monotone and plan:
            for name, now, then in zip(sizes, shares, later, strict=True):
                if then > now + 1.0:  # less comes of rounding the totals
                    raise ValueError(
                        f"quota: it leaves {name} {now:.6g} weights at step {step + 1} and "
                        f"{then:.6g} at the next, but pruned weights do not return in this method"
                    )
            row = apportioned(shares, totals[step], plan[0], [*sizes.values()])
        plan.insert(0, row)
        later = shares
    return plan


def quota_shares(
    quota: str | QuotaFunction, shapes: Mapping[str, torch.Size], sparsity: float
) -> list[float]:
    """Weights that a quota leaves each layer at a sparsity, not rounded."""
    answer = _answer(quota, shapes, sparsity, None)
    return [(1.0 - s) * shape.numel() for s, shape in zip(answer, shapes.values(), strict=True)]


def _whole_counts(
    sizes: Mapping[str, int],
    sparsities: list[float],
    total: int | None,
    on_invalid: OnInvalid | None,
) -> list[int]:
    names, numbers = list(sizes), list(sizes.values())
    return counts(numbers, sparsities, total=total, on_invalid=on_invalid, names=names)


def _answer(
    quota: str | QuotaFunction,
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    on_invalid: OnInvalid | None,
) -> list[float]:
    """What a quota says at ``sparsity``, once it is one number in [0, 1] per layer."""
    function = _named(quota, on_invalid) if isinstance(quota, str) else quota
    given = function([tuple(s) for s in shapes.values()], sparsity)
    try:
        answer = list(given)
    except TypeError:
        raise TypeError(
            f"quota: expected one sparsity per layer, got {type(given).__name__}"
        ) from None
    if len(answer) != len(shapes):
        raise ValueError(
            f"quota: expected {len(shapes)} sparsities, one per layer, got {len(answer)}"
        )
    return [fraction(s, f"quota[{n!r}]") for n, s in zip(shapes, answer, strict=True)]


def _named(name: str, on_invalid: OnInvalid | None) -> QuotaFunction:
    """The quota called ``name``, told what to do about densities above 1."""
    wanted = folded(name.replace("+", "plus"))
    for known, function in QUOTAS.items():
        if wanted in (folded(known), folded(known) + "s"):
            if function in (erk, smart_ratio) and on_invalid is not None:
                return partial(function, on_invalid=on_invalid)
            return function
    raise ValueError(f"quota: unknown name {name!r}; expected one of {', '.join(QUOTAS)}")


def _fixed(quota: Any, names: list[str]) -> list[float]:
    """One sparsity per layer, from a sequence in the order of ``names`` or a mapping."""
    if isinstance(quota, Mapping):
        if any(isinstance(value, Tensor) for value in quota.values()):
            raise TypeError("quota: these are masks; fastprune.quotas.of gives their sparsities")
        if missing := [n for n in names if n not in quota]:
            raise ValueError(f"quota: no sparsity for {', '.join(missing)}")
        if unknown := [str(n) for n in quota if n not in names]:
            raise ValueError(f"quota: not prunable here: {', '.join(unknown)}")
        quota = [quota[n] for n in names]
    if not isinstance(quota, Sequence):
        raise TypeError(
            "quota: expected a name, a function, or one sparsity per layer as a sequence or a "
            f"mapping, got {type(quota).__name__}"
        )
    if len(quota) != len(names):
        raise ValueError(
            f"quota: expected {len(names)} sparsities, one per layer, got {len(quota)}"
        )
    return [fraction(s, f"quota[{n!r}]") for n, s in zip(names, quota, strict=True)]
