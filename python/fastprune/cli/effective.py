"""``fastprune effective``: how much of what pruning leaves still matters.

The network is pruned without having been trained, by each method at each (direct) sparsity, anew
for each seed: weights, inputs and the noise of random pruning. A kept weight is inactive if no path
from an input to an output leads through it (paper 003).

The JSON file::

    {"command": "effective", "schema": 1, "interrupted": false,
     "machine": {see fastprune.cli.machine.describe},
     "settings": {"model", "input_shape", "batch", "data", "methods", "sparsities", "quota",
                  "steps": {method: T}, "seeds": [0, 1, 2]},
     "parameters": 266610,
     "results": [{"method", "sparsity", "seed", "kept", "prunable", "active",
                  "direct_sparsity", "effective_sparsity",
                  "direct_compression", "effective_compression",
                  "emptied": [layers without a kept weight],
                  "collapsed": [layers without an active weight],
                  "prune_seconds", "effective_seconds",
                  "layers": [{"name", "weights", "kept", "active"}]}]}

A compression is null where nothing is left; the network is then cut in two. A case that failed has
``"error"`` after its seed. ``effective_seconds`` leaves out tracing the network, which is done once
per seed. ``interrupted`` is true after Ctrl-C: what was finished is there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from rich.console import Console
from torch import nn

from fastprune import data
from fastprune.cli import common, effective_tables, inputs, machine, plots, render
from fastprune.effective import effective_masks
from fastprune.effective.plots import layer_counts
from fastprune.masks import Masks
from fastprune.metrics import direct_compression
from fastprune.pruners.registry import PRUNERS

SUMMARY = "Effective against direct sparsity of a network, by method."

_METHODS = ["random", "snip", "synflow", "lamp", "magnitude"]
_SPARSITIES = [0.5, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999]
_QUOTAS = ("uniform", "uniform-plus", "erk", "smart-ratio", "igq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effective``."""
    parser.add_argument("--model", required=True, help="fastprune's, torchvision's or timm's name")
    parser.add_argument(
        "--methods",
        type=common.comma_separated,
        default=_METHODS,
        help=f"some of {','.join(PRUNERS)} [{','.join(_METHODS)}]",
    )
    parser.add_argument(
        "--sparsities",
        type=common.sparsities,
        default=_SPARSITIES,
        help=f"pruned fractions [{','.join(map(str, _SPARSITIES))}]",
    )
    parser.add_argument(
        "--quota", choices=_QUOTAS, help="sparsity of each layer [what the method chooses]"
    )
    parser.add_argument(
        "--seeds", type=common.positive_int, default=3, help="networks per case [3]"
    )
    parser.add_argument("--seed", type=common.seed, default=0, help="the first of them [0]")
    parser.add_argument(
        "--batch", type=common.positive_int, default=100, help="samples that methods see [100]"
    )
    parser.add_argument("--threads", type=common.positive_int, help="threads [torch's choice]")
    parser.add_argument(
        "--input-shape", type=inputs.shape, metavar="C,H,W", help="[the network's own]"
    )
    parser.add_argument("--num-classes", type=common.positive_int, help="[the network's own]")
    parser.add_argument("--dataset", help=f"real inputs: {', '.join(data.names())} [random]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set's files")
    parser.add_argument("--layers", action="store_true", help="also print a table per layer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG plot (matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Run the comparison; see :func:`fastprune.cli.main` for the exit code.

    Raises:
        UsageError: before any pruning: unknown names, a missing package, bad files.
        InterruptedRunError: after Ctrl-C; with ``--json``, what was finished is in the file.
    """
    if args.plot is not None:
        common.require("matplotlib")
    methods = common.known_methods(args.methods)
    for path in (args.json, args.plot):
        if path is not None:
            common.writable(path)
    common.use_threads(args.threads)
    seeds = list(range(args.seed, args.seed + args.seeds))
    model, in_shape = inputs.network(args)
    x, _ = inputs.batch(args, model, in_shape)
    document: dict[str, Any] = {
        "command": "effective",
        "schema": 1,
        "interrupted": False,
        "machine": machine.describe(x.device, x.dtype),
        "settings": {
            "model": args.model,
            "input_shape": list(x.shape[1:]),
            "batch": args.batch,
            "data": args.dataset or "random",
            "methods": methods,
            "sparsities": sorted(args.sparsities),
            "quota": args.quota,
            "steps": {method: common.steps_of(method) for method in methods},
            "seeds": seeds,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "results": [],
    }
    console = render.stdout()
    with common.keeping(document, args.json):
        effective_tables.header(console, document)
        _measure(document, args)
    return _report(args, console, document)


def _measure(document: dict[str, Any], args: argparse.Namespace) -> None:
    """Fill ``document`` case by case, so that an interruption keeps what is finished."""
    settings = document["settings"]
    cases = [(m, s) for m in settings["methods"] for s in settings["sparsities"]]
    with render.Steps(len(settings["seeds"]) * len(cases)) as steps:
        for seed in settings["seeds"]:
            steps.now(f"seed {seed}: network")
            own = copy.copy(args)
            own.seed = seed
            model, in_shape = inputs.network(own)
            batch = inputs.batch(own, model, in_shape)
            with common.usage_errors():  # the first call traces, and says what it cannot trace
                effective_masks(model, Masks.ones(model), example_input=batch[0])
            for method, sparsity in cases:
                what = f"{method} {render.sparsity(sparsity)}, seed {seed}"
                steps.now(what)
                result: dict[str, Any] = {"method": method, "sparsity": sparsity, "seed": seed}
                try:
                    result |= _case(model, batch, method, sparsity, settings["quota"], seed)
                    outcome = f"effective {effective_tables.sparsity(result['effective_sparsity'])}"
                except (ValueError, TypeError, RuntimeError) as error:
                    # One method that cannot score this network must not hide what the others do.
                    outcome = result["error"] = " ".join(f"{type(error).__name__}: {error}".split())
                document["results"].append(result)
                steps.done(f"{what}: {outcome}")


def _case(
    model: nn.Module,
    batch: common.Batch,
    method: str,
    sparsity: float,
    quota: str | None,
    seed: int,
) -> dict[str, Any]:
    began = time.perf_counter()
    masks, _ = common.prune_at_init(
        model,
        method,
        sparsity,
        [batch],
        F.cross_entropy,
        common.steps_of(method),
        seed,
        quota=quota,
    )
    pruned = time.perf_counter()
    active = effective_masks(model, masks, example_input=batch[0])
    done = time.perf_counter()
    layers = layer_counts(masks, active)
    return {
        "kept": masks.nnz(),
        "prunable": masks.numel(),
        "active": active.nnz(),
        "direct_sparsity": masks.sparsity(),
        "effective_sparsity": active.sparsity(),
        "direct_compression": direct_compression(masks),
        "effective_compression": direct_compression(active),
        "emptied": [c.name for c in layers if not c.kept],
        "collapsed": [c.name for c in layers if not c.active],
        "prune_seconds": pruned - began,
        "effective_seconds": done - pruned,
        "layers": [dataclasses.asdict(c) for c in layers],
    }


def _report(args: argparse.Namespace, console: Console, document: dict[str, Any]) -> int:
    """Print the tables and write the files; 1 if a case failed."""
    if args.json is not None:
        common.write_json(args.json, document)
    finished: Sequence[Mapping[str, Any]] = [r for r in document["results"] if "error" not in r]
    effective_tables.summary(console, document)
    if args.layers:
        effective_tables.layers(console, document)
    if args.plot is not None and finished:
        plots.effective(document, args.plot)
    written = [str(p) for p in (args.json, args.plot if finished else None) if p is not None]
    if written:
        console.print(f"\nwrote {' and '.join(written)}")
    return 0 if len(finished) == len(document["results"]) else 1
