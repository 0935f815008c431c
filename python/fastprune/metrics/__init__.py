"""Measures of masks: compression, multiply-adds, and how far two sets of masks agree."""

from fastprune.metrics.changes import (
    LayerChanges,
    MaskChanges,
    mask_changes,
    mask_flips,
    mask_iou,
)
from fastprune.metrics.compression import direct_compression
from fastprune.metrics.macs import LayerMacs, Macs, macs

__all__ = [
    "LayerChanges",
    "LayerMacs",
    "Macs",
    "MaskChanges",
    "direct_compression",
    "macs",
    "mask_changes",
    "mask_flips",
    "mask_iou",
]
