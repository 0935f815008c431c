"""Effective sparsity of models with an equilibrium layer: paths that go round its cycle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import emulated
import fastprune as fp
from deq_cells import Tanh
from effective_models import random_masks
from fastprune.effective.trace import program_of


class Residual(nn.Module):
    """Two convolutions, a skip of the state and GroupNorm, as the cell of ResNetDEQ."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.norm = nn.GroupNorm(1, inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x + 0.5 * z + self.conv2(self.norm(torch.relu(self.conv1(z)))))


class Reads(nn.Module):
    """A state of another size than x, read by the cell through a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.input = nn.Linear(9, 9), nn.Linear(5, 9)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.state(z) + self.input(x))


def dense() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(6, 8), fp.nn.DEQ(Tanh(8)), nn.Linear(8, 3)]
    return nn.Sequential(*layers), torch.zeros(2, 6)


def images() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        fp.nn.DEQ(Residual(4, 6)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 4, 3),
    ]
    return nn.Sequential(*layers), torch.zeros(1, 1, 5, 5)


def another_shape() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(fp.nn.DEQ(Reads(), z_shape=(9,)), nn.Linear(9, 4)), torch.zeros(1, 5)


def two_in_a_row() -> tuple[nn.Module, Tensor]:
    layers = [fp.nn.DEQ(Tanh(5)), nn.Linear(5, 5), fp.nn.DEQ(Tanh(5)), nn.Linear(5, 2)]
    return nn.Sequential(*layers), torch.zeros(1, 5)


CASES: list[Callable[[], tuple[nn.Module, Tensor]]] = [dense, images, another_shape, two_in_a_row]


def active(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """A kept weight is active if a path from input to output passes through it.

    The oracle, by signs: the cell is unrolled twice as often as its state has elements, which is
    enough for a path to any weight and one on from there; a weight is active where the gradient of
    an all-ones pass is positive. After every layer only signs are kept, forward and backward: 0
    and 1, which no depth makes over- or underflow.
    """

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            return t.sign()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g.sign()

    leaves = {n: m.double().requires_grad_() for n, m in masks.items()}
    names = {m: n for n, m in model.named_modules()}

    def layer(module: nn.Module, t: Tensor) -> Tensor:
        if isinstance(module, nn.Linear):
            return Sign.apply(nn.functional.linear(t, leaves[f"{names[module]}.weight"]))
        if isinstance(module, nn.Conv2d):
            w = leaves[f"{names[module]}.weight"]
            return Sign.apply(nn.functional.conv2d(t, w, padding=module.padding))  # type: ignore[arg-type]
        if isinstance(module, nn.MaxPool2d):
            return Sign.apply(nn.functional.avg_pool2d(t, module.kernel_size))
        if isinstance(module, nn.Flatten):
            return t.flatten(1)
        assert isinstance(module, fp.nn.DEQ)
        z = torch.zeros(t.shape if module.z_shape is None else (1, *module.z_shape)).double()
        for _ in range(2 * z.numel() + 2):
            z = Sign.apply(cell(module.cell, z, t))
        return z

    def cell(module: nn.Module, z: Tensor, t: Tensor) -> Tensor:
        if isinstance(module, Tanh):
            return layer(module.linear, z) + t
        if isinstance(module, Reads):
            return layer(module.state, z) + layer(module.input, t)
        assert isinstance(module, Residual)
        return t + z + layer(module.conv2, layer(module.conv1, z))

    out = torch.ones_like(x[:1], dtype=torch.float64)
    for module in model:  # type: ignore[union-attr]
        out = layer(module, out)
    if not out.requires_grad:
        return {n: torch.zeros_like(m) for n, m in masks.items()}
    grads = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(masks[n]) if g is None else (g > 0) & masks[n]
        for n, g in zip(leaves, grads, strict=True)
    }


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    density=st.sampled_from([0.02, 0.08, 0.15, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_against_the_unrolled_oracle(
    case: Callable[[], tuple[nn.Module, Tensor]], density: float, seed: int
) -> None:
    model, x = case()
    masks = random_masks(model, density, seed)
    expected = active(model, masks, x)
    found = fp.effective_masks(model, masks, example_input=x)
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name
    total = sum(m.numel() for m in masks.values())
    left = sum(int(m.sum()) for m in expected.values())
    assert fp.effective_sparsity(model, masks, example_input=x) == 1.0 - left / total
    # The same program on what a GPU would run.
    program = program_of(model, x)
    code = program.encode({n: i for i, n in enumerate(masks)})
    both = [
        ops.path_norm_reach(list(masks.values()), program.labels, code, [], True)
        for ops in (torch.ops.fastprune, emulated.ops)
    ]
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)


def test_a_ring_is_followed_to_its_end() -> None:
    """Unit i feeds unit i + 1: the input enters at 0, the output leaves at 6."""
    model = nn.Sequential(nn.Linear(2, 9), fp.nn.DEQ(Tanh(9)), nn.Linear(9, 1))
    ring = torch.eye(9, dtype=torch.bool).roll(1, 0)
    into = torch.zeros(9, 2, dtype=torch.bool)
    into[0] = True
    out = torch.zeros(1, 9, dtype=torch.bool)
    out[0, 6] = True
    masks = {"0.weight": into, "1.cell.linear.weight": ring, "2.weight": out}
    x = torch.zeros(1, 2)
    found = fp.effective_masks(model, masks, example_input=x)
    # The way on from 6 leads back to it, so the whole ring is on some path.
    assert torch.equal(found["1.cell.linear.weight"], ring)
    ring[8] = False  # 7 -> 8 is gone: what follows 6 no longer matters
    found = fp.effective_masks(model, masks, example_input=x)
    assert found["1.cell.linear.weight"].nonzero().tolist() == [[i + 1, i] for i in range(6)]
    into[0], into[7] = False, True  # 8 is cut off, and so is everything
    assert fp.effective_sparsity(model, masks, example_input=x) == 1.0
    model[1] = nn.Tanh()
    del masks["1.cell.linear.weight"]
    into[6] = True
    found = fp.effective_masks(model, masks, example_input=x)  # traced anew, without the cycle
    assert found["0.weight"].nonzero().tolist() == [[6, 0], [6, 1]]


def test_what_only_the_state_feeds_is_inactive() -> None:
    """A unit that x does not reach, however long the equilibrium takes, carries no input."""
    model = nn.Sequential(fp.nn.DEQ(Reads(), z_shape=(9,)), nn.Linear(9, 4))
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    masks["0.cell.input.weight"][:] = False
    assert fp.effective_sparsity(model, masks, example_input=torch.zeros(1, 5)) == 1.0
    masks["0.cell.input.weight"][3, 2] = True
    found = fp.effective_masks(model, masks, example_input=torch.zeros(1, 5))
    assert found["0.cell.state.weight"].all()


def test_the_network_of_the_paper() -> None:
    torch.manual_seed(0)
    model = fp.models.create("resnet-deq", in_shape=(1, 8, 8), channels=8, inner_channels=8)
    x = torch.zeros(1, 1, 8, 8)
    masks = fp.prune(model, "magnitude", 0.9, include="deq.cell", effective=True, example_input=x)
    reached = fp.effective_sparsity(model, masks, example_input=x)
    assert 0.89 < reached <= 0.9
    assert fp.effective_compression(model, masks, example_input=x) == pytest.approx(
        1 / (1 - reached)
    )
    masked = fp.accelerate(model, masks, x, min_time=0.001)[0]
    assert fp.effective_sparsity(masked, masks, example_input=x) == reached


def test_trimming_keeps_the_equilibrium() -> None:
    """The inner units of the cell can go; its state, which x's shape fixes, stays."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 5)
            with torch.no_grad():
                self.up.weight.mul_(0.5)
                self.down.weight.mul_(0.5)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.down(torch.relu(self.up(z))) + x)

    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), fp.nn.DEQ(Two(), tol=1e-12, max_iter=300, solver="iteration")]
    model = nn.Sequential(*layers, nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)).double().eval()
    masks = random_masks(model, 0.7, 0)
    masks["1.cell.down.weight"][:, [1, 4, 5]] = False  # nobody reads these inner units
    masks["4.weight"][:, 2] = False
    x = torch.randn(3, 4, dtype=torch.float64)
    small, rest = fp.trim(model, masks, example_input=x, return_masks=True)
    fp.Masks(masks).apply_(model)
    assert small[1].cell.up.out_features <= 9  # type: ignore[index]
    assert small[1].cell.down.out_features == 5  # type: ignore[index]
    assert small[2].out_features <= 6  # type: ignore[index]
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)
    assert rest["1.cell.up.weight"].shape == small[1].cell.up.weight.shape  # type: ignore[index]


def test_path_norms_have_no_end() -> None:
    model, x = dense()
    masks = random_masks(model, 0.5, 0)
    with pytest.raises(ValueError, match=r"equilibrium layer.*round without end.*no path norms"):
        fp.path_norms(model, masks, example_input=x)


def test_tracing_leaves_the_layer_as_it_was() -> None:
    model, x = dense()
    before = model(x)
    info = model[1].info  # type: ignore[index]
    fp.effective_sparsity(model, random_masks(model, 0.5, 0), example_input=x)
    assert model[1].info is info  # type: ignore[index]
    assert torch.equal(model(x), before)
