"""Kept-count schedules: how many weights remain after each step of an iterative method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastprune.checks import whole
from fastprune.ops.global_topk_mask import kept_count

Schedule = Literal["linear", "exponential", "cubic"] | Sequence[int]
SCHEDULES = ("linear", "exponential", "cubic")


def kept_counts(
    schedule: Schedule,
    n: int,
    k: int | None,
    steps: int | None = None,
    *,
    density: float | None = None,
    monotone: bool = True,
) -> list[int]:
    r"""Kept counts after steps 1 to T, out of ``n`` weights, ending in exactly ``k``.

    With the final density d and N = ``n``, step t < T keeps

    ===============  =================================================================
    ``linear``       int(N r_t), r_t = (t/T) d + (1 - t/T)           (paper 002, eq. 8)
    ``exponential``  int(N r_t), r_t = d^(t/T)                       (paper 002, eq. 9)
    ``cubic``        floor((1 - s_t) N + 0.5), s_t = s_f - s_f (1 - t/T)^3, s_f = 1 - d
                     (Zhu and Gupta, 2017, eq. 1, from no sparsity at t = 0)
    a sequence       its own entry
    ===============  =================================================================

    and step T keeps exactly k. All of it is plain float64, evaluated in the order written. A count
    that truncation takes below k is k, so the counts of a named schedule never increase. At
    density 0, ``exponential`` keeps nothing from the first step on.

    Args:
        schedule: a name, or the counts themselves: whole numbers in [0, n], the last equal to
            ``k``.
        n: number of weights.
        k: final count, in [0, n]; None with an explicit sequence takes its last entry.
        steps: T >= 1; None with an explicit sequence takes its length.
        density: the d above; k / n where None. Give the density that k was rounded from.
        monotone: refuse an explicit sequence that increases. Only a method whose pruned weights
            may return can follow one that does.
    Returns:
        T whole numbers.
    Raises:
        ValueError: an argument is out of range, the name is unknown, an explicit sequence has
            the wrong length, an entry that is not a whole number in [0, n], an increase, or
            another last entry than k.
    """
    n = whole(n, "n", 0, None)
    if k is not None:
        k = whole(k, "k", 0, n)
    if steps is not None:
        steps = whole(steps, "steps", 1, None)
    if not isinstance(schedule, str):
        return _explicit(schedule, n, k, steps, monotone)
    if schedule not in SCHEDULES:
        raise ValueError(
            f"schedule: expected one of {', '.join(SCHEDULES)} or a sequence of kept counts, "
            f"got {schedule!r}"
        )
    if k is None:
        raise ValueError(f"k: the {schedule} schedule needs a final count")
    if steps is None:
        raise ValueError(f"steps: the {schedule} schedule needs a number of steps")
    d = density if density is not None else (k / n if n else 1.0)
    if not 0.0 <= d <= 1.0:
        raise ValueError(f"density: expected a number in [0, 1], got {d}")
    return [count_at(schedule, n, k, d, t, steps) for t in range(1, steps + 1)]


def count_at(schedule: str, n: int, k: int, density: float, t: int, steps: int) -> int:
    """Kept count at step t of a named schedule of :func:`kept_counts`, or of ``constant``.

    At t = 0 everything is kept, from t = ``steps`` on exactly ``k``; ``constant`` keeps ``k``
    throughout.
    """
    if schedule == "constant" or t >= steps:
        return k
    return n if t == 0 else max(k, _count(schedule, n, density, t, steps))


def _count(schedule: str, n: int, d: float, t: int, steps: int) -> int:
    if schedule == "linear":
        return int(n * ((t / steps) * d + (1 - t / steps)))
    if schedule == "exponential":
        return int(n * d ** (t / steps))
    s_f = 1 - d
    return kept_count(1 - (s_f - s_f * (1 - t / steps) ** 3), n)


def _explicit(
    schedule: Sequence[int], n: int, k: int | None, steps: int | None, monotone: bool
) -> list[int]:
    try:
        entries = list(schedule)
    except TypeError:
        raise ValueError(
            f"schedule: expected one of {', '.join(SCHEDULES)} or a sequence of kept counts, "
            f"got {type(schedule).__name__}"
        ) from None
    if not entries:
        raise ValueError("schedule: the sequence of kept counts is empty")
    if steps is not None and steps != len(entries):
        raise ValueError(f"schedule: {len(entries)} kept counts given for steps={steps}")
    counts = [whole(c, f"schedule[{t}]", 0, n) for t, c in enumerate(entries)]
    if k is not None and counts[-1] != k:
        raise ValueError(
            f"schedule: the last kept count is {counts[-1]}, but the sparsity asks for {k} of {n}"
        )
    if monotone:
        for t in range(1, len(counts)):
            if counts[t] > counts[t - 1]:
                raise ValueError(
                    f"schedule[{t}]: {counts[t]} kept after {counts[t - 1]}: pruned weights do "
                    "not return in this method, so kept counts cannot increase"
                )
    return counts
