"""A run and its folder: begun, gone on with after any interruption, finished.

The folder holds ``config.json`` (the settings), ``log.jsonl`` (a line per epoch), the newest two
checkpoints, and at the end ``masks.safetensors``, ``model.safetensors`` (plain dense keys) and
``curves.png``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from fastprune.convert import finalize
from fastprune.files import remove_temporaries, write_atomically
from fastprune.training import checkpoint
from fastprune.training.errors import RunError, RunStopped
from fastprune.training.interrupts import Interrupts
from fastprune.training.log import Log
from fastprune.training.loop import Trainer
from fastprune.training.methods import Method
from fastprune.training.parts import Progress, Stop
from fastprune.training.plots import curves
from fastprune.training.ranks import World, is_lost, lost
from fastprune.training.settings import Settings

CONFIG, LOG, LOCK = "config.json", "log.jsonl", ".lock"
MASKS, MODEL, CURVES = "masks.safetensors", "model.safetensors", "curves.png"
SCHEMA = 1
AGAIN = "run the same command again to go on"


@dataclass
class Outcome:
    """What a finished run leads to.

    Attributes:
        entries: the log.
        model: the network, its layers masked.
        files: what was written.
        resumed: whether the run went on from a checkpoint.
    """

    entries: list[dict[str, Any]]
    model: nn.Module
    method: Method
    files: list[Path]
    resumed: bool


class Run:
    """The folder of a run.

    Args:
        folder: made if it is not there.
        settings: of the run.
        machine: what it runs on; stored beside the settings, not compared.
    """

    def __init__(self, folder: Path, settings: Settings, machine: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.machine = machine
        self.checkpoints = checkpoint.Checkpoints(folder)
        self.failures: list[str] = []  # why newer checkpoints than the one in use cannot be read

    def stored(self) -> dict[str, Any] | None:
        """The settings of the run that the folder holds; None if it holds none."""
        path = self.folder / CONFIG
        if not path.exists():
            return None
        try:
            settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}): --restart begins anew") from error
        return settings

    def open(self, restart: bool) -> bytes:
        """Make or check the folder; the newest checkpoint's bytes, empty if there is none.

        Raises:
            RunError: the folder holds a run of other settings, or checkpoints none of which can
                be read.
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if restart:
            self.clear()
        own = self.settings.to_dict()
        stored = self.stored()
        if stored is None:
            self._refuse_others()
            document = {"command": "train", "schema": SCHEMA, "settings": own}
            text = json.dumps(document | {"machine": self.machine}, indent=2) + "\n"
            write_atomically(self.folder / CONFIG, text.encode())
            return b""
        if not self.checkpoints.paths():  # nothing was trained: nothing to lose
            self.clear()
            return self.open(False)
        differ = [k for k in {**own, **stored} if stored.get(k) != own.get(k)]
        if differ:
            shown = ", ".join(f"{k} {stored.get(k)!r}, not {own.get(k)!r}" for k in differ)
            raise RunError(
                f"{self.folder} holds a run of other settings: {shown}: take another "
                "--out, or --restart to remove that run"
            )
        for prefix in (CONFIG, LOG, MASKS, MODEL, CURVES):
            remove_temporaries(self.folder, prefix)
        self.checkpoints.clean()
        return self._newest()

    def _newest(self) -> bytes:
        try:
            state, _, failures = self.checkpoints.newest()
        except ValueError as error:
            raise RunError(f"{error}: --restart begins anew") from error
        self.failures = failures
        if state is None:
            return b""
        if state.get("settings") != self.settings.to_dict():
            raise RunError(
                f"{self.folder}: the checkpoint is of another run: --restart begins anew"
            )
        return checkpoint.dumps(state)

    def clear(self) -> None:
        """Remove the run's files, and no others."""
        for name in (CONFIG, LOG, MASKS, MODEL, CURVES):
            (self.folder / name).unlink(missing_ok=True)
            remove_temporaries(self.folder, name)
        self.checkpoints.clear()

    def _refuse_others(self) -> None:
        names = (LOG, MASKS, MODEL, CURVES)
        found = [n for n in names if (self.folder / n).exists()]
        found += [p.name for p in self.checkpoints.paths()]
        if found:
            raise RunError(
                f"{self.folder} holds {found[0]} but no {CONFIG}: take another --out, or --restart"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out of the folder, where the system can (not on Windows).

        The system gives the lock back when this process ends, however that happens.
        """
        try:
            import fcntl
        except ImportError:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process is training into {self.folder}") from None
            yield
        finally:
            os.close(descriptor)


def execute(
    run: Run,
    world: World,
    make: Callable[[Interrupts, Progress, Callable[[Trainer], object]], Trainer],
    progress: Progress,
    *,
    restart: bool,
    say: Callable[[str], None],
) -> Outcome:
    """Train until the end, storing checkpoints on the way.

    Args:
        make: the trainer, from what it reports to.
        restart: whether a run that the folder holds is removed first.
        say: tells the user something.
    Raises:
        RunError: the user can put it right; what was stored stays.
        RunStopped: Ctrl-C; says how to go on.
    """
    interrupts = Interrupts()
    written: list[Path] = []

    def save(trainer: Trainer) -> None:
        state = trainer.state()
        if world.first:
            written[:] = [_write(run, trainer.place.step, state)]

    with ExitStack() as stack:
        stack.enter_context(interrupts.watching())
        if world.first:
            stack.enter_context(run.lock())
        content = world.from_first(lambda: run.open(restart))
        state = checkpoint.loads(content) if content else None
        for failure in run.failures:
            say(f"damaged checkpoint, going on from the one before: {failure}")
        trainer = make(interrupts, progress, save)
        if state is not None:
            say(_found(state, len(trainer.method.phases)))
        log = Log(run.folder / LOG if world.first else None, state["log"] if state else ())
        try:
            trainer.run(log, state)
        except RuntimeError as error:
            if world.size > 1 and is_lost(error):
                raise lost(world, error) from error
            raise
        except Stop:
            save(trainer)
            where = f", kept in {written[0]}" if written else ""
            raise RunStopped(f"after step {trainer.place.step}{where}: {AGAIN}") from None
        except KeyboardInterrupt:
            raise RunStopped(f"what was stored last is in {run.folder}: {AGAIN}") from None
        files = _results(run, trainer) if world.first else []
    return Outcome(trainer.log.entries, trainer.model, trainer.method, files, state is not None)


def _found(state: dict[str, Any], phases: int) -> str:
    place = state["place"]
    if place["phase"] == phases:
        return "the run is finished: writing its results again"
    return f"going on after step {place['step']}"


def _write(run: Run, step: int, state: Any) -> Path:
    try:
        return run.checkpoints.write(step, state)
    except OSError as error:
        raise RunError(
            f"the checkpoint of step {step} cannot be written: {error}: the ones before are "
            f"whole; then {AGAIN}"
        ) from error


def _results(run: Run, trainer: Trainer) -> list[Path]:
    """Masks, weights and curves."""
    files = []
    masks = trainer.method.masks
    if masks is not None:
        masks.save(run.folder / MASKS)
        files.append(run.folder / MASKS)
    state = finalize(trainer.model).state_dict()
    # Clones: shared tensors are stored under each of their names.
    plain = {
        n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in state.items()
    }
    write_atomically(run.folder / MODEL, safetensors.torch.save(plain))
    files.append(run.folder / MODEL)
    if curves(trainer.log.entries, run.settings, run.folder / CURVES):
        files.append(run.folder / CURVES)
    return files
