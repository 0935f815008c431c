"""Packed sparsity patterns: a mask is packed once, and every product then reads the pattern."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastprune.ops.plan import Plan

# Activations of one block of columns take 32 KB at 128 columns of 64 floats, and stay in the L1
# cache. Sparser rows take wider blocks, so that a row still finds about 16 entries in each.
_BLOCK_COLS = (128, 1024)
_ENTRIES_PER_BLOCK = 16
# A convolution's panel holds whole rows of a map: with many more columns it outgrows the L2 cache,
# or its layout, and the product takes two to three times.
_CONV_COLS = (144, 320)
_CONV_ENTRIES = 19
_POINTWISE_COLS = (128, 256)
# On CUDA, what fits a multiprocessor's shared memory twice; the kernels cut further where a tile
# needs more room. (csrc/kernels/cuda/panel.h)
_CUDA_COLS = 192
_CUDA_CONV_COLS = 288
_MAX_BLOCK_COLS = 32767
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


class Pattern(NamedTuple):
    """The packed form of a weight's mask, made by :func:`pack`; treat it as read-only.

    Every op that is given a pattern checks all its bounds and offsets before use.

    Attributes:
        row_ptr, offset: the entries for the forward product, int64 and int16.
        transposed_row_ptr, transposed_offset: the same entries for the input gradient.
        block_depth, transposed_block_depth: input (output) channels per block.
        shape: the weight's shape, (out, in) or (out, in / groups, height, width).
        groups: convolution groups.
        nnz: number of entries kept.
        plan: what eager calls on the CPU keep between them (checked, sorted entries; the values of
            the last weight); made at the first call. None: nothing is kept.
    """

    row_ptr: Tensor
    offset: Tensor
    transposed_row_ptr: Tensor
    transposed_offset: Tensor
    block_depth: int
    transposed_block_depth: int
    shape: tuple[int, ...]
    groups: int
    nnz: int
    plan: Plan | None = None

    def nbytes(self) -> int:
        """Bytes that the pattern occupies, both orders together, and its plan."""
        own = sum(t.numel() * t.element_size() for t in self if isinstance(t, Tensor))
        return own + (self.plan.nbytes() if self.plan is not None else 0)

    def to(self, device: torch.device | str) -> Pattern:
        """The pattern with its tensors on another device."""
        return self._replace(
            row_ptr=self.row_ptr.to(device),
            offset=self.offset.to(device),
            transposed_row_ptr=self.transposed_row_ptr.to(device),
            transposed_offset=self.transposed_offset.to(device),
            plan=Plan(),
        )


def block_depth(depth: int, taps: int, density: float, conv: bool) -> int:
    """Channels per block for rows of ``depth`` channels with ``taps`` kernel positions each."""
    low, high = _BLOCK_COLS
    entries = _ENTRIES_PER_BLOCK
    if conv and taps == 1:
        low, high = _POINTWISE_COLS
    elif conv:
        (low, high), entries = _CONV_COLS, _CONV_ENTRIES
    cols = min(max(entries / max(density, 1e-9), low), high)
    return max(1, min(int(cols) // taps, _MAX_BLOCK_COLS // taps, depth))


def cuda_block_depth(depth: int, taps: int) -> int:
    """The same on CUDA, whatever the density: so a mask is packed without being counted first."""
    cols = _CUDA_COLS if taps == 1 else _CUDA_CONV_COLS
    return max(1, min(cols // taps, depth))


def has_cuda_kernel(op: str) -> bool:
    """Whether this build has a CUDA kernel of ``op``; else the plain-torch reference stands in."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastprune::{op}", "CUDA")


_pack_on_cuda = has_cuda_kernel("pack_pattern")


def pack(mask: Tensor, *, groups: int = 1) -> Pattern:
    """Pack the mask of a linear or 2-d convolution weight for the sparse products.

    Args:
        mask: bool tensor shaped like the weight, (out, in) or (out, in / groups, height, width);
            True where the weight is kept. Any device; packed there on CPU and CUDA (which waits for
            the GPU once), else on the CPU.
        groups: convolution groups; 1 for a linear weight.
    Returns:
        A :class:`Pattern` on the mask's device: 4 bytes per kept weight, plus 8 bytes per row and
        block of about 128 columns. It does not follow later changes of ``mask``.
    Raises:
        TypeError: ``mask`` is not a bool tensor.
        ValueError: ``mask`` is neither 2-d nor 4-d, ``groups`` does not divide its rows, or a
            kernel has more than 32767 positions.
    Two passes over the mask.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, got {got}")
    if mask.dim() not in (2, 4):
        raise ValueError(f"mask: expected 2 or 4 dimensions, got shape {tuple(mask.shape)}")
    rows = mask.shape[0]
    if groups < 1 or rows % groups:
        raise ValueError(f"groups: expected a positive divisor of the {rows} rows, got {groups}")
    if mask.dim() == 2 and groups != 1:
        raise ValueError(f"groups: expected 1 for a linear weight, got {groups}")
    depth, taps = mask.shape[1], mask.shape[2] * mask.shape[3] if mask.dim() == 4 else 1
    if taps < 1 or taps > _MAX_BLOCK_COLS:
        raise ValueError(f"mask: expected 1 to {_MAX_BLOCK_COLS} kernel positions, got {taps}")
    on_cuda = mask.device.type == "cuda" and _pack_on_cuda
    flat = (mask.detach() if on_cuda else mask.detach().to("cpu")).reshape(rows, depth * taps)
    if on_cuda:
        blocks = cuda_block_depth(depth, taps), cuda_block_depth(rows // groups, taps)
    else:
        density = int(flat.count_nonzero()) / max(flat.numel(), 1)
        conv = mask.dim() == 4
        blocks = (
            block_depth(depth, taps, density, conv),
            block_depth(rows // groups, taps, density, conv),
        )
    row_ptr, offset, row_ptr_t, offset_t = torch.ops.fastprune.pack_pattern(
        flat, groups, taps, *blocks
    )
    shape, nnz = tuple(mask.shape), offset.numel()
    pattern = Pattern(row_ptr, offset, row_ptr_t, offset_t, *blocks, shape, groups, nnz, Plan())
    return pattern if flat.device == mask.device else pattern.to(mask.device)


def as_pattern(mask: Tensor | Pattern, weight: Tensor, groups: int = 1) -> Pattern:
    """A pattern for ``weight``: packs a mask, and checks that mask or pattern fits the weight."""
    if isinstance(mask, Tensor):
        if mask.shape != weight.shape:
            raise ValueError(
                f"mask: expected the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
            )
        if mask.device != weight.device:
            raise ValueError(f"mask: expected device {weight.device}, got {mask.device}")
        return pack(mask, groups=groups)._replace(plan=None)  # used once
    if not isinstance(mask, Pattern):
        raise TypeError(f"mask: expected a bool tensor or a Pattern, got {type(mask).__name__}")
    if mask.shape != tuple(weight.shape) or mask.groups != groups:
        raise ValueError(
            f"mask: expected a pattern of shape {tuple(weight.shape)} with groups={groups}, got "
            f"shape {mask.shape} with groups={mask.groups}"
        )
    return mask


_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast floating arguments as autocast does for torch's own linear and convolution."""
    if not _any_autocast():
        return x, weight, bias
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta knows no autocast
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), cast(weight), None if bias is None else cast(bias)


# In an autograd.Function's forward nothing is recorded: this guard, which torch.library uses for
# the same purpose, skips the op's own autograd kernel. That one is Python, and costs 10 us a call.
below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def recorder(function: type[torch.autograd.Function], op: Any) -> Any:
    """How to call an op: through its Function where a gradient may be recorded eagerly."""
    if torch.compiler.is_compiling():
        return op
    return function.apply if torch.is_grad_enabled() or _forward_mode() else op


def needs_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd has anything to record, or to refuse."""
    wanted = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return (wanted and torch.is_grad_enabled()) or _forward_mode()


def _forward_mode() -> bool:
    # The Functions have no jvp and say so; the ops would drop the tangents.
    return bool(getattr(forward_ad, "_current_level", -1) >= 0)


def check_operands(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The checks that linear and convolution share: types, devices, the bias's shape."""
    if (  # the usual case, in one go: small calls cost as much as their checks
        x.dtype is weight.dtype
        and x.dtype in _DTYPES
        and x.device == weight.device
        and (
            bias is None or (bias.dtype is x.dtype and bias.device == x.device and bias.dim() == 1)
        )
        and (bias is None or bias.shape[0] == weight.shape[0])
    ):
        return
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.dtype != x.dtype:
            raise TypeError(f"{op}: {name}: expected the dtype of x, {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name}: expected the device of x, {x.device}, got {t.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}"
        )


def check_weight_grad(op: str, weight_grad: str) -> bool:
    """True for a dense weight gradient, False for one sampled at the mask."""
    if weight_grad not in ("sampled", "dense"):
        raise ValueError(f"{op}: weight_grad: expected 'sampled' or 'dense', got {weight_grad!r}")
    return weight_grad == "dense"


class ApplyMask(torch.autograd.Function):
    """``weight`` with exact zeros outside ``mask``; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        """One read of both, one write."""
        ctx.save_for_backward(mask)
        kept: Tensor = torch.ops.fastprune.apply_mask(weight, mask)
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient at the mask."""
        (mask,) = ctx.saved_tensors
        return ApplyMask.apply(grad, mask), None  # differentiable again


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """W * M as a dense tensor, differentiable; a NaN outside the mask does not survive."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(mask, weight, 0.0)
    return ApplyMask.apply(weight, mask)  # type: ignore[no-any-return]


@torch.library.register_fake("fastprune::apply_mask")
def _(values: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(values)


@torch.library.register_fake("fastprune::pack_pattern")
def _(
    mask: Tensor, groups: int, taps: int, block_depth: int, transposed_block_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, depth = mask.shape[0], mask.shape[1] // taps
    rows_t, depth_t = groups * depth, rows // groups
    blocks = (depth + block_depth - 1) // block_depth
    blocks_t = (depth_t + transposed_block_depth - 1) // transposed_block_depth
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        mask.new_empty(blocks * rows + 1, dtype=torch.int64),
        mask.new_empty(nnz, dtype=torch.int16),
        mask.new_empty(blocks_t * rows_t + 1, dtype=torch.int64),
        mask.new_empty(nnz, dtype=torch.int16),
    )
