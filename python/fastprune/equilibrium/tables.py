"""Sparsity of the matrices of equilibrium layers, as paper 000's Table 1 has it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastprune.masks import readable
from fastprune.masks_model import match
from fastprune.masks_summary import LayerSummary, MasksSummary
from fastprune.nn import MonDEQLayer


def matrix_sparsities(model: nn.Module, masks: Mapping[str, Tensor]) -> MasksSummary:
    """Counts of the masks of U, A and B, each over all equilibrium layers of a model.

    Args:
        model: any module; weights outside of its monotone equilibrium layers are left out.
        masks: parameter name -> bool tensor, True where kept. A matrix without a mask is dense.
    Returns:
        Rows named U, A and B, without those that no layer has; ``total`` is their sum, the paper's
        "All"; ``str()`` gives a table.
    Raises:
        ValueError, TypeError: masks that do not fit the model; no equilibrium layer in it.
    Paper: 000, Table 1.
    """
    given = {id(weight): mask for _, weight, mask in match(model, readable(masks))}
    counts: dict[str, list[int]] = {}
    for layer in model.modules():
        if not isinstance(layer, MonDEQLayer):
            continue
        for name, weight in (("U", layer.U.weight), ("A", layer.A), ("B", layer.B)):
            if isinstance(weight, Tensor):
                mask = given.get(id(weight))
                kept = weight.numel() if mask is None else int(mask.sum())
                before = counts.setdefault(name, [0, 0])
                counts[name] = [before[0] + weight.numel(), before[1] + kept]
    if not counts:
        raise ValueError("model: it has no monotone equilibrium layer")
    return MasksSummary(tuple(LayerSummary(n, (), *both) for n, both in counts.items()))
