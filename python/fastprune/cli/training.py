"""A small training loop, the same for dense and pruned networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fastprune.training.data import Split, accuracy, batches, load_split

__all__ = ["Split", "accuracy", "batches", "fit", "load_split"]

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


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
