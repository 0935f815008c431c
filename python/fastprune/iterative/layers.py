"""The layers that an iterative run masks: what they start from, and which kernels they run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.dynamic.kernels import Kernels
from fastprune.dynamic.watching import Watch
from fastprune.nn import MaskedLayer
from fastprune.swapping import can_mask, mask_layers_, unmask_layers_


class Layers:
    """Masks in a model's layers, in place. Plain until :meth:`mask_` is called first.

    At the first call, unless :meth:`measure` did before, each layer that has run by then is timed
    on the shapes it ran on, dense and sparse; from then on masks alone decide which kernel it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._watch = Watch(model)
        self._kernels: Kernels | None = None
        self.times: dict[str, Any] | None = None  # what was timed, fit for JSON
        # Kernels may teach normalization and pooling layers the layout of convolutions' results.
        self._types = {m: type(m) for m in model.modules() if not isinstance(m, MaskedLayer)}

    def mask_(self, masks: Mapping[str, Tensor]) -> None:
        """Give the layers these masks."""
        users = mask_layers_(self._model, masks)
        if self._kernels is None:
            self._kernels = Kernels(self._model, {m for found in users.values() for m in found})
            if self.times is None:
                self._kernels.measure(self._watch.seen, 0.01)
                self.times = self._kernels.state_dict()
        self._kernels.load_state_dict(self.times or {})
        self._kernels.choose()

    def measure(self, masks: Mapping[str, Tensor], example_input: Any) -> None:
        """Time the layers now, on a copy of the model."""
        copied = copy.deepcopy(self._model)
        users = mask_layers_(copied, masks)
        watch = Watch(copied)
        watch.run(copied, example_input)
        watch.stop()
        kernels = Kernels(copied, {m for found in users.values() for m in found})
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            kernels.measure(watch.seen, 0.01)
        self.times = kernels.state_dict()

    def clear_pruned_(self) -> None:
        """Zeros in the pruned weights."""
        for layer in self._model.modules():
            if isinstance(layer, MaskedLayer):
                layer.clear_pruned_()

    def unmask_(self) -> None:
        """Plain layers again, for good."""
        self._watch.stop()
        unmask_layers_(self._model)
        for module, kind in self._types.items():
            if type(module) is not kind and issubclass(type(module), kind):
                module.__class__ = kind


def first_masks(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """All ones, or what masked layers have already; refuses layers that cannot be masked."""
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    names = {id(w): n for n, w in weights.items()}
    for owner, layer in model.named_modules():
        for parameter in layer._parameters.values():
            name = names.get(id(parameter))
            if name is None:
                continue
            if parameter is not layer._parameters.get("weight") or not can_mask(layer):
                raise ValueError(
                    f"{name}: no masked layer takes the place of {type(layer).__name__} "
                    f"{owner or '(the model itself)'}: leave the weight out with exclude"
                )
            if isinstance(layer, MaskedLayer):
                masks[name] &= layer.weight_mask
    return masks
