"""Statistics of many tensors in one read: sums, norms and extremes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

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
    values = sequence_of(tensors, "tensors", _OP)
    labels = labels_of(names, len(values), _OP) if values else []
    allowed = None if within is None else sequence_of(within, "within", _OP)
    checked = Checked.check(_OP, values, allowed, labels)
    if not isinstance(gini, bool):
        raise TypeError(f"{_OP}: gini: expected a bool, got {type(gini).__name__}")
    given: Any = p
    if isinstance(given, (str, Tensor)) or not isinstance(given, Sequence):
        raise TypeError(f"{_OP}: p: expected a sequence of numbers, got {type(p).__name__}")
    return statistics_of(checked, exponents_of(p, _OP, [f"p[{i}]" for i in range(len(p))]), gini)


@dataclass(frozen=True)
class Checked:
    """Tensors and restrictions that passed the checks, and what messages call them."""

    op: str
    values: list[Tensor]
    within: list[Tensor]
    labels: list[str]  # what follows an argument's name: an index or a name
    arguments: tuple[str, str] = ("tensors", "within")

    @classmethod
    def check(
        cls,
        op: str,
        values: list[Tensor],
        within: list[Tensor] | None,
        labels: list[str],
        arguments: tuple[str, str] = ("tensors", "within"),
    ) -> Checked:
        name = arguments[0]
        if not values:
            raise ValueError(f"{op}: {name}: expected at least one tensor, got none")
        for i, t in enumerate(values):
            if t.dtype not in _FLOATS:
                raise TypeError(
                    f"{op}: {name}{labels[i]}: expected dtype float32, float64, bfloat16 or "
                    f"float16, got {t.dtype}"
                )
            if t.device != values[0].device:
                raise ValueError(
                    f"{op}: {name}{labels[i]}: expected the device {values[0].device} of the first "
                    f"tensor, got {t.device}"
                )
        checked = cls(op, values, [] if within is None else within, labels, arguments)
        if within is not None:
            checked._check_within()
        return checked

    def _check_within(self) -> None:
        op, (name, other) = self.op, self.arguments
        if len(self.within) != len(self.values):
            raise ValueError(
                f"{op}: {other}: expected {len(self.values)} tensors, one per tensor, got "
                f"{len(self.within)}"
            )
        for label, w, v in zip(self.labels, self.within, self.values, strict=True):
            if w.dtype != torch.bool:
                raise TypeError(f"{op}: {other}{label}: expected dtype torch.bool, got {w.dtype}")
            if w.shape != v.shape:
                raise ValueError(
                    f"{op}: {other}{label}: expected the shape {tuple(v.shape)} of {name}{label}, "
                    f"got {tuple(w.shape)}"
                )
            if w.device != v.device:
                raise ValueError(
                    f"{op}: {other}{label}: expected the device {v.device} of {name}{label}, "
                    f"got {w.device}"
                )

    def has_kernel(self) -> bool:
        return self.values[0].device.type in ("cpu", "meta")

    def refuse_nan(self) -> None:
        """The check that the kernels make on the data."""
        for i, v in enumerate(self.values):
            bad = v.isnan() & self.within[i] if self.within else v.isnan()
            if bool(bad.any()):
                raise ValueError(
                    f"{self.op}: {self.arguments[0]}{self.labels[i]}: an element is NaN"
                )

    def call(self, op: Any, *rest: Any) -> Any:
        """``op(values, within, *rest)``, its messages in the words of the public function."""
        try:
            return op(self.values, self.within, *rest)
        except RuntimeError as error:
            message = str(error).partition("\n")[0]
            if f"{_OP}: " not in message:
                raise
        message = self.op + message[message.index(f"{_OP}: ") + len(_OP) :]
        names = dict(zip(("tensors", "within"), self.arguments, strict=True))
        raise ValueError(
            re.sub(
                r"(tensors|within)\[(\d+)\]",
                lambda m: names[m[1]] + self.labels[int(m[2])],
                message,
            )
        )


def statistics_of(checked: Checked, exponents: list[float], gini: bool) -> TensorStatistics:
    """The statistics of checked arguments."""
    with torch.no_grad():
        if checked.has_kernel():
            results = checked.call(torch.ops.fastprune.tensor_statistics, exponents, gini)
        else:
            results = _by_reference(checked, exponents, gini)
    n = len(checked.values)
    layers, total = (_at(results, at, tuple(exponents), gini, None) for at in (slice(n), n))
    return _at(results, slice(n), layers.p, gini, total)


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
    checked: Checked, p: list[float], gini: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference, behind the checks that the op makes on the data."""
    checked.refuse_nan()
    return reference.tensor_statistics(checked.values, checked.within or None, p, gini)


def sequence_of(given: Any, name: str, op: str) -> list[Tensor]:
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        kind = type(given).__name__
        raise TypeError(f"{op}: {name}: expected a sequence of tensors, got {kind}")
    for i, t in enumerate(given):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name}[{i}]: expected a tensor, got {type(t).__name__}")
    return list(given)


def exponents_of(given: Sequence[Any], op: str, names: Sequence[str]) -> list[float]:
    for name, x in zip(names, given, strict=True):
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{op}: {name}: expected a number, got {type(x).__name__}")
        if not _SMALLEST_P <= float(x) <= _LARGEST_P:
            raise ValueError(f"{op}: {name}: expected a number from 2^-20 to 2^20, got {x}")
    return [float(x) for x in given]


def labels_of(names: Any, n: int, op: str) -> list[str]:
    """What follows an argument's name in messages: the index, and the tensor's name if given."""
    if names is None:
        return [f"[{i}]" for i in range(n)]
    if isinstance(names, str) or not isinstance(names, Sequence):
        kind = type(names).__name__
        raise TypeError(f"{op}: names: expected a sequence of names, got {kind}")
    if len(names) != n:
        raise ValueError(f"{op}: names: expected {n} names, one per tensor, got {len(names)}")
    return [f"[{i}] ({name})" for i, name in enumerate(names)]
