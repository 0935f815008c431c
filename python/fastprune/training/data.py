"""What networks are trained on: splits, the order of the samples, and augmentation.

Everything random is a function of the seed and of the place in the run, never of a generator's
history, so that a resumed run and every rank see the batches that one uninterrupted process sees.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastprune import data
from fastprune.data import DatasetInfo

Batch = tuple[Tensor, Tensor]
PADDING = 4


class Samples(Protocol):
    """Samples that are fetched by number."""

    def __len__(self) -> int: ...

    def fetch(self, rows: Sequence[Tensor]) -> Iterator[Batch]:
        """One batch (x, y) for each tensor of sample numbers."""


@dataclass(frozen=True)
class Split:
    """A data set in memory: inputs (N, ...) and labels (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def fetch(self, rows: Sequence[Tensor]) -> Iterator[Batch]:
        """See :class:`Samples`."""
        for r in rows:
            yield self.x[r], self.y[r]


@dataclass(frozen=True)
class Files:
    """A data set whose samples are decoded on access, by ``workers`` processes (0: this one)."""

    dataset: Dataset[Any]
    workers: int = 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def fetch(self, rows: Sequence[Tensor]) -> Iterator[Batch]:
        """See :class:`Samples`."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=[r.tolist() for r in rows],
            num_workers=self.workers,
            generator=torch.Generator(),  # else it draws from torch's global one
        )
        for x, y in loader:
            yield x, torch.as_tensor(y)


def load_split(name: str, split: str, root: Path | None = None, workers: int = 0) -> Any:
    """One split of a data set: a :class:`Split` if it fits in memory, else :class:`Files`.

    Args:
        name, split, root: as in :func:`fastprune.data.load`.
        workers: processes that decode images.
    """
    if root is None:
        importlib.import_module("sklearn.datasets")  # fails here rather than inside the loader
    dataset = data.load(name, root, split)
    if hasattr(dataset, "tensors"):
        x, y = dataset.tensors
        return Split(x, y)
    return Files(dataset, workers)


def find_dataset(root: Path) -> str:
    """The name of the data set whose files are in a folder.

    Raises:
        ValueError: there is none, or the files are those of several.
    """
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder")
    found = []
    for name in data.names():
        try:
            if name != "digits":
                data.load(name, root, "test")
                found.append(name)
        except (FileNotFoundError, ValueError):
            continue
    if len(found) != 1:
        known = ", ".join(n for n in data.names() if n != "digits")
        what = f"files of {' and '.join(found)}" if found else f"no files of {known}"
        raise ValueError(f"{str(root)!r} holds {what}: name the data set")
    return found[0]


def batches(split: Split, size: int, seed: int) -> list[Batch]:
    """The split in an order drawn from ``seed``, cut into full batches; the rest is left out.

    All batches have one size, so that each training step costs the same.
    """
    size = min(size, len(split))
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return list(split.fetch([rows for rows in order.split(size) if len(rows) == size]))


def order(samples: int, size: int, seed: int, epoch: int) -> list[Tensor]:
    """The sample numbers of each full batch of one epoch; what does not fill a batch is left out.

    A function of its arguments alone.
    """
    drawn = torch.randperm(samples, generator=generator(seed, "order", epoch))
    return [rows for rows in drawn.split(size) if len(rows) == size]


def generator(*place: object) -> torch.Generator:
    """A generator seeded by a digest of ``place``."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class Augmentation:
    """Random crops of images padded by four black pixels, and random horizontal flips.

    Papers: 001, A.2 ("standard data augmentation": He et al. 2016).
    """

    info: DatasetInfo

    @staticmethod
    def usual(info: DatasetInfo) -> bool:
        """Whether it is what papers use for these images: small ones, in colour."""
        return info.in_shape[0] == 3 and max(info.in_shape[1:]) <= 64

    def __call__(self, x: Tensor, drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The batch x (n, C, H, W) with the offsets and flips of :meth:`draw`, each (n,)."""
        n, _, height, width = x.shape
        down, right, flip = drawn
        mean, std = (torch.tensor(v, dtype=x.dtype) for v in (self.info.mean, self.info.std))
        black = (-mean / std).view(1, -1, 1, 1)
        padded = black.expand(n, -1, height + 2 * PADDING, width + 2 * PADDING).clone()
        padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = x
        rows = down[:, None] + torch.arange(height)
        columns = right[:, None] + torch.arange(width)
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        sample = torch.arange(n)[:, None, None]
        cut = padded[sample, :, rows[:, :, None], columns[:, None, :]]
        return cut.permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def draw(n: int, *place: object) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets down and right, in 0 .. 8, and flips, of n samples."""
        g = generator("augmentation", *place)
        down, right = torch.randint(2 * PADDING + 1, (2, n), generator=g)
        return down, right, torch.randint(2, (n,), generator=g).bool()


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split, batch: int = 500) -> float:
    """Fraction of samples whose largest logit is the label's; the model's mode is put back."""
    training = model.training
    model.eval()
    right = 0
    for x, y in zip(split.x.split(batch), split.y.split(batch), strict=True):
        right += int((model(x).argmax(1) == y).sum())
    model.train(training)
    return right / len(split)
