"""``fastprune bench --peers``: single layers, fastprune against everything else that multiplies.

Every result is checked against a float64 product before it is timed; all candidates of a case are
timed in turn. Activations and weights are noise.

The JSON file (times in seconds)::

    {"command": "bench --peers", "schema": 1, "interrupted": false,
     "machine": {see fastprune.cli.machine.describe},
     "peers": {name: {"dtype", "dense_torch": a form of the baseline,
                      "reason": null or why it cannot run, "versions": {package: ...}}},
     "ceilings": {"flops", "bandwidth"} per second, measured in this run,
     "settings": {"set", "batches", "masks", "sparsities", "seed", "min_time", "quick"},
     "results": [{"case", "kind", "batch", "layer": {...}, "count", "mask", "sparsity",
                  ... see fastprune.peers.summary.summarize,
                  "candidates": {name: see fastprune.peers.compare.compare}}],
     "means": [see fastprune.peers.summary.means]}

``count`` is how often the network has the layer. ``density`` of a case differs from 1 - sparsity
where a pruner chose how much each layer keeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fastprune import models
from fastprune.cli import common, machine, peer_tables, plots, render
from fastprune.peers import compare, layers, masks, roofline, summary

DEFAULTS: dict[str, Any] = {
    "set": "kernels",
    "masks": list(masks.KINDS),
    "sparsities": [0.8, 0.9, 0.95, 0.98],
    "min_time": 0.2,
    "seed": 0,
}
QUICK: dict[str, Any] = {"masks": ["random"], "sparsities": [0.9], "min_time": 0.05}
QUICK_CASES = 4

OWN_OPTIONS = ("set", "masks", "quick")
"""Options of ``bench`` that need ``--peers``."""

PRUNING_SAMPLES = 8
"""Samples of noise that a real pruner scores on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``--peers`` adds to ``bench``; None where not given."""
    group = parser.add_argument_group("single layers against other libraries")
    group.add_argument(
        "--peers", action="store_true", help="compare layers with other libraries, not a model"
    )
    group.add_argument("--set", choices=tuple(layers.SETS), help="which layers [kernels]")
    group.add_argument(
        "--masks",
        type=common.comma_separated,
        help="random, uneven (rows of unequal length), or a pruning method, which then prunes the "
        "whole network of the set [random,uneven]",
    )
    group.add_argument(
        "--quick",
        action="store_true",
        default=None,
        help=f"{QUICK_CASES} layers, random masks, 90 %%, short timings",
    )


def run(args: argparse.Namespace) -> int:
    """Run the comparison; see :func:`fastprune.cli.main` for the exit code.

    Raises:
        UsageError: before any timing: an unknown mask, a missing package, bad files.
        InterruptedRunError: after Ctrl-C; with ``--json``, what was finished is in the file.
    """
    if args.plot is not None:
        common.require("matplotlib")
    common.fill(args, (QUICK if args.quick else {}) | {"quick": False})
    common.fill(args, DEFAULTS)
    chosen = layers.SETS[args.set]
    kinds = _mask_kinds(args.masks, args.set)
    for path in (args.json, args.plot):
        if path is not None:
            common.writable(path)
    common.use_threads(args.threads)
    cases = chosen.cases(None if args.batch is None else [args.batch])
    if args.quick:
        last = QUICK_CASES - 1  # from the first to the last case, evenly
        picks = {round(i * (len(cases) - 1) / last) for i in range(QUICK_CASES)}
        cases = [cases[i] for i in sorted(picks)]
    reasons = {peer.name: peer.available() for peer in compare.PEERS}
    document: dict[str, Any] = {
        "command": "bench --peers",
        "schema": 1,
        "interrupted": False,
        "machine": machine.describe(torch.device("cpu"), torch.float32),
        "peers": {
            peer.name: {
                "dtype": peer.dtype,
                "dense_torch": peer.dense_torch,
                "reason": reasons[peer.name],
                "versions": {} if reasons[peer.name] else peer.versions(),
            }
            for peer in compare.PEERS
        },
        "ceilings": {},
        "settings": {
            "set": args.set,
            "batches": list(dict.fromkeys(layer.batch for layer, _ in cases)),
            "masks": kinds,
            "sparsities": args.sparsities,
            "seed": args.seed,
            "min_time": args.min_time,
            "quick": args.quick,
        },
        "results": [],
        "means": [],
    }
    console = render.stdout()
    with common.keeping(document, args.json):
        ceilings = roofline.ceilings()
        document["ceilings"] = asdict(ceilings)
        peer_tables.header(console, document, chosen.title)
        _measure(document, cases, reasons, ceilings)
    by_batch = args.batch is not None or chosen.batches is not None
    document["means"] = summary.means(document["results"], by_batch)
    return _report(args, console, document)


def _mask_kinds(names: list[str], name_of_set: str) -> list[str]:
    """The kinds of masks, spelled as fastprune does.

    Raises:
        UsageError: an unknown kind, or a pruner for a set that is no network of fastprune's.
    """
    found = []
    for name in names:
        if name in masks.KINDS:
            found.append(name)
            continue
        try:
            found += common.known_methods([name])
        except common.UsageError as error:
            own = ", ".join(masks.KINDS)
            raise common.UsageError(f"--masks: {error}; and of --peers alone: {own}") from None
        if layers.SETS[name_of_set].model is None:
            networks = ", ".join(n for n, s in layers.SETS.items() if s.model)
            raise common.UsageError(
                f"--masks {name}: --set {name_of_set} is no network to prune; those are {networks}"
            )
    return list(dict.fromkeys(found))


def pruned(model_name: str, method: str, sparsity: float, seed: int) -> dict[layers.Layer, Tensor]:
    """The masks of a real pruner, one per distinct layer shape (its batch 1).

    The network is untrained and scored on noise. Of several layers of the same shape, the one of
    median density gives its mask.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, in_shape = models.create(model_name), models.default_input_shape(model_name)
    located = masks.walk(model, in_shape)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(PRUNING_SAMPLES, *in_shape, generator=generator)
    y = torch.randint(list(located.values())[-1].rows, (PRUNING_SAMPLES,), generator=generator)
    steps = common.steps_of(method)
    whole, _ = common.prune_at_init(model, method, sparsity, [(x, y)], F.cross_entropy, steps, seed)
    by_layer: dict[layers.Layer, list[Tensor]] = {}
    for name, layer in located.items():
        by_layer.setdefault(layer, []).append(whole[f"{name}.weight"])
    return {
        layer: sorted(found, key=lambda mask: int(mask.count_nonzero()))[len(found) // 2]
        for layer, found in by_layer.items()
    }


def _masked_cases(
    document: dict[str, Any], cases: list[tuple[layers.Layer, int]]
) -> Iterator[tuple[layers.Layer, int, str, float, Tensor]]:
    """(layer, multiplicity, kind of mask, sparsity, mask) of every case."""
    settings = document["settings"]
    model, seed = layers.SETS[settings["set"]].model, settings["seed"]
    for kind in settings["masks"]:
        for sparsity in settings["sparsities"]:
            whole = {}
            if kind not in masks.KINDS and model is not None:
                whole = pruned(model, kind, sparsity, seed)
            for layer, count in cases:
                mask = (
                    masks.make(kind, layer.weight_shape, sparsity, seed)
                    if kind in masks.KINDS
                    else whole[replace(layer, batch=1)]
                )
                yield layer, count, kind, sparsity, mask


def _measure(
    document: dict[str, Any],
    cases: list[tuple[layers.Layer, int]],
    reasons: dict[str, str | None],
    ceilings: roofline.Ceilings,
) -> None:
    """Fill ``document`` case by case, so that an interruption keeps what is finished."""
    settings = document["settings"]
    total = len(cases) * len(settings["masks"]) * len(settings["sparsities"])
    with render.Steps(total) as steps:
        for layer, count, kind, sparsity, mask in _masked_cases(document, cases):
            what = f"{layer}, {kind} {render.sparsity(sparsity)}"
            steps.now(what)
            case = compare.make_case(layer, mask, settings["seed"])
            timed = compare.compare(case, compare.PEERS, reasons, settings["min_time"])
            result = {
                "case": str(layer),
                "kind": layer.kind,
                "batch": layer.batch,
                "layer": asdict(layer),
                "count": count,
                "mask": kind,
                "sparsity": sparsity,
                **summary.summarize(case, timed, compare.PEERS, ceilings),
            }
            document["results"].append(result)
            steps.done(f"{what}: {peer_tables.outcome(result)}")


def _report(args: argparse.Namespace, console: Console, document: dict[str, Any]) -> int:
    """Print the tables and write the files; 1 if a candidate was wrong or failed."""
    if args.json is not None:
        common.write_json(args.json, document)
    peer_tables.cases(console, document)
    peer_tables.means(console, document)
    peer_tables.notes(console, document)
    if args.plot is not None:
        plots.peers(document, args.plot)
    written = [str(p) for p in (args.json, args.plot) if p is not None]
    if written:
        console.print(f"\nwrote {' and '.join(written)}")
    return 1 if peer_tables.troubles(document) else 0
