"""Reach through networks on the GPU, by emulation: bit for bit what the CPU finds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
from effective_models import CASES, Case, random_masks
from fastprune.effective.program import Geometry, Program, Value, Weight
from fastprune.effective.trace import program_of
from fastprune.ops.path_norm import path_norm_reach
from oracle import guarded
from test_path_norm import GOOD
from test_path_norm import program_of as program_of_numbers

pytestmark = emulated.needs_emulation


def agree(
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    program: Tensor,
    seeds: Sequence[int] = (0,),
    multiprocessors: int = 4,
) -> list[Tensor]:
    """Runs a program on both sides and compares counts, active weights and all maps."""
    values = list(range(int(program[1])))
    expected = path_norm_reach(masks, labels, program, values, True)
    for seed in seeds:
        emulated.configure(seed, multiprocessors)
        found = emulated.ops.path_norm_reach(list(masks), list(labels), program, values, True)
        assert found[0].tolist() == expected[0].tolist(), f"seed {seed}: counts"
        kinds = [f"mask {m}" for m in range(len(masks))]
        kinds += [f"value {v} {way}" for v in values for way in ("forward", "backward")]
        for kind, a, b in zip(kinds, found[1:], expected[1:], strict=True):
            assert torch.equal(a, b), f"seed {seed}, {kind}: {a.ne(b).sum()} of {a.numel()} differ"
    return expected


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.1, 0.3, 1.0])
def test_networks(case: Callable[[], Case], density: float) -> None:
    model, x = case()
    program = program_of(model, x)
    for seed in range(2):
        masks = random_masks(model, density, seed)
        encoded = program.encode({name: i for i, name in enumerate(masks)})
        agree(list(masks.values()), program.labels, encoded, seeds=(seed,) if density else (2,))


@pytest.mark.parametrize("case", [CASES[3], CASES[6]], ids=lambda c: c.__name__)
def test_same_bits_in_any_order(case: Callable[[], Case]) -> None:
    model, x = case()
    program = program_of(model, x)
    masks = random_masks(model, 0.15, 5)
    encoded = program.encode({name: i for i, name in enumerate(masks)})
    for multiprocessors in (1, 132):
        agree(list(masks.values()), program.labels, encoded, (0, 1, 2), multiprocessors)


def thin(value: Value, program: Program, kept: float, draw: random.Random) -> Value:
    """A map that holds some elements of ``value`` only."""
    here = [i if draw.random() < kept else -1 for i in range(value.numel)]
    return program.moved(value, torch.tensor(here).view(value.shape))


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Convolutions of up to three dimensions that are padded, strided, dilated and grouped."""
    groups, per_group, depth = (draw(st.integers(1, 3)) for _ in range(3))
    large, small, kernel, stride, padding, dilation = ([1, 1, 1] for _ in range(6))
    padding = [0, 0, 0]
    for i in range(3):
        if draw(st.booleans()):
            continue
        large[i] = draw(st.integers(1, (3, 9, 40)[i]))
        kernel[i] = draw(st.integers(1, 4))
        stride[i], dilation[i] = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        padding[i] = draw(st.integers(0, 4))
        reach = dilation[i] * (kernel[i] - 1)
        small[i] = max(1, (large[i] + 2 * padding[i] - reach - 1) // stride[i] + 1)
    dims = [tuple(d) for d in (large, small, kernel, stride, padding, dilation)]
    return Geometry(per_group * groups, groups, depth, *dims)  # type: ignore[arg-type]


@settings(max_examples=150)
@given(
    g=geometries(),
    transposed=st.booleans(),
    masked=st.booleans(),
    density=st.sampled_from([0.05, 0.3, 1.0]),
    kept=st.sampled_from([0.1, 0.7, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_convolutions_of_partial_maps(
    g: Geometry, transposed: bool, masked: bool, density: float, kept: float, seed: int
) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    large, small = (g.depth * g.groups, *g.large), (g.rows, *g.small)
    into, out_of = (small, large) if transposed else (large, small)
    program = Program()
    weight = Weight("w", (g.rows, g.depth, *g.kernel)) if masked else None
    x = thin(program.input(into), program, kept, draw)
    y = program.convolve(x, weight, g, out_of, transposed)
    program.output(thin(y, program, kept, draw))
    masks = [torch.rand(g.rows, g.depth, *g.kernel) < density]
    agree(masks, program.labels, program.encode({"w": 0}), (seed % 3,), 1 + seed % 9)


@settings(max_examples=100)
@given(
    rows=st.sampled_from([1, 3, 33, 64, 65, 130]),
    cols=st.sampled_from([1, 5, 63, 64, 65, 129, 2100]),
    tokens=st.sampled_from([1, 2, 7, 70]),
    masked=st.booleans(),
    density=st.sampled_from([0.0, 0.02, 0.4]),
    seed=st.integers(0, 2**16),
)
def test_linear_layers_of_partial_maps(
    rows: int, cols: int, tokens: int, masked: bool, density: float, seed: int
) -> None:
    if rows * cols * tokens > 300_000:
        tokens = 2
    draw = random.Random(seed)
    torch.manual_seed(seed)
    program = Program()
    weight = Weight("w" if masked else None, (rows, cols))
    x = thin(program.input((tokens, cols)), program, 0.2, draw)
    y = program.linear(x, weight, (tokens, rows))
    program.output(thin(y, program, 0.2, draw))
    agree([torch.rand(rows, cols) < density], program.labels, program.encode({"w": 0}), (seed % 3,))


@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("cols", [0, 1, 65])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_empty_linear_layers(rows: int, cols: int, tokens: int) -> None:
    for mask in (0, -1):
        code = [0, 2, tokens, cols, tokens, rows, 0, 1, 0]
        code += [4, 6, 0, 1, mask, rows, cols, tokens, 1, 1, 1]
        agree([torch.rand(rows, cols) < 0.5], [], torch.tensor(code), (1,))


def test_planes_of_many_words_and_windows_of_many_taps() -> None:
    """Two chunks of words per plane; more taps than a word has bits."""
    one = (1, 1, 1)
    wide = Geometry(3, 1, 2, (1, 48, 61), (1, 48, 61), (1, 3, 3), one, (0, 1, 1), one)
    strided = Geometry(2, 1, 2, (1, 48, 61), (1, 24, 31), (1, 3, 3), (1, 2, 2), (0, 1, 1), one)
    large = Geometry(4, 2, 1, (1, 11, 12), (1, 2, 3), (1, 10, 10), one, (0, 0, 0), one)
    for seed, g in enumerate((wide, strided, large)):
        torch.manual_seed(seed)
        program, draw = Program(), random.Random(seed)
        x = thin(program.input((g.depth * g.groups, *g.large)), program, 0.3, draw)
        y = program.convolve(x, Weight("w", ()), g, (g.rows, *g.small))
        program.output(thin(y, program, 0.3, draw))
        masks = [torch.rand(g.rows, g.depth, *g.kernel) < 0.2]
        agree(masks, program.labels, program.encode({"w": 0}), (seed,))


def test_cycles_settle() -> None:
    """A ring that takes an element a sweep: far more sweeps than values."""
    n = 70
    ring = torch.eye(n, dtype=torch.bool).roll(1, dims=0)
    ring[0, -1] = False
    first = torch.zeros(n, n, dtype=torch.bool)
    first[0, 3] = True
    last = torch.zeros(n, n, dtype=torch.bool)
    last[5, n - 2] = True
    # Values: 0 in, 1 the sum that the ring reads, 2 what it gives, 3 what comes first, 4 out.
    code = [1, 5, *[1, n] * 5, 0, 1, 0]
    code += [4, 6, 0, 3, 0, n, n, 1]  # 3 = first (0)
    code += [4, 6, 1, 4, 2, n, n, 1]  # 4 = last (1): read before it is written
    code += [2, 3, 1, 2, 3]  # 1 = 2 or 3
    code += [4, 6, 1, 2, 1, n, n, 1]  # 2 = ring (1)
    code += [1, 1, 4]
    counts = agree([first, ring, last], [], torch.tensor(code), (0, 1, 2))[0]
    assert counts.tolist() == [1, n - 2, 1]


@pytest.mark.parametrize("cyclic", [0, 1])
@pytest.mark.parametrize("reached", [True, False])
def test_instructions_from_a_value_into_itself(cyclic: int, reached: bool) -> None:
    """What an instruction brings to its own map does not depend on what it has brought already."""
    torch.manual_seed(0)
    n = 66
    shift = torch.eye(n, dtype=torch.bool).roll(1, dims=0)
    one = torch.zeros(n, n, dtype=torch.bool)
    one[7, 1] = True
    labels = [torch.randint(-1, 9, (n,), dtype=torch.int32) for _ in range(2)]
    code = [cyclic, 2, 1, n, 1, n, *([0, 1, 0] if reached else [])]
    code += [4, 6, 0, 1, 0, n, n, 1] if reached else []
    code += [4, 6, 1, 1, 1, n, n, 1]
    code += [2, 3, 1, 1, 1]
    code += [5, 2, 1, 1]
    # One row of a kernel of three taps, on a plane of n columns.
    code += [3, 25, 1, 1, 2, 0, 1, 1, 1, 1, 1, n, 1, 1, n, 1, 1, 3, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    code += [6, 5, 1, 1, 0, 1, 9]
    code += [1, 1, 1] if reached else []
    tap = torch.tensor([[False, False, True]])
    agree([one, shift, tap], labels, torch.tensor(code), (0, 1, 2))


def test_a_mask_in_two_places_and_one_in_none() -> None:
    torch.manual_seed(1)
    code = [0, 3, *[2, 6] * 3, 0, 1, 0, 4, 6, 0, 1, 0, 6, 6, 2, 4, 6, 1, 2, 0, 6, 6, 2, 1, 1, 2]
    masks = [torch.rand(6, 6) < 0.3, torch.ones(5, 7).bool()]
    expected = agree(masks, [], torch.tensor(code), (0, 1, 2))
    assert expected[0][1] == 0
    assert not expected[2].any()


def test_labels_outside_their_range_reach_nothing() -> None:
    labels = [torch.tensor([0, 99, -5, 1], dtype=torch.int32), torch.tensor([1, 0, 99]).int()]
    program = program_of_numbers(0, 1, 0, 6, 5, 0, 1, 0, 1, 2, 1, 1, 1)
    agree([], labels, program, (0, 1, 2))


@pytest.mark.parametrize("at_end", [True, False])
def test_reads_nothing_outside_its_arguments(at_end: bool) -> None:
    for case in (CASES[3], CASES[6]):
        model, x = case()
        program = program_of(model, x)
        masks = random_masks(model, 0.2, 3)
        encoded = program.encode({name: i for i, name in enumerate(masks)})
        labels = [guarded(t, at_end) for t in program.labels]
        agree([guarded(m, at_end) for m in masks.values()], labels, encoded)


def test_strided_and_expanded_masks_and_labels() -> None:
    model, x = CASES[6]()
    program = program_of(model, x)
    masks = random_masks(model, 0.2, 0)
    encoded = program.encode({name: i for i, name in enumerate(masks)})
    labels = [t.repeat_interleave(3)[::3] for t in program.labels]
    dense = list(masks.values())
    emulated.configure(0)
    expected = emulated.ops.path_norm_reach(dense, program.labels, encoded, [], True)
    strided = [m.repeat_interleave(2, dim=0)[::2] for m in dense]
    for a, b in zip(
        emulated.ops.path_norm_reach(strided, labels, encoded, [], True), expected, strict=True
    ):
        assert torch.equal(a, b)
    row = torch.tensor([[True, False, True, True]]).expand(3, 4)
    agree([row], [], program_of_numbers(*GOOD))


@pytest.mark.parametrize(
    ("program", "masks", "message"),
    [
        (torch.tensor([0]), [], "expected more values"),
        (program_of_numbers(9, 0), [], "unknown instruction 9"),
        (program_of_numbers(0, 1, 2), [], "value: expected 0 to 1, got 2"),
        (program_of_numbers(*GOOD), [torch.ones(4, 4).bool()], "expected 12 elements, got 16"),
        (program_of_numbers(*GOOD), [torch.ones(3, 4)], "masks.0.: expected dtype Bool"),
        (program_of_numbers(6, 5, 0, 1, 0, 1, 2), [], "labels: expected 0 to -1"),
        (torch.zeros(2), [], "program: expected dtype Long"),
        (
            torch.tensor(
                [0, 4, 1, 96, 1, 1, 1, 48, 1, 2, 4, 6, 0, 1, 0, 1, 96, 1, 4, 6, 2, 3, 0, 2, 48, 1]
            ),
            [torch.ones(96).bool()],
            "the same rows and columns at every use",
        ),
    ],
)
def test_malformed_programs(program: Tensor, masks: list[Tensor], message: str) -> None:
    for op in (emulated.ops.path_norm_reach, torch.ops.fastprune.path_norm_reach):
        with pytest.raises(RuntimeError, match=message):
            op(masks, [], program, [], False)


def test_counts_are_where_the_masks_are() -> None:
    with torch.device("meta"):
        masks = [torch.ones(3, 4, dtype=torch.bool)]
    program = program_of_numbers(*GOOD)
    counts, active = torch.ops.fastprune.path_norm_reach(masks, [], program, [], True)
    assert counts.device.type == active.device.type == "meta"
