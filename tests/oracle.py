"""Error bounds, exact references and guarded memory for the kernel tests.

S is the sum of |a||b| over the terms of one output, n the number of terms, u = 2^-24.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def assert_within(y: Tensor, exact: np.ndarray, s: np.ndarray, n: np.ndarray, what: str) -> None:
    """Every element of y within the hard bound of its dtype around the exact value."""
    assert y.shape == exact.shape, f"{what}: shape {tuple(y.shape)}, expected {exact.shape}"
    got = y.detach().double().numpy().astype(np.longdouble)
    terms = (n + 2) * s
    if y.dtype == torch.float32:
        bound = terms * 2.0**-24
    elif y.dtype == torch.float64:
        bound = terms * np.longdouble(2) ** -53
    elif y.dtype == torch.bfloat16:
        bound = np.abs(exact) * 2.0**-8 + terms * 2.0**-24 + 2.0**-134
    else:
        bound = np.abs(exact) * 2.0**-11 + terms * 2.0**-24 + 2.0**-25
    # An exact zero (no terms) may carry no error at all; a denormal step covers the underflow.
    error = np.abs(got - exact)
    bad = ~(error <= bound + np.longdouble(1e-45) * (terms > 0))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.size} wrong, first at {at}: got {got[at]}, "
            f"exact {exact[at]}, bound {bound[at]}"
        )


def wide(t: Tensor) -> np.ndarray:
    """The values in extended precision."""
    return t.detach().double().numpy().astype(np.longdouble)


def linear_exact(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, S and n of the masked linear product."""
    w = wide(torch.where(mask, weight, 0))
    y, s = wide(x) @ w.T, np.abs(wide(x)) @ np.abs(w).T
    n = np.broadcast_to(mask.sum(1).numpy(), y.shape)
    if bias is not None:
        y, s, n = y + wide(bias), s + np.abs(wide(bias)), n + 1
    return y, s, n


def columns(x: Tensor, kernel: tuple[int, int], geometry: dict[str, tuple[int, int]]) -> Tensor:
    """im2col: (batch, channels, taps, points), in float64."""
    batch, channels = x.shape[:2]
    cols = F.unfold(
        x.detach().double(),
        kernel,
        dilation=geometry["dilation"],
        padding=geometry["padding"],
        stride=geometry["stride"],
    )
    return cols.view(batch, channels, kernel[0] * kernel[1], cols.shape[-1])


def conv_exact(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    geometry: dict[str, tuple[int, int]],
    groups: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y (batch, out, points), S and n of the masked convolution."""
    out, depth, kh, kw = weight.shape
    cols = columns(x, (kh, kw), geometry).numpy().astype(np.longdouble)
    batch, points = cols.shape[0], cols.shape[-1]
    w = wide(torch.where(mask, weight, 0)).reshape(groups, out // groups, depth * kh * kw)
    grouped = cols.reshape(batch, groups, depth * kh * kw, points)
    y = np.einsum("gok,bgkp->bgop", w, grouped).reshape(batch, out, points)
    s = np.einsum("gok,bgkp->bgop", np.abs(w), np.abs(grouped)).reshape(batch, out, points)
    n = np.broadcast_to(mask.flatten(1).sum(1).numpy()[None, :, None], y.shape)
    if bias is not None:
        b = wide(bias)[None, :, None]
        y, s, n = y + b, s + np.abs(b), n + 1
    return y, s, n


def integers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Small integers: every sum of a few hundred products is exact in float32."""
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(t: Tensor, at_end: bool = True) -> Tensor:
    """A contiguous copy whose memory touches an unreadable page at its end (or at its start).

    A kernel that reads one byte past that edge dies on the spot.
    """
    t = t.contiguous()
    if t.numel() == 0:
        return t
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    pages = max(1, -(-size // page))
    memory = mmap.mmap(-1, (pages + 2) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (base, base + (pages + 1) * page):
        assert _libc.mprotect(guard, page, 0) == 0
    start = page + (pages * page - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start)
    flat.copy_(t.flatten())
    return flat.view(t.shape)
