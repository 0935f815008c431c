"""Equilibria on a GPU: the textbook loops' results, without a synchronisation, in a graph too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastprune.ops.backend import has_kernel
from fastprune.ops.mon_fourier import pack_blocks, solve_maps
from fastprune.ops.mon_operator import LinearOperator, LinearStructure, Settings, Solution
from fastprune.reference import mon_splitting as plain
from gpu import DEVICE, needs_cuda, needs_device, strict_products

__all__ = ["strict_products"]  # for every test here

pytestmark = [
    needs_device,
    pytest.mark.skipif(
        not has_kernel("mon_splitting", DEVICE.type), reason="a build without the kernels"
    ),
]

DTYPES = [torch.float32, torch.float64]


def layer(n: int, batch: int, density: float, dtype: torch.dtype) -> tuple[LinearOperator, Tensor]:
    """On the device, the values drawn on the CPU."""
    g = torch.Generator().manual_seed(n)
    masks = [torch.rand(n, n, generator=g) < density for _ in "AB"]
    scale = 0.5 / max(n * density, 1.0) ** 0.5
    a, b = ((m * torch.randn(n, n, generator=g) * scale).to(DEVICE, dtype) for m in masks)
    bias = torch.randn(batch, n, generator=g).to(DEVICE, dtype)
    kept = (None, None) if density == 1.0 else tuple(m.to(DEVICE) for m in masks)
    return LinearOperator(a, b, 0.6, n, bias, LinearStructure(n, True, True, *kept)), bias


def exact(operator: LinearOperator) -> plain.Operator:
    """The same layer on the CPU, in float64."""
    return plain.linear_operator(operator.w.cpu().double())


def agree(found: Solution, expected: plain.Solution, tol: float) -> None:
    """Equal counts, close values.

    A sample whose residual meets ``tol`` but for its rounding may stop a step later, or earlier.
    """
    count, right = found.iterations.cpu(), expected.iterations
    residual = torch.where(count < right, found.residual.cpu(), expected.residual)
    double = found.z.dtype == torch.float64
    at_tol = (residual > tol * (1 - (1e-8 if double else 1e-2))) & ((count - right).abs() == 1)
    same = count == right
    assert bool((same | at_tol).all()), f"{count.tolist()}, expected {right.tolist()}"
    assert float(same.double().mean()) > 0.9
    bound = 1e-11 if double else 2e-5
    for a, b in zip(found[:2], expected[:2], strict=True):
        error = (a.cpu().double() - b).abs().flatten(1).max(1).values
        assert float(error[same.expand(len(b))].max()) <= bound * float(b.abs().max()) + 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", ["fb", "pr"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("n", "batch", "density"),
    [
        (1, 1, 1.0),
        (33, 300, 1.0),
        (87, 128, 1.0),
        (128, 5, 1.0),
        (300, 129, 1.0),
        (87, 128, 0.03),
        (300, 129, 0.05),
        (300, 2, 0.05),
    ],
)
def test_fully_connected(
    n: int, batch: int, density: float, solver: str, per_sample: bool, dtype: torch.dtype
) -> None:
    operator, bias = layer(n, batch, density, dtype)
    settings = Settings("relu", solver, 0.3, 1e-3, 100, per_sample)
    found = operator.solve(bias, settings)
    expected = plain.solve(exact(operator), bias.cpu().double(), *settings)
    agree(found, expected, settings.tol)
    slope = (expected.out > 0).double()
    found = operator.adjoint(bias, slope.to(DEVICE, dtype), settings, True)
    expected = plain.adjoint(exact(operator), bias.cpu().double(), slope, *settings[1:])
    agree(found, expected, settings.tol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "softplus"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_nonlinearities(activation: str, alpha: float, dtype: torch.dtype) -> None:
    for n in (40, 140):
        operator, bias = layer(n, 6, 1.0, dtype)
        settings = Settings(activation, "pr", alpha, 1e-4, 80, False)
        expected = plain.solve(exact(operator), bias.cpu().double(), *settings)
        agree(operator.solve(bias, settings), expected, settings.tol)


def maps(
    batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype
) -> tuple[plain.Operator, Tensor, Tensor, Tensor]:
    """The exact operator, the bias, and the two packed matrices on the device."""
    g = torch.Generator().manual_seed(channels)
    a, b = (torch.randn(channels, channels, 3, 3, generator=g).double() for _ in range(2))
    one = torch.ones((), dtype=torch.float64)
    blocks = plain.conv_blocks(a / a.norm(), b / b.norm(), 1.0, one, one, size)
    inverse = torch.linalg.inv(2 * torch.eye(channels, dtype=blocks.dtype) - blocks)
    packed = [pack_blocks(m.to(DEVICE, dtype.to_complex()), size) for m in (blocks, inverse)]
    bias = torch.randn(batch, channels, *size, generator=g).double()
    operator = plain.conv_operator(a, b, 1.0, one, one, size)  # its ring is 1
    return operator, bias, packed[0], packed[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "size"),
    [(1, 1, (5, 7)), (2, 81, (30, 30)), (3, 130, (10, 9)), (2, 3, (66, 66)), (1, 2, (140, 130))],
)
def test_convolution(
    batch: int, channels: int, size: tuple[int, int], per_sample: bool, dtype: torch.dtype
) -> None:
    operator, bias, matrix, resolvent = maps(batch, channels, size, dtype)
    options = {"tol": 1e-3, "max_iter": 40, "per_sample": per_sample}
    found = solve_maps(bias.to(DEVICE, dtype), matrix, resolvent, ring=1, **options)
    agree(found, plain.solve(operator, bias, **options), 1e-3)
    found = solve_maps(bias.to(DEVICE, dtype), matrix, ring=1, alpha=0.3, **options)
    expected = plain.solve(operator, bias, solver="fb", alpha=0.3, **options)
    agree(found, expected, 1e-3)


def solves(dtype: torch.dtype, scale: float) -> list[Tensor]:
    """All that a solve returns, for each kind of kernel; nothing is waited for."""
    found: list[Tensor] = []
    for n, density in KINDS:
        operator, bias = CASES[n, density, dtype]
        for per_sample in (False, True):
            settings = Settings("relu", "pr", 1.0, 1e-3, 60, per_sample)
            found += operator.solve(bias * scale, settings)
    bias, matrix, resolvent = CONV[dtype]
    return [*found, *solve_maps(bias * scale, matrix, resolvent, ring=1)]


KINDS = ((87, 1.0), (150, 1.0), (150, 0.03), (400, 1.0), (400, 0.03))
CASES: dict[tuple[int, float, torch.dtype], tuple[LinearOperator, Tensor]] = {}
CONV: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}


def prepare(dtype: torch.dtype) -> None:
    """Operators with all that they keep."""
    for n, density in KINDS:
        CASES[n, density, dtype] = layer(n, 20, density, dtype)
    _, bias, matrix, resolvent = maps(5, 7, (12, 10), dtype)
    CONV[dtype] = bias.to(DEVICE, dtype), matrix, resolvent
    solves(dtype, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_again(dtype: torch.dtype) -> None:
    prepare(dtype)
    first, second = solves(dtype, 1.0), solves(dtype, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_cuda
def test_nothing_is_waited_for() -> None:
    prepare(torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        solves(torch.float32, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_in_a_graph() -> None:
    """Of other numbers of iterations than when it was captured."""
    prepare(torch.float32)
    scale = torch.ones((), device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solves(torch.float32, scale)
    for value in (1.0, 1e-5):
        scale.fill_(value)
        graph.replay()
        for a, b in zip(found, solves(torch.float32, value), strict=True):
            assert torch.equal(a, b)
