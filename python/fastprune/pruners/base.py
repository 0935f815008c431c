"""What all pruning methods share: a pruner only scores, the rest happens here."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprune.distributed.link import Link
from fastprune.ops.global_topk_mask import Scope, Score, global_topk_mask
from fastprune.pruners.network import Network
from fastprune.reference.global_topk_mask import fuse_score


@dataclass(frozen=True)
class Scores:
    """Scores left unmultiplied, for the selection to fuse: no score tensor is ever stored.

    Attributes:
        values: parameter name -> tensor of the weight's shape.
        other: the second factor, for the forms that have one.
        form: how they combine: ``identity``, ``magnitude`` |v|, ``square`` v^2, ``product`` v o,
            ``saliency`` |v o|, in float32, or float64 for float64 factors.
    """

    values: Mapping[str, Tensor]
    other: Mapping[str, Tensor] | None = None
    form: Score = "identity"


class Pruner(ABC):
    """A pruning method. A subclass overrides :meth:`score` and goes to ``prune`` as ``method``::

        class Smallest(Pruner):
            name = "smallest"

            def score(self, network):
                return {name: -w.abs() for name, w in network.weights().items()}

        masks = fastprune.prune(model, Smallest, sparsity=0.9)

    Class attributes:
        name: what error messages call the method.
        default_steps: steps where the user does not say.
        default_dtype: scoring dtype where the user does not say; None: that of the weights.
        needs_data: the scores need ``data`` and ``loss``.
        options: arguments of the constructor that ``prune`` passes on by name.
        revive: a pruned weight is scored at the next step and may return.
        signed: scores may be negative, so that a filter's norm would lose their meaning.
    """

    name: ClassVar[str] = ""
    default_steps: ClassVar[int] = 1
    default_dtype: ClassVar[torch.dtype | None] = None
    needs_data: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    signed: ClassVar[bool] = False
    revive: bool = False

    @abstractmethod
    def score(self, network: Network) -> Scores | Mapping[str, Tensor]:
        """Scores of the weights at the network's current mask; the largest are kept.

        Args:
            network: the model at its mask: ``network.weights()``, ``network.gradient()``, ...
        Returns:
            One tensor of the weight's shape for every name in ``network.names``, or two to be
            fused (:class:`Scores`). A NaN is an error where the weight could still be kept.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{o}={getattr(self, o)!r}" for o in self.options)
        return f"{type(self).__name__}({settings})"


def run(
    pruner: Pruner,
    network: Network,
    plan: Sequence[int | list[int]],
    scope: Scope,
    progress: Callable[[int, int], Any] | None,
    group: Any = None,
    link: Link | None = None,
) -> dict[str, Tensor]:
    """Score and select once per entry of ``plan``; the masks after the last step.

    Each step scores the network at the mask of the step before (paper 002, Algorithm 1). Unless
    the method revives weights, masks are nested. With a group (and the link to it) all ranks
    run this and come to the same masks.
    """
    names = network.names
    masks: list[Tensor] | None = None
    for step, count in enumerate(plan, start=1):
        with nullcontext() if link is None else link.agreement():
            network.begin_step()
            scores = checked_scores(pruner, network)
        masks = global_topk_mask(
            [scores.values[n] for n in names],
            k=count,
            scope=scope,
            score=scores.form,
            other=None if scores.other is None else [scores.other[n] for n in names],
            within=None if pruner.revive else masks,
            names=names,
            group=group,
            ranks="distinct" if group is None else "replicated",
        )
        network.masks = dict(zip(names, masks, strict=True))
        if progress is not None:
            progress(step, len(plan))
    return dict(network.masks)


def checked_scores(pruner: Pruner, network: Network) -> Scores:
    """The pruner's scores, once their names and shapes are known to be those of the weights."""
    result = pruner.score(network)
    scores = result if isinstance(result, Scores) else Scores(result)
    shapes = network.shapes
    for part in (scores.values, scores.other):
        if part is None:
            continue
        if not isinstance(part, Mapping) or part.keys() != shapes.keys():
            raise ValueError(f"{pruner!r}: score() must return one tensor for each of {[*shapes]}")
        for name, tensor in part.items():
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"{pruner!r}: the score of {name!r} has shape {tuple(tensor.shape)}, the "
                    f"weight {tuple(shapes[name])}"
                )
    # One dtype for all: a network of float32 and float64 weights is compared in float64.
    parts = [p for p in (scores.values, scores.other) if p is not None]
    if any(t.dtype == torch.float64 for p in parts for t in p.values()):
        values, *rest = ({n: t.double() for n, t in p.items()} for p in parts)
        return Scores(values, rest[0] if rest else None, scores.form)
    return scores


def fused(scores: Scores) -> dict[str, Tensor]:
    """The scores as numbers."""
    other = scores.other
    return {
        n: fuse_score(v, None if other is None else other[n], scores.form)
        for n, v in scores.values.items()
    }


def warn_of_empty_layers(masks: Mapping[str, Tensor], method: str) -> None:
    """One warning that names every layer without a weight left."""
    empty = [n for n, m in masks.items() if m.numel() and not _keeps_any(m)]
    if empty:
        warnings.warn(
            f"{method} pruned every weight of: {', '.join(empty)}", UserWarning, stacklevel=3
        )


def _keeps_any(mask: Tensor) -> bool:
    whole = getattr(mask, "full_tensor", None)  # of a DTensor, any() would see a shard only
    return bool(mask.any()) if whole is None else bool(mask.sum().full_tensor())  # type: ignore[attr-defined]
