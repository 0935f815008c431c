"""How much masks take away, counted as they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastprune.masks import readable
from fastprune.masks_summary import compression


def direct_compression(masks: Mapping[str, Tensor]) -> float:
    """Weights over kept weights: the inverse of the density, 1 / (1 - sparsity).

    "Direct": weights that are kept count, whether or not a path from input to output leads through
    them. By layer: ``row.compression`` for ``row`` in ``masks.summary().rows``.

    Args:
        masks: a :class:`fastprune.Masks` or any mapping of names to bool tensors.
    Returns:
        A number >= 1; 1.0 where there are no weights, infinity where none is kept.
    Raises:
        TypeError, ValueError: as :class:`fastprune.Masks`.
    Paper: 003, section 1. One read of the masks.
    """
    known = readable(masks).values()
    return compression(sum(m.numel() for m in known), sum(int(m.sum()) for m in known))
