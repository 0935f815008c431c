"""scikit-learn's bundled handwritten digits: real data that needs no network and no files."""

from __future__ import annotations

import importlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fastprune.data._common import DatasetInfo, normalize_

# Mean and standard deviation of the training split below, scaled to [0, 1].
DIGITS = DatasetInfo("digits", (1, 8, 8), 10, (0.3060,), (0.3766,))

TEST_SIZE = 500
_SEED = 0


def _test_rows(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Choose ``TEST_SIZE`` rows, each class in proportion, by largest remainder."""
    counts = np.bincount(labels, minlength=10)
    shares = counts * TEST_SIZE
    sizes = shares // len(labels)
    # Stable sort: among equal remainders the lower class gets the extra row.
    order = np.argsort(-(shares % len(labels)), kind="stable")
    sizes[order[: TEST_SIZE - int(sizes.sum())]] += 1
    # RandomState, not Generator: numpy keeps its stream the same in all versions.
    random = np.random.RandomState(_SEED)
    rows = [
        random.permutation(np.flatnonzero(labels == digit))[:size]
        for digit, size in enumerate(sizes)
    ]
    return np.sort(np.concatenate(rows)).astype(np.int64)


def digits(split: str = "train", *, normalize: bool = True) -> TensorDataset:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels: 1297 to train on, 500 to test.

    The split is stratified by class and always the same; rows keep scikit-learn's order.

    Args:
        split: ``"train"`` or ``"test"``.
        normalize: standardize with the training split's mean and standard deviation; otherwise
            pixels are in [0, 1].
    Returns:
        ``.tensors`` are images float32 (N, 1, 8, 8) and labels int64 (N,).
    Raises:
        ValueError: ``split`` is neither.
        ImportError: scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            'the digits come with scikit-learn: pip install "fastprune[demo]"'
        ) from error
    bunch = datasets.load_digits()
    labels = np.asarray(bunch.target, np.int64)
    chosen = np.zeros(len(labels), bool)
    chosen[_test_rows(labels)] = True
    rows = chosen if split == "test" else ~chosen
    images = torch.from_numpy(np.asarray(bunch.images, np.float32)[rows][:, None]).div_(16.0)
    if normalize:
        normalize_(images, DIGITS)
    return TensorDataset(images, torch.from_numpy(labels[rows]))
