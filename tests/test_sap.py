"""SAP's step against an oracle of its own: fsum and extended precision, ties, scopes, errors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastprune as fp
from fastprune import reference
from fastprune.ops.tensor_statistics import Checked
from oracle import DTYPES
from small_models import Snapshot, network

SCOPES = ["global", "layer", "neuron"]


# ---- The oracle --------------------------------------------------------------------------------


def exact_share(values: list[float], p: float, q: float, eta: float, gamma: float, beta: float):
    """d, and the share that goes before rounding, in extended precision."""
    d = len(values)
    if d == 0 or not any(values):
        r_share = np.longdouble(1) * (1 + np.longdouble(eta)) ** np.longdouble(-q / (q - p))
    else:
        a = np.abs(np.array(values, np.longdouble))
        p_, q_ = np.longdouble(p), np.longdouble(q)
        index = 1 - ((a**p_).sum() / d) ** (1 / p_) / ((a**q_).sum() / d) ** (1 / q_)
        index = max(index, np.longdouble(0))
        r_share = (1 + np.longdouble(eta)) ** (-q_ / (q_ - p_)) * (1 - index) ** (
            p_ * q_ / (q_ - p_)
        )
    return d, min(gamma * (1 - r_share), np.longdouble(beta))


def units(masks: dict[str, Tensor], scope: str) -> list[list[tuple[str, int]]]:
    """Kept places of every unit, in the order in which ties are decided."""
    kept = {n: m.flatten().nonzero().flatten().tolist() for n, m in masks.items()}
    if scope == "global":
        return [[(n, i) for n, places in kept.items() for i in places]]
    if scope == "layer":
        return [[(n, i) for i in places] for n, places in kept.items()]
    result = []
    for n, m in masks.items():
        cols = m.numel() // m.shape[0]
        result += [[(n, i) for i in kept[n] if i // cols == r] for r in range(m.shape[0])]
    return result


def oracle(
    weights: dict[str, Tensor],
    masks: dict[str, Tensor],
    scope: str,
    got: Any,
    **numbers: float,
) -> dict[str, Tensor]:
    """The masks after a step. Where c is an integer before rounding down (few different values,
    say), the last bit of a root decides: there ``got`` may say which of the two."""
    flat = {n: w.detach().double().flatten().tolist() for n, w in weights.items()}
    result = {n: m.clone() for n, m in masks.items()}
    order = ("p", "q", "eta_r", "gamma", "beta")
    for places in units(masks, scope):
        values = [flat[n][i] for n, i in places]
        d, share = exact_share(values, *(numbers[k] for k in order))
        c = math.floor(d * share)
        nearest = int(np.rint(d * share))
        if abs(d * share - nearest) < 1e-9 * max(d, 1):
            c = d - sum(bool(got[n].view(-1)[i]) for n, i in places)
            assert c in (nearest - 1, nearest)
        # Among equal magnitudes the last ones go first.
        worst = sorted(range(d), key=lambda j: (abs(values[j]), -j))[:c]
        for j in worst:
            name, i = places[j]
            result[name].view(-1)[i] = False
    return result


NUMBERS = {"p": 0.5, "q": 1.0, "eta_r": 0.0, "gamma": 1.0, "beta": 0.9}


def model_of(seed: int, kind: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 4))
    for p in model.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=g))
            if kind == "ties":
                p.copy_(torch.randint(-2, 3, p.shape, generator=g))
            elif kind == "heavy":
                p.copy_(p**5)
    return model.to(dtype)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["normal", "ties", "heavy"]),
    scope=st.sampled_from(SCOPES),
    dtype=st.sampled_from(DTYPES),
    pq=st.sampled_from([(0.5, 1.0), (1.0, 2.0), (0.1, 1.0), (0.2, 2.0), (0.9, 1.0), (0.3, 0.31)]),
    eta_r=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    gamma=st.sampled_from([1.0, 0.0, 0.5, 3.0]),
    beta=st.sampled_from([0.9, 0.0, 0.2, 1.0]),
    density=st.sampled_from([1.0, 0.6, 0.1, 0.0]),
)
def test_against_the_oracle(
    seed: int,
    kind: str,
    scope: Any,
    dtype: torch.dtype,
    pq: tuple[float, float],
    eta_r: float,
    gamma: float,
    beta: float,
    density: float,
) -> None:
    model = model_of(seed, kind, dtype)
    g = torch.Generator().manual_seed(seed)
    weights = weights_of(model)
    masks = {n: torch.rand(w.shape, generator=g) < density for n, w in weights.items()}
    numbers = {"p": pq[0], "q": pq[1], "eta_r": eta_r, "gamma": gamma, "beta": beta}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got = fp.sap_step(model, masks, scope=scope, **numbers)
    expected = oracle(weights, masks, scope, dict(got), **numbers)
    assert list(got) == list(expected)
    for name, mask in expected.items():
        assert torch.equal(got[name], mask), (name, int(got[name].sum()), int(mask.sum()))


@pytest.mark.parametrize("scope", SCOPES)
def test_several_steps_of_a_larger_network(scope: Any, isa: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights_of(model).items()}
    for _ in range(3):
        got = fp.sap_step(model, masks, scope=scope)
        masks = oracle(weights_of(model), masks, scope, dict(got), **NUMBERS)
        assert got == fp.Masks(masks)
    assert 0 < got.density() < 0.9


def test_one_weight_that_carries_all() -> None:
    """I = 1 - 1/d and r = 1: everything else may go, up to beta."""
    layer = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        layer.weight.zero_()[3, 3] = -2.0
    assert fp.sap_step(layer, beta=1.0).nnz() == 1
    assert fp.sap_step(layer).nnz() == 64 - 57
    kept = fp.sap_step(layer)["weight"]
    assert kept[3, 3]
    assert kept.flatten()[:6].all()  # of the zeros the earliest stay


def test_equal_weights_and_zeros_lose_none() -> None:
    layer = nn.Linear(7, 9)
    for value in (0.1, 0.0):
        nn.init.constant_(layer.weight, value)
        for scope in SCOPES:
            assert fp.sap_step(layer, scope=scope).nnz() == 63
    assert fp.sap_step(layer, eta_r=1.0).nnz() == 63 - math.floor(63 * 0.75)


def test_the_model_is_left_alone_and_masks_say_what_counts() -> None:
    model = network()
    watch = Snapshot(model)
    masks = fp.sap_step(model)
    watch.check()
    assert list(masks) == ["0.weight", "5.weight", "7.weight"]
    one = fp.sap_step(model, {"5.weight": torch.ones(5, 16, dtype=torch.bool)})
    assert list(one) == ["5.weight"]
    assert one["5.weight"].sum() == fp.sap_step(model, scope="layer")["5.weight"].sum()
    # The order of the model, whatever the order of the mapping.
    again = fp.sap_step(model, dict(reversed(list(masks.items()))))
    assert list(again) == list(masks)
    assert again == fp.sap_step(model, masks)


def test_weights_outside_the_mask_do_not_count() -> None:
    layer = nn.Linear(6, 6)
    mask = torch.rand(6, 6) < 0.5
    expected = fp.sap_step(layer, {"weight": mask})
    with torch.no_grad():
        layer.weight[~mask] = math.nan
    for scope in SCOPES:
        assert fp.sap_step(layer, {"weight": mask}, scope=scope).nnz() <= int(mask.sum())
    assert fp.sap_step(layer, {"weight": mask}) == expected


def test_an_emptied_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e-9)
    with pytest.warns(UserWarning, match=r"sap_step pruned every weight of: 0\.weight"):
        fp.sap_step(model, eta_r=2.0, beta=0.6)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_are_named(scope: Any, value: float) -> None:
    model = network()
    with torch.no_grad():
        model[5].weight[1, 2] = value
    what = "NaN" if math.isnan(value) else "infinite"
    with pytest.raises(
        ValueError, match=rf"sap_step: weights\['5\.weight'\]: an element is {what}"
    ):
        fp.sap_step(model, scope=scope)


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (ValueError, "sap_step: p: expected less than q", {"p": 1.0}),
        (ValueError, "sap_step: p: expected a number from", {"p": 0.0}),
        (TypeError, "sap_step: q: expected a number", {"q": "1"}),
        (ValueError, "sap_step: eta_r: expected a number >= 0, got -1", {"eta_r": -1}),
        (ValueError, "sap_step: eta_r: expected a number >= 0, got nan", {"eta_r": math.nan}),
        (ValueError, "sap_step: gamma: expected a number >= 0", {"gamma": -0.5}),
        (ValueError, "sap_step: gamma: expected a number >= 0, got inf", {"gamma": math.inf}),
        (ValueError, r"sap_step: beta: expected a number in \[0, 1\], got 1.5", {"beta": 1.5}),
        (TypeError, "sap_step: beta: expected a number, got bool", {"beta": True}),
        (ValueError, "sap_step: scope: expected one of global, layer, neuron", {"scope": "filter"}),
        (ValueError, "sap_step: masks: expected at least one", {"masks": {}}),
        (ValueError, "no parameter of this name", {"masks": {"x": torch.ones(2).bool()}}),
        (ValueError, "does not match", {"masks": {"0.weight": torch.ones(2).bool()}}),
        (TypeError, "expected a mapping", {"masks": torch.ones(2).bool()}),
        (ValueError, "expected dtype torch.bool", {"masks": {"0.weight": torch.ones(2)}}),
        (TypeError, "model: expected a torch.nn.Module", {"model": 3}),
    ],
)
def test_bad_calls(kind: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    call: dict[str, Any] = {"model": network()} | arguments
    with pytest.raises(kind, match=message):
        fp.sap_step(call.pop("model"), call.pop("masks", None), **call)


def test_neurons_of_transposed_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3))
    fp.sap_step(model, scope="layer")
    with pytest.raises(ValueError, match=r"scope: 'neuron' is not supported for 0\.weight"):
        fp.sap_step(model, scope="neuron")


# ---- Index of every row ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.1, 0.7)])
def test_rows_are_like_tensors_of_their_own(
    isa: str, dtype: torch.dtype, p: float, q: float, threads: None
) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = [(5, 1), (3, 70_000), (40, 3, 5, 5), (1, 4096), (0, 3), (4, 0), (7,)]
    tensors = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    masks = [torch.rand(s, generator=g) < 0.5 for s in shapes]
    masks[2][5] = False
    for mask in (None, masks):
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            got = fp.pq_index_rows(tensors, mask, p, q)
            for i, (t, rows) in enumerate(zip(tensors, got, strict=True)):
                assert rows.shape == (t.shape[0],)
                expected = [
                    fp.pq_index(t[r], None if mask is None else mask[i][r], p, q)
                    for r in range(t.shape[0])
                ]
                assert rows.tolist() == expected


@pytest.mark.parametrize("restricted", [False, True])
def test_rows_by_the_reference(restricted: bool) -> None:
    g = torch.Generator().manual_seed(1)
    tensors = [torch.randn(s, generator=g) for s in [(9, 4, 3), (6, 100), (2, 0), (0, 5)]]
    tensors[1][2] = 0
    within = [torch.rand(t.shape, generator=g) < 0.5 for t in tensors] if restricted else []
    a = torch.ops.fastprune.row_power_means(tensors, within, [0.1, 0.5, 2.0])
    b = reference.row_power_means(tensors, within or None, [0.1, 0.5, 2.0])
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], rtol=1e-12, atol=0)


def test_rows_of_a_mapping_and_of_one_tensor() -> None:
    w = torch.randn(4, 6)
    rows = fp.pq_index_rows({"a": w, "b": w[:2]}, {"b": w[:2] > 0, "a": w > 0})
    assert torch.equal(rows["a"], fp.pq_index_rows(w, w > 0))
    assert torch.equal(rows["b"], rows["a"][:2])
    with pytest.raises(ValueError, match=r"pq_index_rows: w: expected at least 1 dimension"):
        fp.pq_index_rows(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"pq_index_rows: w\['b'\]: an element is NaN"):
        fp.pq_index_rows({"a": w, "b": w / 0 * 0})
    with pytest.raises(RuntimeError, match=r"tensors\[0\]: expected at least 1 dimension"):
        torch.ops.fastprune.row_power_means([torch.tensor(1.0)], [], [1.0])


def test_opcheck_of_rows() -> None:
    x = [torch.randn(40, 3).t(), torch.randn(5, dtype=torch.float64)]
    for within in ([], [torch.rand(t.shape) < 0.5 for t in x]):
        torch.library.opcheck(torch.ops.fastprune.row_power_means, (x, within, [0.5, 2.0]))


# ---- A count for every row ---------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 7, 70_000])
def test_counts_by_row(isa: str, cols: int) -> None:
    g = torch.Generator().manual_seed(cols)
    values = [torch.randint(-9, 9, (r, cols), generator=g).float() for r in (5, 0, 3)]
    within = [torch.rand(v.shape, generator=g) < 0.7 for v in values]
    candidates = [n for w in within for n in w.sum(1).tolist()]
    counts = [n * i // len(candidates) for i, n in enumerate(candidates)]
    op = torch.ops.fastprune.global_topk_mask
    got = op(values, [], within, counts, "row", "magnitude")
    expected = reference.global_topk_mask(values, counts, "neuron", "magnitude", None, within)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    for bad, message in (
        (counts[:-1], "counts: expected 8, one per row, got 7"),
        ([-1, *counts[1:]], r"counts\[0\]: expected 0 to"),
        ([*counts[:-1], cols + 1], r"counts\[7\]: expected 0 to .* of a row of values\[2\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(values, [], within, bad, "row", "magnitude")
    if candidates[0] < cols:
        with pytest.raises(RuntimeError, match=r"candidates of row 0 of values\[0\]"):
            op(values, [], within, [cols, *counts[1:]], "row", "magnitude")


# ---- The bound ---------------------------------------------------------------------------------


def test_pq_bound() -> None:
    assert fp.pq_bound(0.0, 10) == 10
    assert fp.pq_bound(1.0, 10) == 0
    assert fp.pq_bound(0.25, 64, 1.0, 2.0) == 64 * 0.75**2
    assert fp.pq_bound(0.25, 64, 1.0, 2.0, 1.0) == 64 * 2.0**-2 * 0.75**2
    index = torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert fp.pq_bound(index, torch.tensor([4, 8])).tolist() == [4, 4]
    # Theorem 2: so many of the largest carry all but eta_r.
    w = torch.randn(500).double().abs().sort(descending=True).values
    for r in (10, 100, 400):
        eta = float(w[r:].sqrt().sum() / w[:r].sqrt().sum())
        assert r >= fp.pq_bound(fp.pq_index(w), 500, eta_r=eta)


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (ValueError, "pq_bound: p: expected less", (0.5, 1, 1.0, 1.0)),
        (ValueError, r"pq_bound: index: expected a number in \[0, 1\]", (1.5, 1)),
        (ValueError, r"pq_bound: index: expected numbers in \[0, 1\]", (torch.tensor([-1.0]), 1)),
        (ValueError, "pq_bound: count: expected a number >= 0", (0.5, -1)),
        (ValueError, "pq_bound: eta_r: expected", (0.5, 1, 0.5, 1.0, -1.0)),
        (TypeError, "pq_bound: index: expected a number", ("a", 1)),
        (TypeError, "pq_bound: count: expected real numbers", (0.5, torch.tensor(True))),
    ],
)
def test_bad_bounds(kind: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(kind, match=message):
        fp.pq_bound(*arguments)


def test_checked_without_a_kernel() -> None:
    """What other devices do first."""
    checked = Checked.check("op", [torch.tensor([math.nan])], None, ["['a']"], ("w", "mask"))
    with pytest.raises(ValueError, match=r"^op: w\['a'\]: an element is NaN"):
        checked.refuse_nan()
