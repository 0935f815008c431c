"""Effective sparsity on a GPU: what the CPU finds, without a synchronisation, in a graph too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastprune as fp
from effective_models import CASES, Case, random_masks
from fastprune.effective.trace import program_of
from fastprune.ops.backend import has_kernel

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_kernel("path_norm_reach", "cuda")), reason="needs a GPU"
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("density", [0.03, 0.1, 0.3, 1.0])
def test_finds_what_the_cpu_finds(case: Callable[[], Case], density: float) -> None:
    model, x = case()
    masks = random_masks(model, density, 0)
    expected = fp.effective_masks(model, masks, example_input=x)
    sparsity = fp.effective_sparsity(model, masks, example_input=x)
    model.cuda()
    found = fp.effective_masks(model, masks, example_input=x.cuda())
    assert all(found[n].is_cuda and torch.equal(found[n].cpu(), expected[n]) for n in masks)
    assert fp.effective_sparsity(model, masks, example_input=x.cuda()) == sparsity


def on_gpu(case: Callable[[], Case], density: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Masks, labels and program of a case; the program stays on the CPU."""
    model, x = case()
    program = program_of(model, x)
    masks = random_masks(model, density, 1)
    encoded = program.encode({name: i for i, name in enumerate(masks)})
    return [m.cuda() for m in masks.values()], program.labels_on(torch.device("cuda")), encoded


def test_nothing_is_waited_for() -> None:
    masks, labels, program = on_gpu(CASES[6], 0.2)
    torch.ops.fastprune.path_norm_reach(masks, labels, program, [], True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.fastprune.path_norm_reach(masks, labels, program, [], True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_graph_with_other_masks() -> None:
    masks, labels, program = on_gpu(CASES[6], 0.2)
    torch.ops.fastprune.path_norm_reach(masks, labels, program, [0], True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.ops.fastprune.path_norm_reach(masks, labels, program, [0], True)
    others, _, _ = on_gpu(CASES[6], 0.6)
    for mask, other in zip(masks, others, strict=True):
        mask.copy_(other)
    graph.replay()
    on_cpu = [t.cpu() for t in labels]
    expected = torch.ops.fastprune.path_norm_reach(
        [m.cpu() for m in masks], on_cpu, program, [0], True
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b)


def test_cycles_and_labels_on_the_cpu() -> None:
    n = 70
    ring = torch.eye(n, dtype=torch.bool).roll(1, dims=0)
    ring[0, -1] = False
    first = torch.zeros(n, n, dtype=torch.bool)
    first[0, 3] = True
    wanted = torch.full((n,), -1, dtype=torch.int32)
    wanted[n - 2] = n - 2
    labels = [torch.arange(n, dtype=torch.int32), wanted]
    # Values: 0 in, 1 the sum that the ring reads, 2 what it gives, 3 what comes first, 4 one of 1.
    code = [1, 5, *[1, n] * 5, 0, 1, 0, 4, 6, 0, 3, 0, n, n, 1, 6, 5, 1, 4, 0, 1, n]
    code += [2, 3, 1, 2, 3, 4, 6, 1, 2, 1, n, n, 1, 1, 1, 4]
    arguments = (labels, torch.tensor(code), list(range(5)), True)
    expected = torch.ops.fastprune.path_norm_reach([first, ring], *arguments)
    found = torch.ops.fastprune.path_norm_reach([first.cuda(), ring.cuda()], *arguments)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b)


def test_masks_on_two_devices_are_refused() -> None:
    masks = [torch.ones(3, 4, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool).cuda()]
    program = torch.tensor([0, 2, 1, 4, 1, 3, 0, 1, 0, 4, 6, 0, 1, 0, 3, 4, 1, 1, 1, 1])
    with pytest.raises(RuntimeError, match=r"masks.0.: expected all masks on one device"):
        torch.ops.fastprune.path_norm_reach(masks, [], program, [], False)
