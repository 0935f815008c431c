"""Quotas: the formulas against hand-made and slow ones, Definition 1, and pruning with them."""

from __future__ import annotations

import itertools
import math
import warnings
from decimal import Decimal, localcontext
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import fastprune as fp
from fastprune import quotas
from fastprune.pruners import prunable
from fastprune.pruners.plan import QUOTAS, plan_counts
from fastprune.quotas.counting import apportioned
from small_models import TASK, Snapshot, batch, network

LENET = [(300, 784), (100, 300), (10, 100)]
VALID = [quotas.uniform, quotas.erk, quotas.smart_ratio, quotas.igq]
ALL = [*VALID, quotas.uniform_plus]

dims = st.integers(1, 40)
layer = st.one_of(
    st.tuples(dims, dims),
    st.tuples(dims, dims, st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.sampled_from([1, 2, 1000, 10**9])),
    st.just((512, 512, 3, 3)),
)
networks = st.lists(layer, min_size=1, max_size=12)
sparsities = st.one_of(
    st.floats(0, 1),
    st.sampled_from([0.0, 1.0, 1e-9, 1 - 1e-9, 5e-324, 1e-300, 1 - 2**-53, 0.5, 0.9, 0.99]),
    st.floats(-9, 0).map(lambda e: 1 - 10**e),
)


def sizes_of(shapes):
    return [math.prod(s) for s in shapes]


def pruned(shapes, layers):
    return math.fsum(s * n for s, n in zip(layers, sizes_of(shapes), strict=True))


def slow(function, shapes, sparsity):
    """The quota once more: 60 digits, plain bisection on the density that all layers share."""
    with localcontext() as context:
        context.prec = 60
        n = [Decimal(size) for size in sizes_of(shapes)]
        budget = (1 - Decimal(sparsity)) * sum(n)
        if function is quotas.igq:

            def kept(c):  # in terms of 1 / F, so that more is more
                return [m * c / (m + c) for m in n]

            high = Decimal(10) ** 40
        else:
            last = len(shapes)
            if function is quotas.erk:
                wanted = [Decimal(sum(s)) / m for s, m in zip(shapes, n, strict=True)]
            elif function is quotas.smart_ratio:
                wanted = [Decimal((last - i + 1) ** 2 + (last - i + 1)) for i in range(1, last + 1)]
            else:
                wanted = [Decimal(1)] * last

            def kept(c):
                return [m * min(Decimal(1), c * w) for m, w in zip(n, wanted, strict=True)]

            high = 1 / min(wanted)
        low = Decimal(0)
        for _ in range(320):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(kept(middle)) < budget else (low, middle)
        return [float(1 - k / m) for k, m in zip(kept(high), n, strict=True)]


# -- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", VALID)
@given(shapes=networks, sparsity=sparsities)
@example(shapes=[(1,), (10**9,)], sparsity=1 - 2**-53)  # densities below half an ulp of 1
@example(shapes=[(1,), (31623, 31623)], sparsity=1 - 2**-53)
def test_definition_1(function, shapes, sparsity):
    layers = function(shapes, sparsity)
    total = sum(sizes_of(shapes))
    assert len(layers) == len(shapes)
    assert all(type(s) is float and 0 <= s <= 1 for s in layers)
    # (i) total sparsity, far below one weight; (ii) layer integrity.
    assert abs(pruned(shapes, layers) - sparsity * total) < 1e-6
    assert sparsity == 1 or max(layers) < 1
    if sparsity in (0, 1):
        assert layers == [sparsity] * len(shapes)


@pytest.mark.parametrize("function", VALID)
@given(shapes=networks, pair=st.tuples(sparsities, sparsities).map(sorted))
def test_monotone_layer_by_layer(function, shapes, pair):
    below, above = (function(shapes, s) for s in pair)
    assert all(a <= b + 1e-12 for a, b in zip(below, above, strict=True))


@pytest.mark.parametrize("function", VALID)
@given(shapes=networks, sparsity=sparsities)
def test_against_the_slow_formula(function, shapes, sparsity):
    if function is quotas.igq and sparsity in (0, 1):
        return  # the force is 0, or infinite
    expected = slow(function, shapes, sparsity)
    assert function(shapes, sparsity) == pytest.approx(expected, rel=1e-9, abs=1e-14)


@given(shapes=networks, sparsity=sparsities)
def test_igq_prunes_larger_layers_more(shapes, sparsity):
    pairs = sorted(zip(sizes_of(shapes), quotas.igq(shapes, sparsity), strict=True))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(pairs))


def test_igq_at_the_extremes():
    shapes = [(1,), (10**9,)]
    assert quotas.igq(shapes, 0.0) == [0.0, 0.0]
    assert quotas.igq(shapes, 1.0) == [1.0, 1.0]
    # F = 1e-18: the layer of one weight is pruned 1e-9 times as much as the large one.
    assert quotas.igq(shapes, 1e-9) == pytest.approx([1e-18, 1e-9], rel=1e-6)
    # One weight is kept in all: 1 / (F + 1) + 1e9 / (1e9 F + 1) = 1, F the golden section.
    small, large = quotas.igq(shapes, 1 - 1e-9)
    assert small == pytest.approx((math.sqrt(5) - 1) / 2, abs=1e-6)
    assert 1e9 * (1 - large) == pytest.approx(small, abs=1e-6)


def test_lenet_300_100_by_hand():
    # IGQ, F = 1/1000: kept 235200 / 236.2 + 30000 / 31 + 1000 / 2 of 266200.
    kept = 235200 / 236.2 + 30000 / 31 + 500
    expected = [1 - 1 / 236.2, 1 - 1 / 31, 0.5]
    assert quotas.igq(LENET, 1 - kept / 266200) == pytest.approx(expected, rel=1e-12)
    # ERK: kept weights in proportion to the sums of dimensions, 1084 : 400 : 110.
    kept = [2662 * s / 1594 for s in (1084, 400, 110)]
    expected = [1 - k / n for k, n in zip(kept, sizes_of(LENET), strict=True)]
    assert quotas.erk(LENET, 0.99) == pytest.approx(expected, rel=1e-12)
    # At 90 %, the last layer would keep 1837 of 1000: it is dense, 25620 are left to the others.
    expected = [1 - 25620 * 1084 / 1484 / 235200, 1 - 25620 * 400 / 1484 / 30000, 0.0]
    assert quotas.erk(LENET, 0.9) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"erk.*layer 2 of shape \(10, 100\) 1\.837.*redistribute"):
        quotas.erk(LENET, 0.9, on_invalid="error")
    # Smart-Ratios: densities 12 : 6 : 2.
    c = 2662 / (12 * 235200 + 6 * 30000 + 2 * 1000)
    assert quotas.smart_ratio(LENET, 0.99) == pytest.approx([1 - 12 * c, 1 - 6 * c, 1 - 2 * c])
    # Uniform+: no convolution; 200 of 239580 pruned weights move from the last layer.
    common = (239580 - 800) / 265200
    assert quotas.uniform_plus(LENET, 0.9) == pytest.approx([common, common, 0.8])
    assert quotas.uniform_plus(LENET, 0.75) == [0.75] * 3


def test_vgg_16_by_hand():
    shapes = [tuple(w.shape) for w in prunable(fp.models.create("vgg-16")).values()]
    total = sum(sizes_of(shapes))
    assert total == 14_715_584
    layers = quotas.erk(shapes, 0.995)
    c = 0.005 * total / 8539  # 8539: the sum of all dimensions
    assert [layers[0], layers[1], layers[-1]] == pytest.approx(
        [1 - 73 * c / 1728, 1 - 134 * c / 36864, 1 - 522 * c / 5120]
    )
    # Paper 003, section 4: densities exceed 1 when less than 99 % of the parameters are cut;
    # of ours, the last layer's 10 x 512 already where 522 c > 5120.
    quotas.erk(shapes, 0.9945, on_invalid="error")
    with pytest.raises(ValueError, match=r"layer 13 of shape \(10, 512\)"):
        quotas.erk(shapes, 0.99, on_invalid="error")
    layers = quotas.uniform_plus(shapes, 0.9)
    common = (0.9 * total - 0.8 * 5120) / (total - 1728 - 5120)
    assert layers == pytest.approx([0.0, *[common] * 12, 0.8])
    with pytest.raises(ValueError, match=r"expected less than 0\.999813 here, got 0\.9999"):
        quotas.uniform_plus(shapes, 0.9999)
    c = (
        0.01
        * total
        / sum(n * (m * m + m) for n, m in zip(sizes_of(shapes), range(14, 0, -1), strict=True))
    )
    expected = [1 - c * (m * m + m) for m in range(14, 0, -1)]
    assert quotas.smart_ratio(shapes, 0.99, on_invalid="error") == pytest.approx(expected)


@given(shapes=networks, sparsity=sparsities)
@example(shapes=[(2, 2)], sparsity=0.8)
@example(shapes=[(2, 3, 1, 1)], sparsity=0.0)
@example(shapes=[(4,)], sparsity=1.0)
def test_uniform_plus(shapes, sparsity):
    n, total = sizes_of(shapes), sum(sizes_of(shapes))
    first = next((i for i, s in enumerate(shapes) if len(s) > 2), None)
    last = max((i for i, s in enumerate(shapes) if len(s) == 2), default=None)
    most = total - (0 if first is None else n[first]) - (0 if last is None else 0.2 * n[last])
    asked, free = sparsity * total, total - sum(n[i] for i in {first, last} - {None})
    if asked > most * (1 + 1e-12) or (asked == most < total and free):
        with pytest.raises(ValueError, match="uniform_plus keeps"):
            quotas.uniform_plus(shapes, sparsity)
        return
    if asked > most * (1 - 1e-12) and most < total:
        return  # rounding decides
    layers = quotas.uniform_plus(shapes, sparsity)
    assert abs(pruned(shapes, layers) - sparsity * total) < 1e-6
    assert sparsity == 1 or max(layers) < 1
    others = {s for i, s in enumerate(layers) if i not in (first, last)}
    assert len(others) <= 1
    if first is not None:
        assert layers[first] == 0
    if last is not None:
        assert layers[last] == min(others or {layers[last]}, key=float) or layers[last] == 0.8
        assert layers[last] <= 0.8


@pytest.mark.parametrize("function", ALL)
def test_sizes_of_zero_and_other_integers(function):
    assert function([(0, 3), (2, 2)], 0.5)[1] == pytest.approx(0.5)
    assert len(function([(0, 3)], 0.5)) == 1
    assert function([torch.Size([4, 2]), [3, 3]], 0.25) == function([(4, 2), (3, 3)], 0.25)
    assert function([(np.int64(4), 2)], np.float32(0.25)) == [0.25]


@pytest.mark.parametrize("function", ALL)
def test_argument_errors(function):
    for shapes, error, text in (
        (3, TypeError, "shapes: .*int"),
        ("ab", TypeError, "shapes: .*str"),
        ([], ValueError, "shapes: .*none"),
        ([(2, 2), ()], ValueError, r"shapes\[1\]"),
        ([(2, 2), 3], ValueError, r"shapes\[1\]"),
        ([(2, -1)], ValueError, r"shapes\[0\]: .*-1"),
        ([(2, 1.5)], ValueError, r"shapes\[0\]: .*1\.5"),
    ):
        with pytest.raises(error, match=text):
            function(shapes, 0.5)
    for sparsity in (-0.1, 1.1, float("nan"), True, "0.5", None):
        with pytest.raises(ValueError, match=r"sparsity: expected a number in"):
            function(LENET, sparsity)


@pytest.mark.parametrize("function", [quotas.erk, quotas.smart_ratio])
def test_on_invalid(function):
    with pytest.raises(ValueError, match=r"on_invalid: .*'ignore'"):
        function(LENET, 0.5, on_invalid="ignore")
    assert function(LENET, 0.999, on_invalid="error") == function(LENET, 0.999)
    # Equal densities that rounding puts beside 1 are no densities above 1.
    same = [(7, 3)] * 7
    assert quotas.erk(same, 0.0, on_invalid="error") == [0.0] * 7


# -- whole numbers -------------------------------------------------------------------------------


def remainders(sizes, layers, total):
    """Largest remainders, by one sort."""
    shares = [(1 - s) * n for s, n in zip(layers, sizes, strict=True)]
    kept = [math.floor(x) for x in shares]
    order = sorted(range(len(sizes)), key=lambda i: kept[i] - shares[i])
    for i in order[: total - sum(kept)]:
        kept[i] += 1
    return kept


@pytest.mark.parametrize("function", VALID)
@given(
    shapes=st.lists(st.tuples(dims, dims), min_size=1, max_size=8),
    sparsity=st.floats(0, 1),
)
def test_counts_by_largest_remainder(function, shapes, sparsity):
    sizes, layers = sizes_of(shapes), function(shapes, sparsity)
    total = math.floor((1 - sparsity) * sum(sizes) + 0.5)
    kept = quotas.counts(sizes, layers, total=total)
    assert sum(kept) == total
    assert all(0 <= k <= n for k, n in zip(kept, sizes, strict=True))
    assert all(abs(k - (1 - s) * n) < 1 for k, s, n in zip(kept, layers, sizes, strict=True))
    assert kept == remainders(sizes, layers, total)
    assert sum(quotas.counts(sizes, layers)) == pytest.approx(total, abs=1)
    even = [n for n in sizes if n]
    if total >= len(even):
        shared = quotas.counts(sizes, layers, total=total, on_invalid="redistribute")
        assert sum(shared) == total
        assert all(1 <= k <= n for k, n in zip(shared, sizes, strict=True))
        if min(kept) > 0:
            assert shared == kept == quotas.counts(sizes, layers, total=total, on_invalid="error")


def test_counts_by_hand():
    assert quotas.counts([10, 10, 10], [0.25, 0.25, 0.5]) == [8, 7, 5]  # a tie: the earlier
    assert quotas.counts([1, 1, 1], [0.5] * 3) == [1, 1, 0]
    assert quotas.counts([3, 3, 1000], [0.9, 0.9, 0.9]) == [1, 0, 100]
    assert quotas.counts([3, 3, 1000], [0.9] * 3, on_invalid="redistribute") == [1, 1, 99]
    assert quotas.counts([3, 3], [1, 1], on_invalid="error") == [0, 0]  # nothing is asked for
    assert quotas.counts([0, 4], [0.5, 0.5], on_invalid="error") == [0, 2]
    assert quotas.counts([], []) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1, 2], [0.5]), "sparsities: expected 2 numbers.*got 1"),
        (([1, 2.5], [0.5, 0.5]), r"sizes\[1\]"),
        (([1, -2], [0.5, 0.5]), r"sizes\[1\]"),
        (([1, 2], [0.5, 1.5]), r"sparsities\[1\].*1\.5"),
        (([1, 2], [0.5, float("nan")]), r"sparsities\[1\].*nan"),
    ],
)
def test_counts_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        quotas.counts(*arguments)


def test_counts_that_cannot_be():
    with pytest.raises(ValueError, match=r"they keep 50 weights of 100, but.*keep 70"):
        quotas.counts([50, 50], [0.5, 0.5], total=70)
    with pytest.raises(ValueError, match=r"total: .*101"):
        quotas.counts([50, 50], [0, 0], total=101)
    with pytest.raises(ValueError, match=r"no weight is left of layer \['b'\] when 101 of 1006"):
        quotas.counts([3, 3, 1000], [0.9] * 3, on_invalid="error", names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"1 weights cannot be shared.*3 layers"):
        quotas.counts([3, 3, 4], [0.9] * 3, on_invalid="redistribute")
    with pytest.raises(ValueError, match=r"on_invalid"):
        quotas.counts([3], [0.5], on_invalid="warn")


@given(
    shares=st.lists(st.floats(0, 20), min_size=1, max_size=6),
    data=st.data(),
)
def test_apportioned_keeps_its_bounds(shares, data):
    least = [data.draw(st.integers(0, 10)) for _ in shares]
    most = [low + data.draw(st.integers(0, 10)) for low in least]
    total = data.draw(st.integers(sum(least), sum(most)))
    kept = apportioned(shares, total, least, most)
    assert sum(kept) == total
    assert all(low <= k <= high for low, k, high in zip(least, kept, most, strict=True))
    # No single weight can move to where it is lacked more.
    for i, j in itertools.permutations(range(len(shares)), 2):
        if kept[i] < most[i] and kept[j] > least[j]:
            assert shares[i] - kept[i] <= shares[j] - kept[j] + 1 + 1e-9


# -- pruning -------------------------------------------------------------------------------------


def layer_counts(masks):
    return [row.kept for row in masks.summary().rows]


def shapes_of(model):
    return [w.shape for w in prunable(model).values()]


@pytest.mark.parametrize("name", [*QUOTAS, "smart_ratios", "Uniform+"])
@pytest.mark.parametrize("method", ["random", "magnitude", "lamp", "snip"])
def test_prune_with_every_quota(name, method):
    model = network()
    before = Snapshot(model)
    function = {"smart_ratios": quotas.smart_ratio, "Uniform+": quotas.uniform_plus}.get(
        name, QUOTAS.get(name)
    )
    masks = fp.prune(model, method, 0.6, quota=name, **TASK)
    before.check()
    sizes = sizes_of(shapes_of(model))
    total = math.floor((1 - 0.6) * sum(sizes) + 0.5)
    expected = quotas.counts(sizes, function(shapes_of(model), 0.6), total=total)
    assert layer_counts(masks) == expected
    assert masks.nnz() == total
    if method != "random":
        scores = fp.score(model, method, **TASK)
        for n, mask in masks.items():
            ranked = torch.sort(scores[n].flatten(), descending=True, stable=True).indices
            assert torch.equal(mask.flatten().nonzero().flatten(), ranked[: mask.sum()].sort()[0])


@given(sparsity=st.floats(0, 1), name=st.sampled_from(["uniform", "erk", "smart-ratio", "igq"]))
def test_the_total_is_exact(sparsity, name):
    model = nn.Sequential(nn.Linear(7, 5), nn.Conv2d(3, 2, 3), nn.Linear(5, 3))
    total = 7 * 5 + 3 * 2 * 9 + 15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = fp.prune(model, "random", sparsity, quota=name)
    assert masks.nnz() == math.floor((1 - sparsity) * total + 0.5)


def test_a_function_as_quota():
    model, seen = network(), []

    def first_half(shapes, sparsity):
        seen.append((shapes, sparsity))
        return quotas.uniform(shapes, sparsity)

    masks = fp.prune(model, "magnitude", 0.3, quota=first_half)
    assert seen == [([tuple(s) for s in shapes_of(model)], 0.3)]
    assert masks == fp.prune(model, "magnitude", 0.3, quota="uniform")
    erk = partial(quotas.erk, on_invalid="error")
    with pytest.raises(ValueError, match=r"densities above 1"):
        fp.prune(model, "magnitude", 0.3, quota=erk)
    for answer, error, text in (
        (0.3, TypeError, "quota: .*float"),
        ([0.3], ValueError, "quota: expected 3 .*got 1"),
        ([0.3, 0.3, 1.3], ValueError, r"quota\['7\.weight'\].*1\.3"),
        ([0.9, 0.9, 0.9], ValueError, "they keep .*whole is to keep"),
    ):
        with pytest.raises(error, match=text):
            fp.prune(model, "magnitude", 0.3, quota=lambda *_, answer=answer: answer)


def test_fixed_quotas():
    model = network()
    names = list(prunable(model))  # 36, 80 and 15 weights
    masks = fp.prune(model, "magnitude", quota=[0.5, 0.75, 0.0])
    assert layer_counts(masks) == [18, 20, 15]
    for quota in (dict(zip(names, [0.5, 0.75, 0.0], strict=True)), (0.5, 0.75, 0)):
        assert fp.prune(model, "magnitude", quota=quota) == masks
        assert fp.prune(model, "magnitude", 1 - 53 / 131, quota=quota) == masks
    with pytest.raises(ValueError, match=r"they keep 53 weights of 131, but.*keep 13"):
        fp.prune(model, "magnitude", 0.9, quota=[0.5, 0.75, 0.0])
    for quota, error, text in (
        ([0.5], ValueError, "quota: expected 3"),
        ({names[0]: 0.5}, ValueError, rf"quota: no sparsity for {names[1]}, {names[2]}"),
        (dict.fromkeys([*names, "9.weight"], 0.5), ValueError, r"not prunable here: 9\.weight"),
        ([0.5, 0.5, -1], ValueError, rf"quota\['{names[2]}'\]"),
        (0.5, TypeError, "quota: .*float"),
        (masks, TypeError, "quotas.of"),
        ("sparse", ValueError, "quota: unknown name 'sparse'.*igq"),
    ):
        with pytest.raises(error, match=text):
            fp.prune(model, "magnitude", 0.5, quota=quota)


def test_quotas_that_methods_induce():
    model = network()
    for method in ("magnitude", "lamp", "snip", "grasp", "synflow"):
        arguments = {**TASK, "example_input": batch()[0] if method == "synflow" else None}
        masks = fp.prune(model, method, 0.7, **arguments)
        layers = quotas.induced(model, method, 0.7, **arguments)
        assert layers == quotas.of(masks) == quotas.of(dict(masks))
        assert layers == {r.name: r.sparsity for r in masks.summary().rows}
        # Random pruning takes them over, to the weight, with and without the whole's sparsity.
        for sparsity in (None, 0.7):
            shuffled = fp.prune(model, "random", sparsity, quota=layers)
            assert layer_counts(shuffled) == layer_counts(masks)
    with pytest.raises(TypeError, match=r"masks"):
        quotas.of(3)


@given(sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=9), data=st.data())
def test_quotas_of_masks_give_their_counts(sizes, data):
    kept = [data.draw(st.integers(0, n)) for n in sizes]
    layers = [(n - k) / n if n else 0.0 for n, k in zip(sizes, kept, strict=True)]
    assert quotas.counts(sizes, layers) == kept


@pytest.mark.parametrize("on_invalid", [None, "redistribute", "error"])
def test_emptied_layers(on_invalid):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 50), nn.Linear(50, 100))
    prune = partial(fp.prune, model, "magnitude", 0.99, quota="uniform", on_invalid=on_invalid)
    if on_invalid is None:
        with pytest.warns(UserWarning, match=r"magnitude pruned every weight of: 0\.weight"):
            assert layer_counts(prune()) == [0, 1, 50]
    elif on_invalid == "error":
        with pytest.raises(ValueError, match=r"no weight is left of layer \['0\.weight'\]"):
            prune()
    else:
        masks = prune()
        assert layer_counts(masks) == [1, 1, 49]
        with pytest.raises(ValueError, match=r"2 weights cannot be shared"):
            fp.prune(model, "magnitude", 0.9996, quota="igq", on_invalid=on_invalid)


def test_on_invalid_reaches_the_named_quota():
    model = network()
    with pytest.raises(ValueError, match=r"erk asks for densities above 1"):
        fp.prune(model, "magnitude", 0.3, quota="erk", on_invalid="error")
    free = fp.prune(model, "magnitude", 0.3, quota="erk")
    assert free == fp.prune(model, "magnitude", 0.3, quota="erk", on_invalid="redistribute")
    # Early steps, of low sparsity, are on the way only.
    masks = fp.prune(model, "synflow", 0.9, quota="erk", on_invalid="error", **TASK)
    assert masks.nnz() == 13
    with pytest.raises(ValueError, match=r"on_invalid: .*there is none"):
        fp.prune(model, "magnitude", 0.3, on_invalid="error")
    with pytest.raises(ValueError, match=r"on_invalid: .*'ignore'"):
        fp.prune(model, "magnitude", 0.3, quota="igq", on_invalid="ignore")


@pytest.mark.parametrize("scope", ["layer", "neuron", "filter"])
def test_no_other_scope(scope):
    with pytest.raises(ValueError, match=rf"scope: .*'{scope}'"):
        fp.prune(network(), "magnitude", 0.5, quota="igq", scope=scope)


# -- several steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uniform", "erk", "smart-ratio", "igq"])
@pytest.mark.parametrize("schedule", ["linear", "exponential", "cubic"])
@given(
    shapes=st.lists(st.tuples(dims, dims).map(torch.Size), min_size=1, max_size=8),
    sparsity=st.floats(0, 1),
    steps=st.integers(1, 12),
)
def test_plans_are_nested_and_exact(name, schedule, shapes, sparsity, steps):
    named = {str(i): s for i, s in enumerate(shapes)}
    total = sum(sizes_of(shapes))
    plan = plan_counts(named, sparsity, "global", name, None, schedule, steps, True)
    whole = plan_counts(named, sparsity, "global", None, None, schedule, steps, True)
    assert [sum(row) for row in plan] == whole
    rows = [sizes_of(shapes), *plan]
    assert all(b <= a for r, t in itertools.pairwise(rows) for a, b in zip(r, t, strict=True))
    assert plan[-1] == quotas.counts(
        sizes_of(shapes), QUOTAS[name](shapes, sparsity), total=whole[-1]
    )
    # Each step within a weight or so of its own quota: holding a layer up costs others little.
    for row, kept in zip(plan, whole, strict=True):
        at = QUOTAS[name](shapes, 1 - kept / total)
        shares = [(1 - s) * n for s, n in zip(at, sizes_of(shapes), strict=True)]
        assert all(abs(k - x) < 2 for k, x in zip(row, shares, strict=True))


def test_iterative_methods_follow_the_quota():
    model, seen = network().eval(), []

    def quota(shapes, sparsity):
        seen.append(sparsity)
        return quotas.igq(shapes, sparsity)

    masks = fp.prune(model, "synflow", 0.8, quota=quota, steps=4, schedule="linear", **TASK)
    assert seen == [0.8, *(1 - kept / 131 for kept in (52, 78, 104))]
    assert layer_counts(masks) == layer_counts(fp.prune(model, "random", 0.8, quota="igq"))
    for method in ("force", "iter-snip"):
        masks = fp.prune(model, method, 0.8, quota="igq", steps=5, **TASK)
        assert layer_counts(masks) == layer_counts(fp.prune(model, "random", 0.8, quota="igq"))
    # An explicit schedule counts all weights together.
    masks = fp.prune(model, "magnitude", quota="igq", schedule=[100, 40])
    assert masks.nnz() == 40
    # Fixed quotas: every layer by itself, as with scope "layer".
    masks = fp.prune(model, "iter-snip", quota=[0.5, 0.5, 0.5], steps=5, **TASK)
    assert masks == fp.prune(model, "iter-snip", 0.5, scope="layer", steps=5, **TASK)
    with pytest.raises(ValueError, match=r"schedule: .*fixed layer sparsities"):
        fp.prune(model, "magnitude", quota=[0.5, 0.5, 0.5], schedule=[100, 66])


def test_a_quota_that_brings_weights_back():
    def swinging(shapes, sparsity):
        # 36, 80 and 15 weights; the first layer is emptied early, and dense in the end.
        if sparsity < 0.5:
            return [1.0, (131 * sparsity - 36) / 95, (131 * sparsity - 36) / 95]
        return [0.0, 131 * sparsity / 95, 131 * sparsity / 95]

    model = network().eval()
    common = {"quota": swinging, "schedule": [80, 60], **TASK}
    with pytest.raises(ValueError, match=r"quota: it leaves 0\.weight 0 weights at step 1 and 36"):
        fp.prune(model, "iter-snip", **common)
    assert layer_counts(fp.prune(model, "force", **common))[0] == 36
