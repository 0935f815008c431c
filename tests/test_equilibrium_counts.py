"""Tables of matrices, effective parameters, and dense models of the same size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastprune as fp
from fastprune.equilibrium import effective_parameters, equal_size_channels, matrix_sparsities


def single_convolution(channels: int, **settings: bool) -> nn.Module:
    """Of paper 000 on CIFAR-10: 34 x 34 maps, pooled by 4 to 8 x 8."""
    return nn.Sequential(
        fp.nn.MonDEQConv2d(3, channels, **settings), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(64 * channels, 10),
    )  # fmt: skip


# Paper 000, Table D2: effective parameters, channels*, parameters*; the last leave out g and h.
TABLE_D2 = [
    (159532, 77, 158168),
    (111475, 62, 110618),
    (87413, 54, 88570),
    (63361, 44, 64250),
    (57369, 41, 57656),
    (54908, 40, 55530),
    (52651, 39, 53440),
    (52027, 38, 51386),
    (134209, 70, 134970),
    (86619, 53, 85976),
    (63182, 44, 64250),
    (38103, 31, 38016),
    (32823, 28, 32826),
    (29931, 26, 29546),
    (28030, 25, 27960),
    (27138, 24, 26410),
]


@pytest.mark.parametrize(("effective", "channels", "parameters"), TABLE_D2)
def test_table_d2(effective, channels, parameters):
    assert equal_size_channels(single_convolution, effective) == channels
    with torch.device("meta"):
        model = single_convolution(channels)
    assert sum(p.numel() for p in model.parameters()) == parameters + 2


@pytest.mark.parametrize(
    ("target", "channels"), [(1, 1), (40, 1), (41, 2), (50, 2), (60, 2), (61, 2), (10**9, 31621)]
)
def test_the_nearest_size_is_found(target, channels):
    def make(n: int) -> nn.Module:
        return nn.Linear(n + 1, n + 1)  # (n + 1)^2 + n + 1

    found = equal_size_channels(make, target)
    sizes = {n: (n + 1) ** 2 + n + 1 for n in range(max(found - 3, 1), found + 4)}
    assert found == min(sizes, key=lambda n: (abs(sizes[n] - target), n))


def test_sizes_that_no_model_has():
    with pytest.raises(ValueError, match="target: expected a positive integer, got 0"):
        equal_size_channels(single_convolution, 0)
    with pytest.raises(ValueError, match="make_model: the number of parameters does not grow"):
        equal_size_channels(lambda n: nn.Linear(2, 2), 1000)


def masks_of(model: nn.Module, density: float, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    weights = {n: p for n, p in model.named_parameters() if n.startswith("0.") and p.dim() > 1}
    return {n: torch.rand(p.shape, generator=g) < density for n, p in weights.items()}


def test_a_dense_model_is_effective_but_for_the_ring():
    model = single_convolution(4)
    x = torch.zeros(1, 3, 32, 32)
    everything = sum(p.numel() for p in model.parameters())
    # Pooling by 4 joins the ring with the rest: all columns of the classifier count.
    assert effective_parameters(model, {}, x) == everything
    assert effective_parameters(model, fp.Masks.ones(model), x) == everything
    unpooled = nn.Sequential(fp.nn.MonDEQConv2d(1, 2), nn.Flatten(), nn.Linear(2 * 36, 3))
    everything = sum(p.numel() for p in unpooled.parameters())
    ring = 2 * (36 - 16) * 3
    assert effective_parameters(unpooled, {}, torch.zeros(1, 1, 4, 4)) == everything - ring


def test_units_that_nothing_reaches_take_their_columns_along():
    model = nn.Sequential(fp.nn.MonDEQLinear(2, 3, use_A=False), nn.Linear(3, 4))
    u = torch.tensor([[True, False], [False, False], [False, False]])
    b = torch.zeros(3, 3, dtype=torch.bool)
    masks = {"0.U.weight": u, "0.B": b}
    x = torch.zeros(1, 2)
    # One weight of U, the bias of its unit, a column of 4 and the classifier's 4 biases.
    assert effective_parameters(model, masks, x) == 1 + 1 + 4 + 4
    b[1, 0] = True  # unit 1 is reached through B alone: its bias counts too
    assert effective_parameters(model, masks, x) == 2 + 2 + 8 + 4
    assert effective_parameters(model, {**masks, "0.U.weight": ~torch.ones(3, 2).bool()}, x) == 0


def test_g_and_h_count_with_their_matrix():
    model = nn.Sequential(fp.nn.MonDEQConv2d(1, 2), nn.Flatten(), nn.Linear(2 * 36, 1))
    x = torch.zeros(1, 1, 4, 4)
    whole = effective_parameters(model, {}, x)
    nothing = torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    assert effective_parameters(model, {"0.A": nothing}, x) == whole - 36 - 1
    assert effective_parameters(model, {"0.A": nothing, "0.B": nothing}, x) == whole - 2 * 37
    without = nn.Sequential(fp.nn.MonDEQConv2d(1, 2, use_A=False), *model[1:])
    # The layer has a g, which acts on nothing.
    assert effective_parameters(without, {}, x) == whole - 37


@given(st.floats(0.02, 0.6), st.integers(0, 10**6), st.booleans())
@settings(max_examples=25, deadline=None)
def test_weights_are_the_effective_ones_and_biases_those_of_their_units(density, seed, linear):
    torch.manual_seed(0)
    if linear:
        model, x = nn.Sequential(fp.nn.MonDEQLinear(4, 9), nn.Linear(9, 3)), torch.zeros(1, 4)
    else:
        layers = [fp.nn.MonDEQConv2d(2, 5), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(45, 3)]
        model, x = nn.Sequential(*layers), torch.zeros(1, 2, 4, 4)
    masks = masks_of(model, density, seed)
    last = f"{len(model) - 1}.weight"
    every = {**masks, last: torch.ones_like(model.get_parameter(last), dtype=torch.bool)}
    found = fp.effective_masks(model, every, example_input=x)
    # A unit is on a path if its column of the classifier is, here where all are read.
    columns = found[last].view(3, len(model[0].U.weight), -1).any(0).any(1)
    expected = found.nnz() + int(columns.sum()) + 3 * bool(found.nnz())
    if not linear:
        expected += int(found["0.A"].any()) + int(found["0.B"].any())
    assert effective_parameters(model, masks, x) == expected


def test_scales_and_shifts_of_other_layers():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False),
        nn.GroupNorm(1, 3), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 2),
    )  # fmt: skip
    x = torch.zeros(1, 1, 6, 6)
    everything = sum(p.numel() for p in model.parameters())
    assert effective_parameters(model, {}, x) == everything
    mask = torch.ones(3, 4, 3, 3, dtype=torch.bool)
    mask[:, 1] = False  # channel 1 leads nowhere
    gone = 9 + 1 + 2 + 3 * 9
    assert effective_parameters(model, {"3.weight": mask}, x) == everything - gone
    mask[2] = False  # channel 2 comes from nowhere: its scale, shift and 4 places
    gone += 3 * 9 + 2 + 2 * 4 + 2 * 4
    assert effective_parameters(model, {"3.weight": mask}, x) == everything - gone


def test_a_parameter_that_acts_on_nobody_knows_what():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 3))

        def forward(self, x):
            return torch.cat([x, self.scale], 1)

    with pytest.raises(ValueError, match="what the parameter scale acts on is not known"):
        effective_parameters(Odd(), {}, torch.zeros(1, 3))


def test_table_1_names_u_a_and_b():
    model = nn.Sequential(fp.nn.MonDEQLinear(3, 4), fp.nn.MonDEQLinear(4, 5, use_B=False))
    masks = fp.prune(model, "magnitude", 0.6)
    table = matrix_sparsities(model, masks)
    assert [row.name for row in table.rows] == ["U", "A", "B"]
    u, a, b = table.rows
    assert u.kept == int(masks["0.U.weight"].sum() + masks["1.U.weight"].sum())
    assert (a.weights, a.kept) == (16 + 25, int(masks["0.A"].sum() + masks["1.A"].sum()))
    assert (b.weights, b.kept) == (16, int(masks["0.B"].sum()))
    assert table.total.sparsity == masks.sparsity()
    assert "total" in str(table)
    dense = matrix_sparsities(model, {"0.A": masks["0.A"]})
    assert dense.rows[0].sparsity == 0.0
    with pytest.raises(ValueError, match="no monotone equilibrium layer"):
        matrix_sparsities(nn.Linear(2, 2), {})
