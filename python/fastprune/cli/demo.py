"""``fastprune demo``: the main job on real data, end to end.

Trains LeNet-300-100 and a small VGG on scikit-learn's handwritten digits, prunes both at
initialization with every method, trains the pruned networks with sparse layers from the same
initial weights for the same number of epochs, and reports accuracy and measured wall-clock time.

The JSON file (times in seconds; ``low`` and ``high`` are quartiles)::

    {"command": "demo", "schema": 1, "interrupted": false, "seconds": 118.2,
     "machine": {see fastprune.cli.machine.describe},
     "settings": {"quick", "seed", "batch", "methods", "sparsities", "steps": {method: T},
                  "models", "epochs": {model: E}, "min_time"},
     "models": [{"model", "parameters",
                 "dense": {"accuracy", "train_seconds", "training": DENSE, "inference": DENSE},
                 "results": [{"method", "sparsity", "kept", "prunable", "accuracy", "warnings",
                              "prune_seconds", "train_seconds",
                              "training": CASE, "inference": CASE}]}]}
    DENSE = {"form", "median", "low", "high", "runs", "tried": {form: {"median", ...}}}
    CASE  = {"dense": {"form", "median", ...}, "sparse": {"median", ...}, "speedup",
             "disturbed", "layers", "sparse_layers"}

``disturbed`` is true where other work kept the machine busy (``measuring.Case``), ``interrupted``
after Ctrl-C: what was finished is there, the rest is missing.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastprune import data, models
from fastprune.cli import common, machine, measuring, plan, plots, render, tables, training
from fastprune.convert import finalize
from fastprune.pruners.registry import PRUNERS

SUMMARY = "Train, prune, retrain sparse and time two networks on real handwritten digits."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``."""
    parser.add_argument("--quick", action="store_true", help="a fifth of the work, in 20 seconds")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results [out]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results [OUT/demo.json]")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG plot [OUT/demo.png]")
    parser.add_argument("--threads", type=common.positive_int, help="threads [torch's choice]")
    parser.add_argument("--seed", type=common.seed, default=0, help="of weights and batches [0]")
    parser.add_argument(
        "--methods", type=common.comma_separated, help=f"some of {','.join(PRUNERS)} [all]"
    )
    parser.add_argument(
        "--sparsities", type=common.sparsities, help="pruned fractions [0.8,0.9,0.95,0.98]"
    )
    parser.add_argument(
        "--models", type=common.comma_separated, help="networks [lenet-300-100,vgg-small]"
    )
    parser.add_argument("--epochs", type=common.positive_int, help="of each training [by network]")


@dataclass
class Job:
    """The settings of one run, its data, and its results so far."""

    settings: dict[str, Any]
    recipes: Mapping[str, plan.Recipe]
    watch: measuring.Stopwatch
    train: training.Split
    test: training.Split
    results: list[dict[str, Any]] = field(default_factory=list)

    def fit(self, model: nn.Module, name: str, steps: render.Steps, what: str) -> float:
        """Train as every network of this name is trained; the seconds it took."""
        epochs = self.settings["epochs"][name]
        done = iter(range(1, epochs + 1))
        steps.now(f"{what}: training, {epochs} epochs")
        began = time.perf_counter()
        training.fit(
            model,
            self.train,
            epochs=epochs,
            batch=plan.BATCH,
            lr=self.recipes.get(name, plan.OTHER).lr,
            seed=self.settings["seed"],
            on_epoch=lambda: steps.now(f"{what}: training, epoch {next(done)} of {epochs}"),
        )
        return time.perf_counter() - began


def run(args: argparse.Namespace) -> int:
    """Run the demo; see :func:`fastprune.cli.main` for the exit code.

    Raises:
        UsageError: before any work: a wrong argument, a missing package, an unwritable file.
        InterruptedRunError: after Ctrl-C; what was finished is in the JSON file.
    """
    common.require("sklearn", "matplotlib")
    chosen, settings = plan.settings(args)
    json_path = common.writable(args.json or args.out / "demo.json")
    plot_path = common.writable(args.plot or args.out / "demo.png")
    common.use_threads(args.threads)
    began = time.monotonic()
    document: dict[str, Any] = {
        "command": "demo",
        "schema": 1,
        "interrupted": False,
        "seconds": 0.0,
        "machine": machine.describe(torch.device("cpu"), torch.float32),
        "settings": settings,
        "models": [],
    }
    total = len(settings["models"]) * (1 + len(settings["methods"]) * len(settings["sparsities"]))
    console = render.stdout()
    try:
        watch = measuring.Stopwatch(settings["min_time"], torch.device("cpu"))
        job = Job(settings, chosen.recipes, watch, *plan.splits(), document["models"])
        tables.demo_header(console, document, plan.FULL.methods, plan.FULL.sparsities)
        with render.Steps(total) as steps:
            for name in settings["models"]:
                _network(job, name, steps)
            steps.now("drawing the plot")
            plots.demo(document, plot_path)
    except KeyboardInterrupt:
        document |= {"interrupted": True, "seconds": round(time.monotonic() - began, 1)}
        common.write_json(json_path, document)
        finished = sum(1 + len(network["results"]) for network in document["models"])
        raise common.InterruptedRunError(
            f"{finished} of {total} trainings finished, kept in {json_path}"
        ) from None
    document["seconds"] = round(time.monotonic() - began, 1)
    common.write_json(json_path, document)
    for network in document["models"]:
        tables.demo_network(console, network)
    tables.demo_notes(console, document)
    console.print(f"\n{document['seconds']:.0f} s; wrote {json_path} and {plot_path}")
    return 0


def _network(job: Job, name: str, steps: render.Steps) -> None:
    """Train one network dense, then pruned with every method at every sparsity."""
    info = data.info(plan.DATASET)
    with torch.random.fork_rng():
        torch.manual_seed(job.settings["seed"])
        base = models.create(name, num_classes=info.num_classes, in_shape=info.in_shape)
    batches = training.batches(job.train, plan.BATCH, job.settings["seed"])
    trained = copy.deepcopy(base)
    seconds = job.fit(trained, name, steps, f"{name} dense")
    steps.now(f"{name} dense: timing")
    baselines = {
        mode: measuring.best_dense(trained, batches[0], mode, job.watch) for mode in measuring.MODES
    }
    reached = training.accuracy(trained, job.test)
    network: dict[str, Any] = {
        "model": name,
        "parameters": sum(p.numel() for p in base.parameters()),
        "dense": {
            "accuracy": reached,
            "train_seconds": seconds,
            **{mode: baseline.to_dict() for mode, baseline in baselines.items()},
        },
        "results": [],
    }
    job.results.append(network)
    steps.done(f"{name} dense: accuracy {render.percent(reached)}")
    for method in job.settings["methods"]:
        for sparsity in job.settings["sparsities"]:
            what = f"{name} {method} {render.sparsity(sparsity)}"
            result = {"method": method, "sparsity": sparsity}
            result |= _case(job, name, base, baselines, batches, result, steps, what)
            network["results"].append(result)
            steps.done(
                f"{what}: accuracy {render.percent(result['accuracy'])}, "
                f"step {result['training']['speedup']:.2f}x, "
                f"inference {result['inference']['speedup']:.2f}x"
            )


def _case(
    job: Job,
    name: str,
    base: nn.Module,
    baselines: Mapping[measuring.Mode, measuring.Baseline],
    batches: Sequence[common.Batch],
    prune: Mapping[str, Any],
    steps: render.Steps,
    what: str,
) -> dict[str, Any]:
    """Prune at initialization, train with sparse layers, and time both modes."""
    method, first = prune["method"], batches[0]
    count = job.settings["steps"][method]
    scored = batches if count > 1 else batches[: plan.ONE_SHOT_BATCHES]
    steps.now(f"{what}: pruning")
    began = time.perf_counter()
    masks, caught = common.prune_at_init(
        base, method, prune["sparsity"], scored, F.cross_entropy, count, job.settings["seed"]
    )
    prune_seconds = time.perf_counter() - began
    steps.now(f"{what}: timing a training step")
    fast, report = measuring.sparse_network(base, masks, first, "training", job.watch)
    training_case = measuring.measure_case(
        fast, report, first, "training", baselines["training"], job.watch
    )
    train_seconds = job.fit(fast, name, steps, what)
    steps.now(f"{what}: timing inference")
    deployed, report = measuring.sparse_network(
        finalize(fast), masks, first, "inference", job.watch
    )
    inference_case = measuring.measure_case(
        deployed, report, first, "inference", baselines["inference"], job.watch
    )
    return {
        "kept": masks.nnz(),
        "prunable": masks.numel(),
        # Of the network that was timed: sparse layers, BatchNorm folded.
        "accuracy": training.accuracy(deployed, job.test),
        "warnings": caught,
        "prune_seconds": prune_seconds,
        "train_seconds": train_seconds,
        "training": training_case.to_dict(),
        "inference": inference_case.to_dict(),
    }
