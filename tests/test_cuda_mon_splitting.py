"""Equilibria of fully connected layers on the GPU, by emulation: the textbook loops' results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
from fastprune.ops.mon_operator import LinearOperator, LinearStructure
from fastprune.reference import mon_splitting as plain
from oracle import guarded

pytestmark = emulated.needs_emulation

ACTIVATIONS = list(plain.ACTIVATIONS)


class Case:
    """A layer, its sparse form where masks are given, and the right-hand side of a solve."""

    def __init__(
        self,
        n: int,
        batch: int,
        density: float,
        dtype: torch.dtype,
        seed: int,
        parts: str = "AB",
        narrow: bool = False,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        masks = [torch.rand(n, n, generator=g) < density for _ in "AB"]
        draw = [torch.randn(n, n, generator=g, dtype=torch.float64) for _ in "AB"]
        if narrow:
            masks[0] = (torch.arange(n) < 3).expand(n, n)
        scale = 0.5 / max(n * density, 1.0) ** 0.5
        a, b = ((m * d * scale).to(dtype) for m, d in zip(masks, draw, strict=True))
        self.A = a if "A" in parts else None
        self.B = b if "B" in parts else None
        sparse = density < 1.0
        self.structure = LinearStructure(
            n,
            self.A is not None,
            self.B is not None,
            masks[0] if sparse and self.A is not None else None,
            masks[1] if sparse and self.B is not None else None,
        )
        self.m, self.n = 0.6, n
        self.bias = torch.randn(batch, n, generator=g, dtype=torch.float64).to(dtype)
        self.slope = torch.rand(batch, n, generator=g, dtype=torch.float64).to(dtype)
        self.slope[torch.rand(batch, n, generator=g) < 0.4] = 0.0

    def expected(
        self, activation: str, solver: str, alpha: float, *rest: object, adjoint: bool
    ) -> plain.Solution:
        """In float64."""
        a, b = (None if t is None else t.double() for t in (self.A, self.B))
        w = plain.linear_operator(plain.linear_matrix(a, b, self.m, self.n, self.bias.double()))
        bias = self.bias.double()
        if adjoint:
            return plain.adjoint(w, bias, self.slope.double(), solver, alpha, *rest)
        return plain.solve(w, bias, activation, solver, alpha, *rest)

    def found(
        self, activation: str, solver: str, alpha: float, *rest: object, adjoint: bool
    ) -> plain.Solution:
        """By the kernel."""
        op = LinearOperator(self.A, self.B, self.m, self.n, self.bias, self.structure)
        matrix, pair, single, diagonal = None, [], [], 0.0
        w = op.w.t() if adjoint else op.w
        if self.structure.dense:
            matrix = guarded(w)
        else:
            pair, single = op._sparse_form(adjoint)
            diagonal = 1.0 - self.m
        eye = torch.eye(self.n, dtype=torch.float64)
        v = torch.linalg.inv((1.0 + alpha) * eye - alpha * w.double()).to(w.dtype)
        a = None if self.structure.a is None else self.structure.a.pattern
        blocks = [1, 1] if a is None else [a.block_depth, a.transposed_block_depth]
        blocks.append(1 if self.structure.k is None else self.structure.k.pattern.block_depth)
        return plain.Solution(
            *emulated.ops.mon_splitting(
                guarded(self.bias),
                guarded(self.slope) if adjoint else None,
                matrix,
                guarded(v) if solver == "pr" else None,
                [guarded(t) for t in pair],
                [guarded(t) for t in single],
                blocks,
                diagonal,
                activation,
                alpha,
                *rest,
            )
        )

    def agree(self, *arguments: object, adjoint: bool = False) -> plain.Solution:
        """Counts are equal and values close; ``arguments``: those of ``Settings``."""
        expected = self.expected(*arguments, adjoint=adjoint)
        found = self.found(*arguments, adjoint=adjoint)
        assert found.iterations.dtype == torch.int64
        assert found.residual.dtype == torch.float64
        assert found.iterations.tolist() == expected.iterations.tolist(), arguments
        double = self.bias.dtype == torch.float64
        bound = 1e-11 if double else 2e-5
        for name, a, b in zip(("out", "z"), found[:2], expected[:2], strict=True):
            close(a, b, bound, f"{name}: {arguments}")
        close(found.residual, expected.residual, 1e-9 if double else 2e-2, f"residual: {arguments}")
        return found


def close(a: Tensor, b: Tensor, bound: float, what: str) -> None:
    """Within the bound of the largest element, but for a float32's own size."""
    error = float((a.double() - b).abs().max()) if a.numel() else 0.0
    assert error <= bound * (float(b.abs().max()) if b.numel() else 0.0) + 1e-9, f"{what}: {error}"


@pytest.mark.parametrize("n", [1, 5, 33, 64, 87])
@pytest.mark.parametrize("solver", ["fb", "pr"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_resident(n: int, solver: str, adjoint: bool) -> None:
    for seed, (batch, dtype) in enumerate(
        [(1, torch.float32), (3, torch.float32), (17, torch.float32), (3, torch.float64)]
    ):
        emulated.configure(seed, 1 + seed)
        case = Case(n, batch, 1.0, dtype, seed)
        case.agree("relu", solver, 0.3, 1e-3, 200, False, adjoint=adjoint)


@pytest.mark.parametrize("solver", ["fb", "pr"])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_streamed(solver: str, adjoint: bool, dtype: torch.dtype) -> None:
    for n, batch, multiprocessors in [(129, 3, 4), (130, 7, 8), (133, 2, 132)]:
        emulated.configure(n, multiprocessors)
        case = Case(n, batch, 1.0, dtype, n)
        case.agree("relu", solver, 0.3, 1e-3, 60, False, adjoint=adjoint)


@pytest.mark.parametrize("solver", ["fb", "pr"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_a_launch_for_every_step(solver: str, adjoint: bool) -> None:
    """From 512 KB of matrix on."""
    for n, batch, density, dtype in [
        (363, 3, 1.0, torch.float32),
        (398, 34, 1.0, torch.float32),
        (257, 5, 1.0, torch.float64),
        (370, 5, 0.01, torch.float32),
    ]:
        emulated.configure(n, 4)
        case = Case(n, batch, density, dtype, n)
        assert case.structure.dense == (density == 1.0)
        case.agree("relu", solver, 0.3, 2e-2, 20, False, adjoint=adjoint)


@pytest.mark.parametrize("solver", ["fb", "pr"])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("parts", ["AB", "A", "B", ""])
@pytest.mark.parametrize("n", [33, 150])
def test_sparse(n: int, solver: str, adjoint: bool, parts: str) -> None:
    for density in (0.004, 0.03, 0.12):
        emulated.configure(int(density * 1000), 4)
        case = Case(n, 5, density, torch.float32, n, parts)
        case.agree("relu", solver, 0.3, 1e-3, 60, False, adjoint=adjoint)


@pytest.mark.parametrize("solver", ["fb", "pr"])
def test_one_sparse_matrix(solver: str) -> None:
    """A of three columns only: A^T A is the cheaper one."""
    emulated.configure(1, 4)
    case = Case(90, 5, 0.02, torch.float32, 1, narrow=True)
    case.A = None if case.A is None else case.A * 0.05
    assert case.structure.merged
    for adjoint in (False, True):
        case.agree("relu", solver, 0.3, 1e-3, 60, False, adjoint=adjoint)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("alpha", [0.4, 1.0, 1.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nonlinearities(activation: str, alpha: float, dtype: torch.dtype) -> None:
    case = Case(19, 3, 1.0, dtype, 3)
    emulated.configure(3, 4)
    case.agree(activation, "pr", alpha, 1e-4, 80, False)
    case = Case(40, 3, 0.03, dtype, 3)
    case.agree(activation, "fb", min(alpha, 0.4), 1e-4, 80, False)


@pytest.mark.parametrize(("n", "density"), [(20, 1.0), (131, 1.0), (40, 0.05)])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("solver", ["fb", "pr"])
def test_each_sample_for_itself(n: int, density: float, adjoint: bool, solver: str) -> None:
    for batch, multiprocessors in ((6, 4), (2, 132)):
        emulated.configure(n, multiprocessors)
        case = Case(n, batch, density, torch.float64, n)
        case.bias *= torch.logspace(-3, 3, batch, dtype=torch.float64)[:, None]
        found = case.agree("tanh", solver, 0.3, 1e-4, 60, True, adjoint=adjoint)
        assert adjoint or len(set(found.iterations.tolist())) > 1


@settings(max_examples=40, deadline=None)
@given(
    max_iter=st.integers(1, 90),
    tol=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 10.0]),
    solver=st.sampled_from(["fb", "pr"]),
    size=st.sampled_from([(9, 1.0, 2), (129, 1.0, 1), (30, 0.05, 3)]),
    per_sample=st.booleans(),
    seed=st.integers(0, 99),
)
def test_limits(
    max_iter: int,
    tol: float,
    solver: str,
    size: tuple[int, float, int],
    per_sample: bool,
    seed: int,
) -> None:
    n, density, batch = size
    emulated.configure(seed, 1 + seed % 7)
    case = Case(n, batch, density, torch.float64, seed)
    alpha = 1.0 if solver == "pr" else 0.3
    expected = case.expected("relu", solver, alpha, tol, max_iter, per_sample, adjoint=False)
    found = case.found("relu", solver, alpha, tol, max_iter, per_sample, adjoint=False)
    # Where rounding alone keeps the residual from 0, counts may differ.
    if bool((expected.residual > 1e-13).all()):
        assert found.iterations.tolist() == expected.iterations.tolist()
    close(found.z, expected.z, 1e-10, "z")
    close(found.out, expected.out, 1e-10, "out")


def test_state_beyond_shared_memory() -> None:
    """A sample of 16000 doubles does not fit a block's shared memory."""
    n = 16000
    bias = torch.linspace(-1, 1, n, dtype=torch.float64).repeat(2, 1)
    emulated.configure(0, 4)
    out, z, iterations, residual = emulated.ops.mon_splitting(
        bias, None, None, None, [], [], [1, 1, 1], 0.5, "relu", 0.5, 1e-4, 50, False
    )
    expected = bias.clamp(min=0) * 2
    assert float((out - expected).abs().max()) < 1e-3
    assert 1 < int(iterations) < 50
    assert float(residual) <= 1e-4
    assert torch.equal(out, torch.relu(0.5 * z + bias))


def test_same_bits_in_any_order() -> None:
    for n, density in ((87, 1.0), (140, 0.05), (130, 1.0), (365, 1.0)):
        case = Case(n, 9, density, torch.float32, 1)
        results = []
        for seed in (0, 1, 2):
            emulated.configure(seed, 4)
            results.append(case.found("relu", "fb", 0.3, 5e-3, 50, False, adjoint=False))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [6, 131, 365])
def test_what_is_not_finite_ends_the_solve(n: int, value: float, per_sample: bool) -> None:
    case = Case(n, 3, 1.0, torch.float32, 0)
    case.bias[1, 0] = value
    emulated.configure(1, 4)
    found = case.found("relu", "fb", 0.3, 1e-3, 50, per_sample, adjoint=False)
    expected = case.expected("relu", "fb", 0.3, 1e-3, 50, per_sample, adjoint=False)
    assert found.iterations.tolist() == expected.iterations.tolist()
    at = found.residual[1] if per_sample else found.residual
    assert not bool(at.isfinite())


@pytest.mark.parametrize(("n", "batch"), [(0, 3), (4, 0), (0, 0)])
def test_nothing_to_solve(n: int, batch: int) -> None:
    for per_sample in (False, True):
        out, z, iterations, residual = emulated.ops.mon_splitting(
            torch.zeros(batch, n),
            None,
            torch.zeros(n, n),
            None,
            [],
            [],
            [1, 1, 1],
            0.0,
            "relu",
            1.0,
            1e-3,
            9,
            per_sample,
        )
        assert out.shape == z.shape == (batch, n)
        assert iterations.tolist() == ([1] * batch if per_sample else 1)
        assert residual.tolist() == ([0.0] * batch if per_sample else 0.0)


@pytest.mark.parametrize("what", ["row_ptr", "offset", "end"])
def test_bad_patterns_are_reported(what: str) -> None:
    case = Case(40, 3, 0.05, torch.float32, 0)
    assert not case.structure.merged
    assert case.structure.a is not None
    pattern = case.structure.a.pattern
    row_ptr, offset = pattern.row_ptr.clone(), pattern.offset.clone()
    if what == "row_ptr":
        row_ptr[3] = 10**12
    elif what == "end":
        row_ptr[-1] -= 1
    else:
        offset[2] = 4000
    case.structure.a = case.structure.a._replace(
        pattern=pattern._replace(row_ptr=row_ptr, offset=offset)
    )
    emulated.configure(0, 4)
    case.found("relu", "fb", 0.3, 1e-3, 5, False, adjoint=False)
    with pytest.raises(RuntimeError, match="an earlier call on a CUDA device met bad data"):
        case.found("relu", "fb", 0.3, 1e-3, 5, False, adjoint=False)


def test_bad_arguments_are_refused() -> None:
    good: list[object] = [torch.zeros(2, 3), None, torch.zeros(3, 3), None, [], [], [1, 1, 1]]
    good += [0.0, "relu", 1.0, 1e-3, 9, False]
    bad: list[tuple[int, object, str]] = [
        (0, torch.zeros(3), "bias: expected 2 dimensions"),
        (0, torch.zeros(2, 3, dtype=torch.bfloat16), "bias: expected float32 or float64"),
        (1, torch.zeros(2, 4), "slope: expected size 3"),
        (2, torch.zeros(3, 4), "matrix: expected size 3"),
        (3, torch.zeros(4, 3), "resolvent: expected size 3"),
        (3, torch.zeros(3, 3).double(), "resolvent: expected dtype"),
        (4, [torch.zeros(1)], "pair: expected"),
        (8, "gelu", "activation: expected"),
        (9, 0.0, "alpha: expected"),
        (11, 0, "max_iter: expected"),
    ]
    emulated.configure(0, 4)
    for at, value, message in bad:
        arguments = [*good[:at], value, *good[at + 1 :]]
        with pytest.raises(RuntimeError, match=f"mon_splitting: {message}"):
            emulated.ops.mon_splitting(*arguments)
