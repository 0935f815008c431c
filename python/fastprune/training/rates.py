"""Learning rates over a training phase, by name, and optimizers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

OPTIMIZERS = ("sgd", "adam")
_STEP = re.compile(r"step:([0-9.,]+)x([0-9.e-]+)")


@dataclass(frozen=True)
class Rates:
    """A schedule of learning rates, stepped after every training step.

    Attributes:
        kind: ``step``, ``cosine``, ``onecycle`` or ``constant``.
        decays: for ``step``, the fractions of training after which the rate is multiplied by
            ``factor``.
    """

    kind: str
    decays: tuple[float, ...] = ()
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Rates:
        """``step:0.5,0.75x0.1``, ``cosine``, ``onecycle`` or ``constant``.

        Raises:
            ValueError: anything else.
        """
        if text in ("cosine", "onecycle", "constant"):
            return cls(text)
        if found := _STEP.fullmatch(text):
            try:
                decays = tuple(float(part) for part in found[1].split(","))
                factor = float(found[2])
            except ValueError:
                decays, factor = (), 0.0
            rising = list(decays) == sorted(set(decays))
            if decays and rising and factor > 0 and decays[0] > 0 and decays[-1] < 1:
                return cls("step", decays, factor)
        raise ValueError(
            f"{text!r} is none of step:0.5,0.75x0.1 (rising fractions of training, and the factor "
            "at each), cosine, onecycle, constant"
        )

    def scheduler(self, optimizer: Optimizer, lr: float, steps: int) -> LRScheduler:
        """The schedule over ``steps`` training steps; ``lr`` is its highest rate."""
        if self.kind == "cosine":
            return CosineAnnealingLR(optimizer, T_max=steps)
        if self.kind == "onecycle":
            return OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
        return MultiStepLR(optimizer, [round(d * steps) for d in self.decays], self.factor)

    def ramp_steps(self, steps: int) -> int:
        """The step of the second decay, where sparsity has reached its target (paper 001, A.2).

        Three quarters of training where the rate does not fall in steps: what that is on CIFAR-10.
        """
        fraction = self.decays[1] if len(self.decays) > 1 else 0.75
        return max(1, round(fraction * steps))


def optimizer_of(
    name: str, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """SGD with Nesterov momentum (plain where ``momentum`` is 0), or Adam with that beta_1."""
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name == "adam":
        return Adam(parameters, betas=(momentum, 0.999), **options)
    return SGD(parameters, momentum=momentum, nesterov=momentum > 0, **options)
