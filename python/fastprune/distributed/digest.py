"""64-bit digests of tensors' bits, for ranks to compare what should be alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_WORDS = 1 << 16
_AT_ONCE = 1 << 22  # words


@cache
def _weights(device: torch.device) -> Tensor:
    """Odd, so that a change of one word always shows."""
    g = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_WORDS,), generator=g) * 2 + 1).to(device)


def digest(t: Tensor) -> int:
    """A digest of the elements' bits in row-major order; their dtype and shape do not count."""
    flat = t.detach().contiguous().view(-1).view(torch.uint8)
    n = flat.numel() // 8 * 8
    tail = flat.new_zeros(8)
    tail[: flat.numel() - n] = flat[n:]
    words = flat[:n]
    words = (words.clone() if words.storage_offset() % 8 else words).view(torch.int64)
    sums = [tail.view(torch.int64)]
    for piece in words.split(_AT_ONCE):
        whole = piece.numel() // _WORDS * _WORDS
        weights = _weights(t.device)
        if whole:
            sums.append((piece[:whole].view(-1, _WORDS) * weights).sum(1))
        rest = piece[whole:]
        sums.append((rest * weights[: rest.numel()]).sum().view(1))
    return digest_of_text(torch.cat(sums).tolist())


def digest_of_text(thing: object) -> int:
    """A digest of what ``repr`` says."""
    data = hashlib.blake2b(repr(thing).encode(), digest_size=8).digest()
    return int.from_bytes(data, "little", signed=True)


def digest_of_all(tensors: Sequence[Tensor]) -> int:
    """A digest of several tensors."""
    return digest_of_text([digest(t) for t in tensors])
