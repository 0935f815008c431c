"""Networks with dead channels taken out: the same outputs, fewer parameters, or left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastprune as fp
from effective_models import CASES, Residual, random_masks
from fastprune.models.wide_resnet import WideResNet

Masks = dict[str, Tensor]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def prepared(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, with biases and statistics that are not those of a start."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2
        for name, b in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b += torch.rand(b.shape, generator=generator, dtype=b.dtype)
    return model


def trimmed(model: nn.Module, masks: Masks, x: Tensor, inputs: int = 3) -> tuple[nn.Module, Masks]:
    """Trim, and check all that must hold of any result."""
    before = copy.deepcopy(model.state_dict())
    small, small_masks = fp.trim(model, masks, example_input=x, return_masks=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert small.training == model.training
    pruned = copy.deepcopy(model)
    fp.Masks(masks).apply_(pruned)
    for seed in range(inputs):  # several inputs: a constant may look like what it is at one
        generator = torch.Generator().manual_seed(seed)
        batch = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        right, got = pruned(batch).detach(), small(batch).detach()
        assert (right - got).abs().max() <= 1e-12 * max(1.0, float(right.abs().max()))
    assert parameters(small) <= parameters(model)
    named = dict(small.named_parameters())
    for name, mask in small_masks.items():
        assert mask.shape == named[name].shape
        assert not named[name][~mask].any()
    again = fp.trim(small, small_masks, example_input=x)
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]
    return small, small_masks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("density", [0.3, 0.05])
def test_outputs_stay(case, density) -> None:
    model, x = case()
    trimmed(prepared(model), random_masks(model, density, 3), x.double()[:1])


@pytest.mark.parametrize(
    ("name", "shape", "densities"),
    [
        ("lenet-300-100", (1, 28, 28), [0.5, 0.03, 0.001]),
        ("lenet-5", (1, 28, 28), [0.1, 0.01]),
        ("vgg-small", (1, 8, 8), [0.01, 0.001]),
        ("resnet-20", (3, 8, 8), [0.05, 0.001]),
        ("wide-resnet-10-1", (3, 8, 8), [0.01]),
    ],
)
def test_networks_of_the_papers(name, shape, densities) -> None:
    if name.startswith("wide"):
        model: nn.Module = WideResNet(10, 1, 10, shape)
    else:
        model = fp.models.create(name, in_shape=shape)
    model = prepared(model)
    sizes = []
    for density in densities:
        masks = random_masks(model, density, 5)
        x = torch.zeros(1, *shape, dtype=torch.float64)
        sizes.append(parameters(trimmed(model, masks, x, 1)[0]))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < parameters(model)


def test_units_that_stay_are_those_with_effective_weights() -> None:
    """In a chain of linear layers every constant can be moved on."""
    layers = [nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 30), nn.Sigmoid(), nn.Linear(30, 6)]
    model = prepared(nn.Sequential(*layers))
    x = torch.zeros(1, 20, dtype=torch.float64)
    for seed in range(4):
        masks = random_masks(model, 0.06, seed)
        small, small_masks = trimmed(model, masks, x)
        found = fp.effective_masks(model, masks, example_input=x)
        for name in ("0.weight", "2.weight"):
            assert len(small_masks[name]) == int(found[name].any(1).sum())
        left = fp.effective_masks(small, small_masks, example_input=x)
        assert left.nnz() == found.nnz()


def test_a_constant_goes_into_the_bias_that_is_there_or_is_made() -> None:
    model = prepared(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)))
    masks = {"0.weight": torch.ones(4, 3).bool()}
    masks["0.weight"][1:3] = False
    small, _ = trimmed(model, masks, torch.zeros(1, 3, dtype=torch.float64))
    constant = torch.tanh(model[0].bias[1:3])
    assert torch.allclose(small[2].bias, model[2].weight[:, 1:3] @ constant)
    assert (small[0].out_features, small[2].in_features) == (2, 2)
    model[2] = nn.Linear(4, 2).double()
    small, _ = trimmed(model, masks, torch.zeros(1, 3, dtype=torch.float64))
    assert torch.allclose(small[2].bias, model[2].bias + model[2].weight[:, 1:3] @ constant)


@pytest.mark.parametrize(("padding", "left"), [(0, 3), (1, 5)])
def test_a_constant_stays_where_padding_would_tell(padding, left) -> None:
    layers = [nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, padding=padding)]
    model = prepared(nn.Sequential(*layers))
    masks = {"0.weight": torch.ones(5, 2, 3, 3).bool()}
    masks["0.weight"][:2] = False
    x = torch.zeros(1, 2, 7, 7, dtype=torch.float64)
    assert trimmed(model, masks, x)[0][0].out_channels == left
    with torch.no_grad():  # a constant 0 has no effect anywhere
        model[0].bias.zero_()
        model[1].running_mean.zero_()
        model[1].bias.zero_()
    small, _ = trimmed(model, masks, x)
    assert small[0].out_channels == small[1].num_features == small[2].in_channels == 3


def test_a_collapsed_layer_keeps_one_unit() -> None:
    model = prepared(fp.models.create("lenet-5", in_shape=(1, 28, 28)))
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    first = list(masks)[2]
    masks[first][:] = False
    small, small_masks = trimmed(model, masks, torch.zeros(1, 1, 28, 28, dtype=torch.float64))
    assert all(1 in small_masks[name].shape for name in list(masks)[:-1])
    assert parameters(small) <= 100


def test_residual_additions_agree() -> None:
    model = prepared(nn.Sequential(Residual(2, 4), Residual(4, 4), nn.Conv2d(4, 3, 1)))
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    masks["2.weight"][:, 1] = False
    x = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    # Channel 1 is read by the second block, though not by what follows it: it stays.
    assert trimmed(model, masks, x)[0][1].conv2.out_channels == 4
    masks["1.conv1.weight"][:, 1] = False
    small, _ = trimmed(model, masks, x)
    assert small[0].conv2.out_channels == small[0].shortcut.out_channels == 3
    assert (small[1].conv1.in_channels, small[1].conv1.out_channels) == (3, 4)


class Shapes(nn.Module):
    """Depthwise and grouped convolutions, concatenation, flattening; a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.b = nn.ConvTranspose2d(12, 4, 2, 2)
        self.c = nn.Conv2d(2, 4, 3)
        self.d = nn.Conv2d(4, 8, 1, groups=2)
        self.out = nn.Linear(4 * 64 + 8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        left = self.b(F.relu(self.deep(F.relu(self.norm(self.a(x))))))
        right = F.relu(self.d(F.relu(self.c(x))))
        return self.out(torch.cat([left.flatten(1), right.flatten(1)], 1))


def test_layouts_that_couple_channels() -> None:
    model = prepared(Shapes())
    x = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    masks["b.weight"][[2, 3, 8]] = False  # what channel 1 gives, and one of channel 4's two
    masks["out.weight"][:, 64:128] = False  # channel 1 of b
    masks["out.weight"][:, 256 + 64 :] = False  # group 1 of d
    small, _ = trimmed(model, masks, x)
    assert (small.a.out_channels, small.norm.num_features) == (5, 5)
    deep = small.deep
    assert (deep.groups, deep.in_channels, deep.out_channels) == (5, 5, 10)
    assert (small.b.in_channels, small.b.out_channels) == (10, 3)
    assert (small.d.groups, small.d.in_channels, small.d.out_channels) == (1, 2, 4)
    assert (small.c.in_channels, small.c.out_channels) == (2, 2)
    assert small.out.in_features == 3 * 64 + 4 * 16
    repr(small)


def test_layers_used_twice_and_weights_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 8)
            self.loop = nn.Linear(8, 8)
            self.other = nn.Linear(8, 8)
            self.other.weight = self.loop.weight
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.loop(F.relu(self.loop(self.first(x)))))
            return self.out(F.relu(self.other(x)))

    model = prepared(Tied())
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    masks["loop.weight"][:, 5:] = False
    masks["out.weight"][:, 5:] = False
    small, _ = trimmed(model, masks, torch.zeros(1, 5, dtype=torch.float64))
    assert small.other.weight is small.loop.weight
    assert small.loop.weight.shape == (5, 5)
    assert small.other.out_features == 5


class Coded(nn.Module):
    """Numbers of channels in the code: all of them have to stay, what comes before need not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.early = nn.Conv2d(1, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.norm = nn.GroupNorm(2, 8) if how == "group" else nn.LayerNorm([8, 4, 4])
        self.out = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(self.early(x)))
        if self.how == "view":
            return self.out(x.view(-1, 8 * 16))
        if self.how == "shuffle":
            x = x.view(-1, 2, x.shape[1] // 2, 4, 4).transpose(1, 2).flatten(1, 2)
        elif self.how == "slice":
            x = torch.cat([x[:, -4:], x[:, :4]], 1)
        elif self.how == "scale":
            x = x * self.scale
        elif self.how == "softmax":
            x = x.softmax(1)
        elif self.how in ("group", "layer"):
            x = self.norm(x)
        return self.out(x.flatten(1))


@pytest.mark.parametrize(
    "how", ["view", "shuffle", "slice", "scale", "softmax", "group", "layer", "none"]
)
def test_unsupported_layouts_are_left_alone(how) -> None:
    model = prepared(Coded(how))
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 2}
    del masks["scale"]
    masks.pop("norm.weight", None)
    masks.pop("norm.bias", None)
    masks["out.weight"] = torch.ones(3, 128).bool()
    masks["out.weight"].view(3, 8, 16)[:, [2, 4]] = False
    masks["conv.weight"][:, 5] = False
    small, _ = trimmed(model, masks, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    assert small.early.out_channels == 7
    assert small.conv.out_channels == (6 if how == "none" else 8)


def test_normalization_by_own_statistics_sees_what_is_dead() -> None:
    """LayerNorm opens no path, and still what it does not hand on changes what it does."""
    layers = [nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)]
    model = prepared(nn.Sequential(*layers))
    masks = {n: torch.ones_like(p).bool() for n, p in model.named_parameters() if p.dim() > 1}
    masks["2.weight"][:] = torch.eye(6).bool()
    masks["4.weight"][:, 2:] = False  # units 2 to 5 reach the output by the statistics alone
    masks["0.weight"][0] = False  # and a feature that no input reaches is no constant after them
    small, _ = trimmed(model, masks, torch.zeros(1, 3, dtype=torch.float64))
    assert small[0].out_features == 5
    assert small[2].out_features == 6


def test_masked_layers_become_plain() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    masks = random_masks(plain, 0.15, 2)
    fast = nn.Sequential(*plain)
    fast[0] = fp.nn.MaskedLinear(plain[0], masks["0.weight"])
    x = torch.randn(2, 6)
    small = fp.trim(fast, masks, example_input=x)
    assert type(small[0]) is nn.Linear
    assert small[0].out_features < 8
    assert torch.allclose(small(x), fp.trim(plain, masks, example_input=x)(x))


def test_training_goes_on() -> None:
    model = fp.models.create("lenet-300-100", in_shape=(1, 8, 8))
    masks = random_masks(model, 0.02, 0)
    x = torch.randn(4, 1, 8, 8)
    small, small_masks = fp.trim(model, masks, example_input=x, return_masks=True)
    assert small.training
    small(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    fp.accelerate(small, small_masks, x, min_time=0.001)


def test_bad_arguments() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no parameter of this name"):
        fp.trim(model, {"x": torch.ones(1).bool()}, example_input=torch.zeros(1, 4))
    with pytest.raises(TypeError, match="model: expected"):
        fp.trim(3, {}, example_input=torch.zeros(1))  # type: ignore[call-overload]
    small = fp.trim(model, {}, example_input=torch.zeros(1, 4))
    assert torch.equal(small[0].weight, model[0].weight)


def test_a_bias_computed_from_the_input_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a.weight, self.b(x)[0])

    with pytest.raises(ValueError, match=r"linear.*computed from the input"):
        fp.trim(Odd(), {}, example_input=torch.zeros(1, 4))


class Block(nn.Module):
    """A choice of ways from one map to the next."""

    def __init__(self, kind: str, inside: int, outside: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "residual":
            outside = inside
        if kind == "depthwise":
            self.deep = nn.Conv2d(inside, inside, 3, padding=1, groups=inside)
        if kind == "transposed":
            self.conv: nn.Module = nn.ConvTranspose2d(inside, outside, 2, bias=False)
        else:
            same = kind in ("residual", "concatenated", "padded")
            self.conv = nn.Conv2d(inside, outside, 3 if same else 2, padding=int(same))
        self.norm = nn.BatchNorm2d(outside) if kind != "plain" else nn.Identity()
        self.outside = outside + (inside if kind == "concatenated" else 0)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.deep(x) if self.kind == "depthwise" else x
        out = torch.relu(self.norm(self.conv(inner)))
        if self.kind == "residual":
            return out + x
        return torch.cat([out, x], 1) if self.kind == "concatenated" else out


KINDS = ["plain", "residual", "depthwise", "transposed", "concatenated", "padded", "normalized"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    widths=st.lists(st.integers(2, 7), min_size=6, max_size=6),
    seed=st.integers(0, 2**20),
    density=st.sampled_from([0.1, 0.3, 0.6, 1.0]),
    rows=st.sampled_from([0.1, 0.25, 0.4]),
    pooled=st.booleans(),
)
@example(  # a channel that stays in the first round for a neighbour that goes
    kinds=["plain", "depthwise", "depthwise", "concatenated"],
    widths=[3, 7, 5, 7, 6, 2],
    seed=0,
    density=0.3,
    rows=0.1,
    pooled=True,
)
def test_any_small_network(kinds, widths, seed, density, rows, pooled) -> None:
    torch.manual_seed(seed)
    blocks, channels = [], widths[0]
    for kind, width in zip(kinds, widths[1:], strict=False):
        blocks.append(Block(kind, channels, width))
        channels = blocks[-1].outside
    side = 5 - sum(k in ("plain", "depthwise", "normalized") for k in kinds)
    side += sum(k == "transposed" for k in kinds)
    pool = [nn.AdaptiveAvgPool2d(1)] if pooled else []
    features = channels * (1 if pooled else side * side)
    model = prepared(nn.Sequential(*blocks, *pool, nn.Flatten(), nn.Linear(features, 3)), seed)
    masks = random_masks(model, density, seed)
    for mask in masks.values():  # whole rows and columns, which single weights rarely make dead
        mask &= torch.rand(len(mask), *[1] * (mask.dim() - 1)) >= rows
        mask &= torch.rand(1, mask.shape[1], *[1] * (mask.dim() - 2)) >= rows
    trimmed(model, masks, torch.zeros(1, widths[0], 5, 5, dtype=torch.float64))
