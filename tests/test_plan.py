"""Plans: what they keep changes no result, they die with their pattern, bad ones are refused."""

from __future__ import annotations

import gc
import io
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastprune as fp
from layouts import CONTIGUOUS, batch_last, same_bits
from plan_cases import OPS, check, fresh, make, number, product, random, used

plan_bytes = fp._C.plan_bytes


def test_geometries_take_turns() -> None:
    # More of them than a plan keeps, with strides whose gradients need one translation per residue.
    weight, mask = random(12, 6, 3, 3), random(12, 6, 3, 3, seed=1) > 0.3
    pattern = fp.pack(mask)
    sizes = [(1, 9, 9), (17, 5, 5), (16, 5, 5), (16, 8, 3), (3, 20, 20), (2, 9, 9), (33, 1, 1)]
    for batch, height, width in sizes * 2 + sizes[::-1]:
        for stride, last in itertools.product((1, 2, 3), (False, True)):
            x = random(batch, 6, height, width)
            x = (batch_last(x) if last else x).requires_grad_()
            results = []
            for m in (pattern, mask):
                y = fp.masked_conv2d(x, weight, m, padding=1, stride=stride)
                grad = torch.cos(y.detach())
                results.append([y, *torch.autograd.grad(y, x, grad)])
            for got, wanted in zip(*results, strict=True):
                assert same_bits(got, wanted), (batch, height, width, stride, last)


def test_batches_take_turns(isa: str) -> None:
    # On maps of a few points the panel of the lanes depends on the batch.
    weight, mask = random(12, 6, 3, 3), random(12, 6, 3, 3, seed=1) > 0.3
    pattern = fp.pack(mask)
    for batch in (16, 40, 3, 16, 90, 40):
        x = batch_last(random(batch, 6, 2, 2)).requires_grad_()
        results = []
        for m in (pattern, mask):
            y = fp.masked_conv2d(x, weight, m, padding=1)
            results.append([y, *torch.autograd.grad(y, x, batch_last(y.detach().cos()))])
        for got, wanted in zip(*results, strict=True):
            assert same_bits(got, wanted), batch


def test_one_plan_serves_every_isa(isa: str) -> None:
    # The same pattern under each ISA in turn: nothing that depends on the ISA may be kept.
    before = fp._C.isa()
    layer, x = make("conv")
    for name in ("scalar", before, "scalar", before):
        fp._C.set_isa(name)
        check(layer, x, name)
        last = batch_last(x)
        with torch.no_grad():
            assert same_bits(
                layer(last), product(last, layer.weight, layer.weight_mask, layer.bias)
            )
    fp._C.set_isa(before)


@settings(max_examples=60)
@given(
    kernel=st.sampled_from([None, (1, 1), (3, 3), (2, 3)]),
    groups=st.sampled_from([1, 2, 3]),
    rows=st.sampled_from([1, 3, 63, 64, 65, 130, 200]),
    depth=st.sampled_from([1, 3, 17, 140]),
    density=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
    power=st.sampled_from([0, 1, 6]),
    stride=st.sampled_from([1, 2]),
    batch=st.sampled_from([1, 3, 17, 70]),
    seed=st.integers(0, 2**31),
)
def test_sorted_rows_change_no_bit(
    kernel: tuple[int, int] | None,
    groups: int,
    rows: int,
    depth: int,
    density: float,
    power: int,
    stride: int,
    batch: int,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    groups = 1 if kernel is None else groups
    shape = (rows * groups, depth, *(kernel or ()))
    keep = torch.rand(shape[0], generator=g).view(-1, *[1] * (len(shape) - 1)) ** power
    mask = torch.rand(shape, generator=g) < density * keep
    weight = torch.randn(shape, generator=g)
    pattern = fp.pack(mask, groups=groups)
    if kernel is None:
        batch += 16  # a plan has a bitmap for fewer, which sums in another order
        x = torch.randn(batch, depth, generator=g)
        grad = torch.randn(batch, rows, generator=g)
        dw = OPS.planned_linear_weight_grad(grad, x, number(pattern))
        for _ in range(2):
            y = OPS.planned_linear(x, weight, None, number(pattern), 1, None, False, CONTIGUOUS)
            dx = OPS.planned_linear_input_grad(grad, weight, number(pattern), 1)
        six = pattern[:6]
        raw = [
            OPS.masked_linear(x, weight, None, *six, False),
            OPS.masked_linear_input_grad(grad, weight, *six),
            OPS.masked_linear_weight_grad(grad, x, *six[:2], six[4]),
        ]
    else:
        batch = min(batch, 18)
        x = torch.randn(batch, depth * groups, 4, 5, generator=g)
        geometry = ([stride, 1], [1, 0], [1, 1], groups)
        y = OPS.planned_conv2d(
            x, weight, None, number(pattern), 1, *geometry, None, False, CONTIGUOUS
        )
        grad = torch.randn(y.shape, generator=g)
        dx = OPS.planned_conv2d_input_grad(
            grad, weight, number(pattern), 1, list(x.shape), *geometry
        )
        dw = OPS.planned_conv2d_weight_grad(grad, x, number(pattern), list(shape), *geometry)
        six = pattern[:6]
        raw = [
            OPS.masked_conv2d(x, weight, None, *six, *geometry, False),
            OPS.masked_conv2d_input_grad(grad, weight, *six, list(x.shape), *geometry),
            OPS.masked_conv2d_weight_grad(grad, x, *six[:2], six[4], list(shape), *geometry),
        ]
    for name, got, wanted in zip(("y", "dx", "dw"), (y, dx, dw), raw, strict=True):
        assert same_bits(got, wanted), name


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_uneven_rows_give_the_same_bits_for_any_thread_count(
    isa: str, threads: None, kind: str
) -> None:
    g = torch.Generator().manual_seed(3)
    shape = (300, 90) if kind == "linear" else (300, 10, 3, 3)
    keep = torch.rand(300, generator=g).view(-1, *[1] * (len(shape) - 1)) ** 6
    keep[70:140] = 0  # a whole window without entries
    layer = nn.Linear(90, 300) if kind == "linear" else nn.Conv2d(10, 300, 3, padding=1)
    mask = torch.rand(shape, generator=g) < keep
    masked = (fp.nn.MaskedLinear if kind == "linear" else fp.nn.MaskedConv2d)(layer, mask)
    x = random(5, 90) if kind == "linear" else random(2, 10, 7, 7)
    results = []
    for count in (1, 2, 3, 7, 2):
        torch.set_num_threads(count)
        results.append(used(masked, x))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


# A plan's life.


def test_a_plan_dies_with_its_pattern() -> None:
    ids = []
    for kind in ("linear", "conv"):
        layer, x = make(kind)
        assert layer.pattern.plan.nbytes() == 0  # made at the first call
        own = layer.pattern.nbytes()
        check(layer, x)
        ids.append(number(layer.pattern))
        assert plan_bytes(ids[-1]) > layer.pattern.nnz * 4
        assert layer.pattern.nbytes() == own + plan_bytes(ids[-1])
    pattern = layer.pattern
    del layer
    gc.collect()
    assert [plan_bytes(i) > 0 for i in ids] == [False, True]
    assert plan_bytes(ids[0]) == -1
    del pattern
    gc.collect()
    assert plan_bytes(ids[1]) == -1
    assert not fp._C.release_plan(ids[1])


def test_a_recorded_call_keeps_its_plan_and_a_new_mask_drops_it() -> None:
    layer, x = make("linear")
    expected = fresh(layer, x)
    old = number(layer.pattern)
    y = layer(x)
    layer.set_mask(torch.zeros_like(layer.weight_mask))
    gc.collect()
    assert plan_bytes(old) > 0
    # Setting the mask stored zeros through .data, as the dense layer's user would have to accept;
    # the gradient is sampled at the mask that the forward pass had.
    (dw,) = torch.autograd.grad(y, layer.weight, torch.cos(y.detach()))
    assert same_bits(dw, expected[2])
    del y
    gc.collect()
    assert plan_bytes(old) == -1
    check(layer, x)


def test_many_plans_leave_nothing_behind() -> None:
    ids = []
    for seed in range(200):
        pattern = fp.pack(random(9, 8, seed=seed) > 0)
        fp.masked_linear(random(3, 8), random(9, 8), pattern)
        ids.append(number(pattern))
    del pattern
    gc.collect()
    assert len(set(ids)) == 200
    assert all(plan_bytes(i) == -1 for i in ids)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("transposed_too", [False, True])
def test_tensors_changed_after_packing(kind: str, transposed_too: bool) -> None:
    layer, x = make(kind)
    p, expected = layer.pattern, fresh(layer, x)
    with torch.no_grad():
        assert same_bits(layer(x), expected[0])
    if transposed_too:
        check(layer, x)
    keep = [t.clone() for t in p[:4]]
    tensors = p[:4] if transposed_too else p[:2]
    for fill in (-1, 0, 32767, 5):
        for t in tensors:  # the plan has its own copy of all that it has used
            t.fill_(fill)
        for got, wanted in zip(used(layer, x), expected, strict=True):
            assert same_bits(got, wanted)
    for t, old in zip(p[:4], keep, strict=True):
        t.copy_(old)
    for name in ("row_ptr", "offset"):  # before the plan was made: an error at the first call
        broken = fp.pack(layer.weight_mask)
        getattr(broken, name).fill_(32767)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"make_plan: (row_ptr|offset): expected"):
                product(x, layer.weight, broken)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_wrong_transpose_is_an_error_at_the_first_backward_pass(kind: str) -> None:
    layer, x = make(kind)
    good = layer.pattern
    other = fp.pack(layer.weight_mask.flip(0))
    assert other.nnz == good.nnz
    fills = {
        "another mask's": lambda p: [t.copy_(s) for t, s in zip(p[2:4], other[2:4], strict=True)],
        "rolled": lambda p: p.transposed_offset.copy_(torch.roll(p.transposed_offset, 1)),
        "negative": lambda p: p.transposed_offset.fill_(-1),
        "too large": lambda p: p.transposed_offset.fill_(32767),
        "zeros": lambda p: p.transposed_offset.zero_(),
        "no bounds": lambda p: p.transposed_row_ptr.zero_(),
        "wild bounds": lambda p: p.transposed_row_ptr.fill_(2**62),
        "falling bounds": lambda p: p.transposed_row_ptr.copy_(p.transposed_row_ptr.flip(0)),
        "random": lambda p: p.transposed_offset.random_(0, 10),
    }
    with torch.no_grad():
        expected = layer(x)
    for name, fill in fills.items():
        pattern = fp.pack(layer.weight_mask)
        fill(pattern)
        for _ in range(2):
            y = product(x.clone().requires_grad_(), layer.weight, pattern, layer.bias)
            assert same_bits(y.detach(), expected), name
            with pytest.raises(RuntimeError, match="transposed_"):
                y.sum().backward()
        frozen = layer.weight.detach()
        y = product(x, layer.weight, pattern)  # the weight's gradient does not need the transpose
        y.sum().backward()
        assert same_bits(product(x, frozen, pattern, layer.bias.detach()), expected), name


def test_no_memory_for_the_transpose_leaves_the_plan_usable() -> None:
    code = """
import resource, torch, fastprune as fp
ops = torch.ops.fastprune
weight, mask = torch.ones(320, 30000), torch.ones(320, 30000, dtype=torch.bool)
grad = torch.ones(1, 320)
pattern = fp.pack(mask)
plan = pattern.plan.number(pattern)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), hard))
errors = 0
for _ in range(3):
    try:
        ops.planned_linear_input_grad(grad, weight, plan, -1)
    except (MemoryError, RuntimeError):
        errors += 1
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert errors == 3, errors
dx = ops.planned_linear_input_grad(grad, weight, plan, -1)
assert torch.equal(dx, torch.full((1, 30000), 320.0))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.returncode} {run.stderr[-2000:]}"


# Copies, files, graphs, processes.


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_files_hold_no_plan(kind: str) -> None:
    layer, x = make(kind)
    check(layer, x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.pattern.plan is not layer.pattern.plan
    assert loaded.pattern.plan.nbytes() == 0
    check(loaded, x)
    assert number(loaded.pattern) != number(layer.pattern)
    with torch.no_grad():
        loaded.weight.neg_()
    check(loaded, x)
    check(layer, x)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_graphs_hold_no_plan(kind: str) -> None:
    layer, x = make(kind)
    layer.eval()
    check(layer, x)  # the plan exists before anything is recorded
    with torch.no_grad():
        expected = layer(x)
    graphs = []

    def backend(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(module.code)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert same_bits(compiled(x), expected)
    assert same_bits(compiled(x).detach(), expected)
    from torch.fx.experimental.proxy_tensor import make_fx

    for strict in (False, True):
        program = torch.export.export(layer, (x,), strict=strict)
        graphs.append(str(program.graph))
        torch.testing.assert_close(program.module()(x), expected)
    traced = make_fx(layer)(x)
    graphs.append(traced.code)
    for text in graphs:
        assert "planned_" not in text
        assert f"masked_{'linear' if kind == 'linear' else 'conv2d'}" in text
    with torch.no_grad():
        layer.weight.mul_(2)
        assert same_bits(compiled(x), layer(x))
        assert same_bits(traced(x), layer(x))
    check(layer, x)


class Outputs(Dataset[Tensor]):
    def __init__(self, layer: Any, x: Tensor) -> None:
        self.layer, self.x = layer, x

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            if index:  # the child's own copy changes
                self.layer.weight.mul_(2)
            y = self.layer(self.x)
            assert same_bits(y, fresh(self.layer, self.x)[0])
        return y


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_fork_after_use(kind: str) -> None:
    layer, x = make(kind)
    check(layer, x)
    with torch.no_grad():
        expected = layer(x)
    loader = DataLoader(
        Outputs(layer, x),
        batch_size=None,
        num_workers=1,
        timeout=60,
        multiprocessing_context="fork",
    )
    results = list(loader)
    assert same_bits(results[0], expected)
    assert not torch.equal(results[1], expected)
    check(layer, x)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_threads_share_one_pattern_with_two_weights(kind: str) -> None:
    layer, x = make(kind)
    pattern, bias = layer.pattern, layer.bias.detach()
    inputs = [x, batch_last(x), x[:3], x.flip(0)]
    weights = [layer.weight.detach(), -2 * layer.weight.detach()]

    def job(i: int) -> list[Tensor]:
        x, w = inputs[i % 4].detach().clone(), weights[i // 4 % 2]
        if i % 3 == 0:
            return [product(x, w, pattern, bias)]
        x, w = x.requires_grad_(), w.clone().requires_grad_() if i % 3 == 1 else w
        y = product(x, w, pattern, bias)
        return [y.detach(), *torch.autograd.grad(y, x, torch.cos(y.detach()))]

    serial = [job(i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for i, got in enumerate(pool.map(job, [*range(24)] * 12)):
            for a, b in zip(got, serial[i % 24], strict=True):
                assert same_bits(a, b), i


def test_threads_make_and_drop_plans() -> None:
    x, w = random(19, 37), random(70, 37)
    masks = [random(70, 37, seed=s) > 0 for s in range(4)]
    expected = [fp.masked_linear(x, w, m) for m in masks]
    shared = [fp.pack(m) for m in masks]

    def job(i: int) -> bool:
        pattern = shared[i % 4] if i % 2 else fp.pack(masks[i % 4])
        return same_bits(fp.masked_linear(x, w, pattern), expected[i % 4])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(job, range(400)))


# What is fused into a product.
