"""Masks against the parameters of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def match(model: nn.Module, masks: Mapping[str, Tensor]) -> list[tuple[str, nn.Parameter, Tensor]]:
    """(name, parameter, mask) for every mask, under any name that the parameter has.

    Raises:
        ValueError: a name is unknown, the parameter has no shape yet, or the shapes differ; the
            message names the mask.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    matched = []
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"masks[{name!r}]: the model has no parameter of this name")
        weight = parameters[name]
        if is_lazy(weight):
            raise ValueError(f"masks[{name!r}]: the parameter is not initialized yet")
        if weight.shape != mask.shape:
            raise ValueError(
                f"masks[{name!r}]: shape {tuple(mask.shape)} does not match the parameter's "
                f"{tuple(weight.shape)}"
            )
        matched.append((name, weight, mask))
    return matched


def unwritable(weight: Tensor) -> str | None:
    """Why an in-place write to ``weight`` would fail, or None."""
    if weight.device.type == "meta":
        return "is on the meta device: it has no data"
    if weight.layout != torch.strided:
        return f"has layout {weight.layout}"
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"has dtype {weight.dtype}"
    strides = zip(weight.shape, weight.stride(), strict=True)
    if any(size > 1 and step == 0 for size, step in strides):
        return "is an expanded view: several of its entries share memory"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "is an inference tensor, which cannot be written outside inference mode"
    return None
