"""The CUDA side of the ops on CPU tensors, by emulation: ``ops.X`` is what a GPU would run.

The library ``fastprune_emulated`` has the schemas of ``fastprune``; its kernels are the CUDA
sources, compiled for the host (csrc/kernels/cuda/emulation.h).
"""

from __future__ import annotations

import pytest
import torch

import fastprune

_C = fastprune._C

built = hasattr(_C, "configure_emulation")
needs_emulation = pytest.mark.skipif(not built, reason="a build without the emulation of CUDA")

_library = torch.library.Library("fastprune_emulated", "DEF")
if built:
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        namespace, _, rest = name.partition("::")
        if namespace != "fastprune_emulated":
            continue
        op, _, overload = rest.partition(".")
        packet = getattr(torch.ops.fastprune, op)
        schema = str(getattr(packet, overload or "default")._schema)
        _library.define(schema.removeprefix("fastprune::"))

ops = torch.ops.fastprune_emulated


def configure(seed: int, multiprocessors: int = 4) -> None:
    """Orders threads and blocks by ``seed``; 0: one after another."""
    _C.configure_emulation(seed, multiprocessors)
