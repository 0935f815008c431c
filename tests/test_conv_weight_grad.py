"""The whole weight gradient with the batch innermost, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune.ops import layout

Case = tuple[int, int, int, int, int, int, int, tuple[int, ...]]


def exact(grad: Tensor, x: Tensor, sizes: tuple[int, ...], geometry: tuple[object, ...]) -> Tensor:
    *rest, groups = geometry
    return torch.ops.aten.convolution_backward(
        grad, x, x.new_zeros(sizes), None, *rest, False, [0, 0], groups, [False, True, False]
    )[1]


def tensors(
    n: int, groups: int, sizes: tuple[int, ...], hw: tuple[int, int], geometry: tuple[object, ...]
) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, sizes[1] * groups, *hw, dtype=torch.float64)
    y = torch.nn.functional.conv2d(x, x.new_zeros(sizes), None, *geometry)
    return torch.randn_like(y), x


def check(
    dtype: torch.dtype,
    n: int,
    groups: int,
    sizes: tuple[int, ...],
    hw: tuple[int, int],
    geometry: tuple[object, ...],
) -> None:
    grad, x = (t.to(dtype) for t in tensors(n, groups, sizes, hw, geometry))
    got = torch.ops.fastprune.conv_weight_grad(
        layout.batch_last(grad), layout.batch_last(x), sizes, *geometry
    )
    gd, xd = grad.double(), x.double()
    error = (got.double() - exact(gd, xd, sizes, geometry)).abs()
    terms = exact(gd.abs(), xd.abs(), sizes, geometry)
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    count = grad.shape[0] * grad.shape[2] * grad.shape[3]
    slack = 0.0 if dtype == torch.float32 else 4 * count * 2.0**-53  # torch's own rounding
    assert (error <= ((count + 2) * unit + slack) * terms + 1e-300).all()


@given(st.data())
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_cases(isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    room = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 14))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    rows, depth = draw(st.integers(1, 19)), draw(st.integers(1, 19))
    n = draw(st.sampled_from([1, 2, 5, 16, 33]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    sizes = (rows * groups, depth, *kernel)
    check(dtype, n, groups, sizes, (room[0], room[1]), (stride, padding, dilation, groups))


def test_a_batch_larger_than_a_chunk(isa: str) -> None:
    torch.manual_seed(0)
    check(torch.float32, 2500, 1, (5, 3, 3, 3), (4, 3), ((1, 1), (1, 1), (1, 1), 1))


def test_integers_are_exact(isa: str) -> None:
    torch.manual_seed(0)
    geometry = ((2, 1), (1, 2), (1, 1), 1)
    grad, x = tensors(16, 1, (9, 6, 3, 3), (13, 9), geometry)
    grad, x = (t.mul(3).round().float() for t in (grad, x))
    got = torch.ops.fastprune.conv_weight_grad(
        layout.batch_last(grad), layout.batch_last(x), (9, 6, 3, 3), *geometry
    )
    assert torch.equal(got.double(), exact(grad.double(), x.double(), (9, 6, 3, 3), geometry))


def test_infinities_stay_where_they_are(isa: str) -> None:
    """Padding and the places that no tap reaches meet no gradient."""
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    grad, x = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    grad[0, 0, 0, 0] = float("inf")
    got = torch.ops.fastprune.conv_weight_grad(
        layout.batch_last(grad), layout.batch_last(x), (1, 1, 3, 3), *geometry
    )[0, 0]
    reached = torch.zeros(3, 3, dtype=torch.bool)
    reached[1:, 1:] = True
    assert (got[reached] == float("inf")).all()
    assert (got[~reached] == 0).all()


def test_the_same_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(0)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    grad, x = tensors(19, 1, (40, 24, 3, 3), (9, 11), geometry)
    arguments = (layout.batch_last(grad.float()), layout.batch_last(x.float()), (40, 24, 3, 3))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 32):
            torch.set_num_threads(count)
            results.append(torch.ops.fastprune.conv_weight_grad(*arguments, *geometry))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_either_layout_and_nothing() -> None:
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    grad, x = tensors(4, 1, (3, 2, 1, 1), (5, 4), geometry)
    op = torch.ops.fastprune.conv_weight_grad
    expected = exact(grad, x, (3, 2, 1, 1), geometry)
    for g, y in ((grad, x), (layout.batch_last(grad), x), (grad, layout.batch_last(x))):
        torch.testing.assert_close(op(g, y, (3, 2, 1, 1), *geometry), expected)
    empty = op(grad[:0], x[:0], (3, 2, 1, 1), *geometry)
    assert torch.equal(empty, torch.zeros(3, 2, 1, 1, dtype=torch.float64))
    torch.library.opcheck(op, (grad, x, (3, 2, 1, 1), *geometry))


def test_errors_name_the_argument() -> None:
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    grad, x = tensors(4, 1, (3, 2, 1, 1), (5, 4), geometry)
    op = torch.ops.fastprune.conv_weight_grad
    with pytest.raises(RuntimeError, match="conv_weight_grad: grad: expected size 3 in dim"):
        op(grad[:, :2], x, (3, 2, 1, 1), *geometry)
    with pytest.raises(RuntimeError, match="conv_weight_grad: x: expected 6 channels, got 2"):
        op(grad, x, (3, 6, 1, 1), *geometry)
    with pytest.raises(RuntimeError, match="conv_weight_grad: x: expected float32 or float64"):
        op(grad.half(), x.half(), (3, 2, 1, 1), *geometry)
