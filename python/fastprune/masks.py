"""Masks: which weights of a network remain.

A :class:`Masks` maps parameter names to bool tensors of the weights' shapes, True where a weight is
kept. It never changes once made, so that it can be compared, hashed, saved and shared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastprune import masks_io, masks_model
from fastprune.masks_summary import LayerSummary, MasksSummary

if TYPE_CHECKING:
    from fastprune.pruners.targets import Selection

__all__ = ["LayerSummary", "Masks", "MasksSummary"]


class Masks(Mapping[str, Tensor]):
    """An immutable mapping from parameter name to bool tensor, True where the weight is kept.

    The tensors are private: they are copied on the way in and ``masks[name]`` hands out a copy, so
    nothing that a caller does to a tensor changes a mask. Iteration follows the order given, which
    is that of ``named_parameters()`` for masks made by :func:`fastprune.prune`.

    Equality and hash look at names, shapes and bits; neither order nor device counts. ``a & b``,
    ``a | b``, ``a - b``, ``a ^ b`` and ``~a`` act on the sets of kept weights; both sides need the
    same names and shapes, the result takes order and devices from the left one.

    Args:
        masks: a mapping of parameter names to bool tensors; another ``Masks`` will do.
    Raises:
        TypeError: ``masks`` is not a mapping, a name is not a string, a value is not a tensor.
        ValueError: a name is empty, or a tensor is not bool; the message names it.

    Cost: one byte per weight.
    """

    __slots__ = ("_digest", "_masks")
    _masks: dict[str, Tensor]
    _digest: str | None

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        own: dict[str, Tensor] = {}
        for name, mask in readable(masks).items():
            # Expanded or strided views become plain ones; inference tensors become normal ones.
            with torch.inference_mode(False):
                own[name] = mask.detach().clone(memory_format=torch.contiguous_format)
        self._masks = own
        self._digest = None

    @classmethod
    def of(cls, masks: Mapping[str, Tensor]) -> Masks:
        """``masks`` itself if it is a ``Masks`` already, else ``Masks(masks)``."""
        return masks if isinstance(masks, cls) else cls(masks)

    @classmethod
    def ones(cls, model: nn.Module, include: Selection = None, exclude: Selection = None) -> Masks:
        """Masks that keep every prunable weight of ``model``.

        Args:
            model: any module; its weights are only looked at for their shape and device.
            include, exclude: names, patterns or types, as in :func:`fastprune.prune`.
        """
        return cls._from_weights(model, include, exclude, lambda w: w.new_ones(w.shape).bool())

    @classmethod
    def from_zeros(
        cls, model: nn.Module, include: Selection = None, exclude: Selection = None
    ) -> Masks:
        """Masks read off a pruned model: False where a prunable weight is exactly 0 (or -0).

        NaN is not zero, so a NaN weight counts as kept. Arguments as in :meth:`ones`.
        """
        return cls._from_weights(model, include, exclude, lambda w: w != 0)

    @classmethod
    def _from_weights(
        cls,
        model: nn.Module,
        include: Selection,
        exclude: Selection,
        mark: Callable[[Tensor], Tensor],
    ) -> Masks:
        from fastprune.pruners.targets import prunable  # the pruners build on this module

        return cls({n: mark(p.detach()) for n, p in prunable(model, include, exclude).items()})

    # -- mapping ---------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} tensors, {self.nnz():,} of {self.numel():,} weights kept, "
            f"sparsity {self.sparsity():.4f})"
        )

    # -- counts ----------------------------------------------------------------------------------

    def numel(self) -> int:
        """Number of weights that the masks cover, kept or not."""
        return sum(m.numel() for m in self._masks.values())

    def nnz(self) -> int:
        """Number of weights kept."""
        return sum(int(m.sum()) for m in self._masks.values())

    def density(self) -> float:
        """Kept fraction, nnz / numel; 1.0 where there is nothing to keep."""
        return self.nnz() / self.numel() if self.numel() else 1.0

    def sparsity(self) -> float:
        """Pruned fraction, (numel - nnz) / numel; 0.0 where there is nothing to prune."""
        return (self.numel() - self.nnz()) / self.numel() if self.numel() else 0.0

    def summary(self) -> MasksSummary:
        """Per-layer counts; ``str()`` of the result is a table."""
        return MasksSummary(
            tuple(
                LayerSummary(name, tuple(m.shape), m.numel(), int(m.sum()))
                for name, m in self._masks.items()
            )
        )

    # -- use -------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of ``model`` to exactly 0, in place.

        All or nothing: every name, shape and device is checked, and every mask moved to its
        weight's device, before the first write. A NaN or inf at a pruned position becomes 0 too.
        Kept weights, gradients and everything else stay as they are, bit for bit.

        Args:
            model: a module whose ``named_parameters()`` hold every name; any of the names of a
                shared parameter will do.
        Raises:
            ValueError: a name is not a parameter of ``model``, its shape differs, or it cannot be
                written to (on ``meta``, expanded, an inference tensor, not floating point).
        """
        pairs = []
        for name, weight, mask in masks_model.match(model, self._masks):
            if (reason := masks_model.unwritable(weight)) is not None:
                raise ValueError(f"masks[{name!r}]: the parameter {reason}")
            pairs.append((weight, ~mask.to(weight.device)))
        for weight, pruned in pairs:
            weight.masked_fill_(pruned, 0)

    def to(self, device: torch.device | str | int) -> Masks:
        """The same masks on ``device``; ``self`` is left as it is."""
        return Masks({n: m.to(device) for n, m in self._masks.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to ``path`` as a safetensors file, atomically.

        The bytes go to a temporary file in the same folder, are forced to disk, and take the name
        ``path`` in one step: whatever happens, ``path`` holds the old file or the whole new one.
        On an error the temporary file is removed. A checksum goes into the file's metadata.

        Raises:
            OSError: the file cannot be written (no such folder, disk full, ...).
            ValueError: a mask is named ``__metadata__``, which the format reserves.
        """
        masks_io.save(self._masks, self.digest(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read masks that :meth:`save` wrote, onto the CPU.

        Raises:
            ValueError: the file is truncated, altered, or not a file of masks; the message names
                ``path``. The checksum covers names, shapes and bits, so a damaged file never
                passes for another mask.
            OSError: ``path`` cannot be read.
        """
        tensors, checksum = masks_io.load(path)
        masks = cls(tensors)
        if masks.digest() != checksum:
            raise ValueError(f"{os.fspath(path)}: the checksum does not match: the file is damaged")
        return masks

    # -- comparison ------------------------------------------------------------------------------

    def digest(self) -> str:
        """SHA-256 of names, shapes and bits, in hexadecimal: the same in every process.

        Neither order nor device counts. Computed once.
        """
        if self._digest is None:
            self._digest = masks_io.digest(self._masks)
        return self._digest

    def __hash__(self) -> int:
        return int(self.digest()[:15], 16)  # 60 bits: hash() reduces larger ones modulo 2^61 - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        if self._masks.keys() != other._masks.keys():
            return False
        pairs = [(m, other._masks[n]) for n, m in self._masks.items()]
        return all(a.shape == b.shape for a, b in pairs) and all(
            torch.equal(a, b.to(a.device)) for a, b in pairs
        )

    # -- set operations --------------------------------------------------------------------------

    def _combine(self, other: object, sign: str, op: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        if not isinstance(other, Mapping):
            raise TypeError(f"{sign}: expected Masks on the right, got {type(other).__name__}")
        right = Masks.of(other)._masks
        if names := sorted(self._masks.keys() ^ right.keys()):
            raise ValueError(f"{sign}: both sides need the same names; on one side only: {names}")
        for name, mask in self._masks.items():
            if mask.shape != right[name].shape:
                raise ValueError(
                    f"{sign}: {name!r} is {tuple(mask.shape)} on the left and "
                    f"{tuple(right[name].shape)} on the right"
                )
        return Masks({n: op(m, right[n].to(m.device)) for n, m in self._masks.items()})

    def __and__(self, other: Mapping[str, Tensor]) -> Masks:
        return self._combine(other, "&", torch.logical_and)

    def __or__(self, other: Mapping[str, Tensor]) -> Masks:
        return self._combine(other, "|", torch.logical_or)

    def __xor__(self, other: Mapping[str, Tensor]) -> Masks:
        return self._combine(other, "^", torch.logical_xor)

    def __sub__(self, other: Mapping[str, Tensor]) -> Masks:
        return self._combine(other, "-", lambda a, b: a & ~b)

    def __invert__(self) -> Masks:
        return Masks({n: ~m for n, m in self._masks.items()})


def readable(masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of ``masks`` themselves, checked and not copied: for reading only."""
    if isinstance(masks, Masks):
        return masks._masks
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"masks: expected a mapping of parameter names to bool tensors, got "
            f"{type(masks).__name__}"
        )
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise TypeError(f"masks: names must be strings, got {name!r}")
        if not name:
            raise ValueError("masks: a name is empty")
        if not isinstance(mask, Tensor):
            raise TypeError(f"masks[{name!r}]: expected a bool tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise ValueError(f"masks[{name!r}]: expected dtype torch.bool, got {mask.dtype}")
        if mask.layout != torch.strided or mask.device.type == "meta":
            raise ValueError(
                f"masks[{name!r}]: expected a strided tensor with data, got "
                f"{mask.layout} on {mask.device}"
            )
    return masks
