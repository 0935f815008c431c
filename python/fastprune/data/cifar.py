"""CIFAR-10 and CIFAR-100: pickled or binary batches, in a folder or a .tar.gz archive."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import TensorDataset

from fastprune.data._common import Bytes, DatasetInfo, check_labels, not_found, to_dataset
from fastprune.data.safe_pickle import as_bytes, load_batch

CIFAR10 = DatasetInfo(
    "cifar-10", (3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
)
CIFAR100 = DatasetInfo(
    "cifar-100", (3, 32, 32), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
)

_PIXELS = 3 * 32 * 32
# The largest file of either set, CIFAR-100's training batch, has 155 MB.
_LARGEST_MEMBER = 1 << 28


@dataclass(frozen=True)
class _Layout:
    """One way in which the files are distributed."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    binary: bool
    label_key: bytes = b""
    label_bytes: int = 1

    def files(self, split: str) -> tuple[str, ...]:
        return self.train if split == "train" else self.test


_TEN = tuple(f"data_batch_{i}" for i in range(1, 6))
_LAYOUTS: dict[str, tuple[_Layout, ...]] = {
    "cifar-10": (
        _Layout(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            _TEN,
            ("test_batch",),
            binary=False,
            label_key=b"labels",
        ),
        _Layout(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            tuple(f"{name}.bin" for name in _TEN),
            ("test_batch.bin",),
            binary=True,
        ),
    ),
    "cifar-100": (
        _Layout(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            ("train",),
            ("test",),
            binary=False,
            label_key=b"fine_labels",
        ),
        # Two label bytes per image, the coarse class first.
        _Layout(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            ("train.bin",),
            ("test.bin",),
            binary=True,
            label_bytes=2,
        ),
    ),
}


def parse_pickled(data: bytes, label_key: bytes, source: str) -> tuple[Bytes, Bytes]:
    """Parse one pickled batch into images (N, 3, 32, 32) and labels (N,).

    Raises:
        ValueError: a refused or damaged pickle, missing keys, wrong shapes; names ``source``.
    """
    batch = load_batch(data, source)
    for key in (b"data", label_key):
        if key not in batch:
            raise ValueError(f"{source}: no entry {key.decode()!r} in the pickled dictionary")
    images = as_bytes(batch[b"data"], source)
    if images.ndim != 2 or images.shape[0] == 0 or images.shape[1] != _PIXELS:
        raise ValueError(
            f"{source}: data of shape {images.shape}, expected (N, {_PIXELS}) with N >= 1"
        )
    labels = batch[label_key]
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise ValueError(f"{source}: {label_key.decode()} is not a list of integers")
    if len(labels) != len(images):
        raise ValueError(f"{source}: {len(labels)} labels for {len(images)} images")
    if not all(0 <= label < 256 for label in labels):
        raise ValueError(f"{source}: a label is outside 0 .. 255")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.uint8)


def parse_binary(data: bytes, label_bytes: int, source: str) -> tuple[Bytes, Bytes]:
    """Parse one binary batch: records of ``label_bytes`` labels (the last is used) and 3072 pixels.

    Raises:
        ValueError: the size is not a positive multiple of a record; names ``source``.
    """
    record = label_bytes + _PIXELS
    if not data or len(data) % record:
        raise ValueError(
            f"{source}: {len(data)} bytes, expected a positive multiple of {record} "
            f"({label_bytes} of labels and {_PIXELS} of pixels)"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32).copy(), rows[:, label_bytes - 1].copy()


def _read_archive(path: Path, layout: _Layout, names: tuple[str, ...]) -> dict[str, bytes]:
    """Read the named members of a .tar.gz into memory; nothing is extracted to disk."""
    wanted = {f"{layout.folder}/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = wanted.get(member.name.removeprefix("./"))
                if name is None or not member.isfile():
                    continue
                if member.size > _LARGEST_MEMBER:
                    raise ValueError(f"{path}: {member.name} is too large ({member.size} bytes)")
                stream = archive.extractfile(member)
                found[name] = stream.read() if stream is not None else b""
                if len(found) == len(wanted):
                    break
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a .tar.gz ({error})") from error
    return found


def _read_files(root: Path, info: DatasetInfo, split: str) -> tuple[_Layout, dict[str, bytes]]:
    """The first layout that ``root`` holds, and the split's files: source name -> contents.

    ``root`` may be the folder above, the batches' own folder, or the archive itself.
    """
    layouts = _LAYOUTS[info.name]
    for layout in layouts:
        names = layout.files(split)
        for folder in (root / layout.folder, root):
            if (folder / names[0]).is_file():
                missing = [name for name in names if not (folder / name).is_file()]
                if missing:
                    raise not_found(folder, info.name, [", ".join(missing)])
                return layout, {str(folder / n): (folder / n).read_bytes() for n in names}
    for layout in layouts:
        names = layout.files(split)
        for path in (root / layout.archive, root):
            if path.is_file() and path.name == layout.archive:
                found = _read_archive(path, layout, names)
                missing = [name for name in names if name not in found]
                if missing:
                    raise ValueError(f"{path}: no {layout.folder}/{missing[0]} inside")
                return layout, {f"{path}/{layout.folder}/{n}": found[n] for n in names}
    raise not_found(
        root,
        info.name,
        [f"{lay.folder}/{{{','.join(lay.files(split))}}} or {lay.archive}" for lay in layouts],
    )


def load(root: Path, info: DatasetInfo, split: str, normalize: bool) -> TensorDataset:
    """Load one split; images float32 (N, 3, 32, 32), labels int64 (N,), fine labels on CIFAR-100.

    Raises:
        FileNotFoundError: the files are missing.
        ValueError: a file is malformed.
    """
    layout, files = _read_files(root, info, split)
    parse: Callable[[bytes, str], tuple[Bytes, Bytes]]
    if layout.binary:

        def parse(data: bytes, source: str) -> tuple[Bytes, Bytes]:
            return parse_binary(data, layout.label_bytes, source)
    else:

        def parse(data: bytes, source: str) -> tuple[Bytes, Bytes]:
            return parse_pickled(data, layout.label_key, source)

    images, labels = [], []
    for source, data in files.items():
        pixels, classes = parse(data, source)
        check_labels(classes, info.num_classes, source)
        images.append(pixels)
        labels.append(classes)
    return to_dataset(np.concatenate(images), np.concatenate(labels), info, normalize)
