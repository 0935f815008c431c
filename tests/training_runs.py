"""What the tests of ``train`` share: runs in processes of their own that start at once.

A server that has imported everything forks each of them, so that a run of a tenth of a second is
not behind ten seconds of imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastprune.masks import Masks
from fastprune.training.checkpoint import Checkpoints
from fastprune.training.log import TIME_FIELDS

TINY = ["--model", "lenet-300-100", "--batch", "256", "--kernels", "dense", "--threads", "1"]


def command(*words: str, out: Path) -> list[str]:
    """``train`` on digits with a small network."""
    return ["train", *TINY, *words, "--out", str(out)]


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "fastprune.cli.train",
            "fastprune.training.rounds",
            "matplotlib.backends.backend_agg",
            "matplotlib.figure",
            "sklearn.datasets",
            "torch._dynamo",
        ]
    )
    return context


def _child(argv: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    from fastprune.cli import main

    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


class Running:
    """``python -m fastprune ARGV`` in a process; what it prints goes to ``log``."""

    def __init__(self, argv: list[str], log: Path, environment: dict[str, str] | None = None):
        self.log = log
        settings = {"OMP_NUM_THREADS": "1", **(environment or {})}
        arguments = (argv, str(log), settings)
        self.process = _server().Process(target=_child, args=arguments, daemon=True)
        self.process.start()

    def wait(self, timeout: float = 120) -> int:
        """The exit code; negative: a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {self.text()}"
        code: int = self.process.exitcode
        return code

    def until(self, condition: Callable[[], object], timeout: float = 120) -> bool:
        """Wait for something; False if the process ended first."""
        limit = time.monotonic() + timeout
        while not condition():
            if not self.process.is_alive():
                return bool(condition())
            assert time.monotonic() < limit, self.text()
            time.sleep(0.002)
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def text(self) -> str:
        """All output so far."""
        return self.log.read_text() if self.log.exists() else ""


def lines(out: Path) -> list[dict[str, Any]]:
    """The log without the fields that are times."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in TIME_FIELDS} for e in entries]


def bits(out: Path) -> dict[str, Any]:
    """All that two runs with the same settings must have alike."""
    masks = out / "masks.safetensors"
    return {
        "model": (out / "model.safetensors").read_bytes(),
        # Not the file's bytes: safetensors writes metadata in any order.
        "masks": Masks.load(masks).digest() if masks.exists() else None,
        "log": lines(out),
    }


def steps_stored(out: Path) -> list[int]:
    """The steps of the checkpoints, the newest first."""
    return [int(p.name[11:-12]) for p in Checkpoints(out).paths()]
