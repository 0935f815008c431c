"""Everything that the bits of a run depend on, and what is taken where the user does not say."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

DYNAMIC = {
    "dpf": "DPF",
    "incremental": "Incremental",
    "one-shot": "OneShot",
    "sfp": "SFP",
    "dsr": "DSR",
    "sparse-momentum": "SparseMomentum",
    "set": "SET",
    "rigl": "RigL",
}
"""Methods that change masks while training: name -> class in ``fastprune``."""
ITERATIVE = {
    "lottery-ticket": "LotteryTicket",
    "one-shot-iterative": "OneShotIterative",
    "sap": "SAP",
}
"""Methods of several rounds of training: name -> class in ``fastprune``."""

SAP_OPTIONS = ("p", "q", "eta_r", "gamma", "beta")
"""Fields of :class:`Settings` that only SAP uses."""


@dataclass(frozen=True)
class Settings:
    """One run; two runs with equal settings end in the same bits, given the same kernels' times.

    Attributes:
        model, dataset: names; ``data``: the folder of the files, None for digits.
        method: ``dense``, a pruner's name (masks found before training), ``masks`` (those of a
            file), or one of ``DYNAMIC`` and ``ITERATIVE``; ``sparsity``: its target, None where it
            has none.
        quota, scope, schedule, every, ramp_steps, rounds, score_batches: options of methods; None
            where the method chooses, or does not use them.
        include, exclude: which weights are prunable, names or patterns between commas; None: as the
            method says.
        masks: the file of the masks of method ``masks``.
        p, q, eta_r, gamma, beta: of SAP; None where the method chooses, or for other methods.
        kernels: ``measured`` (dense or sparse, whichever was faster when timed), ``dense``,
            ``sparse``.
        optimizer, lr, momentum, weight_decay, batch, epochs, lr_schedule: of training; ``batch``
            is that of all ranks together.
        finetune_epochs, finetune_lr: of the phase with fixed masks at the end.
        augment: random crops and flips.
        seed, threads, device, ranks: of the whole run.
    """

    model: str
    dataset: str
    data: str | None
    method: str
    sparsity: float | None
    quota: str | None
    scope: str | None
    schedule: str | None
    every: int | None
    ramp_steps: int | None
    rounds: int | None
    score_batches: int | None
    include: str | None
    exclude: str | None
    masks: str | None
    p: float | None
    q: float | None
    eta_r: float | None
    gamma: float | None
    beta: float | None
    kernels: str
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    batch: int
    epochs: int
    lr_schedule: str
    finetune_epochs: int
    finetune_lr: float
    augment: bool
    seed: int
    threads: int
    device: str
    ranks: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def selection(names: str | None) -> list[str] | None:
    """Names between commas."""
    return None if names is None else [n.strip() for n in names.split(",")]


@dataclass(frozen=True)
class Recipe:
    """How a network is usually trained."""

    epochs: int
    lr: float
    weight_decay: float
    lr_schedule: str
    batch: int = 128


_CIFAR = Recipe(300, 0.2, 1e-4, "step:0.5,0.75x0.1")
_WIDE = Recipe(200, 0.1, 5e-4, "step:0.3,0.6,0.8x0.2")
_IMAGENET = Recipe(90, 0.4, 1e-4, "step:0.3333,0.6667,0.8889x0.1", 1024)
_DIGITS = Recipe(30, 0.05, 5e-4, "onecycle")
_ROUNDS = Recipe(200, 0.1, 5e-4, "cosine", 250)


def recipe(model: str, dataset: str, method: str) -> Recipe:
    """The settings of the paper that trains such a network.

    ResNets and VGGs, WideResNets, ImageNet: paper 001, appendix A.2. Iterative methods: paper 004,
    Table 3. Digits: what ``demo`` does.
    """
    if dataset == "digits":
        return _DIGITS
    if method in ITERATIVE:
        return _ROUNDS
    if dataset in ("imagenet", "tiny-imagenet"):
        return _IMAGENET
    key = re.sub(r"[-_\s]", "", model).lower()
    return _WIDE if key.startswith(("wrn", "wideresnet")) else _CIFAR


ROUNDS = 15
"""Prunings of iterative methods: paper 004, Table 3, for ResNet-18."""
ONE_SHOT_BATCHES = 4
"""Batches that a method of one scoring step averages over; one of several takes one per step."""


def finetune_epochs(method: str, epochs: int) -> int:
    """A fifth of training for one-shot pruning (60 of 300: paper 001, Table 2), else none."""
    return max(1, epochs // 5) if method == "one-shot" else 0
