"""Oracle of the keys that the selection kernels rank: ``csrc/kernels/cpu/global_topk_mask.h``."""

from __future__ import annotations

import torch
from torch import Tensor


def keys_of(scores: Tensor, within: Tensor | None, wide: bool) -> Tensor:
    """Integers in the order of the scores, which are float32, or float64 where ``wide``.

    -0 and +0 share a key; NaN gets the largest, an element outside ``within`` the smallest.
    """
    kind = torch.int64 if wide else torch.int32
    values = scores.to(torch.float64 if wide else torch.float32) + 0.0  # -0 becomes +0
    bits = values.contiguous().view(kind)
    limits = torch.iinfo(kind)
    keys = torch.where(bits < 0, bits ^ limits.max, bits)
    keys = torch.where(values.isnan(), limits.max, keys)
    return keys if within is None else torch.where(within, keys, limits.min)
