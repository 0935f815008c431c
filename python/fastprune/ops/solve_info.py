"""What an iterative solve says about itself, and what becomes of one that failed."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

OnFailure = Literal["warn", "error", "ignore"]


class SolveInfo:
    """The end of one solve. Values stay on their device until they are asked for.

    Args:
        iterations: steps taken: 0-dimensional, or one per sample.
        residual: the relative residual after the last step, likewise.
        tol: the residual asked for.
    """

    __slots__ = ("_iterations", "_residual", "tol")

    def __init__(self, iterations: Tensor | int, residual: Tensor | float, tol: float) -> None:
        self._iterations, self._residual, self.tol = iterations, residual, tol

    @property
    def iterations(self) -> int | Tensor:
        """Steps taken; a tensor of one per sample where samples stop on their own."""
        value = self._iterations
        return value if isinstance(value, Tensor) and value.dim() else int(value)

    @property
    def residual(self) -> float | Tensor:
        """The relative residual after the last step; a tensor where samples stop on their own."""
        value = self._residual
        return value if isinstance(value, Tensor) and value.dim() else float(value)

    @property
    def converged(self) -> bool | Tensor:
        """Whether the residual met ``tol``; a tensor where samples stop on their own."""
        residual = self.residual
        return residual <= self.tol

    def __repr__(self) -> str:
        return (
            f"SolveInfo(converged={self.converged}, iterations={self.iterations}, "
            f"residual={self.residual})"
        )


def report(info: SolveInfo, on_failure: OnFailure, what: str) -> None:
    """Warn of a solve that stopped above its tolerance, or raise; as ``on_failure`` says.

    Raises:
        FloatingPointError: the state is not finite (unless ``"ignore"``).
        RuntimeError: ``"error"``, and not converged.
    Warns:
        UserWarning: ``"warn"``, and not converged.
    """
    if on_failure == "ignore":
        return
    iterations, residual = info.iterations, info.residual
    whose = ""
    if isinstance(residual, Tensor):
        failed = int((~(residual <= info.tol)).sum())
        if not failed:
            return
        whose = f"{failed} of {len(residual)} samples "
        worst, steps = float(torch.max(residual)), int(torch.as_tensor(iterations).max())
    else:
        if residual <= info.tol:
            return
        worst, steps = residual, int(iterations)
    if not math.isfinite(worst):
        raise FloatingPointError(f"{what}: {whose}diverged: not finite after {steps} iterations")
    message = (
        f"{what}: {whose}did not converge: relative residual {worst:.3g} after {steps} iterations, "
        f"tol {info.tol:g}"
    )
    if on_failure == "error":
        raise RuntimeError(message)
    warnings.warn(message, UserWarning, stacklevel=3)
