"""mon_splitting: equilibria and adjoint equations against the textbook loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from fastprune.ops.mon_operator import LinearStructure
from fastprune.reference import mon_splitting as plain
from mon_linear import ACTIVATIONS, BATCHES, SIZES, assert_same, matrices, operators, safe_settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("density", [None, 0.2, 0.03], ids=str)
def test_solves_agree_with_the_textbook_loop(
    dtype: torch.dtype, density: float | None, isa: str
) -> None:
    g = torch.Generator().manual_seed(1)
    for case in range(40):
        n = SIZES[case % len(SIZES)]
        batch = BATCHES[int(torch.randint(len(BATCHES), (), generator=g))]
        activation = ACTIVATIONS[case % 4]
        m = 0.5 + float(torch.rand((), generator=g))
        bias = torch.randn(batch, n, generator=g, dtype=dtype)
        own, textbook = operators(n, m, matrices(n, g, density), bias)
        for solver in ("fb", "pr"):
            s = safe_settings(own, activation, solver, per_sample=case % 3 == 0)
            what = f"seed 1 case {case}: {n} {batch} {s}"
            wanted = plain.solve(textbook, bias.double(), *s)
            assert_same(own.solve(bias, s), wanted, s, what)
            slope = plain.slope(wanted.out, activation).to(dtype)
            grad = torch.randn(batch, n, generator=g, dtype=dtype)
            for transposed in (True, False):
                wanted = plain.adjoint(
                    textbook, grad.double(), slope.double(), *s[1:], transposed=transposed
                )
                assert_same(own.adjoint(grad, slope, s, transposed), wanted, s, what + " adjoint")


@pytest.mark.parametrize("n", [97, 145, 200])
def test_matrices_wider_than_one_depth(n: int, isa: str) -> None:
    g = torch.Generator().manual_seed(n)
    for dtype, batch in ((torch.float32, 70), (torch.float64, 33), (torch.float32, 5)):
        bias = torch.randn(batch, n, generator=g, dtype=dtype)
        own, textbook = operators(n, 1.0, matrices(n, g, None), bias)
        for solver in ("fb", "pr"):
            s = safe_settings(own, "relu", solver, per_sample=False)
            wanted = plain.solve(textbook, bias.double(), *s)
            assert_same(own.solve(bias, s), wanted, s, f"{n} {dtype} {batch}")


def test_every_form_of_w_is_taken() -> None:
    """Dense, A and B apart, and W itself sparse, each where it has the fewest operations."""
    g = torch.Generator().manual_seed(5)
    n = 200

    def structure(density: float, has_b: bool = True) -> LinearStructure:
        a = torch.rand(n, n, generator=g) < density
        b = torch.rand(n, n, generator=g) < density if has_b else None
        return LinearStructure(n, True, has_b, a, b)

    assert structure(0.5).dense
    pair = structure(0.05)
    assert not pair.dense
    assert not pair.merged
    assert pair.a is not None
    assert pair.k is not None
    assert structure(0.002).merged
    assert LinearStructure(n, True, True, None, None).dense
    only_b = LinearStructure(n, False, True, None, torch.rand(n, n, generator=g) < 0.05)
    assert only_b.a is None
    assert not only_b.dense
    nothing = LinearStructure(n, False, False, None, None)
    assert nothing.a is None
    assert nothing.k is None


@pytest.mark.parametrize("solver", ["fb", "pr"])
def test_reduced_parametrizations_and_empty_masks(solver: str) -> None:
    g = torch.Generator().manual_seed(6)
    n = 20
    bias = torch.randn(9, n, generator=g, dtype=torch.float64)
    A, B, a_mask, b_mask = matrices(n, g, 0.1)
    empty = torch.zeros(n, n, dtype=torch.bool)
    zero = torch.zeros(n, n, dtype=torch.float64)
    for parts in (
        [A, None, a_mask, None],
        [None, B, None, b_mask],
        [None, None, None, None],
        [zero, zero, empty, empty],
        [zero, B, empty, b_mask],
    ):
        for m in (1.0, 0.4):
            own, textbook = operators(n, m, parts, bias)
            s = safe_settings(own, "relu", solver, per_sample=False, tol=1e-9)
            assert_same(own.solve(bias, s), plain.solve(textbook, bias, *s), s, f"{m}")


@settings(max_examples=40)
@given(
    n=st.integers(1, 24),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**20),
    activation=st.sampled_from(ACTIVATIONS),
    solver=st.sampled_from(["fb", "pr"]),
    m=st.floats(0.3, 3.0),
)
def test_fixed_points_solve_the_equation(
    n: int, batch: int, seed: int, activation: str, solver: str, m: float
) -> None:
    """Against Newton's method on z - sigma(W z + b) = 0: within 10 tol / m."""
    g = torch.Generator().manual_seed(seed)
    A, B, _, _ = matrices(n, g, None)
    assert A is not None
    assert B is not None
    bias = torch.randn(batch, n, generator=g, dtype=torch.float64)
    tol = 1e-7
    z = fp.mon_splitting(
        bias, A, B, m=m, activation=activation, solver=solver, tol=tol, max_iter=20000
    ).z
    w = plain.linear_matrix(A, B, m, n, bias)
    exact = z.clone()
    eye = torch.eye(n, dtype=torch.float64)
    for _ in range(20):
        out = plain.ACTIVATIONS[activation](exact @ w.t() + bias)
        jacobian = eye - plain.slope(out, activation).unsqueeze(-1) * w
        exact = exact - torch.linalg.solve(jacobian, exact - out)
    assert (plain.ACTIVATIONS[activation](exact @ w.t() + bias) - exact).abs().max() < 1e-12
    assert (z - exact).norm() <= 10 * tol / min(m, 1.0) * (1.0 + exact.norm())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("solver", ["fb", "pr"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str, solver: str, masked: bool) -> None:
    g = torch.Generator().manual_seed(8)
    n = 4
    A, B, a_mask, b_mask = matrices(n, g, 0.6 if masked else None)
    bias = torch.randn(3, n, generator=g, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (bias, A, B) if t is not None]

    def solve(bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return fp.mon_splitting(
            bias,
            A,
            B,
            A_mask=a_mask,
            B_mask=b_mask,
            m=0.8,
            alpha=0.3 if solver == "fb" else 0.6,
            activation=activation,
            solver=solver,
            tol=1e-14,
            max_iter=3000,
            on_failure="ignore",
        ).z

    assert torch.autograd.gradcheck(solve, inputs)
    assert torch.autograd.gradgradcheck(solve, inputs)


def test_sampled_gradients_are_those_of_the_dense_formula() -> None:
    g = torch.Generator().manual_seed(9)
    n = 150
    A, B, a_mask, b_mask = matrices(n, g, 0.02)
    assert A is not None
    assert B is not None
    assert a_mask is not None
    assert b_mask is not None
    bias = torch.randn(8, n, generator=g, dtype=torch.float64)

    def grads(**masks: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (bias, A, B)]
        z = fp.mon_splitting(*leaves, tol=1e-12, max_iter=500, **masks).z
        return torch.autograd.grad(z.square().sum(), leaves)

    sparse, dense = grads(A_mask=a_mask, B_mask=b_mask), grads()
    torch.testing.assert_close(sparse[0], dense[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sparse[1], dense[1] * a_mask, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sparse[2], dense[2] * b_mask, rtol=1e-9, atol=1e-12)


def test_absent_weights_are_not_read() -> None:
    g = torch.Generator().manual_seed(10)
    n = 30
    A, B, a_mask, b_mask = matrices(n, g, 0.1)
    assert A is not None
    assert a_mask is not None
    bias = torch.randn(5, n, generator=g, dtype=torch.float64)
    wanted = fp.mon_splitting(bias, A, B, A_mask=a_mask, B_mask=b_mask).z
    poisoned = torch.where(a_mask, A, torch.nan)
    assert torch.equal(fp.mon_splitting(bias, poisoned, B, A_mask=a_mask, B_mask=b_mask).z, wanted)


@pytest.mark.parametrize("density", [None, 0.05], ids=str)
def test_same_bits_for_any_number_of_threads(density: float | None, threads: None) -> None:
    g = torch.Generator().manual_seed(11)
    for n, batch in ((87, 128), (40, 300)):
        bias = torch.randn(batch, n, generator=g)
        own, _ = operators(n, 1.0, matrices(n, g, density), bias)
        for solver in ("fb", "pr"):
            for per_sample in (False, True):
                s = safe_settings(own, "tanh", solver, per_sample, tol=1e-5)
                results = []
                for count in (1, 2, 3, 7):
                    torch.set_num_threads(count)
                    results.append(own.solve(bias, s))
                for other in results[1:]:
                    for a, b in zip(results[0], other, strict=True):
                        assert torch.equal(a, b)


def test_rows_past_the_batch_do_not_count(isa: str) -> None:
    """A tile's unused lanes hold sigma of something for most nonlinearities; no norm sees them."""
    g = torch.Generator().manual_seed(12)
    bias = torch.randn(3, 5, generator=g, dtype=torch.float64)
    own, textbook = operators(5, 1.0, matrices(5, g, None), bias)
    s = safe_settings(own, "sigmoid", "fb", per_sample=False)
    got, wanted = own.solve(bias, s), plain.solve(textbook, bias, *s)
    assert abs(float(got.residual - wanted.residual)) < 1e-14


def test_reports_of_solves() -> None:
    g = torch.Generator().manual_seed(13)
    A, B, _, _ = matrices(6, g, None)
    bias = torch.randn(4, 6, generator=g, dtype=torch.float64)
    found = fp.mon_splitting(bias, A, B).info
    assert found.converged is True
    assert isinstance(found.iterations, int)
    assert isinstance(found.residual, float)
    assert 0 < found.residual <= 1e-5
    with pytest.warns(UserWarning, match="did not converge: relative residual .* after 2 iter"):
        info = fp.mon_splitting(bias, A, B, max_iter=2).info
    assert info.converged is False
    assert info.iterations == 2
    with pytest.raises(RuntimeError, match="did not converge"):
        fp.mon_splitting(bias, A, B, max_iter=2, on_failure="error")
    each = fp.mon_splitting(bias, A, B, per_sample=True).info
    assert isinstance(each.iterations, Tensor)
    assert each.iterations.shape == (4,)
    assert bool(torch.as_tensor(each.converged).all())


@pytest.mark.parametrize("on_failure", ["warn", "error"])
def test_divergence_is_an_error(on_failure: Any) -> None:
    g = torch.Generator().manual_seed(14)
    A = torch.randn(6, 6, generator=g) * 30
    bias = torch.randn(4, 6, generator=g)
    with pytest.raises(FloatingPointError, match="diverged: not finite after"):
        fp.mon_splitting(bias, A, None, solver="fb", alpha=1.0, max_iter=500, on_failure=on_failure)
    info = fp.mon_splitting(
        bias, A, None, solver="fb", alpha=1.0, max_iter=500, on_failure="ignore"
    ).info
    assert info.converged is False
    assert int(info.iterations) < 500
    fp.mon_splitting(bias, A, None, solver="fb", max_iter=100000, tol=1e-3)  # the step found: safe


def test_nan_in_one_sample() -> None:
    g = torch.Generator().manual_seed(15)
    A, B, _, _ = matrices(6, g, None)
    bias = torch.randn(4, 6, generator=g, dtype=torch.float64)
    bias[2, 3] = torch.nan
    with pytest.raises(FloatingPointError):
        fp.mon_splitting(bias, A, B)
    found = fp.mon_splitting(bias, A, B, per_sample=True, on_failure="ignore")
    clean = torch.tensor([0, 1, 3])
    assert torch.as_tensor(found.info.converged).tolist() == [True, True, False, True]
    alone = fp.mon_splitting(bias[clean], A, B, per_sample=True).z
    assert torch.equal(found.z[clean], alone)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_solve(shape: tuple[int, int]) -> None:
    bias = torch.zeros(shape)
    A = torch.zeros(shape[1], shape[1])
    found = fp.mon_splitting(bias, A, A)
    assert found.z.shape == shape
    assert found.info.converged is True


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bias": torch.zeros(3)}, ValueError, "bias: expected 2 or 4 dimensions"),
    ({"bias": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "bias: expected float32"),
    ({"A": torch.zeros(4, 5)}, ValueError, r"A: expected shape \(4, 4\)"),
    ({"B": torch.zeros(4, 4, dtype=torch.float64)}, TypeError, "B: expected the dtype of bias"),
    ({"A_mask": torch.zeros(4, 4)}, TypeError, "A_mask: expected a bool tensor"),
    ({"A_mask": torch.zeros(4, 3, dtype=torch.bool)}, ValueError, "A_mask: expected shape"),
    ({"A": None, "A_mask": torch.zeros(4, 4, dtype=torch.bool)}, ValueError, "A_mask: there is no"),
    ({"m": 0.0}, ValueError, "m: expected a positive"),
    ({"alpha": -1.0}, ValueError, "alpha: expected a positive"),
    ({"tol": math.nan}, ValueError, "tol: expected"),
    ({"max_iter": 0}, ValueError, "max_iter: expected a positive"),
    ({"solver": "newton"}, ValueError, "solver: expected"),
    ({"activation": "gelu"}, ValueError, "activation: expected"),
    ({"on_failure": "cry"}, ValueError, "on_failure: expected"),
    ({"g": torch.ones(())}, ValueError, "g: only convolutions"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[t for _, _, t in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given_ = {"bias": torch.zeros(3, 4), "A": torch.zeros(4, 4), "B": torch.zeros(4, 4)} | change
    with pytest.raises(error, match=text):
        fp.mon_splitting(**given_)


def test_bad_input_of_the_op() -> None:
    op = torch.ops.fastprune.mon_splitting.default
    bias = torch.zeros(3, 4)
    packed = torch.ops.fastprune.mon_pack(torch.zeros(4, 4))
    rest = [[], [], [1, 1, 1], 0.0, "relu", 1.0, 1e-3, 10, False]
    op(bias, None, packed, None, *rest)
    with pytest.raises(RuntimeError, match="matrix: expected size"):
        op(bias, None, packed[:-1], None, *rest)
    with pytest.raises(RuntimeError, match="resolvent: expected dtype"):
        op(bias, None, packed, packed.double(), *rest)
    with pytest.raises(RuntimeError, match="slope: expected size 3"):
        op(bias, torch.zeros(2, 4), packed, None, *rest)
    with pytest.raises(RuntimeError, match="pair: expected no or 6 tensors"):
        op(bias, None, None, None, [packed], *rest[1:])
    with pytest.raises(RuntimeError, match="activation: expected"):
        op(bias, None, packed, None, *rest[:4], "gelu", *rest[5:])
    pattern = fp.pack(torch.ones(4, 4, dtype=torch.bool))
    single = [pattern.row_ptr, pattern.offset, torch.zeros(16)]
    block = [1, 1, pattern.block_depth]
    op(bias, None, None, None, [], single, block, *rest[3:])
    single[1] = torch.full_like(pattern.offset, 99)
    with pytest.raises(RuntimeError, match="offsets inside their block"):
        op(bias, None, None, None, [], single, block, *rest[3:])
    with pytest.raises(RuntimeError, match=r"single\[2\]: expected size 16"):
        op(bias, None, None, None, [], [*single[:2], torch.zeros(3)], block, *rest[3:])


def test_opcheck() -> None:
    g = torch.Generator().manual_seed(16)
    bias = torch.randn(3, 4, generator=g)
    A, B, _, _ = matrices(4, g, None)
    assert A is not None
    assert B is not None
    packed = torch.ops.fastprune.mon_pack(A.float())
    rest: list[Any] = [[], [], [1, 1, 1], 0.0, "relu", 1.0, 1e-3, 10]
    for per_sample in (False, True):
        torch.library.opcheck(
            torch.ops.fastprune.mon_splitting.default,
            (bias, None, packed, packed, *rest, per_sample),
        )
    torch.library.opcheck(torch.ops.fastprune.mon_pack.default, (A,))
    leaves = [t.float().requires_grad_() for t in (bias, A, B)]
    tail: list[Any] = [None, None, None, None, 1.0, 0, "tanh", "pr", None, 1e-5, 100, False, "warn"]
    torch.library.opcheck(torch.ops.fastprune.mon_equilibrium.default, (*leaves, *tail))
