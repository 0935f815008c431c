"""What goes beyond one selection: sweeps, frozen tensors, minima, kept scores, LAMP and noise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from fastprune.reference.global_topk_mask import (
    filter_norms,
    fuse_score,
    lamp_scores,
    pack_bits,
    uniform_noise,
    unpack_bits,
)

SHAPES = [(40, 30), (7,), (3, 5, 2, 2), (0, 4), (1, 1)]


def tensors(seed: int, *, integers: bool = False, shapes: Any = None) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=g) for s in shapes or SHAPES]
    return [(3 * t).round() if integers else t for t in made]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), i


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scope", ["global", "layer", "neuron", "filter"])
@pytest.mark.parametrize("shapes", [SHAPES[:3], [(40, 1000), (9, 333)]], ids=["small", "large"])
def test_sweep(isa: str, scope: Any, packed: bool, shapes: Any) -> None:
    x = tensors(1, integers=True, shapes=shapes)
    densities = [0.5, 0.0, 1.0, 0.013, 0.9, 0.5]
    call = {"scope": scope, "score": "magnitude", "packed": packed}
    sweep = fp.global_topk_sweep(x, densities, **call)
    for d, masks in zip(densities, sweep, strict=True):
        same(masks, fp.global_topk_mask(x, d, **call))
    if scope in ("global", "filter"):
        ks = [3, 0, 5]
        for k, masks in zip(ks, fp.global_topk_sweep(x, k=ks, **call), strict=True):
            same(masks, fp.global_topk_mask(x, k=k, **call))


def test_sweep_of_many() -> None:
    """More selections than share a pass, some with brackets that a massed value misleads."""
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    x[::3] = 0.0
    ks = [0, 1, 100_000, 199_999, 200_000, 200_001, 250_000, 300_000, *range(5, 300_000, 17_001)]
    order = torch.sort(x.abs(), descending=True, stable=True).indices
    for k, (mask,) in zip(ks, fp.global_topk_sweep([x], k=ks, score="magnitude"), strict=True):
        expected = torch.zeros(x.numel(), dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(mask, expected), k


def test_packed_is_little_endian() -> None:
    x = tensors(2)
    masks, bits = fp.global_topk_mask(x, 0.3), fp.global_topk_mask(x, 0.3, packed=True)
    for m, b in zip(masks, bits, strict=True):
        packed = np.packbits(m.numpy().ravel(), bitorder="little")
        assert torch.equal(b, torch.from_numpy(packed))
        assert torch.equal(pack_bits(m), b)
        assert torch.equal(unpack_bits(b, m.shape), m)


def by_definition(scores: list[Tensor], k: int, frozen: list[bool], least: int) -> list[Tensor]:
    """Everything frozen, the best few of each other tensor, then the best of the rest."""
    order = sorted(
        ((-float(s), i, j) for i, t in enumerate(scores) for j, s in enumerate(t.flatten())),
    )
    masks = [torch.full((t.numel(),), f) for t, f in zip(scores, frozen, strict=True)]
    for i, _ in enumerate(scores):
        if not frozen[i]:
            for _, _, j in [entry for entry in order if entry[1] == i][:least]:
                masks[i][j] = True
    left = k - sum(int(m.sum()) for m in masks)
    for _, i, j in order:
        if left > 0 and not masks[i][j]:
            masks[i][j] = True
            left -= 1
    return [m.view(t.shape) for m, t in zip(masks, scores, strict=True)]


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    data=st.data(),
    least=st.integers(0, 6),
    packed=st.booleans(),
)
def test_frozen_and_minimum(
    seed: int, sizes: list[int], data: Any, least: int, packed: bool
) -> None:
    x = tensors(seed, integers=True, shapes=[(n,) for n in sizes])
    frozen = [data.draw(st.booleans()) for _ in sizes]
    needed = sum(n if f else min(n, least) for n, f in zip(sizes, frozen, strict=True))
    k = data.draw(st.integers(needed, sum(sizes)))
    got = fp.global_topk_mask(x, k=k, frozen=frozen, min_per_tensor=least, packed=packed)
    expected = by_definition(x, k, frozen, least)
    same(got, [pack_bits(m) for m in expected] if packed else expected)


def test_frozen_and_minimum_of_filters() -> None:
    x = tensors(5, shapes=[(6, 4), (5, 3, 3), (4, 2)])
    norms = [filter_norms(fuse_score(t, None, "magnitude")) for t in x]
    x[1] *= 0.01
    norms[1] *= 0.01
    got = fp.global_topk_mask(
        x, k=11, scope="filter", frozen=[True, False, False], min_per_tensor=2
    )
    expected = by_definition(norms, 11, [True, False, False], 2)
    assert [int(m.sum()) for m in expected] == [6, 2, 3]
    for g, e, t in zip(got, expected, x, strict=True):
        assert torch.equal(g, e.view(-1, *[1] * (t.dim() - 1)).expand(t.shape))


def test_frozen_and_minimum_within_and_noise() -> None:
    x = tensors(7, shapes=[(50,), (60,), (70,)])
    within = [torch.rand(t.shape, generator=torch.Generator().manual_seed(1)) < 0.4 for t in x]
    masks = fp.global_topk_mask(x, k=60, within=within, frozen=[False, True, False])
    assert torch.equal(masks[1], within[1])
    assert sum(int(m.sum()) for m in masks) == 60
    assert all(bool((m <= w).all()) for m, w in zip(masks, within, strict=True))
    noise = [
        fuse_score(t, None, "noise", seed=3, first=f) for t, f in zip(x, (0, 50, 110), strict=True)
    ]
    got = fp.global_topk_mask(
        x, k=90, score="noise", seed=3, frozen=[False, True, False], min_per_tensor=12
    )
    same(got, by_definition(noise, 90, [False, True, False], 12))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "score", ["identity", "magnitude", "product", "saliency", "square", "noise"]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_kept_scores(isa: str, score: Any, packed: bool, scaled: bool) -> None:
    x = [t.to(d) for t, d in zip(tensors(3), [torch.float32, torch.bfloat16] * 3, strict=False)]
    x.append(torch.randn(70_001, generator=torch.Generator().manual_seed(9)).half())
    other = [t.flip(0) for t in x] if score in ("product", "saliency") else None
    more: dict[str, Any] = {"score": score, "other": other}
    more["seed"] = 11 if score == "noise" else None
    more["scale"] = [1.0, -2.5, 0.3, 1.0, 4.0, 0.7] if scaled else None
    masks = fp.global_topk_mask(x, 0.2, packed=packed, **more)
    kept = fp.kept_scores(x, masks, **more)
    first = 0
    every = []
    for i, t in enumerate(x):
        scale = more["scale"][i] if scaled else 1.0
        fused = fuse_score(
            t, None if other is None else other[i], score, scale, seed=11, first=first
        ).double()
        mask = unpack_bits(masks[i], t.shape) if packed else masks[i]
        chosen = fused[mask]
        assert int(kept.kept[i]) == chosen.numel()
        least = float(chosen.min()) if chosen.numel() else math.inf
        assert float(kept.threshold[i]) == least
        assert float(kept.total[i]) == pytest.approx(math.fsum(chosen.tolist()), rel=1e-12)
        every += fused.flatten().tolist()
        first += t.numel()
    k = int(kept.kept.sum())
    assert float(kept.threshold.min()) == sorted(every, reverse=True)[k - 1]


def test_kept_scores_of_lamp_and_nothing() -> None:
    x = tensors(4)
    masks = fp.global_topk_mask(x, 0.25, score="lamp")
    kept = fp.kept_scores(x, masks, score="lamp")
    scores = [lamp_scores(t) for t in x]
    for i, (s, m) in enumerate(zip(scores, masks, strict=True)):
        assert float(kept.total[i]) == pytest.approx(float(s[m].sum()), rel=1e-12)
    best = torch.cat([s.flatten() for s in scores]).sort(descending=True).values
    assert float(kept.threshold.min()) == float(best[int(kept.kept.sum()) - 1])
    empty = fp.kept_scores(x, [torch.zeros(t.shape, dtype=torch.bool) for t in x])
    assert empty.kept.tolist() == [0] * 5
    assert empty.threshold.tolist() == [math.inf] * 5
    assert empty.total.tolist() == [0.0] * 5


def test_kept_sums_do_not_depend_on_threads(threads: None) -> None:
    x = [torch.randn(200_001, generator=torch.Generator().manual_seed(0))]
    masks = fp.global_topk_mask(x, 0.3)
    sums = set()
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        sums.add(float(fp.kept_scores(x, masks).total[0]))
    assert len(sums) == 1


def naive_lamp(w: Tensor) -> Tensor:
    """Equation 3 word by word."""
    squares = w.double().flatten() ** 2
    totals = torch.stack([squares[squares >= s].sum() for s in squares])
    return torch.where(squares == 0, 0.0, squares / totals).view(w.shape)


def test_lamp_reference_is_the_equation() -> None:
    for integers in (False, True):
        w = tensors(6, integers=integers, shapes=[(9, 11)])[0]
        torch.testing.assert_close(lamp_scores(w), naive_lamp(w), rtol=1e-14, atol=0)


def test_lamp_does_not_empty_small_layers() -> None:
    x = tensors(8, shapes=[(100, 100), (10, 10), (5,)])
    x[1] *= 1e-6
    masks = fp.global_topk_mask(x, 0.01, score="lamp")
    assert all(bool(m.any()) for m in masks)  # the best of each scores 1
    assert not bool(fp.global_topk_mask(x, 0.01, score="magnitude")[1].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lamp_on_large_tensors(isa: str, threads: None, dtype: torch.dtype) -> None:
    x = [t.to(dtype) for t in tensors(9, shapes=[(300, 500), (70_000,), (0,), (33, 7)])]
    scores = [lamp_scores(t) for t in x]
    for k in (1, 2, 1000, 110_000, 219_000, 220_231):
        expected = fp.global_topk_mask(scores, k=k)
        for n in (1, 3):
            torch.set_num_threads(n)
            same(fp.global_topk_mask(x, k=k, score="lamp"), expected)


def test_lamp_takes_infinite_weights_for_nan() -> None:
    x = tensors(1)
    x[2][0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match=r"scores\[2\] \(c\): .*NaN"):
        fp.global_topk_mask(x, 0.5, score="lamp", names=["a", "b", "c", "d", "e"])


def test_noise_is_uniform_and_seeded(isa: str) -> None:
    x = [torch.empty(300, 400), torch.empty(50_000, dtype=torch.bfloat16)]
    a = fp.global_topk_mask(x, 0.1, score="noise", seed=1)
    same(a, fp.global_topk_mask([torch.zeros(300, 400), x[1]], 0.1, score="noise", seed=1))
    b = fp.global_topk_mask(x, 0.1, score="noise", seed=2)
    both = int((a[0] & b[0]).sum())
    assert abs(both - 1200) < 6 * math.sqrt(1200)  # independent
    rows = a[0].sum(1).double()
    assert abs(float(rows.mean()) - 40) < 6 * math.sqrt(36 / 300)
    assert 20 < float(rows.var()) < 55  # 36 for independent draws
    noise = uniform_noise((100_000,), 5)
    assert float(noise.min()) >= 0
    assert float(noise.max()) < 1
    assert abs(float(noise.mean()) - 0.5) < 0.006
    # The generator's published sequence for seed 1234567.
    bits = (uniform_noise((3,), 1234567) * 2**52).long()
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert bits.tolist() == [value >> 12 for value in known]


def test_sums_of_parts_make_the_whole() -> None:
    """A huge range of magnitudes, so that any loss of squares in the bins would show."""
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(40_000, generator=g) * 10.0 ** torch.randint(-18, 18, (40_000,), generator=g)]
    x.append(torch.randn(20_000, generator=g) * 1e-9)
    scores = [lamp_scores(t) for t in x]
    for k in (10, 5_000, 30_000, 59_990):
        same(fp.global_topk_mask(x, k=k, score="lamp"), fp.global_topk_mask(scores, k=k))


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (ValueError, "seed: score 'noise' needs it", {"score": "noise"}),
        (ValueError, "seed: score 'identity' does not use it", {"seed": 1}),
        (TypeError, "seed: expected an int, got float", {"score": "noise", "seed": 1.0}),
        (ValueError, "scale: score 'lamp' does not use it", {"score": "lamp", "scale": [1, 1]}),
        (ValueError, "scale: expected 2 numbers, one per tensor, got 1", {"scale": [1.0]}),
        (TypeError, r"scale\[1\]: expected a number, got str", {"scale": [1.0, "2"]}),
        (ValueError, r"scale\[0\]: expected a finite number, got nan", {"scale": [math.nan, 1]}),
        (TypeError, "scale: expected a sequence of numbers", {"scale": 2.0}),
        (TypeError, "packed: expected a bool, got int", {"packed": 1}),
        (TypeError, "frozen: expected a sequence of bools", {"frozen": True}),
        (ValueError, "frozen: expected 2 bools, one per tensor, got 1", {"frozen": [True]}),
        (TypeError, r"frozen\[0\]: expected a bool, got int", {"frozen": [1, False]}),
        (
            ValueError,
            "frozen: expected scope 'global' or 'filter', got 'layer'",
            {"frozen": [True, False], "scope": "layer"},
        ),
        (ValueError, "min_per_tensor: expected scope", {"min_per_tensor": 1, "scope": "neuron"}),
        (TypeError, "min_per_tensor: expected an int, got float", {"min_per_tensor": 1.5}),
        (ValueError, "min_per_tensor: expected at least 0, got -1", {"min_per_tensor": -1}),
        (
            ValueError,
            "k: expected at least 6: 6 units of frozen tensors and minima of 0, got 5",
            {"frozen": [True, False]},
        ),
        (
            ValueError,
            "k: expected at least 7: 0 units of frozen tensors and minima of 7, got 5",
            {"min_per_tensor": 4},
        ),
    ],
)
def test_bad_calls(kind: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    call: dict[str, Any] = {"scores": [torch.ones(2, 3), torch.ones(3)], "density": 0.5}
    with pytest.raises(kind, match=f"^global_topk_mask: {message}"):
        fp.global_topk_mask(**call | arguments)


def test_bad_sweeps_and_masks() -> None:
    x = [torch.ones(2, 3)]
    for arguments, message in (
        ({}, "densities, k: expected exactly one of them, got neither"),
        ({"densities": [0.1], "k": [1]}, "densities, k: expected exactly one of them, got both"),
        ({"densities": []}, "densities: expected at least one"),
        ({"k": [7]}, "k: expected 0 to 6, got 7"),
        ({"densities": [0.1, 1.5]}, r"density: expected a fraction in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            fp.global_topk_sweep(x, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="densities: expected a sequence, got float"):
        fp.global_topk_sweep(x, 0.5)  # type: ignore[arg-type]
    for masks in ([], [torch.ones(3, 2).bool()], [torch.ones(2, 3)], [torch.ones(2).byte()]):
        with pytest.raises(ValueError, match="masks"):
            fp.kept_scores(x, masks)


def test_opcheck() -> None:
    x, g = tensors(1), tensors(2)
    ops = torch.ops.fastprune
    utils = ("test_schema", "test_faketensor")
    for packed, counts in itertools.product((False, True), ([5], [5, 9])):
        masks = ops.global_topk_mask(x, g, [], [5], "global", "saliency", [], 0, packed)
        torch.library.opcheck(
            ops.global_topk_mask.default,
            (x, g, [], counts, "global", "saliency", [1.0, 2.0, 1.0, 1.0, 1.0], 0, packed),
            test_utils=utils,
        )
        torch.library.opcheck(ops.topk_kept.default, (x, g, masks, "saliency"), test_utils=utils)


def test_reference_serves_other_devices() -> None:
    """What runs where there is no kernel, behind the same checks."""
    from fastprune.ops.global_topk_mask import _kept_by_reference
    from fastprune.ops.topk_call import TopkCall

    x = tensors(3)
    for packed in (False, True):
        masks = fp.global_topk_mask(x, 0.3, score="magnitude", packed=packed)
        call = TopkCall.check(x, "global", "magnitude", None, None, None, None, packed, None)
        for a, b in zip(
            _kept_by_reference(call, masks),
            fp.kept_scores(x, masks, score="magnitude"),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(2**31 + 100, dtype=torch.bfloat16)
    x[7], x[-1], x[2**31 + 5] = -2.0, 1.0, 0.5
    for k, expected in ((2, [7, 2**31 + 99]), (4, [0, 7, 2**31 + 5, 2**31 + 99])):
        mask = fp.global_topk_mask([x], k=k, score="magnitude")[0]
        assert mask.nonzero().flatten().tolist() == expected
        del mask
    tail = fp.global_topk_mask([x[-200:], x], k=2, score="magnitude", packed=True)
    assert [int(t.count_nonzero()) for t in tail] == [1, 1]  # the view's last, and entry 7
