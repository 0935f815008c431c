"""Measures of masks: compression, multiply-adds, agreement."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from small_models import Snapshot, batch, network


def masks_of(*bits: list[list[int]]) -> dict[str, Tensor]:
    return {f"w{i}": torch.tensor(b).bool() for i, b in enumerate(bits)}


# -- compression ---------------------------------------------------------------------------------


def test_direct_compression():
    masks = masks_of([[1, 0, 0, 0]], [[1, 1], [0, 0]])
    assert fp.direct_compression(masks) == 8 / 3
    assert fp.direct_compression(fp.Masks(masks)) == 8 / 3
    assert [r.compression for r in fp.Masks(masks).summary().rows] == [4.0, 2.0]
    assert fp.direct_compression(masks_of([[0, 0]])) == math.inf
    assert fp.direct_compression({"w": torch.ones(0, 3).bool()}) == 1.0
    assert fp.direct_compression({}) == 1.0
    with pytest.raises(ValueError, match=r"masks\['w'\].*bool"):
        fp.direct_compression({"w": torch.ones(2)})
    with pytest.raises(TypeError, match="masks"):
        fp.direct_compression([torch.ones(2).bool()])  # type: ignore[arg-type]


# -- agreement -----------------------------------------------------------------------------------


def test_changes_by_hand():
    a = masks_of([[1, 1, 0, 0]], [[1, 0], [1, 0]])
    b = masks_of([[1, 0, 1, 0]], [[1, 0], [1, 0]])
    changes = fp.mask_changes(a, b)
    first, second = changes.rows
    assert (first.both, first.pruned, first.revived, first.flips) == (1, 1, 1, 2)
    assert first.iou == 1 / 3
    assert (second.flips, second.iou) == (0, 1.0)
    assert (changes.total.weights, fp.mask_flips(a, b), fp.mask_iou(a, b)) == (8, 2, 3 / 5)
    assert str(changes).splitlines()[-1].split() == ["total", "8", "3", "1", "1", "2", "0.6000"]
    nothing = masks_of([[0, 0]])
    assert fp.mask_iou(nothing, nothing) == 1.0
    assert fp.mask_iou(nothing, masks_of([[1, 0]])) == 0.0
    assert fp.mask_iou({}, {}) == 1.0


bits = st.lists(st.booleans(), min_size=6, max_size=6)


@given(a=st.lists(bits, min_size=2, max_size=2), b=st.lists(bits, min_size=2, max_size=2))
def test_changes_against_sets(a, b):
    left = {str(i): torch.tensor(m).view(2, 3) for i, m in enumerate(a)}
    right = {str(i): torch.tensor(m).view(2, 3) for i, m in enumerate(b)}
    x, y = ({(i, j) for i in range(2) for j in range(6) if m[i][j]} for m in (a, b))
    assert fp.mask_flips(left, right) == len(x ^ y) == fp.mask_flips(right, left)
    assert fp.mask_iou(left, right) == (len(x & y) / len(x | y) if x | y else 1.0)
    changes = fp.mask_changes(left, right)
    assert changes.total.pruned == len(x - y)
    assert changes.total.revived == len(y - x)
    for i, row in enumerate(changes.rows):
        assert row.flips == sum(p != q for p, q in zip(a[i], b[i], strict=True))


def test_changes_need_the_same_layers():
    a = masks_of([[1, 0]])
    with pytest.raises(ValueError, match="w1"):
        fp.mask_iou(a, masks_of([[1, 0]], [[1]]))
    with pytest.raises(ValueError, match="w0"):
        fp.mask_flips(a, masks_of([[1], [0]]))
    with pytest.raises(TypeError, match="masks"):
        fp.mask_flips(a, 3)  # type: ignore[arg-type]


# -- multiply-adds -------------------------------------------------------------------------------

LAYERS = [
    (nn.Linear(6, 4), (5, 6)),
    (nn.Linear(6, 4), (2, 3, 6)),
    (nn.Linear(6, 4), (6,)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), groups=2), (2, 4, 8, 7)),
    (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (1, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3), (4, 8, 7)),
    (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (3, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 3, 4)),
    (nn.ConvTranspose3d(2, 3, 2, padding=1), (1, 2, 3, 4, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v)[:40])
def test_macs_of_every_kind_of_layer(layer, shape):
    x = torch.randn(shape)
    dense = fp.macs(layer, x).total.dense
    # The direct definition, where it is linear: by ones, each product of a weight and an input
    # that is not padding adds 1 to some output. Padding and cropping are what differs.
    if isinstance(layer, nn.Linear):
        assert dense == layer.weight.numel() * x.numel() // 6
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * dense
    mask = torch.rand(layer.weight.shape) < 0.4
    row = fp.macs(layer, x, {"weight": mask}).rows[0]
    assert row.name == "weight"
    assert row.kind == type(layer).__name__
    assert row.dense == dense
    assert row.direct * mask.numel() == dense * int(mask.sum())
    assert row.density == pytest.approx(float(mask.float().mean()))


def test_macs_of_lenet_5():
    model = fp.models.create("lenet-5")
    counts = fp.macs(model, torch.randn(1, 3, 32, 32))
    # 5x5 kernels on 28x28 and 10x10 outputs, then the linear layers.
    expected = [450 * 784, 2400 * 100, 48000, 10080, 840]
    assert [r.dense for r in counts.rows] == [r.direct for r in counts.rows] == expected
    assert counts.total.density == 1.0
    masks = fp.prune(model, "magnitude", quota=[0.5, 0.25, 0.9, 0.0, 1 - 1 / 840])
    counts = fp.macs(model, torch.randn(2, 3, 32, 32), masks)
    assert [r.direct for r in counts.rows] == [2 * n for n in (225 * 784, 180000, 4800, 10080, 1)]
    assert counts.total.dense == 2 * sum(expected)
    assert str(counts).splitlines()[2].split()[-1] == "0.5000"
    with torch.device("meta"):
        assert fp.macs(fp.models.create("lenet-5"), torch.empty(2, 3, 32, 32), masks) == counts


def test_macs_leave_the_model_alone():
    model = network()
    model[1].train()
    model[3].eval()
    before = Snapshot(model)
    fp.macs(model, batch()[0])
    before.check()

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.fails = False

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.fails:
                raise RuntimeError("no")
            return self.layer(x + torch.rand(2))

    model = Counter()
    before = Snapshot(model)
    fp.macs(model, torch.ones(3, 2))
    before.check()
    model.fails = True
    with pytest.raises(RuntimeError, match="no"):
        fp.macs(model, torch.ones(3, 2))
    before.check()
    assert not model.layer._forward_hooks


class Shared(nn.Module):
    """A layer called twice, a weight under two names, an unused layer, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(3, 3, bias=False)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.second(self.first(self.twice(self.twice(a)) + b))


def test_macs_of_shared_layers_and_several_inputs():
    model, a = Shared(), torch.ones(2, 3)
    for x in ((a, a), [a, a], {"b": a, "a": a}):
        rows = {r.name: r.dense for r in fp.macs(model, x).rows}
        assert rows == {"twice.weight": 36, "first.weight": 18, "second.weight": 18}
    one, other = torch.eye(3).bool(), torch.ones(3, 3).bool()
    other[0, 0] = False
    for masks, kept in (
        ({"second.weight": one}, 3),
        ({"second.weight": one, "first.weight": other}, 2),
    ):
        rows = {r.name: r.direct for r in fp.macs(model, (a, a), masks).rows}
        assert rows == {
            "twice.weight": 36,
            "first.weight": 2 * kept,
            "second.weight": 2 * kept,
        }
    with pytest.raises(ValueError, match=r"unused\.weight.*ran"):
        fp.macs(model, (a, a), {"unused.weight": one})
    with pytest.raises(ValueError, match="nowhere"):
        fp.macs(model, (a, a), {"nowhere": one})
    with pytest.raises(TypeError, match="model"):
        fp.macs(3, a)  # type: ignore[arg-type]


def test_macs_of_masked_layers():
    model, x = network().eval(), batch()[0]
    masks = fp.prune(model, "magnitude", 0.5)
    fast = nn.Sequential(*model)
    fast[0] = fp.nn.MaskedConv2d(model[0], masks["0.weight"])
    fast[5] = fp.nn.MaskedLinear(model[5], masks["5.weight"])
    expected = fp.macs(model, x, masks)
    assert [r.direct for r in fp.macs(fast, x, {"7.weight": masks["7.weight"]}).rows] == [
        r.direct for r in expected.rows
    ]
    assert fp.macs(fast, x).total.dense == expected.total.dense


def test_effective_macs():
    """With the effective masks, what is direct is effective: a cut layer multiplies nothing."""
    model, x = network().eval(), batch()[0]
    masks = {n: m.clone() for n, m in fp.Masks.ones(model).items()}
    masks["7.weight"][:] = False
    masks["7.weight"][0, 2] = True  # one of five hidden units reaches the output
    active = fp.effective_masks(model, masks, example_input=x)
    rows = fp.macs(model, x, active).rows
    assert [r.direct for r in rows[1:]] == [len(x) * 16, len(x)]
    assert rows[0].direct == rows[0].dense
    assert fp.effective_compression(model, {}, example_input=x) == fp.direct_compression({}) == 1.0
