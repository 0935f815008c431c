"""The DEQ layer: gradients of both orders, by implicit differentiation."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastprune as fp
from deq_cells import EXACT, SOLVERS, Convolutions, Tanh, unrolled
from fastprune.nn import implicit


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
