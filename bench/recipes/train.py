"""The training machinery as recipes see it: options, data, command line, how a run ended.

All that is known here of ``python -m fastprune train`` is its options and the files of a run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DYNAMIC = ("dpf", "incremental", "one-shot", "sfp", "dsr", "sparse-momentum", "set", "rigl")
ITERATIVE = ("lottery-ticket", "one-shot-iterative", "sap")
AT_INIT = (
    "random", "magnitude", "lamp", "snip", "grasp", "synflow", "force", "iter-snip", "grasp-it",
)  # fmt: skip
METHODS = ("dense", "masks", *AT_INIT, *DYNAMIC, *ITERATIVE)

# A key of a job that is an option of the same name, in the order of the command line. Those from
# "include" on are options that a version of train may lack: such jobs are left out by name.
OPTIONS = (
    "optimizer", "momentum", "lr", "lr-schedule", "weight-decay", "batch", "epochs",
    "finetune-epochs", "finetune-lr", "kernels", "every", "schedule", "scope", "quota",
    "score-batches", "ramp-steps", "rounds", "include", "p", "q", "eta-r", "gamma", "beta", "masks",
)  # fmt: skip

# Training samples: with the batch they say how many steps a ramp takes.
SIZES = {
    "digits": 1297,
    "mnist": 60_000,
    "fashion-mnist": 60_000,
    "cifar-10": 50_000,
    "cifar-100": 50_000,
    "tiny-imagenet": 100_000,
    "imagenet": 1_281_167,
}
_STEP = re.compile(r"step:([0-9.,]+)x([0-9.e-]+)")


def decays(schedule: str) -> tuple[float, ...]:
    """Fractions of training at which the learning rate falls; empty for smooth schedules.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule in ("cosine", "onecycle", "constant"):
        return ()
    if found := _STEP.fullmatch(schedule):
        values = tuple(float(part) for part in found[1].split(","))
        if list(values) == sorted(set(values)) and values[0] > 0 and values[-1] < 1:
            return values
    raise ValueError(f"lr-schedule: {schedule!r} is none of step:..x.., cosine, onecycle, constant")


def ramp_steps(settings: Mapping[str, Any]) -> int:
    """Steps after which the sparsity has reached its target: ``ramp-end`` of training."""
    steps = settings["epochs"] * (SIZES[settings["dataset"]] // settings["batch"])
    return max(1, round(settings["ramp-end"] * steps))


def known_options() -> set[str] | None:
    """Names of the options of ``fastprune train``; None if this version has no such command."""
    try:
        command = importlib.import_module("fastprune.cli.train")
    except ModuleNotFoundError:
        return None
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return set(re.findall(r"--([a-z][a-z-]*)", parser.format_help()))


def unsupported(settings: Mapping[str, Any], known: set[str] | None) -> str | None:
    """Why this version cannot run a job; None if it can."""
    if known is None:
        return "this version of fastprune has no train command"
    lacking = [f"--{key}" for key in OPTIONS if key in settings and key not in known]
    if lacking:
        return f"fastprune train has no {', '.join(lacking)}"
    return None


def data_folder(dataset: str, root: Path | None) -> Path | None:
    """``root/dataset`` if there is such a folder, else ``root``; None for digits.

    Raises:
        ValueError: the data set needs a folder, and none was given.
    """
    if dataset == "digits":
        return None
    if root is None:
        raise ValueError(f"{dataset} needs --data DIR, the folder of its files")
    own = root / dataset
    return own if own.is_dir() else root


def missing_data(dataset: str, root: Path | None) -> str | None:
    """What is missing of a data set's files, in words; None if it can be read."""
    import fastprune

    try:
        fastprune.data.load(dataset, data_folder(dataset, root), "test")
    except (OSError, ValueError, ImportError) as error:
        return f"{dataset}: {error}"
    return None


def command(
    settings: Mapping[str, Any],
    out: Path,
    *,
    data: Path | None,
    masks: Path | None = None,
    threads: int = 1,
    device: str = "cpu",
) -> list[str]:
    """The command line that runs a job into the folder ``out``, or goes on with it."""
    folder = data_folder(settings["dataset"], data)
    argv = [sys.executable, "-m", "fastprune", "train"]
    argv += ["--model", settings["model"], "--method", settings["method"]]
    # Masks have a sparsity of their own.
    if settings.get("sparsity") is not None and settings["method"] != "masks":
        argv += ["--sparsity", f"{settings['sparsity']:g}"]
    argv += ["--data", "digits" if folder is None else str(folder)]
    argv += ["--dataset", settings["dataset"], "--out", str(out), "--seed", str(settings["seed"])]
    for key in OPTIONS:
        value = masks if key == "masks" and key in settings else settings.get(key)
        if value is not None:
            argv += [f"--{key}", f"{value:g}" if isinstance(value, float) else str(value)]
    if "augment" in settings:
        argv.append("--augment" if settings["augment"] else "--no-augment")
    return [*argv, "--threads", str(threads), "--device", device]


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; empty if there is none."""
    path = run / "log.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def diverged(message: str) -> bool:
    """Whether a failed run's last words say that training went to infinity."""
    return "diverged" in message
