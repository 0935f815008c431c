"""Effective sparsity through equilibrium layers, against Boolean fixed points on dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastprune as fp

Bools = np.ndarray


Case = tuple[nn.Module, torch.Tensor]


def model_of(
    kind: str,
    inside: int,
    n: int,
    size: tuple[int, int] = (2, 3),
    kernel: int = 3,
    use_A: bool = True,
    use_B: bool = True,
    m: float = 1.0,
) -> Case:
    torch.manual_seed(0)
    options = {"use_A": use_A, "use_B": use_B, "m": m}
    model = nn.Sequential()
    if kind == "linear":
        model.add_module("mon", fp.nn.MonDEQLinear(inside, n, **options))
        model.add_module("head", nn.Linear(n, 2))
        return model, torch.zeros(1, inside)
    model.add_module("mon", fp.nn.MonDEQConv2d(inside, n, kernel, **options))
    model.add_module("flat", nn.Flatten())
    places = math.prod(s + kernel - 1 for s in size)
    model.add_module("head", nn.Linear(n * places, 2))
    return model, torch.zeros(1, inside, *size)


def masks_of(model: nn.Module, density: float, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    return {n: torch.rand(p.shape, generator=g) < density for n, p in weights.items()}


def dense(kernel: Bools, size: tuple[int, int], padding: int, circular: bool) -> np.ndarray:
    """Which tap joins input to output, as kernel entry + 1: (outputs, inputs), 0 for none."""
    out, inside, k, _ = kernel.shape
    p = padding
    height, width = (size[0] + 2 * p - k + 1, size[1] + 2 * p - k + 1)
    found = np.zeros((out, height, width, inside, *size), dtype=np.int64)
    entries = np.arange(1, kernel.size + 1).reshape(kernel.shape)
    for y in range(height):
        for x in range(width):
            for dy in range(k):
                for dx in range(k):
                    row, column = y + dy - p, x + dx - p
                    if circular:
                        row, column = row % size[0], column % size[1]
                    elif not (0 <= row < size[0] and 0 <= column < size[1]):
                        continue
                    assert not found[:, y, x, :, row, column].any()  # maps wider than the kernel
                    found[:, y, x, :, row, column] = entries[:, :, dy, dx]
    return found.reshape(out * height * width, inside * math.prod(size))


def expected(model: nn.Module, x: torch.Tensor, masks: dict[str, torch.Tensor]) -> dict[str, Bools]:
    """What is active, by iterating the reach of units to a fixed point."""
    mon = model.mon
    kept = {n: m.numpy() for n, m in masks.items()}
    weights = {n: kept.get(n, np.ones(p.shape, bool)) for n, p in model.named_parameters()}
    taps = {}
    if isinstance(mon, fp.nn.MonDEQLinear):
        for n in ("mon.A", "mon.B", "mon.U.weight"):
            if n in weights:
                taps[n] = np.arange(1, weights[n].size + 1).reshape(weights[n].shape)
        inside = np.ones(mon.out_features, bool)
    else:
        p = mon.kernel_size // 2
        size = tuple(s + 2 * p for s in x.shape[2:])
        for n in ("mon.A", "mon.B"):
            if n in weights:
                taps[n] = dense(weights[n], size, p, circular=True)
        taps["mon.U.weight"] = dense(weights["mon.U.weight"], tuple(x.shape[2:]), 2 * p, False)
        ring = np.zeros((mon.out_channels, *size), bool)
        ring[:, p : size[0] - p, p : size[1] - p] = True
        inside = ring.ravel()
    taps["head.weight"] = np.arange(1, weights["head.weight"].size + 1).reshape(
        weights["head.weight"].shape
    )
    edge = {
        n: np.concatenate([[False], weights[n].ravel()])[t].astype(int) for n, t in taps.items()
    }
    units = len(inside)
    a, b = (edge.get(n, np.zeros((units, units), int)) for n in ("mon.A", "mon.B"))
    one_step = (a.T @ a + b + b.T) > 0  # of columns: z_i <- z_j
    forward = (edge["mon.U.weight"].any(1)) & inside
    backward = (edge["head.weight"].any(0)) & inside
    for _ in range(units + 1):
        forward = forward | (one_step @ forward.astype(int) > 0) & inside
        backward = backward | (one_step.T @ backward.astype(int) > 0) & inside
    t_forward, t_backward = a @ forward.astype(int) > 0, a @ backward.astype(int) > 0
    ones_in = np.ones(edge["mon.U.weight"].shape[1], bool)
    uses = {
        "mon.U.weight": [np.outer(backward, ones_in)],
        "head.weight": [np.outer(np.ones(2, bool), forward)],
        "mon.A": [np.outer(t_backward, forward), np.outer(t_forward, backward)],
        "mon.B": [np.outer(backward, forward), np.outer(forward, backward)],
    }
    active = {}
    for n in masks:
        hit = np.zeros(weights[n].size + 1, bool)
        for use in uses[n]:
            hit[taps[n][use & (edge[n] > 0)]] = True
        active[n] = hit[1:].reshape(weights[n].shape)
    return active


def check(model: nn.Module, x: torch.Tensor, masks: dict[str, torch.Tensor]) -> None:
    found = fp.effective_masks(model, masks, example_input=x)
    wanted = expected(model, x, masks)
    assert list(found) == list(masks)
    for n in masks:
        assert np.array_equal(found[n].numpy(), wanted[n]), n
    total = sum(m.numel() for m in masks.values())
    active = sum(int(w.sum()) for w in wanted.values())
    assert fp.effective_sparsity(model, masks, example_input=x) == 1.0 - active / total


DENSITIES = st.sampled_from([0.03, 0.1, 0.2, 0.4, 0.8])


@given(st.integers(1, 6), st.integers(1, 12), DENSITIES, st.integers(0, 10**6), st.booleans(),
       st.booleans(), st.sampled_from([1.0, 0.5]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_fully_connected(inside, n, density, seed, use_A, use_B, m):
    model, x = model_of("linear", inside, n, use_A=use_A, use_B=use_B, m=m)
    check(model, x, masks_of(model, density, seed))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), DENSITIES,
       st.integers(0, 10**6), st.booleans(), st.booleans())  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_convolution(inside, n, height, width, density, seed, use_A, use_B):
    size = (height, width)
    model, x = model_of("conv", inside, n, size, use_A=use_A, use_B=use_B)
    check(model, x, masks_of(model, density, seed))


@pytest.mark.parametrize(("kernel", "size"), [(1, (2, 3)), (5, (1, 2)), (5, (3, 3))])
@pytest.mark.parametrize("density", [0.05, 0.15])
def test_other_kernels(kernel, size, density):
    model, x = model_of("conv", 2, 3, size, kernel)
    for seed in range(3):
        check(model, x, masks_of(model, density, seed))


def test_what_is_not_masked_is_dense():
    model, x = model_of("linear", 4, 6)
    masks = masks_of(model, 0.2, 0)
    check(model, x, {n: masks[n] for n in ("mon.A", "mon.U.weight")})
    check(model, x, {"mon.B": masks["mon.B"]})


def test_a_chain_through_the_units():
    """x -> z0 -> z1 -> ... -> z5 -> y by B alone, against its direction by B^T."""
    n = 6
    model, x = model_of("linear", 1, n, use_A=False)
    first, last = torch.zeros(n, 1).bool(), torch.zeros(2, n).bool()
    first[0], last[0, n - 1] = True, True
    for direction in (-1, 1):
        b = torch.diag(torch.ones(n - 1), direction).bool()
        masks = {"mon.B": b, "mon.U.weight": first, "head.weight": last}
        assert fp.effective_masks(model, masks, example_input=x) == fp.Masks(masks)
        b[2] = b[:, 2] = False
        found = fp.effective_masks(model, masks, example_input=x)
        assert not found["mon.U.weight"].any()
        assert not found["head.weight"].any()
        # Units that the input reaches lead on to no output.
        assert not found["mon.B"].any()


def test_a_hidden_unit_of_a_joins_what_it_reads():
    """t0 reads z0 and z1: A^T hands on to both; t1 reads z2 alone, which leads nowhere new."""
    model, x = model_of("linear", 1, 3, use_B=False)
    a = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    masks = {
        "mon.A": a,
        "mon.U.weight": torch.tensor([[1], [0], [0]]).bool(),
        "head.weight": torch.tensor([[0, 1, 0], [0, 0, 0]]).bool(),
    }
    found = fp.effective_masks(model, masks, example_input=x)
    assert found["mon.A"].int().tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert found["head.weight"].any()


def test_tokens_do_not_meet():
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mon, self.head = fp.nn.MonDEQLinear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.mon(x))[:, 1]

    model = Tokens()
    masks = masks_of(model, 0.3, 4)
    single, _ = model_of("linear", 3, 5)
    found = fp.effective_masks(model, masks, example_input=torch.zeros(1, 4, 3))
    assert found == fp.effective_masks(single, masks, example_input=torch.zeros(1, 3))


def test_models_with_masks_of_their_own_and_after_accelerate():
    model, x = model_of("conv", 2, 3)
    masks = masks_of(model, 0.3, 1)
    wanted = fp.effective_masks(model, masks, example_input=x)
    fast, _ = fp.accelerate(model, masks, x, min_time=0.001)
    assert fp.effective_masks(fast, masks, example_input=x) == wanted
    # The layer solves as before.
    assert "forward" not in vars(model.mon)
    assert model(x).shape == (1, 2)


def test_two_equilibria_in_a_row():
    torch.manual_seed(0)
    model = nn.Sequential(
        fp.nn.MonDEQConv2d(1, 2), nn.AvgPool2d(2), fp.nn.MonDEQConv2d(2, 2), nn.Flatten(),
        nn.Linear(2 * 25, 3),
    )  # fmt: skip
    x = torch.zeros(1, 1, 4, 4)
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    # Columns of the head that read the ring are cut off.
    ring = torch.ones(2, 5, 5).bool()
    ring[:, 1:-1, 1:-1] = False
    found = fp.effective_masks(model, masks, example_input=x)
    assert torch.equal(found["4.weight"], ~ring.flatten().expand(3, -1))
    assert all(found[n].all() for n in masks if n != "4.weight")
    masks["2.U.weight"][:] = False
    assert not any(m.any() for m in fp.effective_masks(model, masks, example_input=x).values())


def test_pruning_to_an_effective_sparsity():
    model, x = model_of("linear", 6, 20)
    masks = fp.prune(model, "magnitude", 0.8, effective=True, example_input=x, include="mon")
    reached = fp.effective_sparsity(model, masks, example_input=x)
    assert 0.75 < reached <= 0.8


def test_path_norms_go_round_without_end():
    model, x = model_of("linear", 3, 4)
    with pytest.raises(ValueError, match="equilibrium layer, whose output is also its input"):
        fp.effective.path_norms(model, masks_of(model, 0.5, 0), example_input=x)


def test_a_layer_whose_input_is_constant_carries_nothing():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mon, self.head = fp.nn.MonDEQLinear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x) + self.head(self.mon(torch.ones(1, 3)))

    model = Constant()
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    found = fp.effective_masks(model, masks, example_input=torch.zeros(1, 4))
    assert found["head.weight"].all()
    assert not found["mon.A"].any()


def test_trim_leaves_equilibria_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1),
        fp.nn.MonDEQConv2d(4, 3, tol=1e-7, max_iter=500), nn.Flatten(), nn.Linear(3 * 36, 2),
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    masks["0.weight"][:3] = False
    masks["3.A"][0] = False
    masks["5.weight"][:, ::2] = False
    trimmed = fp.effective.trim(model, masks, example_input=x)
    fp.Masks(masks).apply_(model)
    torch.testing.assert_close(trimmed(x), model(x), rtol=1e-5, atol=1e-6)
    assert trimmed.get_submodule("3").A.shape == model[3].A.shape
