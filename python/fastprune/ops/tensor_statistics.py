"""Statistics of many tensors in one read: sums, norms, extremes, and indices of sparsity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprune import reference

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SMALLEST_P, _LARGEST_P = 2.0**-20, 2.0**20
_OP = "tensor_statistics"


@torch.library.register_fake("fastprune::tensor_statistics")
def _fake(
    tensors: list[Tensor], within: list[Tensor], p: list[float], gini: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like, rows = tensors[0], len(tensors) + 1
    return (
        like.new_empty((rows, 2), dtype=torch.int64),
        like.new_empty((rows, 3), dtype=torch.float64),
        like.new_empty((3, rows, len(p)), dtype=torch.float64),
        like.new_empty(rows if gini else 0, dtype=torch.float64),
    )


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """What :func:`tensor_statistics` found in L tensors; in ``total``, in all of them together.

    Every tensor has the leading dimension L, which ``total``'s lack. Floats are float64.

    Attributes:
        p: the exponents, P of them.
        count: int64, (L,): elements, or those inside ``within``.
        nonzero: int64, (L,): those that are not 0.
        sum: (L,).
        min: (L,): inf where there are no elements.
        max: (L,): -inf where there are no elements.
        power_sums: (L, P): sum of abs(w)^p; inf or 0 where that is outside the range of float64.
        norms: (L, P): power_sums^(1/p), right also where power_sums is out of range.
        power_means: (L, P): (power_sums / count)^(1/p); never out of range.
        gini: (L,): Gini index of abs(w), or None where it was not asked for.
        total: the same of all tensors together; None in ``total`` itself.
    """

    p: tuple[float, ...]
    count: Tensor
    nonzero: Tensor
    sum: Tensor
    min: Tensor
    max: Tensor
    power_sums: Tensor
    norms: Tensor
    power_means: Tensor
    gini: Tensor | None
    total: TensorStatistics | None


class SparsityIndex(NamedTuple):
    """An index per tensor, ``layers`` (L,), and of all together, ``total`` (); float64."""

    layers: Tensor
    total: Tensor


def tensor_statistics(
    tensors: Sequence[Tensor],
    *,
    p: Sequence[float] = (1.0, 2.0),
    within: Sequence[Tensor] | None = None,
    gini: bool = False,
    names: Sequence[str] | None = None,
) -> TensorStatistics:
    r"""Counts, sums, extremes, power sums and norms of every tensor and of all, in one read.

    Args:
        tensors: L tensors of any shapes and strides on one device; float32, float64, bfloat16 or
            float16, mixed at will.
        p: exponents of the power sums, each in [2^-20, 2^20]; may be empty.
        within: bool tensors shaped and placed like ``tensors``: only True elements count.
            Nothing else is looked at, NaN included.
        gini: whether to compute the Gini index of the magnitudes, which takes longer.
        names: one name per tensor, for error messages.
    Returns:
        A :class:`TensorStatistics`. Of no elements: counts and sums 0, min inf, max -inf, Gini
        index 0. With an infinity among them: power sums, norms and means inf, the sum infinite
        (NaN with infinities of both signs), the Gini index NaN. Of zeros only: Gini index 0.
    Raises:
        ValueError: a NaN element, by the name of its tensor; no tensors; lengths, shapes or
            devices that differ; an exponent out of range.
        TypeError: dtypes or argument types other than described.

    Accuracy, with u = 2^-53: everything is computed in float64 and nothing overflows on the way.
    The sum is within 1200 u sum(abs(w)) of the true one. A power sum is within a factor of
    1 +- (1200 + 3 p) u; norms and power means, 1 +- (8 + (1200 + 3 p) / p) u. Mostly the errors of
    many terms cancel: 25.6 million normal numbers came out within 12 u. The exponents 1, 2, 1/2 and
    integers up to 64 are products and square roots; others are 2^(p log2(abs(w))) by series of our
    own, each term within (4 + 3 p) u. The Gini index is within 16 u of the true one: its inner
    sums are integers, only the last one rounds.

    Cost: one read of the tensors and no temporary of their size, but contiguous copies of
    non-contiguous tensors. The Gini index reads again, once to count keys, then about eight times
    to bring them together a share at a time (once in half precision), for each tensor and, where
    there are several, for all; it holds a sixteenth of the bytes, or 1 MB, and half a MB of
    counts per thread. The same bits for any number of threads. Not differentiable: inputs that
    require a gradient are read as constants. On CUDA the plain torch reference runs.

    Source of the Gini index: Hurley & Rickard 2009, *Comparing Measures of Sparsity*,
    G = 1 - 2 sum_k (abs(w)_(k) / ||w||_1) ((N - k + 1/2) / N), abs(w) in ascending order.
    """
    return _statistics(tensors, p, within, gini, names)


def pq_index(
    tensors: Sequence[Tensor],
    p: float = 0.5,
    q: float = 1.0,
    *,
    within: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
) -> SparsityIndex:
    r"""PQ index of every tensor, and of all together: 0 where all magnitudes are equal, near 1
    where few carry everything.

    .. math:: I = 1 - d^{1/q - 1/p} \|w\|_p / \|w\|_q

    with d the number of elements, those inside ``within`` where it is given, zeros among them
    included. I is in [0, 1 - d^(1/q - 1/p)]; rounding that would leave [0, 1] is cut off. Of no
    elements, and of zeros only (where the paper leaves it undefined), it is 0: nothing to prune
    by. With an infinite element it is NaN.

    Args:
        tensors, within, names: as in :func:`tensor_statistics`.
        p, q: 0 < p < q, both in [2^-20, 2^20].
    Raises:
        ValueError: p is not below q; else as :func:`tensor_statistics`.

    Cost: one read. Accuracy: that of the power means; 1e-12 absolute for p from 1/4 on.
    Paper: Diao et al. 2023, Definition 1.
    """
    op = "pq_index"
    exponents = _exponents((p, q), op, ("p", "q"))
    if not exponents[0] < exponents[1]:
        raise ValueError(f"{op}: p: expected less than q = {q}, got {p}")
    stats = _statistics(tensors, exponents, within, False, names, op)
    assert stats.total is not None
    return SparsityIndex(_pq(stats), _pq(stats.total))


def gini_index(
    tensors: Sequence[Tensor],
    *,
    within: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
) -> SparsityIndex:
    r"""Gini index of the magnitudes of every tensor, and of all together.

    0 where all are equal, 1 - 1/N where one of N carries everything. Of no elements and of zeros
    only, 0; with an infinite element NaN. Zeros count towards N. Arguments, errors, accuracy and
    cost: those of :func:`tensor_statistics` with ``gini=True``.

    Source: Hurley & Rickard 2009, *Comparing Measures of Sparsity*.
    """
    stats = _statistics(tensors, (), within, True, names, "gini_index")
    assert stats.gini is not None
    assert stats.total is not None
    assert stats.total.gini is not None
    return SparsityIndex(stats.gini, stats.total.gini)


def _pq(stats: TensorStatistics) -> Tensor:
    low, high = stats.power_means.unbind(-1)
    index = (1 - low / high).clamp(0.0, 1.0)
    return torch.where(high == 0, torch.zeros_like(index), index)


def _statistics(
    tensors: Any, p: Any, within: Any, gini: Any, names: Any, op: str = _OP
) -> TensorStatistics:
    values = _sequence(tensors, "tensors", op)
    if not values:
        raise ValueError(f"{op}: tensors: expected at least one tensor, got none")
    labels = _labels(names, len(values), op)
    for i, t in enumerate(values):
        if t.dtype not in _FLOATS:
            raise TypeError(
                f"{op}: tensors{labels[i]}: expected dtype float32, float64, bfloat16 or float16, "
                f"got {t.dtype}"
            )
        if t.device != values[0].device:
            raise ValueError(
                f"{op}: tensors{labels[i]}: expected the device {values[0].device} of the first "
                f"tensor, got {t.device}"
            )
    allowed = [] if within is None else _restrictions(within, values, labels, op)
    if not isinstance(gini, bool):
        raise TypeError(f"{op}: gini: expected a bool, got {type(gini).__name__}")
    if isinstance(p, (str, Tensor)) or not isinstance(p, Sequence):
        raise TypeError(f"{op}: p: expected a sequence of numbers, got {type(p).__name__}")
    exponents = _exponents(p, op, [f"p[{i}]" for i in range(len(p))])
    with torch.no_grad():
        if values[0].device.type in ("cpu", "meta"):
            try:
                results = torch.ops.fastprune.tensor_statistics(values, allowed, exponents, gini)
            except RuntimeError as error:
                message = str(error).partition("\n")[0]
                if f"{_OP}: " not in message:
                    raise
                raise ValueError(_renamed(message, labels, op)) from None
        else:
            results = _by_reference(values, allowed, exponents, gini, labels, op)
    n = len(values)
    rows = (slice(n), n)
    layers, total = (_at(results, at, tuple(exponents), gini, None) for at in rows)
    return _at(results, rows[0], layers.p, gini, total)


def _at(
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    rows: Any,
    p: tuple[float, ...],
    gini: bool,
    total: TensorStatistics | None,
) -> TensorStatistics:
    """Some rows of the op's results under their names."""
    counts, moments, powers, indices = results
    count, nonzero = counts[rows].unbind(-1)
    total_sum, low, high = moments[rows].unbind(-1)
    sums, norms, means = powers[:, rows].unbind(0)
    index = indices[rows] if gini else None
    return TensorStatistics(
        p, count, nonzero, total_sum, low, high, sums, norms, means, index, total
    )


def _by_reference(
    values: list[Tensor],
    within: list[Tensor],
    p: list[float],
    gini: bool,
    labels: list[str],
    op: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference, behind the checks that the op makes on the data."""
    for i, v in enumerate(values):
        bad = v.isnan() & within[i] if within else v.isnan()
        if bool(bad.any()):
            raise ValueError(f"{op}: tensors{labels[i]}: an element is NaN")
    return reference.tensor_statistics(values, within or None, p, gini)


def _sequence(given: Any, name: str, op: str) -> list[Tensor]:
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        kind = type(given).__name__
        raise TypeError(f"{op}: {name}: expected a sequence of tensors, got {kind}")
    for i, t in enumerate(given):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name}[{i}]: expected a tensor, got {type(t).__name__}")
    return list(given)


def _restrictions(within: Any, values: list[Tensor], labels: list[str], op: str) -> list[Tensor]:
    allowed = _sequence(within, "within", op)
    if len(allowed) != len(values):
        raise ValueError(
            f"{op}: within: expected {len(values)} tensors, one per tensor, got {len(allowed)}"
        )
    for label, w, v in zip(labels, allowed, values, strict=True):
        if w.dtype != torch.bool:
            raise TypeError(f"{op}: within{label}: expected dtype torch.bool, got {w.dtype}")
        if w.shape != v.shape:
            raise ValueError(
                f"{op}: within{label}: expected the shape {tuple(v.shape)} of tensors{label}, "
                f"got {tuple(w.shape)}"
            )
        if w.device != v.device:
            raise ValueError(
                f"{op}: within{label}: expected the device {v.device} of tensors{label}, "
                f"got {w.device}"
            )
    return allowed


def _exponents(given: Sequence[Any], op: str, names: Sequence[str]) -> list[float]:
    for name, x in zip(names, given, strict=True):
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{op}: {name}: expected a number, got {type(x).__name__}")
        if not _SMALLEST_P <= float(x) <= _LARGEST_P:
            raise ValueError(f"{op}: {name}: expected a number from 2^-20 to 2^20, got {x}")
    return [float(x) for x in given]


def _labels(names: Any, n: int, op: str) -> list[str]:
    """What follows an argument's name in messages: the index, and the tensor's name if given."""
    if names is None:
        return [f"[{i}]" for i in range(n)]
    if isinstance(names, str) or not isinstance(names, Sequence):
        kind = type(names).__name__
        raise TypeError(f"{op}: names: expected a sequence of names, got {kind}")
    if len(names) != n:
        raise ValueError(f"{op}: names: expected {n} names, one per tensor, got {len(names)}")
    return [f"[{i}] ({name})" for i, name in enumerate(names)]


def _renamed(message: str, labels: list[str], op: str) -> str:
    """The op's message in the words of the public function."""
    message = op + message[message.index(f"{_OP}: ") + len(_OP) :]
    return re.sub(r"(tensors|within)\[(\d+)\]", lambda m: m[1] + labels[int(m[2])], message)
