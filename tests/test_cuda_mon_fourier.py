"""Equilibria of convolutional layers on the GPU, by emulation: the textbook loops' results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
from fastprune.reference import mon_splitting as plain
from oracle import guarded
from test_mon_fourier import SIZES, Case, make

pytestmark = emulated.needs_emulation

Options = dict[str, object]


def pack(blocks: Tensor, case: Case, dtype: torch.dtype) -> Tensor:
    """W or the resolvent, as the kernels of a GPU read it."""
    real = torch.view_as_real(blocks.to(dtype.to_complex()).resolve_conj())
    return emulated.ops.mon_fourier_pack(guarded(real), *case.size)


def run(case: Case, dtype: torch.dtype, **how: object) -> plain.Solution:
    """By the kernels."""
    options: Options = {"tol": 1e-5, "max_iter": 50, "per_sample": False, **how}
    blocks = case.blocks if case.slope is None else case.blocks.mH
    eye = torch.eye(blocks.shape[1], dtype=blocks.dtype)
    inverse = torch.linalg.inv((1 + case.alpha) * eye - case.alpha * blocks)
    return plain.Solution(
        *emulated.ops.mon_splitting_fourier(
            guarded(case.bias.to(dtype)),
            None if case.slope is None else guarded(case.slope.to(dtype)),
            guarded(pack(blocks, case, dtype)),
            guarded(pack(inverse, case, dtype)) if case.solver == "pr" else None,
            case.ring,
            case.activation,
            case.alpha,
            options["tol"],
            options["max_iter"],
            options["per_sample"],
        )
    )


def agree(case: Case, dtype: torch.dtype = torch.float64, **how: object) -> plain.Solution:
    """Counts are equal, values close, and the ring is zero."""
    found, expected = run(case, dtype, **how), case.exact(**how)
    assert found.iterations.tolist() == expected.iterations.tolist()
    close = 2e-5 if dtype == torch.float32 else 2e-13
    for name, a, b in zip(("out", "z"), found[:2], expected[:2], strict=True):
        assert a.dtype == dtype
        scale = max(1.0, float(b.abs().max()))
        assert float((a.double() - b).abs().max()) <= close * scale, name
        kept = plain.without_ring(torch.ones_like(b), case.ring)
        assert bool((a[kept == 0] == 0).all()), name
    # A difference of iterates: its error does not shrink with it.
    assert float((found.residual - expected.residual).abs().max()) <= close * 20
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int]) -> None:
    ring = 1 if min(size) > 2 else 0
    for seed, (solver, adjoint) in enumerate(
        [("pr", False), ("pr", True), ("fb", False), ("fb", True)]
    ):
        emulated.configure(seed, 4)
        alpha = 1.0 if solver == "pr" else 0.3
        case = make(2, 3, size, adjoint, ring=ring, solver=solver, alpha=alpha)
        agree(case, torch.float32 if seed % 2 else torch.float64, tol=0.0, max_iter=3)


@pytest.mark.parametrize("batch", [1, 4, 5, 17])
@pytest.mark.parametrize("channels", [1, 2, 19, 131])
def test_batches_and_channels(batch: int, channels: int) -> None:
    if batch * channels > 600:
        batch = 3
    emulated.configure(batch + channels, 4)
    agree(make(batch, channels, (3, 4), ring=0), torch.float32, tol=0.0, max_iter=2)
    agree(make(batch, channels, (3, 3), adjoint=True), tol=0.0, max_iter=2)


@pytest.mark.parametrize("activation", list(plain.ACTIVATIONS))
@pytest.mark.parametrize("alpha", [0.4, 1.0, 1.6])
def test_nonlinearities(activation: str, alpha: float) -> None:
    emulated.configure(1, 4)
    for dtype in (torch.float32, torch.float64):
        case = make(2, 2, (5, 4), activation=activation, alpha=alpha)
        agree(case, dtype, tol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 6),
    channels=st.integers(1, 5),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    adjoint=st.booleans(),
    solver=st.sampled_from(["fb", "pr"]),
    ring=st.integers(0, 2),
    tol=st.sampled_from([0.0, 1e-3, 0.1]),
    max_iter=st.integers(1, 12),
    per_sample=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_solve(
    batch: int,
    channels: int,
    size: tuple[int, int],
    adjoint: bool,
    solver: str,
    ring: int,
    tol: float,
    max_iter: int,
    per_sample: bool,
    seed: int,
) -> None:
    alpha = 1.0 if solver == "pr" else 0.3
    case = make(batch, channels, size, adjoint, seed, ring=ring, solver=solver, alpha=alpha)
    emulated.configure(seed, 1 + seed % 7)
    agree(case, tol=tol, max_iter=max_iter, per_sample=per_sample)


def test_each_sample_for_itself() -> None:
    for adjoint, solver in ((False, "pr"), (True, "pr"), (False, "fb"), (True, "fb")):
        alpha = 1.0 if solver == "pr" else 0.3
        case = make(6, 3, (5, 6), adjoint, solver=solver, alpha=alpha, activation="tanh")
        case.bias *= torch.logspace(-3, 2, 6, dtype=torch.float64)[:, None, None, None]
        emulated.configure(2, 4)
        found = agree(case, tol=1e-3, max_iter=40, per_sample=True)
        assert adjoint or len(set(found.iterations.tolist())) > 1


def test_same_bits_in_any_order() -> None:
    case = make(5, 4, (6, 7))
    results = []
    for seed, multiprocessors in ((0, 4), (1, 4), (2, 132)):
        emulated.configure(seed, multiprocessors)
        results.append(run(case, torch.float32, tol=1e-3))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_maps_beyond_shared_memory() -> None:
    """Four maps of 80 x 90 doubles and their frequencies do not fit; five tasks, two blocks."""
    emulated.configure(1, 1)
    case = make(1, 5, (80, 90))
    agree(case, tol=0.0, max_iter=2)


@pytest.mark.parametrize("per_sample", [False, True])
def test_what_is_not_finite_ends_the_solve(per_sample: bool) -> None:
    case = make(3, 2, (4, 5))
    case.bias[1, 0, 2, 2] = float("nan")
    emulated.configure(1, 4)
    found = run(case, torch.float64, per_sample=per_sample)
    at = int(found.iterations[1] if per_sample else found.iterations)
    assert at == 1
    assert not bool((found.residual[1] if per_sample else found.residual).isfinite())


def test_nothing_to_solve() -> None:
    for per_sample in (False, True):
        found = run(make(0, 2, (4, 5)), torch.float32, per_sample=per_sample)
        assert found.out.shape == found.z.shape == (0, 2, 4, 5)
        assert found.iterations.tolist() == ([] if per_sample else 1)


def test_bad_arguments_are_refused() -> None:
    case = make(2, 3, (4, 5))
    matrix = pack(case.blocks, case, torch.float32)
    bias = case.bias.float()
    good: list[object] = [bias, None, matrix, None, 1, "relu", 1.0, 1e-3, 9, False]
    bad: list[tuple[int, object, str]] = [
        (0, bias[0], "bias: expected 4 dimensions"),
        (0, bias.bfloat16(), "bias: expected float32 or float64"),
        (0, bias[:, :0], "bias: expected at least one channel"),
        (1, bias[:1], "slope: expected size 2"),
        (2, matrix[:-1], "matrix: expected size"),
        (2, matrix.double(), "matrix: expected dtype"),
        (3, matrix[:, 1:], "resolvent: expected size"),
        (4, -1, "ring: expected"),
        (5, "gelu", "activation: expected"),
        (6, 0.0, "alpha: expected"),
        (7, -1.0, "tol: expected"),
        (8, 0, "max_iter: expected"),
    ]
    emulated.configure(0, 4)
    for at, value, message in bad:
        with pytest.raises(RuntimeError, match=f"mon_splitting_fourier: {message}"):
            emulated.ops.mon_splitting_fourier(*good[:at], value, *good[at + 1 :])
    with pytest.raises(RuntimeError, match="mon_fourier_pack: matrix: expected size 12"):
        emulated.ops.mon_fourier_pack(torch.zeros(11, 3, 3, 2), 4, 5)


def test_adjoint_blocks_are_packed_as_on_the_cpu() -> None:
    g = torch.Generator().manual_seed(3)
    for height, width in ((4, 5), (6, 6), (3, 1)):
        frequencies = height * (width // 2 + 1)
        real = torch.randn(frequencies, 3, 3, 2, generator=g)
        for adjoint in (False, True):
            got = emulated.ops.mon_fourier_pack(real, height, width, adjoint)
            blocks = torch.view_as_complex(real)
            blocks = blocks.mH.resolve_conj() if adjoint else blocks
            wanted = emulated.ops.mon_fourier_pack(
                torch.view_as_real(blocks.contiguous()), height, width
            )
            assert torch.equal(got, wanted)
