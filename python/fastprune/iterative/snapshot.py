"""A model's parameters and buffers, remembered, and put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fastprune.nn import MaskedLayer


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers themselves, each once; without the masks of masked layers."""
    return dict(_state(model))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of :func:`state_of`, on the devices of the originals."""
    with torch.no_grad():
        return {n: t.detach().clone() for n, t in _state(model)}


def check_fits(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError unless ``state`` has the names and shapes of the model's state."""
    own = state_of(model)
    if odd := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"{what}: expected the model's parameters and buffers; odd: {odd}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{what}[{name!r}]: expected shape {tuple(tensor.shape)}, got "
                f"{tuple(state[name].shape)}"
            )


def restore_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write ``state`` into the model's tensors, in place; gradients are dropped."""
    with torch.no_grad():
        for name, tensor in _state(model):
            tensor.copy_(state[name])
    for parameter in model.parameters():
        parameter.grad = None


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    masks = {id(m._buffers["weight_mask"]) for m in model.modules() if isinstance(m, MaskedLayer)}
    yield from ((n, b) for n, b in model.named_buffers() if id(b) not in masks)
