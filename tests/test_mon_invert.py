"""Many small complex matrices inverted at once, against torch.linalg.inv in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune.ops.mon_fourier import invert_blocks, pack_blocks

PLAIN = torch.ops.fastprune.mon_invert


def positive(count: int, n: int, floor: float = 1.0, seed: int = 0, skew: float = 1.0) -> Tensor:
    """Hermitian parts of at least ``floor``; complex128."""
    torch.manual_seed(seed)
    a, b = (torch.randn(count, n, n, dtype=torch.complex128) / n**0.5 for _ in range(2))
    return floor * torch.eye(n) + a.mH @ a + skew * (b - b.mH)


def growth(m: Tensor) -> Tensor:
    """What elimination without pivoting may make of the norm: that of T + S* T^-1 S, of M = T + S
    with T Hermitian and S skew (Golub and Van Loan 1979)."""
    t, s = (m + m.mH) / 2, (m - m.mH) / 2
    return torch.linalg.matrix_norm(t + s.mH @ torch.linalg.solve(t, s), 2)


def check(blocks: Tensor, dtype: torch.dtype, grows: bool = False) -> None:
    """Within rounding of the exact inverse: the residual bound of a stable elimination."""
    m = blocks.to(dtype.to_complex())
    exact = m.to(torch.complex128)
    got = invert_blocks(m)
    assert got.dtype == m.dtype
    assert got.shape == m.shape
    x, n = got.to(torch.complex128), m.shape[1]
    norm = torch.linalg.matrix_norm
    unit = torch.finfo(dtype).eps / 2
    eye = torch.eye(n, dtype=torch.complex128)
    size = torch.maximum(norm(exact, 2), growth(exact)) if grows else norm(exact, 2)
    bound = 4 * n * unit * size * norm(x, 2)
    assert (norm(exact @ x - eye, 2) <= bound).all()
    assert (norm(x @ exact - eye, 2) <= bound).all()
    want = torch.linalg.inv(exact)
    assert (norm(x - want, 2) <= bound * norm(want, 2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 33, 81])
def test_sizes(isa: str, n: int, dtype: torch.dtype) -> None:
    for count in (1, 7, 16, 17, 40):
        check(positive(count, n, seed=count), dtype)


@given(st.data())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_cases(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    blocks = positive(
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([0.1, 1.0, 2.0])),
        draw(st.integers(0, 1000)),
        # 30: entries far above the pivots, and the growth that the bound speaks of.
        draw(st.sampled_from([0.0, 1.0, 30.0])),
    )
    scale = 10.0 ** draw(st.integers(-12, 12))  # its square leaves the range of float32
    check(blocks * scale, draw(st.sampled_from([torch.float32, torch.float64])), grows=True)


def test_scale_and_shift(isa: str) -> None:
    blocks = positive(19, 9)
    got = invert_blocks(blocks, -0.25, 6.0)
    want = torch.linalg.inv(6.0 * torch.eye(9) - 0.25 * blocks)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_a_bad_matrix_spoils_no_other(isa: str) -> None:
    for dtype in (torch.complex64, torch.complex128):
        for at in ((0, 0), (8, 8), (10, 3), (2, 10)):
            for bad in (float("nan"), float("inf"), complex(0, float("inf"))):
                blocks = positive(20, 11).to(dtype)
                blocks[17][at] = bad
                assert not invert_blocks(blocks)[17].isfinite().all()
                others = torch.arange(20) != 17
                want = invert_blocks(positive(20, 11).to(dtype))
                assert torch.equal(invert_blocks(blocks)[others], want[others])
        for pivot in (0, 9, 10):
            blocks = torch.eye(11, dtype=dtype).repeat(20, 1, 1)
            blocks[3, pivot, pivot] = 0
            got = invert_blocks(blocks)
            assert not got[3].isfinite().all()
            assert torch.equal(got[4], blocks[4])


def test_the_same_bits_for_any_number_of_threads(threads: None) -> None:
    for dtype in (torch.complex64, torch.complex128):
        blocks = positive(75, 21).to(dtype)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(invert_blocks(blocks))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_the_same_bits_wherever_a_matrix_stands(isa: str) -> None:
    blocks = positive(40, 13).to(torch.complex64)
    assert torch.equal(invert_blocks(blocks[23:24])[0], invert_blocks(blocks)[23])


def test_strided_arguments_and_nothing() -> None:
    blocks = positive(6, 5)
    torch.testing.assert_close(invert_blocks(blocks.mT).mT, invert_blocks(blocks))
    torch.testing.assert_close(invert_blocks(blocks.mH).mH, invert_blocks(blocks))
    assert torch.equal(invert_blocks(blocks[::2]), invert_blocks(blocks)[::2])
    assert invert_blocks(blocks[:0]).shape == (0, 5, 5)
    assert invert_blocks(blocks[:, :0, :0]).shape == (6, 0, 0)


def test_opcheck() -> None:
    real = torch.view_as_real(positive(5, 4))
    torch.library.opcheck(PLAIN, (real,))
    torch.library.opcheck(PLAIN, (real.float(), -0.5, 2.0))


def test_packed_adjoints() -> None:
    for n in (1, 7, 8, 19):
        blocks = positive(6 * 3, n)
        want = pack_blocks(blocks.mH.resolve_conj().contiguous(), (6, 5))
        assert torch.equal(pack_blocks(blocks, (6, 5), adjoint=True), want)
    real = torch.view_as_real(positive(6 * 3, 4))
    torch.library.opcheck(torch.ops.fastprune.mon_fourier_pack, (real, 6, 5, True))


def test_errors_name_the_argument() -> None:
    real = torch.view_as_real(positive(5, 4))

    def refuses(message: str, blocks: Tensor) -> None:
        with pytest.raises(RuntimeError, match="mon_invert: blocks: " + message):
            PLAIN(blocks)

    refuses("expected float32 or float64, got dtype Half", real.half())
    refuses("expected 4 dimensions, got 3", real[0])
    refuses("expected size 4 in dimension 2, got 3", real[:, :, :3])
    refuses("expected size 2 in dimension 3, got 1", real[..., :1])
