"""Exactly k best scores over many tensors at once: the selection that every pruner ends in."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from fastprune import reference
from fastprune.distributed.call import over_ranks
from fastprune.distributed.layout import is_sharded
from fastprune.reference.global_topk_mask import fuse_score, rows_of

Scope = Literal["global", "layer", "neuron", "filter"]
Score = Literal["identity", "magnitude", "product", "saliency", "square"]
_SCOPES = ("global", "layer", "neuron", "filter")
_SCORES = ("identity", "magnitude", "product", "saliency", "square")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OP = "global_topk_mask"


@torch.library.register_fake("fastprune::global_topk_mask")
def _fake(
    values: list[Tensor],
    other: list[Tensor],
    within: list[Tensor],
    counts: list[int],
    scope: str,
    score: str,
) -> list[Tensor]:
    return [v.new_empty(v.shape, dtype=torch.bool) for v in values]


def kept_count(density: float, n: int) -> int:
    """Number of entries kept out of n: floor(density * n + 0.5), the rounding used everywhere."""
    return math.floor(density * n + 0.5)


def global_topk_mask(
    scores: Sequence[Tensor],
    density: float | None = None,
    *,
    k: int | Sequence[int] | None = None,
    scope: Scope = "global",
    score: Score = "identity",
    other: Sequence[Tensor] | None = None,
    within: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
    group: Any = None,
    ranks: Literal["distinct", "replicated"] = "distinct",
) -> list[Tensor]:
    r"""Mark the best-scoring weights of a whole network, exactly as many as asked for.

    Equal scores: the earlier flat index wins, tensors in the order given, elements in row-major
    order whatever the strides. -0 equals +0, infinities are ordered. A NaN score is an error that
    names its tensor; NaN outside ``within`` is ignored.

    Args:
        scores: L tensors of any shapes on one device; float32, float64, bfloat16 or float16,
            mixed at will. Not necessarily the scores themselves: see ``score``. Higher is kept.
        density: kept fraction, in [0, 1]: of N units, floor(density * N + 0.5) are kept
            (:func:`kept_count`). All units count towards N, also those outside ``within``.
        k: kept number, instead of ``density``; at most the number of candidates. An int for the
            scopes ``global`` and ``filter``; one int per tensor for ``layer``, and for ``neuron``,
            where it is the number kept in each row.
        scope: where units compete. ``global``: all elements of all tensors. ``layer``: the
            elements of each tensor apart. ``neuron``: the elements of each row apart, the tensor
            seen as (size of dimension 0, everything else). ``filter``: whole rows, those of all
            tensors together, ranked by the l2 norm of their scores (computed in float64, added up
            in the order that :func:`fastprune.reference.global_topk_mask.filter_norms` defines);
            a kept row is True throughout (within ``within``).
        score: what is computed on the fly from v in ``scores`` and u in ``other``: ``identity`` v,
            ``magnitude`` abs(v), ``product`` v * u, ``saliency`` abs(v * u), ``square`` v^2. In
            float32, or in float64 where a factor is float64; scores of different dtypes are
            compared without rounding.
        other: second factors for ``product`` and ``saliency``, shaped and placed like ``scores``.
        within: bool tensors shaped and placed like ``scores``: only True elements are candidates,
            so masks only lose entries. With scope ``filter`` the candidates are the rows with any
            True element; a row is ranked by all its scores, and keeps its True elements.
        names: one name per tensor, for error messages.
        group: a ``torch.distributed`` process group whose ranks select together, each of them in
            this call with the same arguments but for the tensors. DTensors need none: their mesh
            and placements (Shard and Replicate, uneven or empty shards too) say what is where, the
            masks are DTensors placed alike, and ties go by the index in the whole tensors. A rank
            whose part fails raises its error, all others a RuntimeError that names it; a rank that
            dies or stays away is a RuntimeError after the group's timeout. No rank then has masks.
        ranks: what the ranks of ``group`` hold. ``distinct``: each its own tensors, as many as it
            likes; the masks are those of all lists one after the other, rank 0's first (scopes
            ``layer`` and ``neuron`` concern the rank's own tensors). ``replicated``: all the same
            tensors, as under DDP: ``other``, or ``scores`` where there is one factor, is averaged
            if it differs, and all ranks return the same masks. With ``magnitude`` nothing is
            averaged: weights that differ are an error.
    Returns:
        L contiguous bool tensors, shaped and placed like ``scores``.
    Raises:
        ValueError: a NaN score, no tensors, shapes, devices or lengths that differ, not exactly
            one of ``density`` and ``k``, one of them out of range, more to keep than candidates,
            an unknown scope or score, ``other`` missing or unused, a 0-dimensional tensor with
            scope ``neuron`` or ``filter``.
        TypeError: dtypes or argument types other than described.

    About one read of the factors and one write of the masks; a second read where a massed value
    (the zeros of an earlier mask) is split by the threshold. Extra memory: a few per cent of the
    scores, never a copy of them; contiguous copies of non-contiguous inputs. The result does not
    depend on the number of threads. Not differentiable: inputs that require a gradient are read
    as constants. On CUDA the plain torch reference computes the same masks.

    Papers: de Jorge et al. 2021, Algorithm 1, line 8; the scopes global, layer and neuron as in
    Diao et al. 2023, Section 4; filters ranked across layers as in Lin et al. 2020.
    """
    if group is not None or ranks != "distinct" or is_sharded(scores):
        more = {"other": other, "within": within, "names": names, "group": group, "ranks": ranks}
        return over_ranks(scores, density, k=k, scope=scope, score=score, **more)
    values = _tensors(scores, "scores", None)
    if not values:
        raise ValueError(f"{_OP}: scores: expected at least one tensor, got none")
    labels = _labels(names, len(values))
    for i, t in enumerate(values):
        if t.dtype not in _FLOATS:
            raise TypeError(f"{_OP}: scores{labels[i]}: {_expected_float(t)}")
        if t.device != values[0].device:
            raise ValueError(
                f"{_OP}: scores{labels[i]}: expected the device {values[0].device} of the first "
                f"tensor, got {t.device}"
            )
    if scope not in _SCOPES:
        raise ValueError(f"{_OP}: scope: expected one of {', '.join(_SCOPES)}, got {scope!r}")
    if score not in _SCORES:
        raise ValueError(f"{_OP}: score: expected one of {', '.join(_SCORES)}, got {score!r}")
    if (other is not None) != (score in ("product", "saliency")):
        raise ValueError(
            f"{_OP}: other: score {score!r} "
            + ("does not use it, leave it out" if other is not None else "needs it, got None")
        )
    factors = [] if other is None else _tensors(other, "other", values)
    allowed = [] if within is None else _tensors(within, "within", values)
    for i, t in enumerate(factors):
        if t.dtype not in _FLOATS:
            raise TypeError(f"{_OP}: other{labels[i]}: {_expected_float(t)}")
    for i, t in enumerate(allowed):
        if t.dtype != torch.bool:
            raise TypeError(f"{_OP}: within{labels[i]}: expected dtype torch.bool, got {t.dtype}")
    counts = _counts(values, density, k, scope, labels)
    with torch.no_grad():
        if values[0].device.type not in ("cpu", "meta"):
            masks = _by_reference(values, factors, allowed, counts, scope, score, labels)
            return _inside(masks, allowed, scope)
        try:
            masks = torch.ops.fastprune.global_topk_mask(
                values, factors, allowed, counts, scope, score
            )
        except RuntimeError as error:
            message = str(error).partition("\n")[0]
            if f"{_OP}: " not in message:
                raise
            raise ValueError(_renamed(message, labels)) from None
    return _inside(masks, allowed, scope)


def _inside(masks: list[Tensor], allowed: list[Tensor], scope: str) -> list[Tensor]:
    """The op takes or leaves whole filters; what an earlier mask took from them stays taken."""
    if scope != "filter" or not allowed:
        return masks
    return [mask & inside for mask, inside in zip(masks, allowed, strict=True)]


def _labels(names: Any, n: int) -> list[str]:
    """What follows an argument's name in messages: the index, and the tensor's name if given."""
    if names is None:
        return [f"[{i}]" for i in range(n)]
    if isinstance(names, str):
        raise TypeError(f"{_OP}: names: expected a sequence of names, got a string")
    if len(names) != n:
        raise ValueError(f"{_OP}: names: expected {n} names, one per tensor, got {len(names)}")
    return [f"[{i}] ({name})" for i, name in enumerate(names)]


def _renamed(message: str, labels: list[str]) -> str:
    """The op's message in the words of the public function."""
    message = message[message.index(f"{_OP}: ") :]
    message = re.sub(
        r"(values|other|within)\[(\d+)\]",
        lambda m: ("scores" if m[1] == "values" else m[1]) + labels[int(m[2])],
        message,
    )
    return re.sub(r"counts(\[\d+\])?", "k", message).replace("all values", "all scores")


def _expected_float(t: Tensor) -> str:
    return f"expected dtype float32, float64, bfloat16 or float16, got {t.dtype}"


def _tensors(given: Any, name: str, like: list[Tensor] | None) -> list[Tensor]:
    """A list of tensors, of the same length, shapes and device as ``like``."""
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        kind = type(given).__name__
        raise TypeError(f"{_OP}: {name}: expected a sequence of tensors, got {kind}")
    if like is not None and len(given) != len(like):
        raise ValueError(
            f"{_OP}: {name}: expected {len(like)} tensors, one per tensor of scores, "
            f"got {len(given)}"
        )
    for i, t in enumerate(given):
        if not isinstance(t, Tensor):
            kind = type(t).__name__
            raise TypeError(f"{_OP}: {name}[{i}]: expected a tensor, got {kind}")
        if like is None:
            continue
        if t.shape != like[i].shape:
            raise ValueError(
                f"{_OP}: {name}[{i}]: expected the shape {tuple(like[i].shape)} of scores[{i}], "
                f"got {tuple(t.shape)}"
            )
        if t.device != like[i].device:
            raise ValueError(
                f"{_OP}: {name}[{i}]: expected the device {like[i].device} of scores[{i}], "
                f"got {t.device}"
            )
    return list(given)


def _counts(
    values: list[Tensor],
    density: Any,
    k: Any,
    scope: Scope,
    labels: list[str],
) -> list[int]:
    """Kept counts as the op takes them: one, or one per tensor for ``layer`` and ``neuron``."""
    if (density is None) == (k is None):
        raise ValueError(
            f"{_OP}: density, k: expected exactly one of them, got "
            + ("neither" if k is None else "both")
        )
    if scope in ("neuron", "filter"):
        for i, t in enumerate(values):
            if t.dim() == 0:
                raise ValueError(
                    f"{_OP}: scores{labels[i]}: expected at least 1 dimension with scope "
                    f"{scope!r}, got a scalar"
                )
    if scope == "global":
        units = [sum(t.numel() for t in values)]
    elif scope == "filter":
        units = [sum(t.shape[0] for t in values)]
    elif scope == "layer":
        units = [t.numel() for t in values]
    else:
        units = [math.prod(t.shape[1:]) for t in values]
    if density is not None:
        if isinstance(density, bool) or not isinstance(density, Real):
            raise TypeError(f"{_OP}: density: expected a number, got {type(density).__name__}")
        fraction = float(density)
        if not 0 <= fraction <= 1:
            raise ValueError(f"{_OP}: density: expected a fraction in [0, 1], got {density}")
        return [kept_count(fraction, n) for n in units]
    single = scope in ("global", "filter")
    if single:
        given: Sequence[Any] = [k]
    elif isinstance(k, Sequence) and not isinstance(k, str):
        given = k
    else:
        raise TypeError(
            f"{_OP}: k: expected a sequence of one int per tensor with scope {scope!r}, "
            f"got {type(k).__name__}"
        )
    if len(given) != len(units):
        raise ValueError(f"{_OP}: k: expected {len(units)} counts, got {len(given)}")
    counts = []
    for i, (count, n) in enumerate(zip(given, units, strict=True)):
        name = "k" if single else f"k[{i}]"
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(
                f"{_OP}: {name}: expected an int with scope {scope!r}, got {type(count).__name__}"
            )
        counts.append(int(count))
        if not 0 <= counts[-1] <= n:
            raise ValueError(f"{_OP}: {name}: expected 0 to {n}, got {count}")
    return counts


def _by_reference(
    values: list[Tensor],
    other: list[Tensor],
    within: list[Tensor],
    counts: list[int],
    scope: Scope,
    score: Score,
    labels: list[str],
) -> list[Tensor]:
    """The reference, behind the checks that the op makes on the data."""
    available: list[Tensor] = []  # candidates of every group of units that compete
    for i, v in enumerate(values):
        fused = fuse_score(v, other[i] if other else None, score)
        allowed = within[i] if within else torch.ones_like(fused, dtype=torch.bool)
        if scope == "filter":
            allowed = rows_of(allowed).any(dim=1) if within else allowed.new_ones(v.shape[0])
            bad = rows_of(fused).isnan().any(dim=1) & allowed
        else:
            bad = fused.isnan() & allowed
        if bool(bad.any()):
            raise ValueError(f"{_OP}: scores{labels[i]}: a candidate's score is NaN")
        available.append(rows_of(allowed).sum(dim=1) if scope == "neuron" else allowed.sum())
    if scope in ("global", "filter"):
        available = [torch.stack(available).sum()]
    for count, candidates in zip(counts, available, strict=True):
        fewest = int(candidates.min()) if candidates.numel() else count
        if count > fewest:
            raise ValueError(f"{_OP}: k: expected at most {fewest} candidates, got {count}")
    if scope == "neuron":
        pairs = zip(counts, values, strict=True)
        counts = [count for count, v in pairs for _ in range(v.shape[0])]
    return reference.global_topk_mask(values, counts, scope, score, other or None, within or None)
