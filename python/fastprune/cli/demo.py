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
                 "dense": {"accuracy", "training": DENSE, "inference": DENSE},
                 "results": [{"method", "sparsity", "kept", "prunable", "accuracy", "warnings",
                              "training": CASE, "inference": CASE}]}]}
    DENSE = {"form", "median", "low", "high", "runs", "tried": {form: {"median", ...}}}
    CASE  = {"dense": {"form", "median", ...}, "sparse": {"median", ...}, "speedup",
             "layers", "sparse_layers"}

``interrupted`` is true after Ctrl-C: finished cases are there, the others missing. A network that
was not reached is missing; one whose dense training was not finished too.
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
from fastprune.cli import common, machine, measuring, plots, render, tables, training
from fastprune.convert import finalize
from fastprune.pruners.registry import PRUNERS

SUMMARY = "Train, prune, retrain sparse and time two networks on real handwritten digits."
BATCH = 64
_DATASET = "digits"
_DEFAULT_RECIPE = (5, 0.05)  # epochs, peak learning rate, for networks without one below


@dataclass(frozen=True)
class Plan:
    """How much the demo does; what ``--quick`` cuts is the difference between the two below."""

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    iterative_steps: int
    """Steps of the methods that score on data at every step."""
    recipes: Mapping[str, tuple[int, float]]
    """model -> epochs, peak learning rate."""
    min_time: float
    """Seconds of timing per candidate."""


FULL = Plan(
    tuple(PRUNERS),
    (0.8, 0.9, 0.95, 0.98),
    20,
    {"lenet-300-100": (30, 0.05), "vgg-small": (5, 0.05)},
    0.08,
)
QUICK = Plan(
    ("magnitude", "snip", "synflow"),
    (0.9, 0.98),
    10,
    {"lenet-300-100": (15, 0.05), "vgg-small": (3, 0.05)},
    0.04,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``."""
    parser.add_argument("--quick", action="store_true", help="a fifth of the work, in 20 seconds")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results [out]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results [OUT/demo.json]")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG plot [OUT/demo.png]")
    parser.add_argument("--threads", type=common.positive_int, help="threads [torch's choice]")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches, scores [0]")
    parser.add_argument(
        "--methods", type=common.comma_separated, help=f"some of {','.join(PRUNERS)} [all]"
    )
    parser.add_argument(
        "--sparsities", type=common.sparsities, help="pruned fractions [0.8,0.9,0.95,0.98]"
    )
    parser.add_argument(
        "--models", type=common.comma_separated, help="networks [lenet-300-100,vgg-small]"
    )
    parser.add_argument("--epochs", type=common.positive_int, help="of every training [by network]")


@dataclass
class Job:
    """The settings of one run, its data, and its results so far."""

    settings: dict[str, Any]
    watch: measuring.Stopwatch
    recipes: Mapping[str, tuple[int, float]]
    train: training.Split
    test: training.Split
    results: list[dict[str, Any]] = field(default_factory=list)

    def fit(self, model: nn.Module, name: str, steps: render.Steps, what: str) -> None:
        """Train as every network of this run is trained."""
        epochs, lr = self.settings["epochs"][name], self.recipe(name)[1]
        done = iter(range(1, epochs + 1))
        steps.now(f"{what}: training, {epochs} epochs")
        training.fit(
            model,
            self.train,
            epochs=epochs,
            batch=BATCH,
            lr=lr,
            seed=self.settings["seed"],
            on_epoch=lambda: steps.now(f"{what}: training, epoch {next(done)} of {epochs}"),
        )

    def recipe(self, name: str) -> tuple[int, float]:
        """Epochs and peak learning rate of a network."""
        return self.recipes.get(name, _DEFAULT_RECIPE)


def _job(args: argparse.Namespace) -> Job:
    """Check everything that can be checked before the work begins."""
    common.require("sklearn", "matplotlib")
    plan = QUICK if args.quick else FULL
    methods = common.known_methods(args.methods or plan.methods)
    names = list(dict.fromkeys(args.models or plan.recipes))
    info = data.info(_DATASET)
    with common.usage_errors():
        for name in names:
            model = models.create(name, num_classes=info.num_classes, in_shape=info.in_shape)
            model(torch.zeros(2, *info.in_shape))
        train, test = (training.load_split(_DATASET, split) for split in ("train", "test"))
    common.use_threads(args.threads)
    settings = {
        "quick": args.quick,
        "seed": args.seed,
        "batch": BATCH,
        "methods": methods,
        "sparsities": list(args.sparsities or plan.sparsities),
        "steps": {m: common.steps_of(m, plan.iterative_steps) for m in methods},
        "models": names,
        "epochs": {
            n: args.epochs or plan.recipes.get(n, _DEFAULT_RECIPE)[0] for n in names
        },
        "min_time": plan.min_time,
    }  # fmt: skip
    watch = measuring.Stopwatch(plan.min_time, torch.device("cpu"))
    return Job(settings, watch, plan.recipes, train, test)


def run(args: argparse.Namespace) -> int:
    """Run the demo; see :func:`fastprune.cli.main` for the exit code.

    Raises:
        UsageError: before any work: a wrong argument, a missing package, an unwritable file.
        Interrupted: after Ctrl-C; what was finished is in the JSON file.
    """
    job = _job(args)
    json_path = common.writable(args.json or args.out / "demo.json")
    plot_path = common.writable(args.plot or args.out / "demo.png")
    assert json_path is not None and plot_path is not None
    settings = job.settings
    began = time.monotonic()
    document: dict[str, Any] = {
        "command": "demo",
        "schema": 1,
        "interrupted": False,
        "seconds": 0.0,
        "machine": machine.describe(torch.device("cpu"), torch.float32),
        "settings": settings,
        "models": job.results,
    }
    console = render.stdout()
    total = len(settings["models"]) * (1 + len(settings["methods"]) * len(settings["sparsities"]))
    try:
        tables.demo_header(console, document, FULL.methods, FULL.sparsities)
        with render.Steps(total) as steps:
            for name in settings["models"]:
                _network(job, name, steps)
        document["seconds"] = round(time.monotonic() - began, 1)
        common.write_json(json_path, document)
        plots.demo(document, plot_path)
    except KeyboardInterrupt:
        document["interrupted"] = True
        document["seconds"] = round(time.monotonic() - began, 1)
        common.write_json(json_path, document)
        finished = sum(len(n["results"]) + 1 for n in job.results)
        raise common.Interrupted(
            f"{finished} of {total} trainings finished, kept in {json_path}"
        ) from None
    for network in job.results:
        tables.demo_network(console, network)
    tables.demo_notes(console, document)
    console.print(f"\n{document['seconds']:.0f} s; wrote {json_path} and {plot_path}")
    return 0


def _network(job: Job, name: str, steps: render.Steps) -> None:
    """Train one network dense, then pruned with every method at every sparsity."""
    info = data.info(_DATASET)
    with torch.random.fork_rng():
        torch.manual_seed(job.settings["seed"])
        base = models.create(name, num_classes=info.num_classes, in_shape=info.in_shape)
    batches = training.batches(job.train, BATCH, job.settings["seed"])
    trained = copy.deepcopy(base)
    job.fit(trained, name, steps, f"{name} dense")
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
            **{mode: baseline.to_dict() for mode, baseline in baselines.items()},
        },
        "results": [],
    }
    job.results.append(network)
    steps.done(f"{name} dense: accuracy {render.percent(reached)}")
    for method in job.settings["methods"]:
        for sparsity in job.settings["sparsities"]:
            what = f"{name} {method} {render.sparsity(sparsity)}"
            result = _case(job, name, base, baselines, batches, (method, sparsity), steps, what)
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
    what_to_prune: tuple[str, float],
    steps: render.Steps,
    what: str,
) -> dict[str, Any]:
    """Prune at initialization, train with sparse layers, and time both modes."""
    method, sparsity = what_to_prune
    steps.now(f"{what}: pruning")
    masks, caught = common.prune_at_init(
        base, method, sparsity, batches, F.cross_entropy, job.settings["steps"][method]
    )
    steps.now(f"{what}: choosing kernels, timing a training step")
    cases = {}
    fast, report = measuring.sparse_network(base, masks, batches[0], "training", job.watch)
    cases["training"] = measuring.measure_case(
        fast, report, batches[0], "training", baselines["training"], job.watch
    )
    job.fit(fast, name, steps, what)
    steps.now(f"{what}: timing inference")
    deployed, report = measuring.sparse_network(
        finalize(fast), masks, batches[0], "inference", job.watch
    )
    cases["inference"] = measuring.measure_case(
        deployed, report, batches[0], "inference", baselines["inference"], job.watch
    )
    return {
        "method": method,
        "sparsity": sparsity,
        "kept": masks.nnz(),
        "prunable": masks.numel(),
        # Of the network that was timed: sparse layers, BatchNorm folded.
        "accuracy": training.accuracy(deployed, job.test),
        "warnings": caught,
        **{mode: case.to_dict() for mode, case in cases.items()},
    }
