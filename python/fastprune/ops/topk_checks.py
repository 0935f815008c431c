"""Argument checks of selections: each message names the argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

OP = "global_topk_mask"


def kept_count(density: float, n: int) -> int:
    """Number of entries kept out of n: floor(density * n + 0.5), the rounding used everywhere."""
    return math.floor(density * n + 0.5)


def labels_of(names: Any, n: int) -> list[str]:
    """The index, and the tensor's name if given."""
    if names is None:
        return [f"[{i}]" for i in range(n)]
    if isinstance(names, str):
        raise TypeError(f"{OP}: names: expected a sequence of names, got a string")
    if len(names) != n:
        raise ValueError(f"{OP}: names: expected {n} names, one per tensor, got {len(names)}")
    return [f"[{i}] ({name})" for i, name in enumerate(names)]


def scales_of(scale: Any, score: str, labels: list[str]) -> list[float]:
    if scale is None:
        return []
    if score == "lamp":
        raise ValueError(f"{OP}: scale: score 'lamp' does not use it, leave it out")
    if isinstance(scale, (str, Tensor)) or not isinstance(scale, Sequence):
        kind = type(scale).__name__
        raise TypeError(f"{OP}: scale: expected a sequence of numbers, got {kind}")
    if len(scale) != len(labels):
        raise ValueError(
            f"{OP}: scale: expected {len(labels)} numbers, one per tensor, got {len(scale)}"
        )
    for i, s in enumerate(scale):
        if isinstance(s, bool) or not isinstance(s, Real):
            raise TypeError(f"{OP}: scale{labels[i]}: expected a number, got {type(s).__name__}")
        if not math.isfinite(s):
            raise ValueError(f"{OP}: scale{labels[i]}: expected a finite number, got {s}")
    return [float(s) for s in scale]


def expected_float(t: Tensor) -> str:
    return f"expected dtype float32, float64, bfloat16 or float16, got {t.dtype}"


def tensors(given: Any, name: str, like: list[Tensor] | None) -> list[Tensor]:
    """A list of tensors, of the same length, shapes and device as ``like``."""
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        kind = type(given).__name__
        raise TypeError(f"{OP}: {name}: expected a sequence of tensors, got {kind}")
    if like is not None and len(given) != len(like):
        raise ValueError(
            f"{OP}: {name}: expected {len(like)} tensors, one per tensor of scores, "
            f"got {len(given)}"
        )
    for i, t in enumerate(given):
        if not isinstance(t, Tensor):
            kind = type(t).__name__
            raise TypeError(f"{OP}: {name}[{i}]: expected a tensor, got {kind}")
        if like is None:
            continue
        if t.shape != like[i].shape:
            raise ValueError(
                f"{OP}: {name}[{i}]: expected the shape {tuple(like[i].shape)} of scores[{i}], "
                f"got {tuple(t.shape)}"
            )
        if t.device != like[i].device:
            raise ValueError(
                f"{OP}: {name}[{i}]: expected the device {like[i].device} of scores[{i}], "
                f"got {t.device}"
            )
    return list(given)


def check_counts(density: Any, k: Any, scope: str) -> None:
    """The types of ``density`` and ``k``; their ranges need the sizes of all ranks."""
    if (density is None) == (k is None):
        raise ValueError(
            f"{OP}: density, k: expected exactly one of them, got "
            + ("neither" if k is None else "both")
        )
    if density is not None:
        if isinstance(density, bool) or not isinstance(density, Real):
            raise TypeError(f"{OP}: density: expected a number, got {type(density).__name__}")
        if not 0 <= float(density) <= 1:
            raise ValueError(f"{OP}: density: expected a fraction in [0, 1], got {density}")
    elif scope in ("global", "filter"):
        if isinstance(k, bool) or not isinstance(k, Integral):
            raise TypeError(
                f"{OP}: k: expected an int with scope {scope!r}, got {type(k).__name__}"
            )
    elif isinstance(k, str) or not isinstance(k, Sequence):
        raise TypeError(
            f"{OP}: k: expected a sequence of one int per tensor with scope {scope!r}, "
            f"got {type(k).__name__}"
        )


def kept_counts(density: float | None, k: Any, units: Sequence[int], scope: str) -> list[int]:
    """Kept counts, one for each number of units."""
    if density is not None:
        return [kept_count(float(density), n) for n in units]
    single = scope in ("global", "filter")
    given = [k] if single else list(k)
    if len(given) != len(units):
        raise ValueError(f"{OP}: k: expected {len(units)} counts, got {len(given)}")
    for i, (count, n) in enumerate(zip(given, units, strict=True)):
        name = "k" if single else f"k[{i}]"
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(
                f"{OP}: {name}: expected an int with scope {scope!r}, got {type(count).__name__}"
            )
        if not 0 <= int(count) <= n:
            raise ValueError(f"{OP}: {name}: expected 0 to {n}, got {count}")
    return [int(count) for count in given]


def counts_of(units: Sequence[int], scope: str, density: Any, k: Any) -> list[int]:
    """Kept counts as the op takes them, checked: one, or one for each number of units."""
    check_counts(density, k, scope)
    return kept_counts(density, k, units, scope)
