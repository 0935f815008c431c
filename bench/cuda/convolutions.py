"""Convolutions and gradients: fastprune against cuDNN and cuBLAS."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprune as fp
from bench.cases import (
    GPU_CONV,
    GPU_CONV_SPARSITIES,
    GPU_GRADIENT_CONV,
    GPU_GRADIENT_SPARSITIES,
    GPU_GRADIENTS,
    Conv,
    Linear,
)
from bench.cuda.clock import Call
from bench.cuda.products import TINY, sparse_bytes
from bench.cuda.session import Row, Session, check_close, copies_of, strict_float32

TINY_CONV = (Conv(6, 5, 2), Conv(5, 6, 1))
LAST = torch.channels_last
# A layer and its activations mostly stay in the L2 cache: copies enough to push them out of it.
_MOST_COPIES = 12


def conv_facts(case: Conv, nnz: int, size: int, rate: str) -> Row:
    """Bytes and flops of the product, padding included: weights, activations in and out, once."""
    weights, maps = case.channels**2 * case.kernel**2, 2 * case.batch * case.channels * case.size**2
    pixels = case.batch * case.size**2
    return {
        "nnz": nnz,
        "bytes": sparse_bytes(case.channels, weights // case.channels, nnz, size) + size * maps,
        "dense_bytes": size * (weights + maps),
        "flops": 2 * nnz * pixels,
        "dense_flops": 2 * weights * pixels,
        "rate": rate,
    }


def operands(
    session: Session, case: Conv, sparsity: float, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Copies of the input, the weight, the mask."""
    shape = (case.channels, case.channels, case.kernel, case.kernel)
    mask = session.mask(shape, 1 - sparsity, 1)
    weight = session.randn(shape, dtype, 2)
    maps = (case.batch, case.channels, case.size, case.size)
    size = weight.element_size()
    number = session.clock.copies(2 * size * case.batch * case.channels * case.size**2)
    number = min(number, _MOST_COPIES)
    return [session.randn(maps, dtype, 3 + i) for i in range(number)], weight, mask


def measure_conv(session: Session, row: Row, case: Conv, dtype: torch.dtype, tf32: bool) -> None:
    xs, weight, mask = operands(session, case, row["sparsity"], dtype)
    pruned = torch.where(mask, weight, torch.zeros((), dtype=dtype, device=weight.device))
    patterns = copies_of(mask, len(xs))
    weights = [weight.clone() for _ in xs]
    padding = case.kernel // 2
    last = [(x.contiguous(memory_format=LAST), pruned.contiguous(memory_format=LAST)) for x in xs]
    plain = [(x, pruned.clone()) for x in xs]

    def ours(i: int) -> Tensor:
        return fp.masked_conv2d(xs[i], weights[i], patterns[i], None, case.stride, padding)

    def dense(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, case.stride, padding)

    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    exact = dense(xs[0].float(), pruned.float())
    torch.backends.cudnn.allow_tf32 = allowed
    check_close(row, ours(0), exact, dtype, tf32)
    candidates: dict[str, list[Call]] = {
        "fastprune": [functools.partial(ours, i) for i in range(len(xs))],
        "dense": [functools.partial(dense, *pair) for pair in plain],
        "dense channels_last": [functools.partial(dense, *pair) for pair in last],
    }
    session.time(row, candidates)
    name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    row |= conv_facts(case, int(mask.count_nonzero()), weight.element_size(), name)


def convolutions(session: Session) -> None:
    """3 x 3 layers; cuDNN chooses by timing, contiguous and channels_last."""
    torch.backends.cudnn.benchmark = True
    cases = TINY_CONV if session.clock.dry else GPU_CONV
    for dtype, tf32 in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, False)):
        strict_float32(tf32)
        for case in cases:
            for sparsity in GPU_CONV_SPARSITIES:
                facts = {"dtype": str(dtype).removeprefix("torch."), "tf32": tf32}
                with session.row(str(case), sparsity=sparsity, **facts) as row:
                    if row is not None:
                        measure_conv(session, row, case, dtype, tf32)
    strict_float32(False)


def measure_gradients(session: Session, row: Row, case: Linear | Conv, dtype: torch.dtype) -> None:
    """Both gradients through autograd, launched: the backward pass alone is timed."""
    if isinstance(case, Conv):
        xs, weight, mask = operands(session, case, row["sparsity"], dtype)
        x, layer = xs[0], (1, case.kernel // 2)
    else:
        weight = session.randn((case.rows, case.cols), dtype, 2)
        mask = session.mask(weight.shape, 1 - row["sparsity"], 1)
        x, layer = session.randn((case.batch, case.cols), dtype, 3), ()
    zero = torch.zeros((), dtype=dtype, device=weight.device)
    pruned = torch.where(mask, weight, zero).requires_grad_()
    weight, x = weight.requires_grad_(), x.requires_grad_()
    pattern = fp.pack(mask)
    with torch.enable_grad():
        if isinstance(case, Conv):
            y, dense = fp.masked_conv2d(x, weight, pattern, None, *layer), F.conv2d(
                x, pruned, None, *layer
            )  # fmt: skip
        else:
            y, dense = fp.masked_linear(x, weight, pattern), F.linear(x, pruned)
    grad = session.randn(y.shape, dtype, 4)

    def back(of: Tensor, to: Tensor) -> Tensor:
        return torch.autograd.grad(of, to, grad, retain_graph=True)[0]

    def masked() -> Tensor:
        return torch.where(mask, back(dense, pruned), zero)

    wanted = x if row["of"] == "input" else weight
    exact = back(dense, x) if row["of"] == "input" else masked()
    # Both are rounded: twice the tolerance would do, bfloat16's is wide enough.
    check_close(row, back(y, wanted), exact, dtype, tf32=False)
    candidates: dict[str, list[Call]] = {"fastprune": [lambda: back(y, wanted)]}
    if row["of"] == "input":
        candidates["dense"] = [lambda: back(dense, x)]
    else:
        candidates["dense, then masked"] = [masked]
        candidates["dense"] = [lambda: back(dense, pruned)]
    session.time(row, candidates, launched=tuple(candidates))


def gradients(session: Session) -> None:
    """Of the input, and of the weight at the mask."""
    linear, conv = (TINY, TINY_CONV) if session.clock.dry else (GPU_GRADIENTS, GPU_GRADIENT_CONV)
    for dtype in (torch.bfloat16, torch.float32):
        for case in (*linear, *conv):
            for of in ("input", "weight"):
                for sparsity in GPU_GRADIENT_SPARSITIES:
                    name = str(dtype).removeprefix("torch.")
                    facts = {"sparsity": sparsity, "dtype": name, "tf32": False, "of": of}
                    with session.row(f"{case}, {of} gradient", **facts) as row:
                        if row is not None:
                            measure_gradients(session, row, case, dtype)
