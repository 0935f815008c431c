"""Models that run a few samples at a time: the same results, keys and copies."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.fusing import fuse
from fastprune.nn.chunks import Chunks, acts_on_samples


class Mixing(nn.Module):
    """What one sample gives depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Fixed(nn.Module):
    """Knows its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(20, -1)


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.flatten(1) + y


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return 2 * x


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    for name in ("0", "3.0"):
        layer = model.get_submodule(name)
        masked = fp.nn.MaskedConv2d(layer, torch.rand(layer.weight.shape) < 0.3)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, masked)
    return model.eval()


@pytest.mark.parametrize("batch", [0, 1, 15, 16, 17, 32, 50])
def test_same_results(batch: int) -> None:
    model, x = network(), torch.randn(batch, 3, 6, 6)
    with torch.no_grad():
        y = Chunks(model, 16)(x)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)


def test_runs_in_chunks() -> None:
    recorder = Recorder()
    chunks = Chunks(recorder, 16).eval()
    x = torch.randn(40, 3)
    assert torch.equal(chunks(x), 2 * x)
    assert recorder.seen == [16, 16, 8]


@pytest.mark.parametrize("how", ["training", "keyword", "smaller"])
def test_runs_in_one_piece(how: str) -> None:
    recorder = Recorder()
    chunks, x = Chunks(recorder, 16).train(how == "training"), torch.randn(40, 3)
    if how == "smaller":
        x = x[:16]
    assert torch.equal(chunks(x=x) if how == "keyword" else chunks(x), 2 * x)
    assert recorder.seen == [len(x)]


def test_gradients() -> None:
    model, x = network(), torch.randn(40, 3, 6, 6)
    for module in (model, Chunks(model, 16)):
        module.zero_grad()
        module(x).square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        if module is model:
            expected = grads
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["itself", "deepcopy", "torch.save"])
@pytest.mark.parametrize("fused", [False, True])
def test_state_and_copies(how: str, fused: bool) -> None:
    model, x = network(), torch.randn(40, 3, 6, 6)
    inner = fuse(model, (x,), batch_last=True) if fused else copy.deepcopy(model)
    assert inner is not None
    chunks: Any = Chunks(inner, 16)
    if how == "deepcopy":
        chunks = copy.deepcopy(chunks)
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(chunks, buffer)
        buffer.seek(0)
        chunks = torch.load(buffer, weights_only=False)
    assert list(chunks.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(chunks(x), model(x), rtol=1e-5, atol=1e-6)
        for p in chunks.parameters():
            p.mul_(1.25)
        for p in model.parameters():
            p.mul_(1.25)
        torch.testing.assert_close(chunks(x), model(x), rtol=1e-5, atol=1e-6)
        before = inner(x)
        chunks.load_state_dict(network().state_dict())
        torch.testing.assert_close(chunks(x), network()(x), rtol=1e-5, atol=1e-6)
        assert how == "itself" or torch.equal(inner(x), before)
        assert chunks.double()(x.double()).dtype == torch.float64
    chunks.train()
    assert chunks.model.training
    assert all(m.training for m in chunks.modules())


def test_compile() -> None:
    model, x = Chunks(network(), 16), torch.randn(40, 3, 6, 6)
    with torch.no_grad():
        y = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(y, model(x))


def test_which_models_act_on_samples() -> None:
    x = torch.ones(20, 3)  # equal samples do not hide the mixing
    assert acts_on_samples(nn.Linear(3, 2).eval(), (x,), 16)
    assert acts_on_samples(nn.Linear(3, 2).bfloat16().eval(), (x.bfloat16(),), 16)
    assert acts_on_samples(Sum().eval(), (x.reshape(20, 3, 1), x), 16)
    assert not acts_on_samples(Mixing().eval(), (x,), 16)
    assert not acts_on_samples(Pair().eval(), (x,), 16)
    assert not acts_on_samples(Fixed().eval(), (x,), 16)
    assert not acts_on_samples(nn.Linear(3, 2).eval(), (x[:16],), 16)
    assert not acts_on_samples(
        nn.Embedding(5, 2).eval(), (torch.ones(20, 3, dtype=torch.long),), 16
    )
    assert not acts_on_samples(Sum().eval(), (x, 1.0), 16)
    assert not acts_on_samples(nn.Linear(3, 2), (x,), 16)


def test_accelerate_may_choose_chunks() -> None:
    model, x = network(), torch.randn(40, 3, 6, 6)
    masks = {"0.weight": model[0].weight_mask, "3.0.weight": model[3][0].weight_mask}
    dense = fp.finalize(model)
    fast, report = fp.accelerate(dense, masks, x, min_time=0.002)
    assert any("16 samples at a time" in name for name in report.timings)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
