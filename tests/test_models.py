"""Model definitions against the papers' figures: sizes, shapes, names, errors."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastprune import models
from fastprune.models._common import kaiming_normal_
from fastprune.models.resnet import BasicBlock, PadShortcut, ResNet, resnet_thin, resnet_wide
from fastprune.models.vgg import VGG
from fastprune.models.wide_resnet import WideBlock, WideResNet

# name, in_shape, classes, parameters; then where the papers print the rounded figure.
SIZES = [
    ("lenet-300-100", (1, 28, 28), 10, 266_610),
    ("lenet-5", (3, 32, 32), 10, 62_006),
    ("lenet-5", (1, 28, 28), 10, 61_706),
    ("vgg-small", (1, 8, 8), 10, 1_147_722),
    ("vgg-16", (3, 32, 32), 10, 14_724_042),
    ("vgg-19", (3, 32, 32), 10, 20_035_018),  # paper 002, Table 3: 20.04 M
    ("vgg-19", (3, 32, 32), 100, 20_081_188),  # 20.08 M
    ("vgg-19", (3, 64, 64), 200, 20_132_488),  # 20.13 M
    ("resnet-18", (3, 32, 32), 10, 11_173_962),  # paper 004, Table 3: 11.2 M
    ("resnet-18", (1, 28, 28), 10, 11_172_810),  # 11.2 M
    ("resnet-20", (3, 32, 32), 10, 269_722),  # He et al., Table 6: 0.27 M
    ("resnet-32", (3, 32, 32), 10, 464_154),  # 0.46 M
    ("resnet-50", (3, 32, 32), 10, 23_520_842),  # paper 002, Table 3: 23.52 M
    ("resnet-50", (3, 32, 32), 100, 23_705_252),  # 23.71 M
    ("resnet-50", (3, 64, 64), 200, 23_910_152),  # 23.91 M
    ("resnet-56", (3, 32, 32), 10, 853_018),  # He et al., Table 6: 0.85 M
    ("resnet-deq", (3, 32, 32), 10, 64_842),
    ("resnet-deq", (1, 8, 8), 10, 63_978),
    ("resnet18-imagenet", (3, 224, 224), 1000, 11_689_512),
    ("resnet50-imagenet", (3, 224, 224), 1000, 25_557_032),  # paper 002, Table 3: 25.56 M
    ("wide-resnet-28-2", (3, 32, 32), 10, 1_467_610),  # paper 001, Figure 3: 1.47 M
    ("wide-resnet-28-4", (3, 32, 32), 10, 5_849_050),
    ("wide-resnet-28-8", (3, 32, 32), 10, 23_354_842),
    ("mlp", (1, 28, 28), 10, 136_074),  # paper 004, Table 3: 136.1 K
    ("mlp", (3, 32, 32), 10, 428_938),  # 428.9 K
    ("cnn", (1, 28, 28), 10, 1_556_874),  # 1.6 M
    ("cnn", (3, 32, 32), 10, 1_558_026),  # 1.6 M
    ("linear", (1, 28, 28), 10, 7_850),  # 7.9 K
    ("linear", (3, 32, 32), 10, 30_730),  # 30.7 K
]


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return models.create(name, **kwargs)


def count(model: nn.Module, *types: type[nn.Module]) -> int:
    """Weights (not biases) of the layers of these types; all parameters without types."""
    if not types:
        return sum(p.numel() for p in model.parameters())
    found = [m.get_parameter("weight") for m in model.modules() if isinstance(m, types)]
    return sum(weight.numel() for weight in found)


@pytest.mark.parametrize(("name", "in_shape", "classes", "parameters"), SIZES)
def test_size_and_output_shape(
    name: str, in_shape: tuple[int, int, int], classes: int, parameters: int
) -> None:
    model = on_meta(name, num_classes=classes, in_shape=in_shape)
    assert count(model) == parameters
    assert model(torch.empty(2, *in_shape, device="meta")).shape == (2, classes)


def test_every_name_has_a_size_test() -> None:
    assert {size[0] for size in SIZES} == set(models.names())


@pytest.mark.parametrize(
    ("name", "classes", "shares"),
    [  # Paper 002, Table 3: per cent in convolutions, linear, BatchNorm weights, biases.
        ("resnet-50", 10, (99.69, 0.09, 0.11, 0.11)),
        ("vgg-19", 10, (99.92, 0.03, 0.03, 0.03)),
        ("resnet-50", 100, (98.91, 0.86, 0.11, 0.11)),
        ("vgg-19", 100, (99.69, 0.25, 0.03, 0.03)),
        ("resnet-50", 200, (98.06, 1.71, 0.11, 0.11)),
        ("vgg-19", 200, (99.44, 0.51, 0.03, 0.03)),
    ],
)
def test_shares_of_paper_002(name: str, classes: int, shares: tuple[float, ...]) -> None:
    model = on_meta(name, num_classes=classes)
    total = count(model)
    parts = [count(model, kind) for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d)]
    parts.append(total - sum(parts))
    assert [round(100 * part / total, 2) for part in parts] == pytest.approx(shares, abs=0.0101)


@pytest.mark.parametrize(("widen", "million"), [(2, 216), (4, 848), (8, 3366)])
def test_wide_resnet_macs_of_paper_001(widen: int, million: int) -> None:
    """Figures 3 and 6, met to the last digit if BatchNorm counts 2 per value and ReLU 1."""
    model = on_meta(f"wide-resnet-28-{widen}")
    macs = 0

    def add(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            macs += module.weight[0].numel() * output.numel()
        else:
            macs += output.numel() * (2 if isinstance(module, nn.BatchNorm2d) else 1)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU)):
            module.register_forward_hook(add)
    model(torch.empty(1, 3, 32, 32, device="meta"))
    assert round(macs / 1e6) == million


@pytest.mark.parametrize("name", models.names())
def test_default_shape_and_fx(name: str) -> None:
    model = on_meta(name)
    shape = models.default_input_shape(name)
    classes = 1000 if name.endswith("imagenet") else 10
    traced = torch.fx.symbolic_trace(model)
    assert traced(torch.empty(3, *shape, device="meta")).shape == (3, classes)


@pytest.mark.parametrize(
    ("name", "in_shape", "kwargs"),
    [
        ("lenet-300-100", (1, 8, 8), {}),
        ("lenet-300-100", (1, 8, 8), {"batch_norm": True}),
        ("lenet-5", (1, 12, 13), {"batch_norm": True}),
        ("vgg-small", (1, 8, 8), {}),
        ("vgg-16", (3, 16, 16), {}),
        ("resnet-20", (3, 9, 7), {}),
        ("resnet-20", (3, 8, 8), {"shortcut": "projection", "stable": True}),
        ("resnet-18", (3, 8, 8), {"stable": True}),
        ("wide-resnet-28-2", (3, 8, 8), {"stable": True}),
        ("resnet-deq", (2, 8, 9), {"on_failure": "ignore"}),
        ("mlp", (1, 8, 8), {}),
        ("cnn", (1, 16, 16), {}),
        ("linear", (2, 3, 4), {}),
    ],
)
def test_trains(name: str, in_shape: tuple[int, int, int], kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = models.create(name, num_classes=7, in_shape=in_shape, **kwargs)
    assert model.training
    x = torch.randn(4, *in_shape)
    loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 3, 6, 1]))
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None, label
        assert torch.isfinite(parameter.grad).all(), label


@pytest.mark.parametrize("name", ["lenet-5", "vgg-small", "resnet-20", "wide-resnet-28-2"])
def test_export_is_exact(name: str) -> None:
    torch.manual_seed(1)
    shape = (3, 12, 12)
    model = models.create(name, in_shape=shape).eval()
    x = torch.randn(2, *shape)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))


@pytest.mark.parametrize("name", ["lenet-5", "resnet-20", "wide-resnet-28-2"])
def test_compile_without_graph_break(name: str) -> None:
    model = models.create(name, in_shape=(3, 12, 12), **({"stable": True} if "res" in name else {}))
    model.eval()
    x = torch.randn(2, 3, 12, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("resnet50", "resnet-50"),
        ("ResNet_50", "resnet-50"),
        ("lenet300100", "lenet-300-100"),
        ("LeNet-300_100", "lenet-300-100"),
        ("VGG19", "vgg-19"),
        ("wideresnet-28-2", "wide-resnet-28-2"),
        ("WRN-28-2", "wide-resnet-28-2"),
        ("ResNet50_ImageNet", "resnet50-imagenet"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    a, b = on_meta(spelling), on_meta(name)
    assert {k: v.shape for k, v in a.state_dict().items()} == {
        k: v.shape for k, v in b.state_dict().items()
    }
    assert models.default_input_shape(spelling) == models.default_input_shape(name)


def test_initialization_is_kaiming_normal() -> None:
    torch.manual_seed(0)
    model = models.create("vgg-small", in_shape=(1, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * 9
            std = math.sqrt(2 / fan_in)
            # The sample std of n normal values strays by std / sqrt(2 n): five of those.
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    torch.manual_seed(0)
    again = models.create("vgg-small", in_shape=(1, 8, 8))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("fan", "expected"), [("in", 16 * 25), ("out", 64 * 25), ("avg", 40 * 25)])
def test_fans_of_a_grouped_convolution(fan: str, expected: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 128, 5, groups=2)
    assert kaiming_normal_(layer, fan) is layer
    n = layer.weight.numel()
    assert layer.weight.std().item() == pytest.approx(
        math.sqrt(2 / expected), rel=5 / math.sqrt(2 * n)
    )
    assert layer.bias is not None
    assert (layer.bias == 0).all()
    with pytest.raises(ValueError, match="fan: expected"):
        kaiming_normal_(layer, "both")


def test_option_a_shortcut() -> None:
    x = torch.arange(2 * 2 * 3 * 5, dtype=torch.float32).view(2, 2, 3, 5)
    y = PadShortcut(2, 5, 2)(x)
    assert y.shape == (2, 5, 2, 3)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert (y[:, [0, 3, 4]] == 0).all()
    assert not any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in on_meta("resnet-20").modules()
    )
    with pytest.raises(ValueError, match="out_channels"):
        PadShortcut(4, 2, 1)


def test_stable_resnet_scales_each_branch() -> None:
    torch.manual_seed(0)
    plain = BasicBlock(4, 4, 1, "pad", 1.0).eval()
    scaled = BasicBlock(4, 4, 1, "pad", 0.25).eval()
    scaled.load_state_dict(plain.state_dict())
    # Large positive inputs keep the last ReLU open, so the branch can be read off.
    x = torch.rand(2, 4, 6, 6) + 100.0
    torch.testing.assert_close(scaled(x) - x, (plain(x) - x) * 0.25, rtol=1e-3, atol=1e-3)
    for model, blocks in [
        (resnet_wide(18, stable=True), 8),
        (resnet_thin(20, stable=True), 9),
        (WideResNet(10, 1, stable=True), 3),
    ]:
        scales = [m.scale for m in model.modules() if isinstance(m, (BasicBlock, WideBlock))]
        assert scales == [1 / math.sqrt(blocks)] * blocks
    with torch.device("meta"):
        bottlenecks = [
            m.scale for m in resnet_wide(50, stable=True).modules() if hasattr(m, "scale")
        ]
    assert bottlenecks == [0.25] * 16


@pytest.mark.parametrize(
    ("name", "in_shape", "side"),
    [
        ("vgg-19", (3, 15, 32), 16),
        ("vgg-small", (1, 3, 3), 4),
        ("lenet-5", (1, 8, 8), 12),
        ("cnn", (3, 32, 8), 16),
    ],
)
def test_too_small_inputs(name: str, in_shape: tuple[int, int, int], side: int) -> None:
    with pytest.raises(ValueError, match=f"in_shape: height and width must be at least {side}"):
        models.create(name, in_shape=in_shape)
    square = (in_shape[0], side, side)
    assert on_meta(name, in_shape=square)(torch.empty(2, *square, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("in_shape", [(3, 32), (3, 0, 32), (3, 32.0, 32), 32, (True, 8, 8)])
def test_malformed_shapes(in_shape: Any) -> None:
    with pytest.raises(ValueError, match="in_shape: expected three integers"):
        models.create("mlp", in_shape=in_shape)


def test_other_bad_arguments() -> None:
    for classes in (0, -1, 2.5):
        with pytest.raises(ValueError, match="num_classes: expected an integer"):
            models.create("resnet-20", num_classes=classes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stable"):
        models.create("vgg-16", stable=True)
    with pytest.raises(ValueError, match="depth"):
        resnet_thin(21)
    with pytest.raises(ValueError, match="depth"):
        resnet_wide(34)
    with pytest.raises(ValueError, match="depth"):
        WideResNet(27)
    with pytest.raises(ValueError, match="widen"):
        WideResNet(28, 0)
    with pytest.raises(ValueError, match="stages"):
        VGG([[64], []])
    with pytest.raises(ValueError, match="shortcut"):
        ResNet(BasicBlock, (1,), (8,), shortcut="none")
    with pytest.raises(ValueError, match="stem"):
        ResNet(BasicBlock, (1,), (8,), stem="none")
    with pytest.raises(ValueError, match="depths, widths"):
        ResNet(BasicBlock, (1, 1), (8,))


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.usefixtures("no_packages")
def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown network 'resnet-51'") as caught:
        models.create("resnet-51")
    for part in ("close: resnet-5", "torchvision is", "timm is", "own: lenet-300-100"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="unknown network"):
        models.default_input_shape("nothing-like-it")
    with pytest.raises(ValueError, match="'torchvision:NAME'"):
        models.create("keras:resnet50")
    with pytest.raises(ValueError, match="unknown network 'torchvision:resnet50'"):
        models.create("torchvision:resnet50")


def _fake(name: str, known: list[str], calls: list[Any]) -> ModuleType:
    module = ModuleType(name)

    def build(model: str, **kwargs: Any) -> nn.Module:
        calls.append((name, model, kwargs))
        return nn.Identity()

    vars(module).update(
        list_models=lambda: list(known),
        is_model=lambda model: model in known,
        get_model=build,
        create_model=build,
    )
    return module


def test_torchvision_and_timm_are_asked_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    vision = _fake("torchvision.models", ["mobilenet_v2", "resnet50"], calls)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", vision)
    monkeypatch.setitem(sys.modules, "timm", _fake("timm", ["convnext_tiny", "resnet50"], calls))
    models.create("MobileNet-v2")
    models.create("convnext_tiny", num_classes=5, in_shape=(1, 64, 64), drop_rate=0.1)
    models.create("timm:resnet50")
    models.create("torchvision:resnet50", num_classes=3, in_shape=(3, 96, 96))
    assert calls == [
        ("torchvision.models", "mobilenet_v2", {}),
        ("timm", "convnext_tiny", {"num_classes": 5, "in_chans": 1, "drop_rate": 0.1}),
        ("timm", "resnet50", {}),
        ("torchvision.models", "resnet50", {"num_classes": 3}),
    ]
    assert models.default_input_shape("mobilenet_v2") == (3, 224, 224)
    with pytest.raises(ValueError, match="takes 3 channels"):
        models.create("mobilenet_v2", in_shape=(1, 28, 28))
    with pytest.raises(ValueError, match=r"close: .*mobilenet_v2.*torchvision is installed"):
        models.create("mobilenet_v9")


def test_torchvision_weights_fit() -> None:
    """The ImageNet networks have torchvision's keys and compute the same function."""
    try:
        from torchvision.models import resnet18, resnet50
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchvision does not import: {error}")
    torch.manual_seed(0)
    theirs = resnet18().eval()
    ours = models.create("resnet18-imagenet").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.device("meta"):
        large = resnet50()
    assert {k: v.shape for k, v in large.state_dict().items()} == {
        k: v.shape for k, v in on_meta("resnet50-imagenet").state_dict().items()
    }
