"""W of a monotone operator layer, prepared once per change of its weights.

An operator holds what the solves read: W dense, or sparse as A, A^T and B - B^T, whichever takes
fewer operations; for Peaceman-Rachford the resolvent. Each is made when it is first asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprune.ops.backend import has_kernel
from fastprune.ops.pattern import Pattern, pack
from fastprune.reference import mon_splitting as plain
from fastprune.reference.mon_splitting import Solution

__all__ = ["LinearOperator", "LinearStructure", "Operator", "Settings", "Solution"]

# In operations of the dense product: an entry of a sparse one, and what each row costs besides
# (measured at n = 48 to 1024, batch 128).
_ENTRY_COST, _ROW_COST = 1.5, 16
# The structure of A^T A is formed only where this share of n^2 bounds its size.
_MERGED_DENSITY = 0.2


class Settings(NamedTuple):
    """How an equilibrium is solved; checked by :func:`fastprune.mon_splitting`."""

    activation: str
    solver: str
    alpha: float
    tol: float
    max_iter: int
    per_sample: bool


def detached(t: Tensor | None) -> Tensor | None:
    """``t`` outside of the graph."""
    return None if t is None else t.detach()


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Whatever autocast says: an equilibrium of rounded weights would be another one."""
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Operator:
    """Base: where there is no kernel, the textbook loops of the reference run."""

    ring = 0

    def plain(self) -> plain.Operator:
        """The operator of the reference."""
        raise NotImplementedError

    def solve(self, bias: Tensor, s: Settings) -> Solution:
        """The equilibrium z = sigma(W z + bias)."""
        return plain.solve(self.plain(), bias, *s)

    def adjoint(self, grad: Tensor, slope: Tensor, s: Settings, transposed: bool) -> Solution:
        """The solution of u = slope * (grad + W^T u), or of the same with W."""
        return plain.adjoint(self.plain(), grad, slope, *s[1:], transposed=transposed)

    @cached_property
    def lipschitz(self) -> float:
        """An estimate, from below, of the largest singular value of I - W."""
        return self._power_iteration()

    def _power_iteration(self) -> float:
        raise NotImplementedError


class Entries(NamedTuple):
    """A pattern and where its entries stand in the flattened (n, n, ...) weight.

    ``at_transposed``: those of the transposed pattern, likewise in the weight itself.
    """

    pattern: Pattern
    at: Tensor
    at_transposed: Tensor


class LinearStructure:
    """Which entries of A and B exist, and the form of W that this makes the cheapest.

    Args:
        a_mask, b_mask: bool (n, n), or None: for a matrix that is whole, or not there.
        has_a, has_b: whether the matrices are there.
    """

    def __init__(
        self, n: int, has_a: bool, has_b: bool, a_mask: Tensor | None, b_mask: Tensor | None
    ) -> None:
        self.a: Entries | None = None  # A, for A^T A
        self.k: Entries | None = None  # B - B^T, or all of W, whose structure is symmetric
        self.merged = False
        # Of A and B alone, for gradients at the mask; None where W is dense.
        self.a_pattern: Pattern | None = None
        self.b_pattern: Pattern | None = None
        self.dense = (has_a and a_mask is None) or (has_b and b_mask is None)
        if self.dense:
            return
        skew = None if b_mask is None else b_mask | b_mask.t()
        a_count = 0 if a_mask is None else int(a_mask.count_nonzero())
        cost = 2 * a_count + (0 if skew is None else int(skew.count_nonzero()))
        merged = None
        if a_mask is not None and 0 < _gram_bound(a_mask) < _MERGED_DENSITY * n * n:
            merged = (a_mask.float().t() @ a_mask.float()) > 0
            merged = merged if skew is None else merged | skew
            merged_cost = int(merged.count_nonzero())
            self.merged = merged_cost < cost
            cost = min(cost, merged_cost)
        if _ENTRY_COST * cost + _ROW_COST * n >= n * n:
            self.dense = True
            return
        self.a_pattern = None if a_mask is None else pack(a_mask)
        self.b_pattern = None if b_mask is None else pack(b_mask)
        if self.merged:
            assert merged is not None
            self.k = entries(merged)
        else:
            self.a = entries(a_mask) if a_mask is not None and a_count else None
            self.k = None if skew is None else entries(skew)


class LinearOperator(Operator):
    """W = (1 - m) I - A^T A + B - B^T of a fully connected layer.

    Args:
        A, B: (n, n), exact zeros where pruned, or None.
        m: strong monotonicity of I - W.
        like: a tensor of the dtype and on the device of the solves.
    """

    def __init__(
        self,
        A: Tensor | None,
        B: Tensor | None,
        m: float,
        n: int,
        like: Tensor,
        structure: LinearStructure,
    ) -> None:
        self.A, self.B = detached(A), detached(B)
        self.m, self.n = m, n
        self._like = like.new_empty(0)
        self.structure = structure
        self._sparse: dict[bool, tuple[list[Tensor], list[Tensor]]] = {}
        self._alpha = 0.0  # of the resolvents below; none yet
        self._inverse = self._like
        self._resolvents: dict[bool, Tensor] = {}

    @cached_property
    def w(self) -> Tensor:
        """W, dense."""
        return plain.linear_matrix(self.A, self.B, self.m, self.n, self._like)

    @cached_property
    def packed(self) -> Tensor:
        """W, dense, as the op reads it."""
        return _packed(self.w)

    @cached_property
    def packed_transposed(self) -> Tensor:
        """W^T likewise."""
        return _packed(self.w.t())

    def resolvent(self, alpha: float, transposed: bool) -> Tensor:
        """((1 + alpha) I - alpha W)^-1 or its transpose, packed: one factorization per alpha."""
        if alpha != self._alpha:
            eye = torch.eye(self.n, dtype=self._like.dtype, device=self._like.device)
            self._inverse = torch.linalg.inv((1.0 + alpha) * eye - alpha * self.w)
            self._alpha, self._resolvents = alpha, {}
        if transposed not in self._resolvents:
            self._resolvents[transposed] = _packed(
                self._inverse.t() if transposed else self._inverse
            )
        return self._resolvents[transposed]

    def plain(self) -> plain.Operator:
        """The operator of the reference."""
        return plain.linear_operator(self.w)

    def solve(self, bias: Tensor, s: Settings) -> Solution:
        """One call of the op."""
        if not has_kernel("mon_splitting", bias.device.type):
            return super().solve(bias, s)
        return self._call(bias, None, s, False)

    def adjoint(self, grad: Tensor, slope: Tensor, s: Settings, transposed: bool) -> Solution:
        """One call of the op."""
        if not has_kernel("mon_splitting", grad.device.type):
            return super().adjoint(grad, slope, s, transposed)
        return self._call(grad, slope, s, transposed)

    def _call(self, bias: Tensor, slope: Tensor | None, s: Settings, transposed: bool) -> Solution:
        structure = self.structure
        matrix, diagonal = None, 0.0
        pair: list[Tensor] = []
        single: list[Tensor] = []
        if structure.dense:
            matrix = self.packed_transposed if transposed else self.packed
        else:
            pair, single = self._sparse_form(transposed)
            diagonal = 1.0 - self.m
        a = None if structure.a is None else structure.a.pattern
        blocks = [1, 1] if a is None else [a.block_depth, a.transposed_block_depth]
        blocks.append(1 if structure.k is None else structure.k.pattern.block_depth)
        return Solution(
            *torch.ops.fastprune.mon_splitting.default(
                bias,
                slope,
                matrix,
                self.resolvent(s.alpha, transposed) if s.solver == "pr" else None,
                pair,
                single,
                blocks,
                diagonal,
                s.activation,
                s.alpha,
                s.tol,
                s.max_iter,
                s.per_sample,
            )
        )

    def _sparse_form(self, transposed: bool) -> tuple[list[Tensor], list[Tensor]]:
        if transposed not in self._sparse:
            pair: list[Tensor] = []
            single: list[Tensor] = []
            structure = self.structure
            if structure.a is not None:
                assert self.A is not None
                p, flat = structure.a.pattern, self.A.reshape(-1)
                pair = [p.row_ptr, p.offset, flat[structure.a.at]]
                pair += [p.transposed_row_ptr, p.transposed_offset]
                pair.append(-flat[structure.a.at_transposed])
            if structure.k is not None:
                k = structure.k
                if structure.merged:
                    own = self.w - (1.0 - self.m) * torch.eye(self.n).to(self._like)
                    values = own.reshape(-1)[k.at_transposed if transposed else k.at]
                else:
                    assert self.B is not None
                    flat = self.B.reshape(-1)
                    first, second = k.at, k.at_transposed
                    if transposed:
                        first, second = second, first
                    values = flat[first] - flat[second]
                single = [k.pattern.row_ptr, k.pattern.offset, values]
            self._sparse[transposed] = pair, single
        return self._sparse[transposed]

    def _power_iteration(self) -> float:
        """On (I - W)^T (I - W), from a fixed start."""

        def apply(x: Tensor) -> Tensor:
            y = x - self.w @ x
            return y - self.w.t() @ y

        return power_iteration(apply, start_vector((self.n,), self._like))


def _packed(matrix: Tensor) -> Tensor:
    """In the CPU kernel's order; elsewhere row by row."""
    if matrix.device.type != "cpu":
        return matrix.contiguous()
    return torch.ops.fastprune.mon_pack.default(matrix)  # type: ignore[no-any-return]


def _gram_bound(a_mask: Tensor) -> float:
    """At least the number of entries of A^T A."""
    rows = a_mask.sum(dim=1).double()
    return float((rows * rows).sum())


def entries(mask: Tensor) -> Entries:
    """Of a square matrix, or of kernels (n, n, k, k); for a symmetric mask of a matrix the two
    patterns are equal."""
    pattern = pack(mask)
    n, taps = mask.shape[0], mask[0, 0].numel() if len(mask) else 1
    rows, columns = _places(pattern.row_ptr, pattern.offset, n, pattern.block_depth * taps)
    at = rows * (n * taps) + columns
    rows, columns = _places(
        pattern.transposed_row_ptr,
        pattern.transposed_offset,
        n,
        pattern.transposed_block_depth * taps,
    )
    return Entries(pattern, at, (columns // taps * n + rows) * taps + columns % taps)


def _places(row_ptr: Tensor, offset: Tensor, rows: int, block_cols: int) -> tuple[Tensor, Tensor]:
    """Row and column of each entry of a packed pattern."""
    lists = torch.arange(len(row_ptr) - 1, device=row_ptr.device)
    of = lists.repeat_interleave(row_ptr.diff())
    return of % rows, of // rows * block_cols + offset.long()


def start_vector(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The same noise at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def power_iteration(apply: Callable[[Tensor], Tensor], x: Tensor, steps: int = 60) -> float:
    """The root of the largest eigenvalue of a positive semidefinite map, from below."""
    for _ in range(steps):
        x = apply(x / x.norm().clamp_min(torch.finfo(x.dtype).tiny))
    return math.sqrt(float(x.norm()))


@torch.library.register_fake("fastprune::mon_pack")
def _pack_fake(matrix: Tensor) -> Tensor:
    # Twice: columns of whole vectors, where it may pay, and rows in groups of 6.
    n = matrix.shape[0]
    columns = (n + 15) // 16 * 16 * n if n <= 1024 else 0
    return matrix.new_empty(columns + (n + 5) // 6 * 6 * n)


@torch.library.register_fake("fastprune::mon_splitting")
@torch.library.register_fake("fastprune::mon_splitting_direct")
def _solve_fake(bias: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = (bias.shape[0],) if arguments[-1] else ()
    return (
        bias.new_empty(bias.shape),
        bias.new_empty(bias.shape),
        bias.new_empty(counts, dtype=torch.int64),
        bias.new_empty(counts, dtype=torch.float64),
    )
