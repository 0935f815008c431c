"""The peers: every product against float64, the layer sets against the networks."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprune import models
from fastprune.peers import compare, layers, masks, roofline
from fastprune.peers.candidates import Case, Dense, Peer
from fastprune.peers.layers import Conv, Layer, Linear
from fastprune.peers.roofline import Ceilings

LAYERS: list[Layer] = [
    Linear(7, 13, 1),
    Linear(33, 20, 17),
    Conv(5, 3, 6, batch=2),
    Conv(4, 6, 9, stride=2),
    Conv(8, 3, 14, kernel=7, stride=2, batch=2),
    Conv(6, 10, 5, kernel=1, batch=3),
    Conv(6, 4, 5, kernel=1, stride=2),
]
REASONS = {peer.name: peer.available() for peer in compare.PEERS}


def case_of(layer: Layer, sparsity: float = 0.6, kind: str = "random") -> Case:
    return compare.make_case(layer, masks.make(kind, layer.weight_shape, sparsity, 0), 0)


@pytest.mark.parametrize(
    ("peer", "layer"),
    [
        pytest.param(peer, layer, id=f"{peer.name}-{layer}")
        for peer in compare.PEERS
        for layer in LAYERS
        if layer.kind in peer.kinds
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
def test_products(peer: Peer, layer: Layer, sparsity: float) -> None:
    if REASONS[peer.name] is not None:
        pytest.skip(str(REASONS[peer.name]))
    case = case_of(layer, sparsity)
    want, magnitudes = compare.exact(case)
    with torch.inference_mode():
        call = peer.prepare(case)
        for _ in range(2):
            got = peer.result(call(), case)
            bound = compare.tolerance(case, peer.dtype, magnitudes)
            assert compare.verdict(got, want, bound) is None
    assert got.count_nonzero() > got.numel() // 2 or sparsity == 1.0


def test_every_peer_is_timed_or_says_why_not() -> None:
    for layer in (LAYERS[1], LAYERS[2]):
        found = compare.compare(case_of(layer), compare.PEERS, REASONS, 1e-4)
        assert list(found) == [p.name for p in compare.PEERS if layer.kind in p.kinds]
        for name, candidate in found.items():
            if REASONS[name] is None:
                assert candidate["status"] == "timed", candidate
                assert 0 < candidate["low"] <= candidate["median"] <= candidate["high"]
                assert candidate["prepare_seconds"] > 0
            else:
                assert candidate == {"status": "not available", "reason": REASONS[name]}


def test_wrong_and_failing_peers_are_not_timed() -> None:
    class Off(Dense):
        name = "off"

        def result(self, raw: Any, case: Case) -> Tensor:
            raw = raw.clone()
            raw.view(-1)[3] += 0.01
            return raw

    class NotANumber(Dense):
        name = "nan"

        def result(self, raw: Any, case: Case) -> Tensor:
            return raw * torch.nan

    class Transposed(Dense):
        name = "transposed"

        def result(self, raw: Any, case: Case) -> Tensor:
            return raw.t()

    class Failing(Peer):
        name = "failing"

        def prepare(self, case: Case) -> Any:
            raise RuntimeError("no such\nengine")

    peers = (Off(), NotANumber(), Transposed(), Failing(), Dense())
    found = compare.compare(case_of(LAYERS[1]), peers, dict.fromkeys(p.name for p in peers), 1e-4)
    assert [c["status"] for c in found.values()] == ["wrong"] * 3 + ["failed", "timed"]
    assert "1 of 561 outputs wrong, the worst by 0.01" in found["off"]["reason"]
    assert "561 of 561" in found["nan"]["reason"]
    assert "shape (33, 17), expected (17, 33)" in found["transposed"]["reason"]
    assert found["failing"]["reason"] == "RuntimeError: no such engine"
    assert all("median" not in found[p.name] for p in peers[:4])


def test_packages_that_are_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(Dense):
        name = "absent"
        packages = {"fastprune_no_such_package": "no-such-package"}  # noqa: RUF012

    assert Absent().available() == "fastprune_no_such_package is not installed"
    assert Absent().versions() == {"no-such-package": "unknown"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    reason = Absent().available()
    assert reason is not None
    assert "is installed, but does not import" in reason


@pytest.mark.parametrize("name", [n for n, s in layers.SETS.items() if s.model])
def test_sets_are_the_layers_of_their_networks(name: str) -> None:
    chosen = layers.SETS[name]
    assert chosen.model is not None
    with torch.device("meta"):
        model = models.create(chosen.model)
    walked = masks.walk(model, models.default_input_shape(chosen.model))
    assert Counter(walked.values()) == chosen.layers
    prunable = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(walked) == len(prunable)


def test_mobilenet_is_the_one_of_torchvision() -> None:
    set_of = layers.SETS["mobilenetv2-1x1"].layers
    # 3 504 872 parameters less classifier, 3x3 convolutions and BatchNorm.
    assert sum(math.prod(k.weight_shape) * n for k, n in set_of.items()) == 2_124_672
    torchvision = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = torchvision.mobilenet_v2()
    walked = masks.walk(model, (3, 224, 224)).values()
    assert Counter(k for k in walked if isinstance(k, Conv) and k.kernel == 1) == set_of


def test_batches_of_a_set() -> None:
    transformer = layers.SETS["transformer"]
    assert len(transformer.cases()) == 7 * 3
    assert {layer.batch for layer, _ in transformer.cases([5])} == {5}
    kernels = layers.SETS["kernels"]
    assert len(kernels.cases()) == 5 + 4 * 2
    # At one batch size the same weight is one case.
    assert len(kernels.cases([3])) == 3 + 4
    names = [str(layer) for s in layers.SETS.values() for layer, _ in s.cases()]
    assert "64 ch 56x56, 3x3, batch 16" in names
    assert "256 to 512 ch 56x56, 1x1, stride 2, batch 1" in names


@pytest.mark.parametrize("kind", masks.KINDS)
@pytest.mark.parametrize("shape", [(64, 100), (32, 16, 3, 3)], ids=str)
def test_masks_have_the_count_and_follow_the_seed(kind: str, shape: tuple[int, ...]) -> None:
    mask = masks.make(kind, shape, 0.9, 0)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert mask.sum() == math.floor(0.1 * mask.numel() + 0.5)
    assert torch.equal(mask, masks.make(kind, shape, 0.9, 0))
    assert not torch.equal(mask, masks.make(kind, shape, 0.9, 1))


def test_uneven_masks_are_as_uneven_as_their_docstring_says() -> None:
    for sparsity, expected in ((0.8, 0.9), (0.9, 1.3), (0.95, 1.8)):
        variation = []
        for kind in masks.KINDS:
            rows = masks.make(kind, (512, 512, 3, 3), sparsity, 0).flatten(1).sum(1).double()
            variation.append(float(rows.std() / rows.mean()))
        assert variation[0] < 0.1
        assert variation[1] == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_floors(layer: Layer) -> None:
    case = case_of(layer)
    # A product of ones counts the terms of each output; padding adds none.
    counted = case.dense(torch.ones_like(case.x), case.mask.float())
    floor = roofline.floor(layer, case.mask)
    assert floor.flops == 2 * int(counted.sum())
    assert floor.bytes == 4 * (case.x.numel() + counted.numel()) + 6 * int(case.mask.sum())
    assert floor.seconds(Ceilings(1.0, 1e30)) == floor.flops
    assert floor.seconds(Ceilings(1e30, 1.0)) == floor.bytes


def test_ceilings_are_those_of_a_machine() -> None:
    measured = roofline.ceilings(0.001)
    assert 1e8 < measured.flops < 1e14
    assert 1e8 < measured.bandwidth < 1e13


def test_walk_leaves_the_network_as_it_was() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.Conv2d(4, 4, 3, padding=1, groups=4),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 36, 5),
    )
    assert masks.walk(model, (3, 8, 8)) == {"0": Conv(4, 3, 8), "4": Linear(5, 144)}
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
