"""Threads and forks: the ops keep no state between calls."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastprune as fp


def job(seed: int) -> list[Tensor]:
    """Packs and multiplies in a shape of its own."""
    g = torch.Generator().manual_seed(seed)
    rows, cols, batch = 3 + seed % 40, 5 + seed % 70, 1 + seed % 90
    w, x = torch.randn(rows, cols, generator=g), torch.randn(batch, cols, generator=g)
    mask = fp.global_topk_mask([w], 0.3, score="magnitude")[0]
    image = torch.randn(2, 3, 9, 7 + seed % 9, generator=g)
    kernel = torch.randn(4, 3, 3, 3, generator=g)
    kernel_mask = torch.rand(kernel.shape, generator=g) < 0.4
    return [
        mask,
        fp.masked_linear(x, w, mask),
        fp.masked_conv2d(image, kernel, kernel_mask, padding=1),
    ]


def test_32_threads_equal_serial() -> None:
    seeds = list(range(160))
    serial = [job(seed) for seed in seeds]
    with ThreadPoolExecutor(32) as pool:
        parallel = list(pool.map(job, seeds))
    for one, other in zip(serial, parallel, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_packing_during_forward_passes() -> None:
    layer = fp.nn.MaskedLinear(torch.nn.Linear(64, 64), torch.rand(64, 64) < 0.5)
    x = torch.randn(32, 64)
    masks = [torch.rand(64, 64, generator=torch.Generator().manual_seed(s)) < 0.5 for s in range(4)]
    weight = layer.weight.detach().clone()
    expected = [fp.masked_linear(x, weight, m, layer.bias) for m in masks]

    def pack_and_multiply(i: int) -> bool:
        pattern = fp.pack(masks[i % 4])
        return torch.equal(fp.masked_linear(x, weight, pattern, layer.bias), expected[i % 4])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(pack_and_multiply, range(200)))


class Products(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return job(index)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_fork_after_use_does_not_hang() -> None:
    before = [job(i)[1] for i in range(4)]
    loader = DataLoader(
        Products(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork"
    )
    for one, other in zip(before, loader, strict=True):
        assert torch.equal(one, other)
