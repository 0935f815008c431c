"""What a measurement ran on: without it a number of milliseconds means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on, which a container or ``taskset`` can make fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fastprune_version() -> str:
    """The installed version."""
    try:
        return importlib.metadata.version("fastprune")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "not installed"


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything about the machine and the versions that timings depend on.

    Returns:
        A JSON-ready dictionary: ``cpu``, ``cores``, ``threads``, ``isa`` (of fastprune's kernels),
        ``dtype``, ``device``, ``fastprune``, ``torch``, ``python``, ``os``; on a GPU also ``gpu``,
        ``cuda``, ``tf32``.
    """
    from fastprune import _C

    machine: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "fastprune": fastprune_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["cuda"] = torch.version.cuda
        machine["tf32"] = {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
        }
    return machine


def lines(machine: dict[str, Any]) -> list[str]:
    """The description of :func:`describe` in two or three lines of text."""
    threads = machine["threads"]
    text = [
        f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''} on {machine['cores']} "
        f"core{'s' if machine['cores'] > 1 else ''}, {machine['isa']} kernels, {machine['dtype']}",
        f"fastprune {machine['fastprune']}, torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['os']}",
    ]
    if "gpu" in machine:
        tf32 = machine["tf32"]
        text.insert(
            1,
            f"{machine['gpu']}, CUDA {machine['cuda']}, TF32: matmul "
            f"{'on' if tf32['matmul'] else 'off'}, cuDNN {'on' if tf32['cudnn'] else 'off'}",
        )
    return text
