"""Fixed points z = f(z) of any function: Anderson acceleration, Broyden's method, iteration.

A state is a tensor whose first dimension counts samples. The methods mix or update every sample by
itself, and stop on one residual over the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastprune.checks import whole

Map = Callable[[Tensor], Tensor]
Solver = Literal["anderson", "broyden", "iteration"]
SOLVERS: tuple[Solver, ...] = ("anderson", "broyden", "iteration")
# Of the residual's denominator: what counts as a state of norm 0.
_SMALL = 1e-5


@dataclass(frozen=True)
class Settings:
    """How to solve: see :class:`fastprune.nn.DEQ` for the meanings."""

    solver: Solver
    tol: float
    max_iter: int
    memory: int
    regularization: float
    beta: float

    def check(self, prefix: str = "") -> None:
        """Raise a ValueError that names the argument, with ``prefix`` before it."""
        if self.solver not in SOLVERS:
            expected = ", ".join(map(repr, SOLVERS))
            raise ValueError(f"{prefix}solver: expected one of {expected}, got {self.solver!r}")
        if not _number(self.tol) or self.tol < 0:
            raise ValueError(f"{prefix}tol: expected a finite number >= 0, got {self.tol!r}")
        whole(self.max_iter, f"{prefix}max_iter", 3 if self.solver == "anderson" else 1, None)
        whole(self.memory, "memory", 1, None)
        if not _number(self.regularization) or self.regularization < 0:
            raise ValueError(
                f"regularization: expected a finite number >= 0, got {self.regularization!r}"
            )
        if not _number(self.beta) or self.beta <= 0:
            raise ValueError(f"beta: expected a positive finite number, got {self.beta!r}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Found:
    r"""Where a solve ended: ``residual`` is \|\|f(z) - z\|\| / (1e-5 + \|\|f(z)\|\|) there."""

    z: Tensor
    iterations: int  # evaluations of f
    residual: float


def solve(f: Map, z0: Tensor, settings: Settings) -> Found:
    """Look for z = f(z), from ``z0`` on; see :class:`Settings`.

    Stops when the residual is below ``tol``, is not finite, or f was evaluated ``max_iter`` times.
    Half-precision states are kept in float32. No gradients: call it under ``torch.no_grad()``.
    """
    dtype = torch.promote_types(z0.dtype, torch.float32)
    flat = z0.flatten(1) if z0.dim() > 1 else z0.unsqueeze(1)

    def on_rows(x: Tensor) -> Tensor:
        z = x.to(z0.dtype).view(z0.shape)
        version = 0 if z.is_inference() else z._version
        value = f(z)
        if not z.is_inference() and z._version != version:
            raise ValueError("cell: it changed its state z in place; expected a new tensor")
        if value.shape != z0.shape:
            raise ValueError(
                f"cell: expected a result of the state's shape {tuple(z0.shape)}, got "
                f"{tuple(value.shape)}"
            )
        return value.reshape(flat.shape).to(dtype)

    method = {"anderson": _anderson, "broyden": _broyden, "iteration": _iteration}[settings.solver]
    found = method(on_rows, flat.to(dtype), settings)
    return Found(found.z.to(z0.dtype).view(z0.shape), found.iterations, found.residual)


def _residual(fx: Tensor, g: Tensor) -> float:
    r"""\|\|f(x) - x\|\| / (1e-5 + \|\|f(x)\|\|) over the batch; g = f(x) - x."""
    change, size = torch.stack([g.norm(), fx.norm()]).tolist()
    # inf / inf is no residual, and neither is a finite number over infinity.
    return float(change / (_SMALL + size)) if math.isfinite(size) else math.inf


def _stops(residual: float, settings: Settings) -> bool:
    return residual < settings.tol or not math.isfinite(residual)


def _iteration(f: Map, x: Tensor, settings: Settings) -> Found:
    """x <- f(x)."""
    for count in range(1, settings.max_iter + 1):
        fx = f(x)
        residual = _residual(fx, fx - x)
        if _stops(residual, settings) or count == settings.max_iter:
            break
        x = fx
    return Found(x, count, residual)


def _anderson(f: Map, x: Tensor, settings: Settings) -> Found:
    r"""The next x is the combination of the last m values of f whose residuals cancel best.

    Per sample: minimize \|\|sum_i a_i g_i\|\|^2 + regularization \|\|a\|\|^2 with sum a_i = 1,
    g_i = f(x_i) - x_i; x = sum_i a_i (x_i + beta g_i). The first two evaluations are plain
    iteration, and the residual is looked at from the third on.
    """
    rows, m = len(x), settings.memory
    values = x.new_zeros(rows, m, x.shape[1])  # f(x_i)
    changes = torch.zeros_like(values)  # g_i
    # The normal equations with the constraint's multiplier in front.
    system = x.new_zeros(rows, m + 1, m + 1)
    system[:, 0, 1:] = system[:, 1:, 0] = 1
    right = x.new_zeros(rows, m + 1, 1)
    right[:, 0] = 1
    for count in range(1, settings.max_iter + 1):
        slot = (count - 1) % m
        fx = f(x)
        values[:, slot] = fx
        g = fx - x
        changes[:, slot] = g
        if count > 2:
            residual = _residual(fx, g)
            if _stops(residual, settings) or count == settings.max_iter:
                break
        # In this order: a product with a column on the right takes torch seven times as long.
        inner = torch.bmm(g.unsqueeze(1), changes.transpose(1, 2)).squeeze(1)
        inner[:, slot] += settings.regularization
        system[:, slot + 1, 1:] = system[:, 1:, slot + 1] = inner
        if count == 1:
            x = fx
            continue
        n = min(count, m)
        weights, _ = torch.linalg.solve_ex(system[:, : n + 1, : n + 1], right[:, : n + 1])
        weights = weights[:, 1:].transpose(1, 2)
        # Singular where the residuals of a sample depend on each other: there a plain step.
        sound = torch.isfinite(weights).all(2, keepdim=True)
        newest = torch.arange(n, device=x.device) == slot
        weights = torch.where(sound, weights, newest.to(x.dtype))
        x = torch.bmm(weights, values[:, :n]).squeeze(1)
        if settings.beta != 1:
            x = x - (1 - settings.beta) * torch.bmm(weights, changes[:, :n]).squeeze(1)
    return Found(x, count, residual)


def _broyden(f: Map, x: Tensor, settings: Settings) -> Found:
    """Good Broyden: x <- x - B g, B the inverse Jacobian of g(x) = f(x) - x as far as it is known.

    Per sample B = -I + sum_i u_i v_i^T, a term for each of the last ``memory`` steps. The best x of
    the solve is returned, as residuals may rise on the way.
    """
    rows, m = len(x), min(settings.memory, settings.max_iter)
    us, vs = x.new_zeros(rows, m, x.shape[1]), x.new_zeros(rows, m, x.shape[1])
    g, best = x, Found(x, 0, math.inf)
    step: Tensor | None = None
    for count in range(1, settings.max_iter + 1):
        x = x if step is None else x + step
        fx = f(x)
        new = fx - x
        residual = _residual(fx, new)
        if count == 1 or residual < best.residual or not math.isfinite(residual):
            best = Found(x, count, residual)
        if _stops(residual, settings) or count == settings.max_iter:
            break
        if step is not None:
            # Sherman-Morrison: B gains (step - B dg) (step^T B) / (step^T B dg), dg = new - g.
            v = _products(us, vs, step) - step
            dg = new - g
            u = step - (_products(vs, us, dg) - dg)
            scale = (v * dg).sum(1, keepdim=True)
            slot = (count - 2) % m
            # A sample that stands still learns nothing.
            us[:, slot] = torch.where(scale != 0, u / scale, 0.0)
            vs[:, slot] = v
        g = new
        step = g - _products(vs, us, g)
    return Found(best.z, count, best.residual)


def _products(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """sum_i right_i (left_i . x), per sample."""
    inner = torch.bmm(x.unsqueeze(1), left.transpose(1, 2))
    return torch.bmm(inner, right).squeeze(1)
