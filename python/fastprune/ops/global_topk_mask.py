"""Exactly k best scores over many tensors at once: the selection that every pruner ends in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastprune import reference

Scope = Literal["global", "layer", "neuron", "filter"]
Score = Literal["identity", "magnitude", "product", "saliency", "square"]
_SCOPES = ("global", "layer", "neuron", "filter")
_SCORES = ("identity", "magnitude", "product", "saliency", "square")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
) -> list[Tensor]:
    counts = [k if isinstance(k, int) else kept_count(float(density or 0.0), sum(s.numel() for s in scores))]
    return reference.global_topk_mask(scores, counts, scope, score, other, within)
