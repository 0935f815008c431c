"""Fused models and chains that keep the batch innermost: the same results, the same keys."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.fusing import fuse, fuse_relu_
from fastprune.kernel_choice import keep_batch_last
from fastprune.nn import MaskedConv2d
from fastprune.nn.batch_last import BatchNorm2d
from fastprune.ops import layout
from fastprune.swapping import mask_layer_


class Block(nn.Module):
    """A residual block whose pieces are called in a given manner."""

    def __init__(self, channels: int, add: Callable[[Tensor, Tensor], Tensor], stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.skip = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)  # called twice
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.add(y, self.skip(x)))


def iadd(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


ADDS = {
    "plus": lambda y, x: y + x,
    "swapped": lambda y, x: x + y,
    "in place": iadd,
    "function": torch.add,
    "method": lambda y, x: y.add_(x),
    "scaled": lambda y, x: torch.add(y, x, alpha=2),  # not a plain addition
    "itself": lambda y, x: y + y,
    "broadcast": lambda y, x: y + x[:, :, :1, :1],
}


class Net(nn.Module):
    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.BatchNorm2d(8)
        self.block = Block(8, add, stride)
        self.norm, self.active = nn.BatchNorm2d(8), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)))
        x = self.pool(self.active(self.norm(self.block(x))))
        x = F.pad(self.last(x), [1, 0, 0, 1])
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1), 1))


def make(model: nn.Module, keep_dense: tuple[str, ...] = ("stem",)) -> nn.Module:
    """Random statistics and masks; every layer sparse but those named."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and name not in keep_dense:
            mask_layer_(layer, torch.rand(layer.weight.shape) < 0.4)
    return model.eval()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("add", list(ADDS))
def test_same_results_and_keys(add: str, stride: int, batch_last: bool) -> None:
    if add == "broadcast" and stride == 2:
        pytest.skip("one case is enough")
    model = make(Net(ADDS[add], stride))
    x = torch.randn(17, 3, 12, 10)
    fused = fuse(model, (x,), batch_last=batch_last)
    assert fused is not None
    with torch.no_grad():
        expected = model(x)
        close(fused(x), expected)
        close(fused(x[:3]), expected[:3])  # another batch
    close(fused(x), expected)  # with gradients: nothing is folded
    assert fused.state_dict().keys() == model.state_dict().keys()


def test_what_is_fused() -> None:
    model = make(Net(ADDS["plus"]))
    fused = fuse(model, (torch.randn(16, 3, 8, 8),), batch_last=True)
    assert fused is not None
    convs = {n: m for n, m in fused.named_modules() if isinstance(m, MaskedConv2d)}
    assert convs["block.conv1"]._norm
    assert convs["block.conv1"].fused_relu
    assert convs["block.conv2"]._norm
    assert convs["block.conv2"].fused_relu
    calls = [str(n.target) for n in fused.graph.nodes if n.op == "call_module"]
    assert "block.bn1" not in calls
    assert "block.relu" not in calls
    (residual,) = [n for n in fused.graph.nodes if str(n.target) == "block.conv2"]
    assert len(residual.args) == 2
    assert not model.block.conv1.fused_relu  # the model itself is as it was
    layouts = []
    fused.pool.register_forward_hook(lambda m, i, o: layouts.append(layout.is_batch_last(o)))
    with torch.no_grad():
        fused(torch.randn(16, 3, 8, 8))
    assert layouts == [True]


def test_follows_changes_of_the_weights() -> None:
    model = make(Net(ADDS["plus"]))
    x = torch.randn(16, 3, 8, 8)
    fused = fuse(model, (x,), batch_last=True)
    assert fused is not None
    with torch.no_grad():
        fused(x)
        for other in (model, fused):
            for p in other.parameters():
                p.mul_(1.1)
            for name, b in other.named_buffers():
                if "running" in name:
                    b.mul_(0.9)
        close(fused(x), model(x))
        other = make(Net(ADDS["plus"]))
        fused.load_state_dict(other.state_dict())
        close(fused(x), other(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    model = make(Net(torch.add))
    x = torch.randn(16, 3, 8, 8)
    fused = fuse(model, (x,), batch_last=True)
    assert fused is not None
    with torch.no_grad():
        expected = fused(x)
        if how == "deepcopy":
            other = copy.deepcopy(fused)
        else:
            if "add" in vars(fused.block):  # a plain function pickles by name
                fused.block.add = None
            buffer = io.BytesIO()
            if how == "pickle":
                other = pickle.loads(pickle.dumps(fused))
            else:
                torch.save(fused, buffer)
                buffer.seek(0)
                other = torch.load(buffer, weights_only=False)
        close(other(x), expected)
        next(other.parameters()).zero_()  # theirs, not ours
        close(fused(x), expected)


def test_models_that_cannot_be_traced_are_left_alone() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else x

    model = make(Branch())
    assert fuse(model, (torch.randn(2, 3, 5, 5),), batch_last=True) is None
    assert fuse_relu_(model) == 0


def test_a_convolution_used_twice_is_not_fused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)) + self.conv(self.conv(x))

    model = make(Twice())
    x = torch.randn(16, 3, 5, 5)
    fused = fuse(model, (x,), batch_last=True)
    assert fused is not None
    with torch.no_grad():
        close(fused(x), model(x))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_chain(accumulate: int) -> None:
    model = make(Net(ADDS["plus"]), keep_dense=()).train()
    chain = keep_batch_last(model).train()
    assert chain.norm.fused_relu
    assert isinstance(chain.active, nn.Identity)
    assert chain.state_dict().keys() == model.state_dict().keys()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, chain)]
    for _ in range(3):
        batches = [torch.randn(20, 3, 8, 8) for _ in range(accumulate)]
        for m, optimizer in zip((model, chain), optimizers, strict=True):
            optimizer.zero_grad()
            for x in batches:
                m(x).square().mean().backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), chain.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4, msg=name)
    for (name, p), q in zip(model.named_buffers(), chain.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4, msg=name)
    x = torch.randn(20, 3, 8, 8)
    torch.testing.assert_close(chain.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-3)


def test_batch_norm_class_is_kept_by_finalize() -> None:
    chain = keep_batch_last(make(Net(ADDS["plus"])))
    plain = fp.finalize(chain)
    assert type(plain.norm) is BatchNorm2d
    x = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        close(plain.eval()(x), chain.eval()(x))


def test_layout_functions() -> None:
    x = torch.randn(5, 3, 6, 4)
    last = layout.batch_last(x)
    assert layout.is_batch_last(last)
    assert torch.equal(last, x)
    assert torch.equal(layout.contiguous(last), x)
    assert layout.contiguous(last).is_contiguous()
    for function, args in ((F.max_pool2d, (2,)), (F.avg_pool2d, (3, 1, 1))):
        got = layout.pool(function, last, *args)
        assert layout.is_batch_last(got)
        assert torch.equal(got, function(x, *args))
    got = layout.pad(last[:, :, ::2, ::2], [1, 0, 2, 1, 0, 3])
    assert got.stride(0) == 1
    assert torch.equal(got, F.pad(x[:, :, ::2, ::2], [1, 0, 2, 1, 0, 3]))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = torch.randn(37, 5, 3, 3).to(dtype)
        assert torch.equal(layout.contiguous(layout.batch_last(other)), other)


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("add", ["function", "inplace"] if "inplace" in ADDS else list(ADDS)[:2])
def test_finalize_undoes_the_fusing(add: str, batch_last: bool) -> None:
    model = make(Net(ADDS[add]))
    x = torch.randn(3, 3, 8, 8)
    fused = fuse(model, (x,), batch_last=batch_last)
    assert fused is not None
    plain = fp.finalize(fused)
    with torch.no_grad():
        expected = model(x)
        close(fused(x), expected)
        close(plain(x), expected)
    assert not any(isinstance(m, fp.nn.MaskedConv2d) for m in plain.modules())
    keys = {k for k in model.state_dict() if not k.endswith("weight_mask")}
    assert plain.state_dict().keys() == keys
