"""Plans on a GPU, by emulation: what they keep changes no result, bad patterns are refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
import fastprune as fp
from fastprune.ops import plan as plans
from layouts import same_bits
from plan_cases import random

pytestmark = emulated.needs_emulation

OPS = emulated.ops
READ_ANEW = plans.READ_ANEW
plan_bytes, release_plan = fp._C.plan_bytes, fp._C.release_plan
FORMS = ("deltas", "tensor_core", "dense")


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    yield
    fp._C.set_cuda_form("auto")


def make_plan(pattern: fp.Pattern) -> int:
    rows, depth = pattern.shape[:2]
    taps = pattern.shape[2] * pattern.shape[3] if len(pattern.shape) == 4 else 1
    blocks = [pattern.block_depth, pattern.transposed_block_depth]
    return OPS.make_plan(*pattern[:4], [rows, pattern.groups, depth, taps, *blocks])


@pytest.fixture
def plan() -> Iterator[int]:
    made = make_plan(fp.pack(mask()))
    yield made
    release_plan(made)


def mask() -> Tensor:
    return random(70, 37, seed=1) > 0.5


def linear(
    plan: int, weight: Tensor, version: int = -1, x: Tensor | None = None, **change: Any
) -> Tensor:
    x = random(5, 37).to(weight.dtype) if x is None else x
    a = {"bias": None, "plan": plan, "version": version, "residual": None, "relu": False}
    return OPS.planned_linear(x, weight, *{**a, "layout": 0, "tf32": False, **change}.values())


def input_grad(plan: int, weight: Tensor, version: int = -1) -> Tensor:
    grad = random(5, 70, seed=3).to(weight.dtype)
    return OPS.planned_linear_input_grad(grad, weight, plan, version)


def test_numbers_are_shared_with_plans_of_the_cpu(plan: int) -> None:
    pattern = fp.pack(mask())
    on_cpu = pattern.plan.number(pattern)
    assert on_cpu != plan
    weight = random(70, 37)
    for op, other in ((linear, on_cpu), (input_grad, on_cpu)):
        with pytest.raises(RuntimeError, match="plan: expected one that was made on the device"):
            op(other, weight)
    with pytest.raises(RuntimeError, match="plan: expected one that was made on the device"):
        torch.ops.fastprune.planned_linear(random(5, 37), weight, None, plan, -1, None, False, 0)
    first = plan_bytes(plan)
    assert first >= 70 * 2 * 4
    linear(plan, weight)
    assert plan_bytes(plan) > first
    other = make_plan(fp.pack(mask()))
    assert release_plan(other)
    assert not release_plan(other)
    assert plan_bytes(other) == -1
    with pytest.raises(RuntimeError, match="expected the number of a live plan"):
        linear(other, weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_follow_the_version(form: str, dtype: torch.dtype, plan: int) -> None:
    fp._C.set_cuda_form(form)
    weight = random(70, 37).to(dtype)

    def results(version: int) -> list[Tensor]:
        return [linear(plan, weight, version), input_grad(plan, weight, version)]

    def fresh() -> list[Tensor]:
        other = make_plan(fp.pack(mask()))
        made = [linear(other, weight), input_grad(other, weight)]
        release_plan(other)
        return made

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(same_bits(x, y) for x, y in zip(a, b, strict=True))

    old = results(7)
    assert same(old, fresh())
    held = plan_bytes(plan)
    weight.neg_()
    assert same(results(7), old)  # the caller says that nothing has changed
    assert same(results(8), fresh())
    weight.mul_(2)
    assert same(results(-1), fresh())  # unknown: read at every call
    weight.mul_(-3)
    assert same(results(-1), fresh())
    # Read whatever is kept; the other forms cannot know, and are read too at their next call.
    results(9)
    weight.mul_(2)
    assert same_bits(linear(plan, weight, 9 | READ_ANEW), fresh()[0])
    assert same(results(9), fresh())
    # Another tensor of the same version.
    weight = weight.clone().neg_()
    assert same(results(9), fresh())
    assert plan_bytes(plan) == held  # everything was refreshed where it was


def test_dtypes_take_turns(plan: int) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for form in (*FORMS, "auto"):
        fp._C.set_cuda_form(form)
        weights = [random(70, 37, seed=4).to(dtype) for dtype in dtypes]
        expected = [linear(plan, w) for w in weights]
        for _ in range(2):
            for w, y in zip(weights, expected, strict=True):
                assert same_bits(linear(plan, w, 1), y)


def test_tensors_changed_after_packing() -> None:
    pattern = fp.pack(mask())
    made = make_plan(pattern)
    weight = random(70, 37)
    expected = linear(made, weight), input_grad(made, weight)
    for t in pattern[:4]:
        t.fill_(5)
    for form in FORMS:
        fp._C.set_cuda_form(form)
        torch.testing.assert_close((linear(made, weight), input_grad(made, weight)), expected)
    release_plan(made)


def test_make_plan_checks_what_it_is_given() -> None:
    p = fp.pack(random(30, 40) > 0)
    good: list[Any] = [*p[:4], [30, 1, 40, 1, p.block_depth, p.transposed_block_depth]]

    def call(i: int, value: Any) -> int:
        return OPS.make_plan(*good[:i], value, *good[i + 1 :])

    twice = p.offset.clone()
    twice[1] = twice[0]
    wild = p.row_ptr.clone()
    wild[3] = 2**62
    shape = good[4]
    bad = [
        (0, p.row_ptr[:-1]),
        (0, p.row_ptr.int()),
        (0, p.row_ptr.flip(0)),
        (0, p.row_ptr + 1),
        (0, p.row_ptr.clamp(max=5)),
        (0, wild),
        (0, torch.full_like(p.row_ptr, -1)),
        (1, p.offset[:-1]),
        (1, p.offset + 40),
        (1, p.offset - 1),
        (1, p.offset.long()),
        (1, twice),
        (4, shape[:5]),
        (4, [31, *shape[1:]]),
        (4, [30, 0, *shape[2:]]),
        (4, [-30, *shape[1:]]),
        (4, [30, 1, -40, *shape[3:]]),
        (4, [*shape[:4], 0, 1]),
        (4, [2**62, 1, 2**62, *shape[3:]]),
    ]
    for seed in (0, 1, 2):
        emulated.configure(seed)
        for i, value in bad:
            with pytest.raises(RuntimeError, match=r"make_plan: |fit 64 bits"):
                call(i, value)
    made = call(0, p.row_ptr)
    assert release_plan(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": 3}, "layout: expected 0, 1 or 2, got 3"),
        ({"residual": random(5, 69)}, "residual: expected size 70 in dimension 1, got 69"),
        ({"residual": random(70)}, "residual: expected 2 dimensions, got 1"),
        ({"residual": random(5, 70).double()}, "residual: expected dtype Float, got Double"),
        ({"x": random(5, 36)}, "x: expected size 37 in dimension 1"),
        ({"x": random(37)}, "x: expected 2 dimensions, got 1"),
        ({"x": random(5, 37).double()}, "weight: expected dtype Double, got Float"),
        ({"bias": random(69)}, "bias: expected size 70"),
        ({"bias": random(70).half()}, "bias: expected dtype Float, got Half"),
        ({"weight": random(70, 37, 1)}, "weight: expected 2 dimensions, got 3"),
        ({"weight": random(70, 38), "x": random(5, 38)}, "plan: expected one for 70 rows of 38"),
        ({"plan": 10**12}, "plan: expected the number of a live plan, got 1000000000000"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str, plan: int) -> None:
    a = {"plan": plan, "weight": random(70, 37), **change}
    with pytest.raises(RuntimeError, match=f"planned_linear: {message}"):
        linear(**a)
    grad, x = random(5, 70), random(5, 37)
    for bad_grad, bad_x in ((random(4, 70), x), (random(70), x), (grad.half(), x), (grad, grad)):
        with pytest.raises(RuntimeError, match=r"planned_linear_weight_grad: .*expected"):
            OPS.planned_linear_weight_grad(bad_grad, bad_x, plan)


def test_threads_share_a_plan(plan: int) -> None:
    weight = random(70, 37).bfloat16()
    expected = {form: (fp._C.set_cuda_form(form), linear(plan, weight))[1] for form in FORMS}
    for form in FORMS:
        fp._C.set_cuda_form(form)
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda i: linear(plan, weight, i % 3 - 1), range(24)))
        assert all(same_bits(y, expected[form]) for y in results)


def test_python_takes_plans_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"planned_linear"}
    here = {"cpu": {"planned_linear", "planned_conv2d"}, "cuda": kernels}
    monkeypatch.setattr(plans, "has_kernel", lambda op, device: op in here.get(device, ()))
    pattern = fp.pack(mask())

    def weight(device: str, dims: int) -> Any:

        fake = SimpleNamespace(device=torch.device(device), dim=lambda: dims)
        monkeypatch.setattr(plans, "type", lambda t: Tensor, raising=False)
        return fake

    assert plans.planned(random(5, 37), weight("cuda", 2), pattern)
    assert not plans.planned(random(5, 37), weight("cuda", 4), pattern)
    assert not plans.planned(random(5, 37), weight("xpu", 2), pattern)
    kernels.clear()
    assert not plans.planned(random(5, 37), weight("cuda", 2), pattern)
    assert plans.planned(random(5, 37), weight("cpu", 2), pattern)


def test_python_passes_the_tf32_flag() -> None:
    on_gpu = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    half = SimpleNamespace(dtype=torch.float16, device=torch.device("cuda"))
    assert not plans.tf32(random(1))
    before = torch.get_float32_matmul_precision()
    try:
        for precision, wanted in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert plans.tf32(on_gpu) is wanted
            assert not plans.tf32(half)
        torch.set_float32_matmul_precision("highest")
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            assert plans.tf32(on_gpu)
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            assert not plans.tf32(on_gpu)
    finally:
        torch.set_float32_matmul_precision(before)
