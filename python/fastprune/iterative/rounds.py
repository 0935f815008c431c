"""What an iterative method writes down after each round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.sparsity_index import gini_index, pq_index


@dataclass(frozen=True)
class Indices:
    """PQ and Gini index of weights under masks: of all together, and by layer."""

    pq: float
    gini: float
    pq_layers: dict[str, float]
    gini_layers: dict[str, float]


@dataclass(frozen=True)
class Round:
    """One round: what was left after it, and how sparse the weights were before and after.

    Attributes:
        round: 1, 2, ...
        weights: number of weights that the masks cover.
        kept: how many of them are left.
        removed: how many this round pruned.
        density: by layer, kept fraction after the round.
        retrained: indices of the ranked weights under the masks before the round: the retrained
            model of the paper's figures.
        pruned: indices of the same weights under the new masks, before any rewinding: the pruned
            model of the paper's figures.
    """

    round: int
    weights: int
    kept: int
    removed: int
    density: dict[str, float]
    retrained: Indices
    pruned: Indices

    @property
    def sparsity(self) -> float:
        """Pruned fraction of all weights after the round."""
        return (self.weights - self.kept) / self.weights if self.weights else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings and dicts of them only: fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Round:
        """What :meth:`as_dict` wrote."""
        parts = {part: Indices(**data[part]) for part in ("retrained", "pruned")}
        return cls(**{**data, **parts})


def indices(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], p: float, q: float
) -> Indices:
    """Both indices of ``weights`` under ``masks``."""
    values = {n: weights[n].detach() for n in masks}
    pq, gini = pq_index(values, masks, p, q), gini_index(values, masks)
    return Indices(
        float(pq.total),
        float(gini.total),
        dict(zip(masks, pq.layers.tolist(), strict=True)),
        dict(zip(masks, gini.layers.tolist(), strict=True)),
    )


def round_of(
    number: int,
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    p: float,
    q: float,
) -> Round:
    """The record of a round that led from the masks ``before`` to ``after``."""
    with torch.no_grad():
        kept = {n: int(m.sum()) for n, m in after.items()}
        return Round(
            number,
            sum(m.numel() for m in after.values()),
            sum(kept.values()),
            sum(int(m.sum()) for m in before.values()) - sum(kept.values()),
            {n: kept[n] / m.numel() if m.numel() else 1.0 for n, m in after.items()},
            indices(weights, before, p, q),
            indices(weights, after, p, q),
        )
