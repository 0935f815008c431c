"""The selection on CUDA, by emulation: bitwise against the reference, for any order of blocks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
import fastprune as fp
from fastprune.ops.topk_call import NOTHING_WRONG, TopkCall
from fastprune.ops.topk_checks import OP
from oracle import DTYPES, guarded
from test_global_topk_mask import Case, cases, outcome, shape_lists

pytestmark = emulated.needs_emulation

ORDERS = [(0, 4), (1, 1), (2, 3)]  # seeds of the order of threads and blocks; multiprocessors
INFINITY = float("inf")


def check(case: Case, orders: list[tuple[int, int]] = ORDERS[1:2]) -> None:
    call = case.call()
    counts = case.counts(call.values, call.within)
    expected = outcome(lambda: call._by_reference(counts))
    for seed, multiprocessors in orders:
        emulated.configure(seed, multiprocessors)
        got = outcome(lambda: call.run_on_cuda(emulated.ops, counts))
        same(got, expected, f"order {seed}, {multiprocessors}: {case}, counts {counts}")


def same(got: Any, expected: Any, what: str) -> None:
    if isinstance(expected, str) or isinstance(got, str):
        assert got == expected, what
        return
    for n, (masks, rights) in enumerate(zip(got, expected, strict=True)):
        for i, (mask, right) in enumerate(zip(masks, rights, strict=True)):
            assert mask.dtype == right.dtype
            assert mask.is_contiguous()
            assert torch.equal(mask, right), f"mask {i} of selection {n}: {what}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_cases(dtype: torch.dtype) -> None:
    @settings(max_examples=60)
    @given(cases(shape_lists, st.just(dtype)))
    def run(case: Case) -> None:
        check(case)

    run()


@settings(max_examples=60)
@given(cases(shape_lists, st.sampled_from(DTYPES)))
def test_mixed_dtypes(case: Case) -> None:
    check(case)


# Several tiles to a tensor, several tensors to a block, lists that overflow.
LARGE = st.sampled_from(
    [
        [(9001,)],
        [(70, 130), (1,), (0,), (30, 211)],
        [(2, 4096), (1, 8193), (63,)],
        [(3, 5000), (17, 3)],
    ]
)


@settings(max_examples=30)
@given(cases(LARGE, st.sampled_from(DTYPES)))
def test_large_cases(case: Case) -> None:
    check(case, [(case.seed % 3, 1 + case.seed % 4)])


def spread(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def by_kernel(
    values: list[Tensor],
    counts: list[int],
    scope: str = "global",
    score: str = "magnitude",
    *,
    packed: bool = False,
    **more: Any,
) -> list[list[Tensor]]:
    call = TopkCall.check(
        values,
        scope,
        score,
        more.get("other"),
        more.get("within"),
        more.get("scale"),
        more.get("seed"),
        packed,
        more.get("names"),
    )
    return call.run_on_cuda(emulated.ops, counts)


def massed(n: int) -> dict[str, Tensor]:
    """Scores with which the boundary holds too many candidates for the list, in different ways."""
    g = torch.Generator().manual_seed(5)
    x = spread(n)
    zeros = torch.where(torch.rand(n, generator=g) < 0.6, 0.0, x)
    close = 1 + torch.randint(0, 50, (n,), generator=g) * 2.0**-23  # the first digits are the same
    halves = torch.where(torch.rand(n, generator=g) < 0.5, 1 + x.abs() * 2.0**-20, x)
    return {
        "equal": torch.full((n,), 0.5),
        "zeros": zeros,
        "close": close,
        "halves": halves,
        "blocks of equals": x.abs().round().sort().values,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["equal", "zeros", "close", "halves", "blocks of equals"])
def test_more_candidates_than_fit(kind: str, dtype: torch.dtype) -> None:
    n = 20_000
    x = massed(n)[kind].to(dtype)
    parts = list(x.split([4096, 1, 8190, n - 4096 - 1 - 8190]))
    for k, packed in ((1, False), (n // 3, True), (n // 2 + 1, False), (n - 1, True)):
        (right,) = fp.global_topk_sweep(parts, k=[k], score="magnitude", packed=packed)
        results = []
        for seed, multiprocessors in ORDERS:
            emulated.configure(seed, multiprocessors)
            results.append(by_kernel(parts, [k], packed=packed)[0])
        for got in results:
            same([got], [right], f"{kind}, k = {k}")


def test_every_count_of_a_small_problem() -> None:
    """All thresholds there are, ties and signed zeros among them."""
    x = torch.tensor([0.0, -0.0, 1, 1, -1, 2, -3, INFINITY, -INFINITY, 1e-45, -1e-45, 0.0, 1, 5])
    parts = [x, x[2:9].clone()]
    n = sum(t.numel() for t in parts)
    for score, packed in itertools.product(("identity", "magnitude"), (False, True)):
        counts = list(range(n + 1))
        right = fp.global_topk_sweep(parts, k=counts, score=score, packed=packed)  # type: ignore[arg-type]
        emulated.configure(2, 2)
        same(by_kernel(parts, counts, score=score, packed=packed), right, score)


def test_many_layers() -> None:
    """More than are selected from at once, empty ones among them."""
    sizes = [1 + 37 * i % 201 for i in range(70)] + [0, 4097, 0, 5000]
    x = [spread(n, n) for n in sizes]
    x[3] = x[3].double()
    counts = [n // 3 for n in sizes]
    right = fp.global_topk_mask(x, k=counts, scope="layer", score="magnitude")
    for seed, multiprocessors in ORDERS:
        emulated.configure(seed, multiprocessors)
        same(by_kernel(x, counts, "layer"), [right], "layers")
    right = fp.global_topk_mask(x, k=3000, score="magnitude")
    same(by_kernel(x, [3000]), [right], "many tensors, one selection")


def test_rows_of_any_length() -> None:
    x = [spread(3 * 2500).view(3, 2500), spread(600 * 5).view(600, 5), torch.zeros(4, 0)]
    x += [torch.ones(3, 1025), torch.zeros(0, 7), spread(1).view(1, 1)]
    counts = [1234, 2, 0, 500, 3, 1]
    for packed in (False, True):
        right = fp.global_topk_mask(x, k=counts, scope="neuron", score="square", packed=packed)
        for seed, multiprocessors in ORDERS:
            emulated.configure(seed, multiprocessors)
            got = by_kernel(x, counts, "neuron", "square", packed=packed)
            same(got, [right], "rows")


def test_filter_norms_are_the_same_to_the_last_bit() -> None:
    g = torch.Generator().manual_seed(0)
    for cols in (1, 9, 16, 17, 100, 1025):
        rows = torch.rand(60, cols, generator=g, dtype=torch.float64) * 2.0**-26
        rows[torch.arange(60), torch.randint(cols, (60,), generator=g)] = 1
        right = fp.global_topk_mask([rows], k=23, scope="filter", score="square")
        emulated.configure(1, 3)
        same(by_kernel([rows], [23], "filter", "square"), [right], f"{cols} columns")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 63, 4097])
def test_reads_and_writes_nothing_past_the_end(dtype: torch.dtype, n: int) -> None:
    v, u = guarded(torch.randn(n).to(dtype)), guarded(torch.randn(n).to(dtype))
    within = guarded(torch.rand(n) < 0.7)
    for scope, packed in itertools.product(("global", "layer", "neuron", "filter"), (False, True)):
        k = int(within.sum()) // 2 if scope in ("global", "layer") else 0
        got = by_kernel([v], [k], scope, "saliency", packed=packed, other=[u], within=[within])
        right = fp.global_topk_mask(
            [v],
            k=k if scope in ("global", "filter") else [k],
            scope=scope,  # type: ignore[arg-type]
            score="saliency",
            other=[u],
            within=[within],
            packed=packed,
        )
        same(got, [right], scope)


def test_misaligned_views() -> None:
    x, u = spread(12_300), spread(12_300, 1)
    within = torch.rand(12_300, generator=torch.Generator().manual_seed(2)) < 0.5
    for a, b, c in itertools.product((0, 1), (0, 2), (0, 3)):
        parts = [x[a : a + 9000], x[9000 + a : 12_200 + a]]
        others = [u[b : b + 9000], u[9000 + b : 12_200 + b]]
        allowed = [within[c : c + 9000], within[9000 + c : 12_200 + c]]
        right = fp.global_topk_mask(parts, k=2000, score="product", other=others, within=allowed)
        got = by_kernel(parts, [2000], score="product", other=others, within=allowed)
        same(got, [right], f"offsets {a}, {b}, {c}")


@pytest.mark.parametrize("scope", ["global", "layer", "neuron", "filter"])
def test_nan_is_an_error_that_names_the_tensor(scope: str) -> None:
    v = [torch.randn(2, 40), torch.randn(3, 40), torch.randn(3, 40)]
    v[1][1, 20] = v[2][0, 0] = -math.nan
    counts = [0] if scope in ("global", "filter") else [0, 0, 0]
    message = rf"^{OP}: scores\[1\] \(b\): a candidate's score is NaN$"
    emulated.configure(2, 3)
    with pytest.raises(ValueError, match=message):
        by_kernel(v, counts, scope, names=["a", "b", "c"])
    within = [torch.ones(t.shape, dtype=torch.bool) for t in v]
    within[1][1] = within[2][0] = False
    by_kernel(v, counts, scope, within=within)


@pytest.mark.parametrize("scope", ["global", "layer", "neuron", "filter"])
def test_too_few_candidates_are_an_error_as_on_the_cpu(scope: str) -> None:
    v = [torch.randn(4, 30), torch.randn(5, 30)]
    within = [torch.ones(t.shape, dtype=torch.bool) for t in v]
    within[1][2] = False
    within[1][4, 3:] = False
    within[1][0] = False
    k: Any = {"global": 240, "layer": [120, 100], "neuron": [30, 4], "filter": 8}[scope]
    with pytest.raises(ValueError, match="candidates of") as on_cpu:
        fp.global_topk_mask(v, k=k, scope=scope, within=within)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="candidates of") as on_cuda:
        by_kernel(v, [k] if isinstance(k, int) else k, scope, "identity", within=within)
    assert str(on_cuda.value) == str(on_cpu.value)


def test_without_a_status_the_next_call_raises() -> None:
    def select(x: Tensor, k: int) -> list[Tensor]:
        return emulated.ops.global_topk_mask([x], [], [], [k], "global", "identity")

    bad = torch.tensor([1.0, math.nan, 2.0])
    select(bad, 1)
    with pytest.raises(RuntimeError, match=r"an earlier call .*: a candidate's score is NaN"):
        select(torch.ones(3), 1)
    assert select(torch.ones(3), 1)[0].tolist() == [True, False, False]
    within = torch.tensor([True, False, False])
    emulated.ops.global_topk_mask([torch.ones(3)], [], [within], [2], "global", "identity")
    with pytest.raises(RuntimeError, match=r"an earlier call .*: k: expected at most"):
        select(torch.ones(3), 1)
    status = emulated.ops.global_topk_mask_status([bad], [], [], [1], "global", "identity")[-1]
    assert status.tolist() == [0, NOTHING_WRONG]
    select(torch.ones(3), 1)  # whoever looks at the status has heard of it


def test_nothing_to_select_from() -> None:
    empty = [torch.zeros(0, 3), torch.zeros(2, 0)]
    for scope in ("global", "layer", "neuron", "filter"):
        counts = [0] if scope in ("global", "filter") else [0, 0]
        (masks,) = by_kernel(empty, counts, scope)
        assert [m.shape for m in masks] == [t.shape for t in empty]
    (masks,) = by_kernel(empty, [2], "filter")
    with pytest.raises(RuntimeError, match="on CUDA expected scores of LAMP"):
        emulated.ops.global_topk_mask([torch.ones(3)], [], [], [1], "global", "lamp")
    with pytest.raises(RuntimeError, match=r"counts\[0\]: expected 0 to 3 elements, got 4"):
        emulated.ops.global_topk_mask([torch.ones(3)], [], [], [4], "global", "identity")


def test_fake_kernel_of_the_status() -> None:
    x = [torch.randn(4, 6), torch.randn(5)]
    fake = [torch.empty(t.shape, device="meta") for t in x]
    made = torch.ops.fastprune.global_topk_mask_status(fake, [], [], [7, 8], "global", "magnitude")
    assert [t.shape for t in made] == [x[0].shape, x[1].shape] * 2 + [torch.Size([2])]
