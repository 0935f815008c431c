"""A whole model over a few samples at a time: what lies between its layers stays in cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.nn.mon_deq import MonDEQLayer


class Chunks(nn.Module):
    """Runs a model on ``size`` samples at a time and joins the results.

    For inference models that treat each sample on its own and answer with one tensor. Its children
    are the model's own, under the same names: the same ``state_dict``. In training, and for inputs
    that are not tensors with the batch first, the model runs in one piece.

    Args:
        model: what runs; its direct parameters and buffers, if any, stay reachable as well.
        size: samples per pass, at least 1.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        # The very dicts: what is replaced in one is replaced in the other.
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        self.__dict__["model"] = model  # not registered: the keys would change
        self.size = size
        self.training = model.training

    def __deepcopy__(self, memo: dict[int, Any]) -> Chunks:
        return Chunks(copy.deepcopy(self.model, memo), self.size)

    def __reduce__(self) -> Any:
        return Chunks, (self.model, self.size)

    def train(self, mode: bool = True) -> Chunks:
        super().train(mode)
        self.model.train(mode)
        return self

    def forward(self, *inputs: Any, **options: Any) -> Any:
        model = self.model
        tensors = [t for t in inputs if isinstance(t, Tensor) and t.dim() > 0]
        # In training, statistics are those of the whole batch.
        if self.training or options or not inputs or len(tensors) < len(inputs):
            return model(*inputs, **options)
        batch = tensors[0].shape[0]
        if batch <= self.size or any(t.shape[0] != batch for t in tensors):
            return model(*inputs)
        parts = zip(*(t.split(self.size) for t in tensors), strict=True)
        return torch.cat([model(*part) for part in parts])


def acts_on_samples(model: nn.Module, arguments: tuple[Any, ...], size: int) -> bool:
    """Whether the model gave the same for chunks of ``size`` as for the whole batch, on noise.

    Noise of the arguments' shapes: equal samples would hide a model that mixes them.
    """
    if model.training or not arguments:
        return False
    # A solve that stops by the residual of the whole batch would stop elsewhere.
    if any(isinstance(m, MonDEQLayer) and not m.per_sample for m in model.modules()):
        return False
    if not all(isinstance(t, Tensor) and t.dim() > 1 for t in arguments):
        return False
    batch = arguments[0].shape[0]
    if batch <= size or not all(t.is_floating_point() and t.shape[0] == batch for t in arguments):
        return False
    noise = torch.Generator().manual_seed(0)
    inputs = [torch.randn(t.shape, generator=noise).to(t.dtype) for t in arguments]
    with torch.inference_mode():
        whole = model(*inputs)
        if not isinstance(whole, Tensor) or whole.dim() == 0 or whole.shape[0] != batch:
            return False
        try:
            joined = Chunks(model, size)(*inputs)
        except Exception:  # sizes of the whole batch inside the model
            return False
    # Other panels of the kernels may sum in another order.
    limits = torch.finfo(whole.dtype)
    bound = max(1e-4, 4 * limits.eps) * whole.abs().amax().clamp_min(limits.tiny)
    return joined.shape == whole.shape and bool((joined - whole).abs().amax() <= bound)
