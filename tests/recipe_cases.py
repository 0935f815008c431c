"""A small recipe, and a fake in place of the training: what the tests of recipes share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tomllib")  # Python 3.11

from bench.recipes import recipe as recipes
from bench.recipes import report, running, train
from bench.recipes.jobs import Cell, expand, jobs_of
from bench.recipes.recipe import Recipe
from bench.recipes.results import Results

ALL_OPTIONS = {*train.OPTIONS, "augment"}

TINY = """
title = "Tiny"
paper = "001"
covers = ["Table 0"]
measures = ["test_accuracy", "left"]
findings = ["A finding."]
numbers = [
  { case = "mlp", dense = [95.0, 0.1] },
  { case = "mlp", sparsity = 0.9, dpf = [94.0, 0.1], dpf-ft = [94.5, 0.1], snip = "*" },
]

[protocol]
dataset = "digits"
batch = 64
lr = 0.1
lr-schedule = "step:0.5,0.75x0.1"
weight-decay = 1e-4
epochs = 4
ramp-end = 0.5
sparsities = [0.8, 0.9]
seeds = 2

[methods.dense]

[methods.dpf-ft]
method = "dpf"
label = "DPF + FT"
every = 2
finetune-epochs = 2

[methods.dpf]
label = "DPF"
reads = "dpf-ft"

[methods.snip]
label = "SNIP"

[methods.lottery-ticket]
label = "LT"
rounds = 2

[cases.mlp]
model = "mlp"

[[claims]]
text = "DPF is ahead"
order = ["dpf", "snip", "lottery-ticket"]
sparsity = 0.9
"""


def load_tiny(folder: Path) -> Recipe:
    """The recipe above, from a file in ``folder``."""
    path = folder / "tiny.toml"
    path.write_text(TINY)
    return recipes.load(str(path))


def entry(epoch: int, phase: str, accuracy: float, sparsity: float) -> dict[str, Any]:
    return {
        "epoch": epoch, "phase": phase, "step": 20 * epoch, "loss": 0.1, "train_accuracy": 1.0,
        "test_accuracy": accuracy, "sparsity": sparsity, "kept": round(1000 * (1 - sparsity)),
        "pq_index": 0.2, "gini_index": 0.4, "macs": 5e6, "flips": 10, "iou": 0.9,
        "pruning_error": 0.01, "pruned_test_accuracy": 0.5, "pruned_pq_index": 0.1,
        "lr": 0.1, "seconds": 2.0, "update_seconds": 0.1,
    }  # fmt: skip


class Fake:
    """Stands in for the training: writes the log that ``train`` would."""

    def __init__(self) -> None:
        self.calls: list[dict[str, str]] = []

    def __call__(self, argv: Sequence[str]) -> tuple[int, str]:
        options = dict(zip(argv[4::2], argv[5::2], strict=True))
        self.calls.append(options)
        method, seed = options["--method"], int(options["--seed"])
        sparsity = float(options.get("--sparsity", 0))
        accuracy = {"dense": 0.97, "dpf": 0.95, "snip": 0.93}.get(method, 0.96) + seed / 1000
        if method == "snip" and seed == 2:
            if sparsity == 0.9:
                return 2, "fastprune train: error: training has diverged, the loss is nan"
            return 1, "Traceback\nMemoryError"
        epochs = int(options["--epochs"])
        log = [entry(e, "train", accuracy, sparsity) for e in range(1, epochs + 1)]
        tuning = int(options["--finetune-epochs"])
        log += [entry(epochs + e, "fine-tuning", accuracy + 0.02, sparsity) for e in (1, tuning)]
        log = log if tuning else log[:epochs]
        for r in range(1, int(options.get("--rounds", 0)) + 1):
            log += [entry(epochs * (r + 1), f"round {r}", accuracy - r / 100, 1 - 0.8**r)]
        out = Path(options["--out"])
        out.mkdir(parents=True)
        (out / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
        return 0, ""


def fake_document(tiny: Recipe, tmp_path: Path) -> tuple[dict[str, Any], list[Cell], Fake]:
    fake, where = Fake(), running.Where(tmp_path / "out", parallel=2)
    cells = expand(tiny)
    jobs = jobs_of(cells, tiny)
    counts = running.run_all(jobs, where, lambda line: None, run=fake, known=ALL_OPTIONS)
    assert counts == {"done": 10, "diverged": 1, "failed": 1}
    results = Results(
        lambda n: running.status(where, n), lambda n: running.log_of(where, n), lambda _: 10
    )
    return report.document(tiny, cells, results), cells, fake
