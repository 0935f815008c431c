"""What scoring must leave as it was: training flags and random states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run with gradients on; put random states and training flags back, whatever happens."""
    modes = [(m, m.training) for m in model.modules()]
    with (
        torch.random.fork_rng(devices=cuda_devices(model)),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            yield
        finally:
            _set_modes(modes)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then every module's own mode again.

    Flags are set directly: a module's ``train()`` may do more than that (merge adapters, say).
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        _set_modes([(m, False) for m, _ in modes])
        yield
    finally:
        _set_modes(modes)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training != training:
            module.training = training


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parameters or buffers of ``model``."""
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


def not_in_state_dict(model: nn.Module) -> set[str]:
    """Names of buffers that are no part of the state (``persistent=False``)."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
