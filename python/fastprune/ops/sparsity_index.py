"""How unequal magnitudes are: the PQ index and the Gini index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from fastprune import reference
from fastprune.ops.pq_bound import pq_of
from fastprune.ops.tensor_statistics import (
    Checked,
    TensorStatistics,
    labels_of,
    sequence_of,
    statistics_of,
)

Tensors: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor]


class SparsityIndex(NamedTuple):
    """An index per tensor, ``layers`` (L,), and of all together, ``total`` (); float64."""

    layers: Tensor
    total: Tensor


@torch.library.register_fake("fastprune::row_power_means")
def _fake(tensors: list[Tensor], within: list[Tensor], p: list[float]) -> tuple[Tensor, Tensor]:
    rows = sum(t.shape[0] for t in tensors)
    like = tensors[0]
    return (
        like.new_empty(rows, dtype=torch.int64),
        like.new_empty((rows, len(p)), dtype=torch.float64),
    )


@overload
def pq_index(
    w: Tensor,
    mask: Tensor | None = None,
    p: float = 0.5,
    q: float = 1.0,
    *,
    within: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Tensor: ...


@overload
def pq_index(
    w: Tensors,
    mask: Tensors | None = None,
    p: float = 0.5,
    q: float = 1.0,
    *,
    within: Tensors | None = None,
    names: Sequence[str] | None = None,
) -> SparsityIndex: ...


def pq_index(
    w: Tensor | Tensors,
    mask: Tensor | Tensors | None = None,
    p: float = 0.5,
    q: float = 1.0,
    *,
    within: Tensor | Tensors | None = None,
    names: Sequence[str] | None = None,
) -> Tensor | SparsityIndex:
    r"""PQ index of magnitudes: 0 where all are equal, near 1 where few carry everything.

    .. math:: I = 1 - (\sum |w|^p / d)^{1/p} / (\sum |w|^q / d)^{1/q}

    with d the number of elements that the mask keeps, exact zeros among them included. I is in
    [0, 1 - d^(1/q - 1/p)]; rounding that would leave [0, 1] is cut off. Of no elements, and of
    zeros only (where the paper leaves it undefined), it is 0: nothing to prune by. With an infinite
    element it is NaN.

    Args:
        w: one tensor of any shape and strides; L of them in a sequence; or a mapping from names to
            them (those of a model's weights, say). On one device; float32, float64, bfloat16 or
            float16, mixed at will.
        mask: bool, True where an element counts; shaped and placed like ``w`` and of the same kind:
            a tensor, a sequence, or a mapping (:class:`fastprune.Masks`) with the same names in
            any order. None: all count. Nothing else is looked at, NaN included.
        p, q: 0 < p < q, both in [2^-20, 2^20].
        within: another name for ``mask``, that of :func:`tensor_statistics`.
        names: with a sequence, one name per tensor, for error messages.
    Returns:
        For one tensor, a 0-dimensional float64 tensor. Else a :class:`SparsityIndex`: ``layers``,
        (L,), in the order of ``w``, and ``total``, that of all elements together.
    Raises:
        ValueError: a NaN element under the mask, by the name of its tensor; p is not below q; no
            tensors; lengths, names, shapes or devices that differ; both ``mask`` and ``within``.
        TypeError: dtypes or argument types other than described.

    Cost: one read of ``w`` and the mask. Nothing overflows on the way, whatever p. Accuracy: that
    of the power means of :func:`tensor_statistics`; 1e-12 absolute for p from 1/4 on. Not
    differentiable. :func:`pq_index_rows` has the index of every neuron.
    Paper: Diao et al. 2023, Definition 1.
    """
    op = "pq_index"
    checked, single = _arguments(op, w, mask, within, names)
    return _single_or_all(statistics_of(checked, pq_of(p, q, op), False), _pq, single)


def pq_index_rows(
    w: Tensor | Tensors,
    mask: Tensor | Tensors | None = None,
    p: float = 0.5,
    q: float = 1.0,
    *,
    names: Sequence[str] | None = None,
) -> Any:
    r"""PQ index of every neuron: of each row of the tensors viewed as (out, everything else).

    Args:
        w, mask, p, q, names: as in :func:`pq_index`; tensors have at least one dimension.
    Returns:
        For one tensor float64, (out,); for a sequence a list of these; for a mapping a dict. A row
        without elements under the mask has index 0.
    Raises:
        ValueError, TypeError: as :func:`pq_index`; a tensor without dimensions.

    Each row has the bits that :func:`pq_index` gives it as a tensor of its own. Cost: one read for
    all rows of all tensors, plus some 0.1 microseconds per row. On CUDA plain torch runs, for one
    tensor after the other, on a float64 copy.
    Paper: Diao et al. 2023, Section 4 (scope "neuron").
    """
    op = "pq_index_rows"
    checked, single = _arguments(op, w, mask, None, names)
    _, indices = rows_pq(checked, pq_of(p, q, op))
    parts = indices.split([v.shape[0] for v in checked.values])
    if single:
        return parts[0]
    return dict(zip(w, parts, strict=True)) if isinstance(w, Mapping) else list(parts)


@overload
def gini_index(
    w: Tensor,
    mask: Tensor | None = None,
    *,
    within: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Tensor: ...


@overload
def gini_index(
    w: Tensors,
    mask: Tensors | None = None,
    *,
    within: Tensors | None = None,
    names: Sequence[str] | None = None,
) -> SparsityIndex: ...


def gini_index(
    w: Tensor | Tensors,
    mask: Tensor | Tensors | None = None,
    *,
    within: Tensor | Tensors | None = None,
    names: Sequence[str] | None = None,
) -> Tensor | SparsityIndex:
    r"""Gini index of magnitudes: 0 where all are equal, 1 - 1/N where one of N carries everything.

    Of no elements and of zeros only, 0; with an infinite element NaN. Zeros count towards N.
    Arguments, results and errors: those of :func:`pq_index`. Accuracy and cost: those of
    :func:`tensor_statistics` with ``gini=True``.

    Source: Hurley & Rickard 2009, *Comparing Measures of Sparsity*.
    """
    checked, single = _arguments("gini_index", w, mask, within, names)
    return _single_or_all(statistics_of(checked, [], True), _gini, single)


def rows_pq(checked: Checked, exponents: list[float]) -> tuple[Tensor, Tensor]:
    """Counts, int64, and PQ indices, float64, of all rows, tensor after tensor."""
    for label, v in zip(checked.labels, checked.values, strict=True):
        if v.dim() == 0:
            raise ValueError(
                f"{checked.op}: {checked.arguments[0]}{label}: expected at least 1 dimension, "
                "got a scalar"
            )
    with torch.no_grad():
        if checked.has_kernel():
            counts, means = checked.call(torch.ops.fastprune.row_power_means, exponents)
        else:
            checked.refuse_nan()
            counts, means = reference.row_power_means(
                checked.values, checked.within or None, exponents
            )
        return counts, index_of(means)


def index_of(means: Tensor) -> Tensor:
    """PQ indices, (...), of power means, (..., 2)."""
    low, high = means.unbind(-1)
    index = (1 - low / high).clamp(0.0, 1.0)
    return torch.where(high == 0, torch.zeros_like(index), index)


def _pq(stats: TensorStatistics) -> Tensor:
    return index_of(stats.power_means)


def _gini(stats: TensorStatistics) -> Tensor:
    assert stats.gini is not None
    return stats.gini


def _single_or_all(
    stats: TensorStatistics, index: Callable[[TensorStatistics], Tensor], single: bool
) -> Tensor | SparsityIndex:
    assert stats.total is not None
    return index(stats)[0] if single else SparsityIndex(index(stats), index(stats.total))


def _arguments(op: str, w: Any, mask: Any, within: Any, names: Any) -> tuple[Checked, bool]:
    """Tensors and masks in lists; whether a single tensor came."""
    if mask is not None and within is not None:
        raise ValueError(f"{op}: mask, within: two names for one argument, got both")
    argument = "mask" if within is None else "within"
    given = mask if within is None else within
    if isinstance(given, Real):
        raise TypeError(
            f"{op}: {argument}: expected bool tensors, got {type(given).__name__}: the mask comes "
            "before p and q, or give these by name"
        )
    arguments = ("w", argument)
    if isinstance(w, Tensor):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(
                f"{op}: {argument}: expected a tensor, as w is, got {type(given).__name__}"
            )
        label = "" if names is None else labels_of(names, 1, op)[0].removeprefix("[0]")
        masks = None if given is None else [given]
        return Checked.check(op, [w], masks, [label], arguments), True
    if not isinstance(w, Mapping):
        values = sequence_of(w, "w", op)
        masks = None if given is None else sequence_of(given, argument, op)
        labels = labels_of(names, len(values), op) if values else []
        return Checked.check(op, values, masks, labels, arguments), False
    if names is not None:
        raise ValueError(f"{op}: names: a mapping has its own, leave them out")
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"{op}: {argument}: expected a mapping, as w is, got {type(given).__name__}"
        )
    if given is not None and (odd := sorted(map(str, w.keys() ^ given.keys()))):
        raise ValueError(f"{op}: {argument}: expected the names of w; on one side only: {odd}")
    labels = [f"[{name!r}]" for name in w]
    values = sequence_of(list(w.values()), "w", op)
    masks = None if given is None else sequence_of([given[n] for n in w], argument, op)
    return Checked.check(op, values, masks, labels, arguments), False
