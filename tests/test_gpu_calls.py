"""How a GPU's user calls the ops: plans, graphs, streams, devices, compilers, autocast, repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastprune as fp
import gpu
from gpu import form, on, strict_products  # noqa: F401
from layouts import same_bits
from oracle import assert_within, linear_exact
from plan_cases import fresh, make, random, used

pytestmark = gpu.needs_device
OPS = torch.ops.fastprune
BATCHES = [1, 8, 33, 200]


def operands(batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """x, weight, mask of a linear product on the device."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(batch, 200, generator=g), torch.randn(96, 200, generator=g)
    mask = torch.rand(96, 200, generator=g) < 0.2
    return on(x.to(dtype), w.to(dtype), mask)


def close(a: Tensor, b: Tensor) -> None:
    """Equal but for the order of float32 sums and one rounding."""
    rtol = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(a.dtype, 1e-4)
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-4)


def check(layer: Any, x: Tensor, what: str = "") -> None:
    """A layer with a plan against a call that keeps nothing, which may take another kernel."""
    for name, got, wanted in zip(
        ("y", "dx", "dw", "db"), used(layer, x), fresh(layer, x), strict=True
    ):
        try:
            close(got, wanted)
        except AssertionError as error:
            raise AssertionError(f"{what} {name}: {error}") from None


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_follows_its_weight(kind: str, dtype: torch.dtype) -> None:
    layer, x = make(kind, dtype=dtype)
    layer, x = layer.to(gpu.DEVICE), x.to(gpu.DEVICE)
    check(layer, x)
    with torch.no_grad():
        layer.weight.mul_(-2)
    check(layer, x, "changed in place")
    layer.weight.data.add_(1)
    layer.eval()  # what tells a layer about changes through .data
    check(layer, x, "changed through .data")
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))
    check(layer, x, "replaced")
    layer.set_mask(~layer.weight_mask)
    check(layer, x, "another mask")


def test_training_steps_match_the_dense_layer() -> None:
    layer, x = make("linear")
    dense = torch.nn.Linear(37, 70)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        dense.bias.copy_(layer.bias)
    layer, dense, x = layer.to(gpu.DEVICE), dense.to(gpu.DEVICE), x.to(gpu.DEVICE)
    mask = layer.weight_mask
    fast = torch.optim.AdamW(layer.parameters(), lr=0.05, fused=gpu.ON_CUDA or None)
    slow = torch.optim.AdamW(dense.parameters(), lr=0.05, fused=gpu.ON_CUDA or None)
    for _ in range(5):
        for module, optimizer in ((layer, fast), (dense, slow)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            if module is dense:
                dense.weight.grad.mul_(mask)
            optimizer.step()
    kept = torch.where(mask, layer.weight, 0.0)
    torch.testing.assert_close(kept, torch.where(mask, dense.weight, 0.0), rtol=1e-3, atol=1e-4)


@gpu.needs_cuda
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_replays_with_other_inputs(form: str, dtype: torch.dtype, batch: int) -> None:  # noqa: F811
    x, weight, mask = operands(batch, dtype)
    pattern = fp.pack(mask)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    fp.masked_linear(x, weight, pattern)
        except (RuntimeError, ValueError) as error:
            if form == "auto" or form not in str(error):
                raise
            return
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fp.masked_linear(x, weight, pattern)
        for seed in (1, 2):
            other = operands(batch, dtype, seed)[0]
            expected = fp.masked_linear(other, weight, pattern)
            x.copy_(other)
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, expected)


@gpu.needs_cuda
def test_a_graph_of_a_training_step() -> None:
    layer, x = make("linear")
    layer, x = layer.to(gpu.DEVICE), x.to(gpu.DEVICE)
    step = torch.cuda.make_graphed_callables(layer, (x.clone().requires_grad_(),))
    for seed in (1, 2):
        other = random(*x.shape, seed=seed).to(gpu.DEVICE).requires_grad_()
        (dx,) = torch.autograd.grad(step(other).sum(), other)
        w = torch.where(layer.weight_mask, layer.weight, 0.0)
        close(dx, torch.ones(x.shape[0], w.shape[0], device=x.device) @ w)


@gpu.needs_cuda
def test_a_graph_of_a_convolution() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 8, 14, 14, generator=g), torch.randn(10, 8, 3, 3, generator=g)
    x, weight, mask = on(x, weight, torch.rand(10, 8, 3, 3, generator=g) < 0.3)
    pattern = fp.pack(mask)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            fp.masked_conv2d(x, weight, pattern, padding=1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fp.masked_conv2d(x, weight, pattern, padding=1)
        x.neg_()
        graph.replay()
        assert torch.equal(y, fp.masked_conv2d(x, weight, pattern, padding=1))


@gpu.needs_cuda
@pytest.mark.parametrize("score", ["magnitude", "saliency"])
def test_a_graph_of_a_selection(score: Any) -> None:
    g = torch.Generator().manual_seed(0)
    values, other = on(torch.randn(70_001, generator=g), torch.randn(70_001, generator=g))
    options = {"k": 20_000, "score": score, "other": [other] if score == "saliency" else None}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fp.global_topk_mask([values], **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (mask,) = fp.global_topk_mask([values], **options)
    for seed in (1, 2):
        values.copy_(torch.randn(values.shape, generator=g.manual_seed(seed)))
        graph.replay()
        assert torch.equal(mask, fp.global_topk_mask([values], **options)[0])
    values[5] = float("nan")
    graph.replay()
    torch.cuda.synchronize()
    # Nothing waits for a replay: the next call says what it met.
    with pytest.raises((ValueError, RuntimeError), match="NaN"):
        fp.global_topk_mask([other], k=5)
    fp.global_topk_mask([other], k=5)


@gpu.needs_cuda
@pytest.mark.parametrize("batch", BATCHES)
def test_work_goes_to_the_current_stream(batch: int) -> None:
    """On a side stream behind a long pause: on any other stream it would read stale inputs."""
    x, weight, mask = operands(batch)
    pattern = fp.pack(mask)
    expected = fp.masked_linear(x, weight, pattern)
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        y = fp.masked_linear(late, weight, pattern)
        (selected,) = fp.global_topk_mask([late], k=late.numel() // 3, score="magnitude")
        torch.cuda.current_stream().synchronize()
        assert torch.equal(y, expected)
        assert int(selected.sum()) == late.numel() // 3


@gpu.needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device() -> None:
    x, weight, mask = operands(9)
    expected = fp.masked_linear(x, weight, mask)
    assert torch.cuda.current_device() == 0
    there = [t.to("cuda:1") for t in (x, weight, mask)]
    y = fp.masked_linear(*there)
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.to("cuda:0"), expected)
    (chosen,) = fp.global_topk_mask([there[1]], 0.3, score="magnitude")
    (first,) = fp.global_topk_mask([weight], 0.3, score="magnitude")
    assert torch.equal(chosen.to("cuda:0"), first)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("runs", [100 if gpu.ON_CUDA else 3])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(
    form: str,  # noqa: F811
    dtype: torch.dtype,
    batch: int,
    runs: int,
) -> None:
    x, weight, mask = operands(batch, dtype)
    pattern = fp.pack(mask)
    x.requires_grad_(), weight.requires_grad_()
    grad = torch.randn(batch, 96, device=x.device).to(dtype)

    def once() -> list[Tensor]:
        y = fp.masked_linear(x, weight, pattern)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]

    try:
        first = once()
    except (RuntimeError, ValueError) as error:
        if form == "auto" or form not in str(error):
            raise
        return
    same = [torch.ones((), dtype=torch.bool, device=x.device)]
    for _ in range(runs):
        same += [a.eq(b).all() for a, b in zip(once(), first, strict=True)]
    assert bool(torch.stack(same).all())
    assert all(same_bits(a, b) for a, b in zip(once(), first, strict=True))


def test_the_same_bits_in_a_convolution() -> None:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(34, 20, 3, 3, generator=g) < 0.2
    x, w = torch.randn(5, 20, 14, 14, generator=g), torch.randn(34, 20, 3, 3, generator=g)
    x, w, mask = on(x, w, mask)
    x.requires_grad_(), w.requires_grad_()
    results = []
    for _ in range(20 if gpu.ON_CUDA else 2):
        y = fp.masked_conv2d(x, w, mask, padding=1)
        results.append([y.detach(), *torch.autograd.grad(y.cos().sum(), (x, w))])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_linear(bias: bool) -> None:
    x, w, mask = operands(3)
    x, w, mask = x[:, :10].contiguous(), w[:6, :10].contiguous(), mask[:6, :10].contiguous()
    pattern = fp.pack(mask)
    b = torch.randn(6, device=x.device, requires_grad=True) if bias else None
    x.requires_grad_(), w.requires_grad_()
    for dense in (False, True):
        torch.library.opcheck(OPS.masked_linear.default, (x, w, b, *pattern[:6], dense))
    grad = torch.randn(3, 6, device=x.device)
    torch.library.opcheck(OPS.masked_linear_input_grad.default, (grad, w.detach(), *pattern[:6]))
    sampled = (grad, x.detach(), *pattern[:2], pattern[4])
    torch.library.opcheck(OPS.masked_linear_weight_grad.default, sampled)


def test_opcheck_conv2d_and_selection() -> None:
    x, w = on(random(2, 4, 5, 6), random(6, 4, 3, 3, seed=1))
    pattern = fp.pack(w.abs() < 0.7)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x.requires_grad_(), w.requires_grad_()
    torch.library.opcheck(OPS.masked_conv2d.default, (x, w, None, *pattern[:6], *geometry, False))
    values = [t.detach() for t in (x, w)]
    for scope, counts in (("global", [7]), ("layer", [3, 4])):
        arguments = (values, [], [], counts, scope, "magnitude")
        torch.library.opcheck(OPS.global_topk_mask.default, arguments)


BACKENDS = ["aot_eager", "inductor"] if gpu.ON_CUDA else ["aot_eager"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend: str) -> None:
    x, weight, mask = operands(9)
    pattern = fp.pack(mask)
    x.requires_grad_(), weight.requires_grad_()

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return torch.relu(fp.masked_linear(x, weight, pattern)) * 2

    compiled: Any = torch.compile(f, fullgraph=True, backend=backend)
    y, got = f(x, weight), compiled(x, weight)
    close(got, y)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (x, weight)),
        torch.autograd.grad(y.sum(), (x, weight)),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype: torch.dtype) -> None:
    x, weight, mask = operands(9)
    weight.requires_grad_()
    with torch.autocast(gpu.DEVICE.type, dtype=dtype):
        y = fp.masked_linear(x, weight, mask)
        dense = torch.nn.functional.linear(x, torch.where(mask, weight, 0.0))
    assert y.dtype == dense.dtype == dtype
    exact = linear_exact(x.to(dtype).cpu(), weight.detach().to(dtype).cpu(), mask.cpu(), None)
    assert_within(y.cpu(), *exact, "autocast")
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert not weight.grad[~mask].any()


def test_many_plans_come_and_go() -> None:
    """Memory of plans is given back, also with work in flight."""
    x, weight, mask = operands(8)
    expected = fp.masked_linear(x, weight, mask)
    used = []
    for i in range(40):
        pattern = fp.pack(mask)
        assert torch.equal(fp.masked_linear(x, weight, pattern), expected)
        del pattern
        if gpu.ON_CUDA and i in (9, 39):
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    assert len(set(used)) <= 1 or used[1] <= used[0] + (1 << 20)
