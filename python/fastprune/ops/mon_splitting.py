"""Equilibria of monotone operator networks, differentiable through the implicit function theorem.

The gradient is never unrolled: the adjoint equation is solved by the same splitting method, and its
own derivative (second derivatives, for GraSP) is one more equation of the same kind.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fastprune.ops.mon_operator import Operator, Settings
from fastprune.reference.mon_splitting import slope as slope_of
from fastprune.reference.mon_splitting import without_ring

ACTIVATIONS = ("relu", "tanh", "sigmoid", "softplus", "identity")
SOLVERS = ("pr", "fb")
# Power iteration finds L from below; m / L^2 is half of the largest step that converges, so an
# estimate 0.7 L would still be safe. The step 1 of the reference is taken where it is well inside.
_MARGIN = 1.1


class Notes(Protocol):
    """What hears of every solve."""

    def add(self, iterations: Tensor, residual: Tensor) -> None:
        """May warn or raise."""


def check_settings(
    activation: str, solver: str, alpha: float | None, tol: float, max_iter: int
) -> None:
    """Raise ValueError or TypeError for a setting that no solve can run with."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected 'pr' or 'fb', got {solver!r}")
    if alpha is not None and not (
        isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0
    ):
        raise ValueError(f"alpha: expected a positive finite number or None, got {alpha!r}")
    if not (isinstance(tol, (int, float)) and math.isfinite(tol) and tol >= 0):
        raise ValueError(f"tol: expected a finite number of at least 0, got {tol!r}")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter: expected a positive integer, got {max_iter!r}")


def safe_alpha(operator: Operator, solver: str, m: float) -> float:
    """A step that converges: 1 for Peaceman-Rachford, for forward-backward below 2 m / L^2."""
    if solver == "pr":
        return 1.0
    bound = operator.lipschitz() * _MARGIN
    if not math.isfinite(bound) or bound == 0.0:
        return 1.0  # the solve will say what is wrong
    return 1.0 if bound * bound < 2.0 * m else m / (bound * bound)


class Equilibrium(torch.autograd.Function):
    """z = sigma(W z + bias), with notes on the solve appended to ``notes``."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        settings: Settings,
        notes: Notes,
        bias: Tensor,
        weights: Any,
        extra: Any,
        *parameters: Tensor | None,
    ) -> Tensor:
        """One solve."""
        solution = operator.solve(bias, settings)
        notes.add(solution.iterations, solution.residual)
        ctx.operator, ctx.settings, ctx.notes = operator, settings, notes
        ctx.weights, ctx.extra = weights, extra
        ctx.save_for_backward(solution.out, solution.z, *parameters)
        return solution.out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The adjoint equation, then one product of the equilibrium with its solution."""
        out, z, *parameters = ctx.saved_tensors
        operator, settings = ctx.operator, ctx.settings
        again = torch.is_grad_enabled()  # to be differentiated once more
        slope = without_ring(slope_of(out, settings.activation), operator.ring)
        u = Adjoint.apply(
            operator,
            settings,
            ctx.notes,
            grad,
            slope,
            True,
            ctx.weights,
            ctx.extra,
            *parameters,
        )
        # The iterate before the last application, as in the reference; where a second derivative is
        # wanted, the result itself, which hangs on the parameters. At convergence they agree.
        grads = ctx.weights.grads(
            ctx.extra, u, out if again else z, parameters, ctx.needs_input_grad[6:]
        )
        return (None, None, None, u, None, None, *grads)


class Adjoint(torch.autograd.Function):
    """u = slope * (grad + W^T u); with W in place of W^T where ``transposed`` is False."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        settings: Settings,
        notes: Notes,
        grad: Tensor,
        slope: Tensor,
        transposed: bool,
        weights: Any,
        extra: Any,
        *parameters: Tensor | None,
    ) -> Tensor:
        """One solve."""
        solution = operator.adjoint(grad, slope, settings, transposed)
        notes.add(solution.iterations, solution.residual)
        ctx.operator, ctx.settings, ctx.notes = operator, settings, notes
        ctx.transposed, ctx.weights, ctx.extra = transposed, weights, extra
        ctx.save_for_backward(grad, slope, solution.out, *parameters)
        return solution.out

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor) -> tuple[Any, ...]:
        """y = slope * (grad_u + W y); the same kind of equation, transposed."""
        grad, slope, u, *parameters = ctx.saved_tensors
        y = Adjoint.apply(
            ctx.operator,
            ctx.settings,
            ctx.notes,
            grad_u,
            slope,
            not ctx.transposed,
            ctx.weights,
            ctx.extra,
            *parameters,
        )
        slope_grad = None
        if ctx.needs_input_grad[4]:
            multiply = ctx.weights.multiply
            before = grad_u + multiply(ctx.extra, y, parameters, not ctx.transposed)
            after = grad + multiply(ctx.extra, u, parameters, ctx.transposed)
            slope_grad = before * after
        q, z = (u, y) if ctx.transposed else (y, u)
        grads = ctx.weights.grads(ctx.extra, q, z, parameters, ctx.needs_input_grad[8:])
        return (None, None, None, y, slope_grad, None, None, None, *grads)
