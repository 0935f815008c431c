"""The bound on pruning that the PQ index gives."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.tensor_statistics import exponents_of


def pq_bound(
    index: float | Tensor,
    count: float | Tensor,
    p: float = 0.5,
    q: float = 1.0,
    eta_r: float = 0.0,
) -> Any:
    r"""The PQI bound: fewer weights than this cannot carry what ``count`` weights carry.

    .. math:: r = d (1 + \eta_r)^{-q/(q-p)} (1 - I)^{pq/(q-p)}

    Args:
        index: I, the PQ index of d weights for p and q; a number, or a tensor of them.
        count: d; a number, or a tensor that fits ``index``.
        p, q: 0 < p < q, those of the index.
        eta_r: what the removed weights may carry, in sums of abs(w)^p, over what the others do;
            >= 0.
    Returns:
        r in [0, d]: a float, or a float64 tensor where one of the two is a tensor. Not rounded.
    Raises:
        ValueError, TypeError: an argument out of range or of another kind.
    Paper: Diao et al. 2023, Theorem 2.
    """
    op = "pq_bound"
    low, high = pq_of(p, q, op)
    eta = number(eta_r, f"{op}: eta_r", 0.0, math.inf)
    for name, x, most in (("index", index, 1.0), ("count", count, math.inf)):
        if isinstance(x, Tensor):
            if x.is_complex() or x.dtype == torch.bool:
                raise TypeError(f"{op}: {name}: expected real numbers, got {x.dtype}")
            if not bool(((x >= 0) & (x <= most)).all()):
                raise ValueError(f"{op}: {name}: expected numbers in [0, {most:g}]")
        else:
            number(x, f"{op}: {name}", 0.0, most)
    i, d = (x.double() if isinstance(x, Tensor) else float(x) for x in (index, count))
    return bound_of(d, i, low, high, eta)


def bound_of(d: Any, index: Any, p: float, q: float, eta_r: float) -> Any:
    """The bound for checked arguments; the order of the operations is part of SAP's definition."""
    return d * (1.0 + eta_r) ** (-q / (q - p)) * (1.0 - index) ** (p * q / (q - p))


def pq_of(p: Any, q: Any, op: str) -> list[float]:
    """p and q, checked."""
    low, high = exponents_of((p, q), op, ("p", "q"))
    if not low < high:
        raise ValueError(f"{op}: p: expected less than q = {q}, got {p}")
    return [low, high]


def number(value: Any, name: str, low: float, high: float) -> float:
    """``value`` as a float, if it is a finite number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    x = float(value)
    if not (low <= x <= high and math.isfinite(x)):
        bounds = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected a number {bounds}, got {value}")
    return x
