"""Builds fastprune for the GPU that is here, into a folder, without a network.

Run as a script before anything can be imported (``make gpu-check``), and by the stage ``build`` of
``fastprune gpu-check``: so it imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_TARGETS = {"8.0": "sm_80", "9.0": "sm_90;sm_90a"}
_ALL = "sm_80;sm_90;sm_90a;compute_90"


def capability() -> str | None:
    """Compute capability of the first GPU, such as "9.0"; None where there is none."""
    torch_says = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    for command in (
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
        [sys.executable, "-c", torch_says],
    ):
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        first = found.stdout.split("\n")[0].strip()
        if found.returncode == 0 and first:
            return first
    return None


def targets() -> str:
    """What to compile: the machine code of this GPU, or all that is shipped."""
    return _TARGETS.get(capability() or "", _ALL)


def build(source: Path, out: Path, seconds: float) -> dict[str, Any]:
    """Install the package from ``source`` into ``out / "site"``, with all cores.

    Args:
        source: the source tree.
        out: gets ``site``, ``build.log`` and ``build.json``.
        seconds: after which the build is given up.
    Returns:
        What ``build.json`` holds: status ("ok", "failed", "out of time"), seconds, targets, log.
    """
    out.mkdir(parents=True, exist_ok=True)
    log, chosen = out / "build.log", targets()
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install"),
        *("--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--verbose"),
        *(
            "--target",
            str(out / "site"),
            f"--config-settings=cmake.define.FASTPRUNE_CUDA_ARCHS={chosen}",
        ),
        # Apart from the folder of ``make build``, which keeps its own settings.
        f"--config-settings=build-dir={out.resolve() / 'build'}",
        str(source),
    ]
    began, status = time.monotonic(), "ok"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if process.wait(seconds) != 0:
                status = "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the compilers with it
            process.wait()
            status = "out of time"
    took = time.monotonic() - began
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    if status == "ok" and (why := _not_imported(out / "site")) is not None:
        status, tail = "failed", [*tail, why]
    result = {
        "status": status,
        "seconds": took,
        "limit": seconds,
        "targets": chosen.split(";"),
        "log": log.name,
        "tail": tail,
    }
    (out / "build.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _not_imported(site: Path) -> str | None:
    """Why what was built is not what Python imports; None if it is."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site.resolve()), *others])}
    command = [sys.executable, "-c", "import fastprune; print(fastprune.__file__)"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=site, env=environment, check=False
    )
    if done.returncode != 0:
        return f"what was built does not import: {done.stderr.strip()}"
    found = done.stdout.strip()
    if site.resolve() not in Path(found).resolve().parents:
        return f"Python imports {found}: uninstall fastprune there (pip install -e goes first)"
    return None


def main() -> int:
    """The script: 0 if the build succeeded."""
    parser = argparse.ArgumentParser(description="Build fastprune into DIR/site, with no network.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--source", type=Path, default=Path(), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=190.0, help="limit [190]")
    args = parser.parse_args()
    if capability() is None:
        print(
            "gpu-check: no GPU here (nvidia-smi and torch name none): nothing to check",
            file=sys.stderr,
        )
        return 1
    result = build(args.source, args.out, args.seconds)
    print(f"gpu-check: build {result['status']} in {result['seconds']:.0f} s", file=sys.stderr)
    if result["status"] != "ok":
        print("\n".join(result["tail"]), file=sys.stderr)
        report = {"command": "gpu-check", "schema": 1, "stages": {"build": result}}
        path = args.out / "gpu-check.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if result["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
