"""``fastprune bench``: whole networks, dense against weight x mask against fastprune.

The network is pruned without having been trained: timings depend on the masks and shapes, not on
the values of the weights.

The JSON file (times in seconds, except in ``report``, where names end in ``_ms``)::

    {"command": "bench", "schema": 1, "interrupted": false,
     "machine": {see fastprune.cli.machine.describe},
     "settings": {"model", "input_shape", "num_classes", "batch", "data", "methods", "sparsities",
                  "modes": ["inference", "training"], "steps": {method: T}, "seed", "min_time"},
     "parameters": 11173962,
     "dense": {mode: {"form", "median", "low", "high", "runs", "tried": {form: {...}}}},
     "results": [{"method", "sparsity", "kept", "prunable", "prune_seconds", "warnings",
                  mode: {"dense": {"form", "median", "low", "high", "runs"},
                         "masked": {"median", ...}, "sparse": {"median", ...},
                         "speedup", "speedup_over_masked", "layers", "sparse_layers",
                         "accelerate_seconds", "report": fastprune.Report.to_dict()}}]}

``speedup`` is the dense median over fastprune's; ``low`` and ``high`` are quartiles. A case that
failed has ``"error"`` in place of the modes. ``accelerate_seconds`` is what packing the masks and
timing every layer took, once per network. ``interrupted`` is true after Ctrl-C.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset

from fastprune import data, models
from fastprune.cli import common, machine, measuring, plots, render, tables
from fastprune.pruners.registry import PRUNERS

SUMMARY = "Time a network: best dense form, weight x mask, and fastprune."
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _shape(text: str) -> tuple[int, int, int]:
    parts = [common.positive_int(part) for part in common.comma_separated(text)]
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not C,H,W, such as 3,32,32")
    return parts[0], parts[1], parts[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    parser.add_argument("--model", required=True, help="fastprune's, torchvision's or timm's name")
    parser.add_argument(
        "--methods",
        type=common.comma_separated,
        default=["random", "magnitude"],
        help=f"some of {','.join(PRUNERS)} [random,magnitude]",
    )
    parser.add_argument(
        "--sparsities",
        type=common.sparsities,
        default=[0.9, 0.95],
        help="pruned fractions [0.9,0.95]",
    )
    parser.add_argument("--batch", type=common.positive_int, default=16, help="samples [16]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--threads", type=common.positive_int, help="threads [torch's choice]")
    parser.add_argument("--input-shape", type=_shape, metavar="C,H,W", help="[the network's own]")
    parser.add_argument("--num-classes", type=common.positive_int, help="[the network's own]")
    parser.add_argument("--dataset", help=f"real inputs: {', '.join(data.names())} [random]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set's files")
    parser.add_argument(
        "--training",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time training steps as well as forward passes",
    )
    parser.add_argument("--layers", action="store_true", help="also print a table per layer")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and batches [0]")
    parser.add_argument(
        "--min-time",
        type=common.positive_float,
        default=0.5,
        metavar="S",
        help="seconds of timing per candidate [0.5]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG plot (matplotlib)")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        why = "finds no GPU" if torch.version.cuda else "is a CPU-only build"
        raise common.UsageError(f"--device cuda: torch {torch.__version__} {why}")
    return torch.device(name)


def _network(args: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...], int | None]:
    """The network with its input shape, and its number of classes where one was chosen."""
    with common.usage_errors():
        shape, classes = args.input_shape, args.num_classes
        if args.data is not None and args.dataset is None:
            raise ValueError(f"--data needs --dataset, one of {', '.join(data.names())}")
        if args.dataset is not None:
            info = data.info(args.dataset)
            shape, classes = shape or info.in_shape, classes or info.num_classes
        shape = shape or models.default_input_shape(args.model)
        return models.create(args.model, num_classes=classes, in_shape=shape), shape, classes


def _batch(args: argparse.Namespace, model: nn.Module, shape: Sequence[int]) -> common.Batch:
    """One batch: real data where asked for, else normal noise and uniform labels."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.dataset is not None:
        with common.usage_errors():
            dataset = data.load(args.dataset, args.data, "train")
            size = len(dataset)  # type: ignore[arg-type]
            if size < args.batch:
                raise ValueError(f"--batch {args.batch}: the data set has {size} samples")
            rows = torch.randperm(size, generator=generator)[: args.batch].tolist()
            x, y = next(iter(DataLoader(Subset(dataset, rows), batch_size=args.batch)))
            return x, y
    x = torch.randn(args.batch, *shape, generator=generator)
    with common.usage_errors(RuntimeError, ValueError, AssertionError), torch.inference_mode():
        logits = model.eval()(x)
        model.train()
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise common.UsageError(f"--model {args.model}: expected logits (batch, classes)")
    return x, torch.randint(logits.shape[1], (args.batch,), generator=generator)


def run(args: argparse.Namespace) -> int:
    """Run the bench; see :func:`fastprune.cli.main` for the exit code.

    Raises:
        UsageError: before any timing: unknown names, a missing device or package, bad files.
        Interrupted: after Ctrl-C; with ``--json``, what was finished is in the file.
    """
    if args.plot is not None:
        common.require("matplotlib")
    if args.dataset is not None and "digits" in args.dataset.lower():
        common.require("sklearn")
    methods = common.known_methods(args.methods)
    device, dtype = _device(args.device), DTYPES[args.dtype]
    json_path, plot_path = common.writable(args.json), common.writable(args.plot)
    common.use_threads(args.threads)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model, shape, classes = _network(args)
    x, y = _batch(args, model, shape)
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
            "num_classes": classes,
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
    try:
        _header(console, document)
        _measure(document, model, batch, watch)
    except KeyboardInterrupt:
        document["interrupted"] = True
        where = "nothing written (no --json)"
        if json_path is not None:
            common.write_json(json_path, document)
            where = f"kept in {json_path}"
        raise common.Interrupted(f"{len(document['results'])} cases finished, {where}") from None
    return _report(args, console, document, json_path, plot_path)


def _header(console: Any, document: dict[str, Any]) -> None:
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
                result |= _case(model, batch, method, sparsity, baselines, watch, steps)
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
    baselines: dict[measuring.Mode, measuring.Baseline],
    watch: measuring.Stopwatch,
    steps: render.Steps,
) -> dict[str, Any]:
    """Prune once, then time each mode."""
    what = f"{method} {render.sparsity(sparsity)}"
    steps.now(f"{what}: pruning")
    began = time.perf_counter()
    masks, caught = common.prune_at_init(
        model, method, sparsity, [batch], _float_cross_entropy, common.steps_of(method)
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


def _report(
    args: argparse.Namespace,
    console: Any,
    document: dict[str, Any],
    json_path: Path | None,
    plot_path: Path | None,
) -> int:
    """Print the tables and write the files; 1 if a case failed."""
    if json_path is not None:
        common.write_json(json_path, document)
    finished = [r for r in document["results"] if "error" not in r]
    for mode in document["settings"]["modes"]:
        tables.bench_mode(console, document, mode)
        if args.layers:
            for result in finished:
                tables.bench_layers(console, result, mode)
    tables.bench_notes(console, document)
    if plot_path is not None and finished:
        plots.bench(document, plot_path)
    written = [str(p) for p in (json_path, plot_path if finished else None) if p is not None]
    if written:
        console.print(f"\nwrote {' and '.join(written)}")
    return 0 if len(finished) == len(document["results"]) else 1
