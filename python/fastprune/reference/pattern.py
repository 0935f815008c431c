"""Oracle for packed patterns: back from the packed form to the mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unpack(
    row_ptr: Tensor, offset: Tensor, weight_shape: tuple[int, ...], block_depth: int
) -> Tensor:
    """The bool mask of shape ``weight_shape`` whose forward pattern is (row_ptr, offset)."""
    rows, depth = weight_shape[0], weight_shape[1]
    taps = math.prod(weight_shape[2:])
    mask = torch.zeros(rows, depth * taps, dtype=torch.bool, device=offset.device)
    counts = row_ptr.diff()
    # Entry list (block, row) -> which block and row each entry belongs to.
    slot = torch.repeat_interleave(torch.arange(len(counts), device=offset.device), counts)
    block, row = slot // max(rows, 1), slot % max(rows, 1)
    mask[row, block * block_depth * taps + offset.long()] = True
    return mask.view(weight_shape)


def transpose(mask: Tensor, groups: int) -> Tensor:
    """The mask as the input gradient reads it: (in channels, out / groups, ...kernel)."""
    rows, depth, *kernel = mask.shape
    grouped = mask.view(groups, rows // groups, depth, *kernel)
    return grouped.transpose(1, 2).reshape(groups * depth, rows // groups, *kernel)
