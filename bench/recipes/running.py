"""Run jobs: each in a folder of its own, resumable, several at once; failures stop no others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.recipes import launching, train
from bench.recipes.jobs import Job

STATUS = "job.json"
RUN = "run"
INTERRUPTED = 130

# How a job can be: "done"; "failed"; "diverged" (the loss went to infinity); "unsupported" (this
# version of fastprune cannot run it); "missing" (never begun, or interrupted).
FINAL = ("done", "diverged")


@dataclass(frozen=True)
class Where:
    """Folders and machine of a batch of jobs.

    Attributes:
        out: holds ``jobs/NAME`` for each job; ``data``: the data sets' folder.
        parallel: jobs at once; ``threads``: of each.
    """

    out: Path
    data: Path | None = None
    parallel: int = 1
    threads: int = 1
    device: str = "cpu"

    def folder(self, name: str) -> Path:
        """A job's folder."""
        return self.out / "jobs" / name


def status(where: Where, name: str) -> dict[str, Any]:
    """What is known of a job, the machine too; ``{"state": "missing"}`` where it never ended."""
    path = where.folder(name) / STATUS
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"state": "missing"}
    config = where.folder(name) / RUN / "config.json"
    if config.exists():
        found["machine"] = json.loads(config.read_text(encoding="utf-8")).get("machine")
    return found


def log_of(where: Where, name: str) -> list[dict[str, Any]]:
    """The training's log."""
    return train.read_log(where.folder(name) / RUN)


def execute(argv: Sequence[str]) -> tuple[int, str]:
    """Run a training: its exit status and its last words."""
    return launching.forked(argv) if launching.available() else launching.as_command(argv)


def run_job(job: Job, where: Where, run: Callable[[Sequence[str]], tuple[int, str]]) -> str:
    """Run a job to its end, or on from where it stopped; the state that it is left in."""
    folder = where.folder(job.name)
    folder.mkdir(parents=True, exist_ok=True)
    masks = None if job.after is None else where.folder(job.after) / RUN / "masks.safetensors"
    if masks is not None and not masks.exists():
        return _write(folder, job, "failed", f"the masks of {job.after} are missing")
    argv = train.command(
        job.settings,
        folder / RUN,
        data=where.data,
        masks=masks,
        threads=where.threads,
        device=where.device,
    )
    began = time.perf_counter()
    code, words = run(argv)
    if code in (INTERRUPTED, -2):  # -2: SIGINT before train could handle it
        raise KeyboardInterrupt
    state = "done" if code == 0 else "diverged" if train.diverged(words) else "failed"
    return _write(folder, job, state, words, argv, time.perf_counter() - began)


def _write(
    folder: Path,
    job: Job,
    state: str,
    words: str,
    argv: Sequence[str] = (),
    seconds: float | None = None,
) -> str:
    document = {
        "name": job.name,
        "state": state,
        "settings": dict(job.settings),
        "command": list(argv[1:]),  # without the interpreter
        "seconds": None if seconds is None else round(seconds, 2),
        "message": words if state != "done" else "",
    }
    # Written whole: a status that is there says that the job ended.
    temporary = folder / f"{STATUS}.tmp"
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / STATUS)
    return state


def run_all(
    jobs: Sequence[Job],
    where: Where,
    say: Callable[[str], None] = print,
    *,
    run: Callable[[Sequence[str]], tuple[int, str]] = execute,
    known: set[str] | None = None,
) -> dict[str, int]:
    """Run what is not done yet; how many jobs are in which state at the end.

    Jobs that failed are tried again, those that diverged are not: they would do so again.

    Args:
        jobs: each after the one that it waits for.
        run: command line -> exit status and last words.
        known: options of the training; None asks it.
    Raises:
        KeyboardInterrupt: a job was interrupted; the same call goes on.
    """
    known = train.known_options() if known is None else known
    counts: dict[str, int] = {}
    lock, stopped = threading.Lock(), threading.Event()
    ends = {job.name: threading.Event() for job in jobs}
    numbers = {job.name: n for n, job in enumerate(jobs, 1)}

    def work(job: Job) -> None:
        try:
            # Jobs start in order, so the one that is waited for is running or over.
            if job.after in ends:
                ends[job.after].wait()
            if not stopped.is_set():
                note(job, *settle(job))
        except KeyboardInterrupt:
            stopped.set()
        finally:
            ends[job.name].set()

    def settle(job: Job) -> tuple[str, str]:
        state = status(where, job.name)["state"]
        if state in FINAL:
            return state, "before"
        if (reason := train.unsupported(job.settings, known)) is not None:
            folder = where.folder(job.name)
            folder.mkdir(parents=True, exist_ok=True)
            return _write(folder, job, "unsupported", reason), reason
        state = run_job(job, where, run)
        ended: Mapping[str, Any] = status(where, job.name)
        seconds = ended.get("seconds")
        detail = "" if seconds is None else f"{seconds:.1f} s"
        return state, " ".join([detail, *ended.get("message", "").splitlines()[-1:]]).strip()

    def note(job: Job, state: str, detail: str) -> None:
        with lock:
            counts[state] = counts.get(state, 0) + 1
            if detail != "before":
                say(f"[{numbers[job.name]}/{len(jobs)}] {job.name}: {state}, {detail}")

    with ThreadPoolExecutor(max_workers=max(1, where.parallel)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            stopped.set()
    if stopped.is_set():
        raise KeyboardInterrupt
    return counts
