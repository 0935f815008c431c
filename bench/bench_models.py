"""Whole networks, dense against accelerated: ``python -m bench.bench_models [--nets ...]``.

Inference (evaluation mode) and training steps (forward, backward, SGD with momentum), float32, on
untrained networks with random masks or those of a pruner. "Dense" is the pruned network on torch's
own kernels, the better of contiguous and channels_last, timed in turn with the accelerated one.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastprune as fp
from bench.cases import INFERENCE, SPARSITIES, TRAINING, Network
from bench.harness import machine
from fastprune import timing


def network(case: Network, sparsity: float, masks: str) -> tuple[nn.Module, fp.Masks, Tensor]:
    """An untrained network, its masks and an input."""
    torch.manual_seed(0)
    model = fp.models.create(case.name)
    x = torch.randn(case.batch, *case.shape)
    if masks == "random":
        generator = torch.Generator().manual_seed(0)
        return model, fp.prune(model, "random", sparsity=sparsity, generator=generator), x
    y = torch.randint(10, (case.batch,))
    few = [(x[:16], y[:16])]
    return model, fp.prune(model, masks, sparsity=sparsity, data=few, loss=F.cross_entropy), x


def inference(case: Network, sparsity: float, masks: str) -> dict[str, float | str]:
    model, chosen, x = network(case, sparsity, masks)
    _, report = fp.accelerate(model.eval(), chosen, x)
    return {
        "dense_ms": report.dense_ms,
        "fast_ms": report.fast_ms,
        "form": report.form,
        # What the masks leave of the multiplications bounds the speedup.
        "macs": fp.macs(model, x[:1], chosen).total.density,
    }


def training(case: Network, sparsity: float, masks: str) -> dict[str, float | str]:
    model, chosen, x = network(case, sparsity, masks)
    fast, report = fp.accelerate(model.train(), chosen, x, training=True)
    dense, moved = model, copy.deepcopy(model)
    for net in (dense, moved):
        chosen.apply_(net)
    y = torch.randint(10, (case.batch,))
    last = torch.channels_last

    def step(net: nn.Module, x: Tensor) -> Callable[[], None]:
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)

        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

        return run

    times = timing.measure(
        {
            "dense": step(dense.train(), x),
            "channels_last": step(
                moved.train().to(memory_format=last),  # type: ignore[call-overload]
                x.contiguous(memory_format=last),
            ),
            "fast": step(fast, x),
        },
        min_time=0.5,
        min_rounds=3,
    )
    ms = {name: 1e3 * t.median for name, t in times.items()}
    return {
        "dense_ms": min(ms["dense"], ms["channels_last"]),
        "fast_ms": ms["fast"],
        "form": report.form,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_models", description=__doc__)
    parser.add_argument("--nets", nargs="+", help="names as in bench/cases.py; all otherwise")
    parser.add_argument("--masks", default="random", help="random, or a method of fastprune.prune")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--what", nargs="+", choices=("inference", "training"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("out/models.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head, console, rows = machine(), Console(), []
    console.print(", ".join(f"{key} {value}" for key, value in head.items()))
    groups = {"inference": (INFERENCE, inference), "training": (TRAINING, training)}
    for what in args.what or groups:
        cases, run = groups[what]
        table = Table("network", *(f"{100 * s:g} %" for s in args.sparsities))
        for case in cases:
            if args.nets and case.name not in args.nets:
                continue
            cells = []
            for sparsity in args.sparsities:
                row = run(case, sparsity, args.masks)
                rows.append({"what": what, **case._asdict(), "sparsity": sparsity, **row})
                cells.append(
                    f"{row['dense_ms'] / row['fast_ms']:.2f}x  "  # type: ignore[operator]
                    f"{row['dense_ms']:.1f} / {row['fast_ms']:.1f} ms"
                    + (f", {row['macs']:.1%} MACs" if "macs" in row else "")
                )
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(
                    json.dumps({"machine": head, "masks": args.masks, "rows": rows}, indent=1)
                )
            table.add_row(str(case), *cells)
        console.print(f"{what}: speedup, dense / accelerated; {args.masks} masks", table, sep="\n")
    console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
