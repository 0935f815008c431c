"""What every loader shares: the description of a data set, its checks, and normalization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class DatasetInfo:
    """What a network needs to know of a data set.

    Attributes:
        name: as in ``fastprune.data.names()``.
        in_shape: (channels, height, width) of a sample as loaded.
        num_classes: labels are 0 .. num_classes - 1.
        mean, std: one number per channel, of the training images scaled to [0, 1].
    """

    name: str
    in_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_exact(stream: BinaryIO, count: int, source: str) -> bytes:
    """Read ``count`` bytes and make sure that nothing follows.

    In pieces: ``count`` comes from a file's header, and a false one must not allocate memory that
    the file cannot fill.

    Raises:
        ValueError: fewer or more bytes are there; the message names ``source``.
    """
    pieces: list[bytes] = []
    missing = count
    while missing:
        piece = stream.read(min(missing, 1 << 20))
        if not piece:
            raise ValueError(
                f"{source}: truncated, expected {count} bytes of data, got {count - missing}"
            )
        pieces.append(piece)
        missing -= len(piece)
    if stream.read(1):
        raise ValueError(f"{source}: more than the expected {count} bytes of data")
    return b"".join(pieces)


def check_labels(labels: NDArray[Any], num_classes: int, source: str) -> None:
    """Raise ValueError naming ``source`` unless all labels are in 0 .. num_classes - 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise ValueError(
            f"{source}: label {int(labels[wrong[0]])} of sample {int(wrong[0])} is outside "
            f"0 .. {num_classes - 1}"
        )


def not_found(root: Path, name: str, expected: list[str]) -> FileNotFoundError:
    """The error for files that are not there: it names the folder and what was looked for."""
    state = "" if root.exists() else " (no such folder)"
    return FileNotFoundError(
        f"root: no {name} files in {str(root)!r}{state}; expected there {' or '.join(expected)}. "
        "fastprune downloads nothing"
    )


def normalize_(images: Tensor, info: DatasetInfo) -> Tensor:
    """(x - mean) / std per channel, in place, on float images (N, C, H, W) or (C, H, W)."""
    mean = torch.tensor(info.mean, dtype=images.dtype).view(-1, 1, 1)
    std = torch.tensor(info.std, dtype=images.dtype).view(-1, 1, 1)
    return images.sub_(mean).div_(std)


def to_dataset(images: Bytes, labels: Bytes, info: DatasetInfo, normalize: bool) -> TensorDataset:
    """Turn bytes 0 .. 255 of shape (N, C, H, W) and labels into float32 and int64 tensors."""
    # One float copy, changed in place: CIFAR's training images are 0.6 GB in float32.
    pixels = torch.from_numpy(images).to(torch.float32).div_(255.0)
    if normalize:
        normalize_(pixels, info)
    return TensorDataset(pixels, torch.from_numpy(labels.astype(np.int64)))
