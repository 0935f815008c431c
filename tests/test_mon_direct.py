"""The convolutional monotone solve in space, against the textbook loops in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune.ops.mon_conv_operator import ConvOperator
from fastprune.ops.mon_conv_structure import ConvStructure, conv_structure
from fastprune.ops.mon_operator import Settings
from fastprune.reference import mon_splitting as plain
from fastprune.reference.mon_splitting import Solution

ACTIVATIONS = ["relu", "tanh", "sigmoid", "softplus", "identity"]
SIZES = [(5, 7), (7, 3), (9, 16), (3, 3), (17, 31), (12, 12)]


@dataclass
class Case:
    """A network with pruned kernels, what it is solved for, and how."""

    A: Tensor | None
    B: Tensor | None
    bias: Tensor
    slope: Tensor | None = None
    ring: int = 1
    m: float = 0.8
    activation: str = "relu"
    alpha: float = 0.3
    transposed: bool = True
    structure: ConvStructure = field(init=False)

    def __post_init__(self) -> None:
        masks = [None if t is None else t != 0 for t in (self.A, self.B)]
        self.structure = ConvStructure(*masks)
        self.g = torch.tensor(1.3, dtype=torch.float64)
        self.h = torch.tensor(0.7, dtype=torch.float64)

    def exact(self, **how: object) -> Solution:
        size = (self.bias.shape[2], self.bias.shape[3])
        operator = ConvOperator(self.A, self.B, self.g, self.h, self.m, self.ring, self.bias)
        made = _raw(operator, size)
        options = {"solver": "fb", "alpha": self.alpha, **how}
        if self.slope is not None:
            return plain.adjoint(made, self.bias, self.slope, transposed=self.transposed, **options)
        return plain.solve(made, self.bias, self.activation, **options)

    def arguments(self, dtype: torch.dtype, **how: object) -> tuple[object, ...]:
        back = self.slope is not None and self.transposed
        pair, single = self.structure.weights(self.A, self.B, self.g, -self.h if back else self.h)
        cast = [[t.to(dtype) if t.is_floating_point() else t for t in ts] for ts in (pair, single)]
        rest = {"tol": 1e-5, "max_iter": 50, "per_sample": False, **how}
        return (
            self.bias.to(dtype),
            None if self.slope is None else self.slope.to(dtype),
            *cast,
            self.structure.blocks,
            1.0 - self.m,
            self.ring,
            self.activation,
            self.alpha,
            *rest.values(),
        )

    def ours(self, dtype: torch.dtype, **how: object) -> Solution:
        op = torch.ops.fastprune.mon_splitting_direct
        return Solution(*op(*self.arguments(dtype, **how)))


def _raw(o: ConvOperator, size: tuple[int, int]) -> plain.Operator:
    """W z by the definition, the kernels as they are."""

    def apply(z: Tensor, sign: float) -> Tensor:
        y = (1.0 - o.m) * z
        if o.A is not None:
            down = plain.circular_conv(z, o.A)
            y = y - o.g * plain.circular_conv_transposed(down, o.A)
        if o.B is not None:
            skew = plain.circular_conv(z, o.B) - plain.circular_conv_transposed(z, o.B)
            y = y + sign * o.h * skew
        return y

    def none(alpha: float) -> plain.Map:
        raise AssertionError(alpha)

    return plain.Operator(lambda z: apply(z, 1.0), lambda z: apply(z, -1.0), none, none, o.ring)


def make(
    batch: int,
    channels: int,
    size: tuple[int, int],
    density: float = 0.3,
    ring: int = 1,
    adjoint: bool = False,
    seed: int = 0,
    parts: str = "AB",
    **how: object,
) -> Case:
    g = torch.Generator().manual_seed(seed)

    def kernel() -> Tensor:
        shape = (channels, channels, 2 * ring + 1, 2 * ring + 1)
        w = torch.randn(shape, generator=g, dtype=torch.float64)
        w = torch.where(torch.rand(shape, generator=g) < density, w, 0.0)
        return w / w.norm().clamp_min(1e-3)

    A, B = kernel(), kernel()
    bias = torch.randn(batch, channels, *size, generator=g, dtype=torch.float64)
    slope = None
    if adjoint:  # zeros as ReLU has them, and slopes between
        draws = torch.rand(bias.shape, generator=g, dtype=torch.float64)
        slope = plain.without_ring(torch.where(draws < 0.3, 0.0, draws), ring)
    return Case(A if "A" in parts else None, B if "B" in parts else None, bias, slope, ring, **how)


def agree(case: Case, dtype: torch.dtype = torch.float64, **how: object) -> Solution:
    """The same iterates after as many steps; then the rest follows."""
    got, want = case.ours(dtype, **how), case.exact(**how)
    assert torch.equal(got.iterations, want.iterations)
    close = 2e-6 if dtype == torch.float32 else 5e-15
    kept = plain.without_ring(torch.ones_like(want.out), case.ring)
    for ours, theirs in ((got.out, want.out), (got.z, want.z)):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        steps = int(want.iterations.max())
        scale = max(1.0, theirs.abs().max().item()) * (steps + 2)
        assert (ours.double() - theirs).abs().max().item() <= close * scale
        assert (ours[kept == 0] == 0).all()
    # A difference of iterates: its error does not shrink with it.
    assert (got.residual - want.residual).abs().max().item() <= close * 20
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ring", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(isa: str, size: tuple[int, int], ring: int, dtype: torch.dtype) -> None:
    if min(size) <= 2 * ring:
        size = (size[0] + 2, size[1] + 2)
    for adjoint in (False, True):
        for batch in (3, 16):
            case = make(batch, 3, size, ring=ring, adjoint=adjoint)
            agree(case, dtype, tol=0.0, max_iter=4)


@pytest.mark.parametrize("batch", [1, 5, 16, 17, 33])
@pytest.mark.parametrize("channels", [1, 2, 19])
def test_batches_and_channels(isa: str, batch: int, channels: int) -> None:
    for dtype in (torch.float32, torch.float64):
        for adjoint in (False, True):
            agree(make(batch, channels, (6, 7), adjoint=adjoint), dtype, tol=0.0, max_iter=3)


@pytest.mark.parametrize("parts", ["A", "B", "AB"])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_densities_and_missing_kernels(isa: str, density: float, parts: str) -> None:
    for batch in (2, 16):
        for adjoint in (False, True):
            case = make(batch, 9, (8, 9), density, adjoint=adjoint, parts=parts)
            agree(case, tol=0.0, max_iter=5)
            agree(case, torch.float32, tol=0.0, max_iter=5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, activation: str) -> None:
    for batch in (5, 16):
        for alpha in (0.4, 1.0):
            case = make(batch, 4, (7, 6), activation=activation, alpha=alpha)
            case.bias *= 3
            agree(case, tol=0.0, max_iter=6)
            agree(case, torch.float32, tol=0.0, max_iter=6)


@given(st.data())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_cases(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    ring = draw(st.integers(0, 2))
    least = 2 * ring + 1
    case = make(
        draw(st.integers(1, 35)),
        draw(st.integers(1, 11)),
        (draw(st.integers(least, 24)), draw(st.integers(least, 24))),
        draw(st.sampled_from([0.0, 0.05, 0.4, 1.0])),
        ring,
        draw(st.booleans()),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from(["A", "B", "AB"])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        m=draw(st.sampled_from([0.5, 1.0])),
        transposed=draw(st.booleans()),
    )
    if draw(st.booleans()):
        agree(case, draw(st.sampled_from([torch.float32, torch.float64])), tol=0.0, max_iter=3)
    else:
        agree(case, tol=1e-3, max_iter=40, per_sample=draw(st.booleans()))


@pytest.mark.parametrize("adjoint", [False, True])
def test_until_it_meets_the_tolerance(isa: str, adjoint: bool) -> None:
    for batch in (9, 16):
        case = make(batch, 6, (8, 10), adjoint=adjoint)
        for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
            got = agree(case, dtype, tol=tol, max_iter=300)
            assert 1 < got.iterations.item() < 300
            assert got.residual.item() <= tol


def test_iterations_that_run_out(isa: str) -> None:
    got = agree(make(3, 4, (6, 6)), tol=1e-12, max_iter=5)
    assert got.iterations.shape == ()
    assert got.iterations.item() == 5
    assert got.residual.item() > 1e-12
    assert agree(make(3, 4, (6, 6)), tol=1e9, max_iter=7).iterations.item() == 1


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("batch", [7, 37])
def test_samples_of_their_own(isa: str, batch: int, adjoint: bool) -> None:
    """Each as if it were alone, though they move together."""
    case = make(batch, 3, (6, 7), adjoint=adjoint)
    case.bias *= torch.logspace(-3, 3, batch, dtype=torch.float64)[:, None, None, None]
    case.bias[5] = 0
    how = {"tol": 1e-5, "max_iter": 200}
    got = case.ours(torch.float64, per_sample=True, **how)
    want = case.exact(per_sample=True, **how)
    assert torch.equal(got.iterations, want.iterations)
    assert got.iterations[5].item() == 1
    assert len(set(got.iterations.tolist())) > 2
    torch.testing.assert_close(got.residual, want.residual, rtol=1e-7, atol=1e-13)
    torch.testing.assert_close(got.out, want.out, rtol=1e-11, atol=1e-12)
    # Neighbours leave no trace.
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    case.bias = case.bias[order]
    case.slope = None if case.slope is None else case.slope[order]
    other = case.ours(torch.float64, per_sample=True, **how)
    assert all(torch.equal(x, y[order]) for x, y in zip(other, got, strict=True))


@pytest.mark.parametrize("batch", [3, 16, 33])
def test_the_same_bits_for_any_number_of_threads(threads: None, batch: int) -> None:
    case = make(batch, 7, (10, 9), 0.1)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(case.ours(torch.float32, tol=1e-4, max_iter=50))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def test_maps_beyond_the_cache_go_image_by_image(isa: str, threads: None) -> None:
    for adjoint in (False, True):
        case = make(17, 16, (34, 36), 0.02, adjoint=adjoint)
        case.bias[3] *= 100
        for count in (1, 2, 32):  # images in parallel, or each on all threads
            torch.set_num_threads(count)
            agree(case, tol=0.0, max_iter=2)
        agree(case, tol=1e-3, max_iter=40, per_sample=True)


@pytest.mark.parametrize("batch", [3, 16])
def test_what_is_not_finite_ends_the_loop(isa: str, batch: int) -> None:
    for bad in (float("nan"), float("inf")):
        case = make(batch, 2, (5, 6))
        case.bias[1, 0, 2, 2] = bad
        got = case.ours(torch.float32, tol=1e-4, max_iter=50)
        assert got.iterations.item() == 1
        assert not got.residual.isfinite()
        each = case.ours(torch.float32, tol=1e-4, max_iter=50, per_sample=True)
        assert each.iterations[1].item() == 1
        assert not each.residual[1].isfinite()
        others = [i for i in range(batch) if i != 1]
        assert (each.residual[others] <= 1e-4).all()
        assert each.out[others].isfinite().all()


def test_strided_arguments_and_nothing() -> None:
    for batch in (4, 16):
        case = make(batch, 3, (6, 5))
        want = case.ours(torch.float64, tol=1e-4)
        case.bias = case.bias.to(memory_format=torch.channels_last)
        assert torch.equal(case.ours(torch.float64, tol=1e-4).out, want.out)
    case.bias = case.bias[:0]
    got = case.ours(torch.float64, tol=1e-4)
    assert got.out.shape == (0, 3, 6, 5)
    assert got.iterations.item() == 1
    assert case.ours(torch.float64, per_sample=True).iterations.shape == (0,)
    # A border that meets itself leaves nothing.
    case = make(2, 3, (6, 2))
    assert torch.equal(case.ours(torch.float64).out, torch.zeros(2, 3, 6, 2, dtype=torch.float64))


def test_opcheck() -> None:
    for adjoint, each in ((False, True), (True, False)):
        case = make(4, 3, (6, 5), adjoint=adjoint, activation="tanh")
        arguments = case.arguments(torch.float64, tol=1e-3, max_iter=9, per_sample=each)
        torch.library.opcheck(torch.ops.fastprune.mon_splitting_direct, arguments)


def test_errors_name_the_argument() -> None:
    case = make(4, 3, (6, 5), adjoint=True)
    good = list(case.arguments(torch.float64))

    def refuses(message: str, place: int, value: object) -> None:
        arguments = list(good)
        arguments[place] = value
        with pytest.raises(RuntimeError, match="mon_splitting_direct: " + message):
            torch.ops.fastprune.mon_splitting_direct(*arguments)

    bias, slope, pair, single = good[:4]
    refuses("bias: expected float32 or float64, got dtype Half", 0, bias.half())
    refuses("bias: expected 4 dimensions, got 3", 0, bias[0])
    refuses("slope: expected size 4 in dimension 0, got 2", 1, slope[:2])
    refuses("slope: expected dtype Double, got Float", 1, slope.float())
    refuses("pair: expected no or 6 tensors, got 5", 2, pair[:5])
    narrow = [*pair[:2], pair[2].float(), *pair[3:]]
    refuses(r"pair\[2\]: expected dtype Double, got Float", 2, narrow)
    refuses(r"pair\[5\]: expected size", 2, [*pair[:5], pair[5][:-1]])
    refuses("offset: ", 2, [pair[0], pair[1].long(), *pair[2:]])
    refuses("row_ptr: expected bounds", 2, [pair[0].flip(0), *pair[1:]])
    refuses("single: expected no or 3 tensors, got 1", 3, single[:1])
    refuses(r"single\[2\]: expected 1 dim", 3, [*single[:2], single[2][None]])
    refuses("blocks: expected 3 numbers, got 2", 4, [1, 1])
    refuses("diagonal: expected a finite number, got nan", 5, float("nan"))
    refuses("ring: expected 0 to 90, got -1", 6, -1)
    refuses("activation: expected relu, tanh, sigmoid, .* got gelu", 7, "gelu")
    refuses("alpha: expected a positive finite number, got 0", 8, 0.0)
    refuses("tol: expected a finite number of at least 0, got nan", 9, float("nan"))
    refuses("max_iter: expected a positive number, got 0", 10, 0)


def test_the_operator_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same equilibrium whichever form is read."""
    case = make(16, 6, (12, 11), 0.05, m=1.0)
    A, B = case.A, case.B
    s = Settings("relu", "fb", 0.3, 1e-9, 300, False)
    slope = plain.without_ring(torch.rand_like(case.bias), 1)
    results = []
    for cheaper in (True, False):
        monkeypatch.setattr(ConvStructure, "is_cheaper", lambda *_, c=cheaper: c)
        operator = ConvOperator(A, B, case.g, case.h, 1.0, 1, case.bias, A != 0, B != 0)
        adjoints = [operator.adjoint(case.bias, slope, s, t) for t in (True, False)]
        results.append((operator.solve(case.bias, s), *adjoints))
        assert bool(operator._sparse) is cheaper
        assert bool(operator._packed) is not cheaper
    for direct, fourier in zip(*results, strict=True):
        assert torch.equal(direct.iterations, fourier.iterations)
        torch.testing.assert_close(direct.out, fourier.out, rtol=0, atol=1e-13)


def test_structures_follow_their_masks() -> None:
    mask = torch.ones(2, 2, 3, 3, dtype=torch.bool)
    first = conv_structure(mask, None)
    assert conv_structure(mask.clone(), None) is first
    assert conv_structure(torch.ones(6, 6, 1, 1, dtype=torch.bool), None) is not first
    assert conv_structure(None, mask) is not first
    mask[0, 0, 0, 0] = False
    assert conv_structure(mask, None) is not first


def test_few_weights_of_large_maps_are_multiplied_in_space() -> None:
    g = torch.Generator().manual_seed(0)

    def cheaper(n: int, batch: int, size: int, density: float) -> bool:
        a, b = (torch.rand(n, n, 3, 3, generator=g) < density for _ in range(2))
        return ConvStructure(a, b).is_cheaper(torch.empty(batch, n, size, size), 1)

    assert cheaper(81, 1, 34, 0.01)
    assert cheaper(81, 16, 10, 0.01)
    assert not cheaper(81, 1, 34, 0.5)
    assert not cheaper(16, 16, 34, 0.01)
    assert not cheaper(54, 16, 34, 0.2)
