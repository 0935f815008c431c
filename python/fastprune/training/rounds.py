"""Iterative pruning as the training loop sees it: train, prune, rewind, and again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import fastprune
from fastprune.swapping import mask_layers_
from fastprune.training.methods import Method, Phase, Task
from fastprune.training.settings import ITERATIVE, SAP_OPTIONS, selection

SHARE = 0.2
"""Of what is left, pruned by each round where no sparsity is asked for (paper 004, Table 3)."""


class Rounds(Method):
    """``rounds`` prunings, each followed by a training, or by a test where there is no retraining.

    With a sparsity s, each of R rounds prunes the share 1 - (1 - s)^(1/R) of what is left.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        s = task.settings
        assert s.rounds is not None
        self.rounds = s.rounds
        retrains = s.method != "one-shot-iterative"
        later = [
            Phase(f"round {r}", s.epochs if retrains else 1, s.lr, trains=retrains)
            for r in range(1, s.rounds + 1)
        ]
        self.phases[1:1] = later

    def begin(self, phase: int, model: nn.Module, optimizer: Callable[[], Optimizer]) -> Optimizer:
        """See :class:`Method`."""
        self.phase = phase
        self.update = self.pruned = None
        if phase == 0:
            self.pruner = self._make(model)
            self.choose_kernels(model)
        elif phase <= self.rounds:
            trained = copy.deepcopy(model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.pruner.prune()
            for w in caught:
                self.task.say(f"warning: {w.message}")
            mask_layers_(trained, self.pruner.masks)
            self.pruned = trained
            done = self.pruner.history[-1]
            union = done.kept + done.removed
            iou = done.kept / union if union else 1.0
            self.update = SimpleNamespace(
                flips=done.removed, iou=iou, error=None, pruned_pq=done.pruned.pq
            )
        return optimizer()

    def choose_kernels(self, model: nn.Module) -> None:
        """See :class:`Method`; all ranks go by the times of the first."""
        super().choose_kernels(model)
        group = self.task.group
        if group is not None:
            times = [self.pruner.state_dict()["kernels"]]
            dist.broadcast_object_list(times, group=group, group_src=0)
            self.pruner.use_kernel_times(times[0])

    def resume(self, phase: int, model: nn.Module, optimizer: Callable[[], Optimizer]) -> Optimizer:
        """See :class:`Method`."""
        self.phase = phase
        self.pruner = self._make(model)
        return optimizer()

    def check(self, model: nn.Module, optimizer: Callable[[], Optimizer]) -> None:
        """See :class:`Method`."""
        self._make(model)

    def _make(self, model: nn.Module) -> Any:
        s = self.task.settings
        kind = getattr(fastprune, ITERATIVE[s.method])
        given = {
            "scope": s.scope,
            "include": selection(s.include),
            "exclude": selection(s.exclude),
        }
        options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if s.method == "sap":
            given = {n: getattr(s, n) for n in SAP_OPTIONS}
            options |= {n: v for n, v in given.items() if v is not None}
        else:
            share = SHARE if s.sparsity is None else 1 - (1 - s.sparsity) ** (1 / self.rounds)
            options["fraction"] = share
        return kind(model, **options)
