"""Which weights of a convolutional monotone operator layer exist, for its products in space."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from fastprune.ops.mon_operator import Entries, entries
from fastprune.ops.snapshot import Snapshot

# ns per point and image, one thread, Zen 4 with AVX-512, n = 16, 54, 81, maps of 10 to 34: of a
# weight and of a channel in space; of a pair of channels and of a channel in the Fourier domain.
_SINGLE = 0.030, 3.8, 0.10, 3.4
_TOGETHER = 0.033, 2.4, 0.037, 0.65  # a batch in the lanes, its maps in the cache
_BATCH = 0.039, 6.6, 0.06, 2.0
_CACHE_BYTES = 2 << 20


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
        """Than the Fourier domain, by count, for maps like ``bias``."""
        batch, n, height, width = bias.shape
        kept = (0 if self.a is None else 2 * self.a.pattern.nnz) + (
            0 if self.k is None else self.k.pattern.nnz
        )
        rows, columns = max(height - 2 * ring, 0), max(width - 2 * ring, 0)
        lanes = 64 // bias.element_size()
        together = batch >= lanes and bias.numel() * bias.element_size() <= _CACHE_BYTES
        if not together:  # rows of one image fill vectors
            columns = -(-columns // lanes) * lanes
        entry, channel, pair, map_point = (
            _SINGLE if batch == 1 else _TOGETHER if together else _BATCH
        )
        direct = (entry * kept + channel * n) * rows * columns
        return direct < (pair * n * n + map_point * n) * height * width


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
