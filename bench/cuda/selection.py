"""Selections: fastprune against torch's pipelines and against the time of the reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastprune as fp
from bench.cases import (
    GPU_LARGE_SELECTION,
    GPU_SELECTION,
    GPU_SELECTION_OVER_FLOOR,
    GPU_SELECTION_OVER_KTHVALUE,
    GPU_SELECTION_SECONDS,
)
from bench.cuda.clock import Call
from bench.cuda.session import Row, Session

DENSITY = 0.1
TINY = 10_007


def pipelines(w: Tensor, u: Tensor | None, k: int) -> dict[str, list[Call]]:
    """What one writes without fastprune; kthvalue keeps all that tie."""

    def scores() -> Tensor:
        return w.abs() if u is None else (w * u).abs()

    def topk() -> Tensor:
        s = scores()
        return torch.zeros_like(s, dtype=torch.bool).scatter_(0, s.topk(k, sorted=False)[1], True)

    def kthvalue() -> Tensor:
        s = scores()
        return s >= s.kthvalue(s.numel() - k + 1).values

    return {"torch.topk": [topk], "torch.kthvalue": [kthvalue]}


def measure_selection(
    session: Session, row: Row, w: Tensor, u: Tensor | None, peers: bool, **more: Any
) -> None:
    """One tensor of scores; ``more`` goes to the selection."""
    k = int(w.numel() * DENSITY)
    score: Any = "magnitude" if u is None else "saliency"
    others = None if u is None else [u]

    def ours() -> list[Tensor]:
        return fp.global_topk_mask([w], k=k, score=score, other=others, **more)

    (mask,) = ours()
    kept = int(mask.sum())
    if kept != k:
        row["wrong"] = f"{kept:,} kept, expected {k:,}"
    del mask
    candidates: dict[str, list[Call]] = {"fastprune": [ours]}
    if peers:
        candidates |= pipelines(w, u, k)
    session.time(row, candidates, launched=("torch.topk", "torch.kthvalue"))
    factors = w.numel() * w.element_size() * (1 if u is None else 2)
    row["bytes"] = 2 * factors + w.numel()
    row["reads"] = "factors twice, mask once"


def selection(session: Session) -> None:
    """25.6M and a billion scores; equal scores and an earlier mask, which hurt many selections."""
    _pairs_and_others(session, TINY if session.clock.dry else GPU_SELECTION)
    session.clock.release()
    over_floor = {"at_most_floor": GPU_SELECTION_OVER_FLOOR}
    n = TINY if session.clock.dry else GPU_LARGE_SELECTION
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        with session.row(f"{n:,}, {name} |w|", aims=[over_floor], density=DENSITY) as row:
            if row is not None:
                measure_selection(session, row, session.randn((n,), dtype, 1), None, False)


def _pairs_and_others(session: Session, n: int) -> None:
    over_floor = {"at_most_floor": GPU_SELECTION_OVER_FLOOR}
    w, u = (session.randn((n,), torch.float32, seed) for seed in (1, 2))
    within = session.mask((n,), 0.5, 3)
    pairs_aims = [
        {"at_most_seconds": GPU_SELECTION_SECONDS},
        {"over": "torch.kthvalue", "at_least": GPU_SELECTION_OVER_KTHVALUE},
        over_floor,
    ]
    rows: list[tuple[str, list[Any], Callable[[Row], None]]] = [
        ("pairs, |w u|", pairs_aims, lambda r: measure_selection(session, r, w, u, True)),
        ("|w|", [over_floor], lambda r: measure_selection(session, r, w, None, True)),
        (
            "|w| inside a mask of a half",
            [],
            lambda r: measure_selection(session, r, w, None, False, within=[within]),
        ),
        (
            "all equal",
            [],
            lambda r: measure_selection(session, r, torch.ones_like(w), None, True),
        ),
        (
            "bfloat16 |w|",
            [over_floor],
            lambda r: measure_selection(session, r, w.bfloat16(), None, False),
        ),
    ]
    for what, aims, fill in rows:
        with session.row(f"{n:,}, {what}", aims=aims, density=DENSITY) as row:
            if row is not None:
                fill(row)
