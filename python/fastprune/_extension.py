"""Loads the compiled part, with an error that says which versions are needed when it cannot."""

from __future__ import annotations

from typing import Any

MINIMUM_TORCH = (2, 11)


def load() -> Any:
    """Import torch, check its version, then import the extension (which registers the ops).

    Raises:
        ImportError: torch is missing or older than 2.11, or the extension was not built.
    """
    wanted = ".".join(map(str, MINIMUM_TORCH))
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"fastprune needs torch {wanted} or newer; torch is missing") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(
            f"fastprune needs torch {wanted} or newer (its binary uses LibTorch's stable ABI of "
            f"{wanted}, so one build serves every later release); found torch {torch.__version__}"
        )
    try:
        from fastprune import _C  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"fastprune's compiled extension cannot be loaded under torch {torch.__version__}: "
            f"{error}. Build it with `pip install .` in the source folder"
        ) from error
    return _C
