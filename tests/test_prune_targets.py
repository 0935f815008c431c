"""Which weights are prunable, and how they are named."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from fastprune.pruners import methods, prunable, prune, score
from fastprune.pruners.targets import PRUNABLE_TYPES
from small_models import TASK, Snapshot, network

quiet = pytest.mark.filterwarnings("ignore:.*pruned every weight")


def test_prunable_by_default():
    model = nn.ModuleDict(
        {
            "z": nn.Linear(2, 2),
            "a": nn.ModuleList([k(2, 2, 1) for k in PRUNABLE_TYPES[1:]]),
            "norm": nn.LayerNorm(2),
            "table": nn.Embedding(3, 2),
            "rnn": nn.LSTM(2, 2),
            "attention": nn.MultiheadAttention(2, 1),
        }
    )
    assert list(prunable(model)) == [
        "z.weight",
        *(f"a.{i}.weight" for i in range(6)),
        "attention.out_proj.weight",
    ]
    assert prunable(model)["z.weight"] is model["z"].weight


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("5", None, "5"),
        ("5.weight", None, "5"),
        (["7", nn.Conv2d], None, "07"),
        (None, "7", "05"),
        (None, ["0.weight", "7.bias"], "57"),
        (nn.Linear, "7", "5"),
        ("*", [nn.Linear, nn.BatchNorm2d], "0"),
        ("[57]", None, "57"),
        ("*.weight", "0*", "57"),
        (nn.Sequential, None, "057"),
        (None, (), "057"),
    ],
)
def test_include_and_exclude(include, exclude, names):
    model = network()
    wanted = [f"{n}.weight" for n in names]
    assert list(prunable(model, include, exclude)) == wanted
    masks = prune(model, "magnitude", 0.5, include=include, exclude=exclude)
    assert list(masks) == wanted
    assert masks.nnz() == math.floor(0.5 * masks.numel() + 0.5)
    assert list(score(model, "magnitude", include=include, exclude=exclude)) == wanted


def test_containers_and_own_parameters_can_be_named():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            self.matrix = nn.Parameter(torch.randn(3, 2))
            self.table = nn.Embedding(3, 2)

    model = Own()
    assert list(prunable(model)) == ["block.0.weight", "block.1.weight"]
    assert list(prunable(model, include="block")) == ["block.0.weight", "block.1.weight"]
    assert list(prunable(model, exclude="block.0")) == ["block.1.weight"]
    assert list(prunable(model, include=["matrix", "block.1", "table.weight"])) == [
        "matrix",
        "block.1.weight",
        "table.weight",
    ]


@pytest.mark.parametrize(
    ("include", "exclude", "error", "text"),
    [
        ("nowhere", None, ValueError, "include: 'nowhere' matches nothing"),
        (["5", "no*"], None, ValueError, r"include: 'no\*' matches nothing"),
        (nn.Conv1d, None, ValueError, "include: Conv1d matches nothing"),
        ("1", None, ValueError, "include: '1' matches no linear or convolution"),
        (nn.BatchNorm2d, None, ValueError, "include: BatchNorm2d matches no linear"),
        ("1.weight", None, ValueError, "'1.weight'.*normalization"),
        ("5.bias", None, ValueError, "'5.bias'.*bias"),
        ("rnn.weight_hh_l0", None, ValueError, "rnn.weight_hh_l0.*LSTM"),
        ("attention.in_proj_weight", None, ValueError, "in_proj_weight.*MultiheadAttention"),
        ([], None, ValueError, "include.*empty"),
        (None, "nowhere", ValueError, "exclude: 'nowhere' matches nothing"),
        (None, nn.Conv3d, ValueError, "exclude: Conv3d matches nothing"),
        (None, "*", ValueError, "no prunable weights"),
        (3, None, TypeError, "include"),
        ([3], None, TypeError, "include.*3"),
        (None, nn.Linear(2, 2), TypeError, "exclude"),
        (None, [int], TypeError, "exclude.*int"),
    ],
)
def test_selection_errors(include, exclude, error, text):
    model = network()
    model.add_module("rnn", nn.LSTM(2, 2))
    model.add_module("attention", nn.MultiheadAttention(4, 2))
    with pytest.raises(error, match=text):
        prune(model, "magnitude", 0.5, include=include, exclude=exclude)


def test_shared_weights_appear_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.mix = nn.Linear(4, 4)
            self.again = self.mix
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(torch.tanh(self.mix(self.table(x)))))

    torch.manual_seed(0)
    model = Tied()
    task = {"data": [(torch.tensor([1, 2, 6]), torch.tensor([0, 3, 5]))], "loss": F.cross_entropy}
    assert list(prunable(model)) == ["table.weight", "mix.weight"]
    assert list(prunable(model, exclude="head")) == ["mix.weight"]
    assert list(prunable(model, exclude="again")) == ["table.weight"]
    assert list(prunable(model, include="again")) == ["mix.weight"]
    masks = prune(model, "snip", 0.5, **task)
    assert masks.numel() == 28 + 16
    got = score(model, "iter-snip", masks=masks, **task)
    masks.apply_(model)
    F.cross_entropy(model(task["data"][0][0]), task["data"][0][1]).backward()
    for name, p in model.named_parameters():
        if name in got:  # both uses are pruned, and both count in the gradient
            assert torch.equal(got[name], (p.detach() * p.grad).abs())
    alias = {"head.weight": masks["table.weight"]}
    a = score(model, "force", masks=alias, **task)
    b = score(model, "force", masks={"table.weight": masks["table.weight"]}, **task)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_unusable_layers_are_named():
    model = network()
    parametrizations.weight_norm(model[5])
    with pytest.raises(ValueError, match=r"5\.weight.*parametriz"):
        prune(model, "magnitude", 0.5)
    assert list(prune(model, "magnitude", 0.5, exclude="5")) == ["0.weight", "7.weight"]
    model = network()
    torch_prune.random_unstructured(model[7], "weight", 0.5)
    with pytest.raises(ValueError, match=r"7\.weight.*weight_orig"):
        prune(model, "magnitude", 0.5)
    with pytest.raises(ValueError, match=r"1\.weight.*not initialized"):
        prune(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), "magnitude", 0.5)
    with pytest.raises(ValueError, match=r"1\.weight.*not initialized"):
        prune(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d()), "magnitude", 0.5)
    with pytest.raises(ValueError, match=r"0\.weight.*meta"):
        prune(nn.Sequential(nn.Linear(2, 2, device="meta")), "magnitude", 0.5)
    with pytest.raises(ValueError, match=r"0\.weight.*complex64"):
        prune(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)), "magnitude", 0.5)
    for scope in ("neuron", "filter"):
        with pytest.raises(ValueError, match=r"0\.weight.*transposed"):
            prune(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), "magnitude", 0.5, scope=scope)
    with pytest.raises(ValueError, match="no prunable weights"):
        prune(nn.Sequential(nn.ReLU()), "magnitude", 0.5)
    with pytest.raises(TypeError, match="model"):
        prune("model", "magnitude", 0.5)


@quiet
@pytest.mark.parametrize("method", methods())
def test_attention_and_recurrent_models(method):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 4, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.rnn(x[:, 0])[0]).mean(1))

    model = Mixed().eval()
    before = Snapshot(model)
    masks = prune(model, method, 0.5, steps=2, **TASK)
    assert list(masks) == [
        "encoder.self_attn.out_proj.weight",
        "encoder.linear1.weight",
        "encoder.linear2.weight",
        "head.weight",
    ]
    before.check()
