"""Start trainings: a process for each, forked where possible from one that has the imports done.

Importing torch takes as long as a small training. A fork server does it once; every training still
has a process to itself, so a crash ends one of them only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LAST_WORDS = 2000
_PRELOAD = [
    "fastprune.cli.train",
    "torch._dynamo",  # the first optimizer imports it
    "sklearn.datasets",
    "matplotlib.backends.backend_agg",
    "bench.recipes.launching",
]


def as_command(argv: Sequence[str]) -> tuple[int, str]:
    """Run a command line; its exit status and its last words."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    return done.returncode, done.stderr[-LAST_WORDS:].strip()


def forked(argv: Sequence[str]) -> tuple[int, str]:
    """The same for ``python -m fastprune ...``, in a fork of the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        process = context.Process(target=_child, args=(list(argv[3:]), str(errors)))
        process.start()
        process.join()
        words = errors.read_text(encoding="utf-8", errors="replace") if errors.exists() else ""
    code = process.exitcode if process.exitcode is not None else 1
    return code, words[-LAST_WORDS:].strip()


def _child(argv: Sequence[str], errors: str) -> None:
    with open(errors, "w", encoding="utf-8") as words, open(os.devnull, "r+") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
        os.dup2(words.fileno(), 2)
        from fastprune.cli import main

        code = main(argv)
    with contextlib.suppress(ValueError, OSError):
        sys.stderr.flush()
    sys.exit(code)


def available() -> bool:
    """Whether :func:`forked` works here."""
    return "forkserver" in multiprocessing.get_all_start_methods()
