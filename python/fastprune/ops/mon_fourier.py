"""The equilibrium of a convolutional monotone operator network, all iterations in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune.reference.mon_splitting import Solution


def pack_blocks(blocks: Tensor, size: tuple[int, int], adjoint: bool = False) -> Tensor:
    """A circular convolution per frequency, in the order that :func:`solve_maps` reads.

    Args:
        blocks: complex (height * (width // 2 + 1), n, n), the frequencies as ``rfft2`` orders them.
        size: (height, width) of the maps.
        adjoint: pack the conjugate transposes: those of the transposed convolution.
    Returns:
        (frequencies, 2 n n), real: of two conjugate frequencies the first only.
    Raises:
        RuntimeError: the blocks do not fit the size.
    Cost: one read and one write of the blocks.
    """
    real = torch.view_as_real(blocks.resolve_conj())
    packed: Tensor = torch.ops.fastprune.mon_fourier_pack(real, *size, adjoint)
    return packed


def invert_blocks(blocks: Tensor, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """(shift I + scale M)^-1 for each of many complex matrices M, one in each lane of a vector.

    Args:
        blocks: complex64 or complex128 (matrices, n, n), on the CPU. The Hermitian part of
            shift I + scale M must be positive definite: there is no pivoting, and then none needed.
        scale, shift: real numbers.
    Returns:
        The inverses, like ``blocks``; not finite where a pivot is zero or not finite.
    Raises:
        RuntimeError: the shape, dtype or device is none of these; the message names the argument.
    Cost: n^3 complex products per matrix, one read and one write of the blocks. The same bits for
    any number of threads.
    Gauss-Jordan elimination; its stability without pivoting: Golub and Van Loan 1979.
    """
    real = torch.view_as_real(blocks.resolve_conj())
    return torch.view_as_complex(torch.ops.fastprune.mon_invert(real, scale, shift))


def solve_maps(
    bias: Tensor,
    matrix: Tensor,
    resolvent: Tensor | None = None,
    slope: Tensor | None = None,
    ring: int = 0,
    activation: str = "relu",
    alpha: float = 1.0,
    tol: float = 1e-5,
    max_iter: int = 50,
    per_sample: bool = False,
) -> Solution:
    """z = activation(W z + bias) or, with ``slope``, u = slope * (bias + W u).

    Args:
        bias: (N, n, height, width), float32 or float64. Any height and width will do; on the CPU
            the transforms are fast where they are products of small primes.
        matrix: W, from :func:`pack_blocks`; for the adjoint equation W^T.
        resolvent: ((1 + alpha) I - alpha W)^-1, packed likewise: Peaceman-Rachford. None:
            forward-backward.
        slope: like ``bias``, or None; with it ``activation`` plays no part.
        ring: width of the border that is kept at 0.
        activation: relu, tanh, sigmoid, softplus or identity.
        alpha: step, above 0.
        tol: the largest relative residual ||z_new - z|| / (1e-6 + ||z_new||) that ends the loop.
        max_iter: at least 1.
        per_sample: every sample has a residual of its own and rests once that meets ``tol``.
    Returns:
        ``out``: one more application after the last iterate ``z``; ``iterations`` (int64) and
        ``residual`` (float64), 0-dim or (N,). A residual that is not finite ends the loop, or that
        sample's part of it.
    Raises:
        RuntimeError: arguments that do not fit each other; the message names the argument.
    Cost: per iteration 4 n^2 complex products per image and pair of frequencies, and a transform
    of each map there and back. The blocks are read once per iteration for all images. The same
    bits for any number of threads.
    Winston and Kolter 2020, Algorithms 1 and 2 and their adjoints.
    """
    found = torch.ops.fastprune.mon_splitting_fourier(
        bias, slope, matrix, resolvent, ring, activation, alpha, tol, max_iter, per_sample
    )
    return Solution(*found)


def _frequencies(height: int, width: int) -> int:
    """How many of ``rfft2`` are not the conjugate of another one."""
    own = (1 if height % 2 else 2) * (1 if width % 2 else 2)
    return (height * width + own) // 2


@torch.library.register_fake("fastprune::mon_fourier_pack")
def _pack_fake(matrix: Tensor, height: int, width: int, adjoint: bool = False) -> Tensor:
    return matrix.new_empty(_frequencies(height, width), 2 * matrix.shape[1] ** 2)


@torch.library.register_fake("fastprune::mon_invert")
def _invert_fake(blocks: Tensor, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return blocks.new_empty(blocks.shape)


@torch.library.register_fake("fastprune::mon_splitting_fourier")
def _solve_fake(
    bias: Tensor,
    slope: Tensor | None,
    matrix: Tensor,
    resolvent: Tensor | None,
    ring: int,
    activation: str,
    alpha: float,
    tol: float,
    max_iter: int,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = [bias.shape[0]] if per_sample else []
    return (
        bias.new_empty(bias.shape),
        bias.new_empty(bias.shape),
        bias.new_empty(count, dtype=torch.int64),
        bias.new_empty(count, dtype=torch.float64),
    )
