"""Equilibria of monotone operator networks: one call, and the textbook loop of torch's ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import (
    GPU_EQUILIBRIA,
    GPU_EQUILIBRIUM_CONV,
    GPU_EQUILIBRIUM_OVER_LOOP,
    GPU_EQUILIBRIUM_TOL,
)
from bench.cuda.session import Row, Session, aim, check_close, strict_float32
from fastprune.ops.mon_fourier import pack_blocks, solve_maps
from fastprune.ops.mon_operator import LinearOperator, LinearStructure, Settings, Solution
from fastprune.reference.mon_splitting import conv_blocks

LOOP = "loop of torch ops"
MOST = 50
Map = Callable[[Tensor], Tensor]


def torch_loop(multiply: Map, resolvent: Map, bias: Tensor, keep: Map) -> tuple[Tensor, int]:
    """Peaceman-Rachford with ReLU, as one writes it: two norms are waited for at every step."""
    z = u = torch.zeros_like(bias)
    iterations, residual = 0, float("inf")
    while residual > GPU_EQUILIBRIUM_TOL and iterations < MOST:
        half = 2 * z - u
        u = 2 * resolvent(half + bias) - half
        new = keep(torch.relu(u))
        residual = (new - z).norm().item() / (1e-6 + new.norm().item())
        z, iterations = new, iterations + 1
    return keep(torch.relu(multiply(z) + bias)), iterations


def compare(
    session: Session,
    row: Row,
    solve: Callable[[], Solution],
    loop: Callable[[], tuple[Tensor, int]],
) -> None:
    """Both, and that they agree; neither prepares its matrices in the time."""
    solution, (expected, iterations) = solve(), loop()
    row["iterations"] = int(solution.iterations)
    check_close(row, solution.out, expected, torch.float32, tf32=False)
    if row["iterations"] != iterations:
        row["wrong"] = f"{row['iterations']} iterations, expected {iterations}"
    session.time(row, {"fastprune": [solve], LOOP: [loop]}, launched=(LOOP,))


def linear(session: Session, row: Row, n: int, batch: int) -> None:
    """Fully connected, A and B pruned alike."""
    like = session.randn((batch, n), torch.float32, 1)
    whole = row["sparsity"] == 0.0
    masks = [session.mask((n, n), row["density"], seed) for seed in (2, 3)]
    # Entries that keep their size while fewer are left would make W small.
    scale = (0.25 / max(n * row["density"], 1.0)) ** 0.5
    a, b = (
        torch.where(m, session.randn((n, n), torch.float32, seed) * scale, 0.0)
        for m, seed in zip(masks, (4, 5), strict=True)
    )
    kept = (None, None) if whole else (masks[0], masks[1])
    operator = LinearOperator(a, b, 1.0, n, like, LinearStructure(n, True, True, *kept))
    settings = Settings("relu", "pr", 1.0, GPU_EQUILIBRIUM_TOL, MOST, False)
    w = operator.w
    v = torch.linalg.inv(2.0 * torch.eye(n, device=w.device) - w)
    compare(
        session,
        row,
        lambda: operator.solve(like, settings),
        lambda: torch_loop(lambda z: z @ w.t(), lambda z: z @ v.t(), like, lambda z: z),
    )


def convolution(session: Session, row: Row, channels: int, size: int, batch: int) -> None:
    """3 x 3, circular, the ring kept at zero."""
    bias = session.randn((batch, channels, size, size), torch.float32, 1)
    a, b = (session.randn((channels, channels, 3, 3), torch.float32, seed) for seed in (2, 3))
    one = torch.ones((), device=bias.device)
    blocks = conv_blocks(a / a.norm(), b / b.norm(), 1.0, one, one, (size, size))
    eye = torch.eye(channels, device=bias.device, dtype=blocks.dtype)
    inverse = torch.linalg.inv(2.0 * eye - blocks)
    packed, packed_inverse = (pack_blocks(m, (size, size)) for m in (blocks, inverse))

    def times(matrix: Tensor) -> Map:
        def multiply(z: Tensor) -> Tensor:
            f = torch.fft.rfft2(z).flatten(2).permute(2, 1, 0)
            y = (matrix @ f).permute(2, 1, 0)
            return torch.fft.irfft2(y.reshape(*z.shape[:3], size // 2 + 1), s=(size, size))

        return multiply

    inside = torch.zeros(size, size, device=bias.device)
    inside[1:-1, 1:-1] = 1.0
    tol = GPU_EQUILIBRIUM_TOL
    compare(
        session,
        row,
        lambda: solve_maps(bias, packed, packed_inverse, ring=1, tol=tol, max_iter=MOST),
        lambda: torch_loop(times(blocks), times(inverse), bias, lambda z: z * inside),
    )


def equilibria(session: Session) -> None:
    """Small and dense, larger and sparse, and a convolution."""
    strict_float32(False)
    dry = session.clock.dry
    for n, batch, sparsity in ((9, 3, 0.0), (40, 3, 0.95)) if dry else GPU_EQUILIBRIA:
        aims = aim(LOOP, GPU_EQUILIBRIUM_OVER_LOOP.get((n, batch)))
        facts = {"density": 1 - sparsity, "sparsity": sparsity, "dtype": "float32", "aims": aims}
        with session.row(f"n = {n}, batch {batch}", **facts) as row:
            if row is not None:
                linear(session, row, n, batch)
    channels, size, batch = (3, 6, 2) if dry else GPU_EQUILIBRIUM_CONV
    case = f"{channels} channels, {size} x {size}, batch {batch}"
    with session.row(case, sparsity=0.0, dtype="float32") as row:
        if row is not None:
            convolution(session, row, channels, size, batch)
