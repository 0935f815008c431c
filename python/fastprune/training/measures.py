"""What is logged of a network after each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastprune.masks import Masks
from fastprune.metrics import macs
from fastprune.ops import gini_index, pq_index


@torch.no_grad()
def epoch_measures(
    model: nn.Module, masks: Masks | None, in_shape: Sequence[int]
) -> dict[str, Any]:
    """Sparsity of the prunable weights, PQ (p = 0.5, q = 1) and Gini index of the kept ones, MACs.

    MACs are those of one sample, under the masks.
    """
    chosen = Masks.ones(model) if masks is None else masks
    named = dict(model.named_parameters())
    weights = [named[n].detach() for n in chosen]
    within = [chosen[n] for n in chosen]
    device = weights[0].device
    counted = macs(model, torch.zeros(1, *in_shape, device=device), masks)
    return {
        "sparsity": chosen.sparsity(),
        "kept": chosen.nnz(),
        "pq_index": float(pq_index(weights, within=within).total),
        "gini_index": float(gini_index(weights, within=within).total),
        "macs": counted.total.direct,
    }
