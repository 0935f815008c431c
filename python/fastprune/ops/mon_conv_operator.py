"""W of a convolutional monotone operator layer, prepared once per change of its weights."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastprune.ops.mon_operator import Operator, power_iteration, start_vector
from fastprune.reference import mon_splitting as plain


class ConvOperator(Operator):
    """W = (1 - m) I - g A^T A + h (B - B^T), circular, on padded maps.

    Args:
        A, B: (n, n, k, k) of Frobenius norm 1, exact zeros where pruned, or None; detached.
        g, h: scalars.
        m: strong monotonicity of I - W.
        ring: width of the border that is kept at zero.
        like: the bias of the solves: their dtype, device and map size.
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
        self.A, self.B, self.g, self.h, self.m = A, B, g, h, m
        self.ring = ring
        self.a_mask, self.b_mask = a_mask, b_mask
        self.channels, self.size = like.shape[1], (like.shape[2], like.shape[3])
        self._like = like.new_empty(0)

    def plain(self) -> plain.Operator:
        """The operator of the reference."""
        made = plain.conv_operator(self.A, self.B, self.m, self.g, self.h, self.size)
        return made._replace(ring=self.ring)

    @cached_property
    def blocks(self) -> Tensor:
        """W per frequency: complex (frequencies, n, n)."""
        return plain.conv_blocks(self.A, self.B, self.m, self.g, self.h, self.size)

    def lipschitz(self) -> float:
        """Power iteration on (I - W)^T (I - W) over maps, from a fixed start."""
        operator = self.plain()

        def apply(x: Tensor) -> Tensor:
            y = x - operator.multiply(x)
            return y - operator.multiply_transposed(y)

        shape = (1, self.channels, *self.size)
        return power_iteration(apply, start_vector(shape, self._like), steps=40)
