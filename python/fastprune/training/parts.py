"""What the training loop is made of: places, outcomes, progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fastprune import data, models
from fastprune.training.errors import RunError
from fastprune.training.settings import Settings


class Progress(Protocol):
    """Where the loop says what it does."""

    def start(self, done: int) -> None:
        """So many epochs were done before."""

    def now(self, what: str) -> None:
        """What is being worked on."""

    def done(self, line: str) -> None:
        """One epoch's outcome."""


@dataclass
class Place:
    """How far a run is: epochs and batches done of the phase, steps of the whole run."""

    phase: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0


class Stop(Exception):  # noqa: N818
    """The user asked to stop; the state is that between two steps."""


@contextmanager
def diverging(where: str) -> Iterator[None]:
    """A NaN that a pruner refuses is the end of the run, in words."""
    try:
        yield
    except ValueError as error:
        if "nan" not in str(error).lower():
            raise
        raise RunError(
            f"{where}: training has diverged ({error}): try a lower --lr with --restart"
        ) from error


def create(settings: Settings) -> nn.Module:
    """The network, freshly initialized from the seed."""
    info = data.info(settings.dataset)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return models.create(settings.model, num_classes=info.num_classes, in_shape=info.in_shape)


def no_updates() -> dict[str, Any]:
    """What is noted of an epoch's mask refreshes, before any."""
    return {
        "flips": 0,
        "iou": None,
        "error": None,
        "pruned_test_accuracy": None,
        "pruned_pq_index": None,
        "lr": None,
        "seconds": 0.0,
        "update_seconds": 0.0,
    }
