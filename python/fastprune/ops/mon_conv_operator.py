"""W of a convolutional monotone operator layer, prepared once per change of its weights."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from fastprune.ops.backend import has_kernel
from fastprune.ops.mon_conv_structure import ConvStructure, conv_structure
from fastprune.ops.mon_fourier import invert_blocks, pack_blocks
from fastprune.ops.mon_operator import (
    Operator,
    Settings,
    detached,
    power_iteration,
    start_vector,
)
from fastprune.reference import mon_splitting as plain
from fastprune.reference.mon_splitting import Solution


class ConvOperator(Operator):
    """W = (1 - m) I - g A^T A + h (B - B^T), circular, on padded maps.

    Args:
        A, B: (n, n, k, k) of Frobenius norm 1, exact zeros where pruned, or None.
        g, h: scalars.
        m: strong monotonicity of I - W.
        ring: width of the border that is kept at zero.
        like: the bias of the solves: their dtype, device and map size.
        a_mask, b_mask: bool like A and B: entries outside do not exist; None: all do. With few,
            forward-backward on the CPU multiplies in space, otherwise in the Fourier domain.
    """

    def __init__(
        self,
        A: Tensor | None,
        B: Tensor | None,
        g: Tensor,
        h: Tensor,
        m: float,
        ring: int,
        like: Tensor,
        a_mask: Tensor | None = None,
        b_mask: Tensor | None = None,
    ) -> None:
        self.A, self.B, self.m = detached(A), detached(B), m
        self.g, self.h = g.detach(), h.detach()
        self.ring = ring
        self.a_mask, self.b_mask = a_mask, b_mask
        self.channels, self.size = like.shape[1], (like.shape[2], like.shape[3])
        self._like = like.new_empty(0)
        self._packed: dict[bool, Tensor] = {}
        self._sparse: dict[bool, tuple[list[Tensor], list[Tensor]]] = {}
        self._inverse_of = 0.0  # the alpha of what follows; none yet
        self._inverted = self._like
        self._packed_inverse: dict[bool, Tensor] = {}

    def plain(self) -> plain.Operator:
        """The operator of the reference."""
        made = plain.conv_operator(self.A, self.B, self.m, self.g, self.h, self.size)
        return made._replace(ring=self.ring)

    @cached_property
    def blocks(self) -> Tensor:
        """W per frequency: complex (frequencies, n, n), in the order of ``rfft2``."""
        return frequency_blocks(self._kernel(), self.size)

    def _kernel(self) -> Tensor:
        """W as one circular kernel (n, n, 2 k - 1, 2 k - 1): A^T A reaches twice as far as B."""
        n = self.channels
        present = self.A if self.A is not None else self.B
        k = 1 if present is None else present.shape[-1]
        w = self._like.new_zeros(n, n, 2 * k - 1, 2 * k - 1)
        w[:, :, k - 1, k - 1] = (1.0 - self.m) * torch.eye(n).to(w)
        if self.A is not None:
            w -= self.g * _gram_kernel(self.A)
        if self.B is not None:
            inner = slice(k // 2, k // 2 + k)
            skew = self.B - self.B.transpose(0, 1).flip(2, 3)
            w[:, :, inner, inner] += self.h * skew
        return w

    def _inverse(self, alpha: float) -> Tensor:
        """((1 + alpha) I - alpha W)^-1 per frequency; kept for the last alpha."""
        if self._inverse_of != alpha:
            # Its Hermitian part is at least 1 + alpha m: no pivoting is needed.
            if has_kernel("mon_invert", self.blocks.device.type):
                self._inverted = invert_blocks(self.blocks, -alpha, 1.0 + alpha)
            else:
                eye = torch.eye(self.channels, dtype=self.blocks.dtype, device=self.blocks.device)
                self._inverted = torch.linalg.inv((1.0 + alpha) * eye - alpha * self.blocks)
            self._inverse_of, self._packed_inverse = alpha, {}
        return self._inverted

    def _read(self, blocks: Tensor, transposed: bool) -> Tensor:
        """Blocks as the op reads them; W^T has the conjugate transposes."""
        return pack_blocks(blocks, self.size, transposed)

    def _matrix(self, transposed: bool) -> Tensor:
        if transposed not in self._packed:
            self._packed[transposed] = self._read(self.blocks, transposed)
        return self._packed[transposed]

    def _resolvent(self, alpha: float, transposed: bool) -> Tensor:
        inverse = self._inverse(alpha)
        if transposed not in self._packed_inverse:
            self._packed_inverse[transposed] = self._read(inverse, transposed)
        return self._packed_inverse[transposed]

    def solve(self, bias: Tensor, s: Settings) -> Solution:
        """One call of the op."""
        if not has_kernel("mon_splitting_fourier", bias.device.type):
            return super().solve(bias, s)
        return self._call(bias, None, s, False)

    def adjoint(self, grad: Tensor, slope: Tensor, s: Settings, transposed: bool) -> Solution:
        """One call of the op."""
        if not has_kernel("mon_splitting_fourier", grad.device.type):
            return super().adjoint(grad, slope, s, transposed)
        return self._call(grad, slope, s, transposed)

    @cached_property
    def structure(self) -> ConvStructure | None:
        """Of the masks, where all kernels that are there have one."""
        dense = (self.A is not None and self.a_mask is None) or (
            self.B is not None and self.b_mask is None
        )
        nothing = self.A is None and self.B is None
        return None if dense or nothing else conv_structure(self.a_mask, self.b_mask)

    def _weights(self, transposed: bool) -> tuple[list[Tensor], list[Tensor]]:
        """A and B as the op in space reads them."""
        if transposed not in self._sparse:
            assert self.structure is not None
            h = -self.h if transposed else self.h
            self._sparse[transposed] = self.structure.weights(self.A, self.B, self.g, h)
        return self._sparse[transposed]

    def _call(self, bias: Tensor, slope: Tensor | None, s: Settings, transposed: bool) -> Solution:
        if (
            s.solver == "fb"
            and bias.device.type == "cpu"
            and self.structure is not None
            and self.structure.is_cheaper(bias, self.ring)
        ):
            return Solution(
                *torch.ops.fastprune.mon_splitting_direct.default(
                    bias,
                    slope,
                    *self._weights(transposed),
                    self.structure.blocks,
                    1.0 - self.m,
                    self.ring,
                    s.activation,
                    s.alpha,
                    s.tol,
                    s.max_iter,
                    s.per_sample,
                )
            )
        return Solution(
            *torch.ops.fastprune.mon_splitting_fourier.default(
                bias,
                slope,
                self._matrix(transposed),
                self._resolvent(s.alpha, transposed) if s.solver == "pr" else None,
                self.ring,
                s.activation,
                s.alpha,
                s.tol,
                s.max_iter,
                s.per_sample,
            )
        )

    def _power_iteration(self) -> float:
        """On (I - W)^T (I - W) over maps, from a fixed start."""
        operator = self.plain()

        def apply(x: Tensor) -> Tensor:
            y = x - operator.multiply(x)
            return y - operator.multiply_transposed(y)

        shape = (1, self.channels, *self.size)
        return power_iteration(apply, start_vector(shape, self._like), steps=40)


def _gram_kernel(kernel: Tensor) -> Tensor:
    """The kernel (n, n, 2 k - 1, 2 k - 1) of A^T A: correlations of A's kernel with itself.

    (A^T A)(i, j, d) = sum over c and t of A(c, i, t) A(c, j, t + d): one Gram matrix of all pairs
    of taps, whose entries are added up by lag.
    """
    c, n, k, _ = kernel.shape
    flat = kernel.permute(0, 2, 3, 1).reshape(c, k * k * n)
    pairs = (flat.t() @ flat).view(k, k, n, k, k, n)
    sums = kernel.new_zeros(2 * k - 1, 2 * k - 1, n, n)
    for y in range(k):
        for x in range(k):
            # Taps (y + dy, x + dx) of the second factor stand at lag (dy, dx).
            lags = sums[k - 1 - y : 2 * k - 1 - y, k - 1 - x : 2 * k - 1 - x]
            lags += pairs[y, x].permute(1, 2, 0, 3)
    return sums.permute(2, 3, 0, 1)


def frequency_blocks(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The transfer function of a circular kernel (n, n, l, l), l odd: (frequencies, n, n).

    Tap (y, x) reads the point (y - l // 2, x - l // 2) away. A product with a table of cosines and
    one of sines: kernels have few taps.
    """
    n, _, taps, _ = kernel.shape
    height, width = size
    reach = torch.arange(taps, dtype=torch.float64) - taps // 2
    fy = torch.arange(height, dtype=torch.float64) / height
    fx = torch.arange(width // 2 + 1, dtype=torch.float64) / width
    turns = (fy[:, None, None, None] * reach[:, None]) + (fx[:, None, None] * reach)
    angle = 2.0 * math.pi * turns.reshape(-1, taps * taps)
    flat = kernel.reshape(n * n, taps * taps).t()
    real, imaginary = (t.to(kernel) @ flat for t in (angle.cos(), angle.sin()))
    return torch.complex(real, imaginary).view(-1, n, n)
