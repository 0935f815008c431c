"""The convolutional monotone solve in the Fourier domain, against the textbook loops in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune.ops.mon_fourier import pack_blocks, solve_maps
from fastprune.reference import mon_splitting as plain
from fastprune.reference.mon_splitting import Operator, Solution

ACTIVATIONS = ["relu", "tanh", "sigmoid", "softplus", "identity"]
SIZES = [(5, 7), (4, 9), (6, 1), (1, 8), (17, 31), (2, 2), (16, 12), (34, 26), (25, 27), (30, 29)]


@dataclass
class Case:
    """A network, what it is solved for, and how."""

    blocks: Tensor  # of W, complex128
    operator: Operator
    bias: Tensor
    slope: Tensor | None
    size: tuple[int, int]
    ring: int = 1
    activation: str = "relu"
    solver: str = "pr"
    alpha: float = 1.0

    def exact(self, **how: object) -> Solution:
        options = {"solver": self.solver, "alpha": self.alpha, **how}
        if self.slope is not None:
            return plain.adjoint(self.operator, self.bias, self.slope, **options)
        return plain.solve(self.operator, self.bias, self.activation, **options)

    def ours(self, dtype: torch.dtype, **how: object) -> Solution:
        blocks = self.blocks if self.slope is None else self.blocks.mH
        n = blocks.shape[1]
        eye = torch.eye(n, dtype=blocks.dtype)
        inverse = torch.linalg.inv((1 + self.alpha) * eye - self.alpha * blocks)
        kind = dtype.to_complex()
        return solve_maps(
            self.bias.to(dtype),
            pack_blocks(blocks.to(kind), self.size),
            pack_blocks(inverse.to(kind), self.size) if self.solver == "pr" else None,
            None if self.slope is None else self.slope.to(dtype),
            self.ring,
            self.activation,
            self.alpha,
            **how,
        )


def make(
    batch: int,
    channels: int,
    size: tuple[int, int],
    adjoint: bool = False,
    seed: int = 0,
    **how: object,
) -> Case:
    torch.manual_seed(seed)
    a, b = (torch.randn(channels, channels, 3, 3, dtype=torch.float64) for _ in range(2))
    g, h = torch.tensor(1.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    case = Case(
        plain.conv_blocks(a / a.norm(), b / b.norm(), 1.0, g, h, size),
        plain.conv_operator(a, b, 1.0, g, h, size),
        torch.randn(batch, channels, *size, dtype=torch.float64),
        None,
        size,
        **how,
    )
    if adjoint:
        # Zeros as ReLU has them, and slopes between.
        draws = torch.rand(batch, channels, *size, dtype=torch.float64)
        case.slope = plain.without_ring(torch.where(draws < 0.3, 0.0, draws), case.ring)
    case.operator = case.operator._replace(ring=case.ring)
    return case


def agree(case: Case, dtype: torch.dtype = torch.float64, **how: object) -> Solution:
    """The same iterates after as many steps; then the rest follows."""
    got, want = case.ours(dtype, **how), case.exact(**how)
    assert torch.equal(got.iterations, want.iterations)
    close = 2e-6 if dtype == torch.float32 else 5e-15
    for ours, theirs in ((got.out, want.out), (got.z, want.z)):
        assert ours.dtype == dtype
        steps = int(want.iterations.max())
        scale = max(1.0, theirs.abs().max().item()) * (steps + 2)
        assert (ours.double() - theirs).abs().max().item() <= close * scale
        kept = plain.without_ring(torch.ones_like(theirs), case.ring)
        assert (ours[kept == 0] == 0).all()
    # A difference of iterates: its error does not shrink with it.
    assert (got.residual - want.residual).abs().max().item() <= close * 20
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(isa: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    ring = 1 if min(size) > 2 else 0
    for solver, adjoint in (("pr", False), ("pr", True), ("fb", False), ("fb", True)):
        alpha = 1.0 if solver == "pr" else 0.3
        case = make(3, 3, size, adjoint, ring=ring, solver=solver, alpha=alpha)
        agree(case, dtype, tol=0.0, max_iter=4)


@pytest.mark.parametrize("batch", [1, 7, 16, 17, 33])
@pytest.mark.parametrize("channels", [1, 2, 5, 16, 19])
def test_batches_and_channels(isa: str, batch: int, channels: int) -> None:
    for dtype in (torch.float32, torch.float64):
        agree(make(batch, channels, (6, 5)), dtype, tol=0.0, max_iter=3)
        agree(make(batch, channels, (6, 5), adjoint=True), dtype, tol=0.0, max_iter=3)


@pytest.mark.parametrize("solver", ["pr", "fb"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, activation: str, solver: str) -> None:
    for alpha in (0.4, 1.0, 1.6) if solver == "pr" else (0.4,):
        case = make(5, 4, (7, 6), activation=activation, solver=solver, alpha=alpha)
        case.bias *= 3
        agree(case, tol=0.0, max_iter=6)
        agree(case, torch.float32, tol=0.0, max_iter=6)


@pytest.mark.parametrize("ring", [2, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (9, 2), (5, 3), (4, 4)], ids=str)
def test_maps_without_an_inside(isa: str, size: tuple[int, int], ring: int) -> None:
    """make sanitize sees what steps outside of them."""
    for solver, adjoint in (("pr", False), ("pr", True), ("fb", False), ("fb", True)):
        case = make(3, 2, size, adjoint, ring=ring, solver=solver, alpha=0.5, activation="softplus")
        assert not agree(case, tol=0.0, max_iter=3).out.any()


@given(st.data())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_cases(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    solver = draw(st.sampled_from(["pr", "fb"]))
    case = make(
        draw(st.integers(1, 20)),
        draw(st.integers(1, 11)),
        (draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        draw(st.booleans()),
        draw(st.integers(0, 1000)),
        ring=draw(st.integers(0, 2)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        solver=solver,
        alpha=draw(st.sampled_from([0.25, 1.0, 1.5])) if solver == "pr" else 0.3,
    )
    if draw(st.booleans()):
        agree(case, draw(st.sampled_from([torch.float32, torch.float64])), tol=0.0, max_iter=3)
    else:
        agree(case, tol=1e-3, max_iter=40, per_sample=draw(st.booleans()))


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("solver", ["pr", "fb"])
def test_until_it_meets_the_tolerance(isa: str, solver: str, adjoint: bool) -> None:
    alpha = 1.0 if solver == "pr" else 0.3
    case = make(9, 6, (8, 10), adjoint, solver=solver, alpha=alpha)
    for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        got = agree(case, dtype, tol=tol, max_iter=300)
        assert 1 < got.iterations.item() < 300
        assert got.residual.item() <= tol
    # It is the fixed point.
    exact = case.exact(tol=1e-14, max_iter=2000).out
    torch.testing.assert_close(got.out, exact, rtol=0, atol=1e-7)


def test_iterations_that_run_out(isa: str) -> None:
    got = agree(make(3, 4, (6, 6)), tol=1e-12, max_iter=5)
    assert got.iterations.shape == ()
    assert got.iterations.item() == 5
    assert got.residual.item() > 1e-12
    assert agree(make(3, 4, (6, 6)), tol=0.0, max_iter=1).iterations.item() == 1
    assert agree(make(3, 4, (6, 6)), tol=1e9, max_iter=7).iterations.item() == 1


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("solver", ["pr", "fb"])
def test_samples_of_their_own(isa: str, solver: str, adjoint: bool) -> None:
    """Each as if it were alone, though they move together."""
    alpha = 1.0 if solver == "pr" else 0.3
    case = make(37, 3, (6, 7), adjoint, solver=solver, alpha=alpha)
    case.bias[16:32] = torch.randn(3, 6, 7)  # a whole group of lanes that rests together
    case.bias *= torch.logspace(-3, 3, 37, dtype=torch.float64)[:, None, None, None]
    case.bias[5] = 0
    how = {"tol": 1e-5, "max_iter": 200}
    got = agree(case, per_sample=True, **how)
    assert got.iterations.shape == (37,)
    assert got.iterations[5].item() == 1
    assert len(set(got.iterations.tolist())) > 2
    for s in (0, 5, 16, 36):
        alone = make(1, 3, (6, 7), adjoint, solver=solver, alpha=alpha)
        alone.bias = case.bias[s : s + 1]
        alone.slope = None if case.slope is None else case.slope[s : s + 1]
        single = alone.ours(torch.float64, **how)
        assert single.iterations == got.iterations[s]
        torch.testing.assert_close(
            single.out[0], got.out[s], rtol=1e-12, atol=1e-13 * 10 ** (s / 6)
        )
    # Neighbours leave no trace.
    order = torch.randperm(37)
    case.bias = case.bias[order]
    case.slope = None if case.slope is None else case.slope[order]
    other = case.ours(torch.float64, per_sample=True, **how)
    assert all(torch.equal(x, y[order]) for x, y in zip(other, got, strict=True))


def test_the_same_bits_for_any_number_of_threads(threads: None) -> None:
    case = make(18, 7, (10, 9))
    results = []
    for count in (1, 2, 3, 7, 32):
        torch.set_num_threads(count)
        results.append(case.ours(torch.float32, tol=1e-4, max_iter=50))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def test_what_is_not_finite_ends_the_loop(isa: str) -> None:
    for bad in (float("nan"), float("inf")):
        case = make(3, 2, (5, 6))
        case.bias[1, 0, 2, 2] = bad
        got = case.ours(torch.float32, tol=1e-4, max_iter=50)
        assert got.iterations.item() == 1
        assert not got.residual.isfinite()
        each = case.ours(torch.float32, tol=1e-4, max_iter=50, per_sample=True)
        assert each.iterations[1].item() == 1
        assert not each.residual[1].isfinite()
        assert (each.residual[[0, 2]] <= 1e-4).all()
        assert each.out[[0, 2]].isfinite().all()


def test_a_solve_that_diverges_is_reported(isa: str) -> None:
    case = make(2, 3, (6, 6), solver="fb", activation="identity")
    case.blocks = case.blocks * 1e6
    got = case.ours(torch.float32, tol=1e-4, max_iter=50)
    assert got.iterations.item() < 50
    assert not got.residual.isfinite()


def test_strided_arguments_and_nothing() -> None:
    case = make(4, 3, (6, 5))
    want = case.ours(torch.float64, tol=1e-4)
    case.bias = case.bias.to(memory_format=torch.channels_last)
    assert torch.equal(case.ours(torch.float64, tol=1e-4).out, want.out)
    case.bias = case.bias[:0]
    got = case.ours(torch.float64, tol=1e-4)
    assert got.out.shape == (0, 3, 6, 5)
    assert got.iterations.item() == 1
    assert case.ours(torch.float64, per_sample=True).iterations.shape == (0,)


def test_opcheck() -> None:
    real = torch.view_as_real(make(1, 3, (6, 5)).blocks)
    torch.library.opcheck(torch.ops.fastprune.mon_fourier_pack, (real, 6, 5))
    packed = torch.ops.fastprune.mon_fourier_pack(real, 6, 5)
    assert packed.shape == (16, 18)
    bias = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    for slope, resolvent, each in ((None, packed, True), (bias.abs(), None, False)):
        arguments = (bias, slope, packed, resolvent, 1, "tanh", 0.5, 1e-3, 9, each)
        torch.library.opcheck(torch.ops.fastprune.mon_splitting_fourier, arguments)


def test_errors_name_the_argument() -> None:
    packed = pack_blocks(make(1, 3, (6, 5)).blocks, (6, 5))
    bias = torch.randn(4, 3, 6, 5, dtype=torch.float64)

    def refuses(message: str, *, x: Tensor = bias, w: Tensor = packed, **how: object) -> None:
        with pytest.raises(RuntimeError, match="mon_splitting_fourier: " + message):
            solve_maps(x, w, **how)

    refuses("bias: expected float32 or float64, got dtype Half", x=bias.half())
    refuses("bias: expected 4 dimensions, got 3", x=bias[0])
    refuses("bias: expected a size above 0 in dimension 2", x=bias[:, :, :0])
    long = torch.zeros(1, 3, 1, 4099, dtype=torch.float64)
    refuses("bias: expected a height and width without powers of odd primes above 4095", x=long)
    refuses("matrix: expected dtype Float, got Double", x=bias.float())
    refuses("matrix: expected size 8 in dimension 0, got 16", x=bias[:, :, :3])
    refuses("matrix: expected size 8 in dimension 1, got 18", x=bias[:, :2])
    refuses("resolvent: expected 2 dimensions, got 1", resolvent=packed[0])
    refuses("slope: expected size 4 in dimension 0, got 2", slope=bias[:2])
    refuses("slope: expected dtype Double, got Float", slope=bias.float())
    refuses("ring: expected at least 0, got -1", ring=-1)
    refuses("activation: expected relu, tanh, sigmoid, .* got gelu", activation="gelu")
    refuses("alpha: expected a finite number above 0, got 0", alpha=0.0)
    refuses("alpha: expected a finite number above 0, got inf", alpha=float("inf"))
    refuses("tol: expected at least 0, got nan", tol=float("nan"))
    refuses("max_iter: expected at least 1, got 0", max_iter=0)
    with pytest.raises(RuntimeError, match="mon_fourier_pack: matrix: expected size 12 in dim"):
        pack_blocks(make(1, 3, (6, 5)).blocks, (4, 5))
    with pytest.raises(RuntimeError, match="mon_fourier_pack: height: expected at least 1, got 0"):
        pack_blocks(make(1, 3, (6, 5)).blocks, (0, 5))
