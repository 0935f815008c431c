"""What one refresh of the masks did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.tensor_statistics import tensor_statistics


@dataclass(frozen=True)
class MaskUpdate:
    """One refresh of the masks.

    Attributes:
        step: training steps done before it.
        kept: weights that the new masks keep, of ``weights``.
        pruned: weights that lost their place.
        revived: weights that gained one.
        iou: of the last masks and these: weights in both over weights in either; 1.0 where
            neither keeps any.
        error: the pruning error |w - m w|^2 / |w|^2 of the stored weights, in float64; 0.0 for
            weights of zeros (paper 001, eq. 1). Methods that store zeros in pruned weights have 0.
        densities: kept fraction by parameter name.
        macs: multiply-adds per sample of all linear and convolution layers, those of the prunable
            ones by kept weights; None until the model has run once.
    """

    step: int
    kept: int
    weights: int
    pruned: int
    revived: int
    iou: float
    error: float
    densities: dict[str, float]
    macs: int | None = None

    @property
    def sparsity(self) -> float:
        """Pruned fraction of the prunable weights."""
        return (self.weights - self.kept) / self.weights if self.weights else 0.0

    @property
    def flips(self) -> int:
        """Mask entries that changed: pruned + revived."""
        return self.pruned + self.revived

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "sparsity": self.sparsity, "flips": self.flips}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> MaskUpdate:
        """The inverse of :meth:`to_dict`."""
        return cls(**{k: v for k, v in values.items() if k not in ("sparsity", "flips")})


def describe(
    step: int,
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor] | None,
    after: Mapping[str, Tensor],
    macs: int | None,
) -> MaskUpdate:
    """The change of the masks ``before`` (None: all kept) to ``after`` under some weights."""
    names = list(after)
    kept = [int(after[n].sum()) for n in names]
    both, pruned = 0, 0
    for name, count in zip(names, kept, strict=True):
        if before is None:
            both, pruned = both + count, pruned + after[name].numel() - count
        else:
            shared = int((before[name] & after[name]).sum())
            both, pruned = both + shared, pruned + int(before[name].sum()) - shared
    total, revived = sum(kept), sum(kept) - both
    union = total + pruned
    return MaskUpdate(
        step=step,
        kept=total,
        weights=sum(m.numel() for m in after.values()),
        pruned=pruned,
        revived=revived,
        iou=both / union if union else 1.0,
        error=pruning_error(weights, after),
        densities={
            n: k / after[n].numel() if after[n].numel() else 1.0
            for n, k in zip(names, kept, strict=True)
        },
        macs=macs,
    )


@torch.no_grad()
def pruning_error(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float:
    """|w - m w|^2 / |w|^2 of all weights together, in float64; 0.0 where all are 0.

    NaN where a weight is infinite; a NaN weight is an error that names it.
    Source: Lin et al. 2020, eq. (1).
    """
    names = [*masks]
    values = [weights[n].detach() for n in names]
    lost, whole = (
        tensor_statistics(values, p=(2.0,), within=within, names=names).total
        for within in ([~masks[n] for n in names], None)
    )
    assert lost is not None
    assert whole is not None
    return float(lost.power_sums / whole.power_sums) if whole.power_sums > 0 else 0.0
