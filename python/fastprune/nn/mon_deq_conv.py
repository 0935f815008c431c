"""The single-convolution monotone operator equilibrium layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprune.nn.mon_deq import Activation, MonDEQLayer, Solver
from fastprune.ops.mon_conv_operator import ConvOperator
from fastprune.ops.mon_weights import ConvExtra, ConvWeights
from fastprune.ops.solve_info import OnFailure


class MonDEQConv2d(MonDEQLayer):
    r"""The equilibrium z = sigma(W z + U x + b) of a circular convolution.

    W = (1 - m) I - g A'^T A' + h (B' - B'^T), with A' = A / \|\|A\|\|_F, B' = B / \|\|B\|\|_F and
    learned scalars g and h, which start at 1. Maps are padded by p = (kernel_size - 1) / 2 on each
    side: U x + b is computed on the whole padded map, and the border of width p of z is kept at 0,
    so that wrapping around never joins opposite edges. See :class:`MonDEQLinear` for the methods,
    the stopping rule and what is shared.

    Args:
        in_channels: of x.
        out_channels: n, of z.
        kernel_size: k, odd.
        m, use_A, use_B, activation, solver, alpha, tol, max_iter, per_sample, on_failure: as
            :class:`MonDEQLinear`. Peaceman-Rachford inverts one n x n matrix per frequency per
            change of the weights.
    Shape:
        (N, in_channels, H, W) -> (N, out_channels, H + 2 p, W + 2 p): the unpadded image in, the
        padded equilibrium out, as Winston and Kolter's programs do.
    Attributes:
        A, B: Parameters (n, n, k, k), or None. ``g``, ``h``: scalar Parameters. ``U``: the
            ``nn.Conv2d`` with its bias, zero padding 2 p.
        info, backward_info: as :class:`MonDEQLinear`.
    Papers: Winston and Kolter 2020, section 4 and Appendix; 000 (Pham et al. 2022), Appendix A.
    """

    U: nn.Conv2d
    g: Tensor
    h: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        m: float = 1.0,
        use_A: bool = True,
        use_B: bool = True,
        activation: Activation = "relu",
        solver: Solver = "pr",
        alpha: float | None = None,
        tol: float = 1e-5,
        max_iter: int = 50,
        per_sample: bool = False,
        on_failure: OnFailure = "warn",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(m, activation, solver, alpha, tol, max_iter, per_sample, on_failure)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size % 2 < 1:
            raise ValueError(f"kernel_size: expected an odd positive integer, got {kernel_size!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = kernel_size
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.U = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size - 1, **made)

        def kernel() -> Tensor:
            layer = nn.Conv2d(out_channels, out_channels, kernel_size, bias=False, **made)
            return layer.weight.data

        A = kernel() if use_A else None
        B = kernel() if use_B else None
        self._register_matrices(A, B)
        self.g = nn.Parameter(torch.ones((), **made))
        self.h = nn.Parameter(torch.ones((), **made))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H + 2 p, W + 2 p)."""
        bias = self.U(x)
        batched = bias if bias.dim() == 4 else bias.unsqueeze(0)
        A, B = self._masked("A"), self._masked("B")
        wide = self._widened(batched, A, B)
        g, h = self.g.to(wide.dtype), self.h.to(wide.dtype)
        ring = self.kernel_size // 2

        unit_a, unit_b = _unit(A), _unit(B)
        if torch.compiler.is_compiling():
            z = self._recorded(wide, ring, unit_a, unit_b, g, h)
            return z.to(bias.dtype).reshape(bias.shape)

        def prepare() -> ConvOperator:
            masks = self.A_mask, self.B_mask
            return ConvOperator(unit_a, unit_b, g, h, self.m, ring, wide, *masks)

        read = [self.A, self.B, self.A_mask, self.B_mask, self.g, self.h]
        operator = self._prepared_operator(read, wide, prepare)
        z = self._solve(operator, wide, ConvWeights, ConvExtra(self.m), unit_a, unit_b, g, h)
        return z.to(bias.dtype).reshape(bias.shape)


def _unit(kernel: Tensor | None) -> Tensor | None:
    """Of Frobenius norm 1; a kernel that is all zeros stays so, with a gradient of zero."""
    if kernel is None:
        return None
    norm = kernel.norm()
    return torch.where(norm > 0, kernel / torch.where(norm > 0, norm, 1.0), 0.0 * kernel)
