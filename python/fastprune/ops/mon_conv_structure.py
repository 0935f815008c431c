"""Which weights of a convolutional monotone operator layer exist, for its products in space."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from fastprune.ops.mon_operator import Entries, entries
from fastprune.ops.snapshot import Snapshot


class ConvStructure:
    """The patterns of A, A^T and K = h (B - B^T).

    Args:
        a_mask, b_mask: bool (n, n, k, k), or None: for a kernel that is not there.
    """

    def __init__(self, a_mask: Tensor | None, b_mask: Tensor | None) -> None:
        present = a_mask if a_mask is not None else b_mask
        assert present is not None
        self.channels = present.shape[0]
        self.a: Entries | None = None
        self.k: Entries | None = None
        if a_mask is not None and bool(a_mask.any()):
            self.a = entries(a_mask)
        if b_mask is not None and bool(b_mask.any()):
            self.k = entries(b_mask | b_mask.transpose(0, 1).flip(2, 3))
            n, taps = self.channels, b_mask[0, 0].numel()
            at = self.k.at
            row, column, tap = at // (n * taps), at // taps % n, at % taps
            self.mirrored = (column * n + row) * taps + taps - 1 - tap
        depths = [1, 1, 1]
        if self.a is not None:
            depths[:2] = self.a.pattern.block_depth, self.a.pattern.transposed_block_depth
        if self.k is not None:
            depths[2] = self.k.pattern.block_depth
        self.blocks = depths

    def weights(
        self, A: Tensor | None, B: Tensor | None, g: Tensor, h: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the op calls ``pair`` and ``single``; W^T has -h in place of h."""
        pair: list[Tensor] = []
        single: list[Tensor] = []
        if self.a is not None:
            assert A is not None
            p, flat = self.a.pattern, A.reshape(-1)
            pair = [p.row_ptr, p.offset, flat[self.a.at]]
            pair += [p.transposed_row_ptr, p.transposed_offset, -g * flat[self.a.at_transposed]]
        if self.k is not None:
            assert B is not None
            flat = B.reshape(-1)
            values = h * (flat[self.k.at] - flat[self.mirrored])
            single = [self.k.pattern.row_ptr, self.k.pattern.offset, values]
        return pair, single

    def is_cheaper(self, bias: Tensor, ring: int) -> bool:
        """Than the Fourier domain, for maps like ``bias``."""
        kept = (0 if self.a is None else 2 * self.a.pattern.nnz) + (
            0 if self.k is None else self.k.pattern.nnz
        )
        taps = (2 * ring + 1) ** 2
        return len(bias) == 1 and kept <= 0.15 * taps * self.channels**2 and bias[0, 0].numel() > 400


_made: deque[tuple[Snapshot, ConvStructure]] = deque(maxlen=8)


def conv_structure(a_mask: Tensor | None, b_mask: Tensor | None) -> ConvStructure:
    """That of the masks; kept, for the weights change more often than they do."""
    masks = [a_mask, b_mask]
    shapes = [None if mask is None else mask.shape for mask in masks]
    for snapshot, structure in list(_made):
        if snapshot.matches(masks, shapes):
            return structure
    structure = ConvStructure(a_mask, b_mask)
    _made.append((Snapshot(masks, shapes), structure))
    return structure
