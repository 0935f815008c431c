"""The papers' data sets, read from the standard files in a folder. Nothing is downloaded.

``load("cifar-10", "/data", "train")`` gives a ``torch.utils.data.Dataset``; ``digits`` needs no
files at all.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastprune.data import cifar, idx, images
from fastprune.data._common import DatasetInfo
from fastprune.data.bundled import DIGITS, digits

__all__ = ["DatasetInfo", "digits", "info", "load", "names"]

_Loader = Callable[[Path, str, bool], "Dataset[Any]"]

_FILES: dict[str, tuple[DatasetInfo, _Loader]] = {
    "mnist": (idx.MNIST, lambda root, split, norm: idx.load(root, idx.MNIST, split, norm)),
    "fashion-mnist": (
        idx.FASHION_MNIST,
        lambda root, split, norm: idx.load(root, idx.FASHION_MNIST, split, norm),
    ),
    "cifar-10": (
        cifar.CIFAR10,
        lambda root, split, norm: cifar.load(root, cifar.CIFAR10, split, norm),
    ),
    "cifar-100": (
        cifar.CIFAR100,
        lambda root, split, norm: cifar.load(root, cifar.CIFAR100, split, norm),
    ),
    "tiny-imagenet": (images.TINY_IMAGENET, images.load_tiny),
    "imagenet": (images.IMAGENET, images.load_imagenet),
}


def names() -> list[str]:
    """Names of the data sets that ``load`` knows, in a fixed order."""
    return ["digits", *_FILES]


def _canonical(name: str) -> str:
    """The name as in ``names()``; case, '-', '_' and spaces do not matter."""

    def key(text: str) -> str:
        return re.sub(r"[-_\s]", "", text).lower()

    by_key = {key(known): known for known in names()}
    found = by_key.get(key(name))
    if found is None:
        close = difflib.get_close_matches(key(name), by_key, n=3, cutoff=0.5)
        hint = f"; close: {', '.join(by_key[k] for k in close)}" if close else ""
        raise ValueError(f"name: unknown data set {name!r}{hint}; known: {', '.join(names())}")
    return found


def info(name: str) -> DatasetInfo:
    """Shape of a sample, number of classes, mean and std of a data set. Reads no file.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    known = _canonical(name)
    return DIGITS if known == "digits" else _FILES[known][0]


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    normalize: bool = True,
) -> Dataset[Any]:
    """Load one split of a data set from the standard files in a folder.

    ==============  ========================================================================
    digits          scikit-learn's own copy; ``root`` must be None
    mnist           {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz, in ``root``,
    fashion-mnist   or in ``root``/MNIST/raw and ``root``/FashionMNIST/raw
    cifar-10        cifar-10-batches-py/ or -bin/, or cifar-10-{python,binary}.tar.gz
    cifar-100       cifar-100-python/ or -binary/, or their .tar.gz; fine labels
    tiny-imagenet   tiny-imagenet-200/ with train/, val/ (its annotations) and wnids.txt
    imagenet        train/ and val/ with one folder of images per class
    ==============  ========================================================================

    Pickles are read by an unpickler that can build byte arrays, lists and strings and nothing
    else. No augmentation: images come as they are, ImageNet resized to 256 and cropped to 224.

    Args:
        name: one of ``names()``; case, '-' and '_' do not matter.
        root: the folder; also the archive itself for CIFAR.
        split: ``"train"`` or ``"test"`` (val for Tiny-ImageNet and ImageNet, whose test labels are
            not public).
        normalize: subtract ``info(name).mean`` and divide by ``info(name).std``; otherwise pixels
            are in [0, 1].
    Returns:
        For digits, MNIST and CIFAR an in-memory ``TensorDataset`` whose ``.tensors`` are images
        float32 (N, C, H, W) and labels int64 (N,). For the folders of images a data set that
        decodes on access to (float32 (3, H, W), int label): torchvision's ``ImageFolder`` where it
        is installed, else our own with the same ``samples``, ``targets``, ``classes``, and
        ``transform``.
    Raises:
        ValueError: unknown name or split, ``root`` missing or not wanted, or a malformed file,
            which is named: wrong magic number, truncated, wrong sizes, label out of range,
            refused pickle.
        FileNotFoundError: files are missing; the message says which were expected where.
        ImportError: Pillow (image folders) or scikit-learn (digits) is missing; says how to
            install it.
    """
    known = _canonical(name)
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if known == "digits":
        if root is not None:
            raise ValueError(f"root: digits are read from scikit-learn, got {os.fspath(root)!r}")
        return digits(split, normalize=normalize)
    if root is None:
        raise ValueError(f"root: {known} needs the folder with its files, got None")
    return _FILES[known][1](Path(root), split, normalize)
