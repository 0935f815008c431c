"""Small calls of every op: ``compute-sanitizer --tool T python3 sanitize_cuda.py [PART ...]``.

Sizes off every tile, empty and dense masks, views that are not aligned, a side stream and a
captured graph. Results are compared with torch's dense ops, loosely: the tests do that exactly.
With FASTPRUNE_TEST_DEVICE=cpu the script tries itself.
"""

from __future__ import annotations

import itertools
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from fastprune.ops.mon_fourier import pack_blocks, solve_maps
from fastprune.ops.mon_operator import LinearOperator, LinearStructure, Settings

DEVICE = torch.device(os.environ.get("FASTPRUNE_TEST_DEVICE") or "cuda")
ON_CUDA = DEVICE.type == "cuda"
FORMS = ("auto", "deltas", "bitmap", "tensor_core", "panel", "dense", "sampled")


def close(a: Tensor, b: Tensor, what: str) -> None:
    a, b = a.detach().double(), b.detach().double()
    error = float((a - b).norm()) / max(float(b.norm()), 1.0)
    if not error < 2e-2:
        raise AssertionError(f"{what}: relative error {error}")


def misaligned(t: Tensor) -> Tensor:
    """The same values, one element off the alignment of its memory."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


def one_linear(
    shape: tuple[int, int], batch: int, density: float, dtype: torch.dtype, odd: bool
) -> None:
    x = torch.randn(batch, shape[1], device=DEVICE).to(dtype)
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    mask = torch.rand(shape, device=DEVICE) < density
    if odd:
        x, weight = misaligned(x), misaligned(weight)
    x.requires_grad_(), weight.requires_grad_()
    pattern = fp.pack(mask)
    y = fp.masked_linear(x, weight, pattern)
    dense = F.linear(x, torch.where(mask, weight, 0.0))
    what = f"linear {shape} batch {batch} density {density} {dtype}"
    close(y, dense, what)
    grad = torch.randn_like(y)
    for got, right in zip(
        torch.autograd.grad(y, (x, weight), grad),
        torch.autograd.grad(dense, (x, weight), grad),
        strict=True,
    ):
        close(got, right, what)


def linear() -> None:
    shapes = [(1, 1), (17, 33), (65, 130), (130, 257)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    batches, densities = (1, 7, 8, 9, 190), (0.0, 0.05, 0.4, 1.0)
    for i, (batch, density) in enumerate(itertools.product(batches, densities)):
        one_linear(shapes[i % 4], batch, density, dtypes[i % 3], odd=i % 2 == 1)
        one_linear(shapes[-1], batch, density, dtypes[(i + 1) % 3], odd=i % 4 == 0)


def every_form() -> None:
    choose = getattr(fp._C, "set_cuda_form", None)
    if choose is None or not ON_CUDA:
        return
    for name in FORMS:
        choose(name)
        for batch, dtype in itertools.product((1, 8, 9, 40, 130), (torch.float32, torch.bfloat16)):
            try:
                one_linear((67, 131), batch, 0.3, dtype, odd=False)
            except (RuntimeError, ValueError) as error:
                if name == "auto" or name not in str(error):  # a form may refuse, saying so
                    raise
    choose("auto")


def convolution() -> None:
    maps = [(1, 3, 5, 9, 7, 1), (2, 8, 17, 14, 14, 1), (9, 6, 8, 7, 7, 2)]
    for (batch, inputs, outputs, height, width, groups), dtype, density in itertools.product(
        maps, (torch.float32, torch.bfloat16), (0.0, 0.2, 1.0)
    ):
        x = torch.randn(batch, inputs, height, width, device=DEVICE).to(dtype).requires_grad_()
        weight = torch.randn(outputs, inputs // groups, 3, 3, device=DEVICE).to(dtype)
        mask = torch.rand(weight.shape, device=DEVICE) < density
        weight.requires_grad_()
        pattern = fp.pack(mask, groups=groups)
        y = fp.masked_conv2d(x, weight, pattern, None, 1, 1, 1, groups)
        dense = F.conv2d(x, torch.where(mask, weight, 0.0), None, 1, 1, 1, groups)
        close(y, dense, f"conv {batch} {inputs} {outputs} {dtype} {density}")
        torch.autograd.grad(y.sum(), (x, weight))


def selection() -> None:
    for n, dtype in itertools.product((1, 33, 4097, 70_001), (torch.float32, torch.bfloat16)):
        random = torch.randn(n, device=DEVICE).to(dtype)
        equal, zero = torch.ones_like(random), torch.zeros_like(random)
        for values in ([random], [equal, zero[:7]], [misaligned(random), equal[:3], random[:0]]):
            total = sum(v.numel() for v in values)
            for k in (0, total // 3, total):
                masks = fp.global_topk_mask(values, k=k, score="magnitude")
                if sum(int(m.sum()) for m in masks) != k:
                    raise AssertionError(f"selection: n {n}, {dtype}, k {k}")
        within = [torch.rand(n, device=DEVICE) < 0.5]
        k = int(within[0].sum()) // 2
        options = {"score": "saliency", "other": [equal], "within": within}
        fp.global_topk_mask([random], k=k, packed=True, **options)  # type: ignore[arg-type]
        rows = random[: n - n % 3].view(-1, 3)
        fp.global_topk_mask([rows], k=[1], scope="neuron")
        fp.global_topk_mask([rows], 0.5, scope="filter", score="square")
        fp.global_topk_sweep([random], (0.5, 0.1, 0.9), score="magnitude")


def equilibria() -> None:
    """Both forms of the fully connected solve, sparse products, and maps."""
    sizes = ((33, 3, 1.0), (131, 5, 1.0), (131, 5, 0.03))
    for (n, batch, density), solver in itertools.product(sizes, ("fb", "pr")):
        masks = [torch.rand(n, n, device=DEVICE) < density for _ in range(2)]
        scale = 0.3 / (n * density) ** 0.5
        a, b = (torch.randn(n, n, device=DEVICE) * scale * m for m in masks)
        bias = torch.randn(batch, n, device=DEVICE)
        kept = (None, None) if density == 1.0 else (masks[0], masks[1])
        operator = LinearOperator(a, b, 1.0, n, bias, LinearStructure(n, True, True, *kept))
        for per_sample in (False, True):
            s = Settings("relu", solver, 1.0 if solver == "pr" else 0.5, 1e-4, 60, per_sample)
            z = operator.solve(bias, s).out
            close(z, torch.relu(z @ operator.w.t() + bias), f"equilibrium {n} {density} {solver}")
            u = operator.adjoint(bias, (z > 0).float(), s, True).out
            close(u, (z > 0) * (u @ operator.w + bias), f"adjoint {n} {density} {solver}")
    blocks = torch.eye(5, device=DEVICE).to(torch.complex64).expand(6 * 5, 5, 5) * 0.5
    bias = torch.randn(6, 5, 6, 9, device=DEVICE)
    packed = pack_blocks(blocks.contiguous(), (6, 9))
    inverse = pack_blocks(blocks / 0.75, (6, 9))  # 1 / (2 - 0.5)
    for resolvent, per_sample in itertools.product((None, inverse), (False, True)):
        options = {"resolvent": resolvent, "ring": 1, "tol": 1e-5, "per_sample": per_sample}
        z = solve_maps(bias, packed, **options).out  # type: ignore[arg-type]
        close(z[:, :, 1:-1, 1:-1], 2 * bias[:, :, 1:-1, 1:-1].relu(), "equilibrium of maps")


def graphs() -> None:
    """Needs torch's caching allocator: cudaMalloc cannot be captured."""
    if not ON_CUDA or os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return
    for batch, dtype in itertools.product((1, 9, 64), (torch.float32, torch.bfloat16)):
        x = torch.randn(batch, 130, device=DEVICE).to(dtype)
        weight = torch.randn(67, 130, device=DEVICE).to(dtype)
        pattern = fp.pack(torch.rand(67, 130, device=DEVICE) < 0.3)
        with torch.no_grad():
            expected = fp.masked_linear(x, weight, pattern)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = fp.masked_linear(x, weight, pattern)
                (mask,) = fp.global_topk_mask([weight], k=1000, score="magnitude")
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            close(y, expected, "graph")
            if int(mask.sum()) != 1000:
                raise AssertionError("graph: selection")


def streams() -> None:
    if not ON_CUDA:
        return
    for batch, dtype in itertools.product((1, 9, 64), (torch.float32, torch.bfloat16)):
        x = torch.randn(batch, 130, device=DEVICE).to(dtype)
        weight = torch.randn(67, 130, device=DEVICE).to(dtype)
        pattern = fp.pack(torch.rand(67, 130, device=DEVICE) < 0.3)
        expected = fp.masked_linear(x, weight, pattern)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = fp.masked_linear(x, weight, pattern)
            fp.global_topk_mask([weight], 0.3, score="magnitude")
        stream.synchronize()
        close(y, expected, "side stream")


PARTS = (linear, every_form, convolution, selection, equilibria, streams, graphs)


def main() -> int:
    torch.manual_seed(0)
    for part in PARTS:
        if sys.argv[1:] and part.__name__ not in sys.argv[1:]:
            continue
        began = time.monotonic()
        part()
        if ON_CUDA:
            torch.cuda.synchronize()
        print(f"{part.__name__}: {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
