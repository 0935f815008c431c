"""Masked layers and accelerated networks on a GPU: what a user of torch does with a layer."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastprune as fp
import gpu
from gpu import strict_products  # noqa: F401

pytestmark = gpu.needs_device


def mask_like(t: Tensor, density: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(t.shape, generator=torch.Generator().manual_seed(seed)) < density


def dense_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 33),
        nn.ReLU(),
        nn.Linear(33, 5),
    )


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    return {name: mask_like(p, seed=i).to(p.device) for i, (name, p) in enumerate(weights.items())}


def pruned(model: nn.Module) -> nn.Module:
    """A dense copy with zeros."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks_of(model).items():
            model.get_parameter(name).masked_fill_(~mask, 0)
    return model


def masked(model: nn.Module) -> nn.Module:
    """A copy with masked layers."""
    model = copy.deepcopy(model)
    for name, mask in masks_of(model).items():
        owner = name.removesuffix(".weight")
        layer = model.get_submodule(owner)
        kind = fp.nn.MaskedLinear if isinstance(layer, nn.Linear) else fp.nn.MaskedConv2d
        model.set_submodule(owner, kind(layer, mask))  # type: ignore[arg-type]
    return model


def images(batch: int = 6, seed: int = 9) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 12, 12, generator=g).to(gpu.DEVICE)


def close(a: Tensor, b: Tensor, loose: bool = False) -> None:
    rtol = 5e-2 if loose else 1e-4
    torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("batch", [1, 6, 40])
def test_a_network_before_and_after_moving(batch: int) -> None:
    dense = dense_network().eval()
    expected = pruned(dense.to(gpu.DEVICE))(images(batch))
    close(masked(dense)(images(batch)), expected)
    moved = masked(dense_network().eval()).to(gpu.DEVICE)
    close(moved(images(batch)), expected)
    for name, tensor in moved.state_dict().items():
        assert tensor.device.type == gpu.DEVICE.type, name
    close(moved.cpu()(images(batch).cpu()), expected.cpu())


def test_gradients_and_training() -> None:
    dense = dense_network().to(gpu.DEVICE).train()
    reference, ours = pruned(dense), masked(dense)
    masks = masks_of(dense)
    for model in (reference, ours):
        F.cross_entropy(model(images()), torch.arange(6, device=gpu.DEVICE) % 5).backward()
    for name, mask in masks.items():
        right = reference.get_parameter(name).grad
        got = ours.get_parameter(name).grad
        assert right is not None
        assert got is not None
        close(got, right * mask)
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(ours(images()), torch.arange(6, device=gpu.DEVICE) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert float(losses[-1]) < 0.7 * float(losses[0])
    state = ours.state_dict()
    for name, mask in masks.items():
        assert not state[name][~mask].any(), name


def test_state_copies_and_files(tmp_path: Path) -> None:
    model = masked(dense_network().to(gpu.DEVICE)).eval()
    y = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images()), y)
    save_file(model.state_dict(), str(tmp_path / "m.safetensors"))
    other = masked(dense_network().to(gpu.DEVICE)).eval()
    other.load_state_dict(load_file(str(tmp_path / "m.safetensors"), device=str(gpu.DEVICE)))
    assert torch.equal(other(images()), y)
    other.load_state_dict(dense_network().state_dict(), strict=True)  # from the CPU, unmasked
    close(other(images()), y)
    finalized = fp.finalize(model).eval()
    close(finalized(images()), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_change_of_dtype(dtype: torch.dtype) -> None:
    expected = pruned(dense_network().to(gpu.DEVICE).eval())(images())
    y = masked(dense_network().to(gpu.DEVICE).eval()).to(dtype)(images().to(dtype))
    assert y.dtype == dtype
    close(y, expected, loose=True)


def test_autocast_and_channels_last() -> None:
    model = masked(dense_network().to(gpu.DEVICE).eval())
    y = model(images())
    with torch.autocast(gpu.DEVICE.type, dtype=torch.bfloat16):
        half = model(images())
    assert half.dtype == torch.bfloat16
    close(half, y, loose=True)
    close(model(images().contiguous(memory_format=torch.channels_last)), y)


@pytest.mark.parametrize("training", [False, True])
def test_accelerate(training: bool) -> None:
    model = dense_network().to(gpu.DEVICE).train(training)
    masks = fp.prune(model, "magnitude", sparsity=0.7)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            reference.get_parameter(name).masked_fill_(~mask, 0)
    fast, report = fp.accelerate(model, masks, images(), training=training, min_time=0.002)
    assert {layer.chosen for layer in report.layers} <= {"sparse", "dense"}
    assert report.dense_ms > 0
    close(fast(images()), reference(images()))
    assert next(fast.parameters()).device.type == gpu.DEVICE.type
    if training:
        fast(images()).square().sum().backward()
        for name, parameter in fast.named_parameters():
            assert parameter.grad is not None, name
        close(fp.finalize(fast).eval()(images()), reference.eval()(images()), loose=True)


def test_compiles_whole() -> None:
    model = masked(dense_network().to(gpu.DEVICE).eval())
    backend = "inductor" if gpu.ON_CUDA else "aot_eager"
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    close(compiled(images()), model(images()))


def test_a_layer_on_no_samples() -> None:
    model = masked(dense_network().to(gpu.DEVICE).eval())
    assert model(images()[:0]).shape == (0, 5)
