"""The training loop: every state in one place, so that it can be stored and gone on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastprune import data
from fastprune.training.data import Augmentation, Samples, generator, order
from fastprune.training.errors import RunError
from fastprune.training.interrupts import Interrupts
from fastprune.training.log import Log
from fastprune.training.measures import epoch_measures
from fastprune.training.methods import Method
from fastprune.training.parts import Place, Progress, Stop, create, diverging, no_updates
from fastprune.training.ranks import World
from fastprune.training.rates import Rates, optimizer_of
from fastprune.training.settings import Settings
from fastprune.training.state import restore_, state_of

EVALUATION_BATCH = 500


class Trainer:
    """A network in training, by one process or the ranks of a world.

    The state changes in steps: :meth:`state` between any two of them, given to :meth:`run` of a
    new trainer with the same settings, leads to the same bits.

    Args:
        settings: of the run.
        train, test: the data.
        world: the ranks.
        method: how it is pruned.
        interrupts: looked at after every step.
        save: called when the state should be stored: (trainer).
        every: training steps between two such calls; None: once per epoch.
    """

    def __init__(
        self,
        settings: Settings,
        train: Samples,
        test: Samples,
        world: World,
        method: Method,
        interrupts: Interrupts,
        progress: Progress,
        save: Callable[[Trainer], object],
        every: int | None,
    ) -> None:
        self.settings = settings
        self.train, self.test = train, test
        self.world = world
        self.method = method
        self.interrupts = interrupts
        self.progress = progress
        self.save, self.every = save, every
        self.place = Place()
        self.log = Log(None)
        self.info = data.info(settings.dataset)
        self.augmentation = Augmentation(self.info) if settings.augment else None
        self.steps_per_epoch = method.task.steps_per_epoch
        self.model = create(settings).to(world.device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.epoch: dict[str, Any] = no_updates()

    # -- phases ----------------------------------------------------------------------------------

    def run(self, log: Log, state: Mapping[str, Any] | None) -> None:
        """Train to the end, from the beginning or from a state.

        Raises:
            Stop: the user asked for it.
            RunError: the loss or a weight is no longer finite; the ranks differ.
        """
        self.log = log
        self.progress.start(len(log.entries))
        phases = self.method.phases
        if state is not None:
            restore_(self, state)
        else:
            self._begin(0)
        while self.place.phase < len(phases):
            with self.interrupts.deferred():
                while self.place.epoch < phases[self.place.phase].epochs:
                    self._run_epoch()
            if self.place.phase + 1 < len(phases):
                self._begin(self.place.phase + 1)
            else:
                self.place = Place(len(phases), 0, 0, self.place.step)
        self.save(self)

    def _begin(self, phase: int) -> None:
        self.place = Place(phase, 0, 0, self.place.step)
        self.progress.now("preparing")
        self.model.train()
        drawn = generator(self.settings.seed, "phase", phase, self.world.rank)
        torch.manual_seed(drawn.initial_seed())
        with diverging(self.method.phases[phase].name):
            self.optimizer = self.method.begin(phase, self.model, self.make_optimizer)
        if self.method.update is not None:
            self._note(self.method.update)
        if self.method.pruned is not None:
            self.epoch["pruned_test_accuracy"] = self._accuracy(self.method.pruned)
            self.epoch["pruned_pq_index"] = self.method.update.pruned_pq
            self.method.pruned = None
        self.ready()
        self.save(self)

    def make_optimizer(self) -> Optimizer:
        """A new one for the phase."""
        s = self.settings
        lr = self.method.phases[self.place.phase].lr
        return optimizer_of(s.optimizer, self.model.parameters(), lr, s.momentum, s.weight_decay)

    def ready(self) -> None:
        """The phase's schedule, and the model as it is called."""
        phase = self.method.phases[self.place.phase]
        steps = phase.epochs * self.steps_per_epoch
        rates = Rates.parse(self.settings.lr_schedule)
        self.scheduler = rates.scheduler(self.optimizer, phase.lr, steps)
        self.network = self.world.wrap(self.model)

    # -- epochs and steps ------------------------------------------------------------------------

    @property
    def epochs_before(self) -> int:
        """Epochs of the phases before this one."""
        return sum(p.epochs for p in self.method.phases[: self.place.phase])

    def _run_epoch(self) -> None:
        place, phase = self.place, self.method.phases[self.place.phase]
        number = self.epochs_before + place.epoch
        rows = order(len(self.train), self.settings.batch, self.settings.seed, number)
        rows = rows if phase.trains else []
        first = place.batch
        mine = [self.world.mine(r) for r in rows[first:]]
        began, spent = time.perf_counter(), self.epoch["seconds"]
        self.model.train()
        for batch, (x, y) in enumerate(self.train.fetch(mine), first):
            if self.augmentation is not None:
                drawn = Augmentation.draw(len(rows[batch]), self.settings.seed, number, batch)
                x = self.augmentation(x, tuple(self.world.mine(d) for d in drawn))  # type: ignore[arg-type]
            with diverging(f"{phase.name}, epoch {place.epoch + 1}"):
                self._step(x.to(self.world.device), y.to(self.world.device), len(rows[batch]))
            place.batch += 1
            place.step += 1
            self.epoch["seconds"] = spent + time.perf_counter() - began
            # The last step of an epoch is stored with its evaluation.
            if place.batch < self.steps_per_epoch and self.every and place.step % self.every == 0:
                self.save(self)
            self._look_up()
            self.progress.now(
                f"{phase.name}, epoch {place.epoch + 1} of {phase.epochs}: "
                f"step {place.batch} of {self.steps_per_epoch}"
            )
        self._end_epoch(number)

    def _look_up(self) -> None:
        if self.world.any(self.interrupts.requested):
            raise Stop

    def _step(self, x: Tensor, y: Tensor, together: int) -> None:
        self.optimizer.zero_grad()
        logits = self.network(x)
        # The mean over the batch of all ranks: gradients are averaged over the ranks after this.
        loss = F.cross_entropy(logits, y, reduction="sum") * (self.world.size / together)
        loss.backward()
        self.epoch["lr"] = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step()
        with torch.no_grad():
            self.sums[0] += loss.detach() * (together / self.world.size)
            self.sums[1] += (logits.argmax(1) == y).sum()
            self.sums[2] += len(y)
        began = time.perf_counter()
        update = self.method.step()
        if update is not None:
            self._note(update)
        self.epoch["update_seconds"] += time.perf_counter() - began

    def _note(self, update: Any) -> None:
        self.epoch["flips"] += update.flips
        self.epoch["iou"], self.epoch["error"] = update.iou, update.error

    def _end_epoch(self, number: int) -> None:
        place, phase = self.place, self.method.phases[self.place.phase]
        last = place.epoch + 1 == phase.epochs
        if last:
            self._end_phase()
        buffers = [b for n, b in self.model.named_buffers() if n.split(".")[-1] != "weight_mask"]
        self.world.share_(buffers)
        if not self.world.same([*self.model.parameters(), *self._mask_tensors()]):
            raise RunError("the ranks came to different weights or masks")
        loss, right, samples = self.world.sum(self.sums).tolist()
        if not math.isfinite(loss):
            raise RunError(
                f"{phase.name}, epoch {place.epoch + 1}: training has diverged, the loss is "
                f"{loss}: try a lower --lr with --restart"
            )
        self.progress.now(f"{phase.name}, epoch {place.epoch + 1} of {phase.epochs}: testing")
        entry: dict[str, Any] = {
            "epoch": number + 1,
            "phase": phase.name,
            "step": place.step,
            "loss": loss / samples if samples else None,
            "train_accuracy": right / samples if samples else None,
            "test_accuracy": self._accuracy(self.model),
            **epoch_measures(self.model, self.method.masks, self.info.in_shape),
            "flips": self.epoch["flips"],
            "iou": self.epoch["iou"],
            "pruning_error": self.epoch["error"],
            "pruned_test_accuracy": self.epoch["pruned_test_accuracy"],
            "pruned_pq_index": self.epoch["pruned_pq_index"],
            "lr": self.epoch["lr"],
            "seconds": self.epoch["seconds"],
            "update_seconds": self.epoch["update_seconds"],
        }
        self.log.add(entry)
        self.sums.zero_()
        self.epoch = no_updates()
        place.epoch, place.batch = place.epoch + 1, 0
        shown = f"loss {entry['loss']:.4f}, " if samples else ""
        self.progress.done(
            f"{phase.name}, epoch {place.epoch} of {phase.epochs}: {shown}"
            f"test accuracy {100 * entry['test_accuracy']:.2f} %, sparsity "
            f"{100 * entry['sparsity']:.6g} %"
        )
        if last or self.every is None or place.step % self.every == 0:
            self.save(self)

    def _end_phase(self) -> None:
        """Once, though an interrupted evaluation may bring it here again."""
        pruner = self.method.pruner
        before = None if pruner is None else len(pruner.history)
        with diverging("the end of the phase"):
            self.method.end()
        if before is not None:
            for update in pruner.history[before:]:
                self._note(update)

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        """Of the test split, which the ranks share."""
        model.eval()
        rows = self.world.mine(torch.arange(len(self.test))).split(EVALUATION_BATCH)
        fetched = iter(self.test.fetch(rows))
        right = torch.zeros(1, dtype=torch.int64)
        # As many turns as the first rank has batches: looking for Ctrl-C takes all ranks.
        for _ in range(-(-len(self.test) // (self.world.size * EVALUATION_BATCH))):
            if (batch := next(fetched, None)) is not None:
                x, y = batch
                logits = model(x.to(self.world.device))
                right += int((logits.argmax(1).cpu() == y).sum())
            self._look_up()
        model.train()
        return int(self.world.sum(right)) / len(self.test)

    def _mask_tensors(self) -> list[Tensor]:
        masks = self.method.masks
        return [] if masks is None else list(masks.values())

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on. Collective."""
        return state_of(self)
