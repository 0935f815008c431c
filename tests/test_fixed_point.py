"""Anderson, Broyden and plain iteration against textbook loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastprune as fp
from deq_cells import EXACT, SOLVERS, Affine, Convolutions, Tanh, unrolled


def textbook_anderson(
    f: Any, x: Tensor, m: int, lam: float, max_iter: int, tol: float, beta: float = 1.0
) -> tuple[Tensor, int, float]:
    """Anderson acceleration sample by sample, its weights by elimination: no bordered system."""
    xs, fs = [x, f(x)], []
    fs = [f(x), f(f(x))]
    for k in range(2, max_iter):
        n = min(k, m)
        step = torch.empty_like(x)
        for sample in range(len(x)):
            last_x = torch.stack([a[sample].flatten() for a in xs[-n:]])
            last_f = torch.stack([a[sample].flatten() for a in fs[-n:]])
            g = last_f - last_x
            ones = g.new_ones(n, 1)
            a = torch.linalg.solve(g @ g.T + lam * torch.eye(n, dtype=g.dtype), ones)
            a = a / a.sum()
            step[sample] = (a.T @ (beta * last_f + (1 - beta) * last_x)).view(x[sample].shape)
        xs.append(step)
        fs.append(f(step))
        residual = float((fs[-1] - step).norm()) / (1e-5 + float(fs[-1].norm()))
        if residual < tol:
            break
    return xs[-1], k + 1, residual


def textbook_broyden(f: Any, x: Tensor, max_iter: int, tol: float) -> tuple[Tensor, int, float]:
    """Good Broyden with the whole Jacobian, for one sample."""
    x = x.flatten()
    shape = (1, len(x))
    b = -torch.eye(len(x), dtype=x.dtype)  # the Jacobian of f(x) - x
    g = f(x.view(shape)).flatten() - x
    count, residual = 1, 1.0
    while residual >= tol and count < max_iter:
        count += 1
        step = torch.linalg.solve(b, -g)
        x = x + step
        fx = f(x.view(shape)).flatten()
        new = fx - x
        residual = float(new.norm()) / (1e-5 + float(fx.norm()))
        b = b + torch.outer(new - g - b @ step, step) / (step @ step)
        g = new
    return x.view(shape), count, residual


# -- Solvers --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    solver=st.sampled_from(SOLVERS),
    batch=st.integers(1, 5),
    n=st.integers(1, 12),
    radius=st.floats(0.0, 0.9),
    seed=st.integers(0, 2**31),
)
def test_affine_equilibria_are_solutions_of_a_linear_system(
    solver: Any, batch: int, n: int, radius: float, seed: int
) -> None:
    torch.manual_seed(seed)
    cell = Affine(n, radius).double()
    x = torch.randn(batch, n, dtype=torch.float64)
    layer = fp.nn.DEQ(cell, solver=solver, **EXACT)
    out = layer(x)
    assert layer.info is not None
    assert layer.info.converged
    assert layer.info.residual < 1e-13
    torch.testing.assert_close(out, cell.solution(x), rtol=1e-10, atol=1e-10)
    v = torch.randn_like(out)
    out.backward(v)
    exact = cell.m.detach().clone().requires_grad_()
    other = copy.deepcopy(cell)
    other.m = nn.Parameter(exact.detach())
    other.solution(x).backward(v)
    torch.testing.assert_close(cell.m.grad, other.m.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("beta", [1.0, 0.8])
@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_anderson_is_the_textbook_one(m: int, beta: float, tol: float) -> None:
    torch.manual_seed(m)
    cell = Convolutions().double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    layer = fp.nn.DEQ(cell, tol=tol, max_iter=60, memory=m, beta=beta)
    with torch.no_grad():
        out = layer(x)
        z, count, residual = textbook_anderson(
            lambda z: cell(z, x), torch.zeros_like(x), m, 1e-4, 60, tol, beta
        )
        assert layer.info is not None
        assert layer.info.iterations == count < 60
        assert layer.info.residual == pytest.approx(residual, rel=1e-6)
        torch.testing.assert_close(out, cell(z, x), rtol=1e-9, atol=1e-9)


def test_anderson_by_hand() -> None:
    """f(z) = z / 2 + 1 from 0: 0, 1, then the combination whose residuals cancel, which is 2."""

    class Half(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return z / 2 + x

    layer = fp.nn.DEQ(Half(), regularization=0.0, tol=1e-12)
    assert layer(torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(2.0, abs=1e-12)
    assert layer.info is not None
    assert layer.info.iterations == 3


def test_broyden_is_the_textbook_one() -> None:
    torch.manual_seed(1)
    cell = Tanh(7).double()
    x = torch.randn(3, 7, dtype=torch.float64)
    layer = fp.nn.DEQ(cell, solver="broyden", tol=1e-10, max_iter=40)
    for sample in x.split(1):
        with torch.no_grad():
            out = layer(sample)
            z, count, residual = textbook_broyden(
                lambda z, s=sample: cell(z, s), torch.zeros_like(sample), 40, 1e-10
            )
            assert layer.info is not None
            assert layer.info.iterations == count < 40
            assert layer.info.residual == pytest.approx(residual, rel=1e-3)
            torch.testing.assert_close(out, cell(z, sample), rtol=1e-9, atol=1e-9)


def test_broyden_ends_an_affine_problem_within_twice_its_size() -> None:
    """Gay 1979: 2 n steps, whatever the map; plain iteration would diverge here."""
    torch.manual_seed(0)
    cell = Affine(4, 3.0).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    layer = fp.nn.DEQ(cell, solver="broyden", tol=1e-9, max_iter=11)
    torch.testing.assert_close(layer(x), cell.solution(x), rtol=1e-6, atol=1e-6)
    assert layer.info is not None
    assert layer.info.converged


def test_broyden_with_little_memory_and_best_iterate() -> None:
    torch.manual_seed(3)
    cell = Tanh(20).double()
    x = torch.randn(4, 20, dtype=torch.float64)
    layer = fp.nn.DEQ(cell, solver="broyden", tol=1e-11, max_iter=60, memory=2)
    exact = unrolled(layer, 200)(x)
    torch.testing.assert_close(layer(x), exact, rtol=1e-9, atol=1e-9)
    layer = fp.nn.DEQ(Affine(20, 5.0).double(), solver="broyden", tol=0.0, max_iter=12, memory=2)
    with pytest.warns(UserWarning, match="did not converge"):
        layer(x)
    short = fp.nn.DEQ(layer.cell, solver="broyden", tol=0.0, max_iter=4, memory=2)
    with pytest.warns(UserWarning, match="did not converge"):
        short(x)
    assert layer.info is not None
    assert short.info is not None
    assert layer.info.residual <= short.info.residual


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float32_and_half_precision(solver: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cell = Tanh(9).double()
    x = torch.randn(5, 9, dtype=torch.float64).to(dtype)
    exact = unrolled(fp.nn.DEQ(cell), 200)(x.double()).detach()
    layer = fp.nn.DEQ(copy.deepcopy(cell).to(dtype), solver=solver, max_iter=40, tol=1e-2)
    with torch.no_grad():
        out = layer(x)
    assert out.dtype == dtype
    assert layer.info is not None
    assert layer.info.converged
    # A contraction of factor 0.6: the distance is at most 0.6 / 0.4 of the last change.
    assert float((out - exact).norm()) < (1.5 * 1e-2 + 16 * torch.finfo(dtype).eps) * float(
        exact.norm()
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_that_are_done_do_not_disturb_the_others(solver: Any) -> None:
    """A sample of zeros is its own equilibrium from the start: its systems are singular."""

    class Odd(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.9 * z + x)

    x = torch.tensor([[0.0, 0.0], [1.0, -0.5]], dtype=torch.float64)
    layer = fp.nn.DEQ(Odd(), solver=solver, tol=1e-12, max_iter=300, regularization=0.0)
    out = layer(x)
    assert torch.equal(out[0], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(out[1], torch.tanh(0.9 * out[1] + x[1]), rtol=1e-10, atol=0)


def test_empty_batches_and_scalars_per_sample() -> None:
    for solver in SOLVERS:
        layer = fp.nn.DEQ(Tanh(3), solver=solver)
        assert layer(torch.zeros(0, 3)).shape == (0, 3)
        assert layer.info is not None
        assert layer.info.converged
        layer(torch.zeros(0, 3)).sum().backward()

    class Scalar(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return z.cos() * x

    layer = fp.nn.DEQ(Scalar(), tol=1e-6, max_iter=60, solver="broyden")
    assert layer(torch.ones(4)).tolist() == pytest.approx([0.739085] * 4, abs=1e-5)
