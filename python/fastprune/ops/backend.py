"""Which devices this binary has kernels for."""

from __future__ import annotations

import functools

import torch

# Compute capability of the oldest GPU that the binary has code for.
_OLDEST = (8, 0)
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@functools.cache
def has_kernel(op: str, device_type: str) -> bool:
    """Whether the op ``fastprune::op`` has a compiled kernel for a type of device."""
    key = _KEYS.get(device_type)
    return key is not None and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"fastprune::{op}", key)
    )


def has_kernels(device: torch.device) -> bool:
    """Whether the sparse products run on own kernels on this device."""
    if not has_kernel("planned_linear", device.type):
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _OLDEST
