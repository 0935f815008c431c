"""Deep equilibrium layers: z = cell(z, x) for any cell, differentiated implicitly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from fastprune.checks import whole
from fastprune.nn.feedback import feedback_close, feedback_state, marks_feedback
from fastprune.nn.fixed_point import Settings, Solver
from fastprune.nn.implicit import Cuts, Notes, attached, solve_around_autocast
from fastprune.ops.solve_info import OnFailure, SolveInfo


class DEQ(nn.Module):
    r"""The equilibrium z = cell(z, x) of any cell, found by a solver and differentiated implicitly.

    The state starts at 0. After the solve, which records no gradients, the cell is applied once
    more: that is the result. The backward pass solves the adjoint equation u = J^T u + v, J the
    Jacobian of the cell in z and v the gradient of the result; memory does not grow with the number
    of iterations. Gradients can be differentiated once more, as GraSP does: that solves the tangent
    equation h = J h + w and one more adjoint equation. Nothing is unrolled.

    Args:
        cell: a module, called as ``cell(z, x, *args)``, that returns the next z, of z's shape.
            An equilibrium needs not exist: ``info`` tells.
        solver: ``"anderson"``: Anderson acceleration, per sample, as in the tutorial cited below;
            ``"broyden"``: Broyden's good method with limited memory, per sample (Bai et al. 2019);
            ``"iteration"``: z <- cell(z, x).
        tol: stop when \|\|cell(z, x) - z\|\| / (1e-5 + \|\|cell(z, x)\|\|) < tol, over the whole
            batch. Anderson looks from the third evaluation on.
        max_iter: evaluations of the cell at most, without the last application; at least 3 for
            Anderson.
        memory: m, past iterates that Anderson combines, or updates that Broyden keeps. None: 5 for
            Anderson, all for Broyden.
        regularization: lambda on the diagonal of Anderson's least-squares problem. It is absolute:
            residuals far below its root are merely averaged, so lower it with ``tol``, or take
            Broyden for many digits.
        beta: Anderson's mixing of combined values (1) and combined iterates (0); in (0, 1] as a
            rule.
        backward_solver, backward_tol, backward_max_iter: the same for the linear equations of the
            backward pass; None: as forward. These are linear, and are solved for a right-hand side
            scaled to root mean square 1, so that small gradients are not taken for converged.
        on_failure: of a solve that does not converge: ``"warn"``, ``"error"`` or ``"ignore"``. A
            state that is not finite raises FloatingPointError unless ``"ignore"``. A gradient that
            arrives with an infinity or NaN is handed on as NaN.
        z_shape: the shape of one sample's state; None: as x's.
    Shape:
        x: (batch, ...) -> (batch, \*z_shape), floating point. ``forward(x, *args, z0=None)``: more
        tensors for the cell, and a state to start from instead of 0 (not differentiated).
    Attributes:
        info: after a forward pass its :class:`SolveInfo`: ``converged``, ``iterations``
            (evaluations of the cell), ``residual``; None before, and on the meta device, where the
            cell is applied once.
        backward_info: the same for the last linear solve of the last forward pass's graph.
    Raises:
        ValueError: an argument is out of range; the cell's result has another shape than its state.
        FloatingPointError, RuntimeError: see ``on_failure``.
    Warns:
        UserWarning: see ``on_failure``.

    The cell is called once per iteration, and once more for the result. So BatchNorm inside it
    updates its running statistics that many times in training, and normalizes each call by that
    call's batch; dropout draws anew each time, so that no equilibrium exists: put both outside, or
    keep one mask per forward pass. The cell must not change z or x in place. Gradients reach its
    parameters (also those that ``torch.func.functional_call`` puts in) and its arguments; another
    tensor that it reads and that requires gradients is an error, as is a second derivative through
    an operation that has none (the sparse kernels of masked layers; pruners score dense weights).
    Under autocast the cell runs as autocast says and the solver's own sums in float32.
    ``torch.compile`` breaks the graph at this layer, which runs as it is (compile the cell by
    itself); ``torch.export`` refuses it. With ``torch.utils.checkpoint`` take
    ``use_reentrant=True``: the other kind computes the layer anew for each product with J.

    SynFlow scores the network of absolute values, whose cell need not have an equilibrium: a
    normalized or saturating cell stays bounded (but GroupNorm subtracts means, so that scores are
    no sums over paths), one of ReLU and linear layers may diverge, which raises.

    Cost: a step of Anderson reads m + 1 states beside the cell's own work, twice that for Broyden.
    Sources: Bai, Kolter and Koltun 2019; Kolter, Duvenaud and Johnson 2020, "Deep implicit layers",
    chapter 4, whose values are the defaults; paper 000 (Pham et al. 2022), section 4.2.
    """

    cell: nn.Module

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver = "anderson",
        tol: float = 1e-2,
        max_iter: int = 25,
        memory: int | None = None,
        regularization: float = 1e-4,
        beta: float = 1.0,
        backward_solver: Solver | None = None,
        backward_tol: float | None = None,
        backward_max_iter: int | None = None,
        on_failure: OnFailure = "warn",
        z_shape: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell: expected a torch.nn.Module, got {type(cell).__name__}")
        if on_failure not in ("warn", "error", "ignore"):
            raise ValueError(
                f"on_failure: expected 'warn', 'error' or 'ignore', got {on_failure!r}"
            )
        super().__init__()
        self.cell = cell
        self.solver, self.tol, self.max_iter = solver, tol, max_iter
        self.memory, self.regularization, self.beta = memory, regularization, beta
        self.backward_solver, self.backward_tol = backward_solver, backward_tol
        self.backward_max_iter = backward_max_iter
        self.on_failure = on_failure
        self.z_shape = (
            None if z_shape is None else tuple(whole(n, "z_shape", 0, None) for n in z_shape)
        )
        self._settings()
        self._notes: Notes | None = None

    @property
    def info(self) -> SolveInfo | None:
        """How the last forward solve ended; None before the first."""
        return None if self._notes is None else self._notes.forward

    @property
    def backward_info(self) -> SolveInfo | None:
        """How the last linear solve of the last forward pass's graph ended; None before one."""
        return None if self._notes is None else self._notes.backward

    def forward(self, x: Tensor, *args: Any, z0: Tensor | None = None) -> Tensor:
        """(batch, ...) -> (batch, \\*z_shape)."""
        given: Any = x
        if isinstance(given, fx.Proxy):  # a leaf: what a solve does depends on values
            name = given.tracer.path_of_module(self)  # type: ignore[attr-defined]
            options = {} if z0 is None else {"z0": z0}
            return given.tracer.create_proxy("call_module", name, (x, *args), options)  # type: ignore[return-value]
        if torch.compiler.is_dynamo_compiling():
            return _outside_graphs(self, x, *args, z0=z0)
        if marks_feedback():
            state = feedback_state(x, self._state_shape(x))
            return feedback_close(state, self.cell(state, x, *args))
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "DEQ: torch.export cannot record a solve that stops when it has converged"
            )
        return self._equilibrium(x, args, z0)

    def _equilibrium(self, x: Tensor, args: tuple[Any, ...], z0: Tensor | None) -> Tensor:
        start = self._start(x, z0)
        if start.is_meta:
            self._notes = None
            return self.cell(start, x, *args)  # type: ignore[no-any-return]
        forward, backward = self._settings()
        self._notes = notes = Notes(backward, self.on_failure)

        with torch.no_grad():
            found = solve_around_autocast(lambda z: self.cell(z, x, *args), start, forward)
        notes.forward = notes.checked(found, forward, "equilibrium")
        if not torch.is_grad_enabled():
            return self.cell(found.z, x, *args)  # type: ignore[no-any-return]
        return self._differentiable(found.z, (x, *args), notes)

    def _differentiable(self, z: Tensor, args: tuple[Any, ...], notes: Notes) -> Tensor:
        """The last application, with its place in autograd's graph."""
        cuts = Cuts()
        args = tree_map(cuts, args)
        leaves, computed = [], {}
        for name, tensor in [*self.cell.named_parameters(), *self.cell.named_buffers()]:
            if tensor.requires_grad and tensor.is_leaf:
                leaves.append(tensor)
            elif tensor.requires_grad:  # computed from others: put in by name, behind its cut
                computed[name] = cuts(tensor)

        def cell(z: Tensor) -> Tensor:
            if computed:
                return functional_call(self.cell, computed, (z, *args))  # type: ignore[no-any-return]
            return self.cell(z, *args)  # type: ignore[no-any-return]

        return attached(cell, z, leaves, cuts, notes)

    def _settings(self) -> tuple[Settings, Settings]:
        """Of the forward and of the backward solves; checked, for attributes may be set."""

        def made(solver: Solver, tol: float, max_iter: int, prefix: str) -> Settings:
            memory = self.memory
            if memory is None:
                memory = 5 if solver == "anderson" else max_iter
            made = Settings(solver, tol, max_iter, memory, self.regularization, self.beta)
            made.check(prefix)
            return made

        solver, tol, max_iter = self.backward_solver, self.backward_tol, self.backward_max_iter
        return made(self.solver, self.tol, self.max_iter, ""), made(
            self.solver if solver is None else solver,
            self.tol if tol is None else tol,
            self.max_iter if max_iter is None else max_iter,
            "backward_",
        )

    def _state_shape(self, x: Tensor) -> tuple[int, ...]:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.dim() == 0 or not x.is_floating_point():
            raise ValueError(
                "x: expected a floating-point tensor of shape (batch, ...), got "
                f"{x.dtype} of shape {tuple(x.shape)}"
            )
        return tuple(x.shape) if self.z_shape is None else (x.shape[0], *self.z_shape)

    def _start(self, x: Tensor, z0: Tensor | None) -> Tensor:
        shape = self._state_shape(x)
        if z0 is None:
            return torch.zeros(shape, dtype=x.dtype, device=x.device)
        if not isinstance(z0, Tensor):
            raise TypeError(f"z0: expected a tensor, got {type(z0).__name__}")
        if tuple(z0.shape) != shape or not z0.is_floating_point():
            raise ValueError(
                f"z0: expected a floating-point tensor of shape {shape}, got {z0.dtype} of shape "
                f"{tuple(z0.shape)}"
            )
        return z0.detach()

    def extra_repr(self) -> str:
        """What is not in the cell's description."""
        parts = [f"solver={self.solver!r}", f"tol={self.tol:g}", f"max_iter={self.max_iter}"]
        for name in ("memory", "backward_solver", "backward_tol", "backward_max_iter", "z_shape"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)


def _outside_graphs(layer: DEQ, x: Tensor, *args: Any, z0: Tensor | None = None) -> Tensor:
    """The layer under ``torch.compile``: a solve is no graph, as its length depends on values."""
    # Not a decorator: disabling imports the compiler, which takes seconds.
    run = torch.compiler.disable(DEQ._equilibrium)
    return run(layer, x, args, z0)  # type: ignore[no-any-return]


_outside_graphs._torchdynamo_disable = True  # type: ignore[attr-defined]
