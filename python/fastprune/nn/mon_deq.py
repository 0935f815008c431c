"""Monotone operator equilibrium layers: W = (1 - m) I - A^T A + B - B^T, whatever A and B are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fastprune.ops import mon_recorded  # noqa: F401  # registers the ops for graphs
from fastprune.ops.mon_operator import (
    LinearOperator,
    LinearStructure,
    Operator,
    Settings,
    full_precision,
)
from fastprune.ops.mon_splitting import Equilibrium, SolveNotes, check_settings, safe_alpha
from fastprune.ops.mon_weights import LinearExtra, LinearWeights
from fastprune.ops.pattern import apply_mask
from fastprune.ops.snapshot import Snapshot
from fastprune.ops.solve_info import OnFailure, SolveInfo

Solver = Literal["pr", "fb"]
Activation = Literal["relu", "tanh", "sigmoid", "softplus"]


class MonDEQLayer(nn.Module):
    """Base of :class:`MonDEQLinear` and :class:`MonDEQConv2d`; not used on its own.

    The masks are buffers ``A_mask`` and ``B_mask``, None where nothing is pruned. Pruning W itself
    could cost well-posedness; pruning A and B cannot: any masks give another monotone layer.
    The same holds of absolute values, at which SynFlow scores (:class:`fastprune.pruners.SynFlow`).
    """

    A: Tensor | None
    B: Tensor | None
    A_mask: Tensor | None
    B_mask: Tensor | None
    U: nn.Module
    # False: masked, but with W as a dense matrix; fastprune.accelerate decides.
    sparse: bool = True
    # Parameters of this module itself that pruners prune by default, beside U.weight.
    prunable_parameters = ("A", "B")

    def __init__(
        self,
        m: float,
        activation: Activation,
        solver: Solver,
        alpha: float | None,
        tol: float,
        max_iter: int,
        per_sample: bool,
        on_failure: OnFailure,
    ) -> None:
        super().__init__()
        if not (math.isfinite(m) and m > 0):
            raise ValueError(f"m: expected a positive finite number, got {m!r}")
        if on_failure not in ("warn", "error", "ignore"):
            raise ValueError(
                f"on_failure: expected 'warn', 'error' or 'ignore', got {on_failure!r}"
            )
        check_settings(activation, solver, alpha, tol, max_iter)
        self.m, self.activation, self.solver, self.alpha = float(m), activation, solver, alpha
        self.tol, self.max_iter, self.per_sample = tol, max_iter, per_sample
        self.on_failure = on_failure
        self._notes = SolveNotes(tol, on_failure, type(self).__name__)
        self._prepared: tuple[Snapshot, Any] | None = None
        self._masks_seen: tuple[Snapshot, Any] | None = None

    def _register_matrices(self, A: Tensor | None, B: Tensor | None) -> None:
        self.register_parameter("A", None if A is None else nn.Parameter(A))
        self.register_parameter("B", None if B is None else nn.Parameter(B))
        self.register_buffer("A_mask", None)
        self.register_buffer("B_mask", None)

    @property
    def info(self) -> SolveInfo | None:
        """How the last forward pass ended; None before the first."""
        return self._notes.forward

    @property
    def backward_info(self) -> SolveInfo | None:
        """How the last adjoint solve of the last forward pass ended; None before one."""
        return self._notes.backward

    def set_masks(self, *, A: Tensor | None = None, B: Tensor | None = None) -> None:
        """Prune A and B: entries outside the masks do not exist.

        Args:
            A, B: bool tensors of the matrices' shapes, True where kept, copied; None: whole again.
        Raises:
            TypeError, ValueError: a mask is not bool, does not fit, or its matrix is not there;
                the layer is then unchanged.
        """
        checked = {name: self._checked_mask(name, mask) for name, mask in (("A", A), ("B", B))}
        for name, mask in checked.items():
            setattr(self, f"{name}_mask", mask)
        self._prepared = None
        with torch.no_grad():
            for name, mask in checked.items():
                if mask is not None:
                    matrix = getattr(self, name)
                    matrix.data.copy_(apply_mask(matrix.data, mask))

    def _checked_mask(self, name: str, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        matrix = getattr(self, name)
        if matrix is None:
            raise ValueError(f"{name}: this layer has no {name} to mask")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name}: expected a bool tensor, got {got}")
        if mask.shape != matrix.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(matrix.shape)}, got {tuple(mask.shape)}"
            )
        return mask.detach().to(matrix.device).clone()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A buffer that is None takes nothing from a state; one with a value demands its key.
        for name in ("A_mask", "B_mask"):
            key = prefix + name
            if key in state_dict and getattr(self, name) is None:
                matrix = getattr(self, name[0])
                if matrix is not None:
                    setattr(self, name, torch.ones_like(matrix, dtype=torch.bool))
            elif key not in state_dict and getattr(self, name) is not None:
                state_dict[key] = getattr(self, name)  # a dense state leaves the mask as it is
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_prepared"] = state["_masks_seen"] = None  # made anew by the copy
        state["_notes"] = SolveNotes(self.tol, self.on_failure, type(self).__name__)
        return state

    def _masked(self, name: str) -> Tensor | None:
        matrix, mask = self._wide(name), getattr(self, f"{name}_mask")
        return matrix if mask is None or matrix is None else apply_mask(matrix, mask)

    def _wide(self, name: str) -> Tensor | None:
        matrix: Tensor | None = getattr(self, name)
        if matrix is None or matrix.dtype in (torch.float32, torch.float64):
            return matrix
        return matrix.float()

    def _operands(self) -> tuple[Tensor | None, Tensor | None]:
        """A and B for gradients and graphs. Else the operator alone reads them, once per change."""
        wanted = torch.is_grad_enabled() or torch.compiler.is_compiling()
        of = self._masked if wanted else self._wide
        return of("A"), of("B")

    def _widened(self, bias: Tensor, A: Tensor | None, B: Tensor | None) -> Tensor:
        """``bias`` in the dtype of the solve."""
        present = A if A is not None else B
        if present is not None:
            return bias.to(present.dtype)
        return bias if bias.dtype == torch.float64 else bias.float()

    def _leaf(self, x: fx.Proxy) -> Tensor:
        """A call of the layer in a traced graph: what a solve does depends on values."""
        tracer: Any = x.tracer
        name = tracer.path_of_module(self)
        return tracer.create_proxy("call_module", name, (x,), {})  # type: ignore[no-any-return]

    def _prepared_operator(
        self, read: list[Tensor | None], like: Tensor, prepare: Callable[[], Any]
    ) -> Any:
        """The operator of the tensors ``read``, kept until one of them changes."""
        context = (self.m, self.sparse, like.dtype, like.device, like.shape[1:])
        if self._prepared is None or not self._prepared[0].matches(read, context):
            with torch.no_grad(), full_precision(like.device):
                self._prepared = Snapshot(read, context), prepare()
        return self._prepared[1]

    def _recorded(self, bias: Tensor, ring: int, *weights: Tensor | None) -> Tensor:
        """The solve as one op, for a graph under construction."""
        z, _, iterations, residual = torch.ops.fastprune.mon_equilibrium(
            bias,
            *weights,
            self.A_mask,
            self.B_mask,
            self.m,
            ring,
            self.activation,
            self.solver,
            self.alpha,
            self.tol,
            self.max_iter,
            self.per_sample,
            self.on_failure,
        )
        notes = SolveNotes(self.tol, "ignore", "")  # the op reports itself
        notes.forward = SolveInfo(iterations, residual.detach(), self.tol)
        self._notes = notes
        return z  # type: ignore[no-any-return]

    def _solve(
        self, operator: Operator, bias: Tensor, weights: Any, extra: Any, *parameters: Tensor | None
    ) -> Tensor:
        settings = self._settings(operator, bias.device)
        notes = SolveNotes(self.tol, self.on_failure, type(self).__name__)
        self._notes = notes
        if not torch.is_grad_enabled():
            with full_precision(bias.device):
                solution = operator.solve(bias, settings)
            notes.add(solution.iterations, solution.residual)
            return solution.out
        z: Tensor = Equilibrium.apply(operator, settings, notes, bias, weights, extra, *parameters)
        return z

    def _settings(self, operator: Operator, device: torch.device) -> Settings:
        alpha = self.alpha
        if alpha is None:
            alpha = 1.0
            if self.solver != "pr":
                with torch.no_grad(), full_precision(device):
                    alpha = safe_alpha(operator, self.solver, self.m)
        return Settings(
            self.activation, self.solver, alpha, self.tol, self.max_iter, self.per_sample
        )

    def tune_alpha_(self, x: Tensor, max_alpha: float = 1.0) -> float:
        """Set ``alpha``: halve from ``max_alpha`` on while the iteration count does not rise.

        The rule of Winston and Kolter's programs. If no step converges, ``alpha`` stays as it was.

        Args:
            x: an input, the batch that counts are taken on.
            max_alpha: the first step tried.
        Returns:
            The step chosen.
        """
        before, on_failure = self.alpha, self.on_failure
        best, fewest = None, None
        alpha = float(max_alpha)
        self.on_failure = "ignore"
        try:
            with torch.no_grad():
                while alpha > 1e-4:
                    self.alpha = alpha
                    self(x)
                    assert self.info is not None
                    count = int(torch.as_tensor(self.info.iterations).max())
                    if not bool(torch.as_tensor(self.info.converged).all()):
                        count = self.max_iter + 1  # more than any that converged
                    if fewest is not None and count > fewest:
                        break
                    best, fewest = alpha, count
                    alpha /= 2.0
        finally:
            self.on_failure = on_failure
            self.alpha = before
        if best is not None and fewest is not None and fewest <= self.max_iter:
            self.alpha = best
        return self.alpha if self.alpha is not None else math.nan

    def extra_repr(self) -> str:
        """What is not in the children's descriptions."""
        parts = [f"m={self.m:g}", f"activation={self.activation!r}", f"solver={self.solver!r}"]
        if self.alpha is not None:
            parts.append(f"alpha={self.alpha:g}")
        parts += [f"tol={self.tol:g}", f"max_iter={self.max_iter}"]
        for name in ("A", "B"):
            mask = getattr(self, f"{name}_mask")
            if getattr(self, name) is None:
                parts.append(f"without {name}")
            elif mask is not None:
                parts.append(f"{name} {1.0 - float(mask.float().mean()):.1%} pruned")
        return ", ".join(parts)


class MonDEQLinear(MonDEQLayer):
    r"""The equilibrium z = sigma(W z + U x + b), W = (1 - m) I - A^T A + B - B^T.

    I - W is strongly monotone for any A and B (at least m), so z exists, is unique, and is found by
    operator splitting; pruning A and B keeps it so. The backward pass solves the adjoint equation
    with the same method and keeps no iterates.

    Args:
        in_features: of x.
        out_features: n, of z.
        m: strong monotonicity, > 0.
        use_A, use_B: False: the reduced parametrizations of paper 000, section 3.2, without A,
            without B, without both.
        activation: sigma: ``"relu"``, ``"tanh"``, ``"sigmoid"`` or ``"softplus"``; each is a
            proximal operator, so the methods apply (Winston and Kolter 2020, section 3).
        solver: ``"pr"``: Peaceman-Rachford, one factorization of (1 + alpha) I - alpha W per change
            of the weights, few steps, any ``alpha`` > 0; ``"fb"``: forward-backward, products with
            W only, converges for ``alpha`` < 2 m / L^2, L the norm of I - W.
        alpha: the step; None: 1 for ``"pr"``; for ``"fb"`` 1 where that is safe, else m / L^2, L
            estimated by power iteration.
        tol: stop when \|\|z_new - z\|\| / (1e-6 + \|\|z_new\|\|) <= tol, over the whole batch.
        max_iter: steps at most.
        per_sample: every sample stops on its own residual; ``info`` then holds one value each.
        on_failure: of a solve that does not converge: ``"warn"``, ``"error"`` or ``"ignore"``. A
            state that is not finite raises FloatingPointError unless ``"ignore"``.
    Shape:
        (..., in_features) -> (..., out_features).
    Attributes:
        A, B: Parameters (n, n), or None. ``U``: the ``nn.Linear`` with its bias.
        info: after a forward pass its :class:`SolveInfo`: ``converged``, ``iterations``,
            ``residual``. The returned z is one more application of the layer after the last step.
        backward_info: the same for the last adjoint solve.

    Solved in float64 for float64 weights, else in float32. A, B start as the weights of
    ``nn.Linear(n, n)``. Cost per step and sample: 2 n^2 flops, or with masks 4 nnz(A) + 4 nnz(B)
    where that is cheaper. Differentiable any number of times.
    Papers: Winston and Kolter 2020; 000 (Pham et al. 2022), equation 2 and section 3.
    """

    U: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        m: float = 1.0,
        use_A: bool = True,
        use_B: bool = True,
        activation: Activation = "relu",
        solver: Solver = "pr",
        alpha: float | None = None,
        tol: float = 1e-5,
        max_iter: int = 50,
        per_sample: bool = False,
        on_failure: OnFailure = "warn",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(m, activation, solver, alpha, tol, max_iter, per_sample, on_failure)
        self.in_features, self.out_features = in_features, out_features
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.U = nn.Linear(in_features, out_features, **made)
        square = {
            name: nn.Linear(out_features, out_features, bias=False, **made).weight.data
            for name, used in (("A", use_A), ("B", use_B))
            if used
        }
        self._register_matrices(square.get("A"), square.get("B"))

    def _structure(self, A: Tensor | None, B: Tensor | None) -> LinearStructure:
        masks = [self.A_mask, self.B_mask] if self.sparse else [None, None]
        present = A is not None, B is not None
        if self._masks_seen is None or not self._masks_seen[0].matches(masks, present):
            structure = LinearStructure(self.out_features, *present, *masks)
            self._masks_seen = Snapshot(masks, present), structure
        return self._masks_seen[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        given: Any = x
        if isinstance(given, fx.Proxy):
            return self._leaf(given)
        bias: Tensor = self.U(x)
        if bias.is_meta:  # shapes alone
            return bias
        A, B = self._operands()
        flat = self._widened(bias.reshape(-1, self.out_features), A, B)
        if torch.compiler.is_compiling():
            z = self._recorded(flat, 0, A, B, None, None)
            return z.to(bias.dtype).reshape(bias.shape)

        def prepare() -> LinearOperator:
            masked = self._masked("A"), self._masked("B")
            structure = self._structure(*masked)
            return LinearOperator(*masked, self.m, self.out_features, flat, structure)

        operator = self._prepared_operator(
            [self.A, self.B, self.A_mask, self.B_mask], flat, prepare
        )
        extra = LinearExtra(self.m, operator.structure.a_pattern, operator.structure.b_pattern)
        z = self._solve(operator, flat, LinearWeights, extra, A, B)
        return z.to(bias.dtype).reshape(bias.shape)
