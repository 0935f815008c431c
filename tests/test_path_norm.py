"""Reach through networks, against the all-ones pass and perturbation; malformed programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from effective_models import CASES, Case, random_masks
from fastprune.ops.path_norm import path_norm_reach
from fastprune.reference import path_norm as reference


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.1, 0.3, 0.6, 1.0])
def test_agrees_with_the_all_ones_pass(case: Callable[[], Case], density: float, isa: str) -> None:
    model, x = case()
    for seed in range(4):
        masks = random_masks(model, density, seed)
        expected = reference.active(model, masks, x)
        found = fp.effective_masks(model, masks, example_input=x)
        wrong = [n for n in masks if not torch.equal(found[n], expected[n])]
        assert not wrong, f"{case.__name__}, density {density}, seed {seed}: {wrong}"
        active = sum(int(m.sum()) for m in expected.values())
        total = sum(m.numel() for m in masks.values())
        sparsity = fp.effective_sparsity(model, masks, example_input=x)
        assert sparsity == pytest.approx(1 - active / total, abs=1e-12)


class Small(nn.Module):
    """A graph with a skip, small enough for all its masks: 12 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.skip = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 1, bias=False)
        self.last = nn.Linear(1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.relu(self.first(x)))) + self.skip(x)


class SmallConv(nn.Module):
    """A convolution whose padding matters, then positions that are read one by one: 11 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.again = nn.Conv1d(1, 1, 3, stride=2, padding=1, bias=False)
        self.out = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.again(torch.relu(self.conv(x)))).flatten(1))


@pytest.mark.parametrize(
    ("make", "x"), [(Small, torch.ones(1, 2)), (SmallConv, torch.ones(1, 1, 3))]
)
def test_every_mask_of_a_small_graph_against_perturbing_each_weight(
    make: type[nn.Module], x: Tensor
) -> None:
    """With positive weights and inputs nothing cancels: a weight is active if the output moves."""
    torch.manual_seed(0)
    model = make().double()
    weights = dict(model.named_parameters())
    sizes = {n: p.numel() for n, p in weights.items()}
    values = {n: torch.rand(p.shape, dtype=torch.float64) + 0.5 for n, p in weights.items()}
    total = sum(sizes.values())
    for bits in itertools.product((False, True), repeat=total):
        flat = torch.tensor(bits)
        parts = dict(zip(weights, flat.split(list(sizes.values())), strict=True))
        masks = {n: parts[n].view(p.shape) for n, p in weights.items()}
        found = fp.effective_masks(model, masks, example_input=x.double())
        with torch.no_grad():
            for n, p in weights.items():
                p.copy_(values[n] * masks[n])
            before = model(x.double())
            for n, p in weights.items():
                for i in range(p.numel()):
                    kept = p.view(-1)[i].item()
                    if not masks[n].view(-1)[i]:
                        assert not found[n].view(-1)[i]
                        continue
                    p.view(-1)[i] = kept + 1.0
                    moved = not torch.equal(model(x.double()), before)
                    p.view(-1)[i] = kept
                    assert bool(found[n].view(-1)[i]) == moved, (bits, n, i)


def test_a_tap_that_only_meets_padding_is_inactive() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    masks = {"weight": torch.ones(4, 3, 3, 3, dtype=torch.bool)}
    found = fp.effective_masks(conv, masks, example_input=torch.zeros(1, 3, 1, 1))["weight"]
    expected = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    expected[:, :, 1, 1] = True
    assert torch.equal(found, expected)
    assert fp.effective_sparsity(conv, masks, example_input=torch.zeros(1, 3, 1, 1)) == 1 - 1 / 9


def test_deep_networks_do_not_underflow() -> None:
    layers = [nn.Linear(8, 8, bias=False) for _ in range(1000)]
    model = nn.Sequential(*layers)
    masks = {n: torch.eye(8, dtype=torch.bool) for n, _ in model.named_parameters()}
    assert fp.effective_sparsity(model, masks, example_input=torch.zeros(1, 8)) == 1 - 1 / 8
    masks["500.weight"] = torch.zeros(8, 8, dtype=torch.bool)
    assert fp.effective_sparsity(model, masks, example_input=torch.zeros(1, 8)) == 1.0


def test_cycles_settle() -> None:
    """in -> a -> b -> out, with a weight from b back to a: a sweep more finds what it brings."""
    # Values: 0 in, 1 a, 2 b, 3 b's return to a, 4 the sum that a's layer reads; of 2 features.
    code = [1, 5, *[1, 2] * 5]
    code += [0, 1, 0]  # input 0
    code += [2, 3, 4, 0, 3]  # 4 = 0 or 3
    code += [4, 6, 4, 1, 0, 2, 2, 1]  # a = W0 (4)
    code += [4, 6, 1, 2, 1, 2, 2, 1]  # b = W1 a
    code += [4, 6, 2, 3, 2, 2, 2, 1]  # 3 = W2 b
    code += [1, 1, 2]  # output b
    first = torch.tensor([[True, False], [False, True]])
    second = torch.tensor([[True, False], [False, True]])
    back = torch.tensor([[False, True], [False, False]])
    masks = [first, second, back]
    counts, *active = path_norm_reach(masks, [], torch.tensor(code), write=True)
    assert counts.tolist() == [2, 2, 1]
    assert all(torch.equal(a, m) for a, m in zip(active, masks, strict=True))
    # Without inputs to the second feature the return is all that feeds the first one's ... twice.
    masks[0] = torch.tensor([[True, False], [False, False]])
    counts, *active = path_norm_reach(masks, [], torch.tensor(code), write=True)
    assert counts.tolist() == [1, 1, 0]


def program_of(*tail: int, values: tuple[tuple[int, int], ...] = ((1, 4), (1, 3))) -> Tensor:
    return torch.tensor([0, len(values), *itertools.chain(*values), *tail])


GOOD = (0, 1, 0, 4, 6, 0, 1, 0, 3, 4, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("program", "masks", "message"),
    [
        (torch.tensor([0]), [], "expected more values"),
        (torch.tensor([0, -1]), [], "number of values"),
        (torch.tensor([0, 9]), [], "expected the sizes of 9 values"),
        (torch.tensor([0, 1, 2**62, 2**62]), [], "does not fit 64 bits"),
        (torch.tensor([0, 1, 1, -4]), [], "bits: expected at least 0"),
        (program_of(9, 0), [], "unknown instruction 9"),
        (program_of(0, 1, 2), [], "value: expected 0 to 1, got 2"),
        (program_of(0, 1, -1), [], "value: expected 0 to 1, got -1"),
        (program_of(0, 5, 0), [], "expected 5 arguments, got 1"),
        (program_of(0, 2, 0, 1), [], "arguments fewer"),
        (program_of(5, 2, 0, 1), [], "copy: expected as many elements"),
        (program_of(2, 2, 0, 1), [], "join: expected 1 planes of 4 bits"),
        (program_of(4, 6, 0, 1, 0, 3, 4, 1), [], "mask: expected -1"),
        (program_of(4, 6, 0, 1, 0, 4, 4, 1), [torch.ones(4, 4).bool()], "linear output"),
        (program_of(*GOOD), [torch.ones(4, 4).bool()], "expected 12 elements, got 16"),
        (program_of(*GOOD), [torch.ones(3, 4)], "masks.0.: expected dtype Bool"),
        (program_of(6, 5, 0, 1, 0, 1, 2), [], "labels: expected 0 to -1"),
        (torch.zeros(2), [], "program: expected dtype Long"),
    ],
)
def test_malformed_programs(program: Tensor, masks: list[Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        path_norm_reach(masks, [], program)


def test_labels_outside_their_range_reach_nothing() -> None:
    labels = [torch.tensor([0, 99, -5, 1], dtype=torch.int32), torch.tensor([1, 0, 99]).int()]
    program = program_of(0, 1, 0, 6, 5, 0, 1, 0, 1, 2, 1, 1, 1)
    _, forward, backward = path_norm_reach([], labels, program, inspect=[1])
    assert forward.tolist() == [True, True, False]
    assert backward.all()


def test_same_result_from_run_to_run_and_for_strided_masks() -> None:
    model, x = CASES[1]()
    masks = random_masks(model, 0.2, 0)
    once = fp.effective_masks(model, masks, example_input=x)
    strided = {n: m.repeat_interleave(2, dim=0)[::2] for n, m in masks.items()}
    for _ in range(20):
        assert fp.effective_masks(model, strided, example_input=x) == once


def test_opcheck() -> None:
    masks = [torch.rand(3, 4) < 0.5]
    arguments = (masks, [], program_of(*GOOD), [], True)
    torch.library.opcheck(torch.ops.fastprune.path_norm_reach.default, arguments)
