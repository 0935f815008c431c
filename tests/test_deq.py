"""Equilibrium layers of any cell: solvers, derivatives of both orders, and use as a module."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import fastprune as fp
from deq_cells import EXACT, SOLVERS, Affine, Convolutions, Tanh, unrolled
from fastprune.nn import fixed_point, implicit
from fastprune.swapping import mask_layers_


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


# -- Derivatives ----------------------------------------------------------------------------------


def leaves(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["tanh", "convolutions"])
def test_gradients_of_both_orders(solver: Any, kind: str) -> None:
    torch.manual_seed(0)
    cell = Tanh(4).double() if kind == "tanh" else Convolutions(2, 4).double()
    shape = (2, 4) if kind == "tanh" else (1, 2, 3, 3)
    layer = fp.nn.DEQ(cell, solver=solver, **EXACT)
    state = leaves(layer)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Any:
        return functional_call(layer, dict(zip(state, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *state.values()), rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(run, (x, *state.values()), rtol=1e-6, atol=1e-8)
    assert layer.backward_info is not None
    assert layer.backward_info.converged


def hessian_product(model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """g and H g of the cross entropy, over all parameters."""
    wanted = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(first, wanted, [g.detach() for g in first])
    return [g.detach() for g in first], list(second)


@pytest.mark.parametrize("solver", SOLVERS)
def test_against_the_unrolled_iteration(solver: Any) -> None:
    torch.manual_seed(2)
    layer = fp.nn.DEQ(Convolutions(), solver=solver, **EXACT)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), layer, nn.Flatten(), nn.Linear(100, 3)
    ).double()
    x, y = torch.randn(3, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 2, 1])
    ours, oracle = hessian_product(model, x, y), hessian_product(unrolled(model, 150), x, y)
    for part, expected in zip(ours, oracle, strict=True):
        for a, b in zip(part, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_scale_of_a_gradient_does_not_matter() -> None:
    """The residual's 1e-5 must not make a small gradient pass for converged."""
    torch.manual_seed(0)
    layer = fp.nn.DEQ(Tanh(6).double(), tol=1e-6, max_iter=80)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    for power in (-40, 40):
        v = torch.full_like(out, 2.0**power)
        (small,) = torch.autograd.grad(out, x, v, retain_graph=True)
        (usual,) = torch.autograd.grad(out, x, torch.ones_like(v), retain_graph=True)
        torch.testing.assert_close(small * 2.0**-power, usual, rtol=1e-13, atol=0)
    (none,) = torch.autograd.grad(out, x, torch.zeros_like(out), retain_graph=True)
    assert not none.any()


def test_parameters_computed_from_others_and_shared_ones() -> None:
    """No path is lost or counted twice: x and the weights of the cell come from one leaf."""
    torch.manual_seed(0)
    cell = Tanh(5).double()
    layer = fp.nn.DEQ(cell, **EXACT)
    bias = cell.linear.bias.detach()
    base = cell.linear.weight.detach().clone().requires_grad_()

    def outcome(layer: nn.Module, base: Tensor) -> Tensor:
        weight = 0.5 * base + 0.1 * base.T
        state = {"cell.linear.weight": weight, "cell.linear.bias": bias + 0.1 * base[0]}
        out = functional_call(layer, state, (base[:2].sin() + weight[:2],))
        return out.square().sum()

    results = []
    for module in (layer, unrolled(layer, 150)):
        (first,) = torch.autograd.grad(outcome(module, base), base, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), base)
        results.append((first.detach(), second))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)

    class Tied(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer.cell.linear(x))  # type: ignore[operator, union-attr]

    x = torch.randn(2, 5, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(Tied(layer)(x).sum(), list(layer.parameters())),
        torch.autograd.grad(Tied(other := unrolled(layer, 150))(x).sum(), list(other.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_more_arguments_a_start_and_another_shape() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(3, 6)
            with torch.no_grad():
                self.inner.weight.mul_(0.5)

        def forward(self, z: Tensor, x: Tensor, scale: Tensor, more: dict[str, Tensor]) -> Tensor:
            return torch.tanh(self.inner(z) * scale + self.outer(x) + more["shift"])

    torch.manual_seed(0)
    layer = fp.nn.DEQ(Wide().double(), z_shape=(6,), **EXACT)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(6, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert layer(x, scale, {"shift": shift}).shape == (2, 6)

    def run(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return layer(x, scale, {"shift": shift})

    assert torch.autograd.gradcheck(run, (x, scale, shift))
    assert torch.autograd.gradgradcheck(run, (x, scale, shift))
    out = layer(x, scale, {"shift": shift})
    assert layer.info is not None
    cold = layer.info.iterations
    torch.testing.assert_close(layer(x, scale, {"shift": shift}, z0=out), out)
    assert layer.info.iterations < cold
    with pytest.raises(ValueError, match=r"z0: expected .* shape \(2, 6\), got .*\(2, 3\)"):
        layer(x, scale, {"shift": shift}, z0=x)


def test_only_what_is_asked_for_gets_gradients() -> None:
    layer = fp.nn.DEQ(Tanh(3)).requires_grad_(False)
    assert not layer(torch.ones(2, 3)).requires_grad
    x = torch.ones(2, 3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())
    layer.requires_grad_(True)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()


def test_a_cell_that_ignores_its_state_or_its_input() -> None:
    class NoState(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x.sin()

    class NoInput(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return z / 2

    for solver in SOLVERS:
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        layer = fp.nn.DEQ(NoState(), solver=solver, **EXACT)
        assert torch.equal(layer(x), x.sin())
        assert layer.info is not None
        # Found at the second evaluation; Anderson looks from the third on.
        assert layer.info.iterations == (3 if solver == "anderson" else 2)
        assert torch.autograd.gradcheck(layer, (x,))
        assert torch.autograd.gradgradcheck(layer, (x,))
    layer = fp.nn.DEQ(NoInput())
    (found,) = torch.autograd.grad(layer(x).sum(), x, allow_unused=True)
    assert found is None


def test_tensors_from_nowhere_are_refused() -> None:
    secret = torch.ones(3, requires_grad=True)

    class Captures(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * z + x + 2 * secret)

    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"cell: .*neither its parameter nor an argument.*\(3,\)"):
        fp.nn.DEQ(Captures())(x)
    with torch.no_grad():
        fp.nn.DEQ(Captures())(x)


def test_backward_twice_and_graphs_that_are_freed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), fp.nn.DEQ(Tanh(4)), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    gradients = torch.autograd.grad(
        model(x).square().sum(), list(model.parameters()), create_graph=True
    )
    sum(g.square().sum() for g in gradients).backward()
    # Stopping half way must not keep anything alive either.
    part = torch.autograd.grad(gradients[-1].sum(), gradients[-1], allow_unused=True)
    del loss, gradients, part
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is implicit._Applied]


def test_third_derivatives_say_so() -> None:
    layer = fp.nn.DEQ(Tanh(3).double(), **EXACT)
    x = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="DEQ: third derivatives are not supported"):
        torch.autograd.grad(second.sum(), x)


def test_results_may_be_changed_in_place() -> None:
    torch.manual_seed(0)
    layer = fp.nn.DEQ(Tanh(4))
    x = torch.randn(2, 4)
    layer(x).relu_().sum().backward()
    in_place = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).relu().sum().backward()
    for p, g in zip(layer.parameters(), in_place, strict=True):
        assert torch.equal(p.grad, g)


def test_memory_does_not_grow_with_iterations() -> None:
    saved: list[int] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    counts = []
    x = torch.randn(2, 5)
    for max_iter in (3, 30):
        layer = fp.nn.DEQ(Tanh(5), tol=0.0, max_iter=max_iter, on_failure="ignore")
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            layer(x)
        counts.append(sum(saved))
    assert counts[0] == counts[1] > 0


# -- What is said about a solve -------------------------------------------------------------------


def test_failures_are_never_silent() -> None:
    x = torch.ones(2, 3)
    slow = Affine(3, 0.99)
    layer = fp.nn.DEQ(slow, solver="iteration", tol=1e-6, max_iter=4)
    pattern = r"DEQ: equilibrium \(iteration\): did not converge: .* after 4 iterations, tol 1e-06"
    with pytest.warns(UserWarning, match=pattern):
        layer(x)
    assert layer.info is not None
    assert (layer.info.converged, layer.info.iterations) == (False, 4)
    layer.on_failure = "error"
    with pytest.raises(RuntimeError, match=pattern):
        layer(x)
    layer.on_failure = "ignore"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    layer = fp.nn.DEQ(slow, solver="broyden", backward_solver="iteration", backward_max_iter=2)
    with pytest.warns(UserWarning, match=r"adjoint equation \(iteration\).* after 2 iterations"):
        layer(x).sum().backward()
    assert layer.backward_info is not None
    assert not layer.backward_info.converged


@pytest.mark.parametrize("solver", SOLVERS)
def test_divergence_is_an_error(solver: Any) -> None:
    class Explodes(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return (z * 100 + x).exp()

    x = torch.ones(2, 3)
    layer = fp.nn.DEQ(Explodes(), solver=solver, max_iter=30)
    with pytest.raises(FloatingPointError, match=r"DEQ: equilibrium .*not finite"):
        layer(x)
    assert layer.info is None
    layer.on_failure = "ignore"
    layer(x)
    assert layer.info is not None
    assert not layer.info.converged
    assert layer.info.iterations < 30


def test_gradients_that_are_not_finite_are_handed_on() -> None:
    """Loss scaling looks for them after the backward pass."""
    layer = fp.nn.DEQ(Tanh(3))
    x = torch.ones(2, 3, requires_grad=True)
    (found,) = torch.autograd.grad((layer(x) * torch.inf).sum(), x)
    assert found.isnan().all()


def test_info_is_of_the_last_pass() -> None:
    layer = fp.nn.DEQ(Tanh(3))
    assert layer.info is None
    assert layer.backward_info is None
    out = layer(torch.ones(2, 3))
    assert layer.backward_info is None
    out.sum().backward()
    assert layer.backward_info is not None
    assert layer.backward_info.converged
    assert "converged=True" in repr(layer.info)
    other = pickle.loads(pickle.dumps(layer.info))
    assert other.iterations == layer.info.iterations  # type: ignore[union-attr]
    layer(torch.ones(2, 3))
    assert layer.backward_info is None


# -- As a module ----------------------------------------------------------------------------------


def test_state_copies_and_modes() -> None:
    torch.manual_seed(0)
    layer = fp.nn.DEQ(Tanh(4), solver="broyden", tol=1e-4, z_shape=[4])
    assert list(layer.state_dict()) == ["cell.linear.weight", "cell.linear.bias"]
    x = torch.randn(2, 4)
    expected = layer(x)
    other = fp.nn.DEQ(Tanh(4), solver="broyden", tol=1e-4)
    other.load_state_dict(layer.state_dict(), strict=True)
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), expected)
    assert layer.eval().cell.training is False
    assert "solver='broyden'" in repr(layer)
    assert layer.double()(x.double()).dtype == torch.float64


def test_batch_norm_counts_every_call_of_the_cell() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.2 * self.norm(self.linear(z)) + x)

    torch.manual_seed(0)
    layer = fp.nn.DEQ(Normed())
    x = torch.randn(8, 4)
    layer(x)
    assert layer.info is not None
    assert layer.cell.norm.num_batches_tracked == layer.info.iterations + 1  # type: ignore[union-attr]
    layer.double().eval()
    before = layer.cell.norm.num_batches_tracked.clone()  # type: ignore[union-attr]
    exact = fp.nn.DEQ(layer.cell, **EXACT).eval()
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(exact, (x,))
    exact.train()
    small = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exact, (small,))  # batch statistics mix the samples
    assert before is not None


def test_autocast_leaves_no_gradient_out() -> None:
    """A weight's cast that autocast keeps from the solve, which records nothing, has no history."""
    torch.manual_seed(0)
    layer = fp.nn.DEQ(Tanh(8), max_iter=40)
    x = torch.randn(4, 8)
    layer(x).sum().backward()
    plain = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    for p, g in zip(layer.parameters(), plain, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g, rtol=0.05, atol=0.1)


def test_masked_layers_in_the_cell() -> None:
    torch.manual_seed(0)
    layer = fp.nn.DEQ(Convolutions(), tol=1e-6, max_iter=60)
    masks = {
        f"cell.{n}.weight": torch.rand_like(layer.cell.get_parameter(f"{n}.weight")) < 0.3
        for n in ("conv1", "conv2")
    }
    dense = copy.deepcopy(layer)
    fp.Masks(masks).apply_(dense)
    mask_layers_(layer, masks)
    x = torch.randn(3, 4, 6, 6)
    out, expected = layer(x), dense(x)
    assert isinstance(layer.cell.conv1, fp.nn.MaskedConv2d)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    v = torch.randn_like(out)
    out.backward(v)
    expected.backward(v)
    for name, p in dense.named_parameters():
        grad = p.grad * masks[name] if name in masks else p.grad
        torch.testing.assert_close(layer.get_parameter(name).grad, grad, rtol=1e-3, atol=1e-4)
    (first,) = torch.autograd.grad(layer(x).sum(), layer.cell.norm.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"DEQ: .* differentiated only once"):
        first.sum().backward()


def test_accelerated_models_hold_the_same_layer() -> None:
    torch.manual_seed(0)
    model = fp.models.create("resnet-deq", in_shape=(1, 8, 8)).eval()
    x = torch.randn(2, 1, 8, 8)
    masks = fp.prune(model, "magnitude", 0.9, include="deq.cell")
    assert list(masks) == ["deq.cell.conv1.weight", "deq.cell.conv2.weight"]
    fast, report = fp.accelerate(model, masks, x, min_time=0.001)
    masks.apply_(model)
    with torch.no_grad():
        # Two solves to tol stop at different rounding errors, at worst one step apart.
        torch.testing.assert_close(fast(x), model(x), rtol=0.05, atol=0.05)
    assert len(report.layers) == 2
    assert isinstance(fast.get_submodule("deq"), fp.nn.DEQ)


def test_under_the_compiler() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), fp.nn.DEQ(Tanh(4)), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    expected = model(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    out = compiled(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, g)
    with pytest.raises(RuntimeError, match=r"DEQ: torch\.export cannot record"):
        torch.export.export(model, (x,), strict=False)


def test_a_leaf_for_torch_fx_and_one_step_on_meta() -> None:
    model = nn.Sequential(nn.Linear(4, 4), fp.nn.DEQ(Tanh(4)))
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 4)
    assert torch.equal(traced(x), model(x))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    assert model.to("meta")(x.to("meta")).shape == (2, 4)
    assert model[1].info is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"solver": "newton"}, "solver: expected one of 'anderson', 'broyden'.*'newton'"),
        ({"tol": -1.0}, "tol: expected a finite number >= 0, got -1.0"),
        ({"tol": float("nan")}, "tol: expected"),
        ({"max_iter": 2}, "max_iter: expected a whole number >= 3, got 2"),
        ({"max_iter": 1.5}, "max_iter: expected a whole number"),
        ({"memory": 0}, "memory: expected a whole number >= 1, got 0"),
        ({"regularization": -1.0}, "regularization: expected"),
        ({"beta": 0.0}, "beta: expected a positive finite number, got 0.0"),
        ({"backward_solver": "x"}, "backward_solver: expected one of"),
        ({"backward_tol": -1.0}, "backward_tol: expected"),
        ({"backward_max_iter": 0}, "backward_max_iter: expected"),
        ({"on_failure": "panic"}, "on_failure: expected 'warn', 'error' or 'ignore', got 'panic'"),
        ({"z_shape": (-1,)}, "z_shape: expected a whole number >= 0"),
    ],
)
def test_bad_arguments(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.nn.DEQ(Tanh(3), **kwargs)


def test_bad_inputs_and_cells() -> None:
    with pytest.raises(TypeError, match=r"cell: expected a torch\.nn\.Module, got function"):
        fp.nn.DEQ(lambda z, x: z)  # type: ignore[arg-type]
    layer = fp.nn.DEQ(Tanh(3))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        layer([1.0])
    with pytest.raises(ValueError, match=r"x: expected a floating-point tensor .*int64"):
        layer(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: .*shape \(\)"):
        layer(torch.tensor(1.0))
    layer.max_iter = 1
    with pytest.raises(ValueError, match="max_iter"):
        layer(torch.ones(2, 3))

    class Grows(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.cat([z, x], 1)

    class InPlace(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            z += x
            return z

    with pytest.raises(ValueError, match=r"cell: .*state's shape \(2, 3\), got \(2, 6\)"):
        fp.nn.DEQ(Grows())(torch.ones(2, 3))
    for solver in SOLVERS:
        with pytest.raises(ValueError, match="cell: it changed its state z in place"):
            fp.nn.DEQ(InPlace(), solver=solver)(torch.ones(2, 3))


def test_settings_are_one_object() -> None:
    found = fixed_point.solve(
        lambda z: z / 2 + 1,
        torch.zeros(1, 1),
        fixed_point.Settings("iteration", 1e-3, 50, 5, 0.0, 1.0),
    )
    assert found.residual < 1e-3
    assert found.iterations == 10  # 2^-10 / 2 < 1e-3 <= 2^-9 / 2
