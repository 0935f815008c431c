"""``fastprune gpu-check``: everything that only a GPU can tell, in one command and nine minutes.

Stages, each in processes of its own with a limit, so that none stops the others:

* ``build``: compiles the source tree for the GPU that is here, with no network, into ``DIR/site``;
  the other stages run on that.
* ``tests``: ``tests/test_gpu_*.py`` on the GPU, then all other tests.
* ``sanitizer``: compute-sanitizer's memcheck, racecheck, synccheck and initcheck over
  ``tests/sanitize_cuda.py``.
* ``bench``: ``bench.cuda``, fastprune against cuBLAS, cuDNN, cuSPARSE and 2:4.

Run it in a source tree; ``make gpu-check`` also works where nothing is installed yet. Written as it
goes: ``DIR/gpu-check.json`` (everything), ``DIR/gpu-check.md`` (tables), and the logs of all
processes. The exit status is 1 if anything failed or ran out of time; an aim that is missed is a
result, not a failure. Without git's history the variable FASTPRUNE_COMMIT names the commit.

The JSON file::

    {"command": "gpu-check", "schema": 1, "date", "commit", "dry_run", "seconds",
     "machine": {see fastprune.cli.machine.describe, and "driver", "cudnn", "capability",
                 "gpu_memory", "targets"},
     "stages": {name: {"status": "ok" | "failed" | "out of time" | "left out", "seconds", "runs",
                       bench: "rows": [{"section", "case", "sparsity", "dtype", "tf32",
                                        "times": {candidate: {"median", "low", "high", "runs",
                                                              "how"}},
                                        "ours", "speedup": {candidate: x}, "over_dense", "bytes",
                                        "flops", "gbytes_per_second", "tflops", "roofline",
                                        "aims": [{"text", "reached", "met"}]}]}},
     "ceilings": {"copy": bytes per second, dtype: flops per second},
     "dispatch": [{"form", "batch", "density", "dtype", "tf32", "us", "winner"}],
     "rules": [{"kind", "batch", "density", "form"}], the winners as a dispatch table
     "sampled": [{"case", "density"}]}: up to where a float32 weight gradient is better sampled

Times are seconds unless their name ends in ``us``. To quote a run, copy the file to
``bench/results/`` under the name that the command prints.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastprune
from fastprune.cli import common, gpu_check_report, gpu_check_stages, machine, render
from fastprune.cli.gpu_check_analysis import analyse, ceilings, dispatch, rules, sampled
from fastprune.cli.gpu_check_build import build

SUMMARY = "Build, test, sanitize and measure on the GPU that is here, within nine minutes."

STAGES = ("build", "tests", "sanitizer", "bench")
SECONDS = 540.0
# The longest that each stage may take, as a part of the whole: later ones get what earlier ones
# leave, the benchmarks all of it.
LIMITS = {"build": 0.35, "tests": 0.25, "sanitizer": 0.2, "bench": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``gpu-check``."""
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu-check"), metavar="DIR", help="[out/gpu-check]"
    )
    parser.add_argument(
        "--stages",
        type=common.comma_separated,
        default=list(STAGES),
        help=f"some of {','.join(STAGES)} [all]",
    )
    parser.add_argument(
        "--seconds",
        type=common.positive_float,
        default=SECONDS,
        metavar="S",
        help=f"for everything [{SECONDS:g}]",
    )
    parser.add_argument(
        "--source", type=Path, default=Path(), metavar="DIR", help="source tree [.]"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="without a GPU, on tiny shapes: tries the code of this command, measures nothing",
    )


def run(args: argparse.Namespace) -> int:
    """Run the stages and write the report; see :func:`fastprune.cli.main` for the exit code.

    Raises:
        UsageError: an unknown stage, no source tree, or a folder that cannot be written.
    """
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        raise common.UsageError(
            f"--stages: unknown {', '.join(unknown)}; known: {', '.join(STAGES)}"
        )
    source = args.source.resolve()
    if not (source / "bench/cuda").is_dir() or not (source / gpu_check_stages.SANITIZED).is_file():
        raise common.UsageError(f"--source: {str(args.source)!r} is not fastprune's source tree")
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "fastprune gpu-check: no GPU: torch sees no CUDA device here "
            f"(torch {torch.__version__}), so nothing was checked",
            file=sys.stderr,
        )
        return 1
    out = args.out.resolve()
    common.writable(out / "gpu-check.json")
    began = time.monotonic()
    built_before = _built_before(out)
    deadline = began + max(args.seconds - built_before.get("seconds", 0.0), 1.0)
    document = _document(args, source)
    if built_before:
        document["stages"]["build"] = built_before
    console = render.stdout()
    for stage in STAGES:
        if stage in document["stages"]:
            continue
        if stage not in args.stages or (stage == "build" and args.dry_run):
            document["stages"][stage] = {"status": "left out"}
            continue
        limit = min(deadline, time.monotonic() + LIMITS[stage] * args.seconds)
        if limit - time.monotonic() < 1:
            document["stages"][stage] = {"status": "out of time"}
            continue
        print(f"gpu-check: {stage}, at most {limit - time.monotonic():.0f} s", file=sys.stderr)
        document["stages"][stage] = _stage(stage, source, out, limit, args.dry_run)
        _write(document, out)
    document["seconds"] = time.monotonic() - began + built_before.get("seconds", 0.0)
    _write(document, out)
    return _show(console, document, out)


def _stage(stage: str, source: Path, out: Path, deadline: float, dry: bool) -> dict[str, Any]:
    began = time.monotonic()
    try:
        if stage == "build":
            result = build(source, out, deadline - began)
        else:
            runner = getattr(gpu_check_stages, stage)
            result = runner(source, out, _environment(out), deadline, dry)
    except Exception as error:  # a stage that breaks must not stop the others
        result = {"status": "failed", "why": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": time.monotonic() - began}


def _environment(out: Path) -> dict[str, str]:
    """Of the processes: the package that the build stage made, if it did."""
    site = out / "site"
    if not (site / "fastprune").is_dir():
        return {}
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    inside = json.loads((out / "build.json").read_text(encoding="utf-8"))["targets"]
    return {
        "PYTHONPATH": os.pathsep.join([str(site), *others]),
        "FASTPRUNE_CUDA_ARCHS": ",".join(inside),  # what tests/test_cuda_build.py may expect
    }


def _built_before(out: Path) -> dict[str, Any]:
    """The build that this very process runs on, made by ``make gpu-check`` just before."""
    if (out / "site") not in Path(fastprune.__file__).resolve().parents:
        return {}
    try:
        found: dict[str, Any] = json.loads((out / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _document(args: argparse.Namespace, source: Path) -> dict[str, Any]:
    device = torch.device("cpu" if args.dry_run else "cuda")
    described = machine.describe(device, torch.float32)
    described["targets"] = list(fastprune.build_info()["cuda_architectures"])
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    # A copy of the tree may come without its history.
    named = os.environ.get("FASTPRUNE_COMMIT")
    commit = named or _said("git", "-C", str(source), "rev-parse", "HEAD")
    changed = _said("git", "-C", str(source), "status", "--porcelain", "--untracked-files=no")
    return {
        "command": "gpu-check",
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": f"{commit or 'unknown'}{', with changes' if changed and not named else ''}",
        "dry_run": args.dry_run,
        "machine": described,
        "stages": {},
    }


def _said(*command: str) -> str | None:
    """The first line that a program prints; None if it cannot."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _write(document: dict[str, Any], out: Path) -> None:
    """Both files, from what there is so far."""
    bench = document["stages"].get("bench", {})
    if bench.get("rows") and "ceilings" not in document:
        document["ceilings"] = ceilings(bench["rows"])
        document["dispatch"] = dispatch(bench["rows"])
        document["rules"] = rules(bench["rows"])
        document["sampled"] = sampled(bench["rows"])
        bench["rows"] = analyse(bench["rows"], claims=not document["dry_run"])
    common.write_json(out / "gpu-check.json", document)
    text = "# fastprune on a GPU\n\n" + "\n".join(f"* {line}" for line in _head(document)) + "\n\n"
    text += "\n".join(table.markdown() for table in gpu_check_report.tables(document))
    (out / "gpu-check.md").write_text(text, encoding="utf-8")


def _head(document: dict[str, Any]) -> list[str]:
    return gpu_check_report.head(document)


def _show(console: Console, document: dict[str, Any], out: Path) -> int:
    for line in _head(document):
        console.print(line, soft_wrap=True)
    for table in gpu_check_report.tables(document):
        table.show(console)
    console.print(f"\nwrote {out / 'gpu-check.json'} and {out / 'gpu-check.md'}", soft_wrap=True)
    if not document["dry_run"]:
        gpu = document["machine"]["gpu"].lower().replace("nvidia ", "").split()[0]
        name = f"gpu-{gpu}-{document['date'][:10]}.json"
        console.print(
            f"to quote this run: cp {out / 'gpu-check.json'} bench/results/{name}", soft_wrap=True
        )
    bad = [s for s in document["stages"].values() if s["status"] not in ("ok", "left out")]
    return 1 if bad else 0
