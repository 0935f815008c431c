"""``fastprune deq``: paper 000's experiments: equilibrium networks, pruned and trained.

For each seed: the four parametrizations (full, without A, without B, without both); each method at
each sparsity, pruned at initialization and trained; for SNIP and magnitude a dense network with as
many parameters as the pruned one has effective ones. Only the implicit layer is pruned. GraSP and
SynFlow score the network with sigmoids (Appendix C). Milliseconds are those of one forward pass of
the trained implicit layer on a test batch, with its masks and with plain weights, timed in turns.

``DIR/results.json``::

    {"command": "deq", "schema": 1, "interrupted": false,
     "machine": {see fastprune.cli.machine.describe},
     "settings": {"arch", "model", "dataset", "features", "methods", "sparsities", "equal_size",
                  "seeds", "epochs", "batch", "lr", "decay_epochs", "tol", "max_iter",
                  "score_tol", "score_activation"},
     "parameters": 84313,
     "results": [{"kind": "parametrization", "variant", "seed", ...},
                 {"kind": "pruned", "method", "sparsity", "seed", "kept", "prunable",
                  "matrices": {"U": sparsity, "A", "B"}, "effective_parameters", "warnings",
                  "solve": {"sparse": {"median", "low", "high", "runs"}, "dense"}, ...},
                 {"kind": "equal size", "method", "sparsity", "seed", "features", "parameters",
                  ...}],
     "findings": [{"finding", "holds", "numbers"}]}

Every result has "accuracy", "iterations" (of the forward solves on the test data), "unconverged"
(batches above the tolerance) and "train_seconds"; one that failed has "error" instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune import data, models
from fastprune.cli import common, deq_plots, deq_tables, machine, render
from fastprune.equilibrium.experiment import Recipe, batches_of, measure, time_solves, train_
from fastprune.equilibrium.findings import findings, of_kind
from fastprune.equilibrium.masking import mask_
from fastprune.equilibrium.parameters import effective_parameters, equal_size_channels
from fastprune.equilibrium.tables import matrix_sparsities
from fastprune.masks import Masks
from fastprune.nn import MonDEQLayer, equilibrium_settings
from fastprune.pruners.registry import PRUNERS
from fastprune.training.data import Split, find_dataset, load_split

SUMMARY = "Equilibrium networks (monDEQ), pruned and trained: paper 000's tables and figures."

# Network, implicit layer, what of it is pruned, the argument for its size, and what that has to be
# a multiple of (GroupNorm's groups).
_ARCHITECTURES = {
    "fc": ("mondeq-fc", "mon", "mon", "features", 1),
    "conv": ("mondeq-conv", "mon", "mon", "features", 1),
    "resnet": ("resnet-deq", "deq", "deq.cell", "channels", 8),
}
_METHODS = ["random", "magnitude", "snip", "grasp", "synflow"]
_SPARSITIES = [0.1, 0.5, 0.7, 0.9, 0.95, 0.97, 0.99, 0.999]
_EQUAL_SIZE = ("snip", "magnitude")
_VARIANTS: dict[str, dict[str, bool]] = {
    "full": {},
    "without A": {"use_A": False},
    "without B": {"use_B": False},
    "without A and B": {"use_A": False, "use_B": False},
}
# Their scores need a smooth network: paper 000, Appendix C.
_SMOOTH = ("grasp", "synflow")
_FAILURES = (ValueError, TypeError, RuntimeError, FloatingPointError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``deq``."""
    add = parser.add_argument
    add("--arch", choices=_ARCHITECTURES, default="fc", help="the network [fc]")
    add(
        "--methods",
        type=common.comma_separated,
        default=_METHODS,
        help=f"some of {','.join(PRUNERS)} [{','.join(_METHODS)}]",
    )
    add(
        "--sparsities",
        type=sparsities,
        default=_SPARSITIES,
        help="pruned per cents, or fractions below 1 [10,50,70,90,95,97,99,99.9]",
    )
    add("--data", default="digits", metavar="DIR", help="folder of the data set's files [digits]")
    add("--dataset", help=f"one of {', '.join(data.names())} [what is in DIR]")
    add("--seeds", type=common.positive_int, default=3, help="networks per case [3]")
    add("--seed", type=common.seed, default=0, help="the first of them [0]")
    add("--features", type=common.positive_int, help="size of the implicit layer [the paper's]")
    add("--epochs", type=common.positive_int, help="passes over the data [40; digits: 15]")
    add("--batch", type=common.positive_int, help="samples per step [128; digits: 64]")
    add("--lr", type=common.positive_float, help="of Adam, at first [0.001; digits: 0.003]")
    add("--decay-epochs", type=common.positive_int, help="epochs until lr is cut to a tenth [10; "
        "CIFAR: 25; digits: half of all]")  # fmt: skip
    add("--tol", type=common.positive_float, default=1e-2, help="of the solves [0.01]")
    add("--max-iter", type=common.positive_int, help="of the solves [300; resnet: 25]")
    add("--score-tol", type=common.positive_float, default=1e-6, help="when scoring [1e-6]")
    add("--score-relu", action="store_true", help="GraSP and SynFlow score with ReLU, not sigmoid")
    add("--min-time", type=common.positive_float, default=0.05, help="seconds per timing [0.05]")
    add("--threads", type=common.positive_int, help="threads [torch's choice]")
    add("--out", type=Path, metavar="DIR", help="write results.json and all plots there")
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--plot", type=Path, metavar="FILE", help="write Figure 1 as a PNG (matplotlib)")


def sparsities(text: str) -> list[float]:
    """Per cents, or fractions where all are below 1."""
    try:
        values = [float(part) for part in common.comma_separated(text)]
    except ValueError:
        values = [-1.0]
    if max(values) >= 1.0:
        values = [float(f"{v / 100:.12g}") for v in values]
    if not all(0.0 < v < 1.0 for v in values):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected per cents between 0 and 100, such as 90,99.9"
        )
    return list(dict.fromkeys(sorted(values)))


def run(args: argparse.Namespace) -> int:
    """Run the experiment; see :func:`fastprune.cli.main` for the exit code.

    Raises:
        UsageError: wrong arguments, missing packages or files.
        InterruptedRunError: after Ctrl-C; what was finished is in the JSON file.
    """
    if args.out is not None or args.plot is not None:
        common.require("matplotlib")
    json = args.json if args.out is None else args.json or args.out / "results.json"
    for path in (json, args.plot, None if args.out is None else args.out / "figure-1.png"):
        if path is not None:
            common.writable(path)
    methods = common.known_methods(args.methods)
    common.use_threads(args.threads)
    experiment = _Experiment(args, methods)
    document = experiment.document
    console = render.stdout()
    deq_tables.header(console, document)
    with common.keeping(document, json):
        experiment.run()
    document["findings"] = findings(document)
    if json is not None:
        common.write_json(json, document)
    deq_tables.results(console, document)
    written = [] if json is None else [json]
    if args.plot is not None:
        deq_plots.curves(document, args.plot)
        written.append(args.plot)
    if args.out is not None:
        written += deq_plots.folder(document, experiment.shown, args.out)
    if written:
        console.print(f"\nwrote {', '.join(map(str, written))}")
    return int(any("error" in r for r in document["results"]))


def _shown(key: str, value: Any) -> str:
    return {"sparsity": render.sparsity, "seed": lambda n: f"seed {n}"}.get(key, str)(value)


class _Experiment:
    """The cases of a run, and what they share."""

    def __init__(self, args: argparse.Namespace, methods: list[str]) -> None:
        self.model_name, self.layer, self.include, self.size, self.unit = _ARCHITECTURES[args.arch]
        self.args = args
        self.max_iter = args.max_iter or (25 if args.arch == "resnet" else 300)
        self.shown: dict[str, Tensor] = {}  # masks for the heat maps
        with common.usage_errors():
            self._load(args)
            digits = self.info.name == "digits"
            epochs = args.epochs or (15 if digits else 40)
            usual = max(1, epochs // 2) if digits else 25 if "cifar" in self.info.name else 10
            self.recipe = Recipe(
                epochs,
                min(args.batch or (64 if digits else 128), len(self.train)),
                args.lr or (3e-3 if digits else 1e-3),
                args.decay_epochs or usual,
            )
            self.features = args.features or (16 if digits and args.arch == "conv" else None)
            self.monotone = args.arch != "resnet"
            first = self._network(0, {})
        layer: Any = first.get_submodule(self.layer)
        if self.features is None:
            self.features = getattr(layer, "out_features", getattr(layer, "out_channels", None))
        self.tests = batches_of(self.test, self.recipe.batch)
        self.document: dict[str, Any] = {
            "command": "deq",
            "schema": 1,
            "interrupted": False,
            "machine": machine.describe(torch.device("cpu"), torch.float32),
            "settings": {
                "arch": args.arch,
                "model": self.model_name,
                "dataset": self.info.name,
                "input_shape": list(self.info.in_shape),
                "features": self.features,
                "methods": methods,
                "sparsities": args.sparsities,
                "equal_size": [m for m in methods if m in _EQUAL_SIZE],
                "seeds": list(range(args.seed, args.seed + args.seeds)),
                "epochs": epochs,
                "batch": self.recipe.batch,
                "lr": self.recipe.lr,
                "decay_epochs": self.recipe.decay_epochs,
                "tol": args.tol,
                "max_iter": self.max_iter,
                "score_tol": args.score_tol,
                "score_activation": "relu" if args.score_relu else "sigmoid",
            },
            "parameters": sum(p.numel() for p in first.parameters()),
            "results": [],
        }

    def _load(self, args: argparse.Namespace) -> None:
        root = None
        if args.data == "digits":
            common.require("sklearn")
            name = args.dataset or "digits"
        else:
            root = Path(args.data)
            name = args.dataset or find_dataset(root)
        self.info = data.info(name)
        splits = [load_split(self.info.name, s, root) for s in ("train", "test")]
        if not all(isinstance(s, Split) for s in splits):
            raise ValueError(f"--dataset: {self.info.name} does not fit in memory; deq needs that")
        self.train, self.test = splits

    def _network(self, seed: int, options: Mapping[str, Any]) -> nn.Module:
        settings: dict[str, Any] = {"tol": self.args.tol, "max_iter": self.max_iter}
        if self.features is not None:
            settings[self.size] = self.features
        settings["on_failure"] = "ignore"  # counted instead
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return models.create(
                self.model_name,
                num_classes=self.info.num_classes,
                in_shape=self.info.in_shape,
                **{**settings, **options},
            )

    def run(self) -> None:
        """Fill the document case by case, so that an interruption keeps what is finished."""
        cases = list(self._cases())
        with render.Steps(len(cases)) as steps:
            for result, work in cases:
                what = ", ".join(_shown(key, value) for key, value in result.items())
                steps.now(what)
                try:
                    result |= work()
                    accuracy = render.percent(result["accuracy"])
                    outcome = f"accuracy {accuracy}, {result['iterations']:.1f} iterations"
                except _FAILURES as error:
                    # One case that fails must not hide the others.
                    outcome = result["error"] = " ".join(f"{type(error).__name__}: {error}".split())
                self.document["results"].append(result)
                steps.done(f"{what}: {outcome}")

    def _cases(self) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
        s = self.document["settings"]
        for seed in s["seeds"]:
            for v in _VARIANTS if self.monotone else ["full"]:
                result = {"kind": "parametrization", "variant": v, "seed": seed}
                yield result, partial(self._dense, seed, _VARIANTS[v])
            for kind, work in (("pruned", self._pruned), ("equal size", self._equal_size)):
                for m in s["methods"] if kind == "pruned" else s["equal_size"]:
                    for q in s["sparsities"]:
                        result = {"kind": kind, "method": m, "sparsity": q, "seed": seed}
                        yield result, partial(work, seed, m, q)

    def _dense(self, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        return self._trained(self._network(seed, options), seed)

    def _trained(self, model: nn.Module, seed: int) -> dict[str, Any]:
        seconds = train_(model, self.train, self.recipe, seed)
        layer = model.get_submodule(self.layer)
        return {**measure(model, layer, self.tests), "train_seconds": seconds}

    def _pruned(self, seed: int, method: str, sparsity: float) -> dict[str, Any]:
        model = self._network(seed, {})
        masks, warned = self._masks(model, seed, method, sparsity)
        found: dict[str, Any] = {
            "kept": masks.nnz(),
            "prunable": masks.numel(),
            "matrices": {},
            "warnings": warned,
        }
        if self.monotone:
            rows = matrix_sparsities(model, masks).rows
            found["matrices"] = {row.name: row.sparsity for row in rows}
        self._show(masks, seed, method, sparsity)
        example = self.test.x[:1]
        found["effective_parameters"] = effective_parameters(model, masks, example)
        mask_(model, masks)
        found |= self._trained(model, seed)
        found["solve"] = time_solves(model, self.layer, self.tests[0][0], self.args.min_time)
        return found

    def _masks(
        self, model: nn.Module, seed: int, method: str, sparsity: float
    ) -> tuple[Masks, list[str]]:
        def prune() -> tuple[Masks, list[str]]:
            return common.prune_at_init(
                model,
                method,
                sparsity,
                batches_of(self.train, self.recipe.batch),
                F.cross_entropy,
                common.steps_of(method),
                seed,
                include=[self.include],
            )

        if not any(isinstance(m, MonDEQLayer) for m in model.modules()):
            return prune()
        smooth = method in _SMOOTH and not self.args.score_relu
        with equilibrium_settings(
            model,
            activation="sigmoid" if smooth else None,
            tol=self.args.score_tol,
            max_iter=10 * self.max_iter,
        ):
            return prune()

    def _show(self, masks: Masks, seed: int, method: str, sparsity: float) -> None:
        """Keep the masks of Figure D1: SNIP at 90 %, or what is nearest."""
        s = self.document["settings"]
        wanted = "snip" if "snip" in s["methods"] else s["methods"][0]
        nearest = min(s["sparsities"], key=lambda q: abs(q - 0.9))
        if (seed, method, sparsity) == (s["seeds"][0], wanted, nearest):
            self.shown = {name: masks[name] for name in masks}

    def _equal_size(self, seed: int, method: str, sparsity: float) -> dict[str, Any]:
        done = of_kind(self.document, "pruned", method=method, sparsity=sparsity, seed=seed)
        if not done:
            raise ValueError("the pruned network of this case failed")
        target = max(1, done[0]["effective_parameters"])
        units = equal_size_channels(
            lambda n: self._network(seed, {self.size: n * self.unit}), target
        )
        features = units * self.unit
        model = self._network(seed, {self.size: features})
        parameters = sum(p.numel() for p in model.parameters())
        return {"features": features, "parameters": parameters, **self._trained(model, seed)}
