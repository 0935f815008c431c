"""The linear products of a plan on a GPU, by emulation: every form and dtype, off-tile shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
import fastprune as fp
from layouts import same_bits
from oracle import assert_within, guarded, integers, linear_exact

pytestmark = emulated.needs_emulation

OPS = emulated.ops
HALF = (torch.bfloat16, torch.float16)
# Forms, the dtypes that they serve and the batches up to which they do.
FORMS = {
    "deltas": ((torch.float32, *HALF), 32),
    "bitmap": (HALF, 8),
    "tensor_core": (HALF, 128),
    "dense": ((torch.float32, torch.float64, *HALF), 1 << 30),
}


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    yield
    fp._C.set_cuda_form("auto")
    emulated.configure(0)


class Weight:
    """A masked weight and its plan."""

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        self.weight, self.mask, self.pattern = weight, mask, fp.pack(mask)
        p = self.pattern
        self.plan = OPS.make_plan(
            *p[:4],
            [*mask.shape[:1], 1, *mask.shape[1:], 1, p.block_depth, p.transposed_block_depth],
        )

    def __del__(self) -> None:
        fp._C.release_plan(self.plan)

    def product(self, x: Tensor, bias: Tensor | None = None, **kw: object) -> Tensor:
        a = {"version": -1, "residual": None, "relu": False, "layout": 0, "tf32": False, **kw}
        return OPS.planned_linear(x, self.weight, bias, self.plan, *a.values())

    def input_grad(self, grad: Tensor, version: int = -1, tf32: bool = False) -> Tensor:
        return OPS.planned_linear_input_grad(grad, self.weight, self.plan, version, tf32)


def random_weight(
    rows: int, cols: int, density: float, dtype: torch.dtype, seed: int, power: float = 0
) -> Weight:
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, 1, generator=g) ** power
    mask = torch.rand(rows, cols, generator=g) < density * keep
    return Weight(torch.randn(rows, cols, generator=g).to(dtype), mask)


def check_forward(w: Weight, x: Tensor, bias: Tensor | None, what: str, **kw: object) -> Tensor:
    y = w.product(x, bias, **kw)
    assert_within(y, *linear_exact(x, w.weight, w.mask, bias), what)
    return y


def check_backward(w: Weight, grad: Tensor, what: str) -> Tensor:
    dx = w.input_grad(grad)
    assert_within(dx, *linear_exact(grad, w.weight.t(), w.mask.t(), None), what)
    return dx


@settings(max_examples=60)
@given(
    form=st.sampled_from(sorted(FORMS)),
    rows=st.sampled_from([1, 2, 7, 16, 17, 31, 64, 127, 129, 200]),
    cols=st.sampled_from([1, 3, 8, 15, 16, 63, 64, 65, 100, 131, 520]),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0]),
    power=st.sampled_from([0, 1, 6]),
    batch=st.sampled_from([1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 64, 65]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_within_the_bounds(
    form: str,
    rows: int,
    cols: int,
    density: float,
    power: int,
    batch: int,
    seed: int,
    data: st.DataObject,
) -> None:
    dtypes, most = FORMS[form]
    dtype, batch = data.draw(st.sampled_from(dtypes)), min(batch, most)
    what = f"{form} {rows} {cols} {density} {power} {batch} {dtype} {seed}"
    w = random_weight(rows, cols, density, dtype, seed, power)
    g = torch.Generator().manual_seed(seed + 1)
    x = guarded(torch.randn(batch, cols, generator=g).to(dtype))
    bias = guarded(torch.randn(rows, generator=g).to(dtype)) if seed % 2 else None
    fp._C.set_cuda_form(form)
    emulated.configure(seed % 3)
    check_forward(w, x, bias, what)
    check_backward(w, guarded(torch.randn(batch, rows, generator=g).to(dtype)), what)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_same_bits_in_any_order_and_on_any_gpu(form: str) -> None:
    dtypes, most = FORMS[form]
    fp._C.set_cuda_form(form)
    for dtype, (rows, cols), batch in itertools.product(
        dtypes, [(150, 1200), (40, 4500)], {1, min(most, 11)}
    ):
        x = torch.randn(batch, cols).to(dtype)
        results = []
        for seed, count in [(0, 4), (1, 4), (2, 4), (1, 1), (2, 3), (0, 7)]:
            emulated.configure(seed, count)
            w = random_weight(rows, cols, 0.3, dtype, 5, 2)  # groups of rows depend on the GPU
            results.append(w.product(x))
        assert_within(results[0], *linear_exact(x, w.weight, w.mask, None), f"{form} {dtype}")
        for other in results[1:]:
            assert same_bits(results[0], other), f"{form} {dtype} {rows} {batch}"


@pytest.mark.parametrize("form", sorted(FORMS))
def test_integers_are_exact(form: str) -> None:
    dtypes, most = FORMS[form]
    g = torch.Generator().manual_seed(0)
    fp._C.set_cuda_form(form)
    for dtype in dtypes:
        mask = torch.rand(70, 150, generator=g) < 0.4
        w = Weight(integers((70, 150), dtype, g), mask)
        x = integers((min(most, 19), 150), dtype, g)
        expected = x.double() @ torch.where(mask, w.weight, 0).double().t()
        assert same_bits(w.product(x), expected.to(dtype)), dtype


@pytest.mark.parametrize("form", sorted(FORMS))
def test_absent_weights_are_absent(form: str) -> None:
    dtypes, most = FORMS[form]
    fp._C.set_cuda_form(form)
    nan, inf = float("nan"), float("inf")
    for dtype, seed in itertools.product(dtypes, (0, 1, 2)):
        emulated.configure(seed)
        g = torch.Generator().manual_seed(seed)
        rows, cols, batch = 37, (150, 160, 152)[seed], min(most, 11)
        mask = torch.rand(rows, cols, generator=g) < 0.5
        mask[:, 70] = False
        mask[3] = False
        weight = torch.randn(rows, cols, generator=g).to(dtype)
        weight[~mask] = nan
        w = Weight(weight, mask)
        x, grad = torch.randn(batch, cols, generator=g), torch.randn(batch, rows, generator=g)
        x[2 % batch, 70], x[-1, 70], grad[0, 3], grad[-1, 3] = nan, inf, -inf, nan
        x, grad = x.to(dtype), grad.to(dtype)
        clean = x.clone()
        clean[:, 70] = 0
        y = w.product(x)
        assert_within(y, *linear_exact(clean, weight, mask, None), f"{form} {dtype} {seed}")
        clean = grad.clone()
        clean[:, 3] = 0
        dx = w.input_grad(grad)
        assert_within(dx, *linear_exact(clean, weight.t(), mask.t(), None), f"{form} {dtype} dx")
        # Present ones carry what is not finite.
        x[-1, 5], weight[4, 5], mask[4, 5] = inf, 1, True
        w = Weight(weight, mask)
        y, kept = w.product(x), mask[:, 5]
        assert (~y[-1, kept].isfinite()).all()
        assert y[-1, ~kept].isfinite().all()
        assert y[:-1].isfinite().all() or batch == 1


@pytest.mark.parametrize("form", sorted(FORMS))
def test_fused_is_what_the_layers_give_one_by_one(form: str) -> None:
    dtypes, most = FORMS[form]
    fp._C.set_cuda_form(form)
    for dtype in dtypes:
        w = random_weight(45, 70, 0.4, dtype, 1)
        batch = min(most, 10)
        x = torch.randn(batch, 70).to(dtype)
        x[0, 0] = float("nan")
        bias, added = torch.randn(45).to(dtype), torch.randn(batch, 45).to(dtype)
        plain = w.product(x, bias)
        assert plain.isnan().any() or not w.mask[:, 0].any()
        added[-1, :4] = -plain[-1, :4]
        for residual, relu in itertools.product((None, added, added.t().contiguous().t()), (0, 1)):
            wanted = plain if residual is None else plain + residual
            wanted = torch.relu(wanted) if relu else wanted
            got = w.product(x, bias, residual=residual, relu=bool(relu))
            assert got.is_contiguous()
            assert torch.equal(got.isnan(), wanted.isnan())
            assert torch.equal(got.nan_to_num(), wanted.nan_to_num()), f"{dtype} {relu}"


@pytest.mark.parametrize("form", sorted(FORMS))
def test_strides_and_offsets(form: str) -> None:
    dtypes, most = FORMS[form]
    fp._C.set_cuda_form(form)
    for dtype in dtypes:
        w = random_weight(33, 64, 0.4, dtype, 2)
        batch = min(most, 9)
        wide = torch.randn(batch, 130).to(dtype)
        for x in (
            wide[:, 1:65],  # not aligned, strided
            wide.flatten()[1 : 1 + 64 * batch].view(batch, 64),  # contiguous, not aligned
            wide.t()[:64].t(),
            wide[:1, :64].expand(batch, 64),
        ):
            check_forward(w, x, None, f"{form} {dtype}")
        w.weight = w.weight.t().contiguous().t()
        check_forward(w, wide[:, :64], None, f"{form} {dtype}")
        check_backward(w, wide[:, :33], f"{form} {dtype}")


@pytest.mark.parametrize("form", sorted(FORMS))
def test_empty_sizes(form: str) -> None:
    dtypes, _ = FORMS[form]
    fp._C.set_cuda_form(form)
    for rows, cols, batch in [(0, 5, 3), (5, 0, 3), (5, 4, 0), (0, 0, 2), (1, 1, 1)]:
        w = random_weight(rows, cols, 1.0, dtypes[0], 0)
        x, bias = torch.randn(batch, cols).to(dtypes[0]), torch.randn(rows).to(dtypes[0])
        check_forward(w, x, bias, f"{rows} {cols} {batch}")
        check_backward(w, torch.randn(batch, rows).to(dtypes[0]), f"{rows} {cols} {batch}")
        dw = OPS.planned_linear_weight_grad(torch.randn(batch, rows).to(dtypes[0]), x, w.plan)
        assert dw.shape == (rows, cols)
        assert dw.isfinite().all()


def test_one_dense_row_among_empty_ones() -> None:
    for form, cols in itertools.product(("deltas", "tensor_core"), (300, 9000)):
        fp._C.set_cuda_form(form)
        mask = torch.zeros(100, cols, dtype=torch.bool)
        mask[61] = True
        mask[99, -1] = True  # behind many skips
        w = Weight(torch.randn(100, cols).bfloat16(), mask)
        y = check_forward(w, torch.randn(2, cols).bfloat16(), None, form)
        assert y.count_nonzero() == 4


def test_gaps_of_every_length() -> None:
    fp._C.set_cuda_form("deltas")
    cols = 4096 + 1030
    mask = torch.zeros(1040, cols, dtype=torch.bool)
    for gap in range(1, 1030):  # from the row's start, and from the entry before
        mask[gap, [gap - 1, gap - 1 + gap, 4095 + gap]] = True
    g = torch.Generator().manual_seed(0)
    w = Weight(integers((1040, cols), torch.float32, g), mask)
    x = integers((3, cols), torch.float32, g)
    assert torch.equal(w.product(x), x @ torch.where(mask, w.weight, 0).t())


def test_tf32_is_used_only_where_allowed() -> None:
    g = torch.Generator().manual_seed(1)
    w = random_weight(50, 130, 0.5, torch.float32, 3)
    x = torch.randn(9, 130, generator=g)
    x[0, 3] = float("inf")
    w.weight[:, 3] = torch.where(w.mask[:, 3], w.weight[:, 3], float("nan"))
    fp._C.set_cuda_form("tensor_core")
    strict = w.product(x)
    rounded = w.product(x, tf32=True)
    finite = strict.isfinite()
    assert torch.equal(finite, rounded.isfinite())
    assert not finite.all()
    assert not torch.equal(strict, rounded)
    # Each factor is rounded to 11 bits.
    bound = 2.0**-9 * (x.abs().nan_to_num(0, 0) @ torch.where(w.mask, w.weight.abs(), 0).t())
    assert ((strict - rounded)[finite].abs() <= bound[finite]).all()
    y, s, n = linear_exact(x[1:], w.weight, w.mask, None)
    assert_within(strict[1:], y, s, n, "strict")
    grad = torch.randn(9, 50, generator=g)
    dx = w.input_grad(grad, tf32=True)
    present = torch.where(w.mask, w.weight, 0)
    exact = grad @ present
    assert not torch.equal(dx, exact)
    assert ((dx - exact).abs() <= 2.0**-9 * (grad.abs() @ present.abs())).all()


def test_weight_gradient() -> None:
    for dtype in (torch.float32, torch.float64):
        w = random_weight(33, 47, 0.3, dtype, 4)
        x, grad = torch.randn(6, 47).to(dtype), torch.randn(6, 33).to(dtype)
        x[:, 5] = float("inf")
        w = Weight(w.weight, w.mask & (torch.arange(47) != 5))
        dw = OPS.planned_linear_weight_grad(grad, x, w.plan)
        expected = torch.where(w.mask, grad.t() @ x, 0)
        torch.testing.assert_close(dw, expected)
        assert torch.equal(dw != 0, w.mask)


def test_forms_that_cannot_serve_fall_back() -> None:
    w = random_weight(40, 50, 0.2, torch.float32, 6)
    for form, batch in [("deltas", 64), ("bitmap", 9), ("tensor_core", 200), ("tensor_core", 3)]:
        fp._C.set_cuda_form(form)
        check_forward(w, torch.randn(batch, 50), None, form)
    with pytest.raises(ValueError, match=r"form: expected 'auto'.*got 'fast'"):
        fp._C.set_cuda_form("fast")
    fp._C.set_cuda_form("panel")
    check_forward(w, torch.randn(5, 50), None, "panel")
    fp._C.set_cuda_form("auto")
    for dtype, batch, density in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16), (1, 5, 30, 100), (0.03, 0.4, 0.9)
    ):
        w = random_weight(40, 50, density, dtype, 6)
        check_forward(w, torch.randn(batch, 50).to(dtype), None, f"{dtype} {batch} {density}")
