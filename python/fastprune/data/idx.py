"""MNIST and FashionMNIST from their idx files, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from torch.utils.data import TensorDataset

from fastprune.data._common import (
    Bytes,
    DatasetInfo,
    check_labels,
    not_found,
    read_exact,
    to_dataset,
)

MNIST = DatasetInfo("mnist", (1, 28, 28), 10, (0.1307,), (0.3081,))
FASHION_MNIST = DatasetInfo("fashion-mnist", (1, 28, 28), 10, (0.2860,), (0.3530,))

_PREFIX = {"train": "train", "test": "t10k"}
_FOLDERS = {"mnist": ("MNIST", "mnist"), "fashion-mnist": ("FashionMNIST", "fashion-mnist")}


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Read an idx file of unsigned bytes, gzipped if its name ends in ``.gz``.

    Format: bytes 0, 0, 8 (unsigned byte) and the number of dimensions; one big-endian 32-bit size
    per dimension; the data.

    Args:
        path: the file.
        dimensions: how many dimensions it must have.
    Returns:
        A uint8 array of the sizes that the file states, owning its memory.
    Raises:
        ValueError: wrong magic number, truncated, too long, or damaged gzip; names the file.
    """
    source = str(path)
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                return _parse(cast(BinaryIO, packed), dimensions, source)
        with path.open("rb") as plain:
            return _parse(plain, dimensions, source)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{source}: not a whole gzip file ({error})") from error


def _parse(stream: BinaryIO, dimensions: int, source: str) -> Bytes:
    length = 4 + 4 * dimensions
    header = stream.read(length)
    magic = bytes([0, 0, 8, dimensions])
    if header[:4] != magic:
        raise ValueError(
            f"{source}: wrong magic number {header[:4].hex()}, expected {magic.hex()} "
            f"(idx, unsigned bytes, {dimensions} dimensions)"
        )
    if len(header) < length:
        raise ValueError(f"{source}: truncated, the header is {len(header)} of {length} bytes")
    sizes = [int.from_bytes(header[i : i + 4], "big") for i in range(4, length, 4)]
    count = 1
    for size in sizes:
        count *= size
    data = read_exact(stream, count, source)
    return np.frombuffer(bytearray(data), np.uint8).reshape(sizes)


def _find(root: Path, info: DatasetInfo, stem: str) -> Path:
    """The file of ``stem`` ("train-images-idx3-ubyte"): the data set's own folders first.

    Both data sets use the same file names, so a folder named after one of them goes before
    ``root`` itself.
    """
    own = _FOLDERS[info.name]
    folders = [root / name / "raw" for name in own] + [root / name for name in own]
    folders += [root / "raw", root]
    # Some distributions write "train-images.idx3-ubyte".
    stems = (stem, stem.replace("-idx", ".idx"))
    for folder in folders:
        for candidate in stems:
            for suffix in ("", ".gz"):
                path = folder / (candidate + suffix)
                if path.is_file():
                    return path
    raise not_found(root, info.name, [f"{stem}[.gz]", f"{own[0]}/raw/{stem}[.gz]"])


def load(root: Path, info: DatasetInfo, split: str, normalize: bool) -> TensorDataset:
    """Load one split; images float32 (N, 1, 28, 28), labels int64 (N,).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is malformed, or images and labels do not fit together.
    """
    image_path = _find(root, info, f"{_PREFIX[split]}-images-idx3-ubyte")
    label_path = _find(root, info, f"{_PREFIX[split]}-labels-idx1-ubyte")
    images = read_idx(image_path, 3)
    labels = read_idx(label_path, 1)
    if images.shape[0] == 0 or images.shape[1:] != info.in_shape[1:]:
        raise ValueError(
            f"{image_path}: images of shape {images.shape}, expected (N, 28, 28) with N >= 1"
        )
    if len(labels) != len(images):
        raise ValueError(
            f"{label_path}: {len(labels)} labels for the {len(images)} images of {image_path}"
        )
    check_labels(labels, info.num_classes, str(label_path))
    return to_dataset(images[:, None], labels, info, normalize)
