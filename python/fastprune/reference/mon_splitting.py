"""Oracle for the equilibrium solves of monotone operator networks: the textbook loops.

Winston and Kolter 2020, Algorithms 1 and 2 and their adjoints, in plain torch, with the same
start, order of steps and stopping rule as the kernels. Maps of convolutions are multiplied in
space and inverted in the Fourier domain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Map] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "identity": lambda x: x,
}


class Operator(NamedTuple):
    """W, as the loops use it; ``ring``: width of the border of a map that is kept at zero."""

    multiply: Map
    multiply_transposed: Map
    resolvent: Callable[[float], Map]  # of alpha: ((1 + alpha) I - alpha W)^-1
    resolvent_transposed: Callable[[float], Map]
    ring: int = 0


class Solution(NamedTuple):
    """``out``: one more application after the last iterate ``z``."""

    out: Tensor
    z: Tensor
    iterations: Tensor
    residual: Tensor


def linear_matrix(A: Tensor | None, B: Tensor | None, m: float, n: int, like: Tensor) -> Tensor:
    """W = (1 - m) I - A^T A + B - B^T, dense."""
    w = (1.0 - m) * torch.eye(n, dtype=like.dtype, device=like.device)
    if A is not None:
        w = w - A.t() @ A
    if B is not None:
        w = w + B - B.t()
    return w


def linear_operator(w: Tensor) -> Operator:
    """The operator of a dense W, for batches of rows."""
    eye = torch.eye(w.shape[0], dtype=w.dtype, device=w.device)

    def resolvent(matrix: Tensor) -> Callable[[float], Map]:
        def of(alpha: float) -> Map:
            v = torch.linalg.inv((1.0 + alpha) * eye - alpha * matrix)
            return lambda z: z @ v.t()

        return of

    return Operator(lambda z: z @ w.t(), lambda z: z @ w, resolvent(w), resolvent(w.t()))


def circular_conv(z: Tensor, kernel: Tensor) -> Tensor:
    """``kernel`` (n, n, k, k), k odd, over maps that wrap around."""
    return F.conv2d(_wrapped(z, kernel.shape[-1] // 2), kernel)


def circular_conv_transposed(z: Tensor, kernel: Tensor) -> Tensor:
    """The adjoint of :func:`circular_conv`."""
    return F.conv2d(_wrapped(z, kernel.shape[-1] // 2), kernel.flip(2, 3).transpose(0, 1))


def _wrapped(z: Tensor, p: int) -> Tensor:
    """Circular padding of any width, which F.pad refuses beyond the map's size."""
    rows = torch.arange(-p, z.shape[2] + p, device=z.device) % z.shape[2]
    columns = torch.arange(-p, z.shape[3] + p, device=z.device) % z.shape[3]
    return z[:, :, rows][:, :, :, columns]


def conv_operator(
    A: Tensor | None, B: Tensor | None, m: float, g: Tensor, h: Tensor, size: tuple[int, int]
) -> Operator:
    """W = (1 - m) I - g A'^T A' + h (B' - B'^T) on maps of ``size``, the ring included."""
    present = A if A is not None else B
    unit_a = None if A is None else A / A.norm()
    unit_b = None if B is None else B / B.norm()

    def apply(z: Tensor, sign: float) -> Tensor:
        y = (1.0 - m) * z
        if unit_a is not None:
            y = y - g * circular_conv_transposed(circular_conv(z, unit_a), unit_a)
        if unit_b is not None:
            skew = circular_conv(z, unit_b) - circular_conv_transposed(z, unit_b)
            y = y + sign * h * skew
        return y

    def resolvent(sign: float) -> Callable[[float], Map]:
        def of(alpha: float) -> Map:
            if present is None:
                return lambda z: z / (1.0 + alpha * m)
            blocks = conv_blocks(unit_a, unit_b, m, g, sign * h, size)
            eye = torch.eye(present.shape[0], dtype=blocks.dtype, device=blocks.device)
            v = torch.linalg.inv((1.0 + alpha) * eye - alpha * blocks)

            def invert(z: Tensor) -> Tensor:
                f = torch.fft.rfft2(z).flatten(2).permute(2, 1, 0)
                y = (v @ f).permute(2, 1, 0)
                half = y.reshape(*z.shape[:3], size[1] // 2 + 1)
                back: Tensor = torch.fft.irfft2(half, s=size)
                return back

            return invert

        return of

    ring = 0 if present is None else present.shape[-1] // 2
    return Operator(
        lambda z: apply(z, 1.0), lambda z: apply(z, -1.0), resolvent(1.0), resolvent(-1.0), ring
    )


def conv_blocks(
    unit_a: Tensor | None,
    unit_b: Tensor | None,
    m: float,
    g: Tensor,
    h: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """W per frequency of ``rfft2``: complex (frequencies, n, n)."""
    present = unit_a if unit_a is not None else unit_b
    assert present is not None
    eye = torch.eye(present.shape[0], dtype=present.dtype, device=present.device)
    w = ((1.0 - m) * eye).to(present.dtype.to_complex())
    if unit_a is not None:
        a = _frequencies(unit_a, size)
        w = w - g * (_adjoint(a) @ a)
    if unit_b is not None:
        b = _frequencies(unit_b, size)
        w = w + h * (b - _adjoint(b))
    return w


def _adjoint(blocks: Tensor) -> Tensor:
    """Conjugated in memory: a lazily conjugated view is misread inside of an op in a graph."""
    return torch.conj_physical(blocks).transpose(-2, -1)


def _frequencies(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The transfer function of a circular convolution: tap (y, x) shifts by (p - y, p - x)."""
    n, _, k, _ = kernel.shape
    p = k // 2
    at = kernel.new_zeros(n, n, *size)
    for y in range(k):
        for x in range(k):
            at[:, :, (p - y) % size[0], (p - x) % size[1]] += kernel[:, :, y, x]
    transfer: Tensor = torch.fft.rfft2(at)
    return transfer.flatten(2).permute(2, 0, 1)


def prox(x: Tensor, activation: str, alpha: float) -> Tensor:
    """The proximal operator, at step alpha, of the function whose operator at 1 is sigma.

    The root y of (1 - alpha) sigma(y) + alpha y = x, by bisection on a bracket, gives sigma(y).
    """
    sigma = ACTIVATIONS[activation]
    if alpha == 1.0 or activation in ("relu", "identity"):
        return sigma(x)
    # alpha y + (1 - alpha) sigma(y) increases by at least min(alpha, 1) per unit of y.
    span = (x.abs() + 2.0) / min(alpha, 1.0) + 2.0
    low, high = -span, span.clone()
    for _ in range(120):
        middle = 0.5 * (low + high)
        below = (1.0 - alpha) * sigma(middle) + alpha * middle < x
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return sigma(0.5 * (low + high))


def slope(out: Tensor, activation: str) -> Tensor:
    """sigma'(y), written in sigma(y)."""
    if activation == "relu":
        return (out > 0).to(out.dtype)
    if activation == "tanh":
        return 1.0 - out * out
    if activation == "sigmoid":
        return out * (1.0 - out)
    if activation == "softplus":
        return -torch.expm1(-out)
    return torch.ones_like(out)


def without_ring(z: Tensor, ring: int) -> Tensor:
    """Zeros in the border of every map."""
    if ring == 0:
        return z
    kept = torch.zeros_like(z)
    kept[:, :, ring:-ring, ring:-ring] = z[:, :, ring:-ring, ring:-ring]
    return kept


def solve(
    operator: Operator,
    bias: Tensor,
    activation: str = "relu",
    solver: str = "pr",
    alpha: float = 1.0,
    tol: float = 1e-5,
    max_iter: int = 50,
    per_sample: bool = False,
) -> Solution:
    """The equilibrium z = sigma(W z + bias)."""

    def finish(z: Tensor) -> Tensor:
        y = ACTIVATIONS[activation](operator.multiply(z) + bias)
        return without_ring(y, operator.ring)

    def step(x: Tensor) -> Tensor:
        return without_ring(prox(x, activation, alpha), operator.ring)

    if solver == "fb":

        def advance(z: Tensor) -> Tensor:
            return step((1.0 - alpha) * z + alpha * (operator.multiply(z) + bias))

        return _iterate(advance, finish, torch.zeros_like(bias), tol, max_iter, per_sample)
    return _iterate(
        _peaceman_rachford(operator.resolvent(alpha), alpha * bias, step),
        finish,
        torch.zeros_like(bias),
        tol,
        max_iter,
        per_sample,
    )


def adjoint(
    operator: Operator,
    grad: Tensor,
    slope: Tensor,
    solver: str = "pr",
    alpha: float = 1.0,
    tol: float = 1e-5,
    max_iter: int = 50,
    per_sample: bool = False,
    transposed: bool = True,
) -> Solution:
    """u = J (grad + W^T u), J = ``slope``; with ``transposed=False`` W in place of W^T."""
    slope = without_ring(slope, operator.ring)
    multiply = operator.multiply_transposed if transposed else operator.multiply
    scale = torch.where(slope == 0, 0.0, slope / (slope + alpha * (1.0 - slope)))

    def finish(u: Tensor) -> Tensor:
        return slope * (grad + multiply(u))

    if solver == "fb":

        def advance(u: Tensor) -> Tensor:
            return scale * ((1.0 - alpha) * u + alpha * (multiply(u) + grad))

        return _iterate(advance, finish, torch.zeros_like(grad), tol, max_iter, per_sample)
    resolvent = operator.resolvent_transposed if transposed else operator.resolvent
    return _iterate(
        _peaceman_rachford(
            resolvent(alpha), torch.zeros_like(grad), lambda u: scale * (u + alpha * grad)
        ),
        finish,
        torch.zeros_like(grad),
        tol,
        max_iter,
        per_sample,
    )


def _peaceman_rachford(resolvent: Map, shift: Tensor, prox: Map) -> Map:
    u = torch.zeros_like(shift)

    def advance(z: Tensor) -> Tensor:
        nonlocal u
        half = 2.0 * z - u
        u = 2.0 * resolvent(half + shift) - half
        return prox(u)

    return advance


def _iterate(
    advance: Map, finish: Map, z: Tensor, tol: float, max_iter: int, per_sample: bool
) -> Solution:
    count = torch.zeros(len(z) if per_sample else 1, dtype=torch.int64)
    residual = torch.full(count.shape, torch.inf, dtype=torch.float64)
    running = torch.ones(count.shape, dtype=torch.bool)
    for _ in range(max_iter):
        new = advance(z)
        change, norm = _norms(new - z, per_sample), _norms(new, per_sample)
        now = change / (1e-6 + norm)
        count += running
        residual = torch.where(running, now, residual)
        z = torch.where(running.view(-1, *[1] * (z.dim() - 1)).to(z.device), new, z)
        running &= (now > tol) & now.isfinite()
        if not running.any():
            break
    if not per_sample:
        count, residual = count[0], residual[0]
    return Solution(finish(z), z, count, residual)


def _norms(x: Tensor, per_sample: bool) -> Tensor:
    flat = x.reshape(len(x), -1) if per_sample else x.reshape(1, -1)
    norms: Tensor = flat.double().norm(dim=1)
    return norms.cpu()
