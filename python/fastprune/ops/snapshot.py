"""Whether tensors still are what something was prepared from."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Up to this many elements a copy is kept and compared: cheaper than any solve.
_COPIED = 1 << 17
_PROBES = 32


class _Seen:
    """One tensor as it was."""

    def __init__(self, t: Tensor) -> None:
        self.ref = weakref.ref(t)
        self.version = -1 if t.is_inference() else t._version
        self.whole = t.numel() <= _COPIED
        self.copy = t.detach().clone() if self.whole else self._probes(t)

    @staticmethod
    def _probes(t: Tensor) -> Tensor:
        flat = t.detach().reshape(-1)
        return flat[:: max(flat.numel() // _PROBES, 1)].clone()

    def is_same(self, t: Tensor) -> bool:
        if self.copy.dtype != t.dtype or self.copy.device != t.device:
            return False
        if self.whole:
            return torch.equal(t, self.copy)
        version = -1 if t.is_inference() else t._version
        # Fused optimizers write without counting: probes see them, and while gradients are
        # recorded, which is when optimizers run, a large tensor is never taken for unchanged.
        return (
            self.ref() is t
            and version == self.version
            and not (torch.is_grad_enabled() and t.requires_grad)
            and torch.equal(self._probes(t), self.copy)
        )


class Snapshot:
    """Tensors and a plain value, as they were when this was made."""

    def __init__(self, tensors: Sequence[Tensor | None], context: Any) -> None:
        self._seen = [None if t is None else _Seen(t) for t in tensors]
        self._context = context

    def matches(self, tensors: Sequence[Tensor | None], context: Any) -> bool:
        """Whether nothing has changed. NaN is never the same: what holds one is prepared anew."""
        if context != self._context:
            return False
        for seen, t in zip(self._seen, tensors, strict=True):
            if (seen is None) != (t is None):
                return False
            if seen is not None and t is not None and not seen.is_same(t):
                return False
        return True
