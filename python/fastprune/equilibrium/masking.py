"""Masks in the layers of an equilibrium model, for training it pruned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastprune.dynamic.kernels import UNTIMED_DENSITY
from fastprune.masks import readable
from fastprune.masks_model import match
from fastprune.nn import MonDEQLayer
from fastprune.swapping import mask_layers_


def mask_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Give a model's layers masks that hold in training: pruned weights are and stay 0.

    A and B of equilibrium layers get theirs by ``set_masks``, linear and 2-d convolution layers
    become masked ones; nothing is timed: those run their sparse kernel up to a density of 1/4.
    The Parameters stay the same objects.

    Args:
        model: changed in place.
        masks: parameter name -> bool tensor of the weight's shape, True where kept.
    Raises:
        TypeError, ValueError: as :func:`fastprune.swapping.mask_layers_`.
    """
    owners = {
        id(getattr(layer, n)): (layer, n)
        for layer in model.modules()
        if isinstance(layer, MonDEQLayer)
        for n in ("A", "B")
        if getattr(layer, n) is not None
    }
    matrices: dict[MonDEQLayer, dict[str, Tensor | None]] = {}
    others: dict[str, Tensor] = {}
    for name, weight, mask in match(model, readable(masks)):
        if id(weight) in owners:
            layer, own = owners[id(weight)]
            before = {n: getattr(layer, f"{n}_mask") for n in ("A", "B")}
            matrices.setdefault(layer, before)[own] = mask
        else:
            others[name] = mask
    for found in mask_layers_(model, others).values():
        for masked in found:
            masked.sparse = 1.0 - masked.sparsity <= UNTIMED_DENSITY
    for layer, both in matrices.items():
        layer.set_masks(**both)
