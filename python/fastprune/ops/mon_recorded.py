"""Equilibrium solves as single ops, for graphs: what torch.compile records of a layer.

Eagerly a layer calls the autograd Functions of :mod:`fastprune.ops.mon_splitting`, which keep
prepared weights. A graph holds tensors and plain values only; these ops take those, and prepare the
weights at the call, unless they equal those of a call before.
"""

from __future__ import annotations

from collections import deque
from typing import Any

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
from fastprune.ops.mon_splitting import safe_alpha
from fastprune.ops.mon_weights import ConvExtra, ConvWeights, LinearExtra, LinearWeights
from fastprune.ops.snapshot import Snapshot
from fastprune.ops.solve_info import SolveInfo, report
from fastprune.reference.mon_splitting import slope as slope_of
from fastprune.reference.mon_splitting import without_ring

_prepared: deque[tuple[Snapshot, Operator]] = deque(maxlen=4)

_ARGUMENTS = (
    "Tensor? A, Tensor? B, Tensor? g, Tensor? h, Tensor? a_mask, Tensor? b_mask, float m, "
    "int ring, str activation, str solver, float? alpha, float tol, int max_iter, bool per_sample, "
    "str on_failure"
)
_library = torch.library.Library("fastprune", "FRAGMENT")
_library.define(
    f"mon_equilibrium(Tensor bias, {_ARGUMENTS}) -> (Tensor out, Tensor z, Tensor iterations, "
    "Tensor residual)"
)
_library.define(f"mon_adjoint(Tensor grad, Tensor slope, {_ARGUMENTS}) -> Tensor")


def _operator(
    like: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    a_mask: Tensor | None,
    b_mask: Tensor | None,
    m: float,
    ring: int,
) -> Operator:
    read = [A, B, g, h, a_mask, b_mask]
    context = m, ring, like.dtype, like.device, like.shape[1:]
    for snapshot, operator in _prepared:
        if snapshot.matches(read, context):
            return operator
    made: Operator
    if like.dim() == 2:
        structure = LinearStructure(like.shape[1], A is not None, B is not None, a_mask, b_mask)
        made = LinearOperator(A, B, m, like.shape[1], like, structure)
    else:
        assert g is not None
        assert h is not None
        made = ConvOperator(A, B, g, h, m, ring, like, a_mask, b_mask)
    _prepared.append((Snapshot(read, context), made))
    return made


def _equilibrium(bias: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad(), full_precision(bias.device):
        operator, settings, on_failure = _read(bias, arguments)
        solution = operator.solve(bias, settings)
    info = SolveInfo(solution.iterations, solution.residual, settings.tol)
    report(info, on_failure, "equilibrium")
    return tuple(solution)  # type: ignore[return-value]


def _adjoint(grad: Tensor, slope: Tensor, *arguments: Any) -> Tensor:
    with torch.no_grad(), full_precision(grad.device):
        operator, settings, on_failure = _read(grad, arguments)
        solution = operator.adjoint(grad, slope, settings, True)
    info = SolveInfo(solution.iterations, solution.residual, settings.tol)
    report(info, on_failure, "adjoint equation")
    return solution.out


def _read(like: Tensor, arguments: tuple[Any, ...]) -> tuple[Operator, Settings, Any]:
    *weights, activation, solver, alpha, tol, max_iter, per_sample, on_failure = arguments
    operator = _operator(like, *weights)
    if alpha is None:
        alpha = safe_alpha(operator, solver, weights[6])
    return operator, Settings(activation, solver, alpha, tol, max_iter, per_sample), on_failure


_library.impl("mon_equilibrium", _equilibrium, "CompositeExplicitAutograd")
_library.impl("mon_adjoint", _adjoint, "CompositeExplicitAutograd")


@torch.library.register_fake("fastprune::mon_equilibrium")
def _(bias: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = (bias.shape[0],) if arguments[-2] else ()
    device = bias.device if bias.device.type == "cuda" else "cpu"
    return (
        torch.empty_like(bias, memory_format=torch.contiguous_format),
        torch.empty_like(bias, memory_format=torch.contiguous_format),
        bias.new_empty(counts, dtype=torch.int64, device=device),
        bias.new_empty(counts, dtype=torch.float64, device=device),
    )


@torch.library.register_fake("fastprune::mon_adjoint")
def _(grad: Tensor, slope: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, A, B, g, h, a_mask, b_mask, *ctx.rest = inputs
    ctx.save_for_backward(output[0], output[1], A, B, g, h, a_mask, b_mask)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = [None] * len(ctx.rest)
    if grad is None:
        return (None,) * (7 + len(rest))
    out, z, A, B, g, h, a_mask, b_mask = ctx.saved_tensors
    m, ring, activation = ctx.rest[:3]
    slope = without_ring(slope_of(out, activation), ring)
    u = torch.ops.fastprune.mon_adjoint(grad, slope, A, B, g, h, a_mask, b_mask, *ctx.rest)
    needs = ctx.needs_input_grad[1:5]
    if z.dim() == 2:
        a_grad, b_grad = LinearWeights.grads(LinearExtra(m), u, z, (A, B), needs)
        return (u, a_grad, b_grad, None, None, None, None, *rest)
    grads = ConvWeights.grads(ConvExtra(m), u, z, (A, B, g, h), needs)
    return (u, *grads, None, None, *rest)


torch.library.register_autograd(
    "fastprune::mon_equilibrium", _backward, setup_context=_setup_context
)
