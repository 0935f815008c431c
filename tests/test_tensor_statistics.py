"""tensor_statistics against extended precision: hard bounds, every dtype and ISA, extreme data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from conftest import runnable_isas
from fastprune.ops.tensor_statistics import Checked, _by_reference
from oracle import DTYPES, guarded, wide

OP = torch.ops.fastprune.tensor_statistics
ISAS = runnable_isas()
U = 2.0**-53
POWERS = [0.1, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 7.0, 50.0, 63.0, 64.0, 65.0, 333.3]
KINDS = ["normal", "integers", "zeros", "equal", "denormal", "spread", "signed_zeros", "huge"]
SIZES = [0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000, 4095, 4096, 4097, 9000]


def fill(n: int, dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(n, generator=g, dtype=torch.float64)
    pick = torch.rand(n, generator=g)
    info = torch.finfo(dtype)
    if kind == "integers":
        t = torch.randint(-2, 3, (n,), generator=g).double()
    elif kind == "zeros":
        t = t * (pick < 0.15)
    elif kind == "equal":
        t = torch.full((n,), -1.5, dtype=torch.float64)
    elif kind == "denormal":
        t = t * 4 * info.smallest_normal / 2**3
    elif kind == "spread":  # the whole range of exponents
        low, high = math.log2(info.smallest_normal) - 2, math.log2(info.max) - 1
        t = t.sign() * torch.exp2(low + (high - low) * pick.double())
    elif kind == "signed_zeros":
        t = torch.where(pick < 0.4, 0.0, torch.where(pick < 0.8, -0.0, t))
    elif kind == "huge":
        t = t.clamp(-8, 8) * (info.max / 8)
    return t.to(dtype)


def exact_power(x: np.ndarray, p: float) -> tuple[np.longdouble, np.longdouble, np.longdouble]:
    """log2 of sum |x|^p, the norm and the power mean, in extended precision."""
    a = np.abs(x)
    top = a.max()
    scaled = np.power(a / top, np.longdouble(p)).sum()
    with np.errstate(over="ignore"):
        norm = np.power(scaled, 1 / np.longdouble(p)) * top
    mean = np.power(scaled / a.size, 1 / np.longdouble(p)) * top
    return np.log2(scaled) + p * np.log2(top), norm, mean


def exact_gini(x: np.ndarray) -> np.longdouble:
    a = np.sort(np.abs(x))
    if a.size == 0 or a[-1] == 0:
        return np.longdouble(0)
    n, k = np.longdouble(a.size), np.arange(1, a.size + 1).astype(np.longdouble)
    return 1 - 2 * (a / a.sum() * ((n - k + 0.5) / n)).sum()


def close(got: float, exact: np.longdouble, factor: float, what: str) -> None:
    """Within the relative bound, and a subnormal's step; out of range as float64 is."""
    if np.abs(exact) > np.finfo(np.float64).max:
        assert np.abs(exact) < 2e308 or got == math.inf, what
        return
    assert abs(np.longdouble(got) - exact) <= factor * np.abs(exact) + 5e-324, (
        f"{what}: got {got!r}, exact {exact!r}, {float(abs(got - exact) / exact / U):.1f} u"
    )


def check_row(s: fp.TensorStatistics, x: np.ndarray, what: str) -> None:
    """One row of statistics against its elements in extended precision."""
    assert s.count.item() == x.size, what
    assert s.nonzero.item() == np.count_nonzero(x), what
    assert s.min.item() == (x.min() if x.size else math.inf), what
    assert s.max.item() == (x.max() if x.size else -math.inf), what
    total = np.longdouble(s.sum.item())
    exact = x.sum()
    if np.abs(exact) < 1.7e308:
        assert np.abs(total - exact) <= 1200 * U * np.abs(x).sum(), what
    assert s.power_sums.shape == s.norms.shape == s.power_means.shape == (len(s.p),)
    for i, p in enumerate(s.p):
        name = f"{what}, p = {p}"
        values = [s.power_sums[i].item(), s.norms[i].item(), s.power_means[i].item()]
        if not x.any():
            assert values == [0, 0, 0], name
            continue
        log_sum, norm, mean = exact_power(x, p)
        bound = (1200 + 3 * p) * U
        if abs(log_sum) < 1e4:
            # The exact sum by way of its logarithm, whose own error is far smaller.
            close(values[0], np.exp2(log_sum), bound, name)
        close(values[1], norm, 8 * U + bound / p, name)
        close(values[2], mean, 8 * U + bound / p, name)
    if s.gini is not None:
        assert abs(np.longdouble(s.gini.item()) - exact_gini(x)) <= 16 * U, what


def row(s: fp.TensorStatistics, i: int) -> fp.TensorStatistics:
    names = ("count", "nonzero", "sum", "min", "max", "power_sums", "norms", "power_means")
    gini = None if s.gini is None else s.gini[i]
    return fp.TensorStatistics(s.p, *(getattr(s, n)[i] for n in names), gini, None)


def check(
    tensors: list[Tensor], within: list[Tensor] | None, what: str, p: list[float] = POWERS
) -> None:
    stats = fp.tensor_statistics(tensors, p=p, within=within, gini=True)
    chosen = [
        wide(t.contiguous().flatten() if within is None else t[within[i]])
        for i, t in enumerate(tensors)
    ]
    for i, x in enumerate(chosen):
        check_row(row(stats, i), x, f"{what}, tensor {i}")
    assert stats.total is not None
    check_row(stats.total, np.concatenate(chosen), f"{what}, total")


@dataclass
class Case:
    """One call; printing it says how to make the tensors again."""

    sizes: list[int]
    dtypes: list[torch.dtype]
    kinds: list[str]
    seed: int
    within: float | None
    p: list[float]


@st.composite
def cases(draw: Any) -> Case:
    n = draw(st.integers(1, 4))
    one = draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        [draw(st.sampled_from(SIZES)) for _ in range(n)],
        [dtype if one else draw(st.sampled_from(DTYPES)) for _ in range(n)],
        [draw(st.sampled_from(KINDS)) for _ in range(n)],
        draw(st.integers(0, 2**31)),
        draw(st.none() | st.sampled_from([0.0, 0.02, 0.5, 1.0])),
        draw(st.lists(st.sampled_from(POWERS) | st.floats(2**-6, 200), max_size=4)),
    )


@settings(max_examples=60)
@given(case=cases())
@pytest.mark.parametrize("isa_name", ISAS)
def test_random_cases(isa_name: str, case: Case) -> None:
    before = fp._C.isa()
    fp._C.set_isa(isa_name)
    try:
        parts = zip(case.sizes, case.dtypes, case.kinds, strict=True)
        tensors = [fill(*part, case.seed + i) for i, part in enumerate(parts)]
        g = torch.Generator().manual_seed(case.seed)
        within = None
        if case.within is not None:
            within = [torch.rand(t.shape, generator=g) < case.within for t in tensors]
        check(tensors, within, f"{isa_name} {case}", case.p)
    finally:
        fp._C.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_more_than_one_chunk(isa: str, dtype: torch.dtype, kind: str) -> None:
    tensors = [fill(33_001, dtype, kind, 1), fill(5000, dtype, kind, 2)]
    check(tensors, None, f"{dtype} {kind}", [0.3, 1.0, 2.0, 5.0])


@pytest.mark.parametrize("p", [2**-20, 2**-6, 1e3, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_exponents(isa: str, p: float, dtype: torch.dtype) -> None:
    for kind in ("normal", "spread", "denormal"):
        x = fill(5000, dtype, kind, 3)
        s = fp.tensor_statistics([x], p=[p])
        _, norm, mean = exact_power(wide(x), p)
        bound = 8 * U + (1200 + 3 * p) * U / p
        close(s.power_means[0, 0].item(), mean, bound, f"{kind} mean")
        if norm < 1e308:
            close(s.norms[0, 0].item(), norm, bound, f"{kind} norm")
        else:
            assert s.norms[0, 0] == math.inf


def test_nothing_overflows_on_the_way() -> None:
    x = torch.tensor([1e300, -1e300, 1e-300], dtype=torch.float64)
    s = fp.tensor_statistics([x, x[2:]], p=(0.1, 2.0, 50.0))
    assert s.sum[0].abs() <= 1e-12 * 1e300
    assert s.power_sums[0].tolist()[1:] == [math.inf, math.inf]
    assert s.power_sums[1].tolist()[1:] == [0.0, 0.0]
    torch.testing.assert_close(s.norms[0, 1].item(), math.sqrt(2) * 1e300)
    torch.testing.assert_close(s.norms[0, 2].item(), 2 ** (1 / 50) * 1e300)
    torch.testing.assert_close(s.norms[1].tolist(), [1e-300] * 3)
    most = torch.full((2,), torch.finfo(torch.float64).max, dtype=torch.float64)
    s = fp.tensor_statistics([torch.cat([most, -most])], p=(1.0,))
    assert s.sum.item() == 0
    assert s.norms.item() == math.inf  # the true one is not a float64
    assert s.power_means.item() == most[0]


def test_sums_against_fsum(isa: str) -> None:
    """Not only extended precision: exactly rounded sums."""
    x = fill(300_000, torch.float32, "normal", 5)
    values = x.double().tolist()
    s = fp.tensor_statistics([x], p=(0.5, 1.0, 2.0, 3.0))
    sums = [math.fsum(abs(v) ** p for v in values) for p in s.p]
    for got, exact in zip(s.power_sums[0].tolist(), sums, strict=True):
        assert abs(got - exact) <= 1e-14 * exact
    assert abs(s.sum.item() - math.fsum(values)) <= 1e-15 * sums[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_general_powers_are_accurate(isa: str, dtype: torch.dtype) -> None:
    """One element at a time: no averaging hides an error of the power function."""
    for kind in ("normal", "spread", "denormal"):
        x = fill(400, dtype, kind, 6)
        x = x[x != 0]
        for p in (0.3, 0.7, 1.7, 12.5):
            s = fp.tensor_statistics(list(x.split(1)), p=[p])
            exact = np.power(np.abs(wide(x)), np.longdouble(p))
            got = wide(s.power_sums[:, 0])
            inside = exact < 1.7e308
            assert (got[exact > 1.8e308] == math.inf).all()
            assert (np.abs(got - exact) <= (4 + 3 * p) * U * exact + 5e-324)[inside].all()


def masses() -> dict[str, Tensor]:
    """More elements in one bin of keys than are brought together at once."""
    g = torch.Generator().manual_seed(0)
    n = 600_000
    narrow = 1 + torch.rand(n, generator=g, dtype=torch.float64) / 300
    return {
        "equal": torch.full((n,), 0.1, dtype=torch.float64),
        "few values": torch.randint(0, 5, (n,), generator=g).double() / 3,
        "narrow": narrow,
        "narrow and wide": torch.cat([narrow, torch.randn(n, generator=g).double()]),
        "very narrow": 1 + torch.randint(0, 1000, (n,), generator=g).double() * 2.0**-50,
        "denormal": torch.randint(0, 70, (n,), generator=g).double() * 5e-324,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(masses()))
def test_gini_of_massed_values(dtype: torch.dtype, kind: str) -> None:
    x = masses()[kind].to(dtype)
    got = fp.gini_index([x, -x[:1000]])
    for value, data in zip(
        [*got.layers.tolist(), got.total.item()],
        [x, x[:1000], torch.cat([x, x[:1000]])],
        strict=True,
    ):
        assert abs(np.longdouble(value) - exact_gini(wide(data))) <= 16 * U


def test_gini_of_known_vectors() -> None:
    one = torch.zeros(1000)
    one[17] = -3.0
    got = fp.gini_index([one, torch.full((77,), 2.5), torch.zeros(5), torch.zeros(0)])
    assert got.layers.tolist() == pytest.approx([0.999, 0, 0, 0], abs=1e-15)
    assert fp.gini_index([torch.tensor([1.0, 2, 3, 4])]).total.item() == pytest.approx(0.25)


def test_the_same_bits_for_any_number_of_threads(isa: str, threads: None) -> None:
    tensors = [fill(2_500_000, torch.float32, "normal", 1), fill(70_000, torch.float64, "zeros", 2)]
    tensors.append(fill(100_000, torch.bfloat16, "spread", 3))
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        results.append(OP(tensors, [], [0.3, 0.5, 1.0, 2.0, 3.0], True))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    x = fill(60 * 70, dtype, "normal", 1).view(60, 70)
    keep = torch.rand(60, 70) < 0.5
    pairs = [
        (x.t(), keep.t()),
        (x[::2, 1::3], keep[::2, 1::3]),
        (x[:1].expand(9, 70), keep[:1].expand(9, 70)),
    ]
    for view, mask in pairs:
        check([view], None, "strided", [0.7, 2.0])
        check([view], [mask], "strided, within", [0.7, 2.0])


def test_nothing_around_the_inputs_is_read(isa: str) -> None:
    for n in (1, 7, 16, 100, 4097):
        for dtype in DTYPES:
            x, m = guarded(fill(n, dtype, "normal", n)), guarded(torch.rand(n) < 0.5)
            check([x], None, f"{n} {dtype}", [0.7, 1.0])
            check([x], [m], f"{n} {dtype} within", [0.7, 1.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities(isa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, math.inf, 2.0], dtype=dtype)
    s = fp.tensor_statistics([x, -x, torch.cat([x, -x])], p=(0.5, 0.7, 1, 2, 3, 9.5), gini=True)
    assert (s.power_sums == math.inf).all()
    assert (s.norms == math.inf).all()
    assert (s.power_means == math.inf).all()
    assert s.sum[:2].tolist() == [math.inf, -math.inf]
    assert s.sum[2].isnan()
    assert s.max[0] == math.inf
    assert s.min.tolist() == [1, -math.inf, -math.inf]
    assert s.gini is not None
    assert s.gini.isnan().all()
    assert fp.pq_index([x]).layers.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_names_its_tensor(isa: str, dtype: torch.dtype) -> None:
    for n, at in ((1, 0), (100, 99), (5000, 4999), (100_000, 60_000)):
        x = torch.ones(n, dtype=dtype)
        x[at] = math.nan
        with pytest.raises(ValueError, match=r"^tensor_statistics: tensors\[1\]: an element is Na"):
            fp.tensor_statistics([torch.ones(3), x])
        with pytest.raises(ValueError, match=r"^gini_index: w\[1\] \(fc\): an element"):
            fp.gini_index([torch.ones(3), x], names=["conv", "fc"])
        with pytest.raises(ValueError, match=r"^pq_index: w\[0\]: an element is NaN"):
            fp.pq_index([x])
        s = fp.tensor_statistics([x], within=[~x.isnan()], gini=True)
        assert s.total is not None
        assert s.total.max.item() == (1 if n > 1 else -math.inf)


def test_nothing_to_count() -> None:
    empty = torch.zeros(0, 4)
    for tensors, within in (
        ([empty], None),
        ([empty], [empty.bool()]),
        ([torch.ones(9)], [torch.zeros(9).bool()]),
    ):
        s = fp.tensor_statistics(tensors, p=(0.5, 0.7, 2), within=within, gini=True)
        assert s.total is not None
        for part in (row(s, 0), s.total):
            check_row(part, np.zeros(0, np.longdouble), "nothing")
        index = fp.pq_index(tensors, within=within)
        assert index.layers.tolist() == [0] == [index.total.item()]


def test_zeros_come_without_a_sign() -> None:
    s = fp.tensor_statistics([torch.tensor([-0.0, -0.0])])
    assert math.copysign(1, s.min.item()) == math.copysign(1, s.max.item()) == 1


# ---- PQ index ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.1, 1.0), (0.1, 2.0), (0.9, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pq_index(p: float, q: float, dtype: torch.dtype) -> None:
    tensors = [fill(5000, dtype, "normal", 1), fill(333, dtype, "zeros", 2)]
    keep = [torch.rand(t.shape) < 0.4 for t in tensors]
    for within in (None, keep):
        got = fp.pq_index(tensors, within, p, q)
        xs = [wide(t if within is None else t[k]) for t, k in zip(tensors, keep, strict=True)]
        xs.append(np.concatenate(xs))
        for value, x in zip([*got.layers.tolist(), got.total.item()], xs, strict=True):
            d = np.longdouble(x.size)
            ratio = exact_power(x, p)[1] / exact_power(x, q)[1]
            exact = 1 - d ** (1 / np.longdouble(q) - 1 / np.longdouble(p)) * ratio
            assert abs(value - exact) <= 2500 / p * U
            assert 0 <= value <= 1 - float(d) ** (1 / q - 1 / p) + 1e-12  # Theorem 1


@pytest.mark.parametrize("index", [fp.pq_index, fp.gini_index])
def test_one_tensor_a_sequence_or_a_mapping(index: Any) -> None:
    a, b = fill(70, torch.float32, "normal", 1).view(7, 10), fill(9, torch.float64, "normal", 2)
    kept = {"b": torch.rand(9) < 0.5, "a": torch.rand(7, 10) < 0.5}
    tensors, masks = [a, b], [kept["a"], kept["b"]]
    for many, mask in (
        (tensors, masks),
        ({"a": a, "b": b}, kept),
        ({"a": a, "b": b}, fp.Masks(kept)),
    ):
        full, part = index(many), index(many, mask)
        assert torch.equal(part.layers, index(many, within=mask).layers)
        for i, x in enumerate(tensors):
            assert torch.equal(index(x), full.layers[i])
            assert torch.equal(index(x, masks[i]), part.layers[i])
            assert torch.equal(index(x, within=masks[i]), part.layers[i])
        together = torch.cat([t[m].double() for t, m in zip(tensors, masks, strict=True)])
        torch.testing.assert_close(part.total, index(together), rtol=0, atol=1e-13)
        assert part.total.shape == ()
        assert part.total.dtype == torch.float64
    assert index(a).shape == ()


def test_pq_index_with_a_moderate_sum_is_what_the_formula_gives() -> None:
    """Squares and fourth powers have exact roots: nothing differs, not even in the last bit."""
    x = torch.tensor([1.0, 4.0, 9.0, 0.0, 16.0, 25.0, 1.0])
    for p, q in ((0.5, 1.0), (0.5, 2.0), (1.0, 2.0)):
        means = [(math.fsum(v**r for v in x.tolist()) / 7) ** (1 / r) for r in (p, q)]
        assert fp.pq_index(x, None, p, q).item() == 1 - means[0] / means[1]


V = torch.ones(3)


@pytest.mark.parametrize("index", [fp.pq_index, fp.gini_index])
@pytest.mark.parametrize(
    ("kind", "message", "w", "more"),
    [
        (TypeError, "mask: expected bool tensors, got float: the mask comes", V, {"mask": 0.5}),
        (TypeError, "within: expected bool tensors, got int", V, {"within": 1}),
        (ValueError, "mask, within: two names", V, {"mask": V > 0, "within": V > 0}),
        (TypeError, "mask: expected a tensor, as w is, got list", V, {"mask": [V > 0]}),
        (TypeError, "mask: expected a sequence", [V], {"mask": V > 0}),
        (TypeError, "mask: expected a sequence", [V], {"mask": {"a": V > 0}}),
        (TypeError, "mask: expected a mapping, as w is", {"a": V}, {"mask": [V > 0]}),
        (
            ValueError,
            r"mask: expected the names of w; .*\['a', 'b'\]",
            {"a": V},
            {"mask": {"b": V}},
        ),
        (ValueError, "names: a mapping has its own", {"a": V}, {"names": ["a"]}),
        (TypeError, r"mask\['a'\]: expected dtype torch.bool", {"a": V}, {"mask": {"a": V}}),
        (TypeError, "mask: expected dtype torch.bool", V, {"mask": V}),
        (ValueError, r"mask: expected the shape \(3,\) of w, got \(2,\)", V, {"mask": V[:2] > 0}),
        (ValueError, "w: expected at least one tensor", {}, {}),
        (TypeError, "w: expected a sequence of tensors, got int", 3, {}),
        (TypeError, "w: expected dtype float32", V > 0, {}),
        (ValueError, r"w \(fc\): an element is NaN", V / 0 * 0, {"names": ["fc"]}),
    ],
)
def test_bad_index_calls(
    index: Any, kind: type[Exception], message: str, w: Any, more: dict[str, Any]
) -> None:
    with pytest.raises(kind, match=f"^{index.__name__}: {message}"):
        index(w, **more)


def test_pq_index_at_its_ends() -> None:
    one = torch.zeros(100)
    one[3] = -2.0
    got = fp.pq_index([torch.full((50,), -0.3), one, torch.zeros(7)])
    assert got.layers.tolist() == pytest.approx([0, 0.99, 0], abs=1e-13)
    assert (got.layers >= 0).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 3000), scale=st.sampled_from([-9, 4, 30]))
def test_indices_keep_their_value_under_scaling_cloning_and_order(
    seed: int, n: int, scale: int
) -> None:
    x = fill(n, torch.float32, "normal", seed)
    same = [x, x * 2.0**scale, x.repeat(3), -x.flip(0)]  # D2, D4
    for index in (fp.pq_index(same), fp.pq_index(same, None, 1.0, 2.0), fp.gini_index(same)):
        assert (index.layers - index.layers[0]).abs().max() <= 1e-13


def test_indices_grow_by_a_robin_hood_in_reverse_and_by_zeros() -> None:
    x = torch.linspace(1, 2, 100)
    robbed = x.clone()
    robbed[0] -= 0.5
    robbed[-1] += 0.5
    more = torch.cat([x, torch.zeros(10)])
    for index in (fp.pq_index([x, robbed, more]), fp.gini_index([x, robbed, more])):
        assert index.layers[1] > index.layers[0]  # D1
        assert index.layers[2] > index.layers[0]  # P2


# ---- The op in torch ---------------------------------------------------------------------------


def test_opcheck() -> None:
    x = [torch.randn(40, 3).t(), torch.randn(5, dtype=torch.float64)]
    keep = [torch.rand(t.shape) < 0.5 for t in x]
    for within in ([], keep):
        for p, gini in (([], True), ([0.5, 2.0], False)):
            torch.library.opcheck(OP, (x, within, p, gini))


def test_compiles_without_a_break() -> None:
    x = [torch.randn(300), torch.randn(20, 5)]

    def f(tensors: list[Tensor]) -> Tensor:
        s = fp.tensor_statistics(tensors, gini=True)
        assert s.total is not None
        assert s.gini is not None
        return s.norms[0] * s.total.sum + s.gini[1]

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), f(x))


def test_meta_tensors_have_shapes() -> None:
    s = fp.tensor_statistics([torch.empty(3, device="meta")] * 2, p=(1, 2, 3), gini=True)
    assert s.norms.shape == (2, 3)
    assert s.total is not None
    assert s.total.norms.shape == (3,)
    assert s.count.dtype == torch.int64
    assert s.norms.device.type == "meta"


def test_inputs_that_require_a_gradient_are_constants() -> None:
    x = torch.randn(9, requires_grad=True)
    assert not fp.tensor_statistics([x]).norms.requires_grad
    assert not fp.pq_index([x]).total.requires_grad


@pytest.mark.parametrize("restricted", [False, True])
def test_reference(restricted: bool) -> None:
    """What runs on other devices gives the same."""
    kinds = ["normal", "spread", "equal", "zeros"]
    tensors = [fill(999, d, k, 1) for d in DTYPES for k in kinds] + [torch.zeros(0), torch.zeros(3)]
    within = [torch.rand(t.shape) < 0.5 for t in tensors] if restricted else []
    p, labels = [0.1, 0.5, 1.0, 2.0, 50.0], [""] * len(tensors)
    expected = _by_reference(Checked.check("op", tensors, within or None, labels), p, True)
    for a, b in zip(OP(tensors, within, p, True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    with pytest.raises(ValueError, match=r"^op: tensors\[a\]: an element is NaN"):
        _by_reference(Checked.check("op", [torch.tensor([math.nan])], None, ["[a]"]), p, False)


X = [torch.ones(3), torch.ones(2, 2)]


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (ValueError, "tensors: expected at least one", {"tensors": []}),
        (TypeError, "tensors: expected a sequence of tensors, got Tensor", {"tensors": X[0]}),
        (TypeError, r"tensors\[1\]: expected a tensor, got int", {"tensors": [X[0], 1]}),
        (TypeError, r"tensors\[1\] \(b\): .*int64", {"tensors": [X[0], X[0].long()]}),
        (ValueError, r"tensors\[1\] \(b\): .*meta", {"tensors": [X[0], X[0].to("meta")]}),
        (ValueError, "names: expected 2 names, one per tensor, got 1", {"names": ["a"]}),
        (TypeError, "names: expected a sequence", {"names": "ab"}),
        (TypeError, "p: expected a sequence of numbers, got float", {"p": 2.0}),
        (TypeError, r"p\[1\]: expected a number, got str", {"p": [1, "a"]}),
        (TypeError, r"p\[0\]: expected a number, got bool", {"p": [True]}),
        (ValueError, r"p\[0\]: expected a number from .*got 0", {"p": [0]}),
        (ValueError, r"p\[0\]: .*got -1", {"p": [-1.0]}),
        (ValueError, r"p\[0\]: .*got nan", {"p": [math.nan]}),
        (ValueError, r"p\[0\]: .*got inf", {"p": [math.inf]}),
        (TypeError, "gini: expected a bool, got int", {"gini": 1}),
        (TypeError, "within: expected a sequence", {"within": X[0]}),
        (ValueError, "within: expected 2 tensors, one per tensor, got 1", {"within": [X[0]]}),
        (TypeError, r"within\[0\] \(a\): expected dtype torch.bool", {"within": X}),
        (
            ValueError,
            r"within\[1\] \(b\): expected the shape \(2, 2\) of tensors\[1\] \(b\), got \(3,\)",
            {"within": [X[0].bool(), X[0].bool()]},
        ),
        (
            ValueError,
            r"within\[0\] \(a\): expected the device cpu of tensors\[0\] \(a\), got meta",
            {"within": [x.bool().to("meta") for x in X]},
        ),
    ],
)
def test_bad_calls(kind: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    call = {"tensors": X, "names": ["a", "b"]} | arguments
    with pytest.raises(kind, match=f"^tensor_statistics: {message}"):
        fp.tensor_statistics(call.pop("tensors"), **call)


@pytest.mark.parametrize(
    ("kind", "p", "q"),
    [(ValueError, 1.0, 1.0), (ValueError, 2.0, 1.0), (ValueError, 0.0, 1.0), (TypeError, "a", 1)],
)
def test_bad_pq(kind: type[Exception], p: Any, q: Any) -> None:
    with pytest.raises(kind, match=r"^pq_index: p: expected"):
        fp.pq_index(X, None, p, q)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"tensors\[0\]: .*Long", {"tensors": [torch.ones(3).long()]}),
        ("within: expected 1 tensors", {"within": [torch.ones(3).bool()] * 2}),
        (r"within\[0\]: .*Bool", {"within": [torch.ones(3)]}),
        (r"within\[0\]: expected the shape", {"within": [torch.ones(4).bool()]}),
        ("p: expected exponents", {"p": [0.0]}),
        ("p: expected exponents", {"p": [math.nan]}),
    ],
)
def test_bad_raw_calls(message: str, change: dict[str, Any]) -> None:
    """The op checks for itself: it can be called without the public function."""
    call = {"tensors": [torch.ones(3)], "within": [], "p": [1.0], "gini": False} | change
    with pytest.raises(RuntimeError, match=f"tensor_statistics: {message}"):
        OP(*call.values())
