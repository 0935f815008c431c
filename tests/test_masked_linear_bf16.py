"""Linear products by bitmaps (few batch entries; 16 bit and float32) and pairs (bfloat16)."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from conftest import runnable_isas
from oracle import assert_within, guarded, integers, linear_exact, wide
from test_masked_linear import pick, random_mask, strided

OPS = torch.ops.fastprune
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
ROWS = [1, 2, 15, 16, 17, 31, 33, 47, 63, 64, 65, 129, 150]
COLS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 97, 127, 128, 129, 255, 257]
WIDE = [511, 512, 513, 1023, 1024, 1025, 1100]  # more than one block of pairs
CASES = 120  # of each dtype, ISA and shard
pairs_only = pytest.mark.skipif(
    "avx512_bf16" not in runnable_isas(), reason="needs AVX-512 with BF16"
)


def case(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None, str]:
    """x, weight, mask and bias; the weight is NaN where it is absent."""
    g = torch.Generator().manual_seed(seed)
    out, batch = pick(ROWS, g), int(torch.randint(0, 41, (), generator=g))
    cols = pick(WIDE if seed % 8 == 0 else COLS, g)
    mask = random_mask((out, cols), g)
    if seed % 3 == 0:  # any sparsity, evenly
        mask = torch.rand(out, cols, generator=g) < torch.rand((), generator=g)
    x = torch.randn(batch, cols, generator=g).to(dtype)
    weight = torch.randn(out, cols, generator=g).to(dtype)
    weight = torch.where(mask, weight, torch.tensor(float("nan"), dtype=dtype))
    bias = torch.randn(out, generator=g).to(dtype) if seed % 2 else None
    what = f"seed={seed} dtype={dtype} out={out} in={cols} batch={batch} nnz={int(mask.sum())}"
    return x, weight, mask, bias, what


def input_grad(grad: Tensor, weight: Tensor, pattern: fp.Pattern) -> Tensor:
    result: Tensor = OPS.planned_linear_input_grad(
        grad, weight, pattern.plan.number(pattern), pattern.plan.version(weight)
    )
    return result


@pytest.mark.parametrize("shard", range(2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_cases(isa: str, dtype: torch.dtype, shard: int) -> None:
    for seed in range(shard * CASES, (shard + 1) * CASES):
        x, weight, mask, bias, what = case(seed, dtype)
        what = f"isa={isa} {what}"
        g = torch.Generator().manual_seed(seed)
        pattern = fp.pack(mask)
        y = fp.masked_linear(strided(x, g), strided(weight, g), pattern, bias)
        assert_within(y, *linear_exact(x, weight, mask, bias), f"{what} forward")
        grad = torch.randn(y.shape, generator=g).to(dtype)
        w = wide(torch.where(mask, weight, 0))
        x_grad = input_grad(strided(grad, g), weight, pattern)
        n = np.broadcast_to(mask.sum(0).numpy(), x_grad.shape)
        assert_within(x_grad, wide(grad) @ w, np.abs(wide(grad)) @ np.abs(w), n, f"{what} grad")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(isa: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for density in (0.1, 0.5, 1.0):
        mask = torch.rand(70, 28, generator=g) < density
        weight, pattern = integers((70, 28), dtype, g), fp.pack(mask)
        for batch in range(1, 41):
            x, grad = integers((batch, 28), dtype, g), integers((batch, 70), dtype, g)
            y = fp.masked_linear(x, weight, pattern)
            exact = fp.reference.masked_linear(x.double(), weight.double(), mask)
            assert torch.equal(y, exact.to(dtype)), (density, batch)
            dx = input_grad(grad, weight, pattern).double()
            assert torch.equal(dx, (grad.double() @ (weight * mask).double()).to(dtype).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_thread_count_and_run(
    isa: str, threads: None, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(1)
    for density in (0.07, 0.6):
        mask = torch.rand(300, 530, generator=g) < density
        mask[:64] = False  # threads get parts of different lengths
        w, pattern = torch.randn(300, 530, generator=g).to(dtype), fp.pack(mask)
        for batch in (1, 5, 8, 16, 17, 33, 70):
            x = torch.randn(batch, 530, generator=g).to(dtype)
            grad = torch.randn(batch, 300, generator=g).to(dtype)
            results = []
            for count in (1, 2, 3, 7, 1):
                torch.set_num_threads(count)
                results.append((fp.masked_linear(x, w, pattern), input_grad(grad, w, pattern)))
            for y, dx in results[1:]:
                assert torch.equal(y, results[0][0]), f"isa={isa} {density} {batch}"
                assert torch.equal(dx, results[0][1]), f"isa={isa} {density} {batch}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_reach_only_the_rows_that_read_them(
    isa: str, dtype: torch.dtype, bad: float
) -> None:
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        mask = torch.rand(67, 45, generator=g) < 0.5
        mask[5], mask[6] = False, True
        mask[:, 7] = False  # nobody reads column 7
        weight = torch.rand(67, 45, generator=g).add(0.5).to(dtype)
        pattern = fp.pack(mask)
        for batch in (1, 2, 8, 9, 16, 17, 40):
            x = torch.randn(batch, 45, generator=g).to(dtype)
            exact = linear_exact(x, weight, mask, None)
            x[:, 7] = bad
            what = f"isa={isa} seed={seed} batch={batch}"
            assert_within(fp.masked_linear(x, weight, pattern), *exact, what)
            x[batch - 1, 3] = bad
            y = fp.masked_linear(x, weight, pattern)
            reads = torch.zeros(batch, 67, dtype=torch.bool)
            reads[batch - 1] = mask[:, 3]
            assert torch.equal(~y.isfinite(), reads), what
            assert torch.equal(y[reads], torch.full_like(y[reads], bad)) or y[reads].isnan().all()
            grad = torch.randn(batch, 67, generator=g).to(dtype)
            grad[0, 5] = bad  # the row of no weights
            assert input_grad(grad, weight, pattern).isfinite().all(), what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_not_finite(isa: str, dtype: torch.dtype) -> None:
    mask = torch.rand(40, 64, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[3, 5] = mask[9, 8] = True
    weight = torch.ones(40, 64, dtype=dtype)
    weight[3, 5], weight[9, 8] = float("inf"), float("nan")
    pattern = fp.pack(mask)
    for batch in (1, 8, 16, 32):
        y = fp.masked_linear(torch.ones(batch, 64, dtype=dtype), weight, pattern)
        assert torch.isinf(y[:, 3]).all()
        assert torch.isnan(y[:, 9]).all()
        assert int(y.isfinite().sum()) == batch * 38


@pytest.mark.parametrize("seed", range(6))
def test_tiny_products_are_not_flushed(isa: str, seed: int) -> None:
    """The bound leaves no room for a subnormal input or sum that is taken for zero."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(40, 50, generator=g) < 0.6
    cases = [
        (2.0**-128, 2.0**100),  # subnormal activations
        (2.0**100, 2.0**-130),  # subnormal weights
        (2.0**-70, 2.0**-60),  # subnormal products
        (2.0**-63, 2.0**-62),  # subnormal sums on the way
        (2.0**-56, 2.0**-56),
        (2.0**-48, 2.0**-48),
    ]
    for a, b in cases:
        x = (torch.randn(33, 50, generator=g) * a).bfloat16()
        weight = (torch.randn(40, 50, generator=g) * b).bfloat16()
        pattern = fp.pack(mask)
        for batch in (1, 8, 16, 33):
            y = fp.masked_linear(x[:batch], weight, pattern)
            what = f"isa={isa} seed={seed} {a} {b} batch={batch}"
            assert_within(y, *linear_exact(x[:batch], weight, mask, None), what)


CHANGES: dict[str, Any] = {
    "in place": lambda m: m.weight.detach().mul_(1.5),
    "data": lambda m: m.weight.data.neg_(),
    "data replaced": lambda m: setattr(m.weight, "data", m.weight.data * 3),
    "one entry": lambda m: (
        m.weight.detach().view(-1)[int(m.weight_mask.view(-1).nonzero()[4])].add_(8.0)
    ),
    "new": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() + 1)),
    "other dtype and back": lambda m: (m.float(), m(torch.ones(2, 50)), m.bfloat16()),
    "load": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_changed_weights_are_seen(isa: str, change: str) -> None:
    torch.manual_seed(3)
    mask = torch.rand(70, 50) < 0.5
    layer = fp.nn.MaskedLinear(nn.Linear(50, 70, bias=False), mask).bfloat16()
    batches = (1, 3, 16, 32)

    def check(what: str) -> None:
        for batch in batches:
            x = torch.randn(batch, 50).bfloat16().requires_grad_()
            y = layer(x)
            assert_within(y, *linear_exact(x, layer.weight, mask, None), f"{isa} {what} {batch}")
            grad = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, x, grad)
            w = wide(torch.where(mask, layer.weight, 0))
            n = np.broadcast_to(mask.sum(0).numpy(), dx.shape)
            bound = np.abs(wide(grad)) @ np.abs(w)
            assert_within(dx, wide(grad) @ w, bound, n, f"{isa} {what} {batch} grad")

    check("before")
    for turn in range(3):
        CHANGES[change](layer)
        check(f"{change} {turn}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_and_relu_are_those_of_separate_layers(isa: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    for out, cols, density in [(70, 130, 0.6), (17, 33, 0.9), (129, 64, 0.05)]:
        weight = torch.randn(out, cols, generator=g).to(dtype)
        bias = torch.randn(out, generator=g).to(dtype)
        pattern = fp.pack(torch.rand(out, cols, generator=g) < density)
        number = pattern.plan.number(pattern)
        for batch in (1, 2, 7, 8, 13, 16, 20, 32, 35):
            x = torch.randn(batch, cols, generator=g).to(dtype)
            added = torch.randn(batch, out, generator=g).to(dtype)
            plain = OPS.planned_linear(x, weight, bias, number, -1, None, False, 0)
            for source in (x, x.t().contiguous().t()):
                for layout in (0, 1, 2):
                    for residual in (None, added, added.t().contiguous().t()):
                        for relu in (False, True):
                            y = OPS.planned_linear(
                                source, weight, bias, number, -1, residual, relu, layout
                            )
                            wanted = plain if residual is None else plain + residual
                            wanted = wanted.relu() if relu else wanted
                            assert torch.equal(y, wanted), (out, batch, layout, relu)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_nothing_outside_its_buffers(isa: str, dtype: torch.dtype, at_end: bool) -> None:
    g = torch.Generator().manual_seed(6)
    for out, cols in [(1, 1), (17, 33), (16, 64), (65, 130), (3, 515)]:
        for density in (0.1, 0.9):
            pattern = fp.pack(torch.rand(out, cols, generator=g) < density)
            w = guarded(torch.randn(out, cols, generator=g).to(dtype), at_end)
            for batch in (1, 3, 8, 11, 16, 31, 32, 33):
                x = guarded(torch.randn(batch, cols, generator=g).to(dtype), at_end)
                grad = guarded(torch.randn(batch, out, generator=g).to(dtype), at_end)
                fp.masked_linear(x, w, pattern)
                fp.masked_linear(x.t().contiguous().t(), w, pattern)
                input_grad(grad, w, pattern)


@pairs_only
def test_forms_are_made_when_needed_and_counted() -> None:
    mask = torch.rand(256, 256, generator=torch.Generator().manual_seed(7)) < 0.5
    w, x = torch.randn(256, 256).bfloat16(), torch.randn(64, 256).bfloat16()
    pattern = fp.pack(mask)
    sizes = [pattern.plan.nbytes()]
    spoilt = x.clone()
    spoilt[0, 0] = 2.0**-130  # subnormal: values in the pattern's order are read
    for call in (
        lambda: pattern.plan.number(pattern),
        lambda: fp.masked_linear(x[:1], w, pattern),
        lambda: fp.masked_linear(x, w, pattern),
        lambda: input_grad(x, w, pattern),
        lambda: fp.masked_linear(spoilt, w, pattern),
    ):
        call()
        sizes.append(pattern.plan.nbytes())
        call()  # again: nothing more
        assert pattern.plan.nbytes() == sizes[-1]
    made = [b - a for a, b in itertools.pairwise(sizes)]
    nnz = pattern.nnz
    assert made[1] == 2 * nnz + 256 * 256 // 8 + 17 * 8
    assert made[2] >= 4 * nnz
    assert made[3] >= 4 * nnz
    assert made[4] == 4 * nnz
    before = pattern.plan.nbytes()
    w.mul_(2)
    fp.masked_linear(x[:1], w, pattern)
    assert pattern.plan.nbytes() < before  # the others' values were of the old weight


def test_threads_share_a_plan() -> None:
    g = torch.Generator().manual_seed(8)
    mask = torch.rand(130, 200, generator=g) < 0.5
    weights = [torch.randn(130, 200, generator=g).bfloat16() for _ in range(2)]
    xs = [torch.randn(batch, 200, generator=g).bfloat16() for batch in (1, 6, 16, 32, 70)]
    jobs = [(x, w) for x in xs for w in weights]
    alone = [fp.masked_linear(x, w, fp.pack(mask)) for x, w in jobs]
    pattern = fp.pack(mask)

    def run(i: int) -> bool:
        x, w = jobs[i % len(jobs)]
        return torch.equal(fp.masked_linear(x, w, pattern), alone[i % len(jobs)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(400)))
