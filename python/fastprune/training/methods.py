"""Pruning methods as the training loop sees them: dense, fixed masks, dynamic, in rounds."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import fastprune
from fastprune.dynamic import DynamicPruner
from fastprune.masks import Masks
from fastprune.masks_model import match
from fastprune.swapping import can_mask
from fastprune.training.data import Batch
from fastprune.training.errors import RunError
from fastprune.training.rates import Rates
from fastprune.training.settings import DYNAMIC, ITERATIVE, SAP_OPTIONS, Settings, selection


@dataclass(frozen=True)
class Phase:
    """A part of a run with an optimizer and a learning-rate schedule of its own.

    ``trains``: False for one that only tests the network.
    """

    name: str
    epochs: int
    lr: float
    trains: bool = True


@dataclass
class Task:
    """What a method may ask of the run.

    Attributes:
        settings: of the run.
        steps_per_epoch: training steps.
        example: inputs like a training step's, on the device.
        scoring: the batches that methods score on before training.
        prune_at_init: masks of a named pruner: (model, settings, batches).
        group: the process group, None alone.
        say: tells the user something.
    """

    settings: Settings
    steps_per_epoch: int
    example: Tensor
    scoring: Callable[[], Sequence[Batch]]
    prune_at_init: Callable[..., tuple[Masks, list[str]]]
    group: Any
    say: Callable[[str], None]


class Method:
    """Dense training, and the base of the other methods.

    The loop calls :meth:`begin` before a phase that begins, or :meth:`resume` on one that goes on,
    :meth:`step` after each optimizer step, :meth:`end` after the last one of a phase.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.phase = 0
        s = task.settings
        self.phases = [Phase("train", s.epochs, s.lr)]
        if s.finetune_epochs:
            self.phases.append(Phase("fine-tuning", s.finetune_epochs, s.finetune_lr))
        self.pruner: Any = None
        self.update: Any = None  # what the beginning of the phase changed, like a MaskUpdate
        self.pruned: nn.Module | None = None  # a trained network just pruned, before rewinding

    def begin(self, phase: int, model: nn.Module, optimizer: Callable[[], Optimizer]) -> Optimizer:
        """Set ``model`` up for a phase, and make the optimizer that trains it."""
        self.phase = phase
        return optimizer()

    def resume(self, phase: int, model: nn.Module, optimizer: Callable[[], Optimizer]) -> Optimizer:
        """The same structures, whose states are then loaded; ``model`` is as created."""
        self.phase = phase
        return optimizer()

    def check(self, model: nn.Module, optimizer: Callable[[], Optimizer]) -> None:
        """Fail as the run would, before it leaves anything, where options are wrong.

        Args:
            model: to be thrown away.
        """

    def step(self) -> Any:
        """After the optimizer's step: a ``MaskUpdate`` if the masks were refreshed, else None."""
        return None

    def end(self) -> None:
        """After the last step of a phase; a second call changes nothing."""

    @property
    def masks(self) -> Masks | None:
        """The masks now; None: dense."""
        return None if self.pruner is None else self.pruner.masks

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse, after :meth:`resume`."""
        if self.pruner is not None:
            self.pruner.load_state_dict(state)

    def choose_kernels(self, model: nn.Module) -> None:
        """What ``--kernels`` says, for the pruner of a phase that begins."""
        kernels = self.task.settings.kernels
        if kernels == "measured":
            self.pruner.measure_kernels(self.task.example)
            return
        # A table of times that decides alike for every density.
        never = {"dense": 0.0, "sparse": (1.0,) * 3, "chained": ()}
        always = {"dense": 1.0, "sparse": (0.0,) * 3, "chained": ()}
        names = [n for n, m in model.named_modules() if can_mask(m)]
        times = never if kernels == "dense" else always
        self.pruner.use_kernel_times(dict.fromkeys(names, times))


class Fixed(Method):
    """Masks found before training, by any of ``fastprune.prune``'s methods."""

    def begin(self, phase: int, model: nn.Module, optimizer: Callable[[], Optimizer]) -> Optimizer:
        """See :class:`Method`."""
        self.phase = phase
        if phase == 0:
            masks = self._masks(model)
            self.pruner = _fixed(model, masks, self.task.group)
            self.choose_kernels(model)
        return optimizer()

    def resume(self, phase: int, model: nn.Module, optimizer: Callable[[], Optimizer]) -> Optimizer:
        """See :class:`Method`."""
        self.phase = phase
        self.pruner = _fixed(model, Masks.ones(model), self.task.group)
        return optimizer()

    def check(self, model: nn.Module, optimizer: Callable[[], Optimizer]) -> None:
        """See :class:`Method`."""
        if self.task.settings.masks is not None:
            match(model, self._masks(model))

    def _masks(self, model: nn.Module) -> Masks:
        s = self.task.settings
        if s.masks is not None:
            return Masks.load(s.masks)
        self.task.say(f"pruning with {s.method}")
        masks, notes = self.task.prune_at_init(model, s, self.task.scoring())
        for note in notes:
            self.task.say(f"warning: {note}")
        return masks


class Dynamic(Method):
    """Masks that change in the first phase: ``fastprune.DPF`` and its kin."""

    def begin(self, phase: int, model: nn.Module, optimizer: Callable[[], Optimizer]) -> Optimizer:
        """See :class:`Method`."""
        self.phase = phase
        made = optimizer()
        if phase == 0:
            self.pruner = self._make(model, made, self.task.group)
            self.choose_kernels(model)
        return made

    def resume(self, phase: int, model: nn.Module, optimizer: Callable[[], Optimizer]) -> Optimizer:
        """See :class:`Method`."""
        self.phase = phase
        made = optimizer()
        self.pruner = self._make(model, made, self.task.group)
        return made

    def check(self, model: nn.Module, optimizer: Callable[[], Optimizer]) -> None:
        """See :class:`Method`."""
        self._make(model, optimizer(), None)

    def step(self) -> Any:
        """See :class:`Method`."""
        return self.pruner.step() if self.phase == 0 else None

    def end(self) -> None:
        """See :class:`Method`."""
        if self.phase == 0:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.pruner.finish()
            for w in caught:
                self.task.say(f"warning: {w.message}")

    def _make(self, model: nn.Module, optimizer: Optimizer, group: Any) -> Any:
        s = self.task.settings
        kind = getattr(fastprune, DYNAMIC[s.method])
        total = s.epochs * self.task.steps_per_epoch
        given = {
            "sparsity": s.sparsity,
            "every": s.every,
            "schedule": s.schedule,
            "scope": s.scope,
            "ramp_steps": s.ramp_steps,
            "include": selection(s.include),
            "exclude": selection(s.exclude),
        }
        offered = {
            "total_steps": total,
            "prune_at": total,
            "steps_per_epoch": self.task.steps_per_epoch,
            "optimizer": optimizer,
            "seed": s.seed,
            "group": group,
        }
        taken = inspect.signature(kind).parameters
        if s.ramp_steps is None:
            offered["ramp_steps"] = Rates.parse(s.lr_schedule).ramp_steps(total)
        # Once per epoch, as most papers have it; DPF and RigL have periods of their own.
        if s.every is None and s.method not in ("dpf", "rigl"):
            offered["every"] = self.task.steps_per_epoch
        given = {k: v for k, v in given.items() if v is not None}
        for name in given:
            if name not in taken:
                raise RunError(f"--{name.replace('_', '-')}: {s.method} does not use it")
        return kind(model, **given, **{k: v for k, v in offered.items() if k in taken})


def method_of(task: Task) -> Method:
    """The method that the settings name."""
    name = task.settings.method
    if name == "dense":
        return Method(task)
    if name in DYNAMIC:
        return Dynamic(task)
    if name in ITERATIVE:
        from fastprune.training.rounds import Rounds

        return Rounds(task)
    return Fixed(task)


def _fixed(model: nn.Module, masks: Masks, group: Any) -> Any:
    """A pruner whose masks never change."""

    class FixedMasks(DynamicPruner):
        name = "fixed"

        def initial_masks(self) -> dict[str, Tensor]:
            return {n: masks[n].to(w.device) for n, w in self._weights.items()}

        def is_due(self, step: int) -> bool:
            return False

        def new_masks(self, step: int) -> dict[str, Tensor]:
            return self.current

    return FixedMasks(model, include=list(masks), group=group)


def refuse_unused(settings: Settings) -> None:
    """Check that every option given has an effect.

    Raises:
        RunError: one has none; names it.
    """
    s = settings
    pruner = s.method not in (*DYNAMIC, *ITERATIVE, "dense")
    found = s.method != "masks"
    uses: dict[str, bool] = {
        "sparsity": found and s.method not in ("dense", "sap"),
        "quota": found and pruner,
        "score_batches": found and pruner,
        "include": found and s.method != "dense",
        "exclude": found and s.method != "dense",
        "masks": not found,
        "rounds": s.method in ITERATIVE,
        **dict.fromkeys(SAP_OPTIONS, s.method == "sap"),
        "schedule": s.method in DYNAMIC,
        "every": s.method in DYNAMIC,
        "ramp_steps": s.method in DYNAMIC,
        "scope": s.method in (*DYNAMIC, *ITERATIVE),
    }
    for name, used in uses.items():
        if getattr(s, name) is not None and not used:
            raise RunError(f"--{name.replace('_', '-')}: {s.method} does not use it")
    if s.method == "masks" and s.masks is None:
        raise RunError("--masks: method masks needs the file of the masks")
    if s.sparsity is None and uses["sparsity"] and s.method not in ITERATIVE:
        raise RunError(f"--sparsity: {s.method} needs it, such as --sparsity 0.9")
