"""Equilibrium layers of any cell: solvers, derivatives of both orders, and use as a module."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from deq_cells import EXACT, SOLVERS, Affine, Convolutions, Tanh
from fastprune.nn import fixed_point
from fastprune.swapping import mask_layers_


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
