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
        return int(_value(self._iterations)) if _single(self._iterations) else self._iterations

    @property
    def residual(self) -> float | Tensor:
        """The relative residual after the last step; a tensor where samples stop on their own."""
        return float(_value(self._residual)) if _single(self._residual) else self._residual

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


def _single(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0


def _value(value: Tensor | float) -> float:
    return value.item() if isinstance(value, Tensor) else value


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
    converged = info.converged
    if isinstance(converged, Tensor):
        if bool(converged.all()):
            return
        assert isinstance(info.residual, Tensor)
        assert isinstance(info.iterations, Tensor)
        failed = int((~converged).sum())
        whose = f"{failed} of {len(converged)} samples "
        worst, steps = float(torch.max(info.residual)), int(info.iterations.max())
    elif converged:
        return
    else:
        assert not isinstance(info.residual, Tensor)
        assert not isinstance(info.iterations, Tensor)
        whose, worst, steps = "", info.residual, info.iterations
    if not math.isfinite(worst):
        raise FloatingPointError(f"{what}: {whose}diverged: not finite after {steps} iterations")
    message = (
        f"{what}: {whose}did not converge: relative residual {worst:.3g} after {steps} iterations, "
        f"tol {info.tol:g}"
    )
    if on_failure == "error":
        raise RuntimeError(message)
    warnings.warn(message, UserWarning, stacklevel=3)
