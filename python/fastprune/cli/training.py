"""A small training loop, the same for dense and pruned networks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune import data
from fastprune.cli.common import Batch

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Split:
    """A data set in memory: inputs (N, ...) and labels (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


def load_split(name: str, split: str) -> Split:
    """One split of a data set that fits in memory, as tensors."""
    importlib.import_module("sklearn.datasets")  # fails here rather than inside the loader
    x, y = data.load(name, None, split).tensors  # type: ignore[attr-defined]
    return Split(x, y)


def batches(split: Split, size: int, seed: int) -> list[Batch]:
    """The split in an order drawn from ``seed``, cut into full batches; the rest is left out.

    All batches have one size, so that each training step costs the same.
    """
    size = min(size, len(split))
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return [(split.x[rows], split.y[rows]) for rows in order.split(size) if len(rows) == size]


def fit(
    model: nn.Module,
    split: Split,
    *,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    on_epoch: Callable[[], object] = lambda: None,
) -> None:
    """Train in place: SGD with Nesterov momentum and weight decay, one learning-rate cycle.

    The order of the samples depends on ``seed`` and the epoch alone, so that every network of one
    comparison sees the same batches.

    Args:
        model: left in training mode.
        split: training data.
        epochs, batch: passes over the data, and samples per step.
        lr: the peak of the cycle.
        seed: of the order.
        on_epoch: called after each epoch.
    """
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps = epochs * len(batches(split, batch, seed))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=max(steps, 1), cycle_momentum=False
    )
    for epoch in range(epochs):
        for x, y in batches(split, batch, seed * 1000 + epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        on_epoch()


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
