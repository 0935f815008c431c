"""Plans: what the compiled side keeps of a pattern between calls."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprune import _C
from fastprune.ops.backend import has_kernel

if TYPE_CHECKING:
    from fastprune.ops.pattern import Pattern

_epochs = itertools.count(1)
_lock = threading.Lock()

# Layouts of a result, as in csrc/ops/product.h.
CONTIGUOUS, LIKE_INPUT, BATCH_LAST = 0, 1, 2

# Part of a version, as in csrc/ops/plan.h: the weight is read whatever is kept. The forward passes
# of training do: weights change there anyway, and not only where a version counter sees it.
READ_ANEW = 1 << 62


class Plan:
    """The number of a compiled plan, made when first asked for and released with this object.

    A copy starts empty: a plan keeps the values of one weight, and copies are made to differ.
    """

    __slots__ = ("__weakref__", "_id", "_last", "_trained")

    def __init__(self) -> None:
        self._id = 0
        self._last: tuple[Any, int] | None = None
        self._trained = False

    def number(self, pattern: Pattern) -> int:
        """The plan of ``pattern``, which is checked and copied at the first call."""
        return self._id or self._make(pattern)

    def _make(self, pattern: Pattern) -> int:
        taps = pattern.shape[2] * pattern.shape[3] if len(pattern.shape) == 4 else 1
        shape = [pattern.shape[0], pattern.groups, pattern.shape[1], taps]
        with _lock:
            if not self._id:
                made = torch.ops.fastprune.make_plan(
                    pattern.row_ptr,
                    pattern.offset,
                    pattern.transposed_row_ptr,
                    pattern.transposed_offset,
                    [*shape, pattern.block_depth, pattern.transposed_block_depth],
                )
                weakref.finalize(self, _C.release_plan, made).atexit = False
                self._id = made
        return self._id

    def version(self, weight: Tensor, training: bool = False) -> int:
        """A number that changes whenever ``weight`` is another tensor or was changed in place.

        Also between a call in training and one that is not: torch's fused optimizers do not count.
        """
        last = self._last
        trained, self._trained = self._trained, training
        if last is None or last[0]() is not weight or (trained and not training):
            last = self._last = (weakref.ref(weight), next(_epochs) % (1 << 29) << 32)
        try:
            return last[1] | weight._version & 0xFFFFFFFF
        except RuntimeError:  # an inference tensor counts no changes
            return -1

    def forget(self) -> None:
        """Let go of the last weight; its values are read anew at the next call."""
        self._last = None

    def nbytes(self) -> int:
        """Bytes that the compiled side holds now."""
        return max(_C.plan_bytes(self._id), 0) if self._id else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return Plan()

    def __reduce__(self) -> tuple[type[Plan], tuple[()]]:
        return Plan, ()


_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_tracing = getattr(torch._C, "_get_tracing_state", lambda: None)


def planned(x: Tensor, weight: Tensor, pattern: Pattern) -> bool:
    """Whether a call goes through its plan: eager, where there are kernels for plans, not recorded.

    On the CPU there always are; on a GPU where the build has them for this kind of layer. A
    recorded call must not hold a plan's number, which means nothing in another process.
    """
    device = weight.device.type
    return (
        not torch.compiler.is_compiling()  # first: the compiler cannot look into what follows
        and pattern.plan is not None
        and type(x) in (Tensor, torch.nn.Parameter)
        and type(weight) in (Tensor, torch.nn.Parameter)
        and has_kernel("planned_linear" if weight.dim() == 2 else "planned_conv2d", device)
        and not _modes()
        and _tracing() is None
    )


def tf32(x: Tensor) -> bool:
    """Whether products of ``x`` may round their factors to tf32: as torch's own on this device."""
    if x.dtype is not torch.float32 or x.device.type != "cuda":
        return False
    # The older setting cannot be read where the newer one (torch 2.9) was used.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if precision == "none":
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return bool(precision == "tf32")
