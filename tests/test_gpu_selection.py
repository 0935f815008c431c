"""Masks made on a GPU: the bits of the masks made on the CPU, for every option."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastprune as fp
import gpu
from fastprune.ops.topk_call import TopkCall
from gpu import on, strict_products  # noqa: F401
from test_global_topk_mask import Case, cases, outcome, shape_lists

pytestmark = gpu.needs_device
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def moved(call: TopkCall) -> TopkCall:
    """The call on the device."""
    return replace(
        call,
        values=list(on(*call.values)),
        other=list(on(*call.other)),
        within=list(on(*call.within)),
    )


def compare(case: Case) -> None:
    # lamp sums in another order on each device; its scores may differ in their last bit.
    assume(case.score != "lamp" or case.kind == "normal")
    call = case.call()
    counts = case.counts(call.values, call.within)
    expected, got = outcome(lambda: call.run(counts)), outcome(lambda: moved(call).run(counts))
    if isinstance(expected, str) or isinstance(got, str):
        assert got == expected, case
        return
    for masks, rights in zip(got, expected, strict=True):
        for mask, right in zip(masks, rights, strict=True):
            assert mask.device.type == gpu.DEVICE.type
            assert mask.dtype == right.dtype
            assert torch.equal(mask.cpu(), right), f"{case}, counts {counts}"


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_random_cases(dtype: torch.dtype) -> None:
    @settings(quick, max_examples=60)
    @given(cases(shape_lists, st.just(dtype)))
    def run(case: Case) -> None:
        compare(case)

    run()


@settings(quick, max_examples=60)
@given(cases(shape_lists, st.sampled_from(gpu.DTYPES)))
def test_mixed_dtypes(case: Case) -> None:
    compare(case)


LARGE = st.sampled_from(
    [
        [(262_147,)],
        [(70, 3000), (1,), (0,), (30, 1111)],
        [(2, 65_536), (1, 32_769), (63,)],
        [(3, 66_000), (17, 3), *[(257,)] * 20],
    ]
)


@settings(quick, max_examples=40 if gpu.ON_CUDA else 5)
@given(cases(LARGE, st.sampled_from(gpu.DTYPES)))
def test_large_cases(case: Case) -> None:
    compare(case)


def both(values: list[Tensor], **options: Any) -> None:
    """One call on both devices."""
    there = dict(options)
    for name in ("other", "within"):
        if name in there:
            there[name] = list(on(*there[name]))
    expected = fp.global_topk_mask(values, **options)
    got = fp.global_topk_mask(list(on(*values)), **there)
    for mask, right in zip(got, expected, strict=True):
        assert torch.equal(mask.cpu(), right), options


@pytest.mark.parametrize("n", [1, 31, 32, 33, 4095, 4097, 1_000_003 if gpu.ON_CUDA else 70_001])
def test_ties_go_to_the_earlier_index(n: int) -> None:
    for values in ([torch.ones(n)], [torch.zeros(n), -torch.zeros(n), torch.ones(5)]):
        total = sum(v.numel() for v in values)
        for k in sorted({0, 1, n // 2, n - 1, n, total - 1, total}):
            both(values, k=min(max(k, 0), total))
    g = torch.Generator().manual_seed(n)
    few = [torch.randint(-2, 3, (n,), generator=g).float(), torch.randint(-2, 3, (n,)).half()]
    both(few, density=0.37, score="magnitude")


def test_thresholds_at_the_edges_of_massed_values() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=g)
    x[torch.rand(x.shape, generator=g) < 0.8] = 0.0
    alive = int(x.count_nonzero())
    for k in (alive - 1, alive, alive + 1, alive + 1000, x.numel() - 1):
        both([x], k=k, score="magnitude")
    positive = int((x > 0).sum())
    for k in (positive - 1, positive, positive + 1, x.numel() - (alive - positive)):
        both([x], k=k)


@pytest.mark.parametrize("scope", ["global", "layer", "neuron", "filter"])
def test_scopes_quotas_and_options(scope: Any) -> None:
    g = torch.Generator().manual_seed(1)
    values = [torch.randn(s, generator=g) for s in ((40, 77), (5, 3, 3, 3), (1, 300), (64, 10))]
    other = [torch.randn(v.shape, generator=g) for v in values]
    within = [torch.rand(v.shape, generator=g) < 0.6 for v in values]
    both(values, density=0.3, scope=scope, score="saliency", other=other)
    both(values, density=0.1, scope=scope, score="magnitude", within=within)
    both(values, density=0.25, scope=scope, score="square", scale=[1.0, -2.0, 0.5, 3.0])
    both(values, density=0.4, scope=scope, score="magnitude", packed=True)
    both(values, density=0.4, scope=scope, score="noise", seed=7)
    if scope in ("global", "filter"):
        both(values, density=0.3, score="magnitude", scope=scope, min_per_tensor=2)
        frozen = [True, False, False, False]
        both(values, density=0.9, score="magnitude", scope=scope, frozen=frozen)


def test_sweeps_and_kept_scores() -> None:
    g = torch.Generator().manual_seed(2)
    values = [torch.randn(s, generator=g) for s in ((300, 70), (17,))]
    there = list(on(*values))
    densities = (0.9, 0.5, 0.1, 0.01)
    for masks, rights in zip(
        fp.global_topk_sweep(there, densities, score="magnitude"),
        fp.global_topk_sweep(values, densities, score="magnitude"),
        strict=True,
    ):
        assert all(torch.equal(m.cpu(), r) for m, r in zip(masks, rights, strict=True))
        kept = fp.kept_scores(there, masks, score="magnitude")
        right = fp.kept_scores(values, rights, score="magnitude")
        assert torch.equal(kept.kept.cpu(), right.kept)
        assert torch.equal(kept.threshold.cpu(), right.threshold)
        torch.testing.assert_close(kept.total.cpu(), right.total, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_a_nan_is_an_error_that_names_its_tensor(dtype: torch.dtype) -> None:
    for n, at in ((7, 3), (40_000, 39_999)):
        values = [torch.randn(n).to(dtype) for _ in range(3)]
        values[1][at] = math.nan
        with pytest.raises(ValueError, match=r"scores\['middle'\].*NaN|scores\[1\].*NaN"):
            fp.global_topk_mask(list(on(*values)), 0.5, names=["first", "middle", "last"])
        within = [torch.ones(n, dtype=torch.bool) for _ in values]
        within[1][at] = False
        both(values, k=n, within=within)  # ignored outside, and the error is over


def test_infinities_are_ordered() -> None:
    x = torch.tensor([1.0, math.inf, -math.inf, 0.0, math.inf, -5.0])
    for k in range(7):
        both([x], k=k)
        both([x], k=k, score="magnitude")


def test_bad_arguments_are_named() -> None:
    x = torch.randn(10, device=gpu.DEVICE)
    with pytest.raises(ValueError, match="k: expected 0 to 10, got 11"):
        fp.global_topk_mask([x], k=11)
    allowed = torch.zeros(10, dtype=torch.bool, device=gpu.DEVICE)
    with pytest.raises(ValueError, match=r"k: expected at most .*candidates.*, got 1"):
        fp.global_topk_mask([x], k=1, within=[allowed])
    if gpu.ON_CUDA:
        with pytest.raises(ValueError, match="device"):
            fp.global_topk_mask([x, x.cpu()], k=1)


def test_the_same_mask_every_time() -> None:
    g = torch.Generator().manual_seed(3)
    values = list(on(torch.randint(-40, 40, (400, 333), generator=g).float()))
    first = fp.global_topk_mask(values, k=70_001, score="magnitude")[0]
    same = []
    for _ in range(100 if gpu.ON_CUDA else 3):
        same.append(fp.global_topk_mask(values, k=70_001, score="magnitude")[0].eq(first).all())
    assert bool(torch.stack(same).all())


@pytest.mark.parametrize("method", ["magnitude", "snip", "synflow", "lamp"])
def test_pruners_run_where_the_model_is(method: str) -> None:
    """Scores that need gradients differ in rounding between devices; counts do not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 4))
    x, y = torch.randn(16, 20), torch.randint(4, (16,))
    options: dict[str, Any] = {}
    if method == "snip":
        options = {"data": [(x, y)], "loss": torch.nn.functional.cross_entropy}
    if method == "synflow":
        options = {"example_input": x, "steps": 5}
    masks = fp.prune(model, method, sparsity=0.8, **options)
    if method == "snip":
        options["data"] = [(x.to(gpu.DEVICE), y.to(gpu.DEVICE))]
    if method == "synflow":
        options["example_input"] = x.to(gpu.DEVICE)
    there = fp.prune(model.to(gpu.DEVICE), method, sparsity=0.8, **options)
    assert there.nnz() == masks.nnz()
    for name, mask in masks.items():
        assert there[name].device.type == gpu.DEVICE.type
        if method == "magnitude":
            assert torch.equal(there[name].cpu(), mask)
        else:
            assert float((there[name].cpu() == mask).float().mean()) > 0.97
