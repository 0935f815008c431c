"""Arguments of ``prune`` and ``score``: checked, and turned into what the loop works on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.checks import fraction
from fastprune.distributed.link import Link
from fastprune.masks import readable
from fastprune.masks_model import match
from fastprune.pruners.base import Pruner
from fastprune.pruners.data import Batches
from fastprune.pruners.network import Loss, Network
from fastprune.pruners.targets import Selection, prunable


def sparsity_of(sparsity: float | None, schedule: object, quota: object) -> float | None:
    """``sparsity``, checked, or None where something else says what remains."""
    if sparsity is None:
        fixed = quota is not None and not (isinstance(quota, str) or callable(quota))
        if not fixed and (schedule is None or isinstance(schedule, str)):
            raise ValueError(
                "sparsity: it is required, unless schedule is a sequence of kept counts or quota "
                "fixes the layers' sparsities"
            )
        return None
    return fraction(sparsity, "sparsity")


def weights_of(model: nn.Module, include: Selection, exclude: Selection) -> dict[str, nn.Parameter]:
    """The prunable weights of what must be a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return prunable(model, include, exclude)


def network_of(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    pruner: Pruner,
    data: Any,
    loss: Loss | None,
    batches_per_step: int | None,
    dtype: torch.dtype | None,
    link: Link | None = None,
) -> Network:
    """The network, once ``data``, ``loss`` and the rest are known to fit the method."""
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    name = pruner.name or type(pruner).__name__
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
    if pruner.needs_data:
        for argument, value in (("data", data), ("loss", loss)):
            if value is None:
                raise ValueError(f"{argument}: the method {name} needs it")
    if batches_per_step is not None:
        if not pruner.needs_data:
            raise ValueError(f"batches_per_step: the method {name} does not use it")
        if isinstance(batches_per_step, bool) or not isinstance(batches_per_step, int):
            raise ValueError(f"batches_per_step: expected an int, got {batches_per_step!r}")
        if batches_per_step < 1:
            raise ValueError(f"batches_per_step: expected at least 1, got {batches_per_step}")
    # Where only the input's shape is wanted, no more than one batch is read.
    per_step = batches_per_step if pruner.needs_data else 1
    batches = None if data is None else Batches(data, per_step)
    return Network(
        model,
        list(weights),
        dtype=dtype or pruner.default_dtype,
        batches=batches,
        loss=loss,
        link=link,
    )


def masks_of(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``masks`` checked, on the devices of the parameters, under their first names; not copied."""
    first = {id(p): name for name, p in model.named_parameters()}
    known: dict[str, Tensor] = {}
    for _, weight, given in match(model, readable(masks)):
        own, mask = first[id(weight)], given.to(weight.device)
        known[own] = known[own] & mask if own in known else mask
    return known
