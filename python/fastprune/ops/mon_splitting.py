"""Equilibria of monotone operator networks, differentiable through the implicit function theorem.

The gradient is never unrolled: the adjoint equation is solved by the same splitting method, and its
own derivative (second derivatives, for GraSP) is one more equation of the same kind.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastprune.ops.mon_conv_operator import ConvOperator
from fastprune.ops.mon_operator import (
    LinearOperator,
    LinearStructure,
    Operator,
    Settings,
    full_precision,
)
from fastprune.ops.mon_weights import ConvExtra, ConvWeights, LinearExtra, LinearWeights
from fastprune.ops.pattern import apply_mask
from fastprune.ops.solve_info import OnFailure, SolveInfo, report
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
    bound = operator.lipschitz * _MARGIN
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
        with full_precision(bias.device):
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
        with full_precision(grad.device):
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
        with full_precision(grad.device):
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
        with full_precision(grad.device):
            if ctx.needs_input_grad[4]:
                multiply = ctx.weights.multiply
                before = grad_u + multiply(ctx.extra, y, parameters, not ctx.transposed)
                after = grad + multiply(ctx.extra, u, parameters, ctx.transposed)
                slope_grad = before * after
            q, z = (u, y) if ctx.transposed else (y, u)
            grads = ctx.weights.grads(ctx.extra, q, z, parameters, ctx.needs_input_grad[8:])
        return (None, None, None, y, slope_grad, None, None, None, *grads)


class SolveNotes:
    """The solves of one forward pass, and of what is differentiated of it."""

    def __init__(self, tol: float, on_failure: OnFailure, what: str) -> None:
        self.tol, self.on_failure, self.what = tol, on_failure, what
        self.forward: SolveInfo | None = None
        self.backward: SolveInfo | None = None

    def add(self, iterations: Tensor, residual: Tensor) -> None:
        """Note one more solve; warn or raise if it failed."""
        info = SolveInfo(iterations, residual, self.tol)
        if self.forward is None:
            self.forward = info
        else:
            self.backward = info
        what = "equilibrium" if info is self.forward else "adjoint equation"
        report(info, self.on_failure, f"{self.what}: {what}")


class MonSolution(NamedTuple):
    """An equilibrium, and how it was found."""

    z: Tensor
    info: SolveInfo


def mon_splitting(
    bias: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    *,
    m: float = 1.0,
    g: Tensor | None = None,
    h: Tensor | None = None,
    A_mask: Tensor | None = None,
    B_mask: Tensor | None = None,
    activation: Literal["relu", "tanh", "sigmoid", "softplus"] = "relu",
    solver: Literal["pr", "fb"] = "pr",
    alpha: float | None = None,
    tol: float = 1e-5,
    max_iter: int = 50,
    per_sample: bool = False,
    on_failure: OnFailure = "warn",
) -> MonSolution:
    r"""Solve z = sigma(W z + bias), W = (1 - m) I - A^T A + B - B^T, by operator splitting.

    With kernels A and B (n, n, k, k), W is the circular convolution (1 - m) I - g A^T A +
    h (B - B^T) on maps, and the border of width k // 2 of z is kept at 0; here A and B are taken as
    they are, not scaled to norm 1 as :class:`fastprune.nn.MonDEQConv2d` does.

    Args:
        bias: U x + b: (N, n), or maps (N, n, H, W) with the border; float32 or float64.
        A, B: (n, n), or (n, n, k, k) with k odd; dtype and device of ``bias``; None: not there.
        m: strong monotonicity of I - W, > 0.
        g, h: scalars of a convolution; None: 1.
        A_mask, B_mask: bool, shaped like A and B: entries outside do not exist. None: all do.
        activation: sigma.
        solver: ``"pr"``: Peaceman-Rachford, u_half = 2 z - u, z_half = V (u_half + alpha bias),
            u = 2 z_half - u_half, z = prox(u), V = ((1 + alpha) I - alpha W)^-1; any alpha.
            ``"fb"``: forward-backward, z = prox((1 - alpha) z + alpha (W z + bias)); converges for
            alpha < 2 m / L^2, L the norm of I - W. prox is that of sigma at step alpha.
        alpha: the step; None: 1, or for ``"fb"`` m / L^2 where 1 is not safe (L estimated by power
            iteration: 60 products with W).
        tol: stops at \|\|z_new - z\|\| / (1e-6 + \|\|z_new\|\|) <= tol, over the whole batch.
        max_iter: steps at most.
        per_sample: every sample stops by its own residual.
        on_failure: ``"warn"``, ``"error"`` or ``"ignore"``, for solves that do not converge, the
            adjoint ones included; a state that is not finite raises unless ``"ignore"``.
    Returns:
        ``z``: one more application of the layer after the last step; ``info``: ``converged``,
        ``iterations``, ``residual``.
    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        FloatingPointError, RuntimeError: as ``on_failure`` says.
    Starts at zero. Differentiable any number of times with respect to bias, A, B, g and h, by the
    implicit function theorem. Cost per step and sample: 2 n^2 flops, or 4 nnz(A) + 4 nnz(B) where
    masks make that cheaper; zeros of a ReLU state are left out where n or the batch is small. For
    maps one complex product per pair of frequencies. The weights are prepared at every call; the
    layers keep what they prepared.
    Source: Winston and Kolter 2020, Algorithms 1 and 2; paper 000, equation 2.
    """
    check_settings(activation, solver, alpha, tol, max_iter)
    if not (isinstance(m, (int, float)) and math.isfinite(m) and m > 0):
        raise ValueError(f"m: expected a positive finite number, got {m!r}")
    if on_failure not in ("warn", "error", "ignore"):
        raise ValueError(f"on_failure: expected 'warn', 'error' or 'ignore', got {on_failure!r}")
    _check_operands(bias, A, B, A_mask, B_mask)
    present = A if A is not None else B
    maps = bias.dim() == 4
    if maps:
        g = bias.new_ones(()) if g is None else g
        h = bias.new_ones(()) if h is None else h
    elif g is not None or h is not None:
        raise ValueError(f"{'g' if g is not None else 'h'}: only convolutions have it")
    A = A if A is None or A_mask is None else apply_mask(A, A_mask)
    B = B if B is None or B_mask is None else apply_mask(B, B_mask)
    operator: Operator
    extra: Any
    with torch.no_grad(), full_precision(bias.device):
        if maps:
            ring = 0 if present is None else present.shape[-1] // 2
            assert g is not None
            assert h is not None
            operator = ConvOperator(A, B, g, h, float(m), ring, bias, A_mask, B_mask)
            extra = ConvExtra(float(m))
        else:
            structure = LinearStructure(bias.shape[1], A is not None, B is not None, A_mask, B_mask)
            operator = LinearOperator(A, B, float(m), bias.shape[1], bias, structure)
            extra = LinearExtra(float(m), structure.a_pattern, structure.b_pattern)
        step = safe_alpha(operator, solver, float(m)) if alpha is None else float(alpha)
    settings = Settings(activation, solver, step, float(tol), max_iter, per_sample)
    notes = SolveNotes(float(tol), on_failure, "mon_splitting")
    weights, parameters = (ConvWeights, (A, B, g, h)) if maps else (LinearWeights, (A, B))
    z = Equilibrium.apply(operator, settings, notes, bias, weights, extra, *parameters)
    assert notes.forward is not None
    return MonSolution(z, notes.forward)


def _check_operands(
    bias: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    A_mask: Tensor | None,
    B_mask: Tensor | None,
) -> None:
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"bias: expected float32 or float64, got {bias.dtype}")
    if bias.dim() not in (2, 4):
        raise ValueError(f"bias: expected 2 or 4 dimensions, got shape {tuple(bias.shape)}")
    n = bias.shape[1]
    for name, t in (("A", A), ("B", B)):
        if t is None:
            continue
        if t.dtype != bias.dtype:
            raise TypeError(f"{name}: expected the dtype of bias, {bias.dtype}, got {t.dtype}")
        if t.device != bias.device:
            raise ValueError(f"{name}: expected the device of bias, {bias.device}, got {t.device}")
        square = t.dim() == bias.dim() and t.shape[0] == t.shape[1] == n
        if not square or (t.dim() == 4 and (t.shape[2] != t.shape[3] or t.shape[2] % 2 == 0)):
            wanted = f"({n}, {n})" if bias.dim() == 2 else f"({n}, {n}, k, k) with k odd"
            raise ValueError(f"{name}: expected shape {wanted}, got {tuple(t.shape)}")
    if A is not None and B is not None and A.shape != B.shape:
        raise ValueError(f"B: expected the shape of A, {tuple(A.shape)}, got {tuple(B.shape)}")
    for name, mask, t in (("A_mask", A_mask, A), ("B_mask", B_mask, B)):
        if mask is None:
            continue
        if t is None:
            raise ValueError(f"{name}: there is no {name[0]} to mask")
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected a bool tensor, got {mask.dtype}")
        if mask.shape != t.shape or mask.device != t.device:
            raise ValueError(
                f"{name}: expected shape {tuple(t.shape)} on {t.device}, got "
                f"{tuple(mask.shape)} on {mask.device}"
            )
