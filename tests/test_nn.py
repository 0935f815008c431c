"""Drop-in layers: what a user of torch does with a layer must work with a masked one."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import fastprune as fp


def mask_like(t: Tensor, density: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(t.shape, generator=torch.Generator().manual_seed(seed)) < density


def network() -> nn.Sequential:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
    return nn.Sequential(
        fp.nn.MaskedConv2d(conv, mask_like(conv.weight)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        fp.nn.MaskedLinear(linear, mask_like(linear.weight)),
    )


def dense_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": "same"},
        {"padding": "same", "kernel_size": (2, 4)},
        {"padding": "valid", "bias": False},
        {"padding": (2, 1), "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect", "dilation": 2},
        {"groups": 4, "padding": 1},
    ],
    ids=str,
)
def test_convolution_options(options: dict[str, object], sparse: bool) -> None:
    layer = nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **options})
    mask = mask_like(layer.weight)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.weight.masked_fill_(~mask, 0)
    masked = fp.nn.MaskedConv2d(layer, mask, sparse=sparse)
    for x in (torch.randn(2, 4, 11, 10), torch.randn(4, 11, 10)):
        torch.testing.assert_close(masked(x), expected(x), rtol=1e-5, atol=1e-5)


def test_it_is_the_layer_it_replaces() -> None:
    layer = nn.Linear(6, 4)
    masked = fp.nn.MaskedLinear(layer, mask_like(layer.weight))
    assert isinstance(masked, nn.Linear)
    assert masked.weight is layer.weight
    assert [n for n, _ in masked.named_parameters()] == ["weight", "bias"]
    assert set(masked.state_dict()) == {"weight", "bias", "weight_mask"}
    assert "sparsity=" in repr(masked)
    without_bias = fp.nn.MaskedLinear(nn.Linear(6, 4, bias=False), mask_like(layer.weight))
    assert without_bias.bias is None


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    ],
)
def test_no_optimizer_revives_a_pruned_weight(make: object, sparse: bool) -> None:
    model = network()
    layers = [m for m in model if isinstance(m, fp.nn.MaskedLayer)]
    for layer in layers:
        layer.sparse = sparse
    before = [layer.weight.detach().clone() for layer in layers]
    optimizer = make(model.parameters())  # type: ignore[operator]
    for _ in range(4):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, old in zip(layers, before, strict=True):
        assert not layer.weight[~layer.weight_mask].any()
        assert (layer.weight != old)[layer.weight_mask].any()


def test_old_momentum_cannot_revive_one_either() -> None:
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(8, 6)
    layer(x).square().sum().backward()
    optimizer.step()  # momentum now points everywhere
    masked = fp.nn.MaskedLinear(layer, mask_like(layer.weight))
    optimizer.zero_grad()
    masked(x).square().sum().backward()
    optimizer.step()
    expected = F.linear(x, torch.where(masked.weight_mask, masked.weight, 0), masked.bias)
    torch.testing.assert_close(masked(x), expected)
    assert not masked.state_dict()["weight"][~masked.weight_mask].any()
    masked.eval()
    assert not masked.weight[~masked.weight_mask].any()


@pytest.mark.parametrize("sparse", [True, False])
def test_dense_weight_gradient_keeps_the_dense_weight(sparse: bool) -> None:
    layer = nn.Linear(6, 4)
    old = layer.weight.detach().clone()
    mask = mask_like(layer.weight)
    masked = fp.nn.MaskedLinear(layer, mask, weight_grad="dense", sparse=sparse)
    x = torch.randn(8, 6)
    y = masked(x)
    torch.testing.assert_close(y, F.linear(x, torch.where(mask, old, 0), layer.bias))
    y.sum().backward()
    torch.testing.assert_close(masked.weight.grad, torch.ones(8, 4).t() @ x)
    masked.eval()
    masked.state_dict()
    assert torch.equal(masked.weight, old)


def test_state_dict_loads_strictly_both_ways() -> None:
    masked, dense = network(), dense_network()
    masks = {name: m.clone() for name, m in masked.state_dict().items() if name.endswith("mask")}
    masked.load_state_dict(dense.state_dict(), strict=True)
    for name, mask in masks.items():
        assert torch.equal(masked.state_dict()[name], mask)
    reference = copy.deepcopy(dense)
    with torch.no_grad():
        for i in (0, 5):
            reference[i].weight.masked_fill_(~masked[i].weight_mask, 0)
    torch.testing.assert_close(masked(X), reference(X))
    dense.load_state_dict(fp.finalize(masked).state_dict(), strict=True)
    torch.testing.assert_close(dense.eval()(X), masked.eval()(X))
    other = network()
    other[0].set_mask(mask_like(other[0].weight, seed=5))
    other.load_state_dict(masked.state_dict(), strict=True)
    torch.testing.assert_close(other.eval()(X), masked(X))
    with pytest.raises(RuntimeError, match="size mismatch"):
        masked[5].load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(5)})


def test_copies_and_files(tmp_path: Path) -> None:
    model = network().eval()
    y = model(X)
    assert torch.equal(copy.deepcopy(model)(X), y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), y)
    save_file(model.state_dict(), str(tmp_path / "m.safetensors"))
    other = network().eval()
    other.load_state_dict(load_file(str(tmp_path / "m.safetensors")))
    assert torch.equal(other(X), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_change_of_dtype(dtype: torch.dtype) -> None:
    model = network().to(dtype).eval()
    assert model[0].weight_mask.dtype == torch.bool
    y = model(X.to(dtype))
    assert y.dtype == dtype
    expected = fp.finalize(network().eval())(X)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_meta_device_forward_is_fake() -> None:
    model = network().to("meta")
    assert model(X.to("meta")).shape == (4, 5)


@pytest.mark.parametrize("training", [True, False])
def test_compile_and_export(training: bool) -> None:
    model = network().train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    y = model(X)
    got = compiled(X)
    torch.testing.assert_close(got, y)
    got.sum().backward()
    y.sum().backward()
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    exported = torch.export.export(copy.deepcopy(model).eval(), (X,))
    torch.testing.assert_close(exported.module()(X), model.eval()(X))


def test_autocast() -> None:
    model = network().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(X), rtol=0.05, atol=0.05)


DATA_PARALLEL = """
import os, sys
import torch, torch.distributed as dist
import fastprune as fp
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
torch.manual_seed(0)
layer = fp.nn.MaskedLinear(torch.nn.Linear(8, 5), torch.rand(5, 8) < 0.4)
model = torch.nn.parallel.DistributedDataParallel(layer)
model(torch.randn(2, 8)).sum().backward()
assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
print("passed", flush=True)
os._exit(0)
"""


def test_data_parallel_over_gloo(tmp_path: Path) -> None:
    """In a process of its own that ends without destructors: torch's process group can wait for
    its thread while that thread waits for the GIL, when both drop the last piece of work."""
    arguments = [sys.executable, "-c", DATA_PARALLEL, str(tmp_path / "store")]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout == "passed\n", run.stderr


def test_set_mask_replaces_the_pattern_or_nothing() -> None:
    layer = network()[5]
    x = torch.randn(2, 8)
    y = layer(x)
    with pytest.raises(ValueError, match="mask: expected the weight's shape"):
        layer.set_mask(torch.ones(2, 2).bool())
    with pytest.raises(TypeError, match="mask: expected a bool tensor"):
        layer.set_mask(torch.ones(5, 8))
    assert torch.equal(layer(x), y)
    layer.set_mask(torch.zeros(5, 8).bool())
    assert torch.equal(layer(x), layer.bias.expand(2, 5))
    assert layer.sparsity == 1.0


def test_bad_layers() -> None:
    with pytest.raises(TypeError, match=r"layer: expected an nn\.Linear, got Conv2d"):
        fp.nn.MaskedLinear(nn.Conv2d(1, 1, 1), torch.ones(1, 1).bool())
    with pytest.raises(TypeError, match=r"layer: expected an nn\.Conv2d, got Linear"):
        fp.nn.MaskedConv2d(nn.Linear(1, 1), torch.ones(1, 1, 1, 1).bool())
    pruned = nn.Linear(3, 3)
    torch_prune.l1_unstructured(pruned, "weight", 0.5)
    with pytest.raises(ValueError, match="layer: expected a plain weight"):
        fp.nn.MaskedLinear(pruned, torch.ones(3, 3).bool())
    with pytest.raises(ValueError, match="weight_grad: expected"):
        fp.nn.MaskedLinear(nn.Linear(3, 3), torch.ones(3, 3).bool(), weight_grad="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: expected a padded height of at least 3, got 2"):
        fp.nn.MaskedConv2d(nn.Conv2d(3, 4, 3), torch.ones(4, 3, 3, 3).bool())(
            torch.zeros(1, 3, 2, 9)
        )
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., 8\)"):
        network()[5](torch.zeros(2, 7))
