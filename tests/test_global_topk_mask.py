"""global_topk_mask against its reference: bitwise, on every ISA, over the data that break sorts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
from conftest import runnable_isas
from fastprune.ops.global_topk_mask import kept_count
from fastprune.ops.topk_call import TopkCall
from fastprune.reference.global_topk_mask import filter_norms, fuse_score
from oracle import DTYPES, guarded

OP = torch.ops.fastprune.global_topk_mask
ISAS = runnable_isas()
SCOPES = ["global", "layer", "neuron", "filter"]
SCORES = ["identity", "magnitude", "product", "saliency", "square", "noise", "lamp"]
KINDS = ["normal", "integers", "zeros", "equal", "denormal", "infinite", "signed_zeros", "huge"]
SIZES = [0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 61, 63, 64, 65, 97, 127, 128, 129]


@dataclass
class Case:
    """One call of the op; printing it says how to make the tensors again."""

    seed: int
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    kind: str
    scope: str
    score: str
    within: float | None
    place: float
    strided: bool
    scaled: bool
    packed: bool

    def values(self, offset: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(2 * self.seed + offset)
        return [self.fill(s, d, g) for s, d in zip(self.shapes, self.dtypes, strict=True)]

    def fill(self, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
        if self.strided and len(shape) > 1:
            turned = (shape[-1], *shape[1:-1], shape[0])
            return self.fill_dense(turned, dtype, g).transpose(0, -1)
        return self.fill_dense(shape, dtype, g)

    def fill_dense(self, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
        t = torch.randn(shape, generator=g, dtype=torch.float64)
        pick = torch.rand(shape, generator=g)
        if self.kind == "integers":
            t = torch.randint(-2, 3, shape, generator=g).double()
        elif self.kind == "zeros":
            t = t * (pick < 0.15)
        elif self.kind == "equal":
            t = torch.full(shape, -1.5, dtype=torch.float64)
        elif self.kind == "denormal":
            t = t * 4 * torch.finfo(dtype).smallest_normal / 2**3
        elif self.kind == "infinite":
            t = torch.where(pick < 0.1, math.inf, torch.where(pick > 0.9, -math.inf, t))
        elif self.kind == "signed_zeros":
            t = torch.where(pick < 0.4, 0.0, torch.where(pick < 0.8, -0.0, t))
        elif self.kind == "huge":
            t = t * torch.finfo(dtype).max / 8
        return t.to(dtype)

    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        values, other, within = self.values(0), [], []
        if self.score in ("product", "saliency"):
            other = self.values(1)
        if self.within is not None:
            g = torch.Generator().manual_seed(self.seed + 7)
            within = [torch.rand(s, generator=g) < self.within for s in self.shapes]
        return values, other, within

    def counts(self, values: Sequence[Tensor], within: Sequence[Tensor]) -> list[int]:
        """Legal counts: none, one, all, or in between, of the candidates there are."""
        allowed = within or [torch.ones(v.shape, dtype=torch.bool) for v in values]
        rows = [a.reshape(a.shape[0] if a.dim() else 1, -1 if a.numel() else 0) for a in allowed]
        if self.scope == "global":  # three selections at once
            units = [sum(int(a.sum()) for a in allowed)] * 3
        elif self.scope == "layer":
            units = [int(a.sum()) for a in allowed]
        elif self.scope == "filter":
            alive = [r.any(dim=1) if within else r.new_ones(r.shape[0]) for r in rows]
            units = [sum(int(a.sum()) for a in alive)] * 3
        else:
            units = [int(r.sum(dim=1).min()) if r.numel() else 0 for r in rows]
        if self.scope in ("global", "filter"):
            places = (self.place, 1 - self.place, self.place / 2)
            return [round(p * n) for p, n in zip(places, units, strict=True)]
        return [round(self.place * n) for n in units]

    def call(self) -> TopkCall:
        values, other, within = self.arguments()
        scale = None
        if self.scaled and self.score != "lamp":
            signs = torch.randn(len(values), generator=torch.Generator().manual_seed(self.seed))
            scale = [1.0 if s > 1 else float(s) for s in signs]
        return TopkCall.check(
            values,
            self.scope,
            self.score,
            other or None,
            within or None,
            scale,
            self.seed if self.score == "noise" else None,
            self.packed,
            None,
        )


shape_lists = st.lists(
    st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)
    .map(tuple)
    .filter(lambda s: math.prod(s) <= 2500),
    min_size=1,
    max_size=4,
)
places = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
withins = st.none() | st.sampled_from([0.0, 0.02, 0.5, 1.0])


@st.composite
def cases(draw: Callable[..., Any], shapes: Any, dtypes: Any) -> Case:
    chosen = draw(shapes)
    score = draw(st.sampled_from(SCORES))
    return Case(
        seed=draw(st.integers(0, 2**31)),
        shapes=chosen,
        dtypes=[draw(dtypes) for _ in chosen],
        kind=draw(st.sampled_from(KINDS)),
        scope=draw(st.sampled_from(SCOPES[:2] if score == "lamp" else SCOPES)),
        score=score,
        within=draw(withins),
        place=draw(places),
        strided=draw(st.booleans()),
        scaled=draw(st.booleans()),
        packed=draw(st.booleans()),
    )


def outcome(f: Callable[[], list[list[Tensor]]]) -> list[list[Tensor]] | str:
    """The masks, or "NaN" where that is the error."""
    try:
        return f()
    except (ValueError, RuntimeError) as error:
        if "NaN" not in str(error):
            raise
        return "NaN"


def check(case: Case) -> None:
    call = case.call()
    counts = case.counts(call.values, call.within)
    expected = outcome(lambda: call._by_reference(counts))
    before = fp._C.isa()
    try:
        for isa in ISAS:
            fp._C.set_isa(isa)
            got = outcome(lambda: call.run(counts))
            if isinstance(expected, str) or isinstance(got, str):
                assert got == expected, f"{isa}: {case}"
                continue
            for n, (masks, rights) in enumerate(zip(got, expected, strict=True)):
                for i, (mask, right) in enumerate(zip(masks, rights, strict=True)):
                    assert mask.dtype == (torch.uint8 if case.packed else torch.bool)
                    assert mask.is_contiguous()
                    text = f"{isa}: mask {i} of selection {n} of {case}, counts {counts}"
                    assert torch.equal(mask, right), text
    finally:
        fp._C.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_cases(dtype: torch.dtype) -> None:
    @settings(max_examples=800)
    @given(cases(shape_lists, st.just(dtype)))
    def run(case: Case) -> None:
        check(case)

    run()


@settings(max_examples=400)
@given(cases(shape_lists, st.sampled_from(DTYPES)))
def test_mixed_dtypes(case: Case) -> None:
    check(case)


# Past the direct selection: sampled brackets, massed values at their ends, histograms.
LARGE = st.sampled_from(
    [
        [(16385,)],
        [(70, 300), (1,), (0,), (30, 1111)],
        [(2, 16384), (1, 32769), (63,)],
        [(3, 66000), (17, 3)],
    ]
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_cases(dtype: torch.dtype) -> None:
    @settings(max_examples=60)
    @given(cases(LARGE, st.just(dtype)))
    def run(case: Case) -> None:
        check(case)

    run()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    parts=st.lists(
        st.tuples(st.sampled_from([-3.0, -0.0, 0.0, 1.0, 1.5, 2.0]), st.integers(1, 20000)),
        min_size=2,
        max_size=5,
    ),
    off=st.integers(-9, 9),
    shuffled=st.booleans(),
)
def test_thresholds_at_the_edge_of_massed_values(
    seed: int, parts: list[tuple[float, int]], off: int, shuffled: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    pieces = [torch.full((n,), v) for v, n in parts] + [torch.randn(20000, generator=g)]
    x = torch.cat(pieces)
    if shuffled:
        x = x[torch.randperm(x.numel(), generator=g)]
    edge = int((x > parts[0][0]).sum())
    for k in {max(0, min(x.numel(), edge + off)), edge}:
        right = fp.reference.global_topk_mask([x], [k], "global", "identity", None, None)
        assert torch.equal(OP([x], [], [], [k], "global", "identity")[0], right[0]), (k, parts)


def test_a_sample_that_misleads() -> None:
    """Candidates crowd where the sample hardly looks: every pass after the first is exact."""
    x = torch.full((400_000,), 5.0)
    x[1000:1700] = torch.linspace(1, 2, 700)
    within = torch.zeros(x.shape, dtype=torch.bool)
    within[900:2000] = True
    for k in (1, 399, 400, 401, 750, 1099, 1100):
        right = fp.reference.global_topk_mask([x], [k], "global", "identity", None, [within])
        assert torch.equal(OP([x], [], [within], [k], "global", "identity")[0], right[0]), k


@pytest.mark.parametrize("scope", SCOPES)
def test_same_bits_for_any_number_of_threads(isa: str, threads: None, scope: str) -> None:
    g = torch.Generator().manual_seed(3)
    v = [torch.randint(-40, 40, (n, 333), generator=g).float() for n in (400, 1, 77)]
    u = [torch.randn(t.shape, generator=g) for t in v]
    counts = {"global": [70_001], "layer": [9_000, 3, 77], "neuron": [100, 1, 3], "filter": [200]}
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        results.append(OP(v, u, [], counts[scope], scope, "saliency"))
        results.append(OP(v, [], [], counts[scope], scope, "magnitude"))
    for masks in results[2:]:
        for a, b in zip(masks, results[len(results) % 2], strict=True):
            assert a.shape == b.shape
    for i in (0, 1):
        for other in results[i::2]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[i], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1023, 1025, 20_001])
def test_reads_nothing_past_the_end(isa: str, dtype: torch.dtype, n: int) -> None:
    v, u = guarded(torch.randn(n).to(dtype)), guarded(torch.randn(n).to(dtype))
    within = guarded(torch.rand(n) < 0.7)
    for scope in ("global", "layer", "neuron", "filter"):
        k = int(within.sum()) // 2 if scope in ("global", "layer") else 0
        OP([v], [u], [within], [k], scope, "saliency")


def test_filter_norms_are_the_same_to_the_last_bit() -> None:
    """Squares of half a unit in the last place of 1: each order of additions rounds otherwise."""
    g = torch.Generator().manual_seed(0)
    for cols in (1, 9, 16, 17, 100, 1023, 1025, 3000):
        rows = torch.rand(200, cols, generator=g, dtype=torch.float64) * 2.0**-26
        rows[torch.arange(200), torch.randint(cols, (200,), generator=g)] = 1
        assert cols == 1 or filter_norms(rows).ne(rows.norm(dim=1)).any()
        right = fp.reference.global_topk_mask([rows], [77], "filter", "square", None, None)
        assert torch.equal(OP([rows], [], [], [77], "filter", "square")[0], right[0])


def test_density_rounds_half_up() -> None:
    assert [kept_count(0.5, n) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]
    x = [torch.arange(5.0), torch.arange(6.0).view(2, 3)]
    assert sum(int(m.sum()) for m in fp.global_topk_mask(x, 0.5)) == 6
    assert [int(m.sum()) for m in fp.global_topk_mask(x, 0.5, scope="layer")] == [3, 3]
    y = [torch.rand(3, 5), torch.rand(2, 4)]
    rows = fp.global_topk_mask(y, 0.5, scope="neuron")
    assert [m.sum(1).tolist() for m in rows] == [[3, 3, 3], [2, 2]]
    kept = fp.global_topk_mask(y, 0.5, scope="filter")
    assert sum(int(m.any(1).sum()) for m in kept) == 3


def test_ties_go_to_the_earlier_index_and_zeros_are_equal() -> None:
    x = [torch.tensor([-0.0, 0.0]), torch.tensor([[0.0, 1.0], [-0.0, 0.0]])]
    masks = fp.global_topk_mask(x, k=3)
    assert masks[0].tolist() == [True, True]
    assert masks[1].tolist() == [[False, True], [False, False]]


def test_gradients_are_left_alone() -> None:
    w = torch.randn(30, requires_grad=True)
    (mask,) = fp.global_topk_mask([w * 2], 0.5, score="magnitude")
    assert not mask.requires_grad
    assert mask.grad_fn is None
    assert w.grad is None


def test_reference_serves_other_devices() -> None:
    (mask,) = fp.global_topk_mask([torch.empty(3, 4, device="meta")], 0.5)
    assert mask.shape == (3, 4)
    assert mask.device.type == "meta"


@pytest.mark.parametrize("scope", SCOPES)
def test_opcheck(scope: str) -> None:
    v = [torch.randn(4, 6), torch.randn(5, 3).t(), torch.randn(2, 3, 2)]
    u = [torch.randn(t.shape) for t in v]
    within = [torch.ones(t.shape, dtype=torch.bool) for t in v]
    counts = [2] if scope in ("global", "filter") else [2, 3, 1]
    torch.library.opcheck(OP, (v, u, within, counts, scope, "saliency"))
    torch.library.opcheck(OP, (v, [], [], counts, scope, "magnitude"))
    v[0].requires_grad_()
    torch.library.opcheck(OP, (v, [], [], counts, scope, "identity"))


def test_compiles_whole() -> None:
    def prune(w: Tensor, g: Tensor) -> Tensor:
        return w * OP([w], [g], [], [20], "global", "saliency")[0]

    w, g = torch.randn(10, 10), torch.randn(10, 10)
    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(w, g), prune(w, g))


@pytest.mark.parametrize("n", [40, 50_000])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_an_error_that_names_the_tensor(n: int, scope: str, sign: float) -> None:
    v = [torch.randn(2, n), torch.randn(3, n)]
    v[1][1, n // 2] = math.copysign(math.nan, sign)
    k: Any = 0 if scope in ("global", "filter") else [0, 0]
    for score in ("identity", "magnitude"):
        for f in (k, [5, 5] if isinstance(k, list) else 2):
            with pytest.raises(ValueError, match=r"scores\[1\] \(b\): .*NaN"):
                fp.global_topk_mask(v, k=f, scope=scope, score=score, names=["a", "b"])
    call = TopkCall.check(v, scope, "identity", None, None, None, None, False, None)
    with pytest.raises(ValueError, match=r"scores\[1\]: .*NaN"):
        call._by_reference([0] if k == 0 else k)
    within = [torch.ones(t.shape, dtype=torch.bool) for t in v]
    within[1][1] = False
    assert fp.global_topk_mask(v, k=k, scope=scope, within=within)


def bad_calls() -> list[tuple[type[Exception], str, dict[str, Any]]]:
    x = [torch.ones(2, 3), torch.ones(4)]
    yes = [torch.ones(2, 3, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)]
    return [
        (ValueError, "scores: expected at least one", {"scores": [], "density": 0.5}),
        (TypeError, "scores: expected a sequence", {"scores": x[0], "density": 0.5}),
        (TypeError, r"scores\[1\]: expected a tensor", {"scores": [x[0], 3], "density": 0.5}),
        (TypeError, r"scores\[0\].*int64", {"scores": [torch.ones(3).long()], "density": 0.5}),
        (TypeError, r"scores\[0\].*bool", {"scores": yes, "density": 0.5}),
        (
            ValueError,
            r"scores\[1\].*device",
            {"scores": [x[0], torch.ones(3, device="meta")], "density": 0.5},
        ),
        (ValueError, "exactly one", {"scores": x}),
        (ValueError, "exactly one", {"scores": x, "density": 0.5, "k": 3}),
        (ValueError, r"density: .*\[0, 1\], got 1.5", {"scores": x, "density": 1.5}),
        (ValueError, r"density: .*\[0, 1\]", {"scores": x, "density": -1e-9}),
        (ValueError, "density: .*nan", {"scores": x, "density": math.nan}),
        (TypeError, "density: .*bool", {"scores": x, "density": True}),
        (TypeError, "density: .*str", {"scores": x, "density": "0.5"}),
        (ValueError, "k: expected 0 to 10, got 11", {"scores": x, "k": 11}),
        (ValueError, "k: expected 0 to 10, got -1", {"scores": x, "k": -1}),
        (TypeError, "k: expected an int .*float", {"scores": x, "k": 3.0}),
        (TypeError, "k: expected an int .*bool", {"scores": x, "k": True}),
        (TypeError, "k: expected an int .*list", {"scores": x, "k": [1, 2]}),
        (TypeError, "k: expected a sequence", {"scores": x, "k": 3, "scope": "layer"}),
        (ValueError, "k: expected 2 counts, got 1", {"scores": x, "k": [3], "scope": "layer"}),
        (ValueError, r"k\[1\]: expected 0 to 4", {"scores": x, "k": [3, 5], "scope": "layer"}),
        (ValueError, r"k\[0\]: expected 0 to 3", {"scores": x, "k": [4, 1], "scope": "neuron"}),
        (TypeError, r"k\[0\]: .*float", {"scores": x, "k": [1.0, 1], "scope": "layer"}),
        (ValueError, "k: expected 0 to 6", {"scores": x, "k": 7, "scope": "filter"}),
        (ValueError, "scope: .*global.*'row'", {"scores": x, "k": 1, "scope": "row"}),
        (ValueError, "score: .*saliency.*'max'", {"scores": x, "k": 1, "score": "max"}),
        (ValueError, "other: .*needs it", {"scores": x, "k": 1, "score": "product"}),
        (ValueError, "other: .*does not use", {"scores": x, "k": 1, "other": x}),
        (
            ValueError,
            "other: expected 2 tensors",
            {"scores": x, "k": 1, "score": "product", "other": x[:1]},
        ),
        (
            ValueError,
            r"other\[0\]: expected the shape \(2, 3\)",
            {"scores": x, "k": 1, "score": "product", "other": x[::-1]},
        ),
        (TypeError, r"other\[0\].*bool", {"scores": x, "k": 1, "score": "product", "other": yes}),
        (TypeError, r"within\[0\].*torch.bool", {"scores": x, "k": 1, "within": x}),
        (ValueError, r"within\[0\]: .*shape", {"scores": x, "k": 1, "within": yes[::-1]}),
        (ValueError, "at most the 6 cand.* all scores", {"scores": x, "k": 7, "within": yes}),
        (
            ValueError,
            r"at most the 0 candidates of scores\[1\]",
            {"scores": x, "k": [6, 1], "within": yes, "scope": "layer"},
        ),
        (
            ValueError,
            r"at most the 0 candidates of row 0 of scores\[1\]",
            {"scores": x, "k": [3, 1], "within": yes, "scope": "neuron"},
        ),
        (
            ValueError,
            "at most the 2 candidates of all filters",
            {"scores": x, "k": 3, "within": yes, "scope": "filter"},
        ),
        (
            ValueError,
            r"scores\[0\]: .*1 dimension",
            {"scores": [torch.ones(())], "k": 1, "scope": "filter"},
        ),
        (
            ValueError,
            r"scores\[0\]: .*1 dimension",
            {"scores": [torch.ones(())], "k": [1], "scope": "neuron"},
        ),
        (ValueError, "names: expected 2", {"scores": x, "k": 1, "names": ["a"]}),
        (TypeError, "names: ", {"scores": x, "k": 1, "names": "ab"}),
    ]


@pytest.mark.parametrize(("kind", "message", "arguments"), bad_calls())
def test_bad_calls(kind: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(kind, match=f"^global_topk_mask: .*{message}|^global_topk_mask: {message}"):
        fp.global_topk_mask(**arguments)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"values\[0\]: .*Long", {"values": [torch.ones(3).long()]}),
        ("other: expected none", {"other": [torch.ones(3)]}),
        ("other: expected one tensor", {"score": "product"}),
        (r"other\[0\]: .*shape \(3\)", {"score": "product", "other": [torch.ones(4)]}),
        (r"other\[0\]: .*Bool", {"score": "product", "other": [torch.ones(3).bool()]}),
        ("within: expected 1 tensors", {"within": [torch.ones(3).bool()] * 2}),
        (r"within\[0\]: .*Bool", {"within": [torch.ones(3)]}),
        (r"counts: expected 1 .*got 2", {"counts": [1, 2], "scope": "layer"}),
        (r"counts: expected at least one", {"counts": []}),
        (r"scale: expected one for each of values, got 2", {"scale": [1.0, 2.0]}),
        (r"scale\[0\]: expected a finite", {"scale": [math.inf]}),
        (r"scale: expected none with score 'lamp'", {"scale": [2.0], "score": "lamp"}),
        (r"scope: expected global or layer", {"scope": "filter", "score": "lamp"}),
        (r"counts\[0\]: expected 0 to 3 elements, got 4", {"counts": [4]}),
        (r"counts\[0\]: expected 0 to 3 .*got -1", {"counts": [-1], "scope": "layer"}),
        (r"counts\[0\]: expected 0 to 1 .*row", {"counts": [2], "scope": "neuron"}),
        (r"counts\[0\]: expected 0 to 3 filters", {"counts": [4], "scope": "filter"}),
        ("scope: expected one of global", {"scope": "rows"}),
        ("score: expected one of identity", {"score": ""}),
    ],
)
def test_bad_raw_calls(message: str, change: dict[str, Any]) -> None:
    """The op checks for itself: it can be called without the public function."""
    call = {"values": [torch.ones(3)], "other": [], "within": [], "counts": [1]}
    call |= {"scope": "global", "score": "identity", "scale": []} | change
    with pytest.raises(RuntimeError, match=f"global_topk_mask: {message}"):
        OP(*call.values())


def test_scores_are_fused_in_float32_and_float64() -> None:
    v, u = torch.tensor([1 / 3], dtype=torch.float32), torch.tensor([1 / 3], dtype=torch.float64)
    assert fuse_score(v, u, "product").dtype == torch.float64
    b = torch.tensor([1 / 3], dtype=torch.bfloat16)
    assert fuse_score(b, b, "product").item() == (b.float() * b.float()).item()
    # 1 + 2^-12 squared needs 25 bits: float32 rounds it to a tie, float64 does not.
    x = torch.tensor([1 + 2.0**-11, 1 + 2.0**-12 + 2.0**-12], dtype=torch.float32)
    y = torch.tensor([1.0, 1 + 2.0**-30], dtype=torch.float64)
    assert fp.global_topk_mask([x], k=1, other=[y], score="product")[0].tolist() == [False, True]
