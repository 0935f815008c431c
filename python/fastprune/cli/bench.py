"""``fastprune bench``: whole networks, dense against weight x mask against fastprune.

With ``--peers`` it times single layers against other libraries: see ``fastprune.cli.peers``.

The network is pruned without having been trained: timings depend on the masks and shapes, not on
the values of the weights.

The JSON file (times in seconds, except in ``report``, where names end in ``_ms``)::

    {"command": "bench", "schema": 1, "interrupted": false,
     "machine": {see fastprune.cli.machine.describe},
     "settings": {"model", "input_shape", "batch", "data", "methods", "sparsities",
                  "modes": ["inference", "training"], "steps": {method: T}, "seed", "min_time"},
     "parameters": 11173962,
     "dense": {mode: {"form", "median", "low", "high", "runs", "tried": {form: {...}}}},
     "results": [{"method", "sparsity", "kept", "prunable", "prune_seconds", "warnings",
                  mode: {"dense": {"form", "median", "low", "high", "runs"},
                         "masked": {"median", ...}, "sparse": {"median", ...},
                         "speedup", "speedup_over_masked", "disturbed", "layers",
                         "sparse_layers",
                         "accelerate_seconds", "report": fastprune.Report.to_dict()}}]}

``speedup`` is the dense median over fastprune's, ``disturbed`` is true where other work kept the
machine busy (``measuring.Case``); ``low`` and ``high`` are quartiles. A case that
failed has ``"error"`` in place of the modes. ``accelerate_seconds`` is what packing the masks and
timing every layer took, once per network. ``interrupted`` is true after Ctrl-C.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from fastprune import data
from fastprune.cli import common, inputs, machine, measuring, peers, plots, render, tables
from fastprune.pruners.registry import PRUNERS

SUMMARY = "Time a network (best dense form, weight x mask, fastprune), or layers against peers."

NETWORK_OPTIONS: dict[str, Any] = {
    "methods": ["random", "magnitude"],
    "device": "cpu",
    "dtype": "float32",
    "training": True,
    "layers": False,
}
"""Defaults of options that ``--peers`` does not take; some others have none."""

DEFAULTS: dict[str, Any] = {"sparsities": [0.9, 0.95], "batch": 16, "seed": 0, "min_time": 0.5}
"""Defaults of options that ``--peers`` takes too, with its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``; None where not given, as ``--peers`` has other defaults."""
    parser.add_argument("--model", help="fastprune's, torchvision's or timm's name")
    parser.add_argument(
        "--methods",
        type=common.comma_separated,
        help=f"some of {','.join(PRUNERS)} [random,magnitude]",
    )
    parser.add_argument(
        "--sparsities",
        type=common.sparsities,
        help="pruned fractions [0.9,0.95; --peers: 0.8,0.9,0.95,0.98]",
    )
    parser.add_argument(
        "--batch", type=common.positive_int, help="samples [16; --peers: the set's own]"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[cpu]")
    parser.add_argument("--dtype", choices=tuple(inputs.DTYPES), help="[float32]")
    parser.add_argument("--threads", type=common.positive_int, help="threads [torch's choice]")
    parser.add_argument(
        "--input-shape", type=inputs.shape, metavar="C,H,W", help="[the network's own]"
    )
    parser.add_argument("--num-classes", type=common.positive_int, help="[the network's own]")
    parser.add_argument("--dataset", help=f"real inputs: {', '.join(data.names())} [random]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set's files")
    parser.add_argument(
        "--training",
        action=argparse.BooleanOptionalAction,
        help="time training steps as well as forward passes",
    )
    parser.add_argument(
        "--layers", action="store_true", default=None, help="also print a table per layer"
    )
    parser.add_argument("--seed", type=common.seed, help="of weights and inputs [0]")
    parser.add_argument(
        "--min-time",
        type=common.positive_float,
        metavar="S",
        help="seconds of timing per candidate [0.5; --peers: 0.2]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG plot (matplotlib)")
    peers.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the bench; see :func:`fastprune.cli.main` for the exit code.

    Raises:
        UsageError: before any timing: unknown names, a missing device or package, bad files.
        InterruptedRunError: after Ctrl-C; with ``--json``, what was finished is in the file.
    """
    if args.peers:
        whole = ["model", "input_shape", "num_classes", "dataset", "data", *NETWORK_OPTIONS]
        common.refuse(args, whole, "not with --peers, which times layers")
        return peers.run(args)
    common.refuse(args, peers.OWN_OPTIONS, "only with --peers")
    if args.model is None:
        raise common.UsageError("--model is needed, or --peers")
    common.fill(args, NETWORK_OPTIONS | DEFAULTS)
    if args.plot is not None:
        common.require("matplotlib")
    methods = common.known_methods(args.methods)
    device, dtype = inputs.device(args.device), inputs.DTYPES[args.dtype]
    for path in (args.json, args.plot):
        if path is not None:
            common.writable(path)
    common.use_threads(args.threads)
    model, in_shape = inputs.network(args)
    x, y = inputs.batch(args, model, in_shape)
    model, batch = model.to(device, dtype), (x.to(device, dtype), y.to(device))
    modes = [m for m in ("inference", "training") if m == "inference" or args.training]
    document: dict[str, Any] = {
        "command": "bench",
        "schema": 1,
        "interrupted": False,
        "machine": machine.describe(device, dtype),
        "settings": {
            "model": args.model,
            "input_shape": list(x.shape[1:]),
            "batch": args.batch,
            "data": args.dataset or "random",
            "methods": methods,
            "sparsities": args.sparsities,
            "modes": modes,
            "steps": {method: common.steps_of(method) for method in methods},
            "seed": args.seed,
            "min_time": args.min_time,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "dense": {},
        "results": [],
    }
    watch = measuring.Stopwatch(args.min_time, device, min_rounds=3)
    console = render.stdout()
    with common.keeping(document, args.json):
        _header(console, document)
        _measure(document, model, batch, watch)
    return _report(args, console, document)


def _header(console: Console, document: dict[str, Any]) -> None:
    tables.machine_lines(console, document["machine"])
    settings = document["settings"]
    source = settings["data"]
    console.print(
        f"{settings['model']}, {document['parameters']:,} parameters, untrained; input "
        f"{'x'.join(map(str, [settings['batch'], *settings['input_shape']]))}, "
        f"{'random inputs and labels' if source == 'random' else f'data: {source}'}"
    )


def _measure(
    document: dict[str, Any], model: nn.Module, batch: common.Batch, watch: measuring.Stopwatch
) -> None:
    """Fill ``document`` case by case, so that an interruption keeps what is finished."""
    settings = document["settings"]
    cases = [(m, s) for m in settings["methods"] for s in settings["sparsities"]]
    with render.Steps(len(cases) + 1) as steps:
        steps.now("dense")
        baselines = {}
        for mode in settings["modes"]:
            baselines[mode] = measuring.best_dense(model, batch, mode, watch)
            document["dense"][mode] = baselines[mode].to_dict()
        steps.done(
            "dense: "
            + ", ".join(
                f"{tables.MODE_TITLES[mode]} {render.milliseconds(b.tried[b.form].median)} ms"
                for mode, b in baselines.items()
            )
        )
        for method, sparsity in cases:
            what = f"{method} {render.sparsity(sparsity)}"
            result: dict[str, Any] = {"method": method, "sparsity": sparsity}
            try:
                seed = settings["seed"]
                result |= _case(model, batch, method, sparsity, seed, baselines, watch, steps)
            except (ValueError, TypeError, RuntimeError) as error:
                # One method that cannot score this network must not hide what the others do.
                result["error"] = " ".join(f"{type(error).__name__}: {error}".split())
            document["results"].append(result)
            outcome = [
                f"{tables.MODE_TITLES[mode]} {result[mode]['speedup']:.2f}x"
                for mode in settings["modes"]
                if mode in result
            ]
            steps.done(f"{what}: {', '.join(outcome) or result['error']}")


def _case(
    model: nn.Module,
    batch: common.Batch,
    method: str,
    sparsity: float,
    seed: int,
    baselines: dict[measuring.Mode, measuring.Baseline],
    watch: measuring.Stopwatch,
    steps: render.Steps,
) -> dict[str, Any]:
    """Prune once, then time each mode."""
    what = f"{method} {render.sparsity(sparsity)}"
    steps.now(f"{what}: pruning")
    began = time.perf_counter()
    masks, caught = common.prune_at_init(
        model, method, sparsity, [batch], _float_cross_entropy, common.steps_of(method), seed
    )
    result: dict[str, Any] = {
        "kept": masks.nnz(),
        "prunable": masks.numel(),
        "prune_seconds": time.perf_counter() - began,
        "warnings": caught,
    }
    timed: dict[str, Any] = {}
    for mode, baseline in baselines.items():
        steps.now(f"{what}: choosing kernels for the {tables.MODE_TITLES[mode]}")
        began = time.perf_counter()
        fast, report = measuring.sparse_network(model, masks, batch, mode, watch)
        accelerate_seconds = time.perf_counter() - began
        steps.now(f"{what}: timing the {tables.MODE_TITLES[mode]}")
        masked = measuring.masked_dense(model, masks, batch, mode, baseline.form)
        case = measuring.measure_case(fast, report, batch, mode, baseline, watch, masked)
        timed[mode] = {
            **case.to_dict(),
            "accelerate_seconds": accelerate_seconds,
            "report": report.to_dict(),
        }
    return result | timed


def _float_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in at least float32: float16 logits overflow its sums."""
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)


def _report(args: argparse.Namespace, console: Console, document: dict[str, Any]) -> int:
    """Print the tables and write the files; 1 if a case failed."""
    if args.json is not None:
        common.write_json(args.json, document)
    finished = [r for r in document["results"] if "error" not in r]
    for mode in document["settings"]["modes"]:
        tables.bench_mode(console, document, mode)
        if args.layers:
            for result in finished:
                tables.bench_layers(console, result, mode)
    tables.bench_notes(console, document)
    if args.plot is not None and finished:
        plots.bench(document, args.plot)
    written = [str(p) for p in (args.json, args.plot if finished else None) if p is not None]
    if written:
        console.print(f"\nwrote {' and '.join(written)}")
    return 0 if len(finished) == len(document["results"]) else 1
