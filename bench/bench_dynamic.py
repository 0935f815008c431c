"""Training while pruning, against dense training: ``python -m bench.bench_dynamic``.

Times whole periods of ``--every`` steps (forward, backward, SGD with momentum, the pruner's step
and with it one refresh of the masks), in turn: torch's dense training, contiguous and
channels_last; DPF and gradual pruning at a constant sparsity, refreshed every period; training with
a fixed mask, as masked layers in place and as :func:`fastprune.accelerate` prepares it. Random
images; the time does not depend on what is learned.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastprune as fp
from bench.harness import as_times, machine
from fastprune import timing
from fastprune.dynamic import DynamicPruner


class Training:
    """One network in training; a call is one period."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        every: int,
        pruner: DynamicPruner | None = None,
    ) -> None:
        self.model, self.x, self.y = model.train(), x, y
        self.every, self.pruner = every, pruner
        self.optimizer = torch.optim.SGD(
            model.parameters(), 1e-2, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.refreshing: list[float] = []  # seconds in the pruner, by period

    def __call__(self) -> None:
        pruning = 0.0
        for _ in range(self.every):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
            start = time.perf_counter()
            if self.pruner is not None:
                self.pruner.step()
            pruning += time.perf_counter() - start
        self.refreshing.append(pruning)


def candidates(args: argparse.Namespace) -> dict[str, Training]:
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, 32, 32)
    y = torch.randint(10, (args.batch,))

    def network() -> nn.Module:
        torch.manual_seed(0)
        return fp.models.create(args.model)

    def pruned(make: Callable[..., Any]) -> Training:
        model = network()
        pruner = make(model, args.sparsity, 1_000_000, args.every, "constant", example_input=x)
        return Training(model, x, y, args.every, pruner)

    last = torch.channels_last
    fixed = network()
    one_shot = fp.OneShot(fixed, args.sparsity, 0, example_input=x)
    masks = one_shot.finish()
    fast, report = fp.accelerate(network().train(), masks, x, training=True)
    return {
        "dense": Training(network(), x, y, args.every),
        "dense, channels_last": Training(
            network().to(memory_format=last),  # type: ignore[call-overload]
            x.contiguous(memory_format=last),
            y,
            args.every,
        ),
        "DPF": pruned(fp.DPF),
        "incremental": pruned(fp.Incremental),
        "fixed mask, in place": Training(fixed, x, y, args.every),
        f"fixed mask, accelerated ({report.form or 'as it is'})": Training(fast, x, y, args.every),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_dynamic", description=__doc__)
    parser.add_argument("--model", default="wide-resnet-28-2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--every", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("out/dynamic.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head, console = machine(), Console(width=110)
    console.print(", ".join(f"{key} {value}" for key, value in head.items()))
    runs = candidates(args)
    # Untimed: one step of each, and what the first calls keep.
    for run in runs.values():
        every, run.every = run.every, 1
        run()
        run.every, run.refreshing = every, []
    times = timing.measure(
        runs, min_time=0.0, min_rounds=args.rounds, max_rounds=args.rounds, warmup=0
    )
    dense = min(times["dense"].median, times["dense, channels_last"].median)
    table = Table(
        "",
        "ms a step",
        "quartiles",
        "speedup",
        "of it the pruner",
        title=f"{args.model}, "
        f"batch {args.batch}, {100 * args.sparsity:g} %, masks every {args.every} steps",
    )
    rows = {}
    for name, t in times.items():
        share = sum(runs[name].refreshing) / len(runs[name].refreshing) / t.median
        ms = [1e3 * s / args.every for s in (t.median, t.low, t.high)]
        table.add_row(
            name,
            f"{ms[0]:.1f}",
            f"{ms[1]:.1f} - {ms[2]:.1f}",
            f"{dense / t.median:.2f}x",
            f"{100 * share:.2f} %" if runs[name].pruner is not None else "",
        )
        rows[name] = {"ms": ms[0], "speedup": dense / t.median, "pruner_share": share}
    console.print(table)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    args.json.write_text(
        json.dumps(
            {"machine": head, "settings": settings, "rows": rows, "periods": as_times(times)},
            indent=1,
        )
    )
    console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
