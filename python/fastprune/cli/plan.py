"""How much ``demo`` does: its settings, in full and with ``--quick``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastprune import data, models
from fastprune.cli import common, training
from fastprune.pruners.registry import PRUNERS

DATASET = "digits"
BATCH = 128
ONE_SHOT_BATCHES = 4
"""Batches that a method of one pruning step averages over; one of several takes one per step."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, dense or pruned: epochs, and the peak learning rate."""

    epochs: int
    lr: float = 0.05


OTHER = Recipe(5)
"""For networks that a plan does not name."""


@dataclass(frozen=True)
class Plan:
    """What ``--quick`` cuts is the difference between ``FULL`` and ``QUICK``.

    Attributes:
        methods, sparsities: what is pruned how.
        iterative_steps: pruning steps of the methods that score on data at every step.
        recipes: model -> how it is trained.
        min_time: seconds of timing per candidate.
    """

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    iterative_steps: int
    recipes: Mapping[str, Recipe]
    min_time: float


FULL = Plan(
    methods=tuple(PRUNERS),
    sparsities=(0.8, 0.9, 0.95, 0.98),
    iterative_steps=20,
    recipes={"lenet-300-100": Recipe(25), "vgg-small": Recipe(4, lr=0.1)},
    min_time=0.05,
)
QUICK = Plan(
    methods=("snip", "synflow"),
    sparsities=(0.9, 0.98),
    iterative_steps=10,
    recipes={"lenet-300-100": Recipe(20), "vgg-small": Recipe(3, lr=0.1)},
    min_time=0.04,
)


def settings(args: argparse.Namespace) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what of it the arguments leave, checked.

    Raises:
        UsageError: an unknown method or network, or one that does not take the digits.
    """
    plan = QUICK if args.quick else FULL
    methods = common.known_methods(args.methods or plan.methods)
    names = list(dict.fromkeys(args.models or plan.recipes))
    info = data.info(DATASET)
    with common.usage_errors((ValueError, TypeError, RuntimeError)), torch.random.fork_rng():
        for name in names:
            model = models.create(name, num_classes=info.num_classes, in_shape=info.in_shape)
            model(torch.zeros(2, *info.in_shape))
    return plan, {
        "quick": args.quick,
        "seed": args.seed,
        "batch": BATCH,
        "methods": methods,
        "sparsities": list(args.sparsities or plan.sparsities),
        "steps": {m: common.steps_of(m, plan.iterative_steps) for m in methods},
        "models": names,
        "epochs": {n: args.epochs or plan.recipes.get(n, OTHER).epochs for n in names},
        "min_time": plan.min_time,
    }


def splits() -> tuple[training.Split, training.Split]:
    """The digits: (to train on, to test on).

    Raises:
        UsageError: scikit-learn does not import.
    """
    with common.usage_errors():
        return training.load_split(DATASET, "train"), training.load_split(DATASET, "test")
