"""How far two sets of masks agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune.masks import Masks
from fastprune.masks_summary import shown, table


@dataclass(frozen=True)
class LayerChanges:
    """Two masks of one layer, from the first to the second.

    Attributes:
        name: the parameter.
        weights: number of entries.
        both: entries that both keep.
        pruned: entries that only the first keeps.
        revived: entries that only the second keeps.
    """

    name: str
    weights: int
    both: int
    pruned: int
    revived: int

    @property
    def flips(self) -> int:
        """Entries that differ: pruned + revived."""
        return self.pruned + self.revived

    @property
    def iou(self) -> float:
        """Intersection over union: both / (both + flips); 1.0 where neither keeps anything."""
        union = self.both + self.flips
        return self.both / union if union else 1.0


@dataclass(frozen=True)
class MaskChanges:
    """Changes of every mask in ``rows``, their sum in ``total``; ``str()`` gives a table."""

    rows: tuple[LayerChanges, ...]

    @property
    def total(self) -> LayerChanges:
        """The sum over all rows, named ``total``."""
        sums = [
            sum(getattr(r, field) for r in self.rows)
            for field in ("weights", "both", "pruned", "revived")
        ]
        return LayerChanges("total", *sums)

    def __str__(self) -> str:
        head = ("name", "weights", "in both", "pruned", "revived", "flips", "IoU")
        return table(head, [_cells(r) for r in self.rows], _cells(self.total), left=1)


@torch.no_grad()
def mask_changes(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> MaskChanges:
    """What changes from the masks ``a`` to the masks ``b``, layer by layer.

    Args:
        a, b: :class:`fastprune.Masks`, or any mappings of names to bool tensors; the same names
            and shapes on both sides, on any devices.
    Returns:
        :class:`MaskChanges`, its rows in the order of ``a``.
    Raises:
        TypeError: a side is no mapping of names to tensors.
        ValueError: the names differ, a shape differs, a tensor is not bool; the message names it.
    One read of the masks, beside the copies that :class:`fastprune.Masks` makes of other mappings.
    """
    left, right = Masks.of(a), Masks.of(b)
    kept, gone, new = left & right, left - right, right - left
    return MaskChanges(
        tuple(
            LayerChanges(name, m.numel(), *(int(s[name].sum()) for s in (kept, gone, new)))
            for name, m in left.items()
        )
    )


def mask_iou(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Weights that both sets of masks keep, over those that at least one keeps; all layers as one.

    1.0 for equal masks, also where nothing is kept; 0.0 where no kept weight is shared. By layer:
    ``row.iou`` for ``row`` in :func:`mask_changes` ``(a, b).rows``. Arguments and errors as there.
    """
    return mask_changes(a, b).total.iou


def mask_flips(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> int:
    """Number of mask entries that differ, pruned or revived; all layers as one.

    By layer: ``row.flips`` for ``row`` in :func:`mask_changes` ``(a, b).rows``. Arguments and
    errors as there.
    """
    return mask_changes(a, b).total.flips


def _cells(row: LayerChanges) -> tuple[str, ...]:
    counts = (row.weights, row.both, row.pruned, row.revived, row.flips)
    return (row.name, *(f"{n:,}" for n in counts), f"{shown(row.iou, row.both):.4f}")
