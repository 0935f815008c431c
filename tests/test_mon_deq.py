"""The equilibrium layers: what users of torch do with layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastprune.nn import MonDEQConv2d, MonDEQLinear
from fastprune.reference import mon_splitting as plain

Layer = MonDEQLinear | MonDEQConv2d


def linear(**options: Any) -> MonDEQLinear:
    torch.manual_seed(0)
    return MonDEQLinear(5, 7, **options)


def conv(**options: Any) -> MonDEQConv2d:
    torch.manual_seed(0)
    return MonDEQConv2d(2, 3, **options)


def image(layer: Layer, batch: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(1)
    shape = (batch, 5) if isinstance(layer, MonDEQLinear) else (batch, 2, 6, 5)
    return torch.randn(shape, generator=g, dtype=layer.U.weight.dtype)


MAKERS = [linear, conv]
makers = pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)


def random_masks(layer: Layer, density: float = 0.5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    masks = {}
    for name in ("A", "B"):
        matrix = getattr(layer, name)
        if matrix is not None:
            masks[name] = torch.rand(matrix.shape, generator=g) < density
    return masks


def test_names_that_stay() -> None:
    assert list(dict(linear().named_parameters())) == ["A", "B", "U.weight", "U.bias"]
    assert list(dict(conv().named_parameters())) == ["A", "B", "g", "h", "U.weight", "U.bias"]
    assert list(linear(use_A=False).state_dict()) == ["B", "U.weight", "U.bias"]
    assert "A" not in conv(use_A=False, use_B=False).state_dict()
    layer = conv()
    assert layer.g.item() == layer.h.item() == 1.0
    assert layer(image(layer)).shape == (3, 3, 8, 7)


@pytest.mark.parametrize("solver", ["fb", "pr"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("parts", ["AB", "A", "B", ""])
@makers
def test_forward_and_gradients_are_the_textbooks(
    make: Callable[..., Layer], parts: str, activation: str, solver: str
) -> None:
    """Same counts, and gradients as the reference's hook gives them, at a loose tolerance too."""
    layer = make(
        use_A="A" in parts,
        use_B="B" in parts,
        activation=activation,
        solver=solver,
        m=0.7,
        alpha=0.2,
        tol=1e-3,
        max_iter=200,
        dtype=torch.float64,
    )
    x = image(layer).requires_grad_()
    z = layer(x)
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(3)).to(z)
    names = [n for n, _ in layer.named_parameters()]
    used = [n for n in names if not (n == "g" and "A" not in parts)]
    used = [n for n in used if not (n == "h" and "B" not in parts)]
    leaves = [x, *(layer.get_parameter(n) for n in used)]
    got = torch.autograd.grad(z, leaves, cotangent)

    operator, multiply = textbook(layer, z.shape)
    with torch.no_grad():
        bias = layer.U(x)
        solved = plain.solve(operator, bias, activation, solver, 0.2, 1e-3, 200)
        slope = plain.slope(solved.out, activation)
        u = plain.adjoint(operator, cotangent, slope, solver, 0.2, 1e-3, 200)
    assert layer.info is not None
    assert layer.backward_info is not None
    assert layer.info.iterations == int(solved.iterations)
    assert layer.backward_info.iterations == int(u.iterations)
    torch.testing.assert_close(z, solved.out, rtol=1e-10, atol=1e-12)
    # One application of the layer to the iterate, whose cotangent is u.
    applied = multiply(solved.z) + layer.U(x)
    wanted = torch.autograd.grad(applied, leaves, u.out)
    for name, a, b in zip(["x", *used], got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")


def textbook(layer: Layer, shape: torch.Size) -> tuple[plain.Operator, Callable[[Tensor], Tensor]]:
    """The operator of a layer, and its product as a function that hangs on the parameters."""
    A, B = layer.A, layer.B
    if isinstance(layer, MonDEQLinear):
        w = plain.linear_matrix(A, B, layer.m, shape[1], layer.U.weight)
        return plain.linear_operator(w.detach()), lambda z: z @ w.t()
    a = None if A is None else A / A.norm()
    b = None if B is None else B / B.norm()

    def multiply(z: Tensor) -> Tensor:
        y = (1.0 - layer.m) * z
        if a is not None:
            padded = F.pad(z, (1, 1, 1, 1), mode="circular")
            down = F.pad(F.conv2d(padded, a), (1, 1, 1, 1), mode="circular")
            y = y - layer.g * F.conv_transpose2d(down, a)[:, :, 2:-2, 2:-2]
        if b is not None:
            padded = F.pad(z, (1, 1, 1, 1), mode="circular")
            skew = F.conv2d(padded, b) - F.conv_transpose2d(padded, b)[:, :, 2:-2, 2:-2]
            y = y + layer.h * skew
        return y

    detached = [None if t is None else t.detach() for t in (A, B, layer.g, layer.h)]
    assert detached[2] is not None
    assert detached[3] is not None
    size = (shape[2], shape[3])
    if detached[0] is None and detached[1] is None:  # no kernel to tell the ring by
        operator = plain.conv_operator(None, None, layer.m, detached[2], detached[3], size)
        return operator._replace(ring=1), multiply
    operator = plain.conv_operator(
        detached[0], detached[1], layer.m, detached[2], detached[3], size
    )
    return operator, multiply


@makers
def test_gradcheck(make: Callable[..., Layer]) -> None:
    layer = make(
        activation="softplus", dtype=torch.float64, tol=1e-14, max_iter=2000, on_failure="ignore"
    )
    x = image(layer, 1).requires_grad_()
    names = [n for n, _ in layer.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, given, (x,))

    leaves = [x, *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    assert torch.autograd.gradcheck(call, leaves)
    if isinstance(layer, MonDEQLinear):
        assert torch.autograd.gradgradcheck(call, leaves)


def test_second_derivatives_of_the_convolution() -> None:
    """A Hessian-vector product against a difference of gradients."""
    layer = conv(
        activation="tanh", dtype=torch.float64, tol=1e-13, max_iter=2000, on_failure="ignore"
    )
    x = image(layer, 2)
    weights = list(layer.parameters())
    g = torch.Generator().manual_seed(4)
    directions = [torch.randn(w.shape, generator=g, dtype=torch.float64) for w in weights]

    def gradient(graph: bool = False) -> tuple[Tensor, ...]:
        loss = layer(x).pow(3).sum()
        return torch.autograd.grad(loss, weights, create_graph=graph)

    got = torch.autograd.grad(gradient(True), weights, directions)
    step = 1e-5
    moved = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for w, d in zip(weights, directions, strict=True):
                w.add_(d, alpha=sign * step)
        moved.append(gradient())
        with torch.no_grad():
            for w, d in zip(weights, directions, strict=True):
                w.sub_(d, alpha=sign * step)
    for a, up, down in zip(got, *moved, strict=True):
        wanted = (up - down) / (2 * step)
        assert (a - wanted).abs().max() < 1e-5 * (1 + wanted.abs().max())


@makers
def test_weights_that_change_are_read_anew(make: Callable[..., Layer]) -> None:
    layer = make(tol=1e-6, max_iter=500)
    x = image(layer)
    with torch.no_grad():
        before, moved = layer(x), []
        for change in (
            lambda: layer.A[0].mul_(0.5),  # a convolution does not see the size of all of A
            lambda: layer.B.data.add_(0.1),  # no version counter moves
            lambda: layer.load_state_dict(make().state_dict()),
        ):
            change()
            fresh = copy.deepcopy(layer)
            assert torch.equal(layer(x), fresh(x))
            moved.append(layer(x))
        assert not torch.equal(moved[0], before)
        assert not torch.equal(moved[1], moved[0])
        assert torch.equal(moved[2], before)


@makers
def test_masks(make: Callable[..., Layer], tmp_path: Path) -> None:
    layer, dense = make(tol=1e-6, max_iter=500), make(tol=1e-6, max_iter=500)
    masks = random_masks(layer)
    layer.set_masks(**masks)
    with torch.no_grad():
        for name, mask in masks.items():
            getattr(dense, name).mul_(mask)
            getattr(layer, name).data[~mask] = torch.nan  # absent: never read
    x = image(layer)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
    loss = layer(x).square().sum()
    grads = torch.autograd.grad(loss, [layer.A, layer.B])
    for grad, mask in zip(grads, masks.values(), strict=True):
        assert torch.equal(grad != 0, (grad != 0) & mask)
        assert grad.isfinite().all()

    layer.set_masks(**masks)  # stores zeros again
    state = layer.state_dict()
    assert {"A_mask", "B_mask"} <= set(state)
    save_file(state, tmp_path / "s.safetensors")
    other = make(tol=1e-6, max_iter=500)
    other.load_state_dict(load_file(tmp_path / "s.safetensors"), strict=True)
    assert torch.equal(other(x), layer(x))
    layer.load_state_dict(make().state_dict(), strict=True)  # a dense state leaves the masks
    assert torch.equal(layer.A_mask, masks["A"])
    layer.set_masks()
    assert layer.A_mask is None


def test_bad_masks_change_nothing() -> None:
    layer = linear()
    good = random_masks(layer)
    layer.set_masks(**good)
    with pytest.raises(TypeError, match="A: expected a bool tensor"):
        layer.set_masks(A=torch.ones(7, 7))
    with pytest.raises(ValueError, match=r"B: expected shape \(7, 7\), got \(7, 6\)"):
        layer.set_masks(A=good["B"], B=torch.ones(7, 6, dtype=torch.bool))
    assert torch.equal(layer.A_mask, good["A"])
    with pytest.raises(ValueError, match="A: this layer has no A"):
        linear(use_A=False).set_masks(A=good["A"])


@makers
def test_copies_files_and_dtypes(make: Callable[..., Layer]) -> None:
    layer = make()
    layer.set_masks(**random_masks(layer))
    x = image(layer)
    z = layer(x)
    z.sum().backward()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), z)
    assert layer.double()(x.double()).dtype == torch.float64
    half = copy.deepcopy(layer).to(torch.bfloat16)
    low = half(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), z, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = make()(x)
    torch.testing.assert_close(mixed.float(), make()(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("masked", [False, True])
@makers
def test_compile_in_one_graph(make: Callable[..., Layer], masked: bool) -> None:
    layer = make(tol=1e-6, max_iter=500)
    if masked:
        layer.set_masks(**random_masks(layer))
    x = image(layer).requires_grad_()
    wanted = layer(x)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(wanted.square().sum(), leaves)
    iterations = layer.info.iterations
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = compiled(x)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert layer.info.iterations == iterations
        for a, b in zip(torch.autograd.grad(got.square().sum(), leaves), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        layer.A.mul_(0.5)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_compiled_solves_report_failures() -> None:
    layer = linear(max_iter=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="did not converge"):
        compiled(image(layer))


@makers
def test_failures_are_reported(make: Callable[..., Layer]) -> None:
    layer = make(max_iter=1)
    with pytest.warns(UserWarning, match=f"{type(layer).__name__}: equilibrium: did not converge"):
        z = layer(image(layer))
    assert layer.info.converged is False
    with pytest.warns(UserWarning, match="adjoint equation: did not converge"):
        z.sum().backward()
    layer.on_failure = "error"
    with pytest.raises(RuntimeError, match="did not converge"):
        layer(image(layer))


def test_forward_backward_finds_a_step_that_converges() -> None:
    for make in MAKERS:
        layer = make(solver="fb", max_iter=5000)
        with torch.no_grad():
            layer.A.mul_(3.0)
        layer(image(layer))
        assert layer.info.converged


def test_tune_alpha() -> None:
    layer = linear(solver="fb", max_iter=300)
    x = image(layer, 50)
    counts = {}
    alpha = 1.0
    with torch.no_grad():
        while alpha > 1e-4:
            layer.alpha, layer.on_failure = alpha, "ignore"
            layer(x)
            counts[alpha] = layer.info.iterations if layer.info.converged else 301
            alpha /= 2
    layer.alpha, layer.on_failure = None, "warn"
    chosen = layer.tune_alpha_(x)
    assert layer.alpha == chosen
    wanted = 1.0
    while wanted / 2 in counts and counts[wanted / 2] <= counts[wanted]:
        wanted /= 2
    assert chosen == wanted
    assert layer.on_failure == "warn"
    hopeless = linear(solver="fb", max_iter=1)
    hopeless.tune_alpha_(x)
    assert hopeless.alpha is None


def test_shapes() -> None:
    layer = linear()
    x = torch.randn(2, 3, 4, 5)
    assert layer(x).shape == (2, 3, 4, 7)
    assert layer(torch.randn(5)).shape == (7,)
    one = conv()
    assert one(torch.randn(2, 6, 6)).shape == (3, 8, 8)
    assert MonDEQConv2d(2, 3, 5)(torch.randn(1, 2, 6, 6)).shape == (1, 3, 10, 10)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"m": -1.0}, "m: expected a positive"),
    ({"alpha": 0.0}, "alpha: expected a positive"),
    ({"tol": -1.0}, "tol: expected"),
    ({"max_iter": 0}, "max_iter: expected"),
    ({"solver": "x"}, "solver: expected"),
    ({"activation": "x"}, "activation: expected"),
    ({"on_failure": "x"}, "on_failure: expected"),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=[t for _, t in BAD])
def test_bad_arguments(options: dict[str, Any], text: str) -> None:
    for make in MAKERS:
        with pytest.raises(ValueError, match=text):
            make(**options)
    with pytest.raises(ValueError, match="kernel_size: expected an odd"):
        MonDEQConv2d(2, 3, 4)


def test_training_learns() -> None:
    """A few steps of Adam lower the loss; the weights change at every step."""
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    target = (x[:, :1] * x[:, 1:2] > 0).float()
    layer, head = linear(), torch.nn.Linear(7, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.03, fused=True)
    losses = []
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(head(layer(x)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
