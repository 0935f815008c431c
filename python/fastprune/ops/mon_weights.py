"""The parametrization of W, for gradients: what A and B do, in recorded torch operations.

Winston and Kolter 2020, section 3.1 and appendix. Each class says how q . (W z) depends on the
parameters; all of it can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastprune.ops.pattern import Pattern
from fastprune.reference.mon_splitting import circular_conv, circular_conv_transposed

Parameters: TypeAlias = Sequence[Tensor | None]
Gradients: TypeAlias = tuple[Tensor | None, ...]


class LinearExtra(NamedTuple):
    """m, and the patterns of A and B where their gradients are to be sampled at the mask."""

    m: float
    a: Pattern | None = None
    b: Pattern | None = None


class LinearWeights:
    """W = (1 - m) I - A^T A + B - B^T; parameters (A, B)."""

    @staticmethod
    def multiply(extra: LinearExtra, z: Tensor, parameters: Parameters, transposed: bool) -> Tensor:
        """W z for a batch of rows z, or W^T z."""
        A, B = parameters
        y = (1.0 - extra.m) * z
        if A is not None:
            y = y - (z @ A.t()) @ A
        if B is not None:
            skew = z @ B.t() - z @ B
            y = y - skew if transposed else y + skew
        return y

    @staticmethod
    def grads(
        extra: LinearExtra, q: Tensor, z: Tensor, parameters: Parameters, needs: Sequence[bool]
    ) -> Gradients:
        """Of q . (W z): -A (G + G^T) and G - G^T with G = q^T z; or the same at a mask only."""
        A, B = parameters
        sampled = not torch.is_grad_enabled()
        dense_a = A is not None and needs[0] and not (sampled and extra.a is not None)
        dense_b = B is not None and needs[1] and not (sampled and extra.b is not None)
        outer = q.t() @ z if dense_a or dense_b else None
        a_grad = b_grad = None
        if A is not None and needs[0]:
            if outer is not None and dense_a:
                a_grad = -(A @ (outer + outer.t()))
            else:
                assert extra.a is not None
                both = torch.cat([z, q])
                a_grad = -_sampled(_product(both, A, extra.a), torch.cat([q, z]), extra.a)
        if B is not None and needs[1]:
            if outer is not None and dense_b:
                b_grad = outer - outer.t()
            else:
                assert extra.b is not None
                b_grad = _sampled(torch.cat([q, -z]), torch.cat([z, q]), extra.b)
        return a_grad, b_grad


def _product(x: Tensor, weight: Tensor, p: Pattern) -> Tensor:
    return torch.ops.fastprune.masked_linear(  # type: ignore[no-any-return]
        x,
        weight,
        None,
        p.row_ptr,
        p.offset,
        p.transposed_row_ptr,
        p.transposed_offset,
        p.block_depth,
        p.transposed_block_depth,
        False,
    )


def _sampled(grad: Tensor, x: Tensor, p: Pattern) -> Tensor:
    return torch.ops.fastprune.masked_linear_weight_grad(  # type: ignore[no-any-return]
        grad, x, p.row_ptr, p.offset, p.block_depth, False
    )


class ConvExtra(NamedTuple):
    """m alone: gradients at a mask are cut out by the mask's own backward pass."""

    m: float


class ConvWeights:
    """W = (1 - m) I - g A^T A + h (B - B^T), circular; parameters (A, B, g, h)."""

    @staticmethod
    def multiply(extra: ConvExtra, z: Tensor, parameters: Parameters, transposed: bool) -> Tensor:
        """W z for maps z, or W^T z."""
        A, B, g, h = parameters
        assert g is not None
        assert h is not None
        y = (1.0 - extra.m) * z
        if A is not None:
            y = y - g * circular_conv_transposed(circular_conv(z, A), A)
        if B is not None:
            skew = h * (circular_conv(z, B) - circular_conv_transposed(z, B))
            y = y - skew if transposed else y + skew
        return y

    @staticmethod
    def grads(
        extra: ConvExtra, q: Tensor, z: Tensor, parameters: Parameters, needs: Sequence[bool]
    ) -> Gradients:
        """Of q . (W z)."""
        A, B, g, h = parameters
        a_grad = b_grad = g_grad = h_grad = None
        if A is not None and g is not None and (needs[0] or needs[2]):
            down_z, down_q = circular_conv(z, A), circular_conv(q, A)
            if needs[0]:
                a_grad = -g * (_kernel_grad(q, down_z, A) + _kernel_grad(z, down_q, A))
            g_grad = -(down_q * down_z).sum()
        if B is not None and h is not None:
            if needs[1]:
                b_grad = h * (_kernel_grad(z, q, B) - _kernel_grad(q, z, B))
            if needs[3]:
                h_grad = (q * circular_conv(z, B)).sum() - (z * circular_conv(q, B)).sum()
        return a_grad, b_grad, g_grad, h_grad


def _kernel_grad(z: Tensor, grad: Tensor, kernel: Tensor) -> Tensor:
    """The gradient of grad . circular_conv(z, kernel) by the kernel."""
    p = kernel.shape[-1] // 2
    rows = torch.arange(-p, z.shape[2] + p, device=z.device) % z.shape[2]
    columns = torch.arange(-p, z.shape[3] + p, device=z.device) % z.shape[3]
    wrapped = z[:, :, rows][:, :, :, columns]
    return torch.nn.grad.conv2d_weight(  # type: ignore[no-any-return]
        wrapped, list(kernel.shape), grad
    )
