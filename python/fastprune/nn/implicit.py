"""Derivatives of both orders of z = cell(z, x): linear equations solved, nothing unrolled."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastprune.nn.fixed_point import Found, Map, Settings, solve
from fastprune.ops.solve_info import OnFailure, SolveInfo, report


class Notes:
    """The solves of one forward pass and of what is differentiated of it."""

    def __init__(self, backward: Settings, on_failure: OnFailure) -> None:
        self.settings, self.on_failure = backward, on_failure
        self.forward: SolveInfo | None = None
        self.backward: SolveInfo | None = None

    def checked(self, found: Found, settings: Settings, what: str) -> SolveInfo:
        info = SolveInfo(found.iterations, found.residual, settings.tol)
        report(info, self.on_failure, f"DEQ: {what} ({settings.solver})")
        return info

    def linear(self, product: Map, v: Tensor, what: str) -> Tensor:
        """u = product(u) + v, for a linear ``product``."""
        scale = float(v.norm(dtype=torch.float32 if v.dtype != torch.float64 else None))
        if scale == 0.0:
            return torch.zeros_like(v)
        if not math.isfinite(scale):
            return torch.full_like(v, math.nan)
        unit = v * (math.sqrt(v.numel()) / scale)
        found = solve_around_autocast(lambda u: product(u) + unit, unit, self.settings)
        self.backward = self.checked(found, self.settings, what)
        return found.z * (scale / math.sqrt(v.numel()))


def solve_around_autocast(f: Map, start: Tensor, settings: Settings) -> Found:
    """Solve with autocast for f alone, its cache off: a cast cached here would have no gradient."""
    kind = start.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return solve(f, start, settings)
    dtype = torch.get_autocast_dtype(kind)

    def cast(z: Tensor) -> Tensor:
        with torch.autocast(kind, dtype, cache_enabled=False):
            return f(z)

    with torch.autocast(kind, enabled=False):
        return solve(cast, start, settings)


# -- Differentiation ------------------------------------------------------------------------------
#
# The equilibrium z is the output of a node S, whose inputs are all that the cell reads. Its
# backward pass needs the graph of one application of the cell, for products with the Jacobian J;
# the graph starts at z, behind a cut, and hence reaches back to S: held by S it would be a cycle
# that nobody frees. So a node K after S holds it, and S knows it weakly. No other pass than those
# in here goes through that graph, and these leave it whole: it serves every derivative.
#
# What S gives its inputs is the solution u of the adjoint equation times the derivative of the cell
# by each input at fixed z. Paths that lead on through z, or from one input to another, are cut
# meanwhile. In a pass that is recorded, A does the same, and knows its own derivative.


class _Gate:
    """Whether the cuts around one application are closed."""

    closed = False


class Cuts:
    """Puts tensors that require gradients behind cuts, each once; others it leaves alone."""

    def __init__(self) -> None:
        self.gate = _Gate()
        self.made: dict[int, Tensor] = {}

    def __call__(self, leaf: Any) -> Any:
        """``leaf``, if it is such a tensor, as the application is to read it."""
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return leaf
        if id(leaf) not in self.made:
            self.made[id(leaf)] = _Cut.apply(leaf, self.gate)
        return self.made[id(leaf)]


class _Cut(torch.autograd.Function):
    """The tensor itself; no gradient gets through while the gate is closed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: _Gate) -> Tensor:
        ctx.gate = gate
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return None if ctx.gate.closed else grad, None


def attached(
    cell: Map, solution: Tensor, leaves: Sequence[Tensor], cuts: Cuts, notes: Notes
) -> Tensor:
    """One more application of the cell to its equilibrium, with the equilibrium's derivatives.

    Args:
        leaves: parameters that the cell reads. What else gradients are wanted of is read through
            ``cuts``.
    """
    inputs = [*leaves, *cuts.made.values()]
    if not inputs:
        return cell(solution)
    found = _Found()
    solved: Tensor = _Solved.apply(solution, found, notes, *inputs)
    z: Tensor = _Cut.apply(solved, cuts.gate)
    applied = _Applied(z, cell(z), inputs, cuts.gate)
    if not applied.value.requires_grad:
        return applied.value
    applied.refuse_unknown()
    found.applied = weakref.ref(applied)
    return _Keeper.apply(solved, applied.value.detach(), applied)  # type: ignore[no-any-return]


class _Applied:
    """One application of the cell: z behind its cut, the value at z, and what else it reads."""

    def __init__(self, z: Tensor, value: Tensor, inputs: Sequence[Tensor], gate: _Gate) -> None:
        self.z, self.value, self.inputs, self.gate = z, value, list(inputs), gate

    def by_z(self, u: Tensor) -> Tensor:
        """J^T u."""
        (found,) = torch.autograd.grad(
            self.value, self.z, u.to(self.value.dtype), retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(u) if found is None else found

    def by_all(self, u: Tensor, create_graph: bool = False) -> list[Tensor | None]:
        """J^T u, and the same for every input."""
        return self.through([self.value], [u.to(self.value.dtype)], create_graph)

    def through(
        self, values: list[Tensor], us: list[Tensor], create_graph: bool = False
    ) -> list[Tensor | None]:
        """The gradients of z and of every input that ``us``, those of ``values``, bring."""
        self.gate.closed = True
        try:
            return list(
                torch.autograd.grad(
                    values,
                    [self.z, *self.inputs],
                    us,
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )
        finally:
            self.gate.closed = False

    def refuse_unknown(self) -> None:
        """Raise if the value depends on a leaf that is no input: its gradient would be lost."""
        for node in self.nodes([self.value]):
            variable = getattr(node, "variable", None)  # of an AccumulateGrad
            if variable is not None:
                raise ValueError(
                    "cell: it reads a tensor that requires gradients and is neither its parameter "
                    f"nor an argument (of shape {tuple(variable.shape)}): register it, or pass it "
                    "to the layer as an argument"
                )

    def nodes(self, values: Sequence[Tensor]) -> Iterator[Any]:
        """The graph of ``values`` down to z and the inputs."""
        seen = {get_gradient_edge(t).node for t in (self.z, *self.inputs)}
        left = [get_gradient_edge(v).node for v in values]
        while left:
            node = left.pop()
            if node not in seen:
                seen.add(node)
                yield node
                left += [n for n, _ in node.next_functions if n is not None]


class _Found:
    """The way from S to the application, which is made after it."""

    applied: Callable[[], _Applied | None]


class _Solved(torch.autograd.Function):
    """S: a solution z, as a function of the inputs."""

    @staticmethod
    def forward(ctx: Any, solution: Tensor, found: _Found, notes: Notes, *inputs: Tensor) -> Tensor:
        ctx.found, ctx.notes, ctx.count = found, notes, len(inputs)
        ctx.set_materialize_grads(False)
        return solution.view_as(solution)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, ...]:
        if v is None:
            return (None, None, None, *[None] * ctx.count)
        applied = ctx.found.applied()
        assert applied is not None, "every path to z leads through a node that keeps it"
        grads: list[Tensor | None]
        if torch.is_grad_enabled():
            grads = [*_Adjoint.apply(applied, ctx.notes, v, applied.z, *applied.inputs)]
        else:
            grads = _adjoint(applied, ctx.notes, v)[1]
        return (None, None, None, *grads)


def _adjoint(applied: _Applied, notes: Notes, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """u = J^T u + v, and u times the derivatives by the inputs."""
    with torch.no_grad():
        u = notes.linear(applied.by_z, v, "adjoint equation")
    return u, applied.by_all(u)[1:]


class _Adjoint(torch.autograd.Function):
    """A: the backward pass of S, as a function of v, z and the inputs."""

    @staticmethod
    def forward(
        ctx: Any, applied: _Applied, notes: Notes, v: Tensor, z: Tensor, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.applied, ctx.notes = applied, notes
        u, grads = _adjoint(applied, notes, v)
        ctx.save_for_backward(u, v)
        ctx.set_materialize_grads(False)
        return tuple(grads)

    @staticmethod
    def backward(ctx: Any, *ws: Tensor | None) -> tuple[Tensor | None, ...]:
        applied: _Applied = ctx.applied
        u, v = ctx.saved_tensors
        with torch.no_grad():
            found = _second(applied, ctx.notes, u, ws)
        if torch.is_grad_enabled():
            reads = [t for t in (v, applied.z, *applied.inputs, *ws) if t is not None]
            found = [None if g is None else _Last.apply(g, *reads) for g in found]
        return (None, None, *found)


def _second(
    applied: _Applied, notes: Notes, u: Tensor, ws: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of sum_i w_i . (u df/di) by v, by z and by every input i."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        by_z, *by_inputs = applied.by_all(u, create_graph=True)
    pairs = [(g, w) for g, w in zip(by_inputs, ws, strict=True) if g is not None and w is not None]
    if not pairs:
        return [None] * (2 + len(ws))
    values, given = [g for g, _ in pairs], [w for _, w in pairs]
    every = values if by_z is None else [by_z, *values]
    # Torch leaves such a node out without a word where it only follows paths to some tensors.
    if any(not g.requires_grad for g in every) or any(
        node.name().endswith("Error") for node in applied.nodes(every)
    ):
        raise RuntimeError(
            "DEQ: the cell has an operation that can be differentiated only once (the sparse "
            "kernels of masked layers, for one): there is no second derivative through it"
        )
    (right,) = torch.autograd.grad(values, u, given, retain_graph=True)

    def product(h: Tensor) -> Tensor:
        if by_z is None:
            return torch.zeros_like(h)
        return torch.autograd.grad(by_z, u, h, retain_graph=True)[0]

    # What moves u solves h = J h + right.
    h = notes.linear(product, right, "tangent equation")
    return [h, *applied.through(every, given if by_z is None else [h, *given])]


class _Last(torch.autograd.Function):
    """A second derivative, which has none of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *reads: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("DEQ: third derivatives are not supported")


class _Keeper(torch.autograd.Function):
    """K: z once more, with the value of the application, which it keeps."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, applied: _Applied) -> Tensor:
        ctx.applied = applied
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
