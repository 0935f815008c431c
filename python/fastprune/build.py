"""What this installation of fastprune was built with, and runs on."""

from __future__ import annotations

from typing import Any

import torch

from fastprune import _extension


def build_info() -> dict[str, Any]:
    """Describe the binary and the machine: what is inside, and what is in use.

    Returns:
        A dictionary with ``version``; ``compiler``; ``built_with_torch`` and ``torch`` (running);
        ``cpu_isas``: CPU instruction sets inside the binary, ascending; ``cpu_isa``: the one in use
        (the environment variable ``FASTPRUNE_ISA`` names the highest to use);
        ``cuda_version`` and ``cuda_architectures``: the CUDA toolkit and targets inside, empty for
        a CPU build; ``threads``: of torch's pool.
    """
    info: dict[str, Any] = dict(_extension.load().build_info())
    info["torch"] = torch.__version__
    info["threads"] = torch.get_num_threads()
    return info
