"""The stages of ``gpu-check`` as processes with limits: tests, compute-sanitizer, benchmarks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprune.cli.machine import usable_cores

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZED = "tests/sanitize_cuda.py"
# Instrumenting only our kernels takes seconds instead of minutes. initcheck must see the writes
# of torch's kernels too, or all that they wrote counts as uninitialized.
_OURS = ("--kernel-regex", "kns=fastprune")


class Process:
    """A command with its output in a file, and a group of its own: all of it can be ended."""

    def __init__(
        self, command: Sequence[str], log: Path, source: Path, environment: Mapping[str, str]
    ) -> None:
        self.log = log
        self._file = log.open("w", encoding="utf-8")
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            cwd=source,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def finish(self, deadline: float) -> dict[str, Any]:
        """Wait until ``deadline`` (``time.monotonic()``).

        Returns:
            status ("ok", "failed", "out of time"), seconds, exit (its code), log, text.
        """
        status = "ok"
        try:
            code = self._process.wait(max(deadline - time.monotonic(), 0.01))
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            code = self._end()
        self._file.close()
        return {
            "status": status,
            "seconds": time.monotonic() - self._began,
            "exit": code,
            "log": self.log.name,
            "text": self.log.read_text(encoding="utf-8", errors="replace"),
        }

    def _end(self) -> int:
        # Ctrl-C first: pytest then says what has passed so far.
        for number, patience in ((signal.SIGINT, 5.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self._process.pid, number)
                return self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break
        return self._process.wait()


def counts(text: str) -> dict[str, int]:
    """Numbers of pytest's last line: ``3 failed, 120 passed, 2 skipped in 10.0s``."""
    lines = [line for line in text.splitlines() if re.search(r"\b\d+ \w+.* in [\d.]+s", line)]
    words = ("failed", "passed", "skipped", "error", "errors", "xfailed")
    found = re.findall(r"(\d+) (\w+)", lines[-1]) if lines else []
    return {word: int(number) for number, word in found if word in words}


def tests(
    source: Path, out: Path, environment: Mapping[str, str], deadline: float, dry: bool
) -> dict[str, Any]:
    """The tests of the GPU, and beside them all others, over all cores with pytest-xdist."""
    found = sorted(str(path.relative_to(source)) for path in source.glob("tests/test_gpu_*.py"))
    ours = [path for path in found if "gpu_check" not in path]  # that one needs no GPU
    rest = ["tests", "-m", "not slow", *(f"--ignore={path}" for path in ours)]
    environment = {**environment, "OMP_NUM_THREADS": "2", "FASTPRUNE_TEST_DEVICE": "cuda"}
    if dry:
        environment["FASTPRUNE_TEST_DEVICE"] = "cpu"
        ours, rest = ["tests/test_gpu_layers.py"], ["tests/test_schedules.py"]
    cores = min(usable_cores(), 24)
    workers = {"gpu": max(cores // 3, 1), "others": max(cores - cores // 3, 1)}
    if importlib.util.find_spec("xdist") is None:
        workers = dict.fromkeys(workers, 0)
    # --strict-config would make an error of a plugin that is not installed here.
    options = ["--durations=5", "-o", "addopts=-ra --strict-markers -p no:cacheprovider"]
    started = {}
    for name, what in (("gpu", ours), ("others", rest)):
        command = [sys.executable, "-m", "pytest", *options, *what]
        command += ["-n", str(workers[name])] if workers[name] > 1 else []
        started[name] = Process(command, out / f"tests-{name}.log", source, environment)
    runs = {name: process.finish(deadline) for name, process in started.items()}
    for run in runs.values():
        text = run.pop("text")
        run["counts"] = counts(text)
        run["failures"] = re.findall(r"^(?:FAILED|ERROR) .*$", text, re.MULTILINE)[:100]
    return {"status": worst(runs), "runs": runs}


def worst(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """ "failed" if any run failed, else "out of time" if any was, else "ok"."""
    states = {run["status"] for run in runs.values()}
    return next((state for state in ("failed", "out of time") if state in states), "ok")


def sanitizer(
    source: Path, out: Path, environment: Mapping[str, str], deadline: float, dry: bool
) -> dict[str, Any]:
    """The four tools at once, each over the same script; memcheck over its graphs apart."""
    environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, SANITIZED]
    if dry:
        environment["FASTPRUNE_TEST_DEVICE"] = "cpu"
        run = Process(script, out / "sanitizer-none.log", source, environment).finish(deadline)
        run.pop("text")
        return {"status": run["status"], "runs": {"no tool (dry run)": run}}
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        return {"status": "failed", "why": "compute-sanitizer is not installed", "runs": {}}
    started = {}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "77", "--print-limit", "20"]
        command += _OURS if tool != "initcheck" else ()
        started[tool] = Process(
            [*command, *script], out / f"sanitizer-{tool}.log", source, environment
        )
    # A graph cannot be captured around cudaMalloc, which the others use for every tensor.
    environment.pop("PYTORCH_NO_CUDA_MEMORY_CACHING")
    command = [program, "--tool", "memcheck", "--error-exitcode", "77", *_OURS, *script, "graphs"]
    log = out / "sanitizer-graphs.log"
    started["memcheck, graphs"] = Process(command, log, source, environment)
    runs = {tool: process.finish(deadline) for tool, process in started.items()}
    for run in runs.values():
        text = run.pop("text")
        run["summary"] = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY.*)$", text, re.MULTILINE)
        run["found"] = re.findall(r"^=+ ((?:Invalid|Error|Uninit|Warning|Barrier).*)$", text, re.M)[
            :20
        ]
        if run["status"] == "failed" and not run["summary"]:
            run["tail"] = text.splitlines()[-8:]
    return {"status": worst(runs), "runs": runs}


def bench(
    source: Path, out: Path, environment: Mapping[str, str], deadline: float, dry: bool
) -> dict[str, Any]:
    """The benchmarks; a section that takes the process with it is left out and the rest goes on."""
    rows_path = out / "bench.jsonl"
    rows_path.unlink(missing_ok=True)
    base = [sys.executable, "-m", "bench.cuda", "--out", str(rows_path.resolve())]
    base += ["--dry-run"] if dry else []
    result: dict[str, Any] = {"status": "ok", "sections": {}, "rows": [], "runs": []}
    sections: list[str] | None = None  # all
    crashed: dict[str, dict[str, Any]] = {}
    while sections is None or sections:
        # What is cut off at the deadline gets no time to write the row that it was at.
        seconds = max(deadline - time.monotonic() - 5, 1)
        command = [*base, "--seconds", f"{seconds:.1f}", *(sections or ())]
        log = out / f"bench-{len(result['runs'])}.log"
        run = Process(command, log, source, environment).finish(deadline)
        tail = run.pop("text").splitlines()[-5:]
        result["runs"].append(run | ({} if run["status"] == "ok" else {"tail": tail}))
        begun, ended, every = _read(rows_path, result)
        if every:
            sections = [name for name in every if name not in begun]
        for name in begun - set(ended) - set(crashed):
            crashed[name] = {"error": f"process {run['status']}: {' '.join(tail[-1:])}"}
        result["sections"] = crashed | ended
        if run["status"] == "ok" or not every or time.monotonic() > deadline - 10:
            break
    bad = [name for name, section in result["sections"].items() if section["error"]]
    wrong = [row for row in result["rows"] if "wrong" in row or "error" in row]
    if bad or wrong or not result["rows"]:
        result["status"] = "failed"
    elif result["runs"][-1]["status"] != "ok":
        result["status"] = result["runs"][-1]["status"]
    return result


def _read(
    path: Path, result: dict[str, Any]
) -> tuple[set[str], dict[str, dict[str, Any]], list[str]]:
    """Rows into ``result``; sections begun, those ended, all that there are."""
    begun: set[str] = set()
    ended: dict[str, dict[str, Any]] = {}
    every: list[str] = []
    result["rows"] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for text in lines:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # cut off in the middle
            continue
        if "begin" in line:
            begun.add(line["begin"])
        elif "end" in line:
            ended[line.pop("end")] = line
        elif "sections" in line:
            every = every or line["sections"]
        else:
            result["rows"].append(line)
    return begun, ended, every
