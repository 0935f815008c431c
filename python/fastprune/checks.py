"""Numbers as arguments: checked, with messages that name the argument."""

from __future__ import annotations

import operator
from numbers import Real


def whole(value: object, name: str, low: int, high: int | None) -> int:
    """``value`` as an int, if it is a whole number within the bounds (numpy's count, bools not)."""
    expected = f"a whole number >= {low}" if high is None else f"a whole number in [{low}, {high}]"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}: expected {expected}, got {value!r}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def fraction(value: object, name: str) -> float:
    """``value`` as a float, if it is a number in [0, 1] (numpy's count, bools and tensors not)."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return float(value)
